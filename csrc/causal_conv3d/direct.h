// SPDX-License-Identifier: Apache-2.0
// Any convolution as matrix products over strips of output pixels: per tap (or few taps, if channels are few) the
// strip's input pixels are the rows of A, gathered into scratch, where padding becomes zeros or copies. Rows that lie
// in place one after the other (pointwise and temporal kernels in the accumulation type) are read where they are, which
// takes 0.95 to 0.97 of the time.
#pragma once

#include "causal_conv3d/source.h"
#include "causal_conv3d/weights.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

template <typename S>
class Direct {
 public:
  using A = accumulate_t<S>;
  static constexpr int64_t L = kLanes<A>;

  explicit Direct(const CausalConv3dParams& p)
      : p_(p),
        area_(p.kernel[1] * p.kernel[2]),
        taps_(p.kernel[0] * area_),
        taps_per_panel_(std::max<int64_t>(1, std::min(taps_, kDepthBlock / p.channels))),
        pixels_(p.out_size[1] * p.out_size[2]),
        strips_((pixels_ + kRowsAtOnce - 1) / kRowsAtOnce),
        padded_(round_up(p.filters, L)),
        row_(round_up(taps_per_panel_ * p.channels, L) + L),
        weights_(taps_ * p.channels * padded_),
        bias_(padded_) {
    VK_DISPATCH_FLOATING(p.weight_dtype, ([&] { pack_direct<A, scalar_t>(p, taps_per_panel_, weights_.get()); }));
    read_bias<A>(p, bias_.get());
  }

  void run() const {
    const int64_t most = std::min(kRowsAtOnce, pixels_);
    parallel_for(0, p_.batch * p_.out_size[0] * strips_, 1, [&](int64_t begin, int64_t end) {
      const Scratch<A> rows(most * row_), sums(most * padded_);
      for (int64_t item = begin; item < end; ++item) run_strip(item, rows.get(), sums.get());
    });
  }

 private:
  Frame<S> frame_of(int64_t b, int64_t t, int64_t tap) const {
    return frame_at<S>(p_, b, t * p_.stride[0] - p_.before[0] + tap / area_ * p_.dilation[0]);
  }

  void run_strip(int64_t item, A* rows, A* sums) const {
    const int64_t strip = item % strips_, t = item / strips_ % p_.out_size[0], b = item / strips_ / p_.out_size[0];
    const int64_t first = strip * pixels_ / strips_, count = (strip + 1) * pixels_ / strips_ - first;
    bool empty = true;
    for (int64_t tap = 0; tap < taps_; tap += taps_per_panel_) {
      const int64_t taps = std::min(taps_per_panel_, taps_ - tap);
      if (taps == 1 && frame_of(b, t, tap).data == nullptr) continue;
      const PanelLayout<A> layout(taps * p_.channels, p_.filters);
      const Rows in_place = rows_in_place(b, t, tap, taps, first);
      if (in_place.data == nullptr) gather(b, t, tap, taps, first, count, rows);
      const Rows from = in_place.data == nullptr ? Rows{rows, row_} : in_place;
      multiply<A>(from.data, from.stride, count, weights_.get() + tap * p_.channels * padded_, layout, sums, padded_,
                  empty, ahead_of(b, t, tap, first, count));
      empty = false;
    }
    if (empty) std::memset(sums, 0, count * padded_ * sizeof(A));
    write(b, t, first, count, sums);
  }

  struct Rows {
    const A* data;
    int64_t stride;
  };

  // A strip's pixels as rows of a matrix, or null where they have to be gathered.
  Rows rows_in_place(int64_t b, int64_t t, int64_t tap, int64_t taps, int64_t first) const {
    if constexpr (std::is_same_v<A, S>) {
      const Frame<S> frame = frame_of(b, t, tap);
      const bool whole = taps == 1 && area_ == 1 && p_.before[1] == 0 && p_.before[2] == 0 && p_.stride[1] == 1 &&
                         p_.stride[2] == 1 && p_.in_size[1] >= p_.out_size[1] && p_.in_size[2] == p_.out_size[2];
      // Rows 2 KiB apart fall into two sets of cache lines.
      const bool spread = frame.column * static_cast<int64_t>(sizeof(S)) < 2048;
      if (whole && spread && frame.row == p_.in_size[2] * frame.column)
        return {frame.data + first * frame.column, frame.column};
    }
    return {nullptr, 0};
  }

  // Pointwise and temporal kernels: the next strip's pixels of this frame, and what this strip writes after its last
  // tap.
  Ahead ahead_of(int64_t b, int64_t t, int64_t tap, int64_t first, int64_t count) const {
    Ahead ahead;
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

  void gather(int64_t b, int64_t t, int64_t tap, int64_t taps, int64_t first, int64_t count, A* rows) const {
    for (int64_t i = 0, run; i < taps; i += run) {
      const int64_t row = (tap + i) / p_.kernel[2] % p_.kernel[1] * p_.dilation[1] - p_.before[1];
      const int64_t column = (tap + i) % p_.kernel[2] * p_.dilation[2] - p_.before[2];
      run = std::min(p_.kernel[2] - (tap + i) % p_.kernel[2], taps - i);
      gather_run(frame_of(b, t, tap + i), row, column, run, first, count, rows + i * p_.channels);
    }
  }

  // Taps side by side, which read pixels side by side: one copy where these are next to each other in memory.
  void gather_run(const Frame<S>& frame, int64_t row, int64_t column, int64_t run, int64_t first, int64_t count,
                  A* rows) const {
    const int64_t width = p_.out_size[2], reach = (run - 1) * p_.dilation[2];
    const bool adjacent = frame.data != nullptr && (run == 1 || reach * frame.column == (run - 1) * p_.channels);
    int64_t y = first / width, x = first % width;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t h = y * p_.stride[1] + row, w = x * p_.stride[2] + column;
      A* to = rows + n * row_;
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

  void write(int64_t b, int64_t t, int64_t first, int64_t count, const A* sums) const {
    const Epilogue<S> epilogue(p_, bias_.get());
    for (int64_t n = 0; n < count; ++n) {
      const int64_t h = (first + n) / p_.out_size[2], w = (first + n) % p_.out_size[2];
      const int64_t y = epilogue.y_offset(b, t, h, w), residual = epilogue.residual_offset(b, t, h, w);
      for (int64_t f = 0; f < p_.filters; f += L) epilogue.store(y, residual, f, load_vec(sums + n * padded_ + f));
    }
  }

  const CausalConv3dParams& p_;
  const int64_t area_, taps_, taps_per_panel_, pixels_, strips_, padded_, row_;
  const Scratch<A> weights_, bias_;
};

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
