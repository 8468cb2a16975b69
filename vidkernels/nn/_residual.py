# SPDX-License-Identifier: Apache-2.0
"""Residual blocks of a tokenizer in inference: piece by piece, over their own input.

Without gradients nobody needs a block's input behind it, and a block that mixes nothing along an axis can go along it: its
temporaries are then a few megabytes. On a CPU a fresh tensor above 32 MiB costs 2 us for each page of 4 KB; on a GPU this is
what bounds the peak of memory. Results have the bits of the whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vidkernels._hooks import is_globally_unhooked, is_unhooked
from vidkernels._tracing import active_transform
from vidkernels.ops._checks import autocast_dtype

# A block, of [B, C, T, H, W] its result, or of its input and where to write the result, which may be its input.
Branch = Callable[[Tensor, "Tensor | None"], Tensor]
# Elements of a temporary: 16 MiB of float32 on a CPU. On a GPU each of a piece's kernels then takes 0.1 ms or more, longer
# than the host needs for the next one, so that more launches cost nothing there; VidTok on 20x256x256 in bfloat16 peaks at
# 640 MiB encoding and 1296 decoding. Whole blocks would take 960 and 1920, half of the limit 544 and 1152. (Decoding holds
# 960 at least: a tensor of 320 and what temporal upsampling makes of it.)
PIECE_CPU, PIECE_GPU = 1 << 22, 1 << 27


def is_traced() -> bool:
    """A graph, a transform of torch.func or forward mode looks at the call: it wants neither loops nor writes."""
    return torch.compiler.is_compiling() or active_transform() is not None


def needs_gradients(network: nn.Module, x: Tensor) -> bool:
    """Whether a backward pass may follow the call `network(x)`."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in network.parameters()))


def may_overwrite(network: nn.Module, x: Tensor) -> bool:
    """Whether nobody but `network` can see the tensors between its blocks in the call `network(x)`.

    No backward pass follows, no hook may have kept one, and autocast, which converts between them, is off.
    """
    if is_traced() or needs_gradients(network, x) or torch.is_autocast_enabled(x.device.type):
        return False
    return is_globally_unhooked() and all(is_unhooked(module) for module in network.modules())


def in_pieces(
    branch: Branch, x: Tensor, dim: int, channels: int, *, inplace: bool = False, limit: int | None = None
) -> Tensor:
    """`branch(x, None)`, [B, channels, T, H, W], along whose axis `dim` it mixes nothing; needs no gradients.

    Args:
        x: [B, C, T, H, W] in channels-last memory.
        dim: 2, frames (of all clips one after the other), or 3, rows.
        inplace: the result may take the place of x.
        limit: elements of a piece's largest tensor; default: what suits the device.
    """
    if is_traced():
        return branch(x, None)
    batch, width, frames, rows = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
    size, elements = batch * frames if dim == 2 else rows, x.numel()
    inplace = inplace and channels == width
    limit = limit or (PIECE_CPU if x.is_cpu else PIECE_GPU)
    largest = elements // max(1, width) * max(width, channels)
    pieces = 1 if largest <= limit else _pieces(size, largest, limit)
    if pieces == 1:
        # On a GPU a fresh tensor costs nothing, and cuDNN adds the residual to it in place.
        return branch(x, x if inplace and x.is_cpu else None)
    if dim == 2 and batch > 1:
        x = _as_clips(x, 1)
    out = x
    if not inplace:
        shape, lower = (x.shape[0], channels, *x.shape[2:]), autocast_dtype(x)
        dtype = x.dtype if lower is None or x.dtype == torch.float64 else lower
        out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last_3d)
    for index in range(pieces):
        start = size * index // pieces
        count = size * (index + 1) // pieces - start
        piece = x.narrow(dim, start, count)
        branch(piece, piece if inplace else out.narrow(dim, start, count))
    return _as_clips(out, batch) if dim == 2 and batch > 1 else out


def _pieces(size: int, elements: int, limit: int) -> int:
    """How many pieces of `size` frames or rows, as few as the limit allows; all are alike.

    A small one behind large ones (20 frames as 8, 8 and 4; 256 rows as 204 and 52) takes a GPU's host as long as they do,
    its kernels do not fill the device, and the large ones bound the peak.
    """
    most = max(1, limit * size // elements)
    return -(-size // most)


def _as_clips(x: Tensor, clips: int) -> Tensor:
    """The frames of [B, C, T, H, W] as so many clips; a view in channels-last memory."""
    frames = x.shape[0] * x.shape[2] // clips
    return x.permute(0, 2, 3, 4, 1).reshape(clips, frames, *x.shape[3:], x.shape[1]).permute(0, 4, 1, 2, 3)
