// SPDX-License-Identifier: Apache-2.0
// For kernel files (<stem>_cpu.cpp): vectors of the accumulation type at the width of the instruction set being
// compiled, loads and stores that convert, and the transcendental functions the kernels need.
//
// Vec<float> and Vec<double> are GCC/Clang vector types: + - * / and comparisons are the built-in ones. Intrinsics
// appear only where GCC 12 finds no good code: float16 conversion, horizontal sums, masked ends of rows.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

// All functions on vectors are inlined, so the calling convention GCC warns about is never used; and GCC 12's own
// AVX-512 header sets off -Wmaybe-uninitialized (GCC bug 105593).
#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif
#if defined(__x86_64__) && defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define VK_ALWAYS_INLINE inline __attribute__((always_inline))

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename A>
struct VecTraits;
template <>
struct VecTraits<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t integer __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecTraits<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t integer __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vec = typename VecTraits<A>::type;
template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <typename A>
VK_ALWAYS_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}

// ---- loads and stores of kLanes elements, any alignment
// --------------------------------------------------------------

VK_ALWAYS_INLINE Vec<float> load_vec(const float* from) {
  Vec<float> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
VK_ALWAYS_INLINE Vec<double> load_vec(const double* from) {
  Vec<double> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
VK_ALWAYS_INLINE Vec<float> load_vec(const bfloat16* from) {
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  Narrow narrow;
  std::memcpy(&narrow, from, sizeof(narrow));
  const auto wide = __builtin_convertvector(narrow, VecTraits<float>::bits) << 16;
  return reinterpret_cast<Vec<float>>(wide);
}
VK_ALWAYS_INLINE Vec<float> load_vec(const float16* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__) && defined(__F16C__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(from[i]);
  return v;
#endif
}

VK_ALWAYS_INLINE void store_vec(float* to, Vec<float> v) { std::memcpy(to, &v, sizeof(v)); }
VK_ALWAYS_INLINE void store_vec(double* to, Vec<double> v) { std::memcpy(to, &v, sizeof(v)); }
VK_ALWAYS_INLINE void store_vec(bfloat16* to, Vec<float> v) {
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  using Bits = VecTraits<float>::bits;
  const Bits wide = reinterpret_cast<Bits>(v);
  const Bits even = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const Bits rounded = (v == v) ? even : Bits{} + 0x7fc0u;
  const Narrow narrow = __builtin_convertvector(rounded, Narrow);
  std::memcpy(to, &narrow, sizeof(narrow));
}
VK_ALWAYS_INLINE void store_vec(float16* to, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
#else
  for (int i = 0; i < kLanes<float>; ++i) to[i] = from_float<float16>(v[i]);
#endif
}

// ---- the first `count` elements, 0 < count < kLanes; loads fill the rest with zeros ---------------------------------

template <typename T>
VK_ALWAYS_INLINE Vec<accumulate_t<T>> load_part(const T* from, int count) {
  T padded[kLanes<accumulate_t<T>>] = {};
  for (int i = 0; i < count; ++i) padded[i] = from[i];
  return load_vec(padded);
}
template <typename T>
VK_ALWAYS_INLINE void store_part(T* to, Vec<accumulate_t<T>> v, int count) {
  T padded[kLanes<accumulate_t<T>>];
  store_vec(padded, v);
  for (int i = 0; i < count; ++i) to[i] = padded[i];
}
#if defined(__AVX512F__)
template <>
VK_ALWAYS_INLINE Vec<float> load_part<float>(const float* from, int count) {
  return reinterpret_cast<Vec<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), from));
}
template <>
VK_ALWAYS_INLINE void store_part<float>(float* to, Vec<float> v, int count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1u), reinterpret_cast<__m512>(v));
}
#endif

// ---- reductions over the lanes, always in the same order
// ---------------------------------------------------------------

template <typename A>
VK_ALWAYS_INLINE A sum_lanes(Vec<A> v) {
  A lanes[kLanes<A>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes<A> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}
#if defined(__AVX2__)
template <>
VK_ALWAYS_INLINE float sum_lanes<float>(Vec<float> v) {
#if defined(__AVX512F__)
  const __m512 all = reinterpret_cast<__m512>(v);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#else
  const __m256 half = reinterpret_cast<__m256>(v);
#endif
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
#endif

// ---- functions
// Long reductions to one number, in float64 whatever the inputs.
template <typename A>
class WideSum {
 public:
  // += a * (scale * sum_k coefficient[k] * taps[k] - b), lane by lane
  template <int N>
  VK_ALWAYS_INLINE void add(Vec<A> a, const Vec<A>* taps, const A* coefficient, double scale, Vec<A> b) {
    for (int part = 0; part < kParts; ++part) {
      Vec<double> mixed{};
      for (int k = 0; k < N; ++k) mixed += widen(taps[k], part) * static_cast<double>(coefficient[k]);
      sum_[part] += widen(a, part) * (mixed * scale - widen(b, part));
    }
  }
  VK_ALWAYS_INLINE double total() const {
    Vec<double> sum = sum_[0];
    for (int part = 1; part < kParts; ++part) sum += sum_[part];
    return sum_lanes<double>(sum);
  }

 private:
  static constexpr int kParts = static_cast<int>(sizeof(double) / sizeof(A));
  typedef A Slice __attribute__((vector_size(kVectorBytes / kParts)));

  static VK_ALWAYS_INLINE Vec<double> widen(Vec<A> v, int part) {
    Slice slice;
    std::memcpy(&slice, reinterpret_cast<const char*>(&v) + part * sizeof(slice), sizeof(slice));
    return __builtin_convertvector(slice, Vec<double>);
  }

  Vec<double> sum_[kParts] = {};
};

// ---------------------------------------------------------------------------------------------------------

// exp(x) for x <= 0, below 1.2 units in the last place; 0 below -104, NaN gives an unspecified value.
VK_ALWAYS_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  using Bits = VecTraits<float>::bits;
  const Vec<float> low = broadcast(-128.0f);
  x = x < low ? low : x;
  // 1.5 * 2^23 moves the integer part of x / ln 2, rounded, into the low bits of the sum
  const Vec<float> shifted = x * 1.44269504f + 12582912.0f;
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts; n * first part is exact
  // exp(r) = 1 + r + r^2 p(r), p fitted to a relative error of 3.1e-9 on [-ln 2 / 2, ln 2 / 2]
  Vec<float> p = r * 0x1.6a2432p-10f + 0x1.1239e2p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = (p * r) * r + r;
  p = p + 1.0f;
  // times 2^(n + 64) in the exponent's bits, then 2^-64 as a product, so that subnormal results round correctly
  const Bits exponent = (reinterpret_cast<Bits>(shifted) + 64u) << 23;
  const Bits scaled = reinterpret_cast<Bits>(p) + exponent;
  return reinterpret_cast<Vec<float>>(scaled) * 0x1p-64f;
}
VK_ALWAYS_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// sigmoid(x) and sigmoid(-x), each without cancellation: e = exp(-|x|), then 1 / (1 + e) and e / (1 + e).
template <typename A>
struct Sigmoid {
  Vec<A> plus, minus;
};
template <typename A>
VK_ALWAYS_INLINE Sigmoid<A> sigmoid_pair(Vec<A> x) {
  const Vec<A> e = exp_nonpositive(x < A(0) ? x : -x);
  const Vec<A> large = A(1) / (A(1) + e);
  const Vec<A> small = e * large;
  return {x < A(0) ? small : large, x < A(0) ? large : small};
}

// x * sigmoid(x); NaN for NaN and for -infinity, as torch's silu.
template <typename A>
VK_ALWAYS_INLINE Vec<A> silu(Vec<A> x) {
  const Vec<A> e = exp_nonpositive(x < A(0) ? x : -x);
  return (x < A(0) ? x * e : x) / (A(1) + e);
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
