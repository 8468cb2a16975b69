# SPDX-License-Identifier: Apache-2.0
"""What a block has added to the tokens: the residual that AdaCache compares from one computed step to the next.

An adapter knows one family of blocks: where its gated attention residual is and how its tokens are laid out. Blocks of no
known family are measured by everything they add.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# (block, args, kwargs, output of block.<attention>, block's output) -> residual [B, T, S, C], or any shape if frames are unknown
Measure = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Adapter:
    """How to measure the blocks of one family.

    Attributes:
        attention: name of the block's self-attention child, whose output `gated` receives; None: not needed.
        gated: gated attention residual.
        temporal: whether a block attends over time.
    """

    attention: str | None
    gated: Measure
    temporal: Callable[[nn.Module], bool]


def _whole(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], attended: Tensor, output: Tensor) -> Tensor:
    return output - tokens_in(args, kwargs)


def tokens_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The block's token input: its first positional argument, or `hidden_states`."""
    return args[0] if args else kwargs["hidden_states"]


def _own_stdit3(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], attended: Tensor, output: Tensor) -> Tensor:
    gate = block.rows(*args[2:5])[..., 2, :]  # six, six_clean, selector
    gate = gate[:, None, None] if gate.ndim == 2 else gate[:, :, None]
    return gate * attended


def _own_latte(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], attended: Tensor, output: Tensor) -> Tensor:
    gate = block.adaLN_modulation(args[1]).chunk(6, dim=-1)[2]
    gate = gate[:, None, None] if gate.ndim == 2 else gate[:, :, None]
    return gate * attended


def _table_gate(block: Any, six: Tensor) -> Tensor:
    return (block.scale_shift_table + six.reshape(six.shape[0], 6, -1))[:, 2]


def _own_latte_t2v(
    block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], attended: Tensor, output: Tensor
) -> Tensor:
    return _table_gate(block, args[1])[:, None, None] * attended.reshape(args[0].shape)


def _diffusers_latte(
    block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], attended: Tensor, output: Tensor
) -> Tensor:
    timestep = kwargs["timestep"] if "timestep" in kwargs else args[5]
    return _table_gate(block, timestep)[:, None] * attended


def _axis_is_time(block: nn.Module) -> bool:
    return getattr(block, "axis", None) == "time"


ADAPTERS: dict[str, Adapter] = {
    "vidkernels.models.transformers._stdit3_blocks:STDiT3Block": Adapter(
        "attn", _own_stdit3, lambda block: block.attn.temporal
    ),
    "vidkernels.models.transformers._latte_blocks:LatteBlock": Adapter("attn", _own_latte, _axis_is_time),
    "vidkernels.models.transformers.latte_t2v:_Block": Adapter("attn1.to_out.0", _own_latte_t2v, _axis_is_time),
}
GENERIC = Adapter(None, _whole, lambda block: True)


def adapter_for(block: nn.Module) -> Adapter:
    """The adapter of a block's class, or of one of its bases."""
    for base in type(block).__mro__:
        found = ADAPTERS.get(f"{base.__module__}:{base.__qualname__}")
        if found is not None:
            return found
    return GENERIC


def relative_change(previous: Tensor, now: Tensor) -> Tensor:
    """(||previous - now||_1, ||previous||_1) as one float32 tensor [2]; sums of both guidance branches add up."""
    return torch.stack([(previous - now).abs().float().sum(), previous.abs().float().sum()])


def motion_terms(residual: Tensor, stride: int = 1) -> Tensor:
    """(||later - earlier||_1, ||later||_1 + ||earlier||_1) between frames `stride` apart; residual [B, T, S, C]."""
    if residual.ndim != 4 or residual.shape[1] <= stride:
        return torch.stack([residual.new_zeros((), dtype=torch.float32), residual.new_ones((), dtype=torch.float32)])
    later, earlier = residual[:, stride:], residual[:, :-stride]
    change = (later - earlier).abs().float().sum()
    return torch.stack([change, later.abs().float().sum() + earlier.abs().float().sum()])
