# SPDX-License-Identifier: Apache-2.0
"""Rules for the blocks of the official DiT, Latte and Open-Sora 1.2 code, and of the many copies of them.

Those repositories are no packages: their files are copied, so the digests of the methods decide, wherever a class lives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._modulation import project
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _adaln_zero_units as units
from vidkernels.patching.rules.official_attention import in_frames, over_time


def _modulation(layers: Any, c: Tensor) -> Tensor:
    """The block's SiLU and linear layer, called by their container unless both are plain."""
    if child_reason(layers, nn.Sequential) is not None or len(layers) != 2 or type(layers[0]) is not nn.SiLU:
        called: Tensor = layers(c)
        return called
    return project(layers[1], layers[0], c)


class BlockForward(Fused):
    """`DiTBlock.forward`, which is Latte's `TransformerBlock.forward`, too."""

    @guarded
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """[B, N, D] and [B, D] -> [B, N, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(self.adaLN_modulation, c).chunk(6, dim=1)
        stream = units.Stream(x, gate1, self._vidkernels_backend("adaln_zero"))
        branch = self.attn(stream.open(self.norm1, shift1, scale1))
        return stream.add(self.mlp(stream.seam(branch, gate1, self.norm2, shift2, scale2)), gate2)

    def _reason(self, x: Tensor, c: Tensor) -> str | None:
        reason = call_reason(x, c) or child_reason(self.norm1, nn.LayerNorm) or child_reason(self.norm2, nn.LayerNorm)
        if reason is None and (x.ndim != 3 or c.ndim != 2):
            reason = "an unusual input is given"
        return reason


class FinalForward(Fused):
    """`FinalLayer.forward` of DiT and Latte: norm and modulation in one pass."""

    @guarded
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """[B, N, D] and [B, D] -> [B, N, patches * channels]."""
        return self._serve(x, c)

    def _serve(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = _modulation(self.adaLN_modulation, c).chunk(2, dim=1)
        stream = units.Stream(x, scale, self._vidkernels_backend("adaln_zero"))
        result: Tensor = self.linear(stream.open(self.norm_final, shift, scale))
        return result

    def _reason(self, x: Tensor, c: Tensor) -> str | None:
        reason = call_reason(x, c) or child_reason(self.norm_final, nn.LayerNorm)
        if reason is None and (x.ndim != 3 or c.ndim != 2):
            reason = "an unusual input is given"
        return reason


def chosen_rows(table: Tensor, t: Tensor, x_mask: Tensor | None, t0: Tensor | None) -> tuple[Tensor, ...]:
    """Rows of modulation [B, D]; or [B, T, D] where frames that are held clean take those of `t0`."""
    count = table.shape[0]
    rows = table[None] + t.reshape(t.shape[0], count, -1)
    if x_mask is None or t0 is None:
        return rows.unbind(1)
    clean = table[None] + t0.reshape(t0.shape[0], count, -1)
    return torch.where(x_mask[:, :, None, None], rows[:, None], clean[:, None]).unbind(2)


class STDiT3Forward(Fused):
    """`STDiT3Block.forward`: frames that are held clean take the other rows, chosen before one modulation instead of
    between two."""

    @guarded
    def forward(
        self,
        x: Tensor,
        y: Tensor,
        t: Tensor,
        mask: Any = None,
        x_mask: Tensor | None = None,
        t0: Tensor | None = None,
        T: Any = None,
        S: Any = None,
    ) -> Tensor:
        """[B, T * S, D] -> [B, T * S, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = chosen_rows(self.scale_shift_table, t, x_mask, t0)
        stream = units.Stream(x, gate1, self._vidkernels_backend("adaln_zero"))
        frames = stream.open(self.norm1, shift1, scale1).unflatten(1, (T, S))
        mixed = (over_time if self.temporal else in_frames)(self.attn, frames)
        stream.add(self.drop_path(mixed.reshape(x.shape)), gate1)
        branch = self.cross_attn(stream.x, y, mask)
        normed = stream.seam(branch, None, self.norm2, shift2, scale2)
        return stream.add(self.drop_path(self.mlp(normed)), gate2)

    def _reason(self, x: Tensor, y: Tensor, t: Tensor, x_mask: Any, t0: Any, T: Any, S: Any, **rest: Any) -> str | None:
        reason = call_reason(x, y, t, x_mask, t0) or child_reason(self.norm1, nn.LayerNorm)
        reason = reason or child_reason(self.norm2, nn.LayerNorm)
        if reason is None and (x.ndim != 3 or T is None or S is None or (x_mask is None) != (t0 is None)):
            reason = "an unusual input is given"
        return reason


class STDiT3FinalForward(Fused):
    """`T2IFinalLayer.forward`. Clean frames are normalised twice there, which the original is left to do."""

    @guarded
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        x_mask: Tensor | None = None,
        t0: Tensor | None = None,
        T: int | None = None,
        S: int | None = None,
    ) -> Tensor:
        """[B, N, D] and [B, D] -> [B, N, patches * channels]."""
        shift, scale = (self.scale_shift_table[None] + t[:, None]).unbind(1)
        stream = units.Stream(x, scale, self._vidkernels_backend("adaln_zero"))
        result: Tensor = self.linear(stream.open(self.norm_final, shift, scale))
        return result

    def _reason(self, x: Tensor, t: Tensor, x_mask: Tensor | None, **rest: Any) -> str | None:
        reason = call_reason(x, t) or child_reason(self.norm_final, nn.LayerNorm)
        if reason is None and (x.ndim != 3 or t.ndim != 2):
            reason = "an unusual input is given"
        if reason is None and x_mask is not None:
            reason = "frames are held clean"
        return reason


def _like(weight: Tensor, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=weight.dtype, device=weight.device)


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = module.adaLN_modulation[1].weight
    return (_like(weight, 2, 9, weight.shape[1]), _like(weight, 2, weight.shape[1])), {}


def _stdit3_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two clips of two frames with captions of five tokens, packed."""
    table = block.scale_shift_table
    width = table.shape[1]
    inputs = (_like(table, 2, 6, width), _like(table, 1, 10, width), _like(table, 2, 6 * width))
    return inputs, {"mask": [5, 5], "T": 2, "S": 3}


def _stdit3_final_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    table = module.scale_shift_table
    return (_like(table, 2, 9, table.shape[1]), _like(table, 2, table.shape[1])), {}


def _projections(module: Any) -> list[nn.Module]:
    return [module.adaLN_modulation[1]]


_SHORT = "one norm with its modulation is one kernel of Inductor, too"
_MODULATE = {"modulate": ("7315fdb1e16d11cb",)}
_T2I = {"t2i_modulate": ("67501f53d3b96f3a",)}
_BLOCK = ("c2a0132b128981ea",)

RULES = (
    Rule(
        name="official.dit_block",
        ops=("adaln_zero",),
        targets=("models:DiTBlock",),
        projections=_projections,
        features=("adaLN_modulation", "norm1", "norm2", "attn", "mlp"),
        mixin=BlockForward,
        digests=_MODULATE | {"DiTBlock.forward": _BLOCK},
        sample=_sample,
        tested_versions=("facebookresearch/DiT 00d70ac",),
    ),
    Rule(
        name="official.latte_block",
        ops=("adaln_zero",),
        targets=("models.latte:TransformerBlock",),
        features=("adaLN_modulation", "norm1", "norm2", "attn", "mlp"),
        mixin=BlockForward,
        digests=_MODULATE | {"TransformerBlock.forward": _BLOCK},
        sample=_sample,
        tested_versions=("Vchitect/Latte 5e6a6b1",),
    ),
    Rule(
        name="official.dit_final",
        ops=("adaln_zero",),
        targets=("models:FinalLayer",),
        projections=_projections,
        inductor=_SHORT,
        features=("adaLN_modulation", "norm_final", "linear"),
        mixin=FinalForward,
        digests=_MODULATE | {"FinalLayer.forward": ("e0b73ccd69396507",)},
        sample=_sample,
        tested_versions=("facebookresearch/DiT 00d70ac", "Vchitect/Latte 5e6a6b1"),
    ),
    Rule(
        name="official.stdit3_block",
        ops=("adaln_zero",),
        targets=("opensora.models.stdit.stdit3:STDiT3Block",),
        features=("scale_shift_table", "norm1", "norm2", "attn", "cross_attn", "mlp", "drop_path", "temporal"),
        mixin=STDiT3Forward,
        digests=_T2I
        | {"STDiT3Block.forward": ("aca305ad4fa9f677",), "STDiT3Block.t_mask_select": ("24cf33f6c93e0ed5",)},
        sample=_stdit3_sample,
        tested_versions=("hpcaitech/Open-Sora 3552145",),
    ),
    Rule(
        name="official.stdit3_final",
        ops=("adaln_zero",),
        targets=("opensora.models.layers.blocks:T2IFinalLayer",),
        inductor=_SHORT,
        features=("scale_shift_table", "norm_final", "linear"),
        mixin=STDiT3FinalForward,
        digests=_T2I | {"T2IFinalLayer.forward": ("65552480277f7fec",)},
        sample=_stdit3_final_sample,
        tested_versions=("hpcaitech/Open-Sora 06ffc8e",),
    ),
)
