# SPDX-License-Identifier: Apache-2.0
"""Causal 3D convolution without a padded copy of its input: bare ops, fakes, autograd, dispatch, public function.

Bare ops, one pair per backend (suffix none: C++ on the CPU; `_triton`, `_cudnn`, `_torch`, `_cuda`):

    causal_conv3d_fwd    y = residual + act(conv(x, weight) + bias)          [B, K, To, Ho, Wo], dtype and format of x
    causal_conv3d_bwd    from the gradient of the conv's sum, those gradients of x, history, weight and bias that are asked
                         for, in this order; that of weight in its dtype and format, others in the format of `grad`

`padding` = (front, back, top, bottom, left, right); what lies at padded coordinates is said in `_conv.geometry`.
`activation`: 0 none, 1 SiLU. The caller has checked everything, nothing is empty, and the kernel fits at least once.
A forward launcher takes one more keyword, `out=`: a strided view (stride 1 along the channels) that receives the
result; `ops.upsample_conv3d` uses it to let every phase write its own frames, rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from vidkernels import _signature, dispatch
from vidkernels._conv import cpp
from vidkernels._conv.geometry import NONE, Geometry, is_channels_last, output_size
from vidkernels._conv.gradients import weight_format
from vidkernels._reference import causal_conv3d as reference
from vidkernels.ops._autograd import check_single, distinct, first_order, laid_out, needs_grad
from vidkernels.ops._causal_conv3d_backends import SUFFIX, bare_op, rank, table
from vidkernels.ops._causal_conv3d_call import Call, autocast, check_out, dense, next_history, prepare, signature
from vidkernels.ops._register import PYTORCH_KEYS, Launcher, define, define_variant, implement, is_watched

_GEOMETRY = "int[] stride, int[] dilation, int[] padding, int time_mode, int space_mode"
_FWD = (
    f"(Tensor x, Tensor weight, Tensor? bias, Tensor? history, Tensor? residual, {_GEOMETRY}, int activation) -> Tensor"
)
# Options of the public function that its decisions depend on.
_OPTIONS = (
    *("stride", "dilation", "time_padding", "pad_frames", "spatial_padding", "spatial_padding_mode", "activation"),
    "return_history",
)
# `geometry` is `Geometry.flat()`; `needs`: x, history, weight, bias.
_BWD = "(Tensor grad, Tensor x, Tensor weight, Tensor? history, int[] geometry, bool[] needs) -> Tensor[]"


def _fwd_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_mode: int,
    space_mode: int,
    activation: int,
) -> torch.Tensor:
    torch._check(x.shape[1] == weight.shape[1], lambda: "causal_conv3d_fwd: x and weight differ in input channels")
    size = output_size(x.shape[2:], weight.shape[2:], stride, dilation, padding)
    memory_format = torch.channels_last_3d if is_channels_last(x) else torch.contiguous_format
    return torch.empty(
        [x.shape[0], weight.shape[0], *size], dtype=x.dtype, device=x.device, memory_format=memory_format
    )


def _bwd_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    history: torch.Tensor | None,
    geometry: Sequence[int],
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    torch._check(grad.shape[1] == weight.shape[0], lambda: "causal_conv3d_bwd: grad and weight differ in channels")
    memory_format = torch.channels_last_3d if is_channels_last(grad) else torch.contiguous_format
    like_x: dict[str, Any] = {"dtype": grad.dtype, "device": grad.device, "memory_format": memory_format}
    like_weight: dict[str, Any] = {"dtype": weight.dtype, "device": grad.device, "memory_format": weight_format(weight)}
    found = []
    for needed, tensor, options in (
        (needs[0], x, like_x),
        (needs[1], history, like_x),
        (needs[2], weight, like_weight),
    ):
        if needed and tensor is not None:
            found.append(torch.empty(tensor.shape, **options))
    return [*found, grad.new_empty([grad.shape[1]])] if needs[3] else found


def _define(name: str, schema: str, fake: Any) -> None:
    define(name, schema, fake, triton=f"vidkernels.triton.causal_conv3d:{name}")
    define_variant(name, "torch", schema, fake, f"vidkernels._conv.aten:{name}", PYTORCH_KEYS)
    define_variant(name, "cudnn", schema, fake, f"vidkernels.cudnn:{name}", ("CUDA",))
    define_variant(name, "cuda", schema, fake, f"vidkernels._conv.cuda:{name}", ("CUDA",))
    implement(name, f"vidkernels._conv.cpp:{name}", "CPU")


# The kernel in C++: y is a view with any strides but the channels', `before` the padding in front, above and left.
_OUT = (
    "(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias, Tensor? history, Tensor? residual, int[] stride, "
    "int[] dilation, int[] before, int time_mode, int space_mode, int activation, int algorithm) -> ()"
)
define("causal_conv3d_out", _OUT, lambda *args: None)
# The kernel in CUDA C++, 3x3 taps in space; `tile`: filters, rows and columns of blocks, rows of boxes in a group.
_BOX_OUT = (
    "(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias, Tensor? history, Tensor? residual, int[] before, "
    "int time_mode, int space_mode, int activation, int[] tile) -> ()"
)
define("causal_conv3d_box_out", _BOX_OUT, lambda *args: None)
# dweight [K, C, kt, kh, kw] in the accumulation type, contiguous.
_WGRAD_OUT = (
    "(Tensor(a!) dweight, Tensor grad, Tensor x, Tensor? history, int[] stride, int[] dilation, int[] before, "
    "int time_mode, int space_mode, int algorithm) -> ()"
)
define("causal_conv3d_wgrad_out", _WGRAD_OUT, lambda *args: None)
# out [K, C, t, h, w], filters side by side: taps of a weight, or of its share in a blend, summed by rows (none: as they are).
_SUM_TAPS_OUT = (
    "(Tensor(a!) out, Tensor weight, Tensor? mix_factor, float[] t, float[] h, float[] w, int[] smooth_at) -> ()"
)
define("sum_taps_out", _SUM_TAPS_OUT, lambda *args: None)
_define("causal_conv3d_fwd", _FWD, _fwd_fake)
_define("causal_conv3d_bwd", _BWD, _bwd_fake)


class _CausalConv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, history, residual, geometry: Geometry, activation: int, backend: str):
        fwd = bare_op("causal_conv3d_fwd", backend)
        if activation == NONE:
            total = None
            y = fwd(x, weight, bias, history, residual, *geometry.args(), NONE)
        else:  # the backward needs the sum before the activation: kept instead of computed again
            total = fwd(x, weight, bias, history, None, *geometry.args(), NONE)
            y = F.silu(total) if residual is None else F.silu(total).add_(residual)
        ctx.save_for_backward(x, weight, history, total)
        ctx.geometry, ctx.backend = geometry, backend
        return y

    @staticmethod
    @first_order
    def backward(ctx, grad):
        x, weight, history, total = ctx.saved_tensors
        need_x, need_weight, need_bias, need_history, need_residual = ctx.needs_input_grad[:5]
        dresidual = grad if need_residual else None
        needs = [need_x, need_history, need_weight, need_bias]
        if not any(needs):
            return None, None, None, None, dresidual, None, None, None
        check_single(grad, "causal_conv3d")
        grad = laid_out(grad, is_channels_last(x))
        if total is not None:
            grad = torch.ops.aten.silu_backward(grad, total)
        bwd = bare_op("causal_conv3d_bwd", ctx.backend)
        found = iter(bwd(grad, x, weight, history, ctx.geometry.flat(), needs))
        dx, dhistory, dweight, dbias = (next(found) if need else None for need in needs)
        return dx, dweight, dbias, dhistory, dresidual, None, None, None


def _facts(*args: Any, out: torch.Tensor | None = None, **kwargs: Any) -> tuple[Any, ...]:
    return prepare(*args, **kwargs).facts()


BACKENDS = dispatch.Dispatcher("causal_conv3d", facts=_facts, backends=table(), rank=rank)
_DECISIONS = _signature.Memo()


class _Decision(NamedTuple):
    """What shapes and options alone decide."""

    geometry: Geometry
    activation: int
    size: tuple[int, int, int]
    past: int  # frames of the history that are read
    backend: str | None  # None: there is nothing to sum
    launch: Launcher | None  # None: the call is not kept

    def call(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        history: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> Call:
        """The call with these tensors."""
        if history is not None:
            frames = history.shape[2]
            history = None if not self.past else history if frames == self.past else history[:, :, frames - self.past :]
        return Call(x, weight, bias, history, residual, self.geometry, self.activation, self.size)


def _decided(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    residual: torch.Tensor | None,
    backend: str,
    options: tuple[Any, ...],
) -> tuple[Call, _Decision]:
    """A checked call, and who serves it; `options` in the order of `_OPTIONS`."""
    if torch.compiler.is_compiling():  # before anything that graphs would be guarded by
        return _decide(x, weight, bias, history, residual, backend, options)
    if torch._C._is_any_autocast_enabled():
        x, weight, (bias, history, residual) = autocast(x, weight, bias, history, residual)
    key = signature((*options, backend), x, weight, bias, history, residual)
    if key is None:
        return _decide(x, weight, bias, history, residual, backend, options)
    decision: _Decision | None = _DECISIONS.get(key)
    if decision is not None:
        return decision.call(x, weight, bias, history, residual), decision
    call, decision = _decide(x, weight, bias, history, residual, backend, options)
    if decision.backend in SUFFIX:
        decision = decision._replace(launch=Launcher(bare_op("causal_conv3d_fwd", decision.backend), x))
    if decision.backend != "reference":  # which may warn, or be an error, each time
        _DECISIONS.keep(key, (*options, backend), decision)
    return call, decision


def _decide(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    residual: torch.Tensor | None,
    backend: str,
    options: tuple[Any, ...],
) -> tuple[Call, _Decision]:
    """The same by all checks and predicates."""
    named = dict(zip(_OPTIONS, options, strict=True))
    call = prepare(x, weight, bias, history=history, residual=residual, **named)
    chosen = None if call.is_empty else BACKENDS.select(backend, *call.facts())
    past = 0 if call.history is None else call.history.shape[2]
    return call, _Decision(call.geometry, call.activation, call.size, past, chosen, None)


def _operands(call: Call) -> tuple[Any, Any, Any, Any, Any]:
    """The tensors of a call as the bare ops take them."""
    return call.x, call.weight, dense(call.bias), call.history, call.residual


def _computed(call: Call, decision: _Decision) -> torch.Tensor:
    """The result of a call."""
    backend, launch = decision.backend, decision.launch
    if backend is None:
        return call.empty_result()
    if backend == "reference":
        return call.reference(reference.causal_conv3d)
    tensors = _operands(call)
    if needs_grad(*tensors):
        return _CausalConv3d.apply(*distinct(*tensors), call.geometry, call.activation, backend)
    run = bare_op("causal_conv3d_fwd", backend) if launch is None else launch
    return run(*tensors, *call.geometry.args(), call.activation)


def _computed_into(out: torch.Tensor, call: Call, decision: _Decision) -> torch.Tensor:
    """The same in `out`, which may be the residual: our kernels read an element of it just before they write it."""
    backend, launch = decision.backend, decision.launch
    tensors = _operands(call)
    if backend == "cpp" and not torch.compiler.is_compiling():
        return cpp.causal_conv3d_fwd(*tensors, *call.geometry.args(), call.activation, out=out)
    direct = None if launch is None or is_watched() else launch.direct
    if backend in ("triton", "cudnn", "cuda") and direct is not None:
        return direct(*tensors, *call.geometry.args(), call.activation, out=out)
    if backend == "torch" and call.residual is out:  # it adds the residual in a pass of its own, here as well
        return out.add_(_computed(replace(call, residual=None), decision))
    return out.copy_(_computed(call, decision))


def causal_conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int | tuple[int, int, int] = 1,
    dilation: int | tuple[int, int, int] = 1,
    time_padding: str = "zeros",
    history: torch.Tensor | None = None,
    pad_frames: int | tuple[int, int] | None = None,
    spatial_padding: int | tuple[int, ...] | None = None,
    spatial_padding_mode: str = "zeros",
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    return_history: bool = False,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """3D convolution that never looks into the future: `y = residual + act(conv(x, weight) + bias)`.

    Frame `o` of y sums tap `j` of the kernel on input frame `o*st - front + j*dt`; frames before the first are taken
    from `history`, then from the padding rule. Nothing padded or concatenated is ever written to memory.

    Args:
        x: [B, C, T, H, W], float32, float64, bfloat16 or float16; fastest in `torch.channels_last_3d`.
        weight: [K, C, kt, kh, kw], dtype of x.
        bias: [K].
        stride, dilation: one int or (t, h, w).
        time_padding: what lies before the first frame and before `history`: "zeros", "replicate" (the oldest frame there
            is), "history" (`history` holds all of it) or "none" (nothing is put in front).
        history: [B, C, P, H, W], the P frames before x.
        pad_frames: frames in front, or (in front, behind). Default ((kt-1)*dt + 1 - st, 0), P for "history". Frames
            behind make the convolution non-causal; they are zeros, or the last frame for "replicate".
        spatial_padding: int, (h, w) or (left, right, top, bottom) as in `F.pad`. Default: half of (k-1)*d per side.
        spatial_padding_mode: "zeros" or "replicate".
        activation: None or "silu".
        residual: added last; shape of y.
        return_history: also return the frames that the next chunk of the clip needs as `history`.
        out: receives the result, without gradients; any strides. It may be `residual` itself, and overlaps no other input.
        backend: "auto", or one of `vidkernels.explain("causal_conv3d", x, weight)`.

    Returns:
        y [B, K, To, Ho, Wo] in the memory format of x, To = (front + T + behind - (kt-1)*dt - 1) // st + 1 (no frames
        if that is below one); with `return_history` also the next history [B, C, P', H, W].

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.

    NaN and Inf reach every output whose taps touch them, and no other (Inf may arrive as NaN). Streaming: feeding a clip
    in any chunks with `history` gives the frames of the whole clip (bit for bit on one kernel).

    Source: VidTok (arXiv 2412.13061), MAGVIT-v2 (arXiv 2310.05737) section 3.1, CogVideoX, Wan and HunyuanVideo VAEs.
    """
    options = (
        *(stride, dilation, time_padding, pad_frames, spatial_padding, spatial_padding_mode, activation),
        return_history,
    )
    call, decision = _decided(x, weight, bias, history, residual, backend, options)
    if out is None:
        y = _computed(call, decision)
    else:
        check_out(call, out)
        y = _computed_into(out, call, decision)
    return (y, next_history(call)) if return_history else y
