# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention over packed tokens as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels._hooks import is_unseen
from vidkernels.errors import OptionError, ShapeError
from vidkernels.nn.qk_norm_rope import QKNormRope, RotaryConfig
from vidkernels.ops._checks import check_flags, check_ndim, check_projected, check_sizes, check_tensor
from vidkernels.ops.varlen_attention import check_length

SHORT = 64  # no kernel holds longer segments whole; `ops.norm_rope_attention` decides below


class PackedAttention(nn.Module):
    """Projections, query/key norm, rotation and attention within the samples of a pack; self- or cross-attention.

    Args:
        width: channels of the tokens and of the output.
        heads: query heads.
        head_dim: channels of a head, default `width // heads`.
        kv_heads: key heads, a divisor of `heads`; default `heads`.
        context_width: channels of the context; None makes it self-attention.
        bias: of the projections of q, k and v; out_bias: of the output's.
        qk_norm: RMSNorm of q and k: "head", "full" or None.
        rotary: rotary convention of q and k in self-attention, of q alone in cross-attention; None: no rotation.
        causal: see `ops.varlen_attention`.
        group: process group or device mesh over which the tokens are spread (`distributed.ulysses_attention`), for
            self-attention. Cross-attention takes `distributed.local_offsets` instead and needs no group.

    Shapes: x `[N, width]`, context `[M, context_width]` -> `[N, width]`. Parameters: `to_qkv`, or `to_q` and `to_kv`, with
    rows in the order q, k, v; `to_out`; `norm_rope.q_weight`, `norm_rope.k_weight`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        context_width: int | None = None,
        bias: bool = True,
        out_bias: bool = True,
        qk_norm: str | None = None,
        rotary: RotaryConfig | None = None,
        eps: float = 1e-6,
        causal: bool = False,
        group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        given = {"head_dim": head_dim, "kv_heads": kv_heads, "context_width": context_width}
        check_sizes(width=width, heads=heads, **{name: size for name, size in given.items() if size is not None})
        check_flags(bias=bias, out_bias=out_bias, causal=causal)
        if head_dim is None and width % heads:
            raise OptionError("heads", f"a divisor of width {width}, or a head_dim", heads, "Give head_dim.")
        self.width, self.heads, self.kv_heads = width, heads, kv_heads or heads
        if heads % self.kv_heads:
            raise OptionError("kv_heads", f"a divisor of heads {heads}", self.kv_heads, "")
        if group is not None and context_width is not None:
            raise OptionError("group", "None in cross-attention", repr(group), "Use distributed.local_offsets.")
        self.head_dim = head_dim or width // heads
        self.context_width, self.causal, self.group = context_width, causal, group
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, keys = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        if context_width is None:
            self.to_qkv = nn.Linear(width, inner + keys, bias=bias, **options)
        else:
            self.to_q = nn.Linear(width, inner, bias=bias, **options)
            self.to_kv = nn.Linear(context_width, keys, bias=bias, **options)
        self.to_out = nn.Linear(inner, width, bias=out_bias, **options)
        norm_options = {"norm": qk_norm, "rotary": rotary, "kv_heads": self.kv_heads, "eps": eps, **options}
        wanted = qk_norm is not None or rotary is not None
        self.norm_rope = QKNormRope(heads, self.head_dim, **norm_options) if wanted else None

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int | None = None,
        positions: Tensor | None = None,
        *,
        context: Tensor | None = None,
        context_cu_seqlens: Tensor | None = None,
        context_max_seqlen: int | None = None,
    ) -> Tensor:
        """Attention of the tokens of every sample over themselves, or over their part of the context.

        Args:
            x: `[N, width]`, the tokens of `packing.pack` or of one rank's slice.
            cu_seqlens, max_seqlen: of x; with a group those of the whole sequence.
            positions: `[N, A]`, with a rotary convention.
            context, context_cu_seqlens, context_max_seqlen: keys of cross-attention, such as `packing.pack_text`'s.
        """
        if (context is None) != (self.context_width is None):
            expected = "None in self-attention" if self.context_width is None else "the keys of cross-attention"
            raise OptionError("context", expected, "None" if context is None else "a tensor", "")
        check_tensor("x", x)
        if x.ndim != 2:
            raise ShapeError("x", "[tokens, width]", tuple(x.shape), "Pack the batch: vidkernels.packing.pack_grids.")
        check_projected("x", x, self.width, self.to_qkv if self.context_width is None else self.to_q)
        if context is not None and self.context_width is not None:
            check_ndim("context", context, 2)
            check_projected("context", context, self.context_width, self.to_kv)
        if max_seqlen is not None:
            check_length("max_seqlen", max_seqlen)
        if self.norm_rope is not None and self.norm_rope.rotary is not None and positions is None:
            raise OptionError("positions", "[tokens, axes] with a rotary convention", "None", "Pass packed.positions.")
        if context is None:
            counts = (self.heads, self.kv_heads, self.kv_heads)
            q, k, v = self.to_qkv(x).unflatten(1, (-1, self.head_dim)).split(counts, dim=1)
            inplace = _may_overwrite(self.to_qkv)
            if self._one_kernel(max_seqlen, inplace and x.is_cpu):
                mixed = self._norm_and_attend(q, k, v, cu_seqlens, max_seqlen, positions)
                return self.to_out(mixed.flatten(1))
            if self.norm_rope is not None:
                q, k = self.norm_rope(q, k, positions, inplace=inplace)
        else:
            q = self.to_q(x).unflatten(1, (-1, self.head_dim))
            k, v = self.to_kv(context).unflatten(1, (-1, self.head_dim)).split(self.kv_heads, dim=1)
            q, k = self._norm_cross(q, k, positions)
        return self.to_out(self._attend(q, k, v, cu_seqlens, max_seqlen, context_cu_seqlens, context_max_seqlen))

    def _one_kernel(self, max_seqlen: int | None, inplace: bool) -> bool:
        """Whether norm and rotation are left to `ops.norm_rope_attention`, which keeps short segments in one kernel."""
        inside = self.norm_rope is not None and self.norm_rope.norm != "full" and self.group is None
        return inside and max_seqlen is not None and max_seqlen <= SHORT and not inplace

    def _norm_and_attend(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, positions: Tensor | None
    ) -> Tensor:
        side = self.norm_rope
        assert side is not None
        turn = side.rotary
        rotation: dict[str, Any] = {}
        if turn is not None:
            rotation = {
                "axes": turn.axes,
                "theta": turn.theta,
                "position_scale": turn.position_scale,
                "layout": turn.layout,
            }
            rotation["positions"] = positions
        return ops.norm_rope_attention(
            *(q, k, v, cu_seqlens, max_seqlen),
            q_weight=side.q_weight,
            k_weight=side.k_weight,
            norm=side.norm,
            eps=side.eps,
            causal=self.causal,
            **rotation,
        )

    def _norm_cross(self, q: Tensor, k: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Norm of both sides and rotation of q alone: the context has no place in the video."""
        if self.norm_rope is None:
            return q, k
        q, _ = self.norm_rope(q, None, positions, inplace=_may_overwrite(self.to_q))
        if self.norm_rope.norm is None:
            return q, k
        k, _ = ops.qk_norm_rope(
            *(k, None, self.norm_rope.k_weight),
            norm=self.norm_rope.norm,
            eps=self.norm_rope.eps,
            inplace=_may_overwrite(self.to_kv),
        )
        return q, k

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int | None,
        cu_seqlens_k: Tensor | None,
        max_seqlen_k: int | None,
    ) -> Tensor:
        if self.group is not None:
            from vidkernels.distributed import ulysses_attention

            out = ulysses_attention(q, k, v, cu_seqlens, max_seqlen, group=self.group, causal=self.causal)
        else:
            lengths = (max_seqlen, max_seqlen_k)
            out = ops.varlen_attention(q, k, v, cu_seqlens, cu_seqlens_k, *lengths, causal=self.causal)
        return out.flatten(1)

    def extra_repr(self) -> str:
        """Options in the module's printed form."""
        kind = "self" if self.context_width is None else "cross"
        return f"{kind}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, causal={self.causal}"


def _may_overwrite(layer: nn.Module) -> bool:
    """Whether what a projection returned is nobody else's: a hook may keep it, an adapter return what it keeps."""
    return not torch.is_grad_enabled() and is_unseen(layer)
