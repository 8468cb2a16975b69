// SPDX-License-Identifier: Apache-2.0
// Weights in the layout of the matrix products: as they are (direct) or transformed (Winograd).
#pragma once

#include "causal_conv3d/causal_conv3d.h"
#include "causal_conv3d/matrix.h"
#include "causal_conv3d/source.h"
#include "common/pairs.h"

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
      if (p.weight_stride[0] == 1 && count == N) {  // whole vectors
        for (int64_t n = 0; n < N; ++n) g[tap * N + n] = static_cast<A>(to_float(at[n]));
        continue;
      }
      for (int64_t n = 0; n < count; ++n) g[tap * N + n] = static_cast<A>(to_float(at[n * p.weight_stride[0]]));
      for (int64_t n = count; n < N; ++n) g[tap * N + n] = A(0);
    }
  }
}

// Places of a direct convolution's weights: panels of some taps, in the order (t, h, w), whose depth are the taps'
// channels one after the other.
template <typename E>
struct DirectPanels {
  static constexpr int64_t kTerms = Operand<E>::kTerms;
  using Layout = PanelLayout<sum_of<E>>;

  int64_t taps, per_panel, channels, filters;
  int64_t unit = 1;  // what the depth is a multiple of

  int64_t depth(int64_t of_taps) const { return round_up((of_taps * channels + kTerms - 1) / kTerms, unit); }
  // Of the panel that holds this tap.
  Layout layout(int64_t tap) const {
    return Layout(depth(std::min(per_panel, taps - tap / per_panel * per_panel)), filters);
  }
  int64_t first(int64_t tap) const { return tap / per_panel * depth(per_panel) * Layout(0, filters).padded; }
  int64_t size() const { return first(taps - 1) + layout(taps - 1).size(); }
  // Of the operand with this term of the panel's depth, for the block that begins at this filter.
  int64_t place(int64_t tap, int64_t term, int64_t filter) const {
    const Layout panel = layout(tap);
    const int64_t at = term / kTerms, step = depth_block(panel.depth);
    return first(tap) + panel.block(at / step * step, filter) + at % step * panel.width(filter);
  }
};

template <typename E>
inline DirectPanels<E> direct_panels(const CausalConv3dParams& p, int64_t taps_per_panel) {
  return {p.kernel[0] * p.kernel[1] * p.kernel[2], taps_per_panel, p.channels, p.filters};
}

// Any strides and dtypes, number by number. Panels that no product reads stay as they are.
template <typename E, typename W>
inline void pack_each(const CausalConv3dParams& p, const DirectPanels<E>& panels, E* packed) {
  using A = sum_of<E>;
  using Cell = cell_of<E>;
  constexpr int64_t N = PanelLayout<A>::kWide, kTerms = Operand<E>::kTerms;
  const int64_t area = p.kernel[1] * p.kernel[2], blocks = (p.filters + N - 1) / N;
  if (kTerms > 1) std::memset(static_cast<void*>(packed), 0, panels.size() * sizeof(E));  // an odd depth's last terms
  parallel_for(0, p.kernel[0] * blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<A> g(area * N);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t t = item / blocks, filter = item % blocks * N;
      if (area % panels.per_panel == 0 && is_idle(p, t)) continue;
      for (int64_t c = 0; c < p.channels; ++c) {
        read_taps<A, W>(p, filter, c, t, g.get());
        for (int64_t i = 0; i < area; ++i) {
          const int64_t tap = t * area + i, term = tap % panels.per_panel * p.channels + c;
          Cell* to = reinterpret_cast<Cell*>(packed + panels.place(tap, term, filter)) + term % kTerms;
          const int64_t width = panels.layout(tap).width(filter);
          for (int64_t n = 0; n < width; ++n) to[n * kTerms] = from_float<Cell>(g.get()[i * N + n]);
        }
      }
    }
  });
}

#if defined(__AVX512BF16__)
// bfloat16 weights with an even number of channels whose taps, channels or filters lie next to each other in memory: 16
// taps (pairs of channels) of 16 filters at a time. 7 million weights take 2.7 ms, number by number some 60.
class PairPacking {
 public:
  PairPacking(const CausalConv3dParams& p, const DirectPanels<Bfloat16Pair>& panels, Bfloat16Pair* packed)
      : p_(p), panels_(panels), packed_(packed), weight_(static_cast<const bfloat16*>(p.weight)) {}

  bool along_taps() const {
    return panels_.taps > 1 && p_.weight_stride[4] == 1 && p_.weight_stride[3] == p_.kernel[2] &&
           p_.weight_stride[2] == p_.kernel[1] * p_.kernel[2];
  }
  bool along_filters() const { return p_.weight_stride[0] == 1; }
  bool fits() const { return p_.channels % 2 == 0 && (along_taps() || along_filters() || p_.weight_stride[1] == 1); }

  void run() const {
    const int64_t pairs = p_.channels / 2, groups = (pairs + kSide - 1) / kSide, width = PanelLayout<float>::kWide;
    const bool taps_together = along_taps();
    parallel_for(0, (p_.filters + width - 1) / width * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t filter = item / groups * width, pair = item % groups * kSide;
        const int64_t count = std::min(kSide, pairs - pair);
        for (int64_t tap = 0; tap < panels_.taps; tap += taps_together ? kSide : 1) {
          if (taps_together) {
            pack_taps(filter, pair, count, tap, std::min(kSide, panels_.taps - tap));
          } else if (along_filters()) {
            pack_filters(filter, pair, count, tap);
          } else {
            pack_channels(filter, pair, count, tap);
          }
        }
      }
    });
  }

 private:
  static constexpr int64_t kSide = 16;

  // Where some pairs of a tap go: `stride` apart, unless they fall into two blocks of the panel.
  struct Place {
    Bfloat16Pair* first;
    int64_t stride;  // 0: each has to be looked up
  };
  Bfloat16Pair* place(int64_t filter, int64_t pair, int64_t tap) const {
    return packed_ + panels_.place(tap, tap % panels_.per_panel * p_.channels + 2 * pair, filter);
  }
  Place places(int64_t filter, int64_t pair, int64_t count, int64_t tap) const {
    const int64_t width = panels_.layout(tap).width(filter);
    Bfloat16Pair *first = place(filter, pair, tap), *last = place(filter, pair + count - 1, tap);
    return {first, last - first == (count - 1) * width ? width : 0};
  }
  static __mmask16 mask(int64_t count) { return static_cast<__mmask16>(0xffffu >> (kSide - count)); }

  void pack_taps(int64_t filter, int64_t pair, int64_t count, int64_t tap, int64_t taps) const {
    const int64_t width = panels_.layout(tap).width(filter), channel = p_.weight_stride[1];
    Place to[kSide];
    for (int64_t i = 0; i < taps; ++i) to[i] = places(filter, pair, count, tap + i);
    for (int64_t q = 0; q < count; ++q) {
      for (int64_t v = 0; v < width; v += kSide) {
        const bfloat16* from = weight_ + (filter + v) * p_.weight_stride[0] + 2 * (pair + q) * channel + tap;
        __m512i m[kSide];
#pragma GCC unroll 16
        for (int64_t n = 0; n < kSide; ++n, from += p_.weight_stride[0]) {
          const __mmask16 live = filter + v + n < p_.filters ? mask(taps) : __mmask16(0);
          const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, from));
          const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, from + channel));
          m[n] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
        }
        transpose_pairs(m);
        for (int64_t i = 0; i < taps; ++i) {
          Bfloat16Pair* at = to[i].stride != 0 ? to[i].first + q * to[i].stride : place(filter, pair + q, tap + i);
          _mm512_storeu_si512(at + v, m[i]);
        }
      }
    }
  }

  // From a channel's filter to the same one of this tap.
  int64_t shift_of(int64_t tap) const {
    return tap / p_.kernel[2] / p_.kernel[1] * p_.weight_stride[2] +
           tap / p_.kernel[2] % p_.kernel[1] * p_.weight_stride[3] + tap % p_.kernel[2] * p_.weight_stride[4];
  }

  void pack_filters(int64_t filter, int64_t pair, int64_t count, int64_t tap) const {
    const int64_t width = panels_.layout(tap).width(filter), channel = p_.weight_stride[1];
    const Place to = places(filter, pair, count, tap);
    const bfloat16* from = weight_ + filter + 2 * pair * channel + shift_of(tap);
    for (int64_t q = 0; q < count; ++q, from += 2 * channel) {
      Bfloat16Pair* at = to.stride != 0 ? to.first + q * to.stride : place(filter, pair + q, tap);
      for (int64_t v = 0; v < width; v += kSide) {
        const __mmask16 live = mask(std::min(kSide, p_.filters - filter - v));
        _mm512_storeu_si512(at + v, pair_up(from + v, from + channel + v, live));
      }
    }
  }

  void pack_channels(int64_t filter, int64_t pair, int64_t count, int64_t tap) const {
    const int64_t width = panels_.layout(tap).width(filter), shift = shift_of(tap);
    const Place to = places(filter, pair, count, tap);
    for (int64_t v = 0; v < width; v += kSide) {
      const bfloat16* from = weight_ + (filter + v) * p_.weight_stride[0] + 2 * pair + shift;
      __m512i m[kSide];
#pragma GCC unroll 16
      for (int64_t n = 0; n < kSide; ++n, from += p_.weight_stride[0]) {
        m[n] = _mm512_maskz_loadu_epi32(filter + v + n < p_.filters ? mask(count) : __mmask16(0), from);
      }
      transpose_pairs(m);
      for (int64_t i = 0; i < count; ++i) {
        _mm512_storeu_si512((to.stride != 0 ? to.first + i * to.stride : place(filter, pair + i, tap)) + v, m[i]);
      }
    }
  }

  const CausalConv3dParams& p_;
  const DirectPanels<Bfloat16Pair>& panels_;
  Bfloat16Pair* packed_;
  const bfloat16* weight_;
};
#endif

template <typename E>
inline void pack_direct(const CausalConv3dParams& p, const DirectPanels<E>& panels, E* packed) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<E, Bfloat16Pair>) {
    const PairPacking packing(p, panels, packed);
    const bool full = panels.per_panel * p.channels % (panels.unit * panels.kTerms) == 0;
    if (packing.fits() && !full) std::memset(static_cast<void*>(packed), 0, panels.size() * sizeof(E));
    if (packing.fits()) return packing.run();
  }
#endif
  VK_DISPATCH_FLOATING(p.weight_dtype, ([&] { pack_each<E, scalar_t>(p, panels, packed); }));
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
// other: they lie in the same cache lines. Panels that no product reads stay as they are.
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
      if (is_idle(p, t)) continue;
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
