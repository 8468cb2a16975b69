// SPDX-License-Identifier: Apache-2.0
// Sums in float64, and statistics of values whose squares leave float32.
#pragma once

#include <cmath>
#include <limits>

#include "channel_norm/channel_norm.h"
#include "common/vmath.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

// to[i] += v[i]
template <typename A>
VK_ALWAYS_INLINE void add_wide(double* to, Vec<A> v) {
  for (int i = 0; i < kWideParts<A>; ++i) {
    double* at = to + i * kLanes<double>;
    store_vec(at, load_vec(at) + widened_part<A>(v, i));
  }
}
// The same where lanes need not stay apart: kLanes<double> numbers of the same sum.
template <typename A>
VK_ALWAYS_INLINE void add_folded(double* to, Vec<A> v) {
  Vec<double> sum = load_vec(to);
  for (int i = 0; i < kWideParts<A>; ++i) sum += widened_part<A>(v, i);
  store_vec(to, sum);
}

// Whether a scale from float32 sums can be used: values of 1e19 have squares that float32 does not hold, and then it
// is 0 or NaN. (NaN and infinities in x end here too.)
template <typename A>
VK_ALWAYS_INLINE bool usable(A scale) {
  return scale > A(0) && scale <= std::numeric_limits<A>::max();
}

// Mean and rstd of one position again, in float64. By value: what a call holds the address of leaves its register.
template <typename A>
struct Statistics {
  A mean, rstd;
};
template <typename A, typename T>
__attribute__((noinline, cold)) Statistics<A> wide_statistics(NormKind kind, const T* x, int64_t stride,
                                                              int64_t channels, double eps) {
  const double count = static_cast<double>(channels);
  double sum = 0, squares = 0;
  if (kind == NormKind::layer) {
    for (int64_t c = 0; c < channels; ++c) sum += static_cast<double>(to_float(x[c * stride]));
  }
  for (int64_t c = 0; c < channels; ++c) {
    const double d = static_cast<double>(to_float(x[c * stride])) - sum / count;
    squares += d * d;
  }
  const double length = std::sqrt(squares);
  const double rstd =
      kind == NormKind::l2 ? std::sqrt(count) / (length < eps ? eps : length) : 1 / std::sqrt(squares / count + eps);
  return {static_cast<A>(sum / count), static_cast<A>(rstd)};
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
