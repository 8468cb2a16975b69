// SPDX-License-Identifier: Apache-2.0
// Weight gradient of 3x3 convolutions of stride 1 in space by Winograd's F(2x2, 3x3), transposed: with tiles V = B^T d
// B of the input (those of the forward pass) and D = A dy A^T of 2x2 pixels of the output's gradient, the gradient of a
// channel's taps for a filter is G^T (sum over all tiles of V * D) G: one matrix product per position of V, 16 for 36.
#pragma once

#include "causal_conv3d/wgrad.h"
#include "causal_conv3d/winograd.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

// A g along one axis, the transpose of transform_products.
template <typename A, bool Upsampled>
VK_ALWAYS_INLINE void transform_gradients(const Vec<A>* g, Vec<A>* d) {
  d[0] = g[0];
  d[1] = g[0] + g[1];
  if (Upsampled) {
    d[2] = -g[1];
  } else {
    d[2] = g[0] - g[1];
    d[3] = -g[1];
  }
}

// G^T m along one axis, the transpose of transform_taps.
template <typename A, bool Upsampled>
VK_ALWAYS_INLINE void transform_sums(const Vec<A>* m, Vec<A>* taps) {
  if (Upsampled) {
    taps[0] = m[0] + m[1];
    taps[1] = m[1];
    taps[2] = m[1] + m[2];
  } else {
    const Vec<A> half = (m[1] + m[2]) * A(0.5);
    taps[0] = m[0] + half;
    taps[1] = (m[1] - m[2]) * A(0.5);
    taps[2] = half + m[3];
  }
}

template <typename S, bool Upsampled>
class WinogradWgrad {
 public:
  using A = accumulate_t<S>;
  static constexpr int P = products(Upsampled);
  static constexpr int64_t L = kLanes<A>;

  explicit WinogradWgrad(const CausalConv3dWgradParams& p)
      : p_(p.conv),
        grad_(static_cast<const S*>(p.grad)),
        dweight_(static_cast<A*>(p.dweight)),
        tiles_high_((p_.out_size[1] + 1) / 2),
        tiles_wide_((p_.out_size[2] + 1) / 2),
        channels_(p_.channels, kWgradRows, L),
        filters_(p_.filters, kWgradColumns, PanelLayout<A>::kWide),
        row_(channels_.block + L),
        parts_(p_.kernel[0] * 9, p_.channels, p_.filters, p_.kernel[0] * channels_.count * filters_.count,
               p_.batch * p_.out_size[0] * tiles_high_ * tiles_wide_),
        zeros_(std::max(p_.channels, p_.filters) + L) {
    std::memset(zeros_.get(), 0, (std::max(p_.channels, p_.filters) + L) * sizeof(S));
  }

  void run() const {
    const int64_t items = parts_.count() * p_.kernel[0] * channels_.count * filters_.count;
    parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      const int64_t width = round_up(filters_.block, L);
      const Scratch<A> inputs(P * P * kTiles * row_), gradients(P * P * kTiles * width);
      const Scratch<A> sums(P * P * channels_.block * width);
      for (int64_t item = begin; item < end; ++item) run_item(item, inputs.get(), gradients.get(), sums.get());
    });
    parts_.reduce(dweight_, p_.kernel[0] * 9, p_.channels * p_.kernel[0] * 9);
  }

 private:
  static constexpr int64_t kTiles = 64;  // tiles at a time, the depth of a matrix product
  static_assert(kTiles <= kDepthBlock);
  using Grid = WgradGrid<S>;

  void run_item(int64_t item, A* inputs, A* gradients, A* sums) const {
    const int64_t f = item % filters_.count, c = item / filters_.count % channels_.count;
    const int64_t tap = item / filters_.count / channels_.count % p_.kernel[0];
    const int64_t part = item / filters_.count / channels_.count / p_.kernel[0];
    const int64_t channels = channels_.length(c), filters = filters_.length(f), padded = round_up(filters, L);
    const Grid grid(p_, tap, tiles_high_, tiles_wide_);
    const int64_t begin = part * grid.size() / parts_.count(), end = (part + 1) * grid.size() / parts_.count();
    const int64_t blocks = (end - begin + kTiles - 1) / kTiles;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = begin + block * (end - begin) / blocks;
      const int64_t count = begin + (block + 1) * (end - begin) / blocks - first;
      const PanelLayout<A> layout(count, filters);
      read_inputs(grid, first, count, channels_.first(c), channels, inputs);
      read_gradients(grid, first, filters_.first(f), layout, gradients);
      for (int i = 0; i < P * P; ++i) {
        multiply<A, true>(inputs + i * count * row_, row_, channels, gradients + i * layout.size(), layout,
                          sums + i * channels * padded, padded, block == 0);
      }
    }
    if (blocks == 0) std::memset(sums, 0, P * P * channels * padded * sizeof(A));
    write_taps(part, tap, channels_.first(c), channels, filters_.first(f), padded, sums);
  }

  void read_inputs(const Grid& grid, int64_t first, int64_t count, int64_t channel, int64_t channels, A* inputs) const {
    constexpr int64_t step = Upsampled ? 1 : 2;
    typename Grid::Position at = grid.at(first);
    for (int64_t n = 0; n < count; ++n, grid.step(at)) {
      const Frame<S> frame = grid.frame(at.b, at.t);
      const int64_t h = at.h * step - p_.before[1], w = at.w * step - p_.before[2];
      const S* pixels[P * P];
      for (int i = 0; i < P * P; ++i) {
        const S* pixel = pixel_at(p_, frame, h + i / P, w + i % P);
        pixels[i] = pixel == nullptr ? zeros_.get() : pixel + channel;
      }
      read_tile<S, Upsampled>(pixels, channels, count * row_, inputs + n * row_);
    }
  }

  void read_gradients(const Grid& grid, int64_t first, int64_t filter, const PanelLayout<A>& layout,
                      A* gradients) const {
    typename Grid::Position at = grid.at(first);
    for (int64_t n = 0; n < layout.depth; ++n, grid.step(at)) {
      const S* pixels[4];
      for (int i = 0; i < 4; ++i) {
        const int64_t h = at.h * 2 + i / 2, w = at.w * 2 + i % 2;
        const bool inside = h < p_.out_size[1] && w < p_.out_size[2];
        pixels[i] = !inside ? zeros_.get()
                            : grad_ + at.b * p_.y_stride[0] + at.t * p_.y_stride[1] + h * p_.y_stride[2] +
                                  w * p_.y_stride[3] + filter;
      }
      for (int64_t f = 0; f < layout.padded; f += L) {
        const int64_t block = f / PanelLayout<A>::kWide * PanelLayout<A>::kWide;
        A* to = gradients + layout.block(0, block) + n * layout.width(block) + f - block;
        const int rest = static_cast<int>(std::min(L, layout.filters - f));
        if (rest == L) {
          read_gradient([&](int i) __attribute__((always_inline)) { return load_vec(pixels[i] + f); }, layout.size(),
                        to);
        } else {
          read_gradient([&](int i) { return load_part(pixels[i] + f, rest); }, layout.size(), to);
        }
      }
    }
  }

  template <typename Load>
  VK_ALWAYS_INLINE static void read_gradient(const Load& load, int64_t plane, A* to) {
    Vec<A> rows[P][2], d[P];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Vec<A> g[2] = {load(j), load(2 + j)};
      transform_gradients<A, Upsampled>(g, d);
#pragma GCC unroll 4
      for (int i = 0; i < P; ++i) rows[i][j] = d[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < P; ++i) {
      transform_gradients<A, Upsampled>(rows[i], d);
#pragma GCC unroll 4
      for (int j = 0; j < P; ++j) store_vec(to + (i * P + j) * plane, d[j]);
    }
  }

  void write_taps(int64_t part, int64_t tap, int64_t channel, int64_t channels, int64_t filter, int64_t padded,
                  const A* sums) const {
    const int64_t plane = channels * padded;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t f = 0; f < padded; f += L) {
        const A* from = sums + c * padded + f;
        Vec<A> columns[3][P], taps[3];
#pragma GCC unroll 4
        for (int j = 0; j < P; ++j) {
          Vec<A> m[P];
#pragma GCC unroll 4
          for (int i = 0; i < P; ++i) m[i] = load_vec(from + (i * P + j) * plane);
          transform_sums<A, Upsampled>(m, taps);
          for (int i = 0; i < 3; ++i) columns[i][j] = taps[i];
        }
        for (int i = 0; i < 3; ++i) {
          transform_sums<A, Upsampled>(columns[i], taps);
          for (int j = 0; j < 3; ++j)
            store_vec(parts_.at(part, tap * 9 + i * 3 + j, channel + c) + filter + f, taps[j]);
        }
      }
    }
  }

  const CausalConv3dParams& p_;
  const S* grad_;
  A* dweight_;
  const int64_t tiles_high_, tiles_wide_;
  const Blocks channels_, filters_;
  const int64_t row_;
  const WgradParts<A> parts_;
  const Scratch<S> zeros_;
};

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
