# SPDX-License-Identifier: Apache-2.0
"""What the rules for HunyuanVideo's own transformers share: rows of modulation, queries and keys, MLPs, guards.

Tables of the rotation come from the pipeline. In half precision it is looked up once a table whether they hold the angles of
HunyuanVideo's positions; then norms and rotation are one launch. Other tables turn queries and keys as they are.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels._tracing import constant_while_tracing
from vidkernels.patching._guard import child_reason, is_readable
from vidkernels.patching._match import digest
from vidkernels.patching._modulation import project
from vidkernels.patching._values import ReadOnce, is_captured
from vidkernels.patching.rules import _adaln_zero_units as adaln
from vidkernels.patching.rules import _dit_units as dit
from vidkernels.patching.rules import _qk_norm_units as qk

# Digests of functions in the blocks' file (`apply_rotary_emb`, `modulate`, `apply_gate`, the last two with and without a condition
# of the first frame), of those that the first one calls, and of the norm's methods.
FUNCTIONS = {
    *("d48901b85d77beee", "2b51e7626b369ea3", "1b1e8368d3c09ca2", "c363d52fb4120f9a", "5ea40a7d1335af5b"),
    *("e0c62ca7711240de", "046861b015a1d837", "39264773598d1b6b", "292148824323ee71"),
}
_NAMES = ("apply_rotary_emb", "modulate", "apply_gate")
_THETA = 256.0
First = tuple[Tensor, int] | None


def backends(block: Any) -> tuple[str, str]:
    """Of the chain, and of norms and rotation."""
    return block._vidkernels_backend("adaln_zero"), block._vidkernels_backend("qk_norm_rope")


@lru_cache(maxsize=16)
def _are_known(*functions: Any) -> bool:
    return all(digest(function) in FUNCTIONS for function in functions)


@constant_while_tracing
def file_reason(home: Any) -> str | None:
    """Why blocks must run upstream's code: a function of their file was replaced."""
    turn = getattr(home, "apply_rotary_emb", None)
    helpers = sys.modules.get(getattr(turn, "__module__", ""))
    functions = [getattr(home, name, None) for name in _NAMES]
    functions += [getattr(helpers, name, None) for name in ("reshape_for_broadcast", "rotate_half")]
    return None if _are_known(*functions) else "its file rotates or modulates by other functions than upstream's"


def _norm_class(norm: Any) -> Any:
    return getattr(type(norm), "_vidkernels_base", type(norm))


@constant_while_tracing
def _is_upstreams_norm(cls: Any) -> bool:
    return cls.__name__ == "RMSNorm" and _are_known(cls.forward, getattr(cls, "_norm", None))


def _norm_kind_reason(norm: Any) -> str | None:
    cls = _norm_class(norm)
    return None if _is_upstreams_norm(cls) else f"a query or key norm is a {cls.__name__}, not upstream's RMSNorm"


def norms_of(block: Any) -> list[Any]:
    """Norms of queries and keys, in pairs."""
    parts = block._modules
    if "q_norm" in parts:
        return [parts["q_norm"], parts["k_norm"]]
    return [parts[f"{kind}_attn_{which}_norm"] for kind in ("img", "txt") for which in "qk"]


def norms_reason(norms: list[Any]) -> str | None:
    """Why query and key norms must be called."""
    for norm in norms:
        reason = _norm_kind_reason(norm) or child_reason(norm, _norm_class(norm))
        if reason is not None:
            return reason
    if any(norm.eps != norms[0].eps for norm in norms):
        return "the query and key norms differ"
    return None


def block_check(block: Any) -> str | None:
    """Why a block that is not patched yet can never be served."""
    for norm in norms_of(block):
        reason = _norm_kind_reason(norm)
        if reason is not None:
            return reason
    return file_reason(sys.modules[type(block).forward.__module__])


def tables_reason(tables: Any, tokens: int, width: int) -> str | None:
    """Why queries and keys [B, tokens, H, width] must be turned by upstream's code."""
    if tables is None:
        return None
    pair = isinstance(tables, tuple) and len(tables) == 2 and all(isinstance(table, Tensor) for table in tables)
    if pair and all(table.shape == (tokens, width) and table.dtype.is_floating_point for table in tables):
        return None
    return f"the rotation's tables are no pair for {tokens} tokens"


def modulation_reason(modulation: Any, cls: type) -> str | None:
    """Why the rows of a `ModulateDiT` must be asked from it."""
    return child_reason(modulation, cls) or child_reason(modulation._modules["act"], nn.SiLU)


def open_stream(x: Tensor, modulation: Any, vec: Tensor, count: int, first: First, backend: str) -> Any:
    """(stream, its `count` rows of modulation [B, D]); the first tokens may have a condition of their own."""
    parts = modulation._modules
    rows = project(parts["linear"], parts["act"], vec)
    if first is None:
        tables = rows.chunk(count, dim=1)
        return adaln.Stream(x, tables[-1], backend), tables
    condition, tokens = first
    first_rows = parts["linear"](parts["act"](condition))
    both = torch.stack((first_rows, rows), 1).flatten(0, 1).chunk(count, dim=1)  # [2 B, D]
    return dit.JoinedStream(x, both[-1], dit.alternate(tokens, x, both[-1]), backend), both


def split(block: Any, kind: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Queries, keys and values [B, N, H, D] of a stream, and whether nobody else holds the first two."""
    parts, heads = block._modules, block.heads_num
    if f"{kind}_attn_qkv" in parts:
        layer = parts[f"{kind}_attn_qkv"]
        q, k, v = layer(x).unflatten(2, (3, heads, -1)).unbind(2)
        return q, k, v, dit.may_overwrite(layer)
    layers = [parts[f"{kind}_attn_{which}"] for which in "qkv"]
    q, k, v = (qk.heads(layer(x), heads) for layer in layers)
    return q, k, v, dit.may_overwrite(*layers[:2])


def turned(
    q: Tensor, k: Tensor, norms: list[Any], tables: Any, tokens: int, free: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, N, H, D], normalised; the first `tokens` are turned by the tables [tokens, D].

    free: nobody else holds them.
    """
    compiling = torch.compiler.is_compiling()
    known = {} if tables is None or compiling or not qk.rounds_angles(q.dtype) else _known(tables, q)
    q_weight, k_weight = (getattr(norm, "weight", None) for norm in norms)
    options: dict[str, Any] = {"eps": norms[0].eps, "inplace": free and not compiling, "backend": backend, **known}
    q, keys = ops.qk_norm_rope(q, k, q_weight, k_weight, **options)
    assert keys is not None
    if tables is None or known:
        return q, keys
    cos, sin = (table[None, :, None] for table in tables)
    if torch.is_grad_enabled() or compiling:  # one tensor is turned, with angles of 0 for the rest
        rest = (0, 0, 0, 0, 0, q.shape[1] - tokens)
        turn = dit.Turn(nn.functional.pad(cos, rest, value=1.0), nn.functional.pad(sin, rest), q)
        return turn(q), turn(keys)
    turn = dit.Turn(cos, sin, q)
    for x in (q, keys):  # where they lie: the norm's output is nobody else's
        part = x[:, :tokens]
        done = turn(part, overwrite=True)
        if done is not part:
            part.copy_(done)
    return q, keys


def _known(tables: tuple[Tensor, Tensor], x: Tensor) -> dict[str, Any]:
    """The rotation of x [B, N, H, D] as arguments of `ops.qk_norm_rope`; empty where the tables must be used as they are."""
    cos, sin = tables
    if not (is_readable(cos) and is_readable(sin)) or (
        torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    ):
        return {}
    positions = None if is_captured(cos) else _positions(cos, sin)
    if positions is None:
        return {}
    rest = x.shape[1] - positions.shape[0]
    positions = nn.functional.pad(positions.to(x.device), (0, 0, 0, rest))  # at 0 nothing is rotated
    return {"positions": positions, "axes": axes_of(cos.shape[1]), "theta": _THETA, "layout": "interleaved"}


def axes_of(width: int) -> tuple[int, int, int]:
    """Dimensions of a head that turn with time, height and width: 16, 56 and 56 of 128."""
    return width // 8, 7 * width // 16, 7 * width // 16


def _find_positions(cos: Tensor, sin: Tensor) -> Tensor | None:
    """The positions [N, 3] whose angles tables [N, D] hold, or None where they hold others than HunyuanVideo's."""
    axes = axes_of(cos.shape[1])
    if cos.shape[1] % 16 or any(width % 2 for width in axes):
        return None
    device = cos.device if cos.device.type in ("cpu", "cuda") else torch.device("cpu")  # where there is float64
    wide = [table.detach().to(device, torch.float64).split(axes, 1) for table in (cos, sin)]
    places = []
    for width, c, s in zip(axes, *wide, strict=True):
        pairs = _THETA ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
        place = (
            torch.atan2(s[:, -1], c[:, -1]) / pairs[-1]
        ).round()  # the slowest pair turns once in 800 positions or more
        angles = place[:, None] * pairs.repeat_interleave(2)
        close = ((c - angles.cos()).abs() <= 2.0**-13) & ((s - angles.sin()).abs() <= 2.0**-13)
        if not close.all():  # the angles are float32; a quarter of float16's rounding hides that
            return None
        places.append(place)
    return torch.stack(places, 1).to(torch.int32)


_positions = ReadOnce(_find_positions)


def feed_forward(block: Any, name: str, x: Tensor) -> Tensor:
    """A block's MLP; without gradients the activation overwrites its input, the widest tensor of the block."""
    mlp: Any = block._modules[name]
    layers = list(mlp._modules.values())
    served = child_reason(mlp, block._vidkernels_home.MLP) is None and dit.may_overwrite(layers[0])
    if not served or child_reason(layers[1], nn.GELU) is not None:
        called: Tensor = mlp(x)
        return called
    hidden = torch.ops.aten.gelu_(layers[0](x), approximate=layers[1].approximate)
    for layer in layers[2:]:
        hidden = layer(hidden)
    return hidden
