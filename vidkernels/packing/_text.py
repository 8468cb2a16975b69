# SPDX-License-Identifier: Apache-2.0
"""Text states of different lengths without padding, the keys of packed cross-attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from vidkernels.errors import DeviceError, DTypeError, OptionError, ShapeError
from vidkernels.ops._checks import (
    check_fits,
    check_same_device,
    check_same_dtype,
    check_tensor,
    whole_number,
    whole_numbers,
)
from vidkernels.packing._offsets import longest, offsets, segment_ids


@dataclasses.dataclass(frozen=True, eq=False)  # tensors have no one answer
class PackedText:
    """A pack of prompts: their tokens, one prompt after the other.

    Attributes:
        tokens: `[N, D]`.
        cu_seqlens: int32 `[B + 1]`.
        max_seqlen: the longest prompt.
        lengths: tokens of every prompt; 0 is allowed, and cross-attention to it gives zeros.
    """

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)


def pack_text(
    states: torch.Tensor | Sequence[torch.Tensor],
    lengths: Sequence[int] | None = None,
    *,
    mask: torch.Tensor | None = None,
) -> PackedText:
    """Pack the states of prompts into one sequence, without their padding.

    Args:
        states: `[B, L, D]` padded at the end, or a list of `[L_i, D]`.
        lengths: real tokens of each row of a padded tensor, ints. Without lengths and mask all L are real.
        mask: `[B, L]`, nonzero where a token is real, anywhere in the row; instead of lengths. Its counts are read,
            which waits for a GPU: pass lengths where that matters.
    """
    if not isinstance(states, torch.Tensor):
        if not isinstance(states, Sequence):
            raise DTypeError("states", "a tensor or a list of them", type(states).__name__, "Pass a list.")
        return _pack_list(list(states), lengths, mask)
    check_tensor("states", states)
    if states.ndim != 3:
        raise ShapeError("states", "[B, L, D] or a list of [L, D]", tuple(states.shape), "Add the batch axis.")
    if lengths is not None and mask is not None:
        raise OptionError("mask", "None beside lengths", "both", "Give one of them.")
    batch, longest, _ = states.shape
    if mask is not None:
        check_tensor("mask", mask)
        check_same_device("mask", mask, "states", states)
        if tuple(mask.shape) != (batch, longest):
            raise ShapeError("mask", f"[B, L] = {(batch, longest)}", tuple(mask.shape), "One entry per token.")
        if mask.is_meta:
            raise DeviceError("mask", "a device with values, which are counted", "meta", "Pass lengths.")
        lengths = (mask != 0).sum(dim=1).tolist()
        return _packed(states[mask != 0], lengths)
    counts = (longest,) * batch if lengths is None else whole_numbers(lengths, 0)
    if counts is None or len(counts) != batch or any(length > longest for length in counts):
        raise ShapeError("lengths", f"{batch} ints from 0 to {longest}", repr(lengths), "One per row of states.")
    lengths = counts
    parts = [row[:length] for row, length in zip(states, lengths, strict=True)]
    return _packed(torch.cat(parts) if parts else states.flatten(0, 1), lengths)


def _pack_list(states: list[torch.Tensor], lengths: Sequence[int] | None, mask: torch.Tensor | None) -> PackedText:
    if lengths is not None or mask is not None:
        raise OptionError("lengths", "None for a list of prompts", "a value", "Each tensor has its own length.")
    for i, x in enumerate(states):
        check_tensor(f"states[{i}]", x)
        check_same_dtype(f"states[{i}]", x, "states[0]", states[0])
        check_same_device(f"states[{i}]", x, "states[0]", states[0])
    if not states or any(x.ndim != 2 or x.shape[1] != states[0].shape[1] for x in states):
        raise ShapeError(
            "states", "[L_i, D] tensors with one D", [tuple(x.shape) for x in states], "Remove other axes."
        )
    return _packed(torch.cat(states), [x.shape[0] for x in states])


def _packed(tokens: torch.Tensor, lengths: Sequence[int]) -> PackedText:
    return PackedText(tokens, offsets(lengths, tokens.device), longest(lengths), tuple(lengths))


def unpack_text(text: PackedText, length: int | None = None, fill: float = 0.0) -> torch.Tensor:
    """Pad packed prompts to one tensor `[B, length, D]`, at the end and with `fill`; default: the longest prompt's length."""
    if not isinstance(text, PackedText):
        raise DTypeError("text", "a PackedText", type(text).__name__, "Make one with pack_text.")
    found = whole_number(text.max_seqlen if length is None else length, 0)
    if found is None or found < text.max_seqlen:
        expected = f"at least {text.max_seqlen}, the longest prompt"
        raise OptionError("length", expected, repr(length), "Nothing is cut here.")
    length = found
    check_fits("fill", fill, text.tokens.dtype)
    out = text.tokens.new_full((len(text.lengths), length, *text.tokens.shape[1:]), fill)
    segment = segment_ids(text.cu_seqlens, sum(text.lengths))
    column = torch.arange(sum(text.lengths), device=segment.device) - text.cu_seqlens[segment]
    return out.index_put((segment, column.long()), text.tokens)
