# SPDX-License-Identifier: Apache-2.0
"""Attentions of the official Wan models: norms over all heads and the rotation of queries and keys in one launch.

The originals normalise in float32, round to the projection's dtype, multiply by the weight, turn in float64 sample by sample,
and hand float32 to their attention, which takes part in none of it here: whatever stands under its name in the file is called.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vidkernels import ops
from vidkernels._tracing import constant_while_tracing
from vidkernels.patching._guard import call_reason, child_reason, guarded, is_readable, parameter_of
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._values import ReadOnce
from vidkernels.patching.rules import _dit_units as units

_THETA = 10000.0
_OLD_IMAGE_TOKENS = 257  # of the first version of image-to-video, which counts them; later ones count those of the text


class _Attention(Fused):
    """What attentions over tokens and over a context share."""

    def _heads(self, name: str, x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, bool]:
        """A projection of x [B, N, C] -> [B, N, H, D] in `dtype`, by default that of its norm, and whether it may be
        written to."""
        project: Any = self._modules[name]
        projected: Tensor = project(x)
        found = projected.to(dtype or torch.promote_types(projected.dtype, self._weight(name).dtype))
        free = units.may_overwrite(project) or (found is not projected and not torch.is_grad_enabled())
        return found.unflatten(2, (self.num_heads, -1)), free

    def _weight(self, name: str) -> Tensor:
        norm: Any = self._modules[f"norm_{name}"]
        weight: Tensor = parameter_of(norm, "weight")
        return weight

    def _normed(self, name: str, x: Tensor) -> Tensor:
        """A projection of x [B, N, C] behind its norm, [B, N, H, D]."""
        heads, free = self._heads(name, x)
        norm: Any = self._modules[f"norm_{name}"]
        backend = self._vidkernels_backend("qk_norm_rope")
        return ops.qk_norm_rope(
            heads, None, self._weight(name), norm="full", eps=norm.eps, inplace=free, backend=backend
        )[0]

    def _split(self, name: str, x: Tensor) -> Tensor:
        project: Any = self._modules[name]
        heads: Tensor = project(x).unflatten(2, (self.num_heads, -1))
        return heads

    def _norms_reason(self, *names: str) -> str | None:
        for name in names:
            reason = child_reason(self._modules[f"norm_{name}"], self._vidkernels_home.WanRMSNorm)
            if reason is not None:
                return reason
        return None


class SelfAttentionForward(_Attention):
    """`WanSelfAttention.forward`."""

    @guarded
    def forward(self, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
        """[B, N, C], of which `grid_sizes` [B, 3] positions a sample are a clip's and the rest padding -> [B, N, C]."""
        home, backend = self._vidkernels_home, self._vidkernels_backend("qk_norm_rope")
        (q, free_q), (k, free_k) = (self._heads(name, x, torch.float32) for name in ("q", "k"))
        known = self._rotation(grid_sizes, freqs, x)
        weights = {"q_weight": self._weight("q"), "k_weight": self._weight("k")}
        options: dict[str, Any] = {
            "norm": "full",
            "eps": self.norm_q.eps,
            "inplace": free_q and free_k,
            "backend": backend,
        }
        turned: tuple[Tensor, Any] = ops.qk_norm_rope(q, k, **{**weights, **known, **options})
        q, k = turned
        if not known:
            q, k = home.rope_apply(q, grid_sizes, freqs), home.rope_apply(k, grid_sizes, freqs)
        v = self._split("v", x)
        mixed = home.flash_attention(q=q, k=k, v=v, k_lens=seq_lens, window_size=self.window_size)
        result: Tensor = self.o(mixed.flatten(2))
        return result

    def _reason(self, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor) -> str | None:
        reason = call_reason(x) or self._norms_reason("q", "k")
        if reason is None and self.norm_q.eps != self.norm_k.eps:
            reason = "its query and key norms differ"
        if (
            reason is None
            and not torch.compiler.is_compiling()
            and not (is_readable(grid_sizes) and is_readable(freqs))
        ):
            reason = "sizes of clips and angles are read, which these tensors do not show"
        return reason

    def _rotation(self, grid_sizes: Tensor, freqs: Tensor, x: Tensor) -> dict[str, Any]:
        """The rotation for `ops.qk_norm_rope`, empty where the table holds other angles, or where there are too few of them."""
        if (torch.is_grad_enabled() and freqs.requires_grad) or not _standard(freqs, self.head_dim):
            return {}
        if torch.compiler.is_compiling():
            positions: Tensor | None = _traced_positions(grid_sizes.to(x.device), x.shape[1])
        else:
            positions = self._positions(grid_sizes, freqs.shape[0], x)
        if positions is None:
            return {}
        return {"positions": positions, "axes": axes_of(self.head_dim), "theta": _THETA, "layout": "interleaved"}

    def _positions(self, grid_sizes: Tensor, most: int, x: Tensor) -> Tensor | None:
        grids = tuple(tuple(sizes) for sizes in grid_sizes.tolist())
        if max(max(sizes) for sizes in grids) > most or max(f * h * w for f, h, w in grids) > x.shape[1]:
            return None
        shared = grids[:1] if len(set(grids)) == 1 else grids
        return clip_positions(shared, x.shape[1], x.device) if len(grids) == x.shape[0] else None


class CrossAttentionForward(_Attention):
    """`WanT2VCrossAttention.forward`, in 2.2 `WanCrossAttention.forward`."""

    @guarded
    def forward(self, x: Tensor, context: Tensor, context_lens: Tensor | None) -> Tensor:
        """[B, N, C], context [B, M, C] -> [B, N, C]."""
        q, k = self._normed("q", x), self._normed("k", context)
        mixed = self._vidkernels_home.flash_attention(q, k, self._split("v", context), k_lens=context_lens)
        result: Tensor = self.o(mixed.flatten(2))
        return result

    def _reason(self, x: Tensor, context: Tensor, context_lens: Tensor | None) -> str | None:
        return call_reason(x, context) or self._norms_reason("q", "k")


class ImageCrossAttentionForward(_Attention):
    """`WanI2VCrossAttention.forward`: the image's tokens stand before the text's."""

    @guarded
    def forward(self, x: Tensor, context: Tensor, context_lens: Tensor | None) -> Tensor:
        """[B, N, C], context [B, I + M, C] -> [B, N, C]."""
        home, text = self._vidkernels_home, getattr(self._vidkernels_home, "T5_CONTEXT_TOKEN_NUMBER", None)
        count = _OLD_IMAGE_TOKENS if text is None else context.shape[1] - text
        image, context = context[:, :count], context[:, count:]
        q, k, v = self._normed("q", x), self._normed("k", context), self._split("v", context)
        image_k, image_v = self._normed("k_img", image), self._split("v_img", image)
        of_image = home.flash_attention(q, image_k, image_v, k_lens=None)
        of_text = home.flash_attention(q, k, v, k_lens=context_lens)
        result: Tensor = self.o(of_text.flatten(2) + of_image.flatten(2))
        return result

    def _reason(self, x: Tensor, context: Tensor, context_lens: Tensor | None) -> str | None:
        return call_reason(x, context) or self._norms_reason("q", "k", "k_img")


def axes_of(width: int) -> tuple[int, int, int]:
    """Dimensions of a head that turn with time, height and width."""
    third = 2 * (width // 6)
    return width - 2 * third, third, third


def _traced_positions(grid_sizes: Tensor, tokens: int) -> Tensor:
    """What `clip_positions` finds, [B, tokens, 3], without a look at the sizes, for graphs."""
    frames, height, width = grid_sizes.to(torch.int32)[:, :, None].unbind(1)
    place = torch.arange(tokens, dtype=torch.int32, device=grid_sizes.device)[None]
    columns, area = width.clamp(min=1), (height * width).clamp(min=1)
    found = torch.stack((place // area, place % area // columns, place % columns), -1)
    return found * (place < frames * height * width)[..., None]


@lru_cache(maxsize=4)
def clip_positions(grids: tuple[tuple[int, ...], ...], tokens: int, device: torch.device) -> Tensor:
    """(t, h, w) of every token, [tokens, 3] for one clip and [B, tokens, 3] for several; zero, which turns nothing, for
    padding."""
    with torch.inference_mode(False):  # kept for later calls, which may record gradients
        found = torch.zeros(len(grids), tokens, 3, dtype=torch.int32, device=device)
        for row, sizes in zip(found, grids, strict=True):
            ranges = [torch.arange(size, dtype=torch.int32, device=device) for size in sizes]
            places = torch.stack(torch.meshgrid(*ranges, indexing="ij"), -1).flatten(0, 2)
            row[: places.shape[0]] = places
        return found[0] if len(grids) == 1 else found


def _is_standard(freqs: Tensor, width: int) -> bool:
    """Whether a table [positions, width / 2] of unit numbers holds the angles that `ops.qk_norm_rope` computes, to float32's
    rounding; those of a model whose rotation was stretched are others."""
    pairs = [_THETA ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims) for dims in axes_of(width) if dims]
    angles = torch.arange(freqs.shape[0], dtype=torch.float64)[:, None] * torch.cat(pairs)
    if freqs.shape != angles.shape or not freqs.is_complex():
        return False
    error = (freqs.cpu().to(torch.complex128) - torch.polar(torch.ones_like(angles), angles)).abs().max()
    return float(error) <= 2.0**-24


@constant_while_tracing
def _standard(freqs: Tensor, width: int) -> bool:
    return _known_standard(freqs, width)


_known_standard = ReadOnce(_is_standard)
