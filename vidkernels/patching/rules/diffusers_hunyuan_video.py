# SPDX-License-Identifier: Apache-2.0
"""Rules for the blocks and positions of diffusers' HunyuanVideo (FramePack's included) and HunyuanVideo 1.5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, child_reason, guarded, note_fallback
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _adaln_zero_units as adaln
from vidkernels.patching.rules import _dit_units as units
from vidkernels.patching.rules import _qk_norm_units as qk
from vidkernels.patching.rules._latte_units import feed_forward

_HUNYUAN = "diffusers.models.transformers.transformer_hunyuan_video"
_HUNYUAN15 = f"{_HUNYUAN}15"


class BlockForward(Fused):
    """`HunyuanVideo(TokenReplace|15)TransformerBlock.forward`: a video and a text stream, one attention."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        freqs_cis: Any = None,
        token_replace_emb: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video [B, N, D] and text [B, M, D] -> (video, text); the first `num_tokens` have a condition of their own."""
        backend = self._vidkernels_backend("adaln_zero")
        replaced = (token_replace_emb, num_tokens) if _replaces(self.norm1) else (None, None)
        video, rows = _open(hidden_states, self.norm1, 6, temb, *replaced, backend)
        text, text_rows = _open(encoder_hidden_states, self.norm1_context, 6, temb, None, None, backend)
        normed = video.open(self.norm1.norm, rows[0], rows[1])
        text_normed = text.open(self.norm1_context.norm, text_rows[0], text_rows[1])
        branch, text_branch = _attend(self, normed, text_normed, attention_mask, freqs_cis)
        normed = video.seam(branch, rows[2], self.norm2, rows[3], rows[4])
        video.add(feed_forward(self.ff, normed), rows[5])
        normed = text.seam(text_branch, text_rows[2], self.norm2_context, text_rows[3], text_rows[4])
        return video.x, text.add(feed_forward(self.ff_context, normed), text_rows[5])

    def _reason(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        token_replace_emb: Tensor | None,
        **rest: Any,
    ) -> str | None:
        home = self._vidkernels_home
        replacing = getattr(home, "HunyuanVideoTokenReplaceAdaLayerNormZero", home.AdaLayerNormZero)
        reason = call_reason(hidden_states, encoder_hidden_states, temb, token_replace_emb)
        reason = reason or adaln.rows_reason(self.norm1, home.AdaLayerNormZero, replacing)
        reason = reason or adaln.rows_reason(self.norm1_context, home.AdaLayerNormZero)
        return reason or child_reason(self.norm2, nn.LayerNorm) or child_reason(self.norm2_context, nn.LayerNorm)


class SingleBlockForward(Fused):
    """`HunyuanVideo(TokenReplace)SingleTransformerBlock.forward`: one stream, attention beside the MLP."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        token_replace_emb: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video [B, N, D] and text [B, M, D] -> (video, text); the first `num_tokens` have a condition of their own."""
        tokens = hidden_states.shape[1]
        replaced = (token_replace_emb, num_tokens) if _replaces(self.norm) else (None, None)
        joined = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        stream, rows = _open(joined, self.norm, 3, temb, *replaced, self._vidkernels_backend("adaln_zero"))
        normed = stream.open(self.norm.norm, rows[0], rows[1])
        mixed = _attend_joined(self, normed, tokens, attention_mask, image_rotary_emb)
        x = stream.add(self.proj_out(self._beside(mixed, normed)), rows[2])
        return x[:, :tokens], x[:, tokens:]

    def _reason(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        token_replace_emb: Tensor | None,
        **rest: Any,
    ) -> str | None:
        home = self._vidkernels_home
        classes = (home.AdaLayerNormZeroSingle, home.HunyuanVideoTokenReplaceAdaLayerNormZeroSingle)
        reason = call_reason(hidden_states, encoder_hidden_states, temb, token_replace_emb)
        return reason or adaln.rows_reason(self.norm, *classes)

    def _beside(self, mixed: Tensor, normed: Tensor) -> Tensor:
        """The attention's output [B, N, D] or [B, N, H, D / H] and the MLP's hidden channels side by side.

        Without gradients the GELU writes to its place: the hidden channels, the widest tensor, are not copied.
        """
        hidden = self.proj_mlp(normed)
        alone = child_reason(self.act_mlp, nn.GELU) is None and mixed.dtype == hidden.dtype
        # torch's exact GELU writes past the strides of `out` on CPUs (2.13)
        alone = alone and self.act_mlp.approximate == "tanh"
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not alone:
            return torch.cat([mixed.flatten(2), self.act_mlp(hidden)], dim=2)
        width = hidden.shape[-1]
        both = hidden.new_empty(*hidden.shape[:2], mixed.shape[2:].numel() + width)
        both[..., :-width].unflatten(-1, mixed.shape[2:]).copy_(mixed)
        torch.ops.aten.gelu.out(hidden, approximate=self.act_mlp.approximate, out=both[..., -width:])
        return both


class PositionsForward(Fused):
    """`HunyuanVideo(15)RotaryPosEmbed.forward`: the same tables, which remember the positions that they were made from."""

    def forward(self, hidden_states: Tensor) -> Any:
        """[B, C, F, H, W] -> (cos, sin) [tokens, D]."""
        tables = super().forward(hidden_states)
        patches = (self.patch_size_t, self.patch_size, self.patch_size)
        sizes = [size // patch for size, patch in zip(hidden_states.shape[2:], patches, strict=True)]
        # The tables' angles are float32: at position 1024 they are up to 4 roundings of it, 2^-12, away from the op's.
        if call_reason(hidden_states) is not None or max(sizes) > 1024:
            return tables
        ranges = [torch.arange(size, dtype=torch.int32, device=hidden_states.device) for size in sizes]
        positions = torch.stack(torch.meshgrid(*ranges, indexing="ij"), -1).flatten(0, 2)
        return qk.rotary(tables, positions, axes=tuple(self.rope_dim), theta=float(self.theta), layout="interleaved")


def _replaces(norm: Any) -> bool:
    """Whether the first frame has a condition of its own."""
    return "TokenReplace" in type(norm).__name__


def _open(
    x: Tensor, norm: Any, count: int, temb: Tensor, first_temb: Tensor | None, first: int | None, backend: str
) -> tuple[adaln.Stream, tuple[Tensor, ...]]:
    """A stream and its rows of modulation: one a sample, or another one for the first `first` tokens."""
    rows = adaln.rows_of(norm, temb, count)
    if first_temb is None or first is None:
        return adaln.Stream(x, rows[-1], backend), rows
    first_rows = adaln.rows_of(norm, first_temb, count)
    both = torch.stack([torch.cat(first_rows, 1), torch.cat(rows, 1)], 1).flatten(0, 1).chunk(count, dim=1)  # [2 B, D]
    return units.JoinedStream(x, both[-1], units.alternate(first, x, both[-1]), backend), both


def _is_15(block: Any) -> bool:
    return hasattr(block._vidkernels_home, "HunyuanVideo15AttnProcessor2_0")


def _attention_reason(block: Any, joined: bool, tables: Any, tokens: int) -> str | None:
    attention, home = block.attn, block._vidkernels_home
    processor = home.HunyuanVideo15AttnProcessor2_0 if _is_15(block) else home.HunyuanVideoAttnProcessor2_0
    reason = units.processor_reason(attention, home.Attention, processor)
    if reason is None and joined != (attention.add_q_proj is None):
        reason = "an attention has other projections than usual"
    norms = [attention.norm_q, attention.norm_k]
    if not joined and reason is None:
        norms += [attention.norm_added_q, attention.norm_added_k]
        if attention.to_out is None or attention.to_add_out is None:
            reason = "an attention does not project its output"
    elif reason is None and getattr(attention, "to_out", None) is not None:
        reason = "an attention projects its output"
    if reason is None and tables is not None and tables[0].shape[0] != tokens:
        reason = f"the rotation's tables are for {tables[0].shape[0]} tokens, the video has {tokens}"
    return reason or qk.norms_reason(norms)


def _attend(block: Any, x: Tensor, text: Tensor, mask: Tensor | None, tables: Any) -> tuple[Tensor, Tensor]:
    """(video, text) of the attention of a block with two streams."""
    attention, reason = block.attn, _attention_reason(block, False, tables, x.shape[1])
    if reason is not None:
        note_fallback(block, reason)
        called: tuple[Tensor, Tensor] = attention(  # named as upstream does: hooks see them so
            hidden_states=x, encoder_hidden_states=text, attention_mask=mask, image_rotary_emb=tables
        )
        return called
    q, k = _rotated(block, x, tables, attention.to_q, attention.to_k, attention.norm_q, attention.norm_k)
    added = (attention.add_q_proj, attention.add_k_proj, attention.norm_added_q, attention.norm_added_k)
    text_q, text_k = _rotated(block, text, None, *added)
    v, text_v = (qk.heads(y, attention.heads) for y in (attention.to_v(x), attention.add_v_proj(text)))
    q, k, v = (torch.cat(pair, dim=1) for pair in ((q, text_q), (k, text_k), (v, text_v)))
    if _is_15(block) and mask is not None:  # of the text's tokens, [B, M]: padding neither gives nor takes
        valid = nn.functional.pad(mask, (q.shape[1] - mask.shape[1], 0), value=True).bool()
        mask = valid[:, None, None, :] & valid[:, None, :, None]
    mixed = _dispatch(block, q, k, v, mask).flatten(2)
    video = attention.to_out[1](attention.to_out[0](mixed[:, : x.shape[1]]))
    return video, attention.to_add_out(mixed[:, x.shape[1] :])


def _attend_joined(block: Any, x: Tensor, tokens: int, mask: Tensor | None, tables: Any) -> Tensor:
    """The attention of a block with one stream, [B, N, H, D / H]; or [B, N, D] from the module itself."""
    attention, reason = block.attn, _attention_reason(block, True, tables, tokens)
    if reason is not None:
        note_fallback(block, reason)
        streams = {"hidden_states": x[:, :tokens], "encoder_hidden_states": x[:, tokens:]}
        both = attention(**streams, attention_mask=mask, image_rotary_emb=tables)
        return torch.cat(both, dim=1)
    q, k = _rotated(block, x, tables, attention.to_q, attention.to_k, attention.norm_q, attention.norm_k)
    return _dispatch(block, q, k, qk.heads(attention.to_v(x), attention.heads), mask)


def _dispatch(block: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    processor = block.attn.processor
    where = {"backend": processor._attention_backend, "parallel_config": processor._parallel_config}
    mixed: Tensor = block._vidkernels_home.dispatch_attention_fn(q, k, v, attn_mask=mask, **where)
    return mixed.to(q.dtype)


def _rotated(
    block: Any, x: Tensor, tables: Any, to_q: Any, to_k: Any, norm_q: Any, norm_k: Any
) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, N, H, D], normalised; those that the tables are for, the first ones, are rotated."""
    overwrite = units.may_overwrite(to_q, to_k)
    q, k = (qk.heads(project(x), block.attn.heads) for project in (to_q, to_k))
    backend = block._vidkernels_backend("qk_norm_rope")
    known = units.known_positions(tables, q) if qk.rounds_angles(q.dtype) else {}
    if known:
        rest = q.shape[1] - known["positions"].shape[0]
        known["positions"] = nn.functional.pad(known["positions"], (0, 0, 0, rest))  # at 0 nothing is rotated
    q, k = qk.normalise(q, k, norm_q, norm_k, backend, inplace=overwrite, **known)
    if tables is None or known:
        return q, k
    cos, sin = tables
    rest = (0, 0, 0, q.shape[1] - cos.shape[0])
    cos, sin = nn.functional.pad(cos, rest, value=1.0), nn.functional.pad(sin, rest)
    turn = units.Turn(cos[None, :, None], sin[None, :, None], q)
    return turn(q, overwrite), turn(k, overwrite)


def _like(block: Any, *shape: int) -> Tensor:
    weight = block.attn.to_q.weight
    return torch.randn(*shape, dtype=weight.dtype, device=weight.device)


def _sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    width = block.attn.to_q.in_features
    x, text, temb, first_temb = (_like(block, *shape, width) for shape in ((2, 9), (2, 5), (2,), (2,)))
    tables = units.sample_tables(9, width // block.attn.heads, x.device)
    mask = torch.ones(2, 14, dtype=torch.bool, device=x.device)
    mask[1, 12:] = False
    mask = mask[:, 9:] if "HunyuanVideo15" in type(block.attn.processor).__name__ else mask[:, None, None]
    return (x, text, temb, mask, tables, first_temb, 3), {}


def _projections(block: Any) -> list[nn.Module]:
    """None where the first frame has a condition of its own: two conditions would take turns in one product."""
    norms = [block.norm] if hasattr(block, "norm") else [block.norm1, block.norm1_context]
    return [] if any(_replaces(norm) for norm in norms) else [norm.linear for norm in norms]


def _positions_sample(rope: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.zeros(1, 1, 2 * rope.patch_size_t, 2 * rope.patch_size, 3 * rope.patch_size),), {}


_TESTED = ("diffusers 0.42.1",)
_Digests = dict[str, tuple[str, ...]]
_OLD: _Digests = {"HunyuanVideoAttnProcessor2_0.__call__": ("65db16b44742111a",)}
_NEW: _Digests = {"HunyuanVideo15AttnProcessor2_0.__call__": ("18f826c7db1ecaf9",)}
_ZERO: _Digests = {"AdaLayerNormZero.forward": ("73a3ec4bba8a9f2a",), "FeedForward.forward": ("ecfc6b9ebf82ecd0",)}
_TR_ZERO: _Digests = {"HunyuanVideoTokenReplaceAdaLayerNormZero.forward": ("988452fd2729c4b1",)}
_SINGLE: _Digests = {"AdaLayerNormZeroSingle.forward": ("10deba49869ebce5",)}
_TR_SINGLE: _Digests = {"HunyuanVideoTokenReplaceAdaLayerNormZeroSingle.forward": ("577a5203df453d93",)}


def _block_rule(name: str, module: str, cls: str, digest: str, mixin: type, others: _Digests) -> Rule:
    return Rule(
        name=f"diffusers.{name}",
        ops=("adaln_zero", "qk_norm_rope"),
        targets=(f"{module}:{cls}",),
        mixin=mixin,
        digests={"Attention.forward": ("b329f38beafa4c39",), f"{cls}.forward": (digest,)} | others,
        check=lambda block: qk.norms_check(block.attn),
        sample=_sample,
        projections=_projections,
        tested_versions=_TESTED,
    )


def _positions_rule(name: str, module: str, cls: str, digest: str) -> Rule:
    return Rule(
        name=f"diffusers.{name}",
        ops=("qk_norm_rope",),
        targets=(f"{module}:{cls}",),
        mixin=PositionsForward,
        digests={f"{cls}.forward": (digest,)},
        sample=_positions_sample,
        tested_versions=_TESTED,
    )


_H, _H15 = "HunyuanVideo", "HunyuanVideo15"
_SINGLE_BLOCK, _TR_SINGLE_BLOCK = f"{_H}SingleTransformerBlock", f"{_H}TokenReplaceSingleTransformerBlock"
_TWO, _ONE = BlockForward, SingleBlockForward

RULES = (
    _block_rule("hunyuan_video_block", _HUNYUAN, f"{_H}TransformerBlock", "5e297c316b85aa6b", _TWO, _OLD | _ZERO),
    _block_rule(
        "hunyuan_video_token_replace_block",
        _HUNYUAN,
        f"{_H}TokenReplaceTransformerBlock",
        "5a92dcf336fdd394",
        _TWO,
        _OLD | _ZERO | _TR_ZERO,
    ),
    _block_rule("hunyuan_video_single_block", _HUNYUAN, _SINGLE_BLOCK, "484dbf52d85562ef", _ONE, _OLD | _SINGLE),
    _block_rule(
        "hunyuan_video_token_replace_single_block",
        _HUNYUAN,
        _TR_SINGLE_BLOCK,
        "2bf01253cc8b880c",
        _ONE,
        _OLD | _TR_SINGLE,
    ),
    _positions_rule("hunyuan_video_positions", _HUNYUAN, f"{_H}RotaryPosEmbed", "e497389d434e740d"),
    _block_rule("hunyuan_video15_block", _HUNYUAN15, f"{_H15}TransformerBlock", "5e297c316b85aa6b", _TWO, _NEW | _ZERO),
    _positions_rule("hunyuan_video15_positions", _HUNYUAN15, f"{_H15}RotaryPosEmbed", "f3adb081b74e9eed"),
)
