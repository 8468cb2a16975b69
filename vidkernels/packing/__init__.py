# SPDX-License-Identifier: Apache-2.0
"""Patch n' Pack: images and videos of any size as one token sequence, and back (NaViT, Dehghani et al., arXiv 2307.06304).

    packed = packing.pack(latents)                      # list of [C, T, H, W], an image has T = 1
    tokens = model(packed.tokens, packed.cu_seqlens, packed.max_seqlen, packed.positions)
    latents = packing.unpack(packed, tokens)

Nothing here waits for the device: lengths are Python ints, offsets and positions are made where the tokens are.
"""

from __future__ import annotations

from vidkernels.packing._drop import drop_tokens, restore_tokens
from vidkernels.packing._loss import packed_mean, per_sample_mean
from vidkernels.packing._pack import Packed, pack, pack_grids, unpack
from vidkernels.packing._plan import attention_costs, balance, pack_plan, transformer_costs
from vidkernels.packing._text import PackedText, pack_text, unpack_text

__all__ = [
    "Packed",
    "PackedText",
    "attention_costs",
    "balance",
    "drop_tokens",
    "pack",
    "pack_grids",
    "pack_plan",
    "pack_text",
    "packed_mean",
    "per_sample_mean",
    "restore_tokens",
    "transformer_costs",
    "unpack",
    "unpack_text",
]
