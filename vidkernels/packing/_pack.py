# SPDX-License-Identifier: Apache-2.0
"""Latents of different sizes to one token sequence and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from vidkernels.errors import DeviceError, DTypeError, OptionError, ShapeError
from vidkernels.ops._checks import check_option, check_tensor, whole_numbers
from vidkernels.packing._offsets import int_tensor, longest, offsets, segment_ids

Size = tuple[int, int, int]
ORDERS = ("channels_first", "channels_last")


@dataclasses.dataclass(frozen=True, eq=False)  # tensors have no one answer
class Packed:
    """A pack: samples of any sizes, one after the other in one token sequence.

    Attributes:
        tokens: `[N, channels * pt * ph * pw]`, patches in (t, h, w) order, sample after sample.
        cu_seqlens: int32 `[B + 1]` on the tokens' device; sample i is tokens `cu_seqlens[i] : cu_seqlens[i + 1]`.
        max_seqlen: the longest sample, an int.
        positions: int32 `[N, 3]`, (t, h, w) of every token in patches, from 0 in each sample.
        sizes: (t, h, w) of every sample in patches.
        patch: (pt, ph, pw).
        order: of the values in a token: "channels_first" (c, pt, ph, pw), a convolution's weight order, or
            "channels_last" (pt, ph, pw, c).
        kept: after `drop_tokens`, int64 `[N]`: where each token was in the whole sequence; None otherwise.
        lengths: tokens of every sample, ints.
    """

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    positions: torch.Tensor
    sizes: tuple[Size, ...]
    patch: Size
    order: str
    lengths: tuple[int, ...]
    kept: torch.Tensor | None = None

    def with_tokens(self, tokens: torch.Tensor) -> Packed:
        """The same pack around other token values, such as a model's output."""
        check_tensor("tokens", tokens)
        if tokens.ndim < 1 or tokens.shape[0] != self.tokens.shape[0]:
            raise ShapeError("tokens", f"{self.tokens.shape[0]} tokens at axis 0", tuple(tokens.shape))
        return dataclasses.replace(self, tokens=tokens)

    def segment_ids(self) -> torch.Tensor:
        """int64 `[N]`: the sample of every token, for gathering one row per sample."""
        return segment_ids(self.cu_seqlens, sum(self.lengths))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Packed:
        """On another device, and the tokens (only) in another dtype."""

        # A copy to the host that is not waited for may be read before it has come.
        wait = device is None or torch.device(device).type == "cpu"

        def move(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
            return x.to(device, dtype, non_blocking=not wait)

        return dataclasses.replace(
            self,
            tokens=move(self.tokens, dtype),
            cu_seqlens=move(self.cu_seqlens),
            positions=move(self.positions),
            kept=None if self.kept is None else move(self.kept),
        )

    def __len__(self) -> int:
        return len(self.sizes)


def pack(latents: Sequence[torch.Tensor], patch: Size = (1, 2, 2), *, order: str = "channels_first") -> Packed:
    """Cut latents into patches and join them to one sequence.

    Args:
        latents: `[C, T, H, W]` each, or `[C, H, W]` for an image; one C, dtype and device. Sizes need not agree.
        patch: (pt, ph, pw); T, H, W of every sample are multiples of it.
        order: of the values in a token, see `Packed`. "channels_first" makes a patch-embedding convolution a linear
            layer with `weight.flatten(1)`.

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError: an argument does not fit.
    """
    check_option("order", order, ORDERS)
    if isinstance(latents, torch.Tensor):
        raise DTypeError("latents", "a sequence of tensors", "one tensor", "Pass list(latents) to pack a batch.")
    if not isinstance(latents, Sequence):
        raise DTypeError("latents", "a sequence of tensors", type(latents).__name__, "Pass a list.")
    if not latents:
        raise ShapeError("latents", "at least one sample", "an empty list", "A pack without samples has no channels.")
    patch = _check_patch(patch)
    for i, x in enumerate(latents):
        check_tensor(f"latents[{i}]", x)
    samples = [x.unsqueeze(1) if x.ndim == 3 else x for x in latents]
    sizes = tuple(_grid(i, x, samples[0], patch) for i, x in enumerate(samples))
    tokens = torch.cat([_patchify(x, size, patch, order) for x, size in zip(samples, sizes, strict=True)])
    return pack_grids(sizes, tokens, patch=patch, order=order)


def pack_grids(
    sizes: Sequence[Size], tokens: torch.Tensor, *, patch: Size = (1, 1, 1), order: str = "channels_first"
) -> Packed:
    """A pack of tokens that are cut already, such as embedded patches.

    Args:
        sizes: (t, h, w) of every sample in tokens.
        tokens: `[N, ...]` with N the sum of t * h * w.
        patch, order: how `unpack` shall read a token; (1, 1, 1) for one value vector per position.
    """
    sizes, patch = _check_sizes(sizes), _check_patch(patch)
    check_option("order", order, ORDERS)
    lengths = tuple(math.prod(size) for size in sizes)
    check_tensor("tokens", tokens)
    if tokens.ndim < 1 or sum(lengths) != tokens.shape[0]:
        got = tuple(tokens.shape)
        raise ShapeError("tokens", f"{sum(lengths)} tokens, the sum over sizes, at axis 0", got, "Check sizes.")
    cu_seqlens = offsets(lengths, tokens.device)
    positions = _positions(sizes, cu_seqlens, sum(lengths))
    return Packed(tokens, cu_seqlens, longest(lengths), positions, sizes, patch, order, lengths)


def unpack(packed: Packed, tokens: torch.Tensor | None = None, *, order: str | None = None) -> list[torch.Tensor]:
    """The samples of a pack, `[C, T, H, W]` each: exactly what went into `pack`.

    Args:
        packed: the pack.
        tokens: other values for its tokens, `[N, C' * pt * ph * pw]`, such as a model's output; C' may differ.
        order: of the values in a token if it differs from the pack's (DiT's final layer is "channels_last").
    """
    check_packed(packed)
    tokens = packed.tokens if tokens is None else tokens
    order = packed.order if order is None else order
    check_option("order", order, ORDERS)
    check_tensor("tokens", tokens)
    if packed.kept is not None:
        raise OptionError(
            "packed", "a pack with all its tokens", "one with dropped tokens", "Call restore_tokens first."
        )
    volume = math.prod(packed.patch)
    if tokens.ndim != 2 or tokens.shape[0] != sum(packed.lengths) or tokens.shape[1] % volume:
        expected = f"[{sum(packed.lengths)}, a multiple of {volume}]"
        raise ShapeError("tokens", expected, tuple(tokens.shape), "A token holds one patch of every channel.")
    parts = tokens.split(packed.lengths)
    return [_unpatchify(part, size, packed.patch, order) for part, size in zip(parts, packed.sizes, strict=True)]


def check_packed(packed: object) -> None:
    """`packed` is what `pack` returns."""
    if not isinstance(packed, Packed):
        raise DTypeError("packed", "a Packed", type(packed).__name__, "Make one with pack or pack_grids.")


def _check_patch(patch: object) -> Size:
    sizes = whole_numbers(patch, 1)
    if sizes is None or len(sizes) != 3:
        raise OptionError("patch", "three positive ints (pt, ph, pw)", repr(patch), "For example (1, 2, 2).")
    return sizes[0], sizes[1], sizes[2]


def _check_sizes(sizes: object) -> tuple[Size, ...]:
    found = [whole_numbers(size, 0) for size in sizes] if isinstance(sizes, Sequence) else [None]
    if any(size is None or len(size) != 3 for size in found):
        raise OptionError("sizes", "three ints (t, h, w) of at least 0 for every sample", repr(sizes))
    return tuple((size[0], size[1], size[2]) for size in found if size is not None)


def _grid(index: int, x: torch.Tensor, first: torch.Tensor, patch: Size) -> Size:
    name = f"latents[{index}]"
    if x.ndim != 4:
        raise ShapeError(name, "[C, T, H, W], or [C, H, W] for an image", tuple(x.shape), "Unbind the batch axis.")
    if x.shape[0] != first.shape[0]:
        raise ShapeError(name, f"{first.shape[0]} channels, as latents[0]", x.shape[0], "One pack has one C.")
    if x.dtype != first.dtype:
        raise DTypeError(name, f"the dtype of latents[0], {first.dtype}", x.dtype, f"Convert it: x.to({first.dtype}).")
    if x.device != first.device:
        raise DeviceError(name, f"the device of latents[0], {first.device}", x.device, "Move it.")
    if any(size % p for size, p in zip(x.shape[1:], patch, strict=True)) or 0 in x.shape[1:]:
        expected = f"T, H, W that are positive multiples of patch {patch}"
        raise ShapeError(name, expected, tuple(x.shape[1:]), "Pad or crop it.")
    t, h, w = (size // p for size, p in zip(x.shape[1:], patch, strict=True))
    return t, h, w


def _patchify(x: torch.Tensor, size: Size, patch: Size, order: str) -> torch.Tensor:
    (t, h, w), (pt, ph, pw) = size, patch
    cut = x.reshape(x.shape[0], t, pt, h, ph, w, pw)
    axes = (1, 3, 5, 0, 2, 4, 6) if order == "channels_first" else (1, 3, 5, 2, 4, 6, 0)
    return cut.permute(axes).reshape(t * h * w, -1)


def _unpatchify(tokens: torch.Tensor, size: Size, patch: Size, order: str) -> torch.Tensor:
    (t, h, w), (pt, ph, pw) = size, patch
    channels = tokens.shape[1] // (pt * ph * pw)  # which a sample without tokens leaves open
    if order == "channels_first":
        cut = tokens.reshape(t, h, w, channels, pt, ph, pw).permute(3, 0, 4, 1, 5, 2, 6)
    else:
        cut = tokens.reshape(t, h, w, pt, ph, pw, channels).permute(6, 0, 3, 1, 4, 2, 5)
    return cut.reshape(channels, t * pt, h * ph, w * pw)


def _positions(sizes: tuple[Size, ...], cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """int32 [total, 3] from the index of a token inside its sample, on the device."""
    device = cu_seqlens.device
    segment = segment_ids(cu_seqlens, total)
    index = torch.arange(total, dtype=torch.int32, device=device) - cu_seqlens[segment]
    height = int_tensor([h for _, h, _ in sizes], device)[segment]
    width = int_tensor([w for _, _, w in sizes], device)[segment]
    row = index // width
    return torch.stack((row // height, row % height, index % width), dim=1)
