// SPDX-License-Identifier: Apache-2.0
// Pieces of the CPU kernels that forward and backward share: the walk over a row, and rows of modulation, widened once
// per run of tokens.
#pragma once

#include <cmath>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "adaln_zero/adaln_zero.h"
#include "common/vmath.h"

namespace vidkernels {
namespace adaln {
inline namespace VK_CPU_CAPABILITY {

// How much of a vector lies in the row: all of it, or the first `count` lanes at the row's end. Pair: two vectors.
struct Pair {};
struct Whole {};
struct Part {
  int count;
};

// Two vectors that travel together. bfloat16 is read and written in full vectors: the even elements are a shift away
// from float32, the odd ones a mask, where widening half a vector takes a shuffle and a shift, and narrowing one more
// shuffles. What meets such elements is kept in their order (`arrange`): all even ones of a pair, then all odd ones.
template <typename A>
struct Two {
  Vec<A> even, odd;
};
template <typename T>
constexpr bool paired = std::is_same_v<T, bfloat16>;

template <typename A>
VK_ALWAYS_INLINE Two<A> operator+(Two<A> x, Two<A> y) {
  return {x.even + y.even, x.odd + y.odd};
}
template <typename A>
VK_ALWAYS_INLINE Two<A> operator-(Two<A> x, Two<A> y) {
  return {x.even - y.even, x.odd - y.odd};
}
template <typename A>
VK_ALWAYS_INLINE Two<A> operator*(Two<A> x, Two<A> y) {
  return {x.even * y.even, x.odd * y.odd};
}

VK_ALWAYS_INLINE Two<float> load(const bfloat16* from, Pair) {
  typename VecTraits<float>::bits bits;
  std::memcpy(&bits, from, sizeof(bits));
  return {reinterpret_cast<Vec<float>>(bits << 16), reinterpret_cast<Vec<float>>(bits & 0xffff0000u)};
}
template <typename A>
VK_ALWAYS_INLINE Two<A> load(const A* from, Pair) {
  return {load_vec(from), load_vec(from + kLanes<A>)};
}
// To nearest, ties to even. A NaN stays one without being looked for: it comes from bfloat16 or from a row that
// `arrange` has been over, so its lower half is zero and rounding carries nothing into the exponent.
VK_ALWAYS_INLINE void store(bfloat16* to, Two<float> value, Pair) {
  using Bits = VecTraits<float>::bits;
#if defined(__AVX512BF16__)
  const Bits bits = join_bfloat16(value.even, value.odd);
#else
  const auto rounded = [](Vec<float> v) {
    const Bits wide = reinterpret_cast<Bits>(v);
    return wide + 0x7fffu + ((wide >> 16) & 1u);
  };
  const Bits bits = (rounded(value.even) >> 16) | (rounded(value.odd) & 0xffff0000u);
#endif
  std::memcpy(to, &bits, sizeof(bits));
}
template <typename A>
VK_ALWAYS_INLINE void store(A* to, Two<A> value, Pair) {
  store_vec(to, value.even);
  store_vec(to + kLanes<A>, value.odd);
}

template <typename T>
VK_ALWAYS_INLINE Vec<accumulate_t<T>> load(const T* from, Whole) {
  return load_vec(from);
}
template <typename T>
VK_ALWAYS_INLINE Vec<accumulate_t<T>> load(const T* from, Part part) {
  return load_part(from, part.count);
}
template <typename T>
VK_ALWAYS_INLINE void store(T* to, Vec<accumulate_t<T>> value, Whole) {
  store_vec(to, value);
}
template <typename T>
VK_ALWAYS_INLINE void store(T* to, Vec<accumulate_t<T>> value, Part part) {
  store_part(to, value, part.count);
}

// Zero in the lanes beyond the row's end.
template <typename V>
VK_ALWAYS_INLINE V keep(V value, Pair) {
  return value;
}
template <typename V>
VK_ALWAYS_INLINE V keep(V value, Whole) {
  return value;
}
template <typename V>
VK_ALWAYS_INLINE V keep(V value, Part part) {
  for (int i = part.count; i < static_cast<int>(sizeof(V) / sizeof(value[0])); ++i) value[i] = 0;
  return value;
}

// A line of a row that is needed soon, into the second-level cache. Four rows of two to four tensors are more streams
// than the hardware follows, and each is over after 2 KB.
template <typename T>
VK_ALWAYS_INLINE void fetch(const T* from) {
  __builtin_prefetch(from, 0, 2);
}
template <typename T>
VK_ALWAYS_INLINE void fetch_to_write(T* to) {
  __builtin_prefetch(to, 1, 2);
}

// Four partial sums hide the latency of the additions.
template <typename A>
struct Total {
  Vec<A> part[4] = {};

  A sum() const { return sum_lanes<A>((part[0] + part[1]) + (part[2] + part[3])); }
};

// `count` accumulators aligned to a cache line. Not std::vector, whose functions the linker may share between the
// copies of this code for different instruction sets.
template <typename A>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(A) + 63) / 64 * 64;
    data_ = static_cast<A*>(std::aligned_alloc(64, bytes == 0 ? 64 : bytes));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  A* data() const { return data_; }

 private:
  A* data_;
};

// The same value for all lanes, in the shape that a step of for_row computes with.
template <typename A>
VK_ALWAYS_INLINE Two<A> all(Vec<A> value, Pair) {
  return {value, value};
}
template <typename A>
VK_ALWAYS_INLINE Vec<A> all(Vec<A> value, Whole) {
  return value;
}
template <typename A>
VK_ALWAYS_INLINE Vec<A> all(Vec<A> value, Part) {
  return value;
}

template <typename A>
VK_ALWAYS_INLINE void accumulate(Vec<A>& sum, Vec<A> value) {
  sum += value;
}
template <typename A>
VK_ALWAYS_INLINE void accumulate(Vec<A>& sum, Two<A> value) {
  sum = (sum + value.even) + value.odd;
}

// f(offset, Pair or Whole or Part, k) over a row of T, a pair or one vector at a time; k = 0..3 says which partial sum
// a step may use.
template <typename T, typename F>
VK_ALWAYS_INLINE void for_row(int64_t channels, F&& f) {
  constexpr int lanes = kLanes<accumulate_t<T>>;
  int64_t i = 0;
  if constexpr (paired<T>) {
    for (; i + 8 * lanes <= channels; i += 8 * lanes) {
      f(i, Pair{}, 0);
      f(i + 2 * lanes, Pair{}, 1);
      f(i + 4 * lanes, Pair{}, 2);
      f(i + 6 * lanes, Pair{}, 3);
    }
    for (; i + 2 * lanes <= channels; i += 2 * lanes) f(i, Pair{}, 0);
  }
  for (; i + 4 * lanes <= channels; i += 4 * lanes) {
    f(i, Whole{}, 0);
    f(i + lanes, Whole{}, 1);
    f(i + 2 * lanes, Whole{}, 2);
    f(i + 3 * lanes, Whole{}, 3);
  }
  for (; i + lanes <= channels; i += lanes) f(i, Whole{}, 0);
  if (i < channels) f(i, Part{static_cast<int>(channels - i)}, 0);
}

// The even and the odd elements of 2 * lanes consecutive ones.
template <int lanes, typename A>
VK_ALWAYS_INLINE void take_apart(A* from) {
  A even[lanes], odd[lanes];  // arrays of their own, which GCC 12 needs to make two AVX-512 shuffles of the loop
  for (int k = 0; k < lanes; ++k) even[k] = from[2 * k], odd[k] = from[2 * k + 1];
  std::memcpy(from, even, sizeof(even));
  std::memcpy(from + lanes, odd, sizeof(odd));
}
#if defined(__AVX2__) && !defined(__AVX512F__)
template <>
VK_ALWAYS_INLINE void take_apart<8, float>(float* from) {
  const __m256 low = _mm256_loadu_ps(from), high = _mm256_loadu_ps(from + 8);
  const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88));  // even ones of both lower halves first
  const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0xdd));
  _mm256_storeu_pd(reinterpret_cast<double*>(from), _mm256_permute4x64_pd(even, 0xd8));
  _mm256_storeu_pd(reinterpret_cast<double*>(from + 8), _mm256_permute4x64_pd(odd, 0xd8));
}
#endif

// Brings a row of accumulators into the order of the pairs that for_row<T> makes, and back. Makes every NaN the plain
// one.
template <typename T, typename A>
inline void arrange(A* row, int64_t channels) {
  if constexpr (paired<T>) {
    constexpr int lanes = kLanes<accumulate_t<T>>;
    for (int64_t c = 0; c < channels; ++c) row[c] = row[c] == row[c] ? row[c] : A(NAN);
    for (int64_t i = 0; i + 2 * lanes <= channels; i += 2 * lanes) take_apart<lanes, A>(row + i);
  }
}
template <typename T, typename A>
inline void arrange_back(A* row, int64_t channels) {
  if constexpr (paired<T>) {
    constexpr int lanes = kLanes<accumulate_t<T>>;
    for (int64_t i = 0; i + 2 * lanes <= channels; i += 2 * lanes) {
      A even[lanes], odd[lanes];
      std::memcpy(even, row + i, sizeof(even));
      std::memcpy(odd, row + i + lanes, sizeof(odd));
      for (int k = 0; k < lanes; ++k) row[i + 2 * k] = even[k], row[i + 2 * k + 1] = odd[k];
    }
  }
}

template <typename A, typename F>
inline void for_table(const Table& table, int64_t row, int64_t channels, F&& f) {
  VK_DISPATCH_FLOATING(table.dtype, ([&] {
                         const scalar_t* source = static_cast<const scalar_t*>(table.data) + row * table.stride;
                         for (int64_t c = 0; c < channels; ++c) f(c, static_cast<A>(to_float(source[c])));
                       }));
}

// target = row of the table, or `missing` throughout.
template <typename A>
inline void widen(A* target, const Table& table, int64_t row, int64_t channels, A missing) {
  if (table.data == nullptr) {
    for (int64_t c = 0; c < channels; ++c) target[c] = missing;
    return;
  }
  for_table<A>(table, row, channels, [&](int64_t c, A value) { target[c] = value; });
}

// factor = 1 + scale, a = weight * factor, s = bias * factor + shift; s may be null.
template <typename A>
inline void fold(A* factor, A* a, A* s, const Table& scale, const Table& shift, const Table& weight, const Table& bias,
                 int64_t row, int64_t channels) {
  if (scale.data == nullptr) {
    widen(factor, scale, row, channels, A(1));
  } else {
    for_table<A>(scale, row, channels, [&](int64_t c, A value) { factor[c] = value + A(1); });
  }
  if (weight.data == nullptr) {
    std::memcpy(a, factor, channels * sizeof(A));
  } else {
    for_table<A>(weight, 0, channels, [&](int64_t c, A value) { a[c] = value * factor[c]; });
  }
  if (s == nullptr) return;
  widen(s, shift, row, channels, A(0));
  if (bias.data == nullptr) return;
  for_table<A>(bias, 0, channels, [&](int64_t c, A value) { s[c] += value * factor[c]; });
}

template <typename A>
inline void narrow_row(const TableGrad& grad, int64_t row, int64_t channels, const A* source) {
  if (grad.data == nullptr) return;
  VK_DISPATCH_FLOATING(grad.dtype, ([&] {
                         scalar_t* target = static_cast<scalar_t*>(grad.data) + row * channels;
                         for (int64_t c = 0; c < channels; ++c)
                           target[c] = from_float<scalar_t>(static_cast<accumulate_t<scalar_t>>(source[c]));
                       }));
}

template <typename T>
inline T* row_at(void* base, int64_t row, int64_t channels) {
  return base == nullptr ? nullptr : static_cast<T*>(base) + row * channels;
}
template <typename T>
inline const T* row_at(const void* base, int64_t row, int64_t channels) {
  return base == nullptr ? nullptr : static_cast<const T*>(base) + row * channels;
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace adaln
}  // namespace vidkernels
