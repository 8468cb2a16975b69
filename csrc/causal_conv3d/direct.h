// SPDX-License-Identifier: Apache-2.0
// Any convolution as matrix products over strips of output pixels, of one frame or of several small ones: per tap (or
// few taps, if channels are few) the strip's input pixels are the rows of A, gathered into scratch, where padding
// becomes zeros or copies. Rows that lie in place one after the other (pointwise and temporal kernels whose operands
// are stored ones) are read where they are, which takes 0.95 to 0.97 of the time. E is the operand of the products
// (matrix.h): float32, float64, or pairs of bfloat16.
#pragma once

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

  explicit Direct(const CausalConv3dParams& p)
      : p_(p),
        area_(p.kernel[1] * p.kernel[2]),
        taps_(p.kernel[0] * area_),
        taps_per_panel_(std::max<int64_t>(1, std::min(taps_, kTerms * kDepthBlock / p.channels))),
        pixels_(p.out_size[1] * p.out_size[2]),
        frames_(std::clamp<int64_t>(kMostRows / pixels_, 1, p.out_size[0])),
        groups_((p.out_size[0] + frames_ - 1) / frames_),
        strips_((pixels_ + kMostRows - 1) / kMostRows),
        padded_(round_up(p.filters, L)),
        row_((round_up(taps_per_panel_ * p.channels, kTerms * L) + kTerms * L) / kTerms),
        weights_(direct_panels<E>(p, taps_per_panel_).size()),
        bias_(padded_),
        filters_(p.filters, filters_at_once(), PanelLayout<A>::kWide) {
    pack_direct<E>(p, taps_per_panel_, weights_.get());
    read_bias<A>(p, bias_.get());
  }

  void run() const {
    const int64_t most = std::min(kMostRows, frames_ * pixels_);
    parallel_for(0, p_.batch * groups_ * strips_ * filters_.count, 1, [&](int64_t begin, int64_t end) {
      const Scratch<E> rows(most * row_);
      const Scratch<A> sums(most * padded_);
      for (int64_t item = begin; item < end; ++item) run_strip(strip_at(item), rows.get(), sums.get());
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
    const int64_t strips = p_.batch * groups_ * strips_, parts = (kItems + strips - 1) / strips;
    return std::max((p_.filters + parts - 1) / parts, std::min<int64_t>(p_.filters, 4 * PanelLayout<A>::kWide));
  }

  Frame<S> frame_of(int64_t b, int64_t t, int64_t tap) const {
    return frame_at<S>(p_, b, t * p_.stride[0] - p_.before[0] + tap / area_ * p_.dilation[0]);
  }

  // Whether any of these taps lies on a frame that is not zero.
  bool reads(const Strip& strip, int64_t tap, int64_t taps) const {
    for (int64_t t = 0; t < strip.frames; ++t) {
      for (int64_t i = tap / area_ * area_; i < tap + taps; i += area_) {
        if (frame_of(strip.b, strip.t + t, i).data != nullptr) return true;
      }
    }
    return false;
  }

  void run_strip(const Strip& strip, E* rows, A* sums) const {
    const DirectPanels<E> panels = direct_panels<E>(p_, taps_per_panel_);
    const int64_t count = strip.frames * strip.count;
    bool empty = true;
    for (int64_t tap = 0; tap < taps_; tap += taps_per_panel_) {
      const int64_t taps = std::min(taps_per_panel_, taps_ - tap);
      if (!reads(strip, tap, taps)) continue;
      const Rows in_place = rows_in_place(strip, tap, taps);
      for (int64_t t = 0; t < strip.frames && in_place.data == nullptr; ++t) {
        Cell* to = reinterpret_cast<Cell*>(rows + t * strip.count * row_);
        gather(strip.b, strip.t + t, tap, taps, strip.first, strip.count, to);
      }
      const Rows from = in_place.data == nullptr ? Rows{rows, row_} : in_place;
      multiply<E>(from.data, from.stride, count, weights_.get() + panels.first(tap), panels.layout(tap), sums, padded_,
                  empty, ahead_of(strip, tap), strip.begin, strip.end);
      empty = false;
    }
    if (empty) std::memset(sums, 0, count * padded_ * sizeof(A));
    for (int64_t t = 0; t < strip.frames; ++t) write(strip, strip.t + t, sums + t * strip.count * padded_);
  }

  struct Rows {
    const E* data;
    int64_t stride;
  };

  // A strip's pixels as rows of a matrix, or null where they have to be gathered.
  Rows rows_in_place(const Strip& strip, int64_t tap, int64_t taps) const {
    if constexpr (std::is_same_v<Cell, S>) {
      const Frame<S> frame = frame_of(strip.b, strip.t, tap);
      const bool even = p_.channels % kTerms == 0 && frame.column % kTerms == 0;
      const bool whole = even && taps == 1 && strip.frames == 1 && area_ == 1 && p_.before[1] == 0 &&
                         p_.before[2] == 0 && p_.stride[1] == 1 && p_.stride[2] == 1 &&
                         p_.in_size[1] >= p_.out_size[1] && p_.in_size[2] == p_.out_size[2];
      // Rows 2 KiB apart fall into two sets of cache lines.
      const bool spread = frame.column * static_cast<int64_t>(sizeof(S)) < 2048;
      if (whole && spread && frame.row == p_.in_size[2] * frame.column)
        return {reinterpret_cast<const E*>(frame.data + strip.first * frame.column), frame.column / kTerms};
    }
    return {nullptr, 0};
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
