// SPDX-License-Identifier: Apache-2.0
// Weights in the layout of the matrix products: as they are (direct) or transformed (Winograd).
#pragma once

#include "causal_conv3d/causal_conv3d.h"
#include "causal_conv3d/matrix.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

// Winograd F(2, 3) along one axis: 2 outputs of 3 taps from 4 inputs by 4 products. On a doubled image the third
// product is always zero and left out, so 3 remain.
constexpr int products(bool upsampled) { return upsampled ? 3 : 4; }

// Bias in the accumulation type, or zeros, up to whole vectors.
template <typename A>
inline void read_bias(const CausalConv3dParams& p, A* bias) {
  std::fill_n(bias, round_up(p.filters, kLanes<A>), A(0));
  if (p.bias == nullptr) return;
  VK_DISPATCH_FLOATING(p.weight_dtype, ([&] {
                         const scalar_t* from = static_cast<const scalar_t*>(p.bias);
                         for (int64_t f = 0; f < p.filters; ++f)
                           bias[f] = static_cast<A>(to_float(from[f * p.bias_stride]));
                       }));
}

// kWide filters of one channel and frame of taps: g[tap][filter], zeros beyond the last filter.
template <typename A, typename W>
inline void read_taps(const CausalConv3dParams& p, int64_t filter, int64_t channel, int64_t t, A* g) {
  constexpr int64_t N = PanelLayout<A>::kWide;
  const W* from = static_cast<const W*>(p.weight) + filter * p.weight_stride[0] + channel * p.weight_stride[1] +
                  t * p.weight_stride[2];
  const int64_t count = std::min(N, p.filters - filter);
  for (int64_t h = 0, tap = 0; h < p.kernel[1]; ++h) {
    for (int64_t w = 0; w < p.kernel[2]; ++w, ++tap) {
      const W* at = from + h * p.weight_stride[3] + w * p.weight_stride[4];
      for (int64_t n = 0; n < count; ++n) g[tap * N + n] = static_cast<A>(to_float(at[n * p.weight_stride[0]]));
      for (int64_t n = count; n < N; ++n) g[tap * N + n] = A(0);
    }
  }
}

// Panel rows are (tap, channel) pairs, `taps_per_panel` taps per panel; taps in the order (t, h, w).
template <typename A, typename W>
inline void pack_direct(const CausalConv3dParams& p, int64_t taps_per_panel, A* packed) {
  constexpr int64_t N = PanelLayout<A>::kWide;
  const int64_t area = p.kernel[1] * p.kernel[2], taps = p.kernel[0] * area;
  const int64_t blocks = (p.filters + N - 1) / N;
  parallel_for(0, p.kernel[0] * blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<A> g(area * N);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t t = item / blocks, filter = item % blocks * N;
      for (int64_t c = 0; c < p.channels; ++c) {
        read_taps<A, W>(p, filter, c, t, g.get());
        for (int64_t i = 0; i < area; ++i) {
          const int64_t tap = t * area + i, first = tap / taps_per_panel * taps_per_panel;
          const PanelLayout<A> layout(std::min(taps_per_panel, taps - first) * p.channels, p.filters);
          const int64_t depth = (tap - first) * p.channels + c, step = depth_block(layout.depth);
          const int64_t width = layout.width(filter);
          A* to = packed + first * p.channels * layout.padded + layout.block(depth / step * step, filter);
          std::copy_n(g.get() + i * N, width, to + depth % step * width);
        }
      }
    }
  });
}

// U = G g along one axis, G = [1 0 0; 1/2 1/2 1/2; 1/2 -1/2 1/2; 0 0 1]. On a doubled image the factor 2 of the second
// row's input is moved here: [1 0 0; 1 1 1; 0 0 1].
template <typename A, bool Upsampled>
VK_ALWAYS_INLINE void transform_taps(Vec<A> g0, Vec<A> g1, Vec<A> g2, Vec<A>* u) {
  const Vec<A> ends = g0 + g2;
  u[0] = g0;
  if (Upsampled) {
    u[1] = ends + g1;
    u[2] = g2;
  } else {
    u[1] = (ends + g1) * A(0.5);
    u[2] = (ends - g1) * A(0.5);
    u[3] = g2;
  }
}

// One panel per frame of taps and product: U[t][i][j] = G g G^T, rows are channels. Frames of taps come one after the
// other: they lie in the same cache lines.
template <typename A, typename W, bool Upsampled>
inline void pack_winograd(const CausalConv3dParams& p, A* packed) {
  constexpr int P = products(Upsampled);
  constexpr int64_t N = PanelLayout<A>::kWide, L = kLanes<A>;
  const PanelLayout<A> layout(p.channels, p.filters);
  const int64_t blocks = (p.filters + N - 1) / N, step = depth_block(p.channels);
  const int64_t chunks = (p.channels + step - 1) / step;
  parallel_for(0, p.kernel[0] * blocks * chunks, 1, [&](int64_t begin, int64_t end) {
    alignas(64) A g[9 * N];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t t = item % p.kernel[0], chunk = item / p.kernel[0];
      const int64_t filter = chunk / chunks * N, from = chunk % chunks * step;
      const int64_t width = layout.width(filter);
      A* to = packed + t * P * P * layout.size() + layout.block(from, filter);
      for (int64_t c = from; c < std::min(from + step, p.channels); ++c, to += width) {
        read_taps<A, W>(p, filter, c, t, g);
        for (int64_t v = 0; v < width; v += L) {
          Vec<A> rows[P][3], u[P];
          for (int j = 0; j < 3; ++j) {
            transform_taps<A, Upsampled>(load_vec(g + j * N + v), load_vec(g + (3 + j) * N + v),
                                         load_vec(g + (6 + j) * N + v), u);
            for (int i = 0; i < P; ++i) rows[i][j] = u[i];
          }
          for (int i = 0; i < P; ++i) {
            transform_taps<A, Upsampled>(rows[i][0], rows[i][1], rows[i][2], u);
            for (int j = 0; j < P; ++j) store_vec(to + (i * P + j) * layout.size() + v, u[j]);
          }
        }
      }
    }
  });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
