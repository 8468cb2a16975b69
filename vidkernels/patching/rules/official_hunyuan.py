# SPDX-License-Identifier: Apache-2.0
"""Rules for the blocks of HunyuanVideo's own transformers (`hyvideo.modules.models`, that of HunyuanVideo-I2V, too) and copies of
them, found by the digests of their methods. The attention under the names `attention` and `parallel_attention` in their file is
called."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _dit_units as dit
from vidkernels.patching.rules import _hunyuan_exact as exact
from vidkernels.patching.rules import _hunyuan_units as units
from vidkernels.patching.rules import _opensora2_units as opensora2
from vidkernels.patching.rules.official_dit import FinalForward

Pair = tuple[Tensor, Tensor]


class Lengths(NamedTuple):
    """Where samples and their padding begin among all tokens, and the most tokens of a sample; of queries and keys."""

    cu_seqlens_q: Any
    cu_seqlens_kv: Any
    max_seqlen_q: Any
    max_seqlen_kv: Any


class _Block(Fused):
    """What both kinds of blocks share."""

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, image: int, how: Any) -> Tensor:
        """The attention of [B, N, H, D], of which the first `image` are the video's: [B, N, H * D]."""
        home, hybrid = self._vidkernels_home, getattr(self, "hybrid_seq_parallel_attn", None)
        if not hybrid:
            mixed: Tensor = home.attention(q, k, v, **how._asdict(), batch_size=q.shape[0])
            return mixed
        starts = {"cu_seqlens_q": how.cu_seqlens_q, "cu_seqlens_kv": how.cu_seqlens_kv}
        mixed = home.parallel_attention(hybrid, q, k, v, img_q_len=image, img_kv_len=image, **starts)
        return mixed

    def _common_reason(self, vec: Tensor, tables: Any, *streams: Tensor) -> str | None:
        reason = call_reason(vec, *streams, *(tables if isinstance(tables, tuple) else ()))
        if reason is None and (vec.ndim != 2 or any(x.ndim != 3 for x in streams)):
            reason = "an unusual input is given"
        return reason or units.file_reason(self._vidkernels_home) or units.norms_reason(units.norms_of(self))

    def _parts_reason(self, modulations: tuple[str, ...], norms: tuple[str, ...]) -> str | None:
        parts = self._modules
        for name in modulations:
            reason = units.modulation_reason(parts[name], self._vidkernels_home.ModulateDiT)
            if reason is not None:
                return reason
        for name in norms:
            reason = child_reason(parts[name], nn.LayerNorm)
            if reason is not None:
                return reason
        return None


def _starts_reason(starts: Any, x: Tensor) -> str | None:
    """Upstream asserts on them."""
    usual = isinstance(starts, Tensor) and starts.shape == (2 * x.shape[0] + 1,)
    return None if usual else "the starts of the samples are missing, or not two a sample"


def _first(kind: Any, condition: Any, tokens: Any) -> units.First:
    return (condition, tokens) if kind == "token_replace" else None


def _first_reason(kind: Any, condition: Any, tokens: Any) -> str | None:
    usual = isinstance(condition, Tensor) and condition.ndim == 2 and isinstance(tokens, int) and tokens >= 0
    return None if kind != "token_replace" or usual else "the first frame has no condition, or one of an unusual kind"


class Double(_Block):
    """A video and a text stream, one attention over both, the video in front."""

    def _join(self, pairs: Any, how: Any) -> Tensor:
        """The attention of queries, keys and values, each a pair of [B, N, H, D] and [B, M, H, D]: [B, N + M, H * D].

        how: what else it is told.
        """
        q, k, v = (torch.cat(pair, 1) for pair in pairs)
        return self._mix(q, k, v, pairs[0][0].shape[1], how)

    def _serve(self, img: Tensor, txt: Tensor, vec: Tensor, tables: Any, how: Any, first: units.First = None) -> Pair:
        parts, (chain, turning), tokens = self._modules, units.backends(self), img.shape[1]
        image, rows = units.open_stream(img, parts["img_mod"], vec, 6, first, chain)
        text, text_rows = units.open_stream(txt, parts["txt_mod"], vec, 6, None, chain)
        norms = units.norms_of(self)
        q, k, v, free = units.split(self, "img", image.open(parts["img_norm1"], rows[0], rows[1]))
        q, k = units.turned(q, k, norms[:2], tables, tokens, free, turning)
        later = units.split(self, "txt", text.open(parts["txt_norm1"], text_rows[0], text_rows[1]))
        text_q, text_k = units.turned(*later[:2], norms[2:], None, 0, later[3], turning)
        mixed = self._join(((q, text_q), (k, text_k), (v, later[2])), how)
        branch, text_branch = self.img_attn_proj(mixed[:, :tokens]), self.txt_attn_proj(mixed[:, tokens:])
        normed = image.seam(branch, rows[2], parts["img_norm2"], rows[3], rows[4])
        image.add(units.feed_forward(self, "img_mlp", normed), rows[5])
        normed = text.seam(text_branch, text_rows[2], parts["txt_norm2"], text_rows[3], text_rows[4])
        return image.x, text.add(units.feed_forward(self, "txt_mlp", normed), text_rows[5])

    def _streams_reason(self, img: Tensor, txt: Tensor, vec: Tensor, tables: Any) -> str | None:
        norms = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")
        reason = self._common_reason(vec, tables, img, txt)
        reason = reason or units.tables_reason(tables, img.shape[1], img.shape[2] // self.heads_num)
        return reason or self._parts_reason(("img_mod", "txt_mod"), norms)


class DoubleBlockForward(Double):
    """`MMDoubleStreamBlock.forward`."""

    @guarded
    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        cu_seqlens_q: Any = None,
        cu_seqlens_kv: Any = None,
        max_seqlen_q: Any = None,
        max_seqlen_kv: Any = None,
        freqs_cis: Any = None,
    ) -> Pair:
        """Video [B, N, D], text [B, M, D], condition [B, D] -> (video, text)."""
        lengths = Lengths(cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
        return self._serve(img, txt, vec, freqs_cis, lengths)

    def _reason(
        self, img: Tensor, txt: Tensor, vec: Tensor, freqs_cis: Any, cu_seqlens_q: Any, **rest: Any
    ) -> str | None:
        return self._streams_reason(img, txt, vec, freqs_cis) or _starts_reason(cu_seqlens_q, img)


class ImageDoubleBlockForward(Double):
    """The same of HunyuanVideo-I2V: the first frame may have a condition of its own."""

    @guarded
    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        cu_seqlens_q: Any = None,
        cu_seqlens_kv: Any = None,
        max_seqlen_q: Any = None,
        max_seqlen_kv: Any = None,
        freqs_cis: Any = None,
        condition_type: Any = None,
        token_replace_vec: Any = None,
        frist_frame_token_num: Any = None,
    ) -> Pair:
        """Video [B, N, D], text [B, M, D], conditions [B, D] -> (video, text)."""
        lengths = Lengths(cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
        first = _first(condition_type, token_replace_vec, frist_frame_token_num)
        return self._serve(img, txt, vec, freqs_cis, lengths, first)

    def _reason(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        freqs_cis: Any,
        cu_seqlens_q: Any,
        condition_type: Any,
        token_replace_vec: Any,
        frist_frame_token_num: Any,
        **rest: Any,
    ) -> str | None:
        reason = _first_reason(condition_type, token_replace_vec, frist_frame_token_num)
        reason = reason or self._streams_reason(img, txt, vec, freqs_cis)
        return reason or _starts_reason(cu_seqlens_q, img)


class Single(_Block):
    """Video and text in one stream, attention beside the MLP."""

    def _serve(self, x: Tensor, vec: Tensor, words: int, tables: Any, how: Any, first: units.First = None) -> Tensor:
        parts, (chain, turning), width = self._modules, units.backends(self), self.hidden_size
        stream, (shift, scale, gate) = units.open_stream(x, parts["modulation"], vec, 3, first, chain)
        wide = self.linear1(stream.open(parts["pre_norm"], shift, scale))  # [B, N, 3 D + hidden]
        q, k, v = wide[..., : 3 * width].unflatten(2, (3, self.heads_num, -1)).unbind(2)
        free, image = dit.may_overwrite(parts["linear1"]), x.shape[1] - words
        q, k = units.turned(q, k, units.norms_of(self), tables, image, free, turning)
        mixed = self._mix(q, k, v, image, how)
        return stream.add(opensora2.through_last(self, mixed, wide[..., 2 * width :], free), gate)

    def _stream_reason(self, x: Tensor, vec: Tensor, words: Any, tables: Any) -> str | None:
        reason = self._common_reason(vec, tables, x)
        if reason is None and not 0 < words <= x.shape[1]:
            reason = f"{words} of {x.shape[1]} tokens are the text's"
        reason = reason or units.tables_reason(tables, x.shape[1] - words, self.hidden_size // self.heads_num)
        return reason or self._parts_reason(("modulation",), ("pre_norm",))


class SingleBlockForward(Single):
    """`MMSingleStreamBlock.forward`."""

    @guarded
    def forward(
        self,
        x: Tensor,
        vec: Tensor,
        txt_len: int,
        cu_seqlens_q: Any = None,
        cu_seqlens_kv: Any = None,
        max_seqlen_q: Any = None,
        max_seqlen_kv: Any = None,
        freqs_cis: Any = None,
    ) -> Tensor:
        """[B, N, D], condition [B, D] -> [B, N, D]; the last `txt_len` tokens are the text's."""
        lengths = Lengths(cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
        return self._serve(x, vec, txt_len, freqs_cis, lengths)

    def _reason(
        self, x: Tensor, vec: Tensor, txt_len: Any, freqs_cis: Any, cu_seqlens_q: Any, **rest: Any
    ) -> str | None:
        return self._stream_reason(x, vec, txt_len, freqs_cis) or _starts_reason(cu_seqlens_q, x)


class ImageSingleBlockForward(Single):
    """The same of HunyuanVideo-I2V."""

    @guarded
    def forward(
        self,
        x: Tensor,
        vec: Tensor,
        txt_len: int,
        cu_seqlens_q: Any = None,
        cu_seqlens_kv: Any = None,
        max_seqlen_q: Any = None,
        max_seqlen_kv: Any = None,
        freqs_cis: Any = None,
        condition_type: Any = None,
        token_replace_vec: Any = None,
        frist_frame_token_num: Any = None,
    ) -> Tensor:
        """[B, N, D], conditions [B, D] -> [B, N, D]; the last `txt_len` tokens are the text's."""
        lengths = Lengths(cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
        first = _first(condition_type, token_replace_vec, frist_frame_token_num)
        return self._serve(x, vec, txt_len, freqs_cis, lengths, first)

    def _reason(
        self,
        x: Tensor,
        vec: Tensor,
        txt_len: Any,
        freqs_cis: Any,
        cu_seqlens_q: Any,
        condition_type: Any,
        token_replace_vec: Any,
        frist_frame_token_num: Any,
        **rest: Any,
    ) -> str | None:
        reason = _first_reason(condition_type, token_replace_vec, frist_frame_token_num)
        reason = reason or self._stream_reason(x, vec, txt_len, freqs_cis)
        return reason or _starts_reason(cu_seqlens_q, x)


def _like(module: nn.Module, *shape: int) -> Tensor:
    weight = next(module.parameters())
    return torch.randn(shape, dtype=weight.dtype, device=weight.device)


def _sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two samples of six tokens of video and three of text, of which the second has one of padding."""
    double = hasattr(block, "img_mod")
    width = (block.img_mod if double else block.modulation).linear.in_features
    vec = _like(block, 2, width)
    starts = torch.tensor([0, 9, 9, 17, 18], dtype=torch.int32, device=vec.device)
    tables = dit.sample_tables(6, width // block.heads_num, vec.device)
    shared = (starts, starts, 9, 9, tables)
    if double:
        return (_like(block, 2, 6, width), _like(block, 2, 3, width), vec, *shared), {}
    return (_like(block, 2, 9, width), vec, 3, *shared), {}


def _image_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    arguments, options = _sample(block)
    return (*arguments, "token_replace", torch.randn_like(arguments[2 if hasattr(block, "img_mod") else 1]), 2), options


def _final_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    width = module.linear.in_features
    return (_like(module, 2, 9, width), _like(module, 2, width)), {}


def projections(block: Any) -> list[nn.Module]:
    """The layers that project the condition of a block."""
    return [block.img_mod.linear, block.txt_mod.linear] if hasattr(block, "img_mod") else [block.modulation.linear]


def _final_projections(module: Any) -> list[nn.Module]:
    return [module.adaLN_modulation[1]]


_FILE = "hyvideo.modules.models"
_TESTED = ("copies of Tencent-Hunyuan/HunyuanVideo",)
_IMAGE_TESTED = ("copies of Tencent/HunyuanVideo-I2V",)
PLAIN, _WITH_FIRST = ("c8eb9876b86c9ec2",), ("52805297cf3fe42d",)
_KINDS = {"MMDoubleStreamBlock": "img_mod.linear txt_mod.linear", "MMSingleStreamBlock": "linear1 linear2"}


def block_rule(name: str, cls: str, mixin: type, modulation: tuple[str, ...], *forwards: str, **more: Any) -> Rule:
    """A rule for blocks of class `cls`, known by the digests of their forwards and of their `ModulateDiT`'s."""
    digests = {f"{cls}.forward": forwards, "ModulateDiT.forward": modulation, "MLP.forward": ("5a422744a72b893d",)}
    double = cls == "MMDoubleStreamBlock"
    norms = [f"{kind}_attn_" for kind in ("img", "txt")] if double else [""]
    return Rule(
        name=f"hunyuan.{name}",
        ops=("adaln_zero", "qk_norm_rope"),
        targets=(f"{more.pop('file', _FILE)}:{cls}",),
        mixin=mixin,
        digests=digests,
        features=(*_KINDS[cls].split(), "heads_num", *more.pop("features", ())),
        reads=tuple(f"{norm}{which}_norm" for norm in norms for which in "qk"),
        check=units.block_check,
        widen=more.pop("widen", exact.widen),
        **more,
    )


_DOUBLE, _SINGLE = "MMDoubleStreamBlock", "MMSingleStreamBlock"
_TEXT: dict[str, Any] = {"sample": _sample, "projections": projections, "tested_versions": _TESTED}
# None are stacked for images: two conditions would take turns in one product.
_IMAGE: dict[str, Any] = {"sample": _image_sample, "tested_versions": _IMAGE_TESTED}

RULES = (
    block_rule("double_block", _DOUBLE, DoubleBlockForward, PLAIN, "fe47fdef3a71fa5a", "2b0f7708c6ac6cb8", **_TEXT),
    block_rule("single_block", _SINGLE, SingleBlockForward, PLAIN, "07d84d9294df4c89", "0f1773bb0ca79692", **_TEXT),
    block_rule("image_double_block", _DOUBLE, ImageDoubleBlockForward, _WITH_FIRST, "9832c1507d29675e", **_IMAGE),
    block_rule("image_single_block", _SINGLE, ImageSingleBlockForward, _WITH_FIRST, "ce508193975159e8", **_IMAGE),
    Rule(
        name="hunyuan.final",
        ops=("adaln_zero",),
        targets=("hyvideo.modules.mlp_layers:FinalLayer",),
        mixin=FinalForward,
        digests={
            "FinalLayer.forward": ("087db27c16a865e9",),
            "modulate": ("2b51e7626b369ea3", "c363d52fb4120f9a"),
        },
        features=("adaLN_modulation", "norm_final", "linear"),
        sample=_final_sample,
        projections=_final_projections,
        inductor="one norm with its modulation is one kernel of Inductor, too",
        tested_versions=_TESTED,
    ),
)
