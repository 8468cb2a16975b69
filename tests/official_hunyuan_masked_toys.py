# SPDX-License-Identifier: Apache-2.0
"""Blocks of HunyuanVideo's kind with FastVideo's signatures and results, written anew: their attention takes the text's mask."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import official_hunyuan_toys as toys
import torch
import torch.nn.functional as F
from official_hunyuan_toys import MLP, FinalLayer, ModulateDiT, RMSNorm, apply_gate, apply_rotary_emb, modulate
from torch import Tensor

__all__ = ["MLP", "FinalLayer", "ModulateDiT", "RMSNorm", "apply_gate", "apply_rotary_emb", "modulate"]

nccl_info = SimpleNamespace(sp_size=1, rank_within_group=0)


def parallel_attention(
    q: Any, k: Any, v: Any, img_q_len: int, img_kv_len: int, text_mask: Tensor, mask_strategy: Any = None, **others: Any
) -> Tensor:
    """Of pairs of [B, N, H, D] and [B, M, H, D]: [B, N + M, H * D]; a strategy is a factor here."""
    assert img_q_len == img_kv_len == q[0].shape[1]
    queries, keys, values = (torch.cat(pair, 1).transpose(1, 2) for pair in (q, k, v))
    valid = F.pad(text_mask.bool(), (img_q_len, 0), value=True)
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=valid[:, None, None])
    return mixed.transpose(1, 2).flatten(2) * valid[..., None] * (mask_strategy or 1)


def own_part(tables: Any) -> Any:
    size = tables[0].shape[0] // nccl_info.sp_size
    return tuple(table.narrow(0, nccl_info.rank_within_group * size, size) for table in tables)


class MMDoubleStreamBlock(toys.MMDoubleStreamBlock):
    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        freqs_cis: Any = None,
        text_mask: Any = None,
        mask_strategy: Any = None,
    ) -> tuple[Tensor, Tensor]:
        tokens = img.shape[1]
        rows, none = self.rows(self.img_mod, vec, 6, None, None)
        text_rows, _ = self.rows(self.txt_mod, vec, 6, None, None)
        q, k, v = self.split("img", img, rows, none, None)
        if freqs_cis is not None:
            q, k = apply_rotary_emb(q, k, own_part(freqs_cis))
        text = self.split("txt", txt, text_rows, none, None)
        pairs = zip((q, k, v), text, strict=True)
        told = {"text_mask": text_mask, "mask_strategy": mask_strategy}
        mixed = parallel_attention(*pairs, img_q_len=tokens, img_kv_len=tokens, **told)
        img = self.end("img", img, mixed[:, :tokens], rows, none, None)
        return img, self.end("txt", txt, mixed[:, tokens:], text_rows, none, None)


class MMSingleStreamBlock(toys.MMSingleStreamBlock):
    def forward(
        self,
        x: Tensor,
        vec: Tensor,
        txt_len: int,
        freqs_cis: Any = None,
        text_mask: Any = None,
        mask_strategy: Any = None,
    ) -> Tensor:
        image = x.shape[1] - txt_len
        rows, none = self.rows(self.modulation, vec, 3, None, None)
        h = self.linear1(modulate(self.pre_norm(x), rows[0], rows[1], none, None))
        qkv, hidden = h.split([3 * self.hidden_size, self.mlp_hidden_dim], -1)
        q, k, v = qkv.unflatten(2, (3, self.heads_num, -1)).unbind(2)
        q, k = self.q_norm(q).to(v), self.k_norm(k).to(v)
        turned = apply_rotary_emb(q[:, :image], k[:, :image], own_part(freqs_cis))
        pairs = [(t, whole[:, image:]) for t, whole in zip((*turned, v[:, :image]), (q, k, v), strict=True)]
        told = {"text_mask": text_mask, "mask_strategy": mask_strategy}
        mixed = parallel_attention(*pairs, img_q_len=image, img_kv_len=image, **told)
        y = self.linear2(torch.cat((mixed, self.mlp_act(hidden)), 2))
        return x + apply_gate(y, rows[2], None, None)


class HYVideoDiffusionTransformer(toys.HYVideoDiffusionTransformer):
    kinds = MMDoubleStreamBlock, MMSingleStreamBlock
    strategy: Any = None

    def told(self, mask: Tensor, tokens: int, vec: Tensor, grid: tuple[int, ...]) -> list[Any]:
        told = [self.tables(grid), mask]
        return told if self.strategy is None else [*told, self.strategy]
