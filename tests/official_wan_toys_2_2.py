# SPDX-License-Identifier: Apache-2.0
"""What differs in the official Wan 2.2 from `official_wan_toys`: every token has its rows, and there is one cross-attention."""

from __future__ import annotations

import official_wan_toys as plain
from official_wan_toys import WanLayerNorm, WanRMSNorm, WanSelfAttention, flash_attention, wide
from torch import Tensor

__all__ = ["WanLayerNorm", "WanRMSNorm", "WanSelfAttention"]


class WanCrossAttention(WanSelfAttention):
    def forward(self, x: Tensor, context: Tensor, context_lens: Tensor | None) -> Tensor:  # type: ignore[override]
        q, k = self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(context)))
        return self.o(flash_attention(q, k, self.heads(self.v(context)), context_lens).flatten(2))


class WanAttentionBlock(plain.WanAttentionBlock):
    def forward(
        self,
        x: Tensor,
        e: Tensor,
        seq_lens: Tensor,
        grid_sizes: Tensor,
        freqs: Tensor,
        context: Tensor,
        context_lens: Tensor | None,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation[None] + e).unbind(2)
        x = x + gate1 * self.self_attn(wide(self.norm1(x)) * (1 + scale1) + shift1, seq_lens, grid_sizes, freqs)
        x = x + self.cross_attn(self.norm3(x), context, context_lens)
        return x + gate2 * self.ffn(wide(self.norm2(x)) * (1 + scale2) + shift2)


class Head(plain.Head):
    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation[None] + e[:, :, None]).unbind(2)
        return self.head(self.norm(x) * (1 + scale) + shift)
