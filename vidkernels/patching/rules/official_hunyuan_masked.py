# SPDX-License-Identifier: Apache-2.0
"""Rules for blocks of HunyuanVideo's kind whose attention takes the text's mask, by the digests of their methods: HunyuanVideo
1.5's own (`hyvideo.models.transformers`), and FastVideo's first ones (`fastvideo.models.hunyuan`), which other projects copied.

The attention under the name `parallel_attention` in their file is called.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidkernels.patching._guard import guarded
from vidkernels.patching._rule import Rule
from vidkernels.patching._values import ReadOnce
from vidkernels.patching.rules import _hunyuan_exact as exact
from vidkernels.patching.rules.official_hunyuan import PLAIN, Double, Pair, Single, block_rule, projections


def _attended(block: Any, pairs: Any, how: dict[str, Any]) -> Tensor:
    image = pairs[0][0].shape[1]
    mixed: Tensor = block._vidkernels_home.parallel_attention(*pairs, img_q_len=image, img_kv_len=image, **how)
    return mixed


def _copied_part(table: Tensor, count: int, index: int) -> Tensor:
    size = table.shape[0] // count
    return table.narrow(0, size * index, size).clone()


_part = ReadOnce(_copied_part)  # a copy: what its positions are is looked up once


def _own_part(block: Any, tables: Any) -> Any:
    """The tables of this process's tokens, where several share a clip: FastVideo hands all of them to each."""
    processes = block._vidkernels_home.nccl_info
    if processes.sp_size == 1 or not isinstance(tables, tuple):
        return tables
    return tuple(_part(table, processes.sp_size, processes.rank_within_group) for table in tables)


class _Double(Double):
    def _join(self, pairs: Any, how: Any) -> Tensor:
        return _attended(self, pairs, how)


class DoubleBlock15Forward(_Double):
    """`MMDoubleStreamBlock.forward` of HunyuanVideo 1.5."""

    @guarded
    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        freqs_cis: Any = None,
        text_mask: Any = None,
        attn_param: Any = None,
        is_flash: bool = False,
        block_idx: Any = None,
    ) -> Pair:
        """Video [B, N, D], text [B, M, D], condition [B, D] -> (video, text)."""
        how = {"attn_mode": "flash" if is_flash else self.attn_mode, "attn_param": attn_param, "block_idx": block_idx}
        return self._serve(img, txt, vec, freqs_cis, {"text_mask": text_mask, **how})

    def _reason(self, img: Tensor, txt: Tensor, vec: Tensor, freqs_cis: Any, **rest: Any) -> str | None:
        return self._streams_reason(img, txt, vec, freqs_cis)


class FastDoubleBlockForward(_Double):
    """`MMDoubleStreamBlock.forward` of FastVideo."""

    @guarded
    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        freqs_cis: Any = None,
        text_mask: Any = None,
        mask_strategy: Any = None,
    ) -> Pair:
        """Video [B, N, D], text [B, M, D], condition [B, D] -> (video, text)."""
        return self._serve(img, txt, vec, _own_part(self, freqs_cis), _told(text_mask, mask_strategy))

    def _reason(self, img: Tensor, txt: Tensor, vec: Tensor, freqs_cis: Any, **rest: Any) -> str | None:
        return self._streams_reason(img, txt, vec, _own_part(self, freqs_cis))


class FastSingleBlockForward(Single):
    """`MMSingleStreamBlock.forward` of FastVideo."""

    @guarded
    def forward(
        self,
        x: Tensor,
        vec: Tensor,
        txt_len: int,
        freqs_cis: Any = None,
        text_mask: Any = None,
        mask_strategy: Any = None,
    ) -> Tensor:
        """[B, N, D], condition [B, D] -> [B, N, D]; the last `txt_len` tokens are the text's."""
        return self._serve(x, vec, txt_len, _own_part(self, freqs_cis), _told(text_mask, mask_strategy))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, image: int, how: Any) -> Tensor:
        return _attended(self, tuple((x[:, :image], x[:, image:]) for x in (q, k, v)), how)

    def _reason(self, x: Tensor, vec: Tensor, txt_len: Any, freqs_cis: Any, **rest: Any) -> str | None:
        missing = "the rotation has no tables" if freqs_cis is None else None
        return missing or self._stream_reason(x, vec, txt_len, _own_part(self, freqs_cis))


def _told(text_mask: Any, strategy: Any) -> dict[str, Any]:
    """What FastVideo's attention is told: an older one knows no strategy, the later one needs it."""
    return {"text_mask": text_mask} if strategy is None else {"text_mask": text_mask, "mask_strategy": strategy}


_DOUBLE, _SINGLE = "MMDoubleStreamBlock", "MMSingleStreamBlock"
# No samples: the attentions need FlashAttention, or a group of processes that is set up.
_OPTIONS: dict[str, Any] = {"projections": projections, "widen": exact.widen_masked}
_15: dict[str, Any] = {
    **_OPTIONS,
    "file": "hyvideo.models.transformers.hunyuanvideo_1_5_transformer",
    "features": ("img_attn_q",),
    "tested_versions": ("HunyuanVideo-1.5 (hyvideo-fork 20260412)",),
}
_FAST: dict[str, Any] = {
    **_OPTIONS,
    "file": "fastvideo.models.hunyuan.modules.models",
    "tested_versions": ("fastvideo 0.0.1", "fastvideo 0.0.5"),
}
_TWO, _ONE = FastDoubleBlockForward, FastSingleBlockForward

RULES: tuple[Rule, ...] = (
    block_rule("block_1_5", _DOUBLE, DoubleBlock15Forward, PLAIN, "6f6699ce4941943c", **_15),
    block_rule("fast_double_block", _DOUBLE, _TWO, PLAIN, "7c6b9eb17c0c70db", "af9e8f12eacf53a2", **_FAST),
    block_rule("fast_single_block", _SINGLE, _ONE, PLAIN, "a8da8af9b2b5b04e", "289951bcb2c79e9c", **_FAST),
)
