# SPDX-License-Identifier: Apache-2.0
"""Rules for the self-attentions of the official Latte and of Open-Sora 1.2's STDiT3.

Both write out the scores; Latte copies queries, keys and values into another layout first. Here they stay views of one
projection, and norm and rotation run inside `ops.axial_attention`. STDiT3's block (`official_dit`) attends over frames
without moving tokens.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import call_reason, child_reason, guarded
from vidkernels.patching._match import digest
from vidkernels.patching._mechanism import Fused, is_patched
from vidkernels.patching._rule import Rule

# Code of rotary-embedding-torch 0.5.3 (which Open-Sora 1.2 pins) and 0.9.1.
_METHOD_DIGESTS: dict[str, tuple[str, ...]] = {
    "rotate_queries_or_keys": ("23768026786bfce4", "d3639d32ea2d7fae"),
    "get_seq_pos": ("94415ba87fedc1cb", "31d3648db92f0928"),
    "forward": ("9d9fbeaeac0afd5e", "9e7ed17d0b7ba4e6"),
}
_FUNCTION_DIGESTS: dict[str, tuple[str, ...]] = {
    "apply_rotary_emb": ("316d692a6b975395", "619a9d3c97c369f0"),
    "rotate_half": ("612bd11060665d19",),
}


def _split(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [..., H, D], views of one projection."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(-3)
    return q, k, v


def _drops(attention: Any) -> str | None:
    if attention.training and attention.attn_drop.p > 0:
        return "attention weights are dropped out"
    return child_reason(attention.attn_drop, nn.Dropout)


class LatteAttentionForward(Fused):
    """Latte's `Attention.forward` in its mode `math`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        backend = self._vidkernels_backend("axial_attention")
        q, k, v = _split(self, x)
        mixed = ops.axial_attention(q, k, v, dim=1, scale=self.scale, backend=backend)
        result: Tensor = self.proj_drop(self.proj(mixed.flatten(-2)))
        return result

    def _reason(self, x: Tensor) -> str | None:
        return call_reason(x) or _latte_check(self) or _drops(self)


class STDiT3AttentionForward(Fused):
    """STDiT3's `Attention.forward`, and the same along any axis of a grid of tokens."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        return self._along(x, 1)

    def _reason(self, x: Tensor) -> str | None:
        return self._along_reason(x)

    def _along_reason(self, x: Tensor) -> str | None:
        reason = call_reason(x) or _stdit3_check(self, traced=torch.compiler.is_compiling()) or _drops(self)
        weight = self.qkv.weight if type(self.qkv) is nn.Linear else None
        for norm in (self.q_norm, self.k_norm):
            if reason is None and type(norm) is not nn.Identity:
                reason = child_reason(norm, self._vidkernels_home.LlamaRMSNorm)
                if reason is None and weight is not None and norm.weight.dtype != weight.dtype:
                    reason = "the norms' weights have another dtype than the projection"
        if reason is None and self.rope and x.dtype == torch.float64:
            reason = "the rotation's float32 angles would show in float64"
        return reason

    def _along(self, x: Tensor, dim: int) -> Tensor:
        """Attention of tokens [..., C] along axis `dim`."""
        options: dict[str, Any] = {"causal": self.is_causal} if getattr(self, "is_causal", False) else {}
        if type(self.q_norm) is not nn.Identity:
            options |= {"norm": "head", "eps": self.q_norm.variance_epsilon}
            options |= {"q_weight": self.q_norm.weight, "k_weight": self.k_norm.weight}
        if self.rope:
            frequencies = self.rotary_emb.__self__.freqs
            options["positions"] = torch.arange(x.shape[dim], device=x.device, dtype=torch.float32)[:, None]
            options["frequencies"] = frequencies.float()[None]
        backend = self._vidkernels_backend("axial_attention")
        q, k, v = _split(self, x)
        mixed = ops.axial_attention(q, k, v, dim=dim, scale=self.scale, backend=backend, **options)
        result: Tensor = self.proj_drop(self.proj(mixed.flatten(-2)))
        return result


def along(attention: Any, tokens: Tensor, dim: int) -> Tensor | None:
    """Attention of [B, T, S, C] over axis `dim` where `attention` is patched and nobody listens to its calls, else None."""
    if not isinstance(attention, STDiT3AttentionForward) or not is_patched(attention):
        return None
    if child_reason(attention, type(attention)._vidkernels_base) is not None:  # type: ignore[attr-defined]
        return None
    return None if attention._along_reason(tokens) is not None else attention._along(tokens, dim)


def in_frames(attention: Any, grid: Tensor) -> Tensor:
    """Attention over the positions of each frame of [B, T, S, D]."""
    mixed = along(attention, grid, 2)
    called: Tensor = attention(grid.flatten(0, 1)) if mixed is None else mixed
    return called


def over_time(attention: Any, grid: Tensor) -> Tensor:
    """Attention over the frames of each position of [B, T, S, D]."""
    mixed = along(attention, grid, 1)
    if mixed is None:
        called: Tensor = attention(grid.transpose(1, 2).flatten(0, 1))
        mixed = called.unflatten(0, (grid.shape[0], grid.shape[2])).transpose(1, 2)
    return mixed


def _latte_check(attention: Any) -> str | None:
    # `flash` mode reshapes without moving the heads back; whoever trained with that needs it.
    return None if attention.attention_mode == "math" else f"attention_mode is {attention.attention_mode}"


def _stdit3_check(attention: Any, traced: bool = False) -> str | None:
    if attention.qk_norm_legacy:
        return "its norms come after the rotation"
    if type(attention.q_norm) is not type(attention.k_norm):
        return "its query and key norms differ"
    if not attention.rope:
        return None
    return None if traced else _rotary_reason(attention.rotary_emb)


def _rotary_reason(method: Any) -> str | None:
    """Why a rotation is not the plain one of rotary-embedding-torch over all dimensions of a head."""
    owner = getattr(method, "__self__", None)
    if owner is None or not isinstance(getattr(owner, "freqs", None), Tensor):
        return "its rotation is not a method of a RotaryEmbedding"
    home = sys.modules.get(type(owner).__module__)
    pieces = [(getattr(type(owner), name, None), known) for name, known in _METHOD_DIGESTS.items()]
    pieces += [(getattr(home, name, None), known) for name, known in _FUNCTION_DIGESTS.items()]
    if getattr(method, "__name__", "") != "rotate_queries_or_keys" or any(digest(f) not in k for f, k in pieces):
        return "its rotation is other code than rotary-embedding-torch 0.5.3 or 0.9.1"
    plain = owner.freqs_for == "lang" and not owner.use_xpos and owner.interpolate_factor == 1
    if not plain or owner.freqs.ndim != 1 or owner.default_seq_dim != -2 or owner.freqs.requires_grad:
        return "its rotation has options of its own"
    return None


def _sample(attention: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = attention.qkv.weight
    return (torch.randn(2, 9, weight.shape[1], dtype=weight.dtype, device=weight.device),), {}


RULES = (
    Rule(
        name="official.latte_attention",
        ops=("axial_attention",),
        targets=("models.latte:Attention",),
        features=("qkv", "proj", "attn_drop", "proj_drop", "attention_mode"),
        mixin=LatteAttentionForward,
        digests={"Attention.forward": ("c1864e17ea5273ac", "4e08b69156053d11")},
        check=_latte_check,
        sample=_sample,
        tested_versions=("Vchitect/Latte 5e6a6b1", "Vchitect/Latte 3780cd4"),
    ),
    Rule(
        name="official.stdit3_attention",
        ops=("axial_attention",),
        targets=("opensora.models.layers.blocks:Attention",),
        features=("qkv", "proj", "q_norm", "k_norm", "qk_norm_legacy", "enable_flash_attn", "rope"),
        mixin=STDiT3AttentionForward,
        digests={
            "Attention.forward": ("df28297237a23d71", "4865cc736caf22d3"),
            "LlamaRMSNorm.forward": ("5cf66a5b73d6af8e",),
        },
        check=_stdit3_check,
        sample=_sample,
        tested_versions=("hpcaitech/Open-Sora 06ffc8e", "hpcaitech/Open-Sora 1.2.0"),
    ),
)
