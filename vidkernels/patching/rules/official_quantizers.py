# SPDX-License-Identifier: Apache-2.0
"""Rules for the quantizers in the official code of VidTok, Open-MAGVIT2 and NVIDIA's Cosmos tokenizers, and in copies of it.

None of them is a package, so these match by digests. A patched module keeps upstream's values: VidTok's clamp at 1e-5 under both
logarithms, Open-MAGVIT2's 1e-5 added under that of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels import ops
from vidkernels.patching._guard import call_reason, guarded, is_autocast
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules.quantizers import levels_of, levels_reason, several_ranks

_UP_TO_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)


class VidTokFSQForward(Fused):
    """`FSQRegularizer.forward` of VidTok."""

    @guarded
    def forward(self, z: Tensor, inv_temperature: float = 100.0, n_steps: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, dim, ...] with two and more token axes, or [B, N, dim] -> (codes, {indices, aux_loss})."""
        first = z.ndim >= 4
        with torch.autocast("cuda", enabled=False):
            if self.has_projections:
                z = self.project_in(z.movedim(1, -1) if first else z)
            axis = 1 if first and not self.has_projections else -1
            wide = z.float()
            options = {"dim": axis, "num_codebooks": self.num_codebooks}
            levels, backend = levels_of(self._levels), self._vidkernels_backend("fsq")
            codes, indices = ops.fsq_quantize(wide, levels, **options, backend=backend)
            assert codes is not None and indices is not None
            loss = self.zero * 0
            if self._weighted():
                loss = self._loss(wide, codes, levels, options, inv_temperature, n_steps)
        out = codes.to(z.dtype)
        if self.has_projections:
            out = self.project_out(out)
            out = out.movedim(-1, 1) if first else out
        if self.keep_num_codebooks_dim and self.num_codebooks == 1:
            indices = indices.unsqueeze(-1)
        return out, {"indices": indices, "aux_loss": loss}

    def _weighted(self) -> bool:
        weighted: bool = self.entropy_loss_weight > 0 or self.commitment_loss_weight > 0
        return weighted

    def _reason(self, z: Tensor, **rest: Any) -> str | None:
        reason, weighted = call_reason(z) or levels_reason(self._levels), self._weighted()
        if reason is None and weighted and several_ranks():
            reason = "across ranks upstream averages without a gradient"
        if reason is None and weighted and self.keep_num_codebooks_dim:
            reason = "with an axis of codebooks upstream's losses do not run"
        return reason

    def _loss(
        self,
        z: Tensor,
        codes: Tensor,
        levels: tuple[int, ...],
        options: dict[str, Any],
        inv_temperature: float,
        step: int,
    ) -> Tensor:
        per_sample, batch = ops.fsq_entropy(
            z, levels, **options, inv_temperature=inv_temperature, log_floor=1e-5, log_floor_mode="clamp"
        )
        entropy: Tensor = per_sample - self.diversity_gamma * batch
        commitment = F.mse_loss(z, codes.detach())
        weighted: Tensor = entropy * self.calculate_entropy_loss_weight(step) + commitment * self.commitment_loss_weight
        return weighted


class CosmosFSQForward(Fused):
    """`FSQuantizer.forward` of the Cosmos tokenizers: codes of float32, whatever the input is."""

    @guarded
    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, dim, ...] with two and more token axes, or [B, N, dim] -> (indices, codes, a loss of zeros)."""
        first = z.ndim >= 4
        if self.has_projections:
            z = self.project_in(z.movedim(1, -1) if first else z)
        axis = 1 if first and not self.has_projections else -1
        rounded = not self.has_projections and z.dtype == self.dtype  # codes may leave the op in that dtype
        codes, indices = ops.fsq_quantize(
            z if rounded else z.float(), levels_of(self._levels), dim=axis, num_codebooks=self.num_codebooks,
            backend=self._vidkernels_backend("fsq"),
        )  # fmt: skip
        assert codes is not None and indices is not None
        out, wide = codes, torch.float32
        if self.has_projections:
            out = self.project_out(codes)
            wide = out.dtype
            out = out.movedim(-1, 1) if first else out
        if self.keep_num_codebooks_dim and self.num_codebooks == 1:
            indices = indices.unsqueeze(-1)
        size = (1, 1, 1, *out.shape[4:]) if first else (1, 1, 1)
        return indices, out.to(self.dtype), out.new_zeros((out.shape[0], *size), dtype=wide)

    def _reason(self, z: Tensor) -> str | None:
        reason = call_reason(z) or levels_reason(self._levels)
        if reason is None and (z.ndim < 3 or z.dtype not in _UP_TO_FLOAT32):
            reason = f"an input has {z.ndim} axes and dtype {z.dtype}"
        if reason is None and z.shape[1 if z.ndim >= 4 else -1] != self.dim:
            reason = f"an input has {z.shape[1 if z.ndim >= 4 else -1]} channels, not {self.dim}"
        return reason


class OpenMagvitLFQForward(Fused):
    """`LFQ.forward` of Open-MAGVIT2, one codebook."""

    @guarded
    def forward(
        self,
        x: Tensor,
        inv_temperature: float = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
        return_loss: bool = True,
    ) -> Any:
        """[B, bits, ...] -> (quantized, entropy loss, flat int64 indices or a pair of them), as upstream.

        ``inv_temperature`` is upstream's argument without effect: its entropy is taken at 100 always.
        """
        backend = self._vidkernels_backend("lfq")
        codes, indices = ops.lfq_quantize(
            x, bit_order="lsb_first", dim=1, straight_through="additive", return_indices=not self.token_factorization,
            backend=backend,
        )  # fmt: skip
        found = self._parts(x, backend) if indices is None else indices.flatten()
        per_sample = batch = commitment = loss = self.zero
        if self.training and return_loss:
            per_sample, batch = ops.lfq_entropy(x, dim=1, log_floor=1e-5, log_floor_mode="add")
            dtype = torch.float32 if is_autocast(x) else torch.promote_types(x.dtype, self.codebook.dtype)
            per_sample, batch = per_sample.to(dtype), batch.to(dtype)
            loss = self.sample_minimization_weight * per_sample - self.batch_maximization_weight * batch
        if self.training:
            signs, _ = ops.lfq_quantize(x.detach(), dim=1, return_indices=False, backend=backend)
            commitment = F.mse_loss(x, signs, reduction="none")
            if mask is not None:
                commitment = commitment.movedim(1, -1).flatten(1, -2).unsqueeze(2)[mask]
            commitment = commitment.mean()
        result = (codes, loss, found)
        if not return_loss_breakdown:
            return result
        return result, self._vidkernels_home.LossBreakdown(per_sample, batch, commitment, self.zero)

    def _reason(self, x: Tensor, mask: Tensor | None, **rest: Any) -> str | None:
        return call_reason(x, mask)

    def _parts(self, x: Tensor, backend: str) -> tuple[Tensor, ...]:
        """Indices of the two halves that a factorised token has."""
        first = self.factorized_bits[0]
        parts = (x.narrow(1, 0, first), x.narrow(1, first, x.shape[1] - first))
        options: dict[str, Any] = {"bit_order": "lsb_first", "dim": 1, "return_quantized": False, "backend": backend}
        return tuple(ops.lfq_quantize(part, **options)[1].flatten() for part in parts)


def _fsq_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    parameter = next(module.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    return (2 * torch.randn(1, module.dim, 2, 4, 4, dtype=dtype, device=module._levels.device),), {}


def _fsq_widen(module: Any) -> torch.nn.Module:
    """Upstream computes in float32 whatever the input is, against a codebook that `double()` would widen."""
    widened: Any = module.double()
    widened.implicit_codebook = widened.implicit_codebook.float()
    return widened


def _cosmos_check(module: Any) -> str | None:
    """Upstream sums an index in float32."""
    return "it has more codes than float32 can count" if module.codebook_size > 2**24 else None


def _lfq_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(1, module.codebook_dim, 4, 4, device=module.codebook.device),), {"return_loss_breakdown": True}


def _lfq_check(module: Any) -> str | None:
    return None if module.num_codebooks == 1 else "upstream averages the batch entropy over its codebooks"


RULES = (
    Rule(
        name="vidtok.quantizer",
        ops=("fsq",),
        targets=("vidtok.modules.regularizers:FSQRegularizer",),
        mixin=VidTokFSQForward,
        digests={
            "FSQRegularizer.forward": ("8e3f6fea59cd7989",),
            "FSQRegularizer.bound": ("1574cc78aec40d36",),
            "FSQRegularizer.quantize": ("53a82b9cffd963f5",),
            "FSQRegularizer.codes_to_indices": ("fdb586db1a351dc5",),
            "FSQRegularizer._scale_and_shift": ("d37a15f24d223608",),
            "entropy": ("87270bbaa76de482",),
            "log": ("91e0704e316a0823",),
        },
        widen=_fsq_widen,
        sample=_fsq_sample,
        tested_versions=("VidTok 6e46457",),
    ),
    Rule(
        name="cosmos_tokenizer.quantizer",
        ops=("fsq",),
        targets=("cosmos_tokenizer.modules.quantizers:FSQuantizer",),
        mixin=CosmosFSQForward,
        digests={
            "FSQuantizer.forward": ("991d079c65247e0a",),
            "FSQuantizer.bound": ("1574cc78aec40d36",),
            "FSQuantizer.quantize": ("53a82b9cffd963f5",),
            "FSQuantizer.codes_to_indices": ("7e17f673d837c11a",),
            "FSQuantizer._scale_and_shift": ("d37a15f24d223608",),
            "round_ste": ("8c577a6c5486d829",),
        },
        features=("_levels", "project_in", "codebook_size"),
        check=_cosmos_check,
        sample=_fsq_sample,
        tested_versions=("Cosmos-Tokenizer (9ea5083)",),
    ),
    Rule(
        name="open_magvit2.quantizer",
        ops=("lfq",),
        targets=("taming.modules.vqvae.lookup_free_quantize:LFQ",),
        mixin=OpenMagvitLFQForward,
        digests={"LFQ.forward": ("fdd74c3ee4cc166e",), "entropy_loss": ("9c9167610b5f1166",)},
        check=_lfq_check,
        sample=_lfq_sample,
        tested_versions=("Open-MAGVIT2 6515009",),
    ),
)
