# SPDX-License-Identifier: Apache-2.0
"""Correlation of a video with taps: the one computation behind the forward and the data gradient of a convolution.

y[b, n, o] = epilogue(sum over taps k and channels r of source[b, r, o * MUL + base + k * STEP] * weight[n, k, r])

with o, k and the coordinates over (t, h, w). Frames below 0 are those of `history`, then padding; nothing padded is
ever in memory. Two kernels: boxes through tensor descriptors (a tap is the same box shifted by (t, h, w), and what lies
outside reads as zero), and pointers, for strides in space, clamped coordinates, few channels and GPUs without such copies.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _epilogue(
    total, bias, residual, y, y_row, r_row, n, row_mask, filters,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y = residual + act(total + bias) for rows of positions and columns of filters."""
    mask = row_mask[:, None] & (n < filters)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < filters, other=0.0).to(tl.float32)[None, :]
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    if HAS_RESIDUAL:
        total += tl.load(residual + (r_row[:, None] + n[None, :]), mask=mask, other=0.0).to(tl.float32)
    tl.store(y + (y_row[:, None] + n[None, :]), total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _store_tile(
    total, bias, residual, y, y_row, r_row, n, row_mask, filters, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    SILU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """The epilogue of BLOCK_N filters from n on, perhaps half by half."""
    if HALVES:
        left, right = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        n += tl.arange(0, BLOCK_N // 2)
        _epilogue(left, bias, residual, y, y_row, r_row, n, row_mask, filters, HAS_BIAS, HAS_RESIDUAL, SILU)
        n += BLOCK_N // 2
        _epilogue(right, bias, residual, y, y_row, r_row, n, row_mask, filters, HAS_BIAS, HAS_RESIDUAL, SILU)
    else:
        n += tl.arange(0, BLOCK_N)
        _epilogue(total, bias, residual, y, y_row, r_row, n, row_mask, filters, HAS_BIAS, HAS_RESIDUAL, SILU)


@triton.jit
def product(a, b, total, UPCAST: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr):
    """total + a @ b. UPCAST: Triton's interpreter multiplies the bit patterns of bfloat16.

    WAIT, where `a` lies in registers on sm_90: Triton 3.6 leaves three products unfinished at the end of a step, and the
    next step's loads overwrite the registers that they still read (triton-lang/triton issue 9433). An H100 was off by 0.18
    on results up to 5 where two programs shared a multiprocessor. Reading the sums makes the compiler wait for them.
    """
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    total = tl.dot(a, b, total, input_precision=PRECISION)
    if WAIT:
        total = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [total], dtype=tl.float32, is_pure=True, pack=1)
    return total


@triton.jit
def _add_product(
    boxes, filters, total, TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr
):
    """total + boxes [M, C] @ filters [N, C]^T, or its transpose, since a reshaped second operand may stay in shared memory."""
    if TRANSPOSED:
        total = product(filters, tl.trans(boxes), total, UPCAST, PRECISION, WAIT)
    else:
        total = product(boxes, tl.trans(filters), total, UPCAST, PRECISION, WAIT)
    return total


@triton.jit
def _sum_boxes(
    total, total2, source, weight, weight2, b, t, h, w, n, last_frame, first_tap, last_tap, channels,
    kernel_h, kernel_w, step_t, step_h, step_w,
    REPLICATE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_N2: tl.constexpr, BLOCK_C: tl.constexpr, TRANSPOSED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Adds the taps [first_tap, last_tap) along time, all taps in space and all channels, as one pipelined loop.

    `total2` is the sum of the next BLOCK_N2 filters over the same boxes, if that is not 0.
    """
    # Counters, since quotients of the step by sizes known at run time cost a hundred instructions.
    taps = kernel_h * kernel_w
    tap = first_tap * taps
    t += first_tap * step_t
    end_h, end_w = h + kernel_h * step_h, w + kernel_w * step_w
    at_h, at_w, c = h + 0, w + 0, tap * 0
    for _step in range(0, (last_tap - first_tap) * taps * tl.cdiv(channels, BLOCK_C)):
        frame = t
        if REPLICATE:
            frame = tl.minimum(tl.maximum(frame, 0), last_frame)
        a = tl.reshape(source.load([b, frame, at_h, at_w, c]), (BLOCK_H * BLOCK_W, BLOCK_C))
        f = tl.reshape(weight.load([tap, n, c]), (BLOCK_N, BLOCK_C))
        total = _add_product(a, f, total, TRANSPOSED, UPCAST, PRECISION, WAIT)
        if BLOCK_N2:
            f = tl.reshape(weight2.load([tap, n + BLOCK_N, c]), (BLOCK_N2, BLOCK_C))
            total2 = _add_product(a, f, total2, TRANSPOSED, UPCAST, PRECISION, WAIT)
        c += BLOCK_C
        turn_w = c >= channels
        c = tl.where(turn_w, 0, c)
        tap = tl.where(turn_w, tap + 1, tap)
        at_w = tl.where(turn_w, at_w + step_w, at_w)
        turn_h = turn_w & (at_w == end_w)
        at_w = tl.where(turn_h, w, at_w)
        at_h = tl.where(turn_h, at_h + step_h, at_h)
        turn_t = turn_h & (at_h == end_h)
        at_h = tl.where(turn_t, h, at_h)
        t = tl.where(turn_t, t + step_t, t)
    return total, total2


@triton.jit
def _zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    return tl.zeros((BLOCK_N, BLOCK_M) if TRANSPOSED else (BLOCK_M, BLOCK_N), tl.float32)


# Sizes that differ from clip to clip, layer to layer and phase to phase: Triton would compile the kernel again where one of
# them is 1 or a multiple of 16. A Wan VAE took 69 compilations of a second or more for its first clip, 78 for the next.
@triton.jit(
    do_not_specialize=[
        "group", "frames", "height", "width", "tiles_h", "tiles_w", "channels", "source_frames", "history_frames",
        "base_t", "base_h", "base_w", "kernel_t", "kernel_h", "kernel_w", "mul_t", "step_t", "step_h", "step_w",
    ]
)  # fmt: skip
def _conv_box_kernel(
    source, history, weight, weight2, bias, residual, y, group, frames, height, width, tiles_h, tiles_w, filters, channels,
    source_frames, history_frames, base_t, base_h, base_w,
    y_batch: tl.int64, y_frame: tl.int64, y_height, y_width, r_batch: tl.int64, r_frame: tl.int64, r_height, r_width,
    kernel_t, kernel_h, kernel_w, mul_t, step_t, step_h, step_w, REPLICATE: tl.constexpr,
    HAS_HISTORY: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SILU: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_N2: tl.constexpr, BLOCK_C: tl.constexpr, TRANSPOSED: tl.constexpr, HALVES: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """One box of BLOCK_H x BLOCK_W positions of one frame, BLOCK_N + BLOCK_N2 filters: two powers of two, as tiles must be,
    for 160 and 192 of them. `weight2` describes boxes of BLOCK_N2 filters.

    Programs of one box are neighbours. `group` rows of boxes pass through all frames before the next rows do: what the taps
    along time share stays in L2. Whole frames would not: three of 128 channels of 256 x 256 are 50 MB, all there is.
    """
    blocks_n = tl.cdiv(filters, BLOCK_N + BLOCK_N2)
    tile = tl.program_id(0) // blocks_n
    n = (tl.program_id(0) - tile * blocks_n) * (BLOCK_N + BLOCK_N2)
    tile_w = tile % tiles_w
    tile = tile // tiles_w
    b = tile // (tiles_h * frames)
    tile -= b * (tiles_h * frames)
    first = tile // (group * frames) * group
    tile -= first * frames
    rows = tl.minimum(tiles_h - first, group)
    o = tile // rows
    tile_h = first + tile - o * rows
    h0, w0, t = tile_h * BLOCK_H, tile_w * BLOCK_W, o * mul_t + base_t
    total = _zeros(BLOCK_H * BLOCK_W, BLOCK_N, TRANSPOSED)
    total2 = _zeros(BLOCK_H * BLOCK_W, BLOCK_N2 if BLOCK_N2 else 1, TRANSPOSED)
    # Taps on frames before the source come first or last, as time runs forwards (forward) or backwards (gradient).
    split = 0
    if HAS_HISTORY:
        split = tl.minimum(tl.maximum((step_t - 1 - t) // step_t, 0), kernel_t)
        total, total2 = _sum_boxes(
            total, total2, history, weight, weight2, b, t + history_frames, h0 + base_h, w0 + base_w, n, history_frames - 1, 0, split,
            channels, kernel_h, kernel_w, step_t, step_h, step_w,
            REPLICATE, BLOCK_H, BLOCK_W, BLOCK_N, BLOCK_N2, BLOCK_C, TRANSPOSED, UPCAST, PRECISION, WAIT,
        )  # fmt: skip
    total, total2 = _sum_boxes(
        total, total2, source, weight, weight2, b, t, h0 + base_h, w0 + base_w, n, source_frames - 1, split, kernel_t,
        channels, kernel_h, kernel_w, step_t, step_h, step_w,
        REPLICATE, BLOCK_H, BLOCK_W, BLOCK_N, BLOCK_N2, BLOCK_C, TRANSPOSED, UPCAST, PRECISION, WAIT,
    )  # fmt: skip
    # 64-bit offsets end at the frame: one for every element would not leave the sums their registers.
    b, o = b.to(tl.int64), o.to(tl.int64)
    y += b * y_batch + o * y_frame
    residual += b * r_batch + o * r_frame
    row = tl.arange(0, BLOCK_H * BLOCK_W)
    h, w = h0 + row // BLOCK_W, w0 + row % BLOCK_W
    y_row, r_row, mask = h * y_height + w * y_width, h * r_height + w * r_width, (h < height) & (w < width)
    if TRANSPOSED:
        total = tl.trans(total)
        total2 = tl.trans(total2)
    _store_tile(
        total, bias, residual, y, y_row, r_row, n, mask, filters, HAS_BIAS, HAS_RESIDUAL, SILU,
        BLOCK_H * BLOCK_W, BLOCK_N, HALVES,
    )  # fmt: skip
    if BLOCK_N2:
        _store_tile(
            total2, bias, residual, y, y_row, r_row, n + BLOCK_N, mask, filters, HAS_BIAS, HAS_RESIDUAL, SILU,
            BLOCK_H * BLOCK_W, BLOCK_N2, False,
        )  # fmt: skip


@triton.jit
def load_positions(
    source, history, b, t, h, w, c, mask, source_frames, history_frames, source_height, source_width,
    s_batch, s_frame, s_height, s_width, p_batch, p_frame, p_height, p_width,
    REPLICATE: tl.constexpr, REPLICATE_SPACE: tl.constexpr, HAS_HISTORY: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Channels c of positions (b, t, h, w), all of one shape that broadcasts; t < 0 reads history. LONG: 64-bit offsets."""
    if REPLICATE_SPACE:
        h = tl.minimum(tl.maximum(h, 0), source_height - 1)
        w = tl.minimum(tl.maximum(w, 0), source_width - 1)
    else:
        mask = mask & (h >= 0) & (h < source_height) & (w >= 0) & (w < source_width)
    own = mask
    frame = t
    if REPLICATE:
        frame = tl.minimum(tl.maximum(t, 0), source_frames - 1)
        if HAS_HISTORY:
            own = mask & (t >= 0)
    else:
        own = mask & (t >= 0) & (t < source_frames)
    if LONG:
        b, frame, h, w = b.to(tl.int64), frame.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    value = tl.load(source + (b * s_batch + frame * s_frame + h * s_height + w * s_width + c), mask=own, other=0.0)
    if HAS_HISTORY:
        past = t + history_frames
        older = mask & (t < 0)
        if REPLICATE:
            past = tl.maximum(past, 0)
        else:
            older = older & (past >= 0)
        if LONG:
            past = past.to(tl.int64)
        offset = b * p_batch + past * p_frame + h * p_height + w * p_width + c
        value += tl.load(history + offset, mask=older, other=0.0)
    return value


@triton.jit
def decode_positions(m, frames, height, width):
    """(b, t, h, w) of flat positions, in row-major order."""
    rest = m // width
    w = m - rest * width
    row = rest // height
    h = rest - row * height
    b = row // frames
    return b, row - b * frames, h, w


@triton.jit(
    do_not_specialize=[
        "positions",
        "frames",
        "height",
        "width",
        "source_frames",
        "history_frames",
        "source_height",
        "source_width",
        "base_t",
        "base_h",
        "base_w",
    ]
)
def _conv_pointer_kernel(
    source, history, weight, bias, residual, y, positions, frames, height, width, filters, channels,
    source_frames, history_frames, source_height, source_width, base_t, base_h, base_w,
    s_batch, s_frame, s_height, s_width, p_batch, p_frame, p_height, p_width,
    y_batch, y_frame, y_height, y_width, r_batch, r_frame, r_height, r_width,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, MUL_T: tl.constexpr, MUL_H: tl.constexpr, MUL_W: tl.constexpr,
    STEP_T: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    REPLICATE: tl.constexpr, REPLICATE_SPACE: tl.constexpr, HAS_HISTORY: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SILU: tl.constexpr, FLAT: tl.constexpr, LONG: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M positions of any frames, BLOCK_N filters. FLAT: few channels, taps and channels are one axis of the sum."""
    blocks_n = tl.cdiv(filters, BLOCK_N)
    tile = tl.program_id(0) // blocks_n
    n = (tl.program_id(0) - tile * blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = m < positions
    b, o_t, o_h, o_w = decode_positions(m, frames, height, width)
    t, h, w = o_t * MUL_T + base_t, o_h * MUL_H + base_h, o_w * MUL_W + base_w
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    taps: tl.constexpr = KT * KH * KW
    lane = tl.arange(0, BLOCK_C)
    weight_row = weight + n[None, :] * (taps * channels)
    blocks = tl.cdiv(taps * channels, BLOCK_C) if FLAT else taps * tl.cdiv(channels, BLOCK_C)
    for i in range(0, blocks):
        if FLAT:
            entry = i * BLOCK_C + lane
            inside = entry < taps * channels
            tap = (entry // channels)[None, :]
            c = (entry % channels)[None, :]
        else:
            tap = i // tl.cdiv(channels, BLOCK_C)
            c = (i - tap * tl.cdiv(channels, BLOCK_C)) * BLOCK_C + lane
            entry = tap * channels + c
            inside = c < channels
            c = c[None, :]
        kt = tap // (KH * KW)
        kh = (tap // KW) % KH
        kw = tap % KW
        a = load_positions(
            source, history, b[:, None], t[:, None] + kt * STEP_T, h[:, None] + kh * STEP_H, w[:, None] + kw * STEP_W, c,
            row_mask[:, None] & inside[None, :], source_frames, history_frames, source_height, source_width,
            s_batch, s_frame, s_height, s_width, p_batch, p_frame, p_height, p_width,
            REPLICATE, REPLICATE_SPACE, HAS_HISTORY, LONG,
        )  # fmt: skip
        f = tl.load(weight_row + entry[:, None], mask=inside[:, None] & (n < filters)[None, :], other=0.0)
        total = product(a, f, total, UPCAST, PRECISION, WAIT)
    if LONG:
        b, o_t, o_h, o_w = b.to(tl.int64), o_t.to(tl.int64), o_h.to(tl.int64), o_w.to(tl.int64)
    y_row = b * y_batch + o_t * y_frame + o_h * y_height + o_w * y_width
    r_row = b * r_batch + o_t * r_frame + o_h * r_height + o_w * r_width
    _epilogue(total, bias, residual, y, y_row, r_row, n, row_mask, filters, HAS_BIAS, HAS_RESIDUAL, SILU)
