# SPDX-License-Identifier: Apache-2.0
"""Attentions and MLPs of Open-Sora 2.0's blocks: norms and rotation of queries and keys in one launch, where it is known which
positions a table stands for; the attention is whatever stands under the name `flash_attn_func` in its file.

Without gradients nothing is copied that need not be: queries and keys are overwritten where they were projected, and the second
layer of a single block reads the attention's output and the MLP's hidden channels where the first one left its values.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from vidkernels import ops
from vidkernels._tracing import constant_while_tracing
from vidkernels.patching._guard import child_reason, is_readable
from vidkernels.patching._match import digest
from vidkernels.patching._values import state
from vidkernels.patching.rules import _dit_units as dit
from vidkernels.patching.rules import _qk_norm_units as qk

_EPS = 1e-6  # of `FusedRMSNorm`, written in its forward
# Digests of the file of functions beside the blocks'.
ATTENTION, TURN, ANGLES = {"37a79f4b14f47f74"}, {"86fdfa10ae0a4ef9"}, {"56fb59dc9f55a641", "a94d1c8c09df9c6d"}
# Table -> (its state, positions [B, N, axes], options of the rotation).
_POSITIONS = WeakTensorKeyDictionary()


def remember(table: Tensor, positions: Tensor, rotation: dict[str, Any]) -> None:
    """Keep what a table of matrices stands for, as long as it lives. Graphs take tables as they are."""
    if not torch.compiler.is_compiling() and is_readable(table):
        _POSITIONS[table] = state(table), positions, rotation


def _known(pe: Any, x: Tensor) -> dict[str, Any]:
    """The rotation of tokens like x as arguments of `ops.qk_norm_rope`; empty where the table has to be used as it is.

    A table of matrices has float64's angles, rounded once; the pair (cos, sin) has float32's, which half precision hides.
    """
    if not isinstance(pe, Tensor):
        return dit.known_positions(pe, x) if qk.rounds_angles(x.dtype) else {}
    if torch.compiler.is_compiling() or not is_readable(pe) or x.dtype == torch.float64:
        return {}
    if torch.is_grad_enabled() and pe.requires_grad:
        return {}
    found = _POSITIONS.get(pe)
    if found is None and torch.is_grad_enabled():  # a recomputed block gets the table's values under another name
        found = next((kept for table, kept in list(_POSITIONS.items()) if _is_same(table, pe)), None)
    if found is None or found[0] != state(pe):
        return {}
    return {"positions": found[1], **found[2]}


def _is_same(table: Tensor, other: Tensor) -> bool:
    return table.data_ptr() == other.data_ptr() and table.shape == other.shape


def _part(known: dict[str, Any], start: int, stop: int | None) -> dict[str, Any]:
    """The rotation of the tokens `start:stop`."""
    return {**known, "positions": _shared(known["positions"])[..., start:stop, :]} if known else {}


def _shared(positions: Tensor) -> Tensor:
    return positions[0] if positions.shape[0] == 1 else positions


def _functions(home: Any) -> Any:
    """The file of functions that a file of blocks takes its attention from."""
    return sys.modules.get(getattr(home.attention, "__module__", ""))


@lru_cache(maxsize=8)
def _is_known(attention: Any, turn: Any) -> bool:
    return digest(attention) in ATTENTION and digest(turn) in TURN


@constant_while_tracing
def _is_known_file(attention: Any, functions: Any) -> bool:
    return functions is not None and _is_known(attention, getattr(functions, "apply_rope", None))


def file_reason(home: Any) -> str | None:
    """Why the attention must be called with whatever it was replaced by."""
    known = _is_known_file(home.attention, _functions(home))
    return None if known else "its file's `attention` or `apply_rope` is another one than upstream's"


def _home(module: Any) -> Any:
    """The file of a module's forward: a subclass may lie elsewhere."""
    return sys.modules[type(module).forward.__module__]


def file_check(block: Any) -> str | None:
    """`file_reason` of a block that is not patched yet."""
    return file_reason(_home(block))


def tables_check(module: Any) -> str | None:
    """Another function of angles than upstream's."""
    home = _home(module)
    found = all(digest(getattr(home, name, None)) in ANGLES for name in ("rope", "liger_rope"))
    return None if found else "its file's angles are others than upstream's"


def norms_reason(owner: Any, home: Any) -> str | None:
    """Why query and key norms must be called."""
    both: Any = owner._modules["norm"]
    reason = child_reason(both, home.QKNorm)
    for name in ("query_norm", "key_norm"):
        reason = reason or child_reason(both._modules[name], home.FusedRMSNorm)
    return reason


def _split(attention: Any, x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Queries, keys and values [B, N, H, D] of an attention, and whether nobody else holds the first two."""
    parts = attention._modules
    if attention.fused_qkv:
        q, k, v = parts["qkv"](x).unflatten(2, (3, heads, -1)).unbind(2)
        return q, k, v, dit.may_overwrite(parts["qkv"])
    q, k, v = (qk.heads(parts[f"{name}_proj"](x), heads) for name in "qkv")
    return q, k, v, dit.may_overwrite(parts["q_proj"], parts["k_proj"])


def _normed(q: Tensor, k: Tensor, norm: Any, backend: str, free: bool, known: dict[str, Any]) -> tuple[Tensor, Tensor]:
    weights = norm.query_norm.scale, norm.key_norm.scale
    inplace = free and not torch.compiler.is_compiling()
    q, keys = ops.qk_norm_rope(q, k, *weights, eps=_EPS, inplace=inplace, backend=backend, **known)
    assert keys is not None
    return q, keys


def _mixed(home: Any, q: Tensor, k: Tensor, v: Tensor, pe: Any, known: dict[str, Any]) -> Tensor:
    """Attention of queries, keys and values [B, N, H, D], turned before unless they are `known` to be."""
    functions = _functions(home)
    if not known:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if isinstance(pe, Tensor):
            q, k = functions.apply_rope(q, k, pe)
        else:
            q, k = functions.LigerRopeFunction.apply(q, k, *pe)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    mixed: Tensor = functions.flash_attn_func(q, k, v)
    return mixed


def attend_joined(block: Any, text: Tensor, image: Tensor, pe: Any, backend: str) -> tuple[Tensor, Tensor]:
    """(image, text) of the attention of a block with two streams."""
    parts, words = block._modules, text.shape[1]
    known = _known(pe, image)
    streams = []
    for name, x, span in (("txt_attn", text, (0, words)), ("img_attn", image, (words, None))):
        q, k, v, free = _split(parts[name], x, block.num_heads)
        streams.append((*_normed(q, k, parts[name].norm, backend, free, _part(known, *span)), v))
    q, k, v = (qk.join(first, second) for first, second in zip(*streams, strict=True))
    mixed = _mixed(block._vidkernels_home, q, k, v, pe, known).flatten(2)
    return parts["img_attn"].proj(mixed[:, words:]), parts["txt_attn"].proj(mixed[:, :words])


def attend_beside(block: Any, x: Tensor, pe: Any, backend: str) -> Tensor:
    """The attention of a block with one stream and its MLP, through the layer behind both: [B, N, D]."""
    parts, width, known = block._modules, block.hidden_size, _known(pe, x)
    if block.fused_qkv:
        wide = parts["linear1"](x)  # [B, N, 3 D + hidden]
        q, k, v = wide[..., : 3 * width].unflatten(2, (3, block.num_heads, -1)).unbind(2)
        free, beside = dit.may_overwrite(parts["linear1"]), wide[..., 2 * width :]
        alone = free
    else:
        q, k = (qk.heads(parts[name](x), block.num_heads) for name in ("q_proj", "k_proj"))
        beside = parts["v_mlp"](x)  # [B, N, D + hidden]
        v = qk.heads(beside[..., :width], block.num_heads)
        free, alone = dit.may_overwrite(parts["q_proj"], parts["k_proj"]), dit.may_overwrite(parts["v_mlp"])
    q, k = _normed(q, k, block.norm, backend, free, _part(known, 0, None))
    mixed = _mixed(block._vidkernels_home, q, qk.by_head(k), qk.by_head(v), pe, known)
    return through_last(block, mixed, beside, alone)


def through_last(block: Any, mixed: Tensor, beside: Tensor, alone: bool) -> Tensor:
    """The last layer of a single block, [B, N, D], on what `_side_by_side` returns."""
    both, last = _side_by_side(block, mixed, beside, alone), block._modules["linear2"]
    if both.is_contiguous() or child_reason(last, nn.Linear) is not None:
        result: Tensor = last(both)
    else:  # torch adds the bias inside the product where the input has two axes, of any strides
        result = last(both.flatten(0, 1)).unflatten(0, both.shape[:2])
    return result


def _side_by_side(block: Any, mixed: Tensor, beside: Tensor, alone: bool) -> Tensor:
    """The attention's output [B, N, H, D / H] or [B, N, D] and the activated hidden channels, [B, N, D + hidden].

    beside: values, and hidden channels, of which nobody else holds any if `alone`: then both take their places.
    """
    width, activation = block.hidden_size, block._modules["mlp_act"]
    plain = child_reason(activation, nn.GELU) is None and activation.approximate == "tanh"
    if torch.compiler.is_compiling() or not (alone and plain and mixed.dtype == beside.dtype):
        return torch.cat((mixed.flatten(2), activation(beside[..., width:])), 2)
    beside[..., :width].unflatten(-1, mixed.shape[2:]).copy_(mixed)
    torch.ops.aten.gelu_(beside[..., width:], approximate="tanh")
    return beside


def feed_forward(mlp: Any, x: Tensor) -> Tensor:
    """A block's MLP; without gradients the activation overwrites its input, the widest tensor of the block."""
    layers = list(mlp._modules.values())
    served = child_reason(mlp, nn.Sequential) is None and len(layers) == 3
    if not served or child_reason(layers[1], nn.GELU) is not None or not dit.may_overwrite(layers[0]):
        result: Tensor = mlp(x)
        return result
    hidden = torch.ops.aten.gelu_(layers[0](x), approximate=layers[1].approximate)
    projected: Tensor = layers[2](hidden)
    return projected


def _exact_attention(pe: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rotation and attention of [B, H, N, D] in float64."""
    q, k, v = q.double(), k.double(), v.double()
    if isinstance(pe, Tensor):
        turned = [(pe.double() * x.unflatten(-1, (-1, 1, 2))).sum(-1).flatten(-2) for x in (q, k)]
    else:
        cos, sin = (table.double()[:, None] for table in pe)
        turned = [x * cos + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * sin for x in (q, k)]
    return F.scaled_dot_product_attention(turned[0], turned[1], v).transpose(1, 2).flatten(2)


def _exact_heads(attention: Any, x: Tensor, heads: int) -> list[Tensor]:
    q, k, v, _ = _split(attention, x, heads)
    return [*_exact_norms(attention.norm, q, k), v.transpose(1, 2)]


def _exact_norms(norm: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    width = q.shape[-1:]
    q, k = F.rms_norm(q, width, norm.query_norm.scale, _EPS), F.rms_norm(k, width, norm.key_norm.scale, _EPS)
    return q.transpose(1, 2), k.transpose(1, 2)


class _ExactDouble:
    """A processor that computes in float64 what upstream's rounds to float32 in between."""

    def __call__(self, block: Any, img: Tensor, txt: Tensor, vec: Tensor, pe: Any) -> tuple[Tensor, Tensor]:
        (mod1, mod2), (text_mod1, text_mod2) = block.img_mod(vec), block.txt_mod(vec)
        image = _exact_heads(block.img_attn, block.img_norm1(img) * (1 + mod1.scale) + mod1.shift, block.num_heads)
        modulated = block.txt_norm1(txt) * (1 + text_mod1.scale) + text_mod1.shift
        text = _exact_heads(block.txt_attn, modulated, block.num_heads)
        mixed = _exact_attention(pe, *(torch.cat(pair, 2) for pair in zip(text, image, strict=True)))
        words = txt.shape[1]
        img = img + mod1.gate * block.img_attn.proj(mixed[:, words:])
        txt = txt + text_mod1.gate * block.txt_attn.proj(mixed[:, :words])
        img = img + mod2.gate * block.img_mlp(block.img_norm2(img) * (1 + mod2.scale) + mod2.shift)
        txt = txt + text_mod2.gate * block.txt_mlp(block.txt_norm2(txt) * (1 + text_mod2.scale) + text_mod2.shift)
        return img, txt


class _ExactSingle:
    """The same for blocks with one stream."""

    def __call__(self, block: Any, x: Tensor, vec: Tensor, pe: Any) -> Tensor:
        modulation, _ = block.modulation(vec)
        normed, width = block.pre_norm(x) * (1 + modulation.scale) + modulation.shift, block.hidden_size
        if block.fused_qkv:
            wide = block.linear1(normed)
            q, k, v = wide[..., : 3 * width].unflatten(2, (3, block.num_heads, -1)).unbind(2)
        else:
            q, k = (qk.heads(project(normed), block.num_heads) for project in (block.q_proj, block.k_proj))
            wide = block.v_mlp(normed)
            v = qk.heads(wide[..., :width], block.num_heads)
        mixed = _exact_attention(pe, *_exact_norms(block.norm, q, k), v.transpose(1, 2))
        hidden = block.mlp_act(wide[..., wide.shape[-1] - block.mlp_hidden_dim :])
        return x + modulation.gate * block.linear2(torch.cat((mixed, hidden), 2))


def widen(block: Any) -> Any:
    """A copy of a block on float64, which upstream's attention refuses."""
    double = block.double()
    double.processor = _ExactDouble() if hasattr(double, "img_attn") else _ExactSingle()
    return double
