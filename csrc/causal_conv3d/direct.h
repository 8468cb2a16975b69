// SPDX-License-Identifier: Apache-2.0
// Any convolution as matrix products over strips of output pixels: per tap (or few taps, if channels are few) the
// strip's input pixels are the rows of A, gathered into scratch, where padding becomes zeros or copies. Rows already in
// place (pointwise and temporal kernels) are gathered too: read where they are, their strides, mostly powers of two,
// fall into few cache sets, and 3x1x1 kernels of 128 channels took 1.04 times as long.
#pragma once

#include "causal_conv3d/source.h"
#include "causal_conv3d/weights.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

constexpr int64_t kPixelsPerStrip = 64;

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
        strips_((pixels_ + kPixelsPerStrip - 1) / kPixelsPerStrip),
        padded_(round_up(p.filters, L)),
        row_(round_up(taps_per_panel_ * p.channels, L) + L),
        weights_(taps_ * p.channels * padded_),
        bias_(padded_) {
    VK_DISPATCH_FLOATING(p.weight_dtype, ([&] { pack_direct<A, scalar_t>(p, taps_per_panel_, weights_.get()); }));
    read_bias<A>(p, bias_.get());
  }

  void run() const {
    const int64_t most = std::min(kPixelsPerStrip, pixels_);
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
      gather(b, t, tap, taps, first, count, rows);
      const PanelLayout<A> layout(taps * p_.channels, p_.filters);
      multiply<A>(rows, row_, count, weights_.get() + tap * p_.channels * padded_, layout, sums, padded_, empty,
                  ahead_of(b, t, tap, first, count));
      empty = false;
    }
    if (empty) std::memset(sums, 0, count * padded_ * sizeof(A));
    write(b, t, first, count, sums);
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
    for (int64_t i = 0; i < taps; ++i) {
      const Frame<S> frame = frame_of(b, t, tap + i);
      const int64_t row = (tap + i) / p_.kernel[2] % p_.kernel[1] * p_.dilation[1] - p_.before[1];
      const int64_t column = (tap + i) % p_.kernel[2] * p_.dilation[2] - p_.before[2];
      for (int64_t n = 0; n < count; ++n) {
        const int64_t h = (first + n) / p_.out_size[2] * p_.stride[1] + row;
        const int64_t w = (first + n) % p_.out_size[2] * p_.stride[2] + column;
        const S* pixel = frame.data == nullptr ? nullptr : pixel_at(p_, frame, h, w);
        copy_pixel(pixel, rows + n * row_ + i * p_.channels);
      }
    }
  }

  VK_ALWAYS_INLINE void copy_pixel(const S* pixel, A* to) const {
    if (pixel == nullptr) {
      std::memset(to, 0, p_.channels * sizeof(A));
      return;
    }
    int64_t c = 0;
    for (; c + L <= p_.channels; c += L) store_vec(to + c, load_vec(pixel + c));
    for (; c < p_.channels; ++c) to[c] = static_cast<A>(to_float(pixel[c]));
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
