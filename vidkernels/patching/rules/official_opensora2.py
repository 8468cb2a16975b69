# SPDX-License-Identifier: Apache-2.0
"""Rules for Open-Sora 2.0's transformer (`mmdit`), Flux's for clips, and copies of it, found by the digests of its file.

A block's forward is its processor's: another processor than the file's own runs the original.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._modulation import project
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _adaln_zero_units as adaln
from vidkernels.patching.rules import _dit_units as dit
from vidkernels.patching.rules import _opensora2_units as units
from vidkernels.patching.rules import _qk_norm_units as qk
from vidkernels.patching.rules.official_dit import FinalForward

_SILU = nn.SiLU()


class _Block(Fused):
    """What both kinds of blocks share."""

    def _backends(self) -> tuple[str, str]:
        return self._vidkernels_backend("adaln_zero"), self._vidkernels_backend("qk_norm_rope")

    def _common_reason(self, vec: Tensor, pe: Any, *streams: Tensor) -> str | None:
        tables = (pe,) if isinstance(pe, Tensor) else tuple(pe)
        reason = call_reason(vec, *streams, *tables)
        if reason is None and (vec.ndim != 2 or any(x.ndim != 3 for x in streams)):
            reason = "an unusual input is given"
        return reason or units.file_reason(self._vidkernels_home)

    def _processor_reason(self, known: type) -> str | None:
        """Digests pin what the file's own processors do."""
        found = type(self.processor)
        return None if found is known else f"it uses {found.__name__}"

    def _modulation_reason(self, *modulations: Any) -> str | None:
        for modulation in modulations:
            reason = child_reason(modulation, self._vidkernels_home.Modulation)
            if reason is not None:
                return reason
        return None

    def _norms_reason(self, *norms: Any) -> str | None:
        for norm in norms:
            reason = child_reason(norm, nn.LayerNorm)
            if reason is not None:
                return reason
        return None


class DoubleBlockForward(_Block):
    """`DoubleStreamBlock.forward`: an image and a text stream, one attention over both."""

    @guarded
    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Image [B, N, D], text [B, M, D], condition [B, D] -> (image, text)."""
        parts, (chain, turning) = dict(self._modules), self._backends()
        rows, text_rows = _rows(parts["img_mod"], vec), _rows(parts["txt_mod"], vec)
        image, text = adaln.Stream(img, rows[2], chain), adaln.Stream(txt, text_rows[2], chain)
        normed = image.open(parts["img_norm1"], rows[0], rows[1])
        text_normed = text.open(parts["txt_norm1"], text_rows[0], text_rows[1])
        branch, text_branch = units.attend_joined(self, text_normed, normed, pe, turning)
        normed = image.seam(branch, rows[2], parts["img_norm2"], rows[3], rows[4])
        image.add(units.feed_forward(parts["img_mlp"], normed), rows[5])
        normed = text.seam(text_branch, text_rows[2], parts["txt_norm2"], text_rows[3], text_rows[4])
        return image.x, text.add(units.feed_forward(parts["txt_mlp"], normed), text_rows[5])

    def _reason(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Any, **rest: Any) -> str | None:
        home, parts = self._vidkernels_home, self._modules
        reason = self._common_reason(vec, pe, img, txt) or self._processor_reason(home.DoubleStreamBlockProcessor)
        reason = reason or self._modulation_reason(parts["img_mod"], parts["txt_mod"])
        reason = reason or self._norms_reason(*(parts[f"{kind}_norm{i}"] for kind in ("img", "txt") for i in (1, 2)))
        for attention in (parts["img_attn"], parts["txt_attn"]):
            reason = reason or child_reason(attention, home.SelfAttention) or units.norms_reason(attention, home)
        return reason


class SingleBlockForward(_Block):
    """`SingleStreamBlock.forward`: text and image in one stream, attention beside the MLP."""

    @guarded
    def forward(self, x: Tensor, vec: Tensor, pe: Any, **kwargs: Any) -> Tensor:
        """[B, N, D], condition [B, D] -> [B, N, D]."""
        parts, (chain, turning) = dict(self._modules), self._backends()
        shift, scale, gate = _rows(parts["modulation"], vec)
        stream = adaln.Stream(x, gate, chain)
        normed = stream.open(parts["pre_norm"], shift, scale)
        return stream.add(units.attend_beside(self, normed, pe, turning), gate)

    def _reason(self, x: Tensor, vec: Tensor, pe: Any, **rest: Any) -> str | None:
        home, parts = self._vidkernels_home, self._modules
        reason = self._common_reason(vec, pe, x) or self._processor_reason(home.SingleStreamBlockProcessor)
        reason = reason or self._modulation_reason(parts["modulation"]) or self._norms_reason(parts["pre_norm"])
        return reason or units.norms_reason(self, home)


def _rows(modulation: Any, vec: Tensor) -> tuple[Tensor, ...]:
    """Rows of modulation [B, D]: shift, scale and gate, once or twice."""
    return project(modulation.lin, _SILU, vec).chunk(modulation.multiplier, dim=1)


class LastForward(FinalForward):
    """`LastLayer.forward`."""

    @guarded
    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """[B, N, D] and [B, D] -> [B, N, patches * channels]."""
        return self._serve(x, vec)

    def _reason(self, x: Tensor, vec: Tensor) -> str | None:
        return super()._reason(x, vec)


class PositionsForward(Fused):
    """`EmbedND.forward`: the same table, of which the positions that it was made from are remembered."""

    def forward(self, ids: Tensor) -> Tensor:
        """[B, N, axes] -> [B, 1, N, D / 2, 2, 2]."""
        table: Tensor = super().forward(ids)
        if _is_placed(ids):
            units.remember(table, _copied(ids), _rotation(self, "interleaved"))
        return table


class LigerPositionsForward(Fused):
    """`LigerEmbedND.forward`: the same tables, which remember the positions that they were made from."""

    def forward(self, ids: Tensor) -> Any:
        """[B, N, axes] -> (cos, sin) [B, N, D]."""
        tables = super().forward(ids)
        return qk.rotary(tables, _copied(ids), **_rotation(self, "half")) if _is_placed(ids) else tables


def _is_placed(ids: Tensor) -> bool:
    return call_reason(ids) is None and ids.ndim == 3 and ids.shape[-1] <= 3 and not ids.requires_grad


def _copied(ids: Tensor) -> Tensor:
    """Positions that stay what they are when the caller writes to his own."""
    return ids.to(torch.float32, copy=True)


def _rotation(module: Any, layout: str) -> dict[str, Any]:
    return {"axes": tuple(module.axes_dim), "theta": float(module.theta), "layout": layout}


def _like(module: nn.Module, *shape: int) -> Tensor:
    weight = next(module.parameters())
    return torch.randn(shape, dtype=weight.dtype, device=weight.device)


def _tables(block: Any, tokens: int, device: torch.device) -> Tensor:
    """A table of one axis for `tokens` tokens."""
    cos, sin = dit.sample_tables(tokens, block.head_dim, device)
    cos, sin = cos[:, ::2], sin[:, ::2]
    return torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))[None, None]


def _double_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    width = block.hidden_size
    x, text, vec = (_like(block, *shape, width) for shape in ((2, 9), (2, 5), (2,)))
    return (x, text, vec, _tables(block, 14, x.device)), {}


def _single_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, vec = _like(block, 2, 9, block.hidden_size), _like(block, 2, block.hidden_size)
    return (x, vec, _tables(block, 9, x.device)), {}


def _last_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    width = module.linear.in_features
    return (_like(module, 2, 9, width), _like(module, 2, width)), {}


def _positions_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.arange(5.0 * len(module.axes_dim)).reshape(1, 5, -1),), {}


def _double_projections(block: Any) -> list[nn.Module]:
    return [block.img_mod.lin, block.txt_mod.lin]


def _single_projections(block: Any) -> list[nn.Module]:
    return [block.modulation.lin]


def _last_projections(module: Any) -> list[nn.Module]:
    return [module.adaLN_modulation[1]]


_FILE = "opensora.models.mmdit.layers"
_TESTED = ("hpcaitech/Open-Sora 2.0 (febf3ad)",)
_BLOCK = {
    "Modulation.forward": ("c59b4ad1b3c12747",),
    "QKNorm.forward": ("3024d7b127a22d4a",),
    "FusedRMSNorm.forward": ("601e36900be2fac8",),
}


def _block_rule(name: str, cls: str, mixin: type, forward: str, processor: str, **more: Any) -> Rule:
    digests = {f"{cls}.forward": (forward,), f"{cls}Processor.__call__": (processor,), **_BLOCK}
    return Rule(
        name=f"opensora2.{name}",
        ops=("adaln_zero", "qk_norm_rope"),
        targets=(f"{_FILE}:{cls}",),
        mixin=mixin,
        digests=digests,
        check=units.file_check,
        widen=units.widen,
        tested_versions=_TESTED,
        **more,
    )


def _positions_rule(name: str, cls: str, mixin: type, digest: str) -> Rule:
    return Rule(
        name=f"opensora2.{name}",
        ops=("qk_norm_rope",),
        targets=(f"{_FILE}:{cls}",),
        mixin=mixin,
        digests={f"{cls}.forward": (digest,)},
        features=("axes_dim", "theta"),
        check=units.tables_check,
        sample=_positions_sample,
        tested_versions=_TESTED,
    )


RULES = (
    _block_rule(
        *("double_block", "DoubleStreamBlock", DoubleBlockForward, "70621d473d9b7e3f", "80c83d72d3ff08a5"),
        features=("processor", "img_mod.lin", "txt_mod.lin", "img_attn.norm", "txt_attn.norm"),
        reads=tuple(f"{kind}_attn.norm.{which}_norm" for kind in ("img", "txt") for which in ("query", "key")),
        sample=_double_sample,
        projections=_double_projections,
    ),
    _block_rule(
        *("single_block", "SingleStreamBlock", SingleBlockForward, "4b9892c724937ca9", "a5934aa839195082"),
        features=("processor", "modulation.lin", "pre_norm", "norm", "mlp_act"),
        reads=("norm.query_norm", "norm.key_norm"),
        sample=_single_sample,
        projections=_single_projections,
    ),
    Rule(
        name="opensora2.last",
        ops=("adaln_zero",),
        targets=(f"{_FILE}:LastLayer",),
        mixin=LastForward,
        digests={"LastLayer.forward": ("d0fd1e588b1b44d3",)},
        features=("adaLN_modulation", "norm_final", "linear"),
        sample=_last_sample,
        projections=_last_projections,
        inductor="one norm with its modulation is one kernel of Inductor, too",
        tested_versions=_TESTED,
    ),
    _positions_rule("positions", "EmbedND", PositionsForward, "94ff66222d1372f3"),
    _positions_rule("liger_positions", "LigerEmbedND", LigerPositionsForward, "1aed9a3bf04212ef"),
)
