# SPDX-License-Identifier: Apache-2.0
"""Weight gradient of a convolution over NDHWC: one product of gradient and shifted source per tap.

dw[k, n, r] = sum over (b, o) of grad[b, n, o] * source[b, r, o * MUL + base + k * STEP]

The sum over positions is cut into a fixed number of parts, one partial result each; adding the parts in order makes the
result the same bits on every run. Frames below 0 belong to another source (the history): the launcher makes one launch
per source, and each takes the output frames whose tap falls into it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vidkernels.triton._conv_kernels import decode_positions, load_positions, product


@triton.jit
def _frame_range(first, frames, source_frames, mul, CLAMP_LOWER: tl.constexpr, CLAMP_UPPER: tl.constexpr):
    """Output frames [begin, end) whose source frame `o * MUL + first` counts: those inside the source, and those outside
    where the source's first (last) frame is repeated."""
    begin = 0 if CLAMP_LOWER else tl.maximum((mul - 1 - first) // mul, 0)
    end = frames if CLAMP_UPPER else tl.minimum((source_frames - first + mul - 1) // mul, frames)
    return begin, tl.maximum(end, begin)


@triton.jit
def _share(steps, part, parts):
    """A part's steps [begin, end), of the first parts one more; steps * part is no 32-bit number from 2^23 steps on."""
    each = steps // parts
    more = steps - each * parts
    begin = each * part + tl.minimum(part, more)
    return begin, begin + each + (part < more)


@triton.jit
def _short_chains(a, b, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """a [N, M] @ b [M, C] in full float32 as products of 16 positions each, the fewest of a product, added in pairs.

    The plain units add one position after another: over 280 pixels an H100 was off by 3.5e-5 on results up to 49, and
    cuDNN by 4.7e-6. Chains of 16 with compensated sums are off by 6e-6 in a model of that order.
    """
    chains: tl.constexpr = BLOCK_M // 16
    a = tl.permute(tl.reshape(a, (BLOCK_N, chains, 16)), (1, 0, 2))
    b = tl.reshape(b, (chains, 16, BLOCK_C))
    return tl.sum(tl.dot(a, b, input_precision="ieee"), 0)


@triton.jit
def _add_compensated(total, lost, value):
    """(total + value, what that addition rounded away), after Kahan: `lost` is the rounding of the additions before.

    An infinity has no rounding to carry: inf - inf would turn the sum into NaN."""
    value -= lost
    added = total + value
    lost = (added - total) - value
    return added, tl.where(lost == lost, lost, 0.0)


@triton.jit
def _store_part(total, partial, part, n, entry, entry_mask, filters, entries):
    """partial[part, n, entry] = total."""
    row = (part.to(tl.int64) * filters + n[:, None]) * entries
    tl.store(partial + row + entry[None, :], total, mask=(n < filters)[:, None] & entry_mask[None, :])


@triton.jit(
    do_not_specialize=[
        "batch", "frames", "tiles_h", "tiles_w", "source_frames", "base_t", "base_h", "base_w", "parts",
        "kernel_t", "kernel_h", "kernel_w", "mul_t", "step_t", "step_h", "step_w",
    ]
)  # fmt: skip
def _wgrad_box_kernel(
    grad, source, partial, batch, frames, tiles_h, tiles_w, filters, channels, source_frames,
    base_t, base_h, base_w, parts, kernel_t, kernel_h, kernel_w, mul_t, step_t, step_h, step_w,
    CLAMP_LOWER: tl.constexpr, CLAMP_UPPER: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Programs: (block of filters, tap and block of channels, part). Positions come as boxes through descriptors."""
    taps = kernel_t * kernel_h * kernel_w
    n = tl.program_id(0) * BLOCK_N
    blocks_c = tl.cdiv(channels, BLOCK_C)
    tap = tl.program_id(1) // blocks_c
    c = (tl.program_id(1) - tap * blocks_c) * BLOCK_C
    kt, kh, kw = tap // (kernel_h * kernel_w), (tap // kernel_w) % kernel_h, tap % kernel_w
    first = base_t + kt * step_t
    begin, end = _frame_range(first, frames, source_frames, mul_t, CLAMP_LOWER, CLAMP_UPPER)
    boxes = batch * (end - begin) * tiles_h * tiles_w
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    part = tl.program_id(2)
    first_box, last_box = _share(boxes, part, parts)
    for i in range(first_box, last_box):
        tile_w = i % tiles_w
        rest = i // tiles_w
        tile_h = rest % tiles_h
        rest = rest // tiles_h
        o = begin + rest % (end - begin)
        b = rest // (end - begin)
        t = tl.minimum(tl.maximum(o * mul_t + first, 0), source_frames - 1)
        h, w = tile_h * BLOCK_H, tile_w * BLOCK_W
        g = tl.reshape(grad.load([b, o, h, w, n]), (BLOCK_H * BLOCK_W, BLOCK_N))
        s = tl.reshape(
            source.load([b, t, h + base_h + kh * step_h, w + base_w + kw * step_w, c]), (BLOCK_H * BLOCK_W, BLOCK_C)
        )
        total = product(tl.trans(g), s, total, UPCAST, PRECISION, WAIT)
    lane = c + tl.arange(0, BLOCK_C)
    rows = n + tl.arange(0, BLOCK_N)
    _store_part(total, partial, part, rows, tap * channels + lane, lane < channels, filters, taps * channels)


@triton.jit(
    do_not_specialize=[
        "batch",
        "frames",
        "height",
        "width",
        "source_frames",
        "source_height",
        "source_width",
        "base_t",
        "base_h",
        "base_w",
        "parts",
    ]
)
def _wgrad_pointer_kernel(
    grad, source, partial, batch, frames, height, width, filters, channels, source_frames, source_height, source_width,
    base_t, base_h, base_w, parts, g_batch, g_frame, g_height, g_width, s_batch, s_frame, s_height, s_width,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, MUL_T: tl.constexpr, MUL_H: tl.constexpr, MUL_W: tl.constexpr,
    STEP_T: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    CLAMP_LOWER: tl.constexpr, CLAMP_UPPER: tl.constexpr, REPLICATE_SPACE: tl.constexpr, FLAT: tl.constexpr, LONG: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As above with pointers. FLAT: few channels, a block holds channels of several taps (of one frame step each).

    In full float32 (PRECISION "ieee") the sum is compensated; elsewhere products round more than sums do.
    """
    space: tl.constexpr = KH * KW
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_C)
    # Columns of one program share their tap along time, so that one range of frames serves them all.
    blocks_c = tl.cdiv(space * channels if FLAT else channels, BLOCK_C)
    outer = tl.program_id(1) // blocks_c
    column = (tl.program_id(1) - outer * blocks_c) * BLOCK_C + lane
    if FLAT:
        kt = outer
        tap = (column // channels)[None, :]
        c = (column % channels)[None, :]
        inside = column < space * channels
        entry = kt * space * channels + column
    else:
        kt = outer // space
        tap = outer - kt * space
        c = column[None, :]
        inside = column < channels
        entry = outer * channels + column
    kh, kw = tap // KW, tap % KW
    first = base_t + kt * STEP_T
    begin, end = _frame_range(first, frames, source_frames, MUL_T, CLAMP_LOWER, CLAMP_UPPER)
    positions = batch * (end - begin) * height * width
    blocks = tl.cdiv(positions, BLOCK_M)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    lost = total
    part = tl.program_id(2)
    first_block, last_block = _share(blocks, part, parts)
    for i in range(first_block, last_block):
        m = i * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = m < positions
        b, o, h, w = decode_positions(m, end - begin, height, width)
        o += begin
        t = tl.minimum(tl.maximum(o * MUL_T + first, 0), source_frames - 1)
        if LONG:
            b, o, h, w = b.to(tl.int64), o.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
        row = b * g_batch + o * g_frame + h * g_height + w * g_width
        g = tl.load(grad + row[None, :] + n[:, None], mask=mask[None, :] & (n < filters)[:, None], other=0.0)
        s = load_positions(
            source, source, b[:, None], t[:, None], h[:, None] * MUL_H + base_h + kh * STEP_H,
            w[:, None] * MUL_W + base_w + kw * STEP_W, c, mask[:, None] & inside[None, :],
            source_frames, 0, source_height, source_width, s_batch, s_frame, s_height, s_width, 0, 0, 0, 0,
            False, REPLICATE_SPACE, False, LONG,
        )  # fmt: skip
        if PRECISION == "ieee":
            total, lost = _add_compensated(total, lost, _short_chains(g, s, BLOCK_N, BLOCK_M, BLOCK_C))
        else:
            total = product(g, s, total, UPCAST, PRECISION, False)
    _store_part(total, partial, part, n, entry, inside, filters, KT * space * channels)
