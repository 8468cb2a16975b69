// SPDX-License-Identifier: Apache-2.0
// Convolutions with at most 4 filters and stride 1 in space (a decoder's last layer, the gradient of an encoder's
// first): a matrix of 3 columns would leave 13 of 16 lanes empty. So every spatial tap of every filter is a filter of a
// pointwise convolution, 27 for 3 filters of 3x3, and an output adds up those of its neighbours' results that belong to
// it.
#pragma once

#include "causal_conv3d/source.h"
#include "causal_conv3d/weights.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

constexpr int64_t kFewFilters = 4;
constexpr int64_t kFewFiltersBuffer = 1 << 16;  // results of the pointwise convolution at a time, unless rows are long

template <typename S, typename E = accumulate_t<S>>
class FewFilters {
 public:
  using A = accumulate_t<S>;
  using Cell = cell_of<E>;
  typedef A Four __attribute__((vector_size(kFewFilters * sizeof(A))));
  static constexpr int64_t L = kLanes<A>, kTerms = Operand<E>::kTerms;

  explicit FewFilters(const CausalConv3dParams& p)
      : p_(p),
        area_(p.kernel[1] * p.kernel[2]),
        layout_((p.channels + kTerms - 1) / kTerms, area_ * p.filters),
        rows_(std::clamp<int64_t>(kFewFiltersBuffer / (p.in_size[2] * layout_.padded), 8, p.out_size[1] + 7)),
        strips_((p.out_size[1] + rows_ - 1) / rows_),
        row_((round_up(p.channels, kTerms * L) + kTerms * L) / kTerms),
        weights_(p.kernel[0] * layout_.size()),
        bias_(round_up(p.filters, L)) {
    VK_DISPATCH_FLOATING(p.weight_dtype, ([&] { pack<scalar_t>(); }));
    read_bias<A>(p, bias_.get());
  }

  void run() const {
    const int64_t most = std::min(rows_ + (p_.kernel[1] - 1) * p_.dilation[1], p_.in_size[1]) * p_.in_size[2];
    parallel_for(0, p_.batch * p_.out_size[0] * strips_, 1, [&](int64_t begin, int64_t end) {
      // Sums are read four at a time, one more than 3 filters have.
      const Scratch<E> pixels(kRowsAtOnce * row_);
      const Scratch<A> products(most * layout_.padded + kFewFilters);
      const Scratch<A> sums(rows_ * p_.out_size[2] * kFewFilters);
      for (int64_t item = begin; item < end; ++item) run_strip(item, pixels.get(), products.get(), sums.get());
    });
  }

 private:
  // Rows [first, end) of x.
  struct Range {
    int64_t first, end;
  };

  template <typename W>
  void pack() const {
    std::memset(static_cast<void*>(weights_.get()), 0, p_.kernel[0] * layout_.size() * sizeof(E));
    const int64_t step = depth_block(layout_.depth), wide = PanelLayout<A>::kWide;
    for (int64_t i = 0; i < p_.kernel[0] * area_ * p_.filters; ++i) {
      const int64_t filter = i % p_.filters, tap = i / p_.filters % area_, t = i / p_.filters / area_;
      const W* from = static_cast<const W*>(p_.weight) + filter * p_.weight_stride[0] + t * p_.weight_stride[2] +
                      tap / p_.kernel[2] * p_.weight_stride[3] + tap % p_.kernel[2] * p_.weight_stride[4];
      const int64_t column = tap * p_.filters + filter, first = column / wide * wide, width = layout_.width(first);
      for (int64_t c = 0; c < p_.channels; ++c) {
        const int64_t at = c / kTerms;
        E* to = weights_.get() + t * layout_.size() + layout_.block(at / step * step, first) + at % step * width;
        const auto value = static_cast<A>(to_float(from[c * p_.weight_stride[1]]));
        reinterpret_cast<Cell*>(to + column - first)[c % kTerms] = from_float<Cell>(value);
      }
    }
  }

  void run_strip(int64_t item, E* pixels, A* products, A* sums) const {
    const int64_t strip = item % strips_, t = item / strips_ % p_.out_size[0], b = item / strips_ / p_.out_size[0];
    const int64_t first = strip * p_.out_size[1] / strips_, end = (strip + 1) * p_.out_size[1] / strips_;
    std::memset(sums, 0, (end - first) * p_.out_size[2] * kFewFilters * sizeof(A));
    const Range range = rows_read(first, end);
    for (int64_t tap = 0; tap < p_.kernel[0] && range.first < range.end; ++tap) {
      const Frame<S> frame = frame_at<S>(p_, b, t * p_.stride[0] - p_.before[0] + tap * p_.dilation[0]);
      if (frame.data == nullptr) continue;
      convolve_pixels(frame, tap, range, pixels, products);
      add_taps(first, end, range, products, sums);
    }
    write(b, t, first, end, sums);
  }

  Range rows_read(int64_t first, int64_t end) const {
    const int64_t height = p_.in_size[1];
    const int64_t low = first - p_.before[1], high = end - 1 - p_.before[1] + (p_.kernel[1] - 1) * p_.dilation[1];
    if (!p_.replicate_space) return {std::max<int64_t>(low, 0), std::min(high + 1, height)};
    return {std::clamp<int64_t>(low, 0, height - 1), std::clamp<int64_t>(high, 0, height - 1) + 1};
  }

  void convolve_pixels(const Frame<S>& frame, int64_t tap, Range range, E* pixels, A* products) const {
    const int64_t width = p_.in_size[2], total = (range.end - range.first) * width;
    const E* weights = weights_.get() + tap * layout_.size();
    for (int64_t at = 0; at < total; at += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, total - at);
      for (int64_t n = 0; n < count; ++n) {
        const int64_t h = range.first + (at + n) / width, w = (at + n) % width;
        copy_values(frame.data + h * frame.row + w * frame.column, p_.channels,
                    reinterpret_cast<Cell*>(pixels + n * row_));
      }
      multiply<E>(pixels, row_, count, weights, layout_, products + at * layout_.padded, layout_.padded, true);
    }
  }

  void add_taps(int64_t first, int64_t end, Range range, const A* products, A* sums) const {
    const int64_t width = p_.in_size[2];
    for (int64_t i = 0; i < area_; ++i) {
      const int64_t row = i / p_.kernel[2] * p_.dilation[1] - p_.before[1];
      const int64_t column = i % p_.kernel[2] * p_.dilation[2] - p_.before[2];
      for (int64_t y = first; y < end; ++y) {
        const int64_t h = p_.replicate_space ? std::clamp<int64_t>(y + row, 0, p_.in_size[1] - 1) : y + row;
        if (h < range.first || h >= range.end) continue;
        const A* from = products + (h - range.first) * width * layout_.padded + i * p_.filters;
        A* to = sums + (y - first) * p_.out_size[2] * kFewFilters;
        for (int64_t x = 0; x < p_.out_size[2]; ++x) {
          int64_t w = x + column;
          if (p_.replicate_space) w = std::clamp<int64_t>(w, 0, width - 1);
          if (w < 0 || w >= width) continue;
          Four sum, term;
          std::memcpy(&sum, to + x * kFewFilters, sizeof(sum));
          std::memcpy(&term, from + w * layout_.padded, sizeof(term));
          sum += term;
          std::memcpy(to + x * kFewFilters, &sum, sizeof(sum));
        }
      }
    }
  }

  void write(int64_t b, int64_t t, int64_t first, int64_t end, const A* sums) const {
    const Epilogue<S> epilogue(p_, bias_.get());
    for (int64_t y = first; y < end; ++y) {
      for (int64_t x = 0; x < p_.out_size[2]; ++x, sums += kFewFilters) {
        const int64_t to = epilogue.y_offset(b, t, y, x), residual = epilogue.residual_offset(b, t, y, x);
        for (int64_t f = 0; f < p_.filters; f += L) {
          const int left = static_cast<int>(p_.filters - f);
          epilogue.store(to, residual, f, left < L ? load_part(sums + f, left) : load_vec(sums + f));
        }
      }
    }
  }

  const CausalConv3dParams& p_;
  const int64_t area_;
  const PanelLayout<A> layout_;
  const int64_t rows_, strips_, row_;
  const Scratch<E> weights_;
  const Scratch<A> bias_;
};

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
