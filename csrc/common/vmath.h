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

// Loads and stores of kLanes elements, any alignment.

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
#if defined(__AVX512BF16__)
// One instruction. It takes results below 2^-126 for zero, where the code for other processors keeps them.
VK_ALWAYS_INLINE void store_vec(bfloat16* to, Vec<float> v) {
  const __m256bh narrow = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  std::memcpy(to, &narrow, sizeof(narrow));
}
// Even and odd elements of 2 * kLanes neighbours, rounded, side by side.
VK_ALWAYS_INLINE VecTraits<float>::bits join_bfloat16(Vec<float> even, Vec<float> odd) {
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes)));
  const __m512bh apart = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(odd), reinterpret_cast<__m512>(even));
  const Narrow places = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return reinterpret_cast<VecTraits<float>::bits>(
      _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(places), reinterpret_cast<__m512i>(apart)));
}
#else
// Bits of v rounded to bfloat16, to nearest with ties to even, in the upper half of each lane; the lower half is noise.
VK_ALWAYS_INLINE VecTraits<float>::bits rounded_to_bfloat16(Vec<float> v) {
  using Bits = VecTraits<float>::bits;
  const Bits wide = reinterpret_cast<Bits>(v);
  return (v == v) ? wide + 0x7fffu + ((wide >> 16) & 1u) : Bits{} + 0x7fc00000u;
}
VK_ALWAYS_INLINE void store_vec(bfloat16* to, Vec<float> v) {
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  const Narrow narrow = __builtin_convertvector(rounded_to_bfloat16(v) >> 16, Narrow);
  std::memcpy(to, &narrow, sizeof(narrow));
}
// Even and odd elements of 2 * kLanes neighbours, rounded, side by side.
VK_ALWAYS_INLINE VecTraits<float>::bits join_bfloat16(Vec<float> even, Vec<float> odd) {
  return (rounded_to_bfloat16(even) >> 16) | (rounded_to_bfloat16(odd) & 0xffff0000u);
}
#endif
VK_ALWAYS_INLINE void store_vec(float16* to, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
#else
  for (int i = 0; i < kLanes<float>; ++i) to[i] = from_float<float16>(v[i]);
#endif
}

// The first `count` elements, 0 < count < kLanes; loads fill the rest with zeros.

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
template <>
VK_ALWAYS_INLINE Vec<float> load_part<float16>(const float16* from, int count) {
  const __m256i part = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1u), from);
  return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(part));
}
template <>
VK_ALWAYS_INLINE void store_part<float16>(float16* to, Vec<float> v, int count) {
  const __m256i part = _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0);
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1u), part);
}
#elif defined(__AVX2__)
// Ones in the first `count` lanes: a window of this table.
VK_ALWAYS_INLINE __m256i lane_mask(int count) {
  static const int32_t kWindow[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kWindow + 8 - count));
}
template <>
VK_ALWAYS_INLINE Vec<float> load_part<float>(const float* from, int count) {
  return reinterpret_cast<Vec<float>>(_mm256_maskload_ps(from, lane_mask(count)));
}
template <>
VK_ALWAYS_INLINE void store_part<float>(float* to, Vec<float> v, int count) {
  _mm256_maskstore_ps(to, lane_mask(count), reinterpret_cast<__m256>(v));
}
#endif

// Reductions over the lanes, always in the same order.

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

// The i-th of kWideParts parts of a vector, in float64.
template <typename A>
constexpr int kWideParts = static_cast<int>(sizeof(double) / sizeof(A));
template <typename A>
VK_ALWAYS_INLINE Vec<double> widened_part(Vec<A> v, int i) {
  typedef A Slice __attribute__((vector_size(kVectorBytes / kWideParts<A>)));
  Slice slice;
  std::memcpy(&slice, reinterpret_cast<const char*>(&v) + i * sizeof(slice), sizeof(slice));
  return __builtin_convertvector(slice, Vec<double>);
}

// Long reductions to one number, in float64 whatever the inputs.
template <typename A>
class WideSum {
 public:
  VK_ALWAYS_INLINE void operator+=(Vec<A> v) {
    for (int part = 0; part < kWideParts<A>; ++part) sum_[part] += widened_part<A>(v, part);
  }
  // += a * (scale * sum_k coefficient[k] * taps[k] - b), lane by lane
  template <int N>
  VK_ALWAYS_INLINE void add(Vec<A> a, const Vec<A>* taps, const A* coefficient, double scale, Vec<A> b) {
    for (int part = 0; part < kWideParts<A>; ++part) {
      Vec<double> mixed{};
      for (int k = 0; k < N; ++k) mixed += widened_part<A>(taps[k], part) * static_cast<double>(coefficient[k]);
      sum_[part] += widened_part<A>(a, part) * (mixed * scale - widened_part<A>(b, part));
    }
  }
  VK_ALWAYS_INLINE double total() const {
    Vec<double> sum = sum_[0];
    for (int part = 1; part < kWideParts<A>; ++part) sum += sum_[part];
    return sum_lanes<double>(sum);
  }

 private:
  Vec<double> sum_[kWideParts<A>] = {};
};

// The larger of two vectors; where either is NaN, b.
VK_ALWAYS_INLINE Vec<float> max_of(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<float>>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

// p * 2^n for 1/2 < p < 2 and an integer -128 <= n <= 0 that comes as shifted = n + 1.5 * 2^23, n in its low bits.
VK_ALWAYS_INLINE Vec<float> scale_by_power(Vec<float> p, Vec<float> n, Vec<float> shifted) {
#if defined(__AVX512F__)
  (void)shifted;
  return reinterpret_cast<Vec<float>>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  // times 2^(n + 64) in the exponent's bits, then 2^-64 as a product, so that subnormal results round correctly
  (void)n;
  using Bits = VecTraits<float>::bits;
  const Bits exponent = (reinterpret_cast<Bits>(shifted) + 64u) << 23;
  return reinterpret_cast<Vec<float>>(reinterpret_cast<Bits>(p) + exponent) * 0x1p-64f;
#endif
}

// exp(x) for x <= 0, below 1.2 units in the last place; 0 below -104, NaN gives an unspecified value.
VK_ALWAYS_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  x = max_of(broadcast(-128.0f), x);
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
  return scale_by_power(p + 1.0f, n, shifted);
}
// The same in float64: 0 below -746.
VK_ALWAYS_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
  x = x > -746.0 ? x : broadcast(-746.0);
  const Vec<double> shifted = x * 1.4426950408889634 + 0x1.8p52;
  const Vec<double> n = shifted - 0x1.8p52;
  const Vec<double> r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  // Taylor to r^13: the next term is 4e-18 at ln 2 / 2
  double factorial = 6227020800.0;
  Vec<double> p = broadcast(1 / factorial);
  for (int k = 13; k > 2; --k) p = p * r + 1 / (factorial /= k);
  p = (p * r) * r + r;
  const Bits exponent = (reinterpret_cast<Bits>(shifted) + 600u) << 52;  // in two factors, as in float32
  return reinterpret_cast<Vec<double>>(reinterpret_cast<Bits>(p + 1.0) + exponent) * 0x1p-600;
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
