// SPDX-License-Identifier: Apache-2.0
// Any convolution as matrix products over strips of output pixels, of one frame or of several small ones: per tap (or
// few taps, if channels are few) the strip's input pixels are the rows of A. Where operands are stored ones they are
// read where they are, row by row of the image, and pixels of zeros are left out: 0.84 of the products of 3x3 taps on 8
// x 8 pixels. Otherwise they are gathered into scratch, where padding becomes zeros or copies. E is the operand of the
// products (matrix.h): float32, float64, or pairs of bfloat16.
#pragma once

#include <vector>

#include "causal_conv3d/source.h"
#include "causal_conv3d/weights.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

template <typename S, typename E = accumulate_t<S>>
class Direct {
 public:
  using A = accumulate_t<S>;
  using Cell = cell_of<E>;
  static constexpr int64_t L = kLanes<A>, kTerms = Operand<E>::kTerms;
  static constexpr bool kStored = std::is_same_v<Cell, S>;  // memory holds the operands

  explicit Direct(const CausalConv3dParams& p)
      : p_(p),
        area_(p.kernel[1] * p.kernel[2]),
        taps_(p.kernel[0] * area_),
        taps_per_panel_(taps_at_once(p)),
        pixels_(p.out_size[1] * p.out_size[2]),
        frames_(std::clamp<int64_t>(kMostRows / pixels_, 1, p.out_size[0])),
        groups_((p.out_size[0] + frames_ - 1) / frames_),
        strips_((pixels_ + kMostRows - 1) / kMostRows),
        padded_(round_up(p.filters, L)),
        row_((round_up(taps_per_panel_ * p.channels, kTerms * L) + kTerms * L) / kTerms),
        weights_(direct_panels<E>(p, taps_per_panel_).size()),
        bias_(padded_),
        filters_(p.filters, filters_at_once(), PanelLayout<A>::kWide) {
    pack_direct<E>(p, direct_panels<E>(p, taps_per_panel_), weights_.get());
    read_bias<A>(p, bias_.get());
  }

  void run() const {
    const int64_t most = std::min(kMostRows, frames_ * pixels_);
    parallel_for(0, p_.batch * groups_ * strips_ * filters_.count, 1, [&](int64_t begin, int64_t end) {
      const Scratch<E> rows(most * row_);
      const Scratch<A> sums(most * padded_);
      std::vector<MatrixRows<E>> runs, tiles;
      for (int64_t item = begin; item < end; ++item) run_strip(strip_at(item), rows.get(), sums.get(), runs, tiles);
    });
  }

 private:
  static constexpr int64_t kMostRows = kTerms * kRowsAtOnce;
  static constexpr int64_t kItems = 8;  // wanted at least, so that threads get equal shares

  // `count` pixels from `first` on of each of some frames, and the filters [begin, end).
  struct Strip {
    int64_t b, t, frames, first, count, begin, end;
  };
  Strip strip_at(int64_t item) const {
    const int64_t part = item % filters_.count, strip = item / filters_.count % strips_;
    const int64_t group = item / filters_.count / strips_ % groups_, b = item / filters_.count / strips_ / groups_;
    const int64_t t = group * p_.out_size[0] / groups_, first = strip * pixels_ / strips_;
    return {b,
            t,
            (group + 1) * p_.out_size[0] / groups_ - t,
            first,
            (strip + 1) * pixels_ / strips_ - first,
            filters_.first(part),
            filters_.first(part) + round_up(filters_.length(part), L)};
  }

  // All of them, unless there are too few strips: 5 frames of 4 x 4 pixels are one.
  int64_t filters_at_once() const {
    const int64_t strips = p_.batch * groups_ * strips_;
    const int64_t parts = strips % max_threads() == 0 ? 1 : (kItems + strips - 1) / strips;
    return std::max((p_.filters + parts - 1) / parts, std::min<int64_t>(p_.filters, 4 * PanelLayout<A>::kWide));
  }

  Frame<S> frame_of(int64_t b, int64_t t, int64_t tap) const {
    return frame_at<S>(p_, b, t * p_.stride[0] - p_.before[0] + tap / area_ * p_.dilation[0]);
  }

  // Taps whose channels fill half a block of the depth are read in place, one by one.
  static int64_t taps_at_once(const CausalConv3dParams& p) {
    const int64_t channels = kStored && 2 * p.channels >= kTerms * kDepthBlock ? kTerms * kDepthBlock : p.channels;
    return std::max<int64_t>(1, std::min(p.kernel[0] * p.kernel[1] * p.kernel[2], kTerms * kDepthBlock / channels));
  }

  void run_strip(const Strip& strip, E* rows, A* sums, std::vector<MatrixRows<E>>& runs,
                 std::vector<MatrixRows<E>>& tiles) const {
    const DirectPanels<E> panels = direct_panels<E>(p_, taps_per_panel_);
    const int64_t count = strip.frames * strip.count;
    bool empty = true;
    for (int64_t tap = 0; tap < taps_; tap += taps_per_panel_) {
      const int64_t taps = std::min(taps_per_panel_, taps_ - tap);
      runs.clear();
      for (int64_t t = 0; t < strip.frames; ++t) {
        append_frame(strip, t, tap, taps, rows + t * strip.count * row_, sums + t * strip.count * padded_, runs);
      }
      tiles.clear();
      int64_t covered = 0;
      for (const MatrixRows<E>& run : runs) {
        covered += run.count;
        for (int64_t i = 0; i < tiles_for(run.count); ++i) tiles.push_back(tile_of(run, i, tiles_for(run.count)));
      }
      if (covered == 0) continue;
      if (empty && covered < count) std::memset(sums, 0, count * padded_ * sizeof(A));
      const auto tile = [&](int64_t i) { return tiles[i]; };
      multiply_tiles<E>(tile, static_cast<int64_t>(tiles.size()), weights_.get() + panels.first(tap),
                        panels.layout(tap), empty && covered == count, ahead_of(strip, tap), strip.begin, strip.end);
      empty = false;
    }
    if (empty) std::memset(sums, 0, count * padded_ * sizeof(A));
    for (int64_t t = 0; t < strip.frames; ++t) write(strip, strip.t + t, sums + t * strip.count * padded_);
  }

  // The rows of A that some taps read on one frame of the strip.
  void append_frame(const Strip& strip, int64_t t, int64_t tap, int64_t taps, E* rows, A* sums,
                    std::vector<MatrixRows<E>>& runs) const {
    const Frame<S> frame = frame_of(strip.b, strip.t + t, tap);
    if constexpr (kStored) {
      if (taps == 1) {
        if (frame.data == nullptr) return;
        if (in_place(frame)) return append_pixels(frame, tap, strip.first, strip.count, sums, runs);
      }
    }
    bool zeros = true;
    for (int64_t i = tap / area_ * area_; i < tap + taps; i += area_) {
      zeros = zeros && frame_of(strip.b, strip.t + t, i).data == nullptr;
    }
    if (zeros) return;
    gather(strip.b, strip.t + t, tap, taps, strip.first, strip.count, reinterpret_cast<Cell*>(rows));
    append_row({rows, row_, sums, padded_, strip.count}, runs.size(), runs);
  }

  // Rows 2 KiB apart fall into two sets of cache lines.
  bool in_place(const Frame<S>& frame) const {
    const bool even = p_.channels % kTerms == 0 && frame.column % kTerms == 0 && frame.row % kTerms == 0;
    return even && p_.stride[2] * frame.column * static_cast<int64_t>(sizeof(S)) < 2048;
  }

  // The pixels that one tap reads, where they are; those of zeros are left out.
  void append_pixels(const Frame<S>& frame, int64_t tap, int64_t first, int64_t count, A* sums,
                     std::vector<MatrixRows<E>>& runs) const {
    const int64_t width = p_.out_size[2], height = p_.in_size[1], step = p_.stride[2], last = p_.in_size[2] - 1;
    const int64_t row = tap / p_.kernel[2] % p_.kernel[1] * p_.dilation[1] - p_.before[1];
    const int64_t column = tap % p_.kernel[2] * p_.dilation[2] - p_.before[2];
    // Columns [inside, outside) of the result read columns of the frame.
    const int64_t inside = std::clamp<int64_t>(column < 0 ? (step - 1 - column) / step : 0, 0, width);
    const int64_t outside = column > last ? inside : std::clamp((last - column) / step + 1, inside, width);
    const size_t frame_runs = runs.size();
    const auto append = [&](int64_t y, int64_t x, int64_t end, int64_t w, int64_t lda) __attribute__((always_inline)) {
      x = std::max(x, first - y * width), end = std::min(end, first + count - y * width);
      int64_t h = y * p_.stride[1] + row;
      if (x >= end || ((h < 0 || h >= height) && !p_.replicate_space)) return;
      h = std::clamp<int64_t>(h, 0, height - 1);
      const S* from = frame.data + h * frame.row + (w < 0 ? x * step + column : w) * frame.column;
      A* to = sums + (y * width + x - first) * padded_;
      append_row({reinterpret_cast<const E*>(from), lda, to, padded_, end - x}, frame_runs, runs);
    };
    const int64_t top = first / width, bottom = (first + count - 1) / width + 1;
    for (int64_t y = top; y < bottom; ++y) append(y, inside, outside, -1, step * frame.column / kTerms);
    if (!p_.replicate_space) return;
    for (int64_t x = 0; x < width; ++x) {  // columns beyond the borders: pixels below each other
      if (x == inside) x = outside;
      if (x >= width) break;
      for (int64_t y = top; y < bottom; ++y) append(y, x, x + 1, x < inside ? 0 : last, 0);
    }
  }

  // Joined with the run before where distances agree; single rows only with others of their frame, whose runs begin at
  // `frame`.
  static void append_row(const MatrixRows<E>& rows, size_t frame, std::vector<MatrixRows<E>>& runs) {
    if (!runs.empty()) {
      MatrixRows<E>& run = runs.back();
      const auto address = [](const E* at) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(at)); };
      const int64_t bytes = address(rows.a) - address(run.a + (run.count - 1) * run.lda);
      const int64_t a = bytes / static_cast<int64_t>(sizeof(E)), c = rows.c - (run.c + (run.count - 1) * run.ldc);
      const bool whole = bytes % static_cast<int64_t>(sizeof(E)) == 0;
      const bool follows = run.count == 1 ? runs.size() > frame : a == run.lda && c == run.ldc;
      if (whole && follows && (rows.count == 1 || (a == rows.lda && c == rows.ldc))) {
        run = {run.a, a, run.c, c, run.count + rows.count};
        return;
      }
    }
    runs.push_back(rows);
  }

  // Pointwise and temporal kernels: the next strip's pixels of this frame, and what this strip writes after its last
  // tap.
  Ahead ahead_of(const Strip& strip, int64_t tap) const {
    Ahead ahead;
    const int64_t b = strip.b, t = strip.t, first = strip.first, count = strip.count;
    const Frame<S> frame = frame_of(b, t, tap);
    const int64_t next = first + count, width = p_.out_size[2];
    if (area_ != 1 || frame.data == nullptr || next + count > pixels_) return ahead;
    const S* from = frame.data + next / width * p_.stride[1] * frame.row + next % width * p_.stride[2] * frame.column;
    ahead.read = reinterpret_cast<const char*>(from);
    ahead.read_bytes = count * p_.channels * static_cast<int64_t>(sizeof(S));
    if (tap + 1 == taps_) {
      const int64_t y = Epilogue<S>(p_, bias_.get()).y_offset(b, t, first / width, first % width);
      ahead.write = reinterpret_cast<const char*>(static_cast<const S*>(p_.y) + y);
      ahead.write_bytes = count * p_.filters * static_cast<int64_t>(sizeof(S));
    }
    return ahead;
  }

  void gather(int64_t b, int64_t t, int64_t tap, int64_t taps, int64_t first, int64_t count, Cell* rows) const {
    for (int64_t i = 0, run; i < taps; i += run) {
      const int64_t row = (tap + i) / p_.kernel[2] % p_.kernel[1] * p_.dilation[1] - p_.before[1];
      const int64_t column = (tap + i) % p_.kernel[2] * p_.dilation[2] - p_.before[2];
      run = std::min(p_.kernel[2] - (tap + i) % p_.kernel[2], taps - i);
      gather_run(frame_of(b, t, tap + i), row, column, run, first, count, rows + i * p_.channels);
    }
  }

  // Taps side by side, which read pixels side by side: one copy where these are next to each other in memory.
  void gather_run(const Frame<S>& frame, int64_t row, int64_t column, int64_t run, int64_t first, int64_t count,
                  Cell* rows) const {
    const int64_t width = p_.out_size[2], reach = (run - 1) * p_.dilation[2];
    const bool adjacent = frame.data != nullptr && (run == 1 || reach * frame.column == (run - 1) * p_.channels);
    int64_t y = first / width, x = first % width;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t h = y * p_.stride[1] + row, w = x * p_.stride[2] + column;
      Cell* to = rows + n * row_ * kTerms;
      if (adjacent && h >= 0 && h < p_.in_size[1] && w >= 0 && w + reach < p_.in_size[2]) {
        copy_values(frame.data + h * frame.row + w * frame.column, run * p_.channels, to);
      } else {
        for (int64_t i = 0; i < run; ++i) {
          const S* pixel = frame.data == nullptr ? nullptr : pixel_at(p_, frame, h, w + i * p_.dilation[2]);
          copy_values(pixel, p_.channels, to + i * p_.channels);
        }
      }
      if (++x == width) x = 0, ++y;
    }
  }

  void write(const Strip& strip, int64_t t, const A* sums) const {
    const Epilogue<S> epilogue(p_, bias_.get());
    for (int64_t n = 0; n < strip.count; ++n) {
      const int64_t h = (strip.first + n) / p_.out_size[2], w = (strip.first + n) % p_.out_size[2];
      const int64_t y = epilogue.y_offset(strip.b, t, h, w), residual = epilogue.residual_offset(strip.b, t, h, w);
      for (int64_t f = strip.begin; f < strip.end; f += L) {
        epilogue.store(y, residual, f, load_vec(sums + n * padded_ + f));
      }
    }
  }

  const CausalConv3dParams& p_;
  const int64_t area_, taps_, taps_per_panel_, pixels_, frames_, groups_, strips_, padded_, row_;
  const Scratch<E> weights_;
  const Scratch<A> bias_;
  const Blocks filters_;
};

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
