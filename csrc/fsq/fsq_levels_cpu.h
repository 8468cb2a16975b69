// SPDX-License-Identifier: Apache-2.0
// Pieces of the CPU forward that its memory layouts share: which level a vector of values reaches, and that level's
// code.
#pragma once

#include <algorithm>
#include <limits>

#include "common/vmath.h"
#include "fsq/fsq.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

constexpr int kMaxDepth = 4;                     // comparisons that the vector paths make
constexpr int kMaxSteps = (1 << kMaxDepth) - 1;  // thresholds of one channel that they tell apart
constexpr int64_t kFsqForwardGrain = 16384;  // elements per task: below 10 us a second thread costs more than it brings

template <typename A>
using VecInt = typename VecTraits<A>::integer;
template <typename A>
using Int = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

// The value as it is after rounding: the compiler may not fuse it into a following addition.
template <typename A>
VK_ALWAYS_INLINE Vec<A> rounded(Vec<A> value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  volatile Vec<A> stored = value;
  value = stored;
#endif
  return value;
}

// Comparisons that tell `levels` levels apart: the smallest depth with 2^depth >= levels.
inline int search_depth(int32_t levels) {
  int depth = 1;
  while ((1 << depth) < levels) ++depth;
  return depth;
}

// How many of 2^kDepth - 1 ascending thresholds a value has reached, by bisection: seven thresholds take three
// comparisons and four selections in place of seven comparisons and seven additions. Thresholds that a channel lacks
// are NaN, which no value reaches; NaN values reach none.
template <typename A, int kDepth>
VK_ALWAYS_INLINE VecInt<A> reached(Vec<A> v, const Vec<A>* threshold) {
  constexpr int kHalf = 1 << (kDepth - 1);
  const VecInt<A> upper = v >= threshold[kHalf - 1];
  const VecInt<A> digit = upper & (VecInt<A>{} + Int<A>(kHalf));
  if constexpr (kDepth == 1) {
    return digit;
  } else {
    Vec<A> rest[kHalf - 1];
    for (int k = 0; k < kHalf - 1; ++k) rest[k] = upper ? threshold[kHalf + k] : threshold[k];
    return digit + reached<A, kDepth - 1>(v, rest);
  }
}

// How a level's code follows from its digit: the fastest form that gives the formula's own bits for every digit of a
// channel. With h = floor(L/2), (digit - h) / h is a single product where h is a power of two, and a product of the
// centred digit up to 11 levels; the symmetric grid is a product by definition.
enum class CodeForm : int { product = 0, centred = 1, quotient = 2 };

template <typename A>
struct LevelCode {
  CodeForm form;
  A half, factor;
};

template <typename A, CodeForm form>
VK_ALWAYS_INLINE Vec<A> code_of(Vec<A> digit, Vec<A> half, Vec<A> factor) {
  if (form == CodeForm::quotient) return (digit - half) / half;
  if (form == CodeForm::centred) return (digit - half) * factor;
  return rounded<A>(digit * factor) - A(1);
}

template <typename A>
LevelCode<A> level_code(int32_t levels, bool symmetric) {
  const FsqGrid<A> grid = fsq_grid<A>(levels);
  if (symmetric) return {CodeForm::product, grid.half, grid.scale};
  LevelCode<A> code{CodeForm::product, grid.half, A(1) / grid.half};
  for (int32_t k = 0; k < levels; ++k) {
    const Vec<A> digit = broadcast<A>(static_cast<A>(k)), half = broadcast<A>(code.half);
    const Vec<A> factor = broadcast<A>(code.factor);
    const A quotient = code_of<A, CodeForm::quotient>(digit, half, factor)[0];
    const bool product = code_of<A, CodeForm::product>(digit, half, factor)[0] == quotient;
    const bool centred = code_of<A, CodeForm::centred>(digit, half, factor)[0] == quotient;
    code.form = std::max(code.form, product ? CodeForm::product : centred ? CodeForm::centred : CodeForm::quotient);
  }
  return code;
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
