// SPDX-License-Identifier: Apache-2.0
// For kernel files (<stem>_cpu.cpp): SiLU and its derivative.
#pragma once

#include "common/vmath.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

// sigmoid(x) and sigmoid(-x), each without cancellation.
template <typename A>
struct Sigmoid {
  Vec<A> plus, minus;
};

// 1 / d for 1 <= d <= 2^126. A division of 512 bits takes as long as 6 products on Zen 4 and 16 on Intel; a Newton step
// on the estimate of 14 bits takes 3. Below 1 unit in the last place.
template <typename A>
VK_ALWAYS_INLINE Vec<A> reciprocal(Vec<A> d) {
  return A(1) / d;
}
#if defined(__AVX512F__)
template <>
VK_ALWAYS_INLINE Vec<float> reciprocal<float>(Vec<float> d) {
  const Vec<float> estimate = reinterpret_cast<Vec<float>>(_mm512_rcp14_ps(reinterpret_cast<__m512>(d)));
  return (1.0f - d * estimate) * estimate + estimate;
}
#endif

// -|x|
template <typename A>
VK_ALWAYS_INLINE Vec<A> minus_abs(Vec<A> x) {
  using Integer = typename VecTraits<A>::integer;
  return reinterpret_cast<Vec<A>>(reinterpret_cast<Integer>(x) | reinterpret_cast<Integer>(broadcast(A(-0.0))));
}

// For any x: e = exp(-|x|), then 1 / (1 + e) and e / (1 + e).
template <typename A>
VK_ALWAYS_INLINE Sigmoid<A> sigmoid_pair(Vec<A> x) {
  const Vec<A> e = exp_nonpositive(minus_abs<A>(x));
  const Vec<A> large = reciprocal<A>(A(1) + e);
  const Vec<A> small = e * large;
  return {x < A(0) ? small : large, x < A(0) ? large : small};
}

// The derivative of x * sigmoid(x): s + x s (1 - s).
template <typename A>
VK_ALWAYS_INLINE Vec<A> silu_slope(Vec<A> x, const Sigmoid<A>& s) {
  return s.plus + x * s.plus * s.minus;
}

// The same for sums over many values: root mean square error 2.8e-8 instead of 3.5e-8, but up to 4.3e-7 instead of
// 1.9e-7 where x is large. A fused multiply-add gives s - s^2 with the digits that 1 - s has.
template <typename A>
VK_ALWAYS_INLINE Vec<A> silu_slope_to_sum(Vec<A> x, const Sigmoid<A>& s) {
#if defined(__FMA__)
  return s.plus + x * (s.plus - s.plus * s.plus);
#else
  return s.plus + x * s.plus * (A(1) - s.plus);
#endif
}

// x * sigmoid(x); NaN for NaN and for -infinity, as torch's silu.
template <typename A>
VK_ALWAYS_INLINE Vec<A> silu(Vec<A> x) {
  const Vec<A> e = exp_nonpositive(minus_abs<A>(x));
  return (x < A(0) ? x * e : x) * reciprocal<A>(A(1) + e);
}

// The same for values that are NaN or below kSigmoidLimit in size: no infinity to look after, half the instructions.
// Relative error of exp(-x) below 1e-7 (1 + |x|): what rounding x to float32 does to it as well.
constexpr double kSigmoidLimit = 1e15;
template <typename A>
constexpr bool kHasFiniteSigmoid = false;

#if defined(__AVX512F__)
// exp(-x) between 2^-126 and 2^126: 2^t = 2^n 2^(j / 32) (1 + m(f)) with t = -x / ln 2 = n + j / 32 + f, |f| <= 1 / 64.
VK_ALWAYS_INLINE Vec<float> exp_minus(Vec<float> x) {
  using Bits = VecTraits<float>::bits;
  // The bits of 2^(j / 32) less j << 18, so that adding (32 n + j) << 18 leaves n in the exponent.
  alignas(64) static const uint32_t kPowers[32] = {
#define VK_POWER(BITS, J) (BITS) - ((J) << 18)
      VK_POWER(0x3f800000u, 0u),  VK_POWER(0x3f82cd87u, 1u),  VK_POWER(0x3f85aac3u, 2u),  VK_POWER(0x3f88980fu, 3u),
      VK_POWER(0x3f8b95c2u, 4u),  VK_POWER(0x3f8ea43au, 5u),  VK_POWER(0x3f91c3d3u, 6u),  VK_POWER(0x3f94f4f0u, 7u),
      VK_POWER(0x3f9837f0u, 8u),  VK_POWER(0x3f9b8d3au, 9u),  VK_POWER(0x3f9ef532u, 10u), VK_POWER(0x3fa27043u, 11u),
      VK_POWER(0x3fa5fed7u, 12u), VK_POWER(0x3fa9a15bu, 13u), VK_POWER(0x3fad583fu, 14u), VK_POWER(0x3fb123f6u, 15u),
      VK_POWER(0x3fb504f3u, 16u), VK_POWER(0x3fb8fbafu, 17u), VK_POWER(0x3fbd08a4u, 18u), VK_POWER(0x3fc12c4du, 19u),
      VK_POWER(0x3fc5672au, 20u), VK_POWER(0x3fc9b9beu, 21u), VK_POWER(0x3fce248cu, 22u), VK_POWER(0x3fd2a81eu, 23u),
      VK_POWER(0x3fd744fdu, 24u), VK_POWER(0x3fdbfbb8u, 25u), VK_POWER(0x3fe0ccdfu, 26u), VK_POWER(0x3fe5b907u, 27u),
      VK_POWER(0x3feac0c7u, 28u), VK_POWER(0x3fefe4bau, 29u), VK_POWER(0x3ff5257du, 30u), VK_POWER(0x3ffa83b3u, 31u),
#undef VK_POWER
  };
  const __m512 limit = _mm512_set1_ps(126.0f), product = reinterpret_cast<__m512>(x * -1.44269504f);
  const Vec<float> t =
      reinterpret_cast<Vec<float>>(_mm512_range_ps(product, limit, 0b0010));  // the smaller one in size
  const Vec<float> shifted = t + 393216.0f;  // 1.5 * 2^18: 32 n + j, rounded, in the low bits of the sum
  const Vec<float> f =
      reinterpret_cast<Vec<float>>(_mm512_reduce_ps(reinterpret_cast<__m512>(t), 0x50));  // t less t rounded to 2^-5
  const __m512i at = reinterpret_cast<__m512i>(shifted);
  const __m512i powers = _mm512_permutex2var_epi32(_mm512_load_si512(kPowers), at, _mm512_load_si512(kPowers + 16));
  const Vec<float> power =
      reinterpret_cast<Vec<float>>(reinterpret_cast<Bits>(powers) + (reinterpret_cast<Bits>(at) << 18));
  const Vec<float> m = (f * 0x1.ebfc02p-3f + 0x1.62e584p-1f) * f;  // 2^f - 1 to 5.4e-8
  return power * m + power;
}
#endif

template <typename A>
VK_ALWAYS_INLINE Sigmoid<A> sigmoid_pair_finite(Vec<A> x) {
  return sigmoid_pair<A>(x);
}
template <typename A>
VK_ALWAYS_INLINE Vec<A> silu_finite(Vec<A> x) {
  return silu<A>(x);
}
#if defined(__AVX512F__)
template <>
constexpr bool kHasFiniteSigmoid<float> = true;
template <>
VK_ALWAYS_INLINE Sigmoid<float> sigmoid_pair_finite<float>(Vec<float> x) {
  const Vec<float> e = exp_minus(x), plus = reciprocal<float>(1.0f + e);
  return {plus, e * plus};
}
template <>
VK_ALWAYS_INLINE Vec<float> silu_finite<float>(Vec<float> x) {
  return x * reciprocal<float>(1.0f + exp_minus(x));
}
#endif

// The same for results that are rounded to bfloat16, in 9 instructions instead of 15 (2.0 ns a vector on Zen 4, 3.1):
// relative error 1e-4, where half a unit in the last place is 1.95e-3.
template <typename A>
VK_ALWAYS_INLINE Vec<A> silu_to_bfloat16(Vec<A> x) {
  return silu_finite<A>(x);
}
#if defined(__AVX512F__)
template <>
VK_ALWAYS_INLINE Vec<float> silu_to_bfloat16<float>(Vec<float> x) {
  const __m512 t = reinterpret_cast<__m512>(x * -1.44269504f);
  const Vec<float> f = reinterpret_cast<Vec<float>>(_mm512_reduce_ps(t, 0x01));  // t less the integer below
  Vec<float> p = f * 0x1.3f969ep-4f + 0x1.cefc5p-3f;                             // 2^f on [0, 1)
  p = p * f + 0x1.64444ap-1f;
  p = p * f + 0x1.fff632p-1f;
  const Vec<float> e = reinterpret_cast<Vec<float>>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), t));
  return x * reinterpret_cast<Vec<float>>(_mm512_rcp14_ps(reinterpret_cast<__m512>(1.0f + e)));
}
#endif

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
