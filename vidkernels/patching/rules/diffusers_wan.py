# SPDX-License-Identifier: Apache-2.0
"""Rules for the blocks, attentions and positions of diffusers' Wan models (2.1, 2.2, VACE, Animate, ChronoEdit) and of
SkyReels-V2, whose code is Wan's with another layout of modulation per token and a mask of its frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels._tracing import constant_while_tracing
from vidkernels.patching._guard import call_reason, child_reason, guarded, is_readable
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching._values import ReadOnce
from vidkernels.patching.rules import _dit_units as units
from vidkernels.patching.rules import _qk_norm_units as qk
from vidkernels.patching.rules import _wan_block_units as blocks

_WAN = "diffusers.models.transformers.transformer_wan"
_THETA = 10000.0
_TEXT = 512  # tokens of the text in the context of an image-to-video model, fixed by WanAttnProcessor


class BlockForward(Fused):
    """`WanTransformerBlock.forward`: rows of modulation per sample, or per token (Wan 2.2 TI2V), in float32."""

    @guarded
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
        """[B, N, D], context [B, M, D], modulation [B, 6, D] or [B, N, 6, D] -> [B, N, D]."""
        return _run(self, hidden_states, encoder_hidden_states, blocks.rows_of(self, temb), rotary_emb)

    def _reason(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **rest: Any) -> str | None:
        return call_reason(hidden_states, encoder_hidden_states, temb) or blocks.norms_reason(self)


class SkyReelsBlockForward(BlockForward):
    """`SkyReelsV2TransformerBlock.forward`: rows per sample, or per token (diffusion forcing), and a mask of tokens."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Any,
        attention_mask: Any = None,
    ) -> Tensor:
        """[B, N, D], context [B, M, D], modulation [B, 6, D] or [B, 6, N, D] -> [B, N, D]."""
        table = self.scale_shift_table
        rows = ((table if temb.ndim == 3 else table.unsqueeze(2)).to(temb.device) + temb.float()).unbind(1)
        return _run(self, hidden_states, encoder_hidden_states, rows, rotary_emb, attention_mask)


class VACEBlockForward(Fused):
    """`WanVACETransformerBlock.forward`: the same chain on the control tokens, between two projections."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        control_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Any,
    ) -> tuple[Tensor | None, Tensor]:
        """[B, N, D], context [B, M, D], control [B, N, D], modulation [B, 6, D] -> (hint or None, control)."""
        if self.proj_in is not None:
            control_hidden_states = self.proj_in(control_hidden_states) + hidden_states
        control = _run(self, control_hidden_states, encoder_hidden_states, blocks.rows_of(self, temb), rotary_emb)
        return None if self.proj_out is None else self.proj_out(control), control

    def _reason(self, rotary_emb: Any, **inputs: Any) -> str | None:
        return call_reason(*inputs.values()) or blocks.norms_reason(self)


def _run(
    block: Any, x: Tensor, context: Tensor, rows: tuple[Tensor, ...], rotary_emb: Any, mask: Tensor | None = None
) -> Tensor:
    attention: Any = block._modules["attn1"]
    to_context: Any = block._modules["attn2"]
    return blocks.chain(
        *(block, x, rows),
        attend=lambda normed: attention(normed, None, mask, rotary_emb),
        look=lambda normed: to_context(normed, context, None, None),
    )


class AttentionForward(Fused):
    """`WanAttention.forward` with `WanAttnProcessor`: norms and rotation of queries and keys in one launch.

    Projections and the attention itself stay diffusers': LoRA, fused projections, masks, attention backends.
    """

    _processor = "WanAttnProcessor"
    _distributes_all = False  # over ranks: cross-attention, too

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, N, D], context [B, M, D'] (an image's tokens and 512 of text where there are image keys) -> [B, N, D]."""
        image = None
        if self.add_k_proj is not None and encoder_hidden_states is not None:
            extra = encoder_hidden_states.shape[1] - _TEXT
            image, encoder_hidden_states = encoder_hidden_states[:, :extra], encoder_hidden_states[:, extra:]
        home, backend = self._vidkernels_home, self._vidkernels_backend("qk_norm_rope")
        q, k, v = home._get_qkv_projections(self, hidden_states, encoder_hidden_states)
        parts = self._modules
        overwrite = not self.fused_projections and units.may_overwrite(parts["to_q"], parts["to_k"])
        known = units.known_positions(rotary_emb, q)
        norms = parts["norm_q"], parts["norm_k"]
        q, k = units.norm_across_heads(q, k, norms, self.heads, backend, overwrite, **known)
        if rotary_emb is not None and not known:
            # WanAttnProcessor reads a pair's cosine from its first place and its sine from its second.
            cos, sin = (table[..., i::2].repeat_interleave(2, -1) for i, table in enumerate(rotary_emb))
            turn = units.Turn(cos, sin, q)
            q, k = turn(q, overwrite), turn(k, overwrite)
        parallel, alone = self.processor._parallel_config, encoder_hidden_states is None
        across = parallel if self._distributes_all else None
        mixed = self._attend(q, k, v, attn_mask=attention_mask, parallel_config=parallel if alone else across)
        if image is not None:
            image_k, image_v = home._get_added_kv_projections(self, image)
            image_k = units.norm_across_heads(image_k, None, (self.norm_added_k, None), self.heads, backend, False)[0]
            mixed = mixed + self._attend(q, image_k, image_v, parallel_config=across)
        project, dropout, *_ = self.to_out
        result: Tensor = dropout(project(mixed))
        return result

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Heads of q, k and channels of v to channels, by the attention backend of the processor."""
        options["backend"] = self.processor._attention_backend
        mixed = self._vidkernels_home.dispatch_attention_fn(q, k, v.unflatten(2, (self.heads, -1)), **options)
        flat: Tensor = mixed.flatten(2, 3).type_as(q)
        return flat

    def _reason(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Any,
        rotary_emb: Any,
        **kwargs: Any,
    ) -> str | None:
        reason = call_reason(hidden_states, encoder_hidden_states)
        if reason is None and type(self.processor) is not getattr(self._vidkernels_home, self._processor):
            reason = f"an attention uses {type(self.processor).__name__}"
        parts = self._modules
        norms = [parts["norm_q"], parts["norm_k"], *([] if self.add_k_proj is None else [self.norm_added_k])]
        for norm in norms:
            reason = reason or child_reason(norm, nn.RMSNorm)
            if reason is None and norm.eps is None:
                reason = "a query or key norm has no eps"
        return reason or ("attention arguments are given" if kwargs else None)


class SkyReelsAttentionForward(AttentionForward):
    """`SkyReelsV2Attention.forward` with `SkyReelsV2AttnProcessor`."""

    _processor = "SkyReelsV2AttnProcessor"
    _distributes_all = True


class PositionsForward(Fused):
    """`WanRotaryPosEmbed.forward`: the same tables, which remember the positions that they were made from."""

    def forward(self, hidden_states: Tensor) -> Any:
        """[B, C, F, H, W] -> (cos, sin) [1, tokens, 1, D]."""
        tables = super().forward(hidden_states)
        axes = (self.t_dim, self.h_dim, self.w_dim)
        if call_reason(hidden_states) is not None or not is_readable(hidden_states):
            return tables
        if not _standard(self.freqs_cos, self.freqs_sin, axes):
            return tables
        sizes = [size // patch for size, patch in zip(hidden_states.shape[2:], self.patch_size, strict=True)]
        ranges = [torch.arange(size, dtype=torch.int32, device=hidden_states.device) for size in sizes]
        positions = torch.stack(torch.meshgrid(*ranges, indexing="ij"), -1).flatten(0, 2)
        return qk.rotary(tables, positions, axes=axes, theta=_THETA, layout="interleaved")


@constant_while_tracing
def _standard(cos: Tensor, sin: Tensor, axes: tuple[int, ...]) -> bool:
    """Whether the tables hold, to float32's rounding, the angles that `ops.qk_norm_rope` computes; asked once a table.

    They do not in a model that was cast to bfloat16 as a whole, or that somebody gave another base.
    """
    return _known_standard(cos, sin, axes)


def _is_standard(cos: Tensor, sin: Tensor, axes: tuple[int, ...]) -> bool:
    pairs = [_THETA ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims) for dims in axes if dims]
    angles = torch.arange(cos.shape[0], dtype=torch.float64)[:, None] * torch.cat(pairs).repeat_interleave(2)
    if cos.shape != angles.shape or sin.shape != angles.shape or cos.device.type == "meta":
        return False
    errors = [(cos.cpu().double() - angles.cos()).abs().max(), (sin.cpu().double() - angles.sin()).abs().max()]
    return max(float(error) for error in errors) <= 2.0**-24


_known_standard = ReadOnce(_is_standard)


def _like(module: Any, *shape: int) -> Tensor:
    weight = next(module.parameters())
    return torch.randn(*shape, dtype=weight.dtype, device=weight.device)


def _tables(attention: Any) -> tuple[Tensor, Tensor]:
    return units.sample_tables(6, attention.inner_dim // attention.heads, attention.to_q.weight.device, (1,), (1,))


def _context(attention: Any) -> Tensor:
    length = 5 if attention.add_k_proj is None else _TEXT + 3
    width = attention.to_k.in_features if attention.add_k_proj is None else attention.add_k_proj.in_features
    return _like(attention, 2, length, width)


def _block_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    width = block.scale_shift_table.shape[-1]
    x = _like(block.attn1, 2, 6, width)
    return (x, _context(block.attn2), _like(block.attn1, 2, 6, width), _tables(block.attn1)), {}


def _vace_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (x, context, temb, tables), _ = _block_sample(block)
    return (x, context, torch.randn_like(x), temb, tables), {}


def _skyreels_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (x, context, _, tables), _ = _block_sample(block)
    return (x, context, _like(block.attn1, 2, 6, 6, x.shape[-1]), tables, None), {}


def _attention_sample(attention: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = _like(attention, 2, 6, attention.to_out[0].out_features)
    if attention.is_cross_attention or attention.add_k_proj is not None:
        return (x, _context(attention)), {}
    return (x, None, None, _tables(attention)), {}


def _positions_sample(rope: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    sizes = [2 * patch for patch in rope.patch_size]
    return (torch.zeros(1, 1, *sizes, device=rope.freqs_cos.device),), {}


_TESTED = ("diffusers 0.42.1",)
PARTS: dict[str, tuple[str, ...]] = {
    "FP32LayerNorm.forward": ("63b1d144a616ff61",),
    "FeedForward.forward": ("ecfc6b9ebf82ecd0",),
}


def _rules(
    family: str, path: str, prefix: str, block: tuple[type, str, Any], attention: tuple[type, str]
) -> tuple[Rule, ...]:
    """The rules of one library of Wan's kind; `block`: mixin, digest and sample, `attention`: mixin, processor's digest."""
    parts: tuple[tuple[str, str, str, type, dict[str, tuple[str, ...]], Any], ...] = (
        ("block", "adaln_zero", "TransformerBlock", block[0], PARTS | {"TransformerBlock.forward": (block[1],)}, block[2]),
        ("attention", "qk_norm_rope", "Attention", attention[0],
         {"Attention.forward": ("fa35f05c0027ed39",), "AttnProcessor.__call__": (attention[1],)}, _attention_sample),
        ("positions", "qk_norm_rope", "RotaryPosEmbed", PositionsForward,
         {"RotaryPosEmbed.forward": ("700490189504946f",)}, _positions_sample),
    )  # fmt: skip
    return tuple(
        Rule(
            name=f"diffusers.{family}_{part}",
            ops=(op,),
            targets=(f"{path}:{prefix}{cls}",),
            mixin=mixin,
            digests={key if key in PARTS else prefix + key: value for key, value in digests.items()},
            sample=sample,
            tested_versions=_TESTED,
        )
        for part, op, cls, mixin, digests, sample in parts
    )


RULES = (
    *_rules(
        "wan", _WAN, "Wan", (BlockForward, "6a41cf884c5cac21", _block_sample), (AttentionForward, "3771d176da9b61a6")
    ),
    Rule(
        name="diffusers.wan_vace_block",
        ops=("adaln_zero",),
        targets=(f"{_WAN}_vace:WanVACETransformerBlock",),
        mixin=VACEBlockForward,
        digests=PARTS | {"WanVACETransformerBlock.forward": ("410385eaab9a1a1e",)},
        sample=_vace_sample,
        tested_versions=_TESTED,
    ),
    *_rules(
        *("skyreels", "diffusers.models.transformers.transformer_skyreels_v2", "SkyReelsV2"),
        block=(SkyReelsBlockForward, "8b2faef8c910c3a7", _skyreels_sample),
        attention=(SkyReelsAttentionForward, "04f304a319cbb83d"),
    ),
)
