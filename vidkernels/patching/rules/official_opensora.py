# SPDX-License-Identifier: Apache-2.0
"""Rules for the blocks of Open-Sora 1.0 and 1.1 (STDiT, STDiT2, PixArt), of PixArt-Sigma and of Open-Sora-Plan's LatteT2V,
and copies of them.

Video blocks attend over the positions of each frame and over the frames of each position. Attentions and MLPs are called as
modules. Open-Sora 1.2's block is in `official_dit`, diffusers' Latte in `diffusers_latte`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules._adaln_zero_units import Stream
from vidkernels.patching.rules._latte_units import rows_of
from vidkernels.patching.rules.official_attention import in_frames, over_time
from vidkernels.patching.rules.official_dit import chosen_rows

Rows = tuple[Tensor, ...]


class _Frames(Fused):
    def _stream_reason(self, x: Tensor, x_mask: Any, norms: tuple[Any, ...], clean: tuple[Any, ...]) -> str | None:
        reason = None
        for norm in norms:
            reason = reason or child_reason(norm, nn.LayerNorm)
        if reason is None and (x.ndim != 3 or any((x_mask is None) != (other is None) for other in clean)):
            reason = "an unusual input is given"
        return reason

    def _end(self, stream: Stream, y: Tensor, mask: Any, rows: Rows) -> Tensor:
        """Cross-attention, which has no gate, and MLP."""
        shift, scale, gate = rows
        normed = stream.seam(self.cross_attn(stream.x, y, mask), None, self.norm2, shift, scale)
        return stream.add(self.drop_path(self.mlp(normed)), gate)


class STDiTForward(_Frames):
    """`STDiTBlock.forward`. Its temporal branch has no norm, and the gate of moving frames for all of them."""

    @guarded
    def forward(
        self,
        x: Tensor,
        y: Tensor,
        t: Tensor,
        mask: Any = None,
        tpe: Tensor | None = None,
        x_mask: Tensor | None = None,
        t0: Tensor | None = None,
    ) -> Tensor:
        """[B, T * S, D] -> [B, T * S, D]."""
        rows = chosen_rows(self.scale_shift_table, t, x_mask, t0)
        size = self.d_t, self.d_s
        stream = Stream(x, rows[2], self._vidkernels_backend("adaln_zero"))
        mixed = in_frames(self.attn, stream.open(self.norm1, rows[0], rows[1]).unflatten(1, size))
        grid = stream.add(self.drop_path(mixed.reshape(x.shape)), rows[2]).unflatten(1, size)
        mixed = over_time(self.attn_temp, grid if tpe is None else grid + tpe[:, :, None])
        moving = rows[2] if x_mask is None else rows_of(self.scale_shift_table, t, 6)[2]
        stream.add(self.drop_path(mixed.reshape(x.shape)), moving)
        return self._end(stream, y, mask, rows[3:])

    def _reason(
        self, x: Tensor, y: Tensor, t: Tensor, tpe: Tensor | None, x_mask: Any, t0: Any, **rest: Any
    ) -> str | None:
        reason = call_reason(x, y, t, tpe, x_mask, t0)
        reason = reason or self._stream_reason(x, x_mask, (self.norm1, self.norm2), (t0,))
        if reason is None and tpe is not None and tpe.ndim != 3:
            reason = "an unusual input is given"
        return reason


class STDiT2Forward(_Frames):
    """`STDiT2Block.forward`; the sizes of the grid are arguments, or attributes in earlier versions."""

    @guarded
    def forward(
        self,
        x: Tensor,
        y: Tensor,
        t: Tensor,
        t_tmp: Tensor,
        mask: Any = None,
        x_mask: Tensor | None = None,
        t0: Tensor | None = None,
        t0_tmp: Tensor | None = None,
        T: Any = None,
        S: Any = None,
    ) -> Tensor:
        """[B, T * S, D] -> [B, T * S, D]."""
        rows = chosen_rows(self.scale_shift_table, t, x_mask, t0)
        shift, scale, gate = chosen_rows(self.scale_shift_table_temporal, t_tmp, x_mask, t0_tmp)
        size = self._size(T, S)
        stream = Stream(x, rows[2], self._vidkernels_backend("adaln_zero"))
        mixed = in_frames(self.attn, stream.open(self.norm1, rows[0], rows[1]).unflatten(1, size))
        normed = stream.seam(self.drop_path(mixed.reshape(x.shape)), rows[2], self.norm_temp, shift, scale)
        mixed = over_time(self.attn_temp, normed.unflatten(1, size))
        stream.add(self.drop_path(mixed.reshape(x.shape)), gate)
        return self._end(stream, y, mask, rows[3:])

    def _size(self, frames: Any, positions: Any) -> tuple[Any, Any]:
        return (self.d_t, self.d_s) if hasattr(self, "d_t") else (frames, positions)

    def _reason(
        self,
        x: Tensor,
        y: Tensor,
        t: Tensor,
        t_tmp: Tensor,
        x_mask: Any,
        t0: Any,
        t0_tmp: Any,
        T: Any,
        S: Any,
        mask: Any,
    ) -> str | None:
        norms = self.norm1, self.norm_temp, self.norm2
        reason = call_reason(x, y, t, t_tmp, x_mask, t0, t0_tmp)
        reason = reason or self._stream_reason(x, x_mask, norms, (t0, t0_tmp))
        return reason or ("the sizes of the grid are not given" if None in self._size(T, S) else None)


class PixArtForward(_Frames):
    """`PixArtBlock.forward` of Open-Sora."""

    @guarded
    def forward(self, x: Tensor, y: Tensor, t: Tensor, mask: Any = None) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self._serve(x, y, t, mask)

    def _serve(self, x: Tensor, y: Tensor, t: Tensor, mask: Any, **sizes: Any) -> Tensor:
        shift, scale, gate, *rest = rows_of(self.scale_shift_table, t, 6)
        stream = Stream(x, gate, self._vidkernels_backend("adaln_zero"))
        mixed = self.attn(stream.open(self.norm1, shift, scale), **sizes)
        stream.add(self.drop_path(mixed.reshape(x.shape)), gate)
        return self._end(stream, y, mask, tuple(rest))

    def _reason(self, x: Tensor, y: Tensor, t: Tensor, **rest: Any) -> str | None:
        return call_reason(x, y, t) or self._stream_reason(x, None, (self.norm1, self.norm2), ())


class PixArtMSForward(PixArtForward):
    """`PixArtMSBlock.forward` of PixArt-Sigma, whose attention may compress keys and is told the image's size."""

    @guarded
    def forward(self, x: Tensor, y: Tensor, t: Tensor, mask: Any = None, HW: Any = None, **kwargs: Any) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self._serve(x, y, t, mask, HW=HW)


class PlanBlockForward(Fused):
    """Open-Sora-Plan's `BasicTransformerBlock.forward` and `BasicTransformerBlock_.forward`, with adaLN-single: attentions
    take positions, and the second class has no cross-attention and calls its second norm `norm3`."""

    def _serve(
        self, x: Tensor, timestep: Tensor, masks: tuple[Any, Any], caption: Any, positions: dict[str, Any]
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = rows_of(self.scale_shift_table, timestep, 6)
        stream = Stream(x, gate1, self._vidkernels_backend("adaln_zero"))
        normed = stream.open(self.norm1, shift1, scale1)
        branch = self.attn1(normed, encoder_hidden_states=None, attention_mask=masks[0], **positions)
        cross = getattr(self, "attn2", None)
        if cross is None:
            normed = stream.seam(branch, gate1, self._second_norm(), shift2, scale2)
        else:
            stream.add(branch, gate1)
            unplaced: dict[str, Any] = dict.fromkeys(positions)
            branch = cross(stream.x, encoder_hidden_states=caption, attention_mask=masks[1], **unplaced)
            normed = stream.seam(branch, None, self.norm2, shift2, scale2)
        return stream.add(self.ff(normed, scale=1.0), gate2)

    def _second_norm(self) -> Any:
        return self.norm3 if "norm3" in self._modules else self.norm2

    def _reason(
        self, hidden_states: Tensor, timestep: Tensor | None, cross_attention_kwargs: Any, **rest: Any
    ) -> str | None:
        reason = call_reason(hidden_states, timestep) or plan_check(self)
        reason = reason or child_reason(self.norm1, nn.LayerNorm) or child_reason(self._second_norm(), nn.LayerNorm)
        # Of a single token upstream's attention loses the axis.
        plain = hidden_states.ndim == 3 and hidden_states.shape[1] > 1 and timestep is not None
        if reason is None and (cross_attention_kwargs or not plain):
            reason = "cross_attention_kwargs or an unusual input is given"
        return reason


class PlanSpatialForward(PlanBlockForward):
    """`BasicTransformerBlock.forward`."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        position_q: Any = None,
        position_k: Any = None,
        hw: Any = None,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        positions = {"position_q": position_q, "position_k": position_k, "last_shape": hw}
        masks = attention_mask, encoder_attention_mask
        return self._serve(hidden_states, timestep, masks, encoder_hidden_states, positions)


class PlanTemporalForward(PlanBlockForward):
    """`BasicTransformerBlock_.forward`."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        position_q: Any = None,
        position_k: Any = None,
        frame: Any = None,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        positions = {"position_q": position_q, "position_k": position_k, "last_shape": frame}
        return self._serve(hidden_states, timestep, (attention_mask, None), None, positions)


def plan_check(block: Any) -> str | None:
    """An option of a block of Open-Sora-Plan that is not served."""
    if not block.use_ada_layer_norm_single:
        return "its norm_type is not ada_norm_single"
    if block.pos_embed is not None or block.only_cross_attention:
        return "the block has positional embeddings or cross attention only"
    return None if block._chunk_size is None else "its feed-forward is chunked"


def _like(module: Any, *shape: int) -> Tensor:
    table = module.scale_shift_table
    return torch.randn(*shape, dtype=table.dtype, device=table.device)


def _stdit_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two clips with captions of five tokens, packed."""
    width = block.scale_shift_table.shape[1]
    frames, positions = (block.d_t, block.d_s) if getattr(block, "d_t", None) else (2, 3)
    rows = [_like(block, 2, 6 * width)]
    sizes: dict[str, Any] = {}
    if hasattr(block, "scale_shift_table_temporal"):
        rows.append(_like(block, 2, 3 * width))
        sizes = {} if hasattr(block, "d_t") else {"T": frames, "S": positions}
    return (_like(block, 2, frames * positions, width), _like(block, 1, 10, width), *rows), {"mask": [5, 5], **sizes}


def _pixart_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    width = block.scale_shift_table.shape[1]
    inputs = _like(block, 2, 6, width), _like(block, 1, 10, width), _like(block, 2, 6 * width)
    return inputs, {"mask": [5, 5], **({"HW": (2, 3)} if type(block).__name__ == "PixArtMSBlock" else {})}


def _plan_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    width = block.scale_shift_table.shape[1]
    caption = {} if getattr(block, "attn2", None) is None else {"encoder_hidden_states": _like(block, 2, 5, width)}
    return (_like(block, 2, 9, width),), {"timestep": _like(block, 2, 6 * width), **caption}


_T2I = {"t2i_modulate": ("67501f53d3b96f3a",)}
_IMAGE = ("scale_shift_table", "norm1", "norm2", "attn", "cross_attn", "mlp", "drop_path")
_PARTS = (*_IMAGE, "attn_temp")
_PLAN = "opensora.models.diffusion.latte.modules"

RULES = (
    Rule(
        name="official.stdit_block",
        ops=("adaln_zero",),
        targets=("opensora.models.stdit.stdit:STDiTBlock",),
        features=(*_PARTS, "d_t", "d_s"),
        mixin=STDiTForward,
        digests=_T2I | {"STDiTBlock.forward": ("d9f1fc8ffad6774e",), "STDiTBlock.t_mask_select": ("c5e0fa605bca70a4",)},
        sample=_stdit_sample,
        tested_versions=("hpcaitech/Open-Sora 04ddc76", "hpcaitech/Open-Sora 7d344ff"),
    ),
    Rule(
        name="official.stdit2_block",
        ops=("adaln_zero",),
        targets=("opensora.models.stdit.stdit2:STDiT2Block",),
        features=(*_PARTS, "norm_temp", "scale_shift_table_temporal"),
        mixin=STDiT2Forward,
        digests=_T2I
        | {
            "STDiT2Block.forward": ("e6e74e79ccf324dc", "5efc60a6860d3298"),
            "STDiT2Block.t_mask_select": ("cdeb69fa6f5561f8", "24cf33f6c93e0ed5"),
        },
        sample=_stdit_sample,
        tested_versions=("hpcaitech/Open-Sora 01728dc", "hpcaitech/Open-Sora 23f6a1e"),
    ),
    Rule(
        name="official.pixart_block",
        ops=("adaln_zero",),
        targets=("opensora.models.pixart.pixart:PixArtBlock",),
        features=_IMAGE,
        mixin=PixArtForward,
        digests=_T2I | {"PixArtBlock.forward": ("440b2589d503f0ff",)},
        sample=_pixart_sample,
        tested_versions=("hpcaitech/Open-Sora 2a99b5f",),
    ),
    Rule(
        name="official.pixart_ms_block",
        ops=("adaln_zero",),
        targets=("diffusion.model.nets.PixArtMS:PixArtMSBlock",),
        features=_IMAGE,
        mixin=PixArtMSForward,
        digests=_T2I | {"PixArtMSBlock.forward": ("a5c2a7c51ec580fc",)},
        sample=_pixart_sample,
        tested_versions=("PixArt-Sigma",),
    ),
    Rule(
        name="official.plan_block",
        ops=("adaln_zero",),
        targets=(f"{_PLAN}:BasicTransformerBlock",),
        features=("use_ada_layer_norm_single", "norm1", "attn1", "ff"),
        mixin=PlanSpatialForward,
        digests={"BasicTransformerBlock.forward": ("d63a9906eba623ce",)},
        check=plan_check,
        sample=_plan_sample,
        tested_versions=("PKU-YuanGroup/Open-Sora-Plan de3f7d8",),
    ),
    Rule(
        name="official.plan_temporal_block",
        ops=("adaln_zero",),
        targets=(f"{_PLAN}:BasicTransformerBlock_",),
        features=("use_ada_layer_norm_single", "norm1", "norm3", "attn1", "ff"),
        mixin=PlanTemporalForward,
        digests={"BasicTransformerBlock_.forward": ("8cb31752af159271",)},
        check=plan_check,
        sample=_plan_sample,
        tested_versions=("PKU-YuanGroup/Open-Sora-Plan de3f7d8",),
    ),
)
