# SPDX-License-Identifier: Apache-2.0
"""What a block has added to the tokens: the residual that AdaCache compares from one computed step to the next.

An adapter knows one family of blocks: where its gated attention residual is and how its tokens are laid out. Families are
known by class (this package) or by fingerprint, the attributes of a block (Open-Sora's STDiT3, the official Latte, Latte in
diffusers and in Open-Sora-Plan). Blocks of no known family are measured by everything they add.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# (block, args, kwargs, output of block.<attention>) -> residual [B, T, S, C]
Measure = Callable[[Any, tuple[Any, ...], dict[str, Any], Tensor], Tensor]
Temporal = Callable[[Any, str, int], bool]


@dataclass(frozen=True)
class Adapter:
    """How to measure the blocks of one family.

    Attributes:
        attention: name of the block's self-attention child, whose output `gated` receives; None: not needed.
        gated: gated attention residual.
        temporal: whether the block at (list name, position) attends over time.
    """

    attention: str | None
    gated: Measure | None
    temporal: Temporal


def unwrapped(block: nn.Module) -> nn.Module:
    """The module inside a `torch.compile(module)`, or the module itself."""
    return getattr(block, "_orig_mod", block)


def tokens_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The block's token input: its first positional argument, or `hidden_states`, or `x`."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else kwargs["x"]


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, index: int) -> Any:
    if name in kwargs:
        return kwargs[name]
    return args[index] if len(args) > index else None


def _own_stdit3(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], attended: Tensor) -> Tensor:
    gate = block.rows(*args[2:5])[..., 2, :]  # six, six_clean, selector
    gate = gate[:, None, None] if gate.ndim == 2 else gate[:, :, None]
    return gate * attended


def _own_latte(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], attended: Tensor) -> Tensor:
    rows = _argument(args, kwargs, "rows", 3)  # of all blocks' one product, where there is one: it has been made
    projected = block.adaLN_modulation(args[1]) if rows is None else rows()
    gate = projected.chunk(6, dim=-1)[2]
    gate = gate[:, None, None] if gate.ndim == 2 else gate[:, :, None]
    return gate * attended


def _table_gate(block: Any, six: Tensor) -> Tensor:
    return (block.scale_shift_table + six.reshape(six.shape[0], 6, -1))[:, 2]


def _own_latte_t2v(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], attended: Tensor) -> Tensor:
    return _table_gate(block, args[1])[:, None, None] * attended.reshape(args[0].shape)


def _open_sora(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], attended: Tensor) -> Tensor:
    """forward(x [B, T*S, C], y, t, mask, x_mask, t0, T, S); attention runs on [B*S, T, C] or [B*T, S, C]."""
    x = tokens_in(args, kwargs)
    frames, positions = _argument(args, kwargs, "T", 6), _argument(args, kwargs, "S", 7)
    if block.temporal:
        attended = attended.reshape(x.shape[0], positions, frames, -1).transpose(1, 2)
    else:
        attended = attended.reshape(x.shape[0], frames, positions, -1)
    gate = _table_gate(block, _argument(args, kwargs, "t", 2))[:, None, None]
    noisy = _argument(args, kwargs, "x_mask", 4)
    if noisy is not None:
        clean = _table_gate(block, _argument(args, kwargs, "t0", 5))[:, None, None]
        gate = torch.where(noisy[:, :, None, None].bool(), gate, clean)
    return gate * attended


def _rows_of_time(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], attended: Tensor) -> Tensor:
    """diffusers' Latte: [B*S, F, C] in temporal blocks, gates from a table; the rows of one frame are one column."""
    gate = _table_gate(block, _argument(args, kwargs, "timestep", 4))
    return (gate[:, None] * attended)[:, :, None]


def _official_latte(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], attended: Tensor) -> Tensor:
    """forward(x, c): x [B*S, F, C] in the odd, temporal blocks."""
    gate = block.adaLN_modulation(_argument(args, kwargs, "c", 1)).chunk(6, dim=-1)[2]
    return (gate[:, None] * attended)[:, :, None]


def _axis_is_time(block: Any, name: str, position: int) -> bool:
    return getattr(block, "axis", None) in ("time", "both")


CLASSES: dict[str, Adapter] = {
    "vidkernels.models.transformers._stdit3_blocks:STDiT3Block": Adapter(
        "attn", _own_stdit3, lambda block, name, position: block.attn.temporal
    ),
    "vidkernels.models.transformers._latte_blocks:LatteBlock": Adapter("attn", _own_latte, _axis_is_time),
    "vidkernels.models.transformers.latte_t2v:_Block": Adapter("attn1.to_out.0", _own_latte_t2v, _axis_is_time),
}
# Attributes of a block, block lists of its model, adapter: models that are not installed where this is written.
FINGERPRINTS: tuple[tuple[tuple[str, ...], tuple[str, ...], Adapter], ...] = (
    (
        ("scale_shift_table", "attn", "cross_attn", "mlp", "temporal", "norm1", "norm2"),
        ("spatial_blocks", "temporal_blocks"),
        Adapter("attn", _open_sora, lambda block, name, position: bool(block.temporal)),
    ),
    (
        ("scale_shift_table", "attn1", "ff", "norm1"),
        ("transformer_blocks", "temporal_transformer_blocks"),
        Adapter("attn1", _rows_of_time, lambda block, name, position: name == "temporal_transformer_blocks"),
    ),
    (
        ("attn", "mlp", "norm1", "norm2", "adaLN_modulation"),
        ("blocks",),
        Adapter("attn", _official_latte, lambda block, name, position: position % 2 == 1),
    ),
)
GENERIC = Adapter(None, None, lambda block, name, position: True)


def adapter_for(block: nn.Module, lists: tuple[str, ...]) -> Adapter:
    """The adapter of a block, by its class or by its attributes and its model's block lists."""
    block = unwrapped(block)
    for base in type(block).__mro__:
        found = CLASSES.get(f"{base.__module__}:{base.__qualname__}")
        if found is not None:
            return found
    for attributes, names, adapter in FINGERPRINTS:
        if set(names) <= set(lists) and all(hasattr(block, name) for name in attributes):
            return adapter
    return GENERIC


# Model class -> (axis of the frames in the latents, configuration key of the temporal patch size); tokens are frame-major.
FRAMES: dict[str, tuple[int, str | None]] = {
    "AllegroTransformer3DModel": (2, "patch_size_t"),
    "CogVideoXTransformer3DModel": (1, "patch_size_t"),
    "HunyuanVideoTransformer3DModel": (2, "patch_size_t"),
    "HunyuanVideo15Transformer3DModel": (2, "patch_size_t"),
    "MochiTransformer3DModel": (2, None),
    "SkyReelsV2Transformer3DModel": (2, "patch_size"),
    "WanTransformer3DModel": (2, "patch_size"),
}


def token_frames(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Frames along the tokens of a diffusers model in this call; None where they are not known."""
    model = unwrapped(model)
    if isinstance(kwargs.get("num_frames"), int):  # LTX is told
        return kwargs["num_frames"]
    found = next((FRAMES[base.__name__] for base in type(model).__mro__ if base.__name__ in FRAMES), None)
    if found is None:
        return None
    axis, key = found
    latents = tokens_in(args, kwargs)
    patch = getattr(getattr(model, "config", None), key, None) if key else 1
    patch = patch[0] if isinstance(patch, (tuple, list)) else patch or 1
    return latents.shape[axis] // patch if latents.ndim == 5 else None


def by_frames(residual: Tensor, frames: int | None) -> Tensor:
    """[B, T*S, C] -> [B, T, S, C] where the tokens are known to be frame-major."""
    if residual.ndim != 3 or not frames or residual.shape[1] % frames:
        return residual
    return residual.unflatten(1, (frames, -1))


def sums(previous: Tensor, now: Tensor, stride: int = 1) -> Tensor:
    """Four L1 norms, float32: |previous - now|, |previous|, |later - earlier| and |later| + |earlier| of frames `stride` apart.

    The last is 0 where the frames are not known; residuals [B, T, S, C] know theirs.
    """
    change, norm = _l1((previous - now).abs_()), _l1(previous.abs())
    if now.ndim != 4 or now.shape[1] <= stride:
        return torch.stack([change, norm, torch.zeros_like(change), torch.zeros_like(change)])
    motion = _l1((now[:, stride:] - now[:, :-stride]).abs_())
    frames = _l1(now.abs(), (0, 2, 3))
    return torch.stack([change, norm, motion, frames[stride:].sum() + frames[:-stride].sum()])


def _l1(magnitudes: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    return magnitudes.sum(dim, dtype=torch.promote_types(magnitudes.dtype, torch.float32)).float()
