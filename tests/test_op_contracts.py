# SPDX-License-Identifier: Apache-2.0
"""What every op promises alike: torch.func, forward mode and second derivatives are served or refused, never wrong; and
any strides of any argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_gradients_within_promise
from torch import Tensor
from torch.autograd import forward_ad

import vidkernels
from vidkernels import errors, nn, ops
from vidkernels._commands.samples import Sample, samples

# Codes have no derivative with respect to indices, nor indices to codes.
SAMPLES = {s.op: s for s in samples(torch.device("cpu"), torch.float64) if "_to_" not in s.op}
SAMPLES["lfq_quantize on the sphere"] = Sample("lfq_quantize", SAMPLES["lfq_quantize"].args, {"spherical": True})
every_op = pytest.mark.parametrize("sample", SAMPLES.values(), ids=list(SAMPLES))
pytestmark = pytest.mark.filterwarnings("ignore::vidkernels.errors.VidkernelsFallbackWarning")


def _floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def scalar(sample: Sample) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The sum of the squares of an op's floating outputs as a function of its floating arguments, and those arguments."""
    inputs = [value for value in (*sample.args, *sample.kwargs.values()) if _floating(value)]

    def call(*values: Tensor, backend: str = "auto") -> Tensor:
        rest = iter(values)
        args = [next(rest) if _floating(value) else value for value in sample.args]
        kwargs = {key: next(rest) if _floating(value) else value for key, value in sample.kwargs.items()}
        found = getattr(ops, sample.op)(*args, **kwargs, backend=backend)
        found = found if isinstance(found, tuple) else (found,)
        return torch.stack([x.square().sum() for x in found if x is not None and x.is_floating_point()]).sum()

    return call, inputs


def gradients(call: Callable[..., Tensor], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(call(*leaves, backend="reference"), leaves, **options))


@every_op
def test_gradients_by_torch_func(sample: Sample) -> None:
    """`torch.func.grad` and a gradient per sample of a batch, by the reference: autograd functions know no transforms."""
    call, inputs = scalar(sample)
    places = tuple(range(len(inputs)))
    for found, right in zip(torch.func.grad(call, argnums=places)(*inputs), gradients(call, inputs), strict=True):
        torch.testing.assert_close(found, right)
    batches = [torch.stack([x, 1.1 * x]) for x in inputs]
    several = torch.func.vmap(torch.func.grad(call, argnums=places))(*batches)
    for index in range(2):
        one = gradients(call, [batch[index] for batch in batches])
        for found, right in zip(several, one, strict=True):
            torch.testing.assert_close(found[index], right)


@every_op
def test_forward_mode(sample: Sample) -> None:
    """A bare op drops tangents; with dual numbers about, the reference runs."""
    call, inputs = scalar(sample)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, torch.ones_like(x)) for x in inputs]
        tangent = forward_ad.unpack_dual(call(*duals)).tangent
    torch.testing.assert_close(tangent, torch.stack([g.sum() for g in gradients(call, inputs)]).sum())


@pytest.mark.parametrize(
    ("name", "frames", "options"),
    [("downsample_conv3d", 0, {}), ("downsample_conv3d", 1, {"pad_frames": (4, 0)}), ("upsample_conv3d", 0, {})],
    ids=["downsample", "downsample padding", "upsample"],
)
def test_blends_without_frames_under_transforms(name: str, frames: int, options: dict[str, Any]) -> None:
    """No backend is asked about them, and so nobody asked whether an autograd function may run: what padding leaves is the
    scaled bias."""
    x, weight, bias = torch.zeros(1, 4, 0, 3, 3), torch.randn(4, 4, 3, 3, 3), torch.randn(4)

    def call(mix: Tensor) -> Tensor:
        return getattr(ops, name)(x, weight, bias, mix_factor=mix, **options)

    mix = torch.tensor([0.3])
    expected = ((1 - mix.sigmoid()) * bias)[None, :, None, None, None].expand(1, 4, frames, 3, 3)
    torch.testing.assert_close(call(mix), expected)
    torch.testing.assert_close(torch.func.vmap(call)(mix[None])[0], expected)
    leaf = mix.clone().requires_grad_()
    (right,) = torch.autograd.grad(call(leaf).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda m: call(m).sum())(mix), right)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(mix, torch.ones(1)))).tangent
        torch.testing.assert_close(tangent.sum(), right.sum())


def test_a_convolution_without_frames_under_vmap() -> None:
    """Nobody asks about its layout there."""
    clips, weight, bias = torch.randn(3, 1, 1, 3, 3, 4).movedim(-1, 2), torch.randn(2, 4, 3, 3, 3), torch.randn(2)
    found = torch.func.vmap(lambda x: ops.causal_conv3d(x, weight, bias, time_padding="none"))(clips)
    assert found.shape == (3, 1, 2, 0, 3, 3)


def test_explicit_backend_under_a_transform() -> None:
    x = torch.randn(3, 8)
    with pytest.raises(errors.BackendUnavailable, match=r"torch\.func transform is active"):
        torch.func.grad(lambda z: ops.channel_norm(z, backend="cpp").sum())(x)
    assert vidkernels.explain("channel_norm", x).chosen != "reference"


@every_op
def test_second_derivatives(sample: Sample) -> None:
    """Zero without a word for kernels, which are constants to autograd: an error that names the way out."""
    call, inputs = scalar(sample)
    leaves = [x.detach().requires_grad_() for x in inputs]
    first = torch.autograd.grad(call(*leaves), leaves, create_graph=True)
    for found, right in zip(first, gradients(call, inputs), strict=True):
        torch.testing.assert_close(found, right)
    total = torch.stack([g.square().sum() for g in first]).sum()
    if sample.op == "lfq_quantize" and not sample.kwargs:  # the identity, which has second derivatives
        assert torch.autograd.grad(total, leaves)[0].isfinite().all()
        return
    with pytest.raises(errors.BackendUnavailable, match='no second derivatives.*backend="reference"'):
        torch.autograd.grad(total, leaves, allow_unused=True)
    first = torch.autograd.grad(call(*leaves, backend="reference"), leaves, create_graph=True)
    torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves, allow_unused=True)


def test_second_derivatives_under_checkpointing() -> None:
    """Saved tensors are unpacked once; a first derivative with `create_graph` stays usable."""
    x = torch.randn(2, 6, 8, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda z: ops.channel_norm(z, dim=2), x, use_reentrant=False)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (right,) = torch.autograd.grad(ops.channel_norm(x, dim=2).square().sum(), x)
    assert torch.equal(gradient, right)
    with pytest.raises(errors.BackendUnavailable, match=r"ops\.channel_norm"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(1, 8, 1, 1, 1), (2, 3, 2, 1, 1), (2, 1, 3, 1, 1), (1, 1, 2, 1, 3)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_blends_of_frames_that_lie_innermost(shape: tuple[int, ...], channels_last: bool, mode: str) -> None:
    """Frames of one pixel: kernels walk frame by frame and need another axis with adjacent elements."""
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    batch, channels, frames, *space = shape
    x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    b = torch.randn(batch, channels, 2 * frames, *space).contiguous(memory_format=layout).requires_grad_()
    m = torch.randn(1, requires_grad=True)
    found, right = (ops.alpha_blend_up(x, b, m, mode=mode, backend=name) for name in ("auto", "reference"))
    torch.testing.assert_close(found, right)
    assert found.is_contiguous(memory_format=layout)
    for grads in zip(*(torch.autograd.grad(y.square().sum(), (x, b, m)) for y in (found, right)), strict=True):
        torch.testing.assert_close(*grads)
    if frames > 1:
        half = b[:, :, : frames // 2].contiguous(memory_format=layout)
        found, right = (ops.alpha_blend_down(x, half, m, backend=name) for name in ("auto", "reference"))
        torch.testing.assert_close(found, right)


def test_blend_into_an_expanded_tensor() -> None:
    x = torch.randn(2, 4, 3, 5, 5).contiguous(memory_format=torch.channels_last_3d)
    b = torch.randn(2, 4, 1, 5, 5).contiguous(memory_format=torch.channels_last_3d).expand(2, 4, 6, 5, 5)
    m = torch.zeros(1)
    torch.testing.assert_close(ops.alpha_blend_up(x, b, m), ops.alpha_blend_up(x, b, m, backend="reference"))


@every_op
def test_meta_tensors(sample: Sample) -> None:
    """Shapes without values, by the reference; autocast knows no meta device, and nobody can read offsets there."""

    def outputs(device: str) -> list[Tensor]:
        args = [value.to(device) if isinstance(value, Tensor) else value for value in sample.args]
        kwargs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in sample.kwargs.items()}
        found = getattr(ops, sample.op)(*args, **kwargs)
        return [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]

    for meta, real in zip(outputs("meta"), outputs("cpu"), strict=True):
        assert meta.device.type == "meta" and meta.shape == real.shape and meta.dtype == real.dtype


@every_op
@pytest.mark.parametrize("kind", ["numpy", "sparse", "str", "complex"])
def test_what_is_no_dense_real_tensor_is_refused(sample: Sample, kind: str) -> None:
    """Each argument in turn, by an error that names it."""
    wrong = {
        "numpy": Tensor.numpy,
        "sparse": Tensor.to_sparse,
        "str": lambda _: "x",
        "complex": lambda x: x.to(torch.complex64),
    }[kind]
    for place, value in enumerate(sample.args):
        if isinstance(value, Tensor):
            args = [*sample.args[:place], wrong(value), *sample.args[place + 1 :]]
            with pytest.raises(errors.VidkernelsError, match=r"^\w+: expected .*, got"):
                getattr(ops, sample.op)(*args, **sample.kwargs)
    for key, value in sample.kwargs.items():
        if isinstance(value, Tensor):
            with pytest.raises(errors.VidkernelsError, match=rf"^{key}: expected .*, got"):
                getattr(ops, sample.op)(*sample.args, **{**sample.kwargs, key: wrong(value)})


def test_options_of_a_wrong_type_are_refused() -> None:
    q, offsets = torch.randn(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    x, positions = torch.randn(2, 4, 3), torch.zeros(4, 1, dtype=torch.int64)
    calls: list[Callable[[], object]] = [
        lambda: ops.group_norm(x, "2"),
        lambda: ops.varlen_attention(q, q, q, offsets, None, "4"),
        lambda: ops.norm_rope_attention(q, q, q, offsets, [4]),
        lambda: ops.axial_attention(q, q, q, None),
        lambda: ops.qk_norm_rope(q, q, positions=positions, axes=8),
        lambda: ops.qk_norm_rope(q, q, positions=positions, axes=(8.0,)),
        lambda: ops.norm_rope_attention(q, q, q, offsets, 3, backend="reference"),
        lambda: nn.GroupNorm(3, 8),
        lambda: nn.ChannelNorm(-1),
    ]
    for call in calls:
        with pytest.raises(errors.OptionError):
            call()


@pytest.mark.parametrize(
    "eps", [-1e-6, float("nan"), "1e-6", torch.tensor(1e-6)], ids=["negative", "nan", "str", "tensor"]
)
def test_eps_that_keeps_no_variance_positive(eps: object) -> None:
    q, offsets = torch.randn(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    calls: list[Callable[[], object]] = [
        lambda: ops.adaln_modulate(q, None, None, eps=eps),
        lambda: ops.adaln_zero(q, q, None, None, None, eps=eps),
        lambda: ops.channel_norm(q, eps=eps),
        lambda: ops.group_norm(q, 2, eps=eps),
        lambda: ops.qk_norm_rope(q, q, eps=eps),
        lambda: ops.norm_rope_attention(q, q, q, offsets, eps=eps),
    ]
    for call in calls:
        with pytest.raises(errors.OptionError, match="^eps: expected a number of at least 0, got"):
            call()


@every_op
def test_explain_knows_the_arguments_of_its_op(sample: Sample) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'dims'"):
        vidkernels.explain(sample.op, *sample.args, **sample.kwargs, dims=1)


def test_in_place_needs_memory_of_its_own() -> None:
    """Overlapping memory was turned twice, and autograd did not see that a saved tensor had changed."""
    positions = torch.arange(6)[:, None]
    q, k = torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    for queries, keys in ((q, q), (q[:1].expand(6, 2, 8), k), (q, k[:, :1].expand(6, 2, 8))):
        with pytest.raises(errors.OptionError, match="inplace"):
            ops.qk_norm_rope(queries, keys, positions=positions, inplace=True)
    fused = torch.randn(6, 3, 2, 8)  # slices of one projection are no overlap
    right = ops.qk_norm_rope(fused[:, 0], fused[:, 1], positions=positions)
    found = ops.qk_norm_rope(fused[:, 0], fused[:, 1], positions=positions, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    leaf = q.clone().requires_grad_()
    saved = leaf.exp()
    with torch.no_grad():
        ops.qk_norm_rope(saved, k, positions=positions, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()
    with torch.inference_mode():
        ops.qk_norm_rope(q.clone(), k.clone(), positions=positions, inplace=True)


@pytest.mark.parametrize("shape", [(0, 4, 2, 3, 3), (1, 4, 0, 3, 3), (1, 4, 2, 0, 3), (1, 0, 2, 3, 3)], ids=str)
def test_upsampling_of_nothing(shape: tuple[int, ...]) -> None:
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(2, requires_grad=True)
    weight = torch.randn(2, shape[1], 3, 3, 3, requires_grad=True)
    y = ops.upsample_conv3d(x, weight, bias, scale=2)
    assert y.shape == (shape[0], 2, *(2 * size for size in shape[2:]))
    y.sum().backward()
    assert x.grad is not None and weight.grad is not None and bias.grad is not None


def test_upsampled_frames_smaller_than_the_kernel() -> None:
    x, weight = torch.randn(1, 4, 2, 2, 8), torch.randn(4, 4, 3, 5, 3)
    with pytest.raises(errors.ShapeError, match="padded height of at least the kernel's 5"):
        ops.upsample_conv3d(x, weight, scale=(2, 1, 1), spatial_padding=(1, 1))


def test_group_norm_of_nothing_stays_in_the_graph() -> None:
    x, weight = torch.randn(2, 4, 0, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    ops.group_norm(x, 2, weight, per_frame=True).sum().backward()
    assert x.grad is not None and weight.grad is not None and not weight.grad.any()


REPEATED: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...]]] = {
    "a residual that is the input": (
        lambda x, w: ops.causal_conv3d(x, w, residual=x),
        (1, 4, 3, 5, 5),
        (4, 4, 3, 3, 3),
    ),
    "a branch that is the residual": (lambda x, w: ops.gate_residual(x, x, w), (2, 5, 8), (2, 8)),
    "one weight for queries and keys": (lambda x, w: ops.qk_norm_rope(x, x, w, w)[0], (6, 2, 8), (8,)),
    "a blend of one tensor": (lambda x, w: ops.alpha_blend(x, x, w), (2, 4, 3, 5, 5), (1,)),
}


@pytest.mark.parametrize(("function", "shape", "weight_shape"), REPEATED.values(), ids=list(REPEATED))
def test_one_tensor_twice_in_a_graph(
    function: Callable[..., Any], shape: tuple[int, ...], weight_shape: tuple[int, ...]
) -> None:
    """Dynamo refuses one tensor in two places of an autograd function; sizes are symbolic, channels too."""
    inputs = [torch.randn(shape, requires_grad=True), torch.randn(weight_shape, requires_grad=True)]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for found, right in zip(
        *(torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (compiled, function)), strict=True
    ):
        torch.testing.assert_close(found, right)


def test_levels_as_an_argument_of_a_graph() -> None:
    """Also of numpy's integers."""
    z = torch.randn(2, 9, 4)
    torch._dynamo.reset()
    compiled = torch.compile(ops.fsq_quantize, fullgraph=True, dynamic=True, backend="eager")
    for levels in ([8, 5, 5, 3], [7, 5, 5, 4]):
        right = ops.fsq_quantize(z, list(torch.tensor(levels).numpy()))
        assert all(torch.equal(a, b) for a, b in zip(compiled(z, levels), right, strict=True))


# Shapes of x, weight and steps where oneDNN's own bfloat16 weight gradient writes beyond its buffers.
SHORT_AXES = [
    ((1, 16, 3, 5, 1), (8, 16, 5, 3, 3), (2, 1, 1), (2, 2)),
    ((1, 4, 1, 4, 2), (2, 4, 2, 5, 3), (1, 1, 2), (1, 1)),
    ((1, 16, 3, 1, 2), (24, 16, 3, 5, 3), (1, 1, 1), (1, 1)),
    ((1, 3, 3, 5, 1), (16, 3, 2, 1, 3), (1, 2, 2), None),
    ((2, 32, 2, 5, 8), (16, 32, 3, 5, 3), (1, 1, 1), (1, 1)),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "kernel", "stride", "frames"), SHORT_AXES, ids=str)
def test_bfloat16_weight_gradient_of_short_clips(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    frames: tuple[int, int] | None,
    channels_last: bool,
) -> None:
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    x = torch.randn(shape).bfloat16().contiguous(memory_format=layout)
    weight = (torch.randn(kernel) / 20).bfloat16()
    options = {"stride": stride, "pad_frames": frames}

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return ops.causal_conv3d(x, weight, **options)

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        """Without oneDNN's gradient, which can write over anything, results of the reference among it."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return ops.causal_conv3d(x.to(wide), weight.to(wide), **options, backend="reference").to(x.dtype)

    for _ in range(3):  # what lay in the memory decides what comes out
        assert_gradients_within_promise(function, reference, [x, weight], names=["x", "weight"])


def _strided(x: Tensor) -> dict[str, Tensor]:
    """The values of x with every second element of a larger tensor, and its first slice expanded."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    wide[..., ::2] = x
    return {"every second": wide[..., ::2], "expanded": x[..., :1].expand_as(x)}


@every_op
@pytest.mark.parametrize("layout", ["every second", "expanded"])
def test_any_strides_of_any_argument(sample: Sample, layout: str) -> None:
    """One strided argument at a time; weights of norms were read as if they were contiguous."""
    call, inputs = scalar(sample)
    for place, x in enumerate(inputs):
        moved = [_strided(x)[layout] if i == place and x.ndim else other for i, other in enumerate(inputs)]
        torch.testing.assert_close(call(*moved), call(*moved, backend="reference"))
        leaves = [value.detach().requires_grad_() for value in moved]
        for found, right in zip(torch.autograd.grad(call(*leaves), leaves), gradients(call, moved), strict=True):
            torch.testing.assert_close(found, right)
