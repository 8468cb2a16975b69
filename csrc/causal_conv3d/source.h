// SPDX-License-Identifier: Apache-2.0
// What the convolution reads and writes: padding and history as coordinates, bias, SiLU and residual on the way out.
#pragma once

#include <algorithm>

#include "causal_conv3d/causal_conv3d.h"
#include "common/sigmoid.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

// One frame of x or of the history; `data` is null for a frame of zeros.
template <typename S>
struct Frame {
  const S* data;
  int64_t row, column;  // strides

  bool operator==(const Frame& other) const { return data == other.data; }
};

template <typename S>
inline Frame<S> frame_at(const CausalConv3dParams& p, int64_t batch, int64_t t) {
  const auto x = [&](int64_t i) {
    return Frame<S>{static_cast<const S*>(p.x) + batch * p.x_stride[0] + i * p.x_stride[1], p.x_stride[2],
                    p.x_stride[3]};
  };
  if (t >= 0 && t < p.in_size[0]) return x(t);
  if (t >= p.in_size[0]) return p.replicate_time ? x(p.in_size[0] - 1) : Frame<S>{nullptr, 0, 0};
  const int64_t past = p.history_frames + t;
  if (past < 0 && !p.replicate_time) return {nullptr, 0, 0};
  if (p.history_frames == 0) return x(0);
  const S* history = static_cast<const S*>(p.history) + batch * p.history_stride[0];
  return {history + std::max<int64_t>(past, 0) * p.history_stride[1], p.history_stride[2], p.history_stride[3]};
}

// Whether this frame of taps meets zeros alone, as the past ones do on the first frame of a clip.
inline bool is_idle(const CausalConv3dParams& p, int64_t tap) {
  const int64_t first = tap * p.dilation[0] - p.before[0], last = first + (p.out_size[0] - 1) * p.stride[0];
  return !p.replicate_time && (last < -p.history_frames || first >= p.in_size[0]);
}

// Pixel (h, w) of a frame: null if it is a zero.
template <typename S>
VK_ALWAYS_INLINE const S* pixel_at(const CausalConv3dParams& p, const Frame<S>& frame, int64_t h, int64_t w) {
  const int64_t height = p.in_size[1], width = p.in_size[2];
  if (h < 0 || h >= height || w < 0 || w >= width) {
    if (!p.replicate_space) return nullptr;
    h = std::min(std::max<int64_t>(h, 0), height - 1);
    w = std::min(std::max<int64_t>(w, 0), width - 1);
  }
  return frame.data + h * frame.row + w * frame.column;
}

// `count` stored values (zeros if `from` is null) in the accumulation type. Whole vectors are written, up to one less
// than kLanes elements beyond the last.
template <typename S, typename A>
VK_ALWAYS_INLINE void copy_values(const S* from, int64_t count, A* to) {
  constexpr int64_t L = kLanes<A>;
  if (from == nullptr) {
    for (int64_t c = 0; c < count; c += L) store_vec(to + c, Vec<A>{});
    return;
  }
  int64_t c = 0;
  for (; c + L <= count; c += L) store_vec(to + c, load_vec(from + c));
  if (c < count) store_vec(to + c, load_part(from + c, static_cast<int>(count - c)));
}

#if defined(__AVX512BF16__)
// The same as they are stored, in vectors of 32.
VK_ALWAYS_INLINE void copy_values(const bfloat16* from, int64_t count, bfloat16* to) {
  constexpr int64_t L = 2 * kLanes<float>;
  const auto masked = [&](int64_t c) {
    return from == nullptr || c >= count ? 0u : static_cast<__mmask32>(~0u >> (L - std::min(count - c, L)));
  };
  for (int64_t c = 0; c < count; c += L) _mm512_storeu_si512(to + c, _mm512_maskz_loadu_epi16(masked(c), from + c));
}
#endif

// bias, SiLU and residual, then rounding to the storage type.
template <typename S>
class Epilogue {
 public:
  using A = accumulate_t<S>;

  // `bias` is in the accumulation type, filled up with zeros to whole vectors.
  Epilogue(const CausalConv3dParams& p, const A* bias) : p_(p), bias_(bias) {}

  // Writes the `lanes` (at most one vector) filters from `filter` on of one output pixel.
  VK_ALWAYS_INLINE void store(int64_t y_offset, int64_t residual_offset, int64_t filter, Vec<A> sum) const {
    const int64_t left = p_.filters - filter;
    S* y = static_cast<S*>(p_.y) + y_offset + filter;
    if (left >= kLanes<A>) return store_vec(y, finished(residual_offset, filter, sum));
    sum = activated(filter, sum);
    const S* residual = static_cast<const S*>(p_.residual);
    if (residual != nullptr) sum += load_part(residual + residual_offset + filter, static_cast<int>(left));
    store_part(y, sum, static_cast<int>(left));
  }
#if defined(__AVX512BF16__)
  // Two vectors of bfloat16 side by side, all of them filters there are: a whole line at a time.
  VK_ALWAYS_INLINE void store_both(int64_t y_offset, int64_t residual_offset, int64_t filter, Vec<float> low,
                                   Vec<float> high) const {
    low = finished(residual_offset, filter, low), high = finished(residual_offset, filter + kLanes<float>, high);
    const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
    std::memcpy(static_cast<S*>(p_.y) + y_offset + filter, &both, sizeof(both));
  }
#endif
  VK_ALWAYS_INLINE int64_t y_offset(int64_t b, int64_t t, int64_t h, int64_t w) const {
    return b * p_.y_stride[0] + t * p_.y_stride[1] + h * p_.y_stride[2] + w * p_.y_stride[3];
  }
  VK_ALWAYS_INLINE int64_t residual_offset(int64_t b, int64_t t, int64_t h, int64_t w) const {
    return b * p_.residual_stride[0] + t * p_.residual_stride[1] + h * p_.residual_stride[2] +
           w * p_.residual_stride[3];
  }

 private:
  VK_ALWAYS_INLINE Vec<A> activated(int64_t filter, Vec<A> sum) const {
    sum += load_vec(bias_ + filter);
    return p_.silu ? silu<A>(sum) : sum;
  }
  // Of a whole vector of filters.
  VK_ALWAYS_INLINE Vec<A> finished(int64_t residual_offset, int64_t filter, Vec<A> sum) const {
    sum = activated(filter, sum);
    const S* residual = static_cast<const S*>(p_.residual);
    return residual == nullptr ? sum : sum + load_vec(residual + residual_offset + filter);
  }

  const CausalConv3dParams& p_;
  const A* bias_;
};

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
