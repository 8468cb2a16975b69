# SPDX-License-Identifier: Apache-2.0
"""Rules for vector_quantize_pytorch's `FSQ` and `LFQ`, inside any model (magvit2_pytorch's tokenizer holds them too).

A patched module keeps upstream's values, so the entropy loss runs with upstream's floor of 1e-5 under its logarithms.
Where upstream's own loss is wrong (a mask of single tokens, several ranks), the call goes to the original, with the
reason; `vidkernels.nn.LFQ` is the module that is right there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidkernels._tracing import constant_while_tracing
from vidkernels.nn.fsq import quantize_fsq
from vidkernels.nn.lfq import quantize_lfq
from vidkernels.patching._guard import call_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching._values import ReadOnce

_FSQ = "vector_quantize_pytorch.finite_scalar_quantization:FSQ"
_LFQ = "vector_quantize_pytorch.lookup_free_quantization:LFQ"
_TESTED = ("vector-quantize-pytorch 1.32.0",)
_LOSS = {"estimator": "exact", "log_floor": 1e-5, "log_floor_mode": "clamp"}
# The slope of torch.clamp at its ends is 1 up to torch 2.13, as the kernels', and 0 from 2.14 on.
CLAMPED_ENDS_PASS = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 14)
_levels = ReadOnce(lambda buffer: tuple(buffer.tolist()))


@constant_while_tracing
def levels_of(buffer: Tensor) -> tuple[int, ...]:
    """The level counts in a buffer, which upstream keeps on the device only: read once for each buffer."""
    return _levels(buffer)


def levels_reason(buffer: Tensor) -> str | None:
    """Why the level counts cannot be read, or None: under a fake mode, as in export, and on the meta device."""
    if torch.compiler.is_dynamo_compiling():
        return None
    hidden = buffer.device.type == "meta" or type(buffer).__name__ in ("FakeTensor", "FunctionalTensor")
    return "its levels lie in a tensor without values" if hidden else None


class FSQForward(Fused):
    """`FSQ.forward`."""

    @guarded
    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantize [B, N, dim] or [B, dim, ...]; (quantized, indices) as upstream."""
        return quantize_fsq(self, z, levels_of(self._levels), self._vidkernels_backend("fsq"))

    def _reason(self, z: Tensor) -> str | None:
        reason = call_reason(z) or levels_reason(self._levels)
        if reason is None and not z.dtype.is_floating_point:
            reason = f"an input has dtype {z.dtype}"
        trained = torch.is_grad_enabled() and (z.requires_grad or self.has_projections)
        if reason is None and trained and self.bound_hard_clamp and not CLAMPED_ENDS_PASS:
            reason = "from torch 2.14 on gradients do not pass the ends of its hard clamp, and here they do"
        return reason


class LFQForward(Fused):
    """`LFQ.forward`."""

    @guarded
    def forward(
        self,
        x: Tensor,
        inv_temperature: float = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
    ) -> Any:
        """Quantize [B, N, dim] or [B, dim, ...]; upstream's tuple, with its losses in training."""
        backend = self._vidkernels_backend("lfq")
        home = self._vidkernels_home
        kinds = (home.Return, home.LossBreakdown)
        return quantize_lfq(self, x, inv_temperature, return_loss_breakdown, mask, backend, _LOSS, kinds)

    def _reason(self, x: Tensor, inv_temperature: float, mask: Tensor | None, **rest: Any) -> str | None:
        reason = call_reason(x, mask)
        if reason is None and not isinstance(inv_temperature, (int, float)):
            reason = f"inv_temperature is a {type(inv_temperature).__name__}, not a number"
        if reason is None and not x.dtype.is_floating_point:
            reason = f"an input has dtype {x.dtype}"
        if reason is None and self.training and mask is not None and mask.ndim > 1:
            reason = "under a mask of single tokens upstream's batch entropy is another number"
        if reason is None and self.training and several_ranks():
            reason = "across ranks upstream's batch entropy is another number"
        return reason


def several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    shape = (1, module.dim, 64) if module.channel_first else (1, 64, module.dim)
    buffer = next(module.buffers())
    parameter = next(module.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    return (torch.randn(shape, dtype=dtype, device=buffer.device),), {}


RULES = (
    Rule(
        name="vector_quantize_pytorch.fsq",
        ops=("fsq",),
        targets=(_FSQ,),
        mixin=FSQForward,
        digests={
            "FSQ.forward": ("167bd7bba940078c",),
            "FSQ.bound": ("e5fd57775291180d",),
            "FSQ.symmetry_preserving_bound": ("c67ded1471533d43",),
            "FSQ.quantize": ("1e47229d86f140f9",),
            "FSQ.maybe_apply_noise": ("43bfc3e5e779ec29",),
            "FSQ.codes_to_indices": ("9cc3e5560ecd1fad",),
        },
        sample=_sample,
        tested_versions=_TESTED,
    ),
    Rule(
        name="vector_quantize_pytorch.lfq",
        ops=("lfq",),
        targets=(_LFQ,),
        mixin=LFQForward,
        digests={"LFQ.forward": ("0b346b7b6b9e7b65",), "CosineSimLinear.forward": ("9145211560c5808b",)},
        sample=_sample,
        tested_versions=_TESTED,
    ),
)
