# SPDX-License-Identifier: Apache-2.0
"""Rules for the official transformers of Wan 2.1 and 2.2 (`model.py`) and copies of them, by digest.

Modulation is float32, so the stream is float32 from the first gate on; in 2.2 every token has its own rows.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import call_reason, child_reason, guarded, parameter_of
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _adaln_zero_units as adaln
from vidkernels.patching.rules import _official_wan_attention as attention

Sample = tuple[tuple[Any, ...], dict[str, Any]]


class BlockForward(Fused):
    """`WanAttentionBlock.forward`: gate, residual, norm and modulation between two branches in one pass."""

    @guarded
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
        """[B, N, C], modulation [B, 6, C] or [B, N, 6, C], context [B, M, C] -> [B, N, C]."""
        parts: dict[str, Any] = dict(self._modules)
        shift1, scale1, gate1, shift2, scale2, gate2 = _rows(self.modulation, e)
        stream = adaln.Stream(x, gate1, self._vidkernels_backend("adaln_zero"))
        branch = parts["self_attn"](stream.open(parts["norm1"], shift1, scale1), seq_lens, grid_sizes, freqs)
        norm3 = parts["norm3"]
        if isinstance(norm3, nn.LayerNorm):
            normed = stream.seam(branch, gate1, norm3, None, None)
        else:
            normed = stream.add(branch, gate1)
        branch = parts["cross_attn"](normed, context, context_lens)
        branch = parts["ffn"](stream.seam(branch, None, parts["norm2"], shift2, scale2))
        return stream.add(branch, gate2)

    def _reason(self, x: Tensor, e: Tensor, context: Tensor, **rest: Any) -> str | None:
        norm, parts = self._vidkernels_home.WanLayerNorm, self._modules
        reason = call_reason(x, e, context) or child_reason(parts["norm1"], norm) or child_reason(parts["norm2"], norm)
        reason = reason or child_reason(parts["norm3"], norm, nn.Identity)
        return reason or _rows_reason(e)


class HeadForward(Fused):
    """`Head.forward`: norm and modulation in one pass, the projection without autocast on a GPU, as there."""

    @guarded
    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """[B, N, C], embedding of the timestep [B, C] or [B, N, C] -> [B, N, values of a patch]."""
        shift, scale = _rows(self.modulation, e.unsqueeze(-2))
        stream = adaln.Stream(x, shift, self._vidkernels_backend("adaln_modulate"))
        with torch.autocast("cuda", enabled=False):
            result: Tensor = self.head(stream.open(self.norm, shift, scale))
        return result

    def _reason(self, x: Tensor, e: Tensor) -> str | None:
        return call_reason(x, e) or child_reason(self.norm, self._vidkernels_home.WanLayerNorm) or _rows_reason(e)


class NormForward(Fused):
    """`WanRMSNorm.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> the same in the wider dtype of x and weight, in which it is computed and rounded once."""
        wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        backend = self._vidkernels_backend("adaln_modulate")
        result: Tensor = ops.adaln_modulate(
            wide.reshape(-1, 1, x.shape[-1]) if x.ndim != 3 else wide,
            None,
            None,
            norm="rms",
            weight=parameter_of(self, "weight"),
            eps=self.eps,
            backend=backend,
        )
        return result.reshape(x.shape)

    def _reason(self, x: Tensor) -> str | None:
        return call_reason(x) or (None if x.dtype.is_floating_point else f"its input has dtype {x.dtype}")


def _rows(table: Tensor, e: Tensor) -> tuple[Tensor, ...]:
    """Rows of modulation, [B, C] or [B, N, C], of e [B, rows, C] or [B, N, rows, C]."""
    return (table + e).unbind(-2)


def _rows_reason(e: Tensor) -> str | None:
    return None if e.dtype == torch.float32 else f"modulation is {e.dtype}, which the original refuses"


class _ExactNorm(nn.Module):
    """`WanRMSNorm` without its detour through float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)  # type: ignore[arg-type]


class _ExactAttention(nn.Module):
    """`WanSelfAttention` without a detour through float32, for clips of one size."""

    home: Any

    def forward(self, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Any:
        own: Any = self
        grid, width = tuple(grid_sizes[0].tolist()), own.head_dim
        places = attention.clip_positions((grid,), x.shape[1], x.device).long().unbind(1)
        axes = [dims // 2 for dims in attention.axes_of(width)]
        tables = zip(freqs.split(axes, 1), places, strict=True)
        turns = torch.cat([table[place] for table, place in tables], 1)[:, None]
        q, k, v = own.norm_q(own.q(x)), own.norm_k(own.k(x)), own.v(x)
        pairs = [torch.view_as_complex(t.unflatten(2, (own.num_heads, -1, 2))) * turns for t in (q, k)]
        q, k = (torch.view_as_real(pair).flatten(3) for pair in pairs)
        home = sys.modules[own._home]
        mixed = home.flash_attention(
            q=q, k=k, v=v.unflatten(2, (own.num_heads, -1)), k_lens=seq_lens, window_size=own.window_size
        )
        return own.o(mixed.flatten(2))


class _ExactBlock(nn.Module):
    """`WanAttentionBlock` on float64."""

    def forward(self, x: Tensor, e: Tensor, *call: Any) -> Any:
        own: Any = self
        per_token = own.modulation + (e if e.ndim == 4 else e[:, None])
        shift1, scale1, gate1, shift2, scale2, gate2 = per_token.unbind(2)
        *sizes, context, lens = call
        x = x + gate1 * own.self_attn(own.norm1(x) * (1 + scale1) + shift1, *sizes)
        x = x + own.cross_attn(own.norm3(x), context, lens)
        return x + gate2 * own.ffn(own.norm2(x) * (1 + scale2) + shift2)


class _ExactHead(nn.Module):
    """`Head` on float64."""

    def forward(self, x: Tensor, e: Tensor) -> Any:
        own: Any = self
        shift, scale = (own.modulation + (e if e.ndim == 3 else e[:, None]).unsqueeze(2)).unbind(2)
        return own.head(own.norm(x) * (1 + scale) + shift)


_EXACT: dict[str, type[nn.Module]] = {
    "WanAttentionBlock": _ExactBlock,
    "WanSelfAttention": _ExactAttention,
    "WanLayerNorm": nn.LayerNorm,
    "WanRMSNorm": _ExactNorm,
    "Head": _ExactHead,
}


def _widen(module: nn.Module) -> nn.Module:
    """A copy on float64, which the originals refuse or round to float32."""
    double = module.double()
    for child in list(double.modules()):
        exact = _EXACT.get(type(child).__name__)
        if exact is not None:
            child.__dict__["_home"] = type(child).__module__
            child.__class__ = exact
    return double


def _like(module: nn.Module, *shape: int) -> Tensor:
    weight = next(module.parameters())
    return torch.randn(shape, dtype=weight.dtype, device=weight.device)


def _clip_of(module: Any) -> tuple[Any, ...]:
    """Lengths, sizes and table of angles for clips of 1 x 2 x 3 tokens."""
    weight = module.q.weight
    angles = [
        torch.arange(8, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, dims, 2) / max(dims, 1))
        for dims in attention.axes_of(module.head_dim)
    ]
    table = torch.cat(angles, 1)
    return (
        torch.tensor([6, 6], device=weight.device),
        torch.tensor([[1, 2, 3]] * 2),
        torch.polar(torch.ones_like(table), table).to(weight.device),
    )


def _attention_sample(module: Any) -> Sample:
    return (_like(module, 2, 6, module.dim), *_clip_of(module)), {}


def _cross_sample(module: Any) -> Sample:
    return (_like(module, 2, 6, module.dim), _like(module, 2, _context_length(module), module.dim), None), {}


def _context_length(module: Any) -> int:
    return 512 + 3 if hasattr(module, "k_img") else 5


def _modulation(module: Any, tokens: tuple[int, ...], rows: tuple[int, ...]) -> Tensor:
    return torch.randn(2, *tokens, *rows, module.dim, device=module.modulation.device)


def _per_token(module: nn.Module) -> tuple[int, ...]:
    """2.2 has rows for each of the six tokens; its file has another cross-attention."""
    return (6,) if hasattr(sys.modules[type(module).__module__], "WanCrossAttention") else ()


def _block_sample(module: Any) -> Sample:
    x, e = _like(module.ffn, 2, 6, module.dim), _modulation(module, _per_token(module), (6,))
    context = _like(module.ffn, 2, _context_length(module.cross_attn), module.dim)
    return (x, e, *_clip_of(module.self_attn), context, None), {}


def _head_sample(module: Any) -> Sample:
    return (_like(module.head, 2, 6, module.dim), _modulation(module, _per_token(module), ())), {}


def _norm_sample(module: Any) -> Sample:
    return (_like(module, 2, 5, module.weight.numel()),), {}


def _qk_check(module: Any) -> str | None:
    return None if module.qk_norm else "it has no norms of queries and keys"


_PATH = "wan.modules.model"
_TESTED = ("Wan2.1 model.py", "Wan2.2 model.py")
_LAYER_NORM = {"WanLayerNorm.forward": ("6c83557b0cc12256",)}
_RMS_NORM = {"WanRMSNorm.forward": ("4939448b4bbaeb91",), "WanRMSNorm._norm": ("6b7e3077e31b454f",)}


def _rule(
    part: str, name: str, mixin: type, op: str, features: str, digests: Mapping[str, tuple[str, ...]], sample: Any
) -> Rule:
    return Rule(
        name=f"wan.{part}",
        ops=(op,),
        targets=(f"{_PATH}:{name}",),
        mixin=mixin,
        digests=digests,
        features=tuple(features.split()),
        check=_qk_check if op == "qk_norm_rope" else None,
        widen=_widen,
        sample=sample,
        tested_versions=_TESTED,
    )


def _cross(part: str, name: str, mixin: type, features: str, *digests: str) -> Rule:
    known = _RMS_NORM | {f"{name}.forward": digests}
    return _rule(part, name, mixin, "qk_norm_rope", f"norm_q norm_k {features}", known, _cross_sample)


_TEXT = "348f0bcb96ea4d3f"
RULES = (
    _rule(
        *("block", "WanAttentionBlock", BlockForward, "adaln_zero", "self_attn cross_attn ffn modulation norm3"),
        _LAYER_NORM | {"WanAttentionBlock.forward": ("1b73b5a62d5a2dc9", "efaec46133f7a32e")},
        _block_sample,
    ),
    # Before the self-attention, of which they are subclasses.
    _cross("text_attention", "WanT2VCrossAttention", attention.CrossAttentionForward, "v", _TEXT),
    _cross("context_attention", "WanCrossAttention", attention.CrossAttentionForward, "v", _TEXT),
    _cross(
        *("image_attention", "WanI2VCrossAttention", attention.ImageCrossAttentionForward, "k_img"),
        *("ba3aab2e5da1809a", "006608403c3188ed"),  # the second counts 257 tokens of the image
    ),
    _rule(
        *("attention", "WanSelfAttention", attention.SelfAttentionForward, "qk_norm_rope", "norm_q norm_k window_size"),
        _RMS_NORM | {"WanSelfAttention.forward": ("31f6f155a8b4a45d",), "rope_apply": ("c4a46350b0f83c0e",)},
        _attention_sample,
    ),
    _rule(
        *("head", "Head", HeadForward, "adaln_modulate", "head norm modulation patch_size"),
        _LAYER_NORM | {"Head.forward": ("78ec2065e358ab68", "1b73c520a4b51495")},
        _head_sample,
    ),
    _rule("rms_norm", "WanRMSNorm", NormForward, "adaln_modulate", "weight eps", _RMS_NORM, _norm_sample),
)
