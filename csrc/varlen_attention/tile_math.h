// SPDX-License-Identifier: Apache-2.0
// Register-blocked products and exponentials on small tiles, written with the vector types of GCC and Clang: one source
// for SSE, AVX2, AVX-512 and NEON.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/cpu.h"
#include "common/pairs.h"
#include "common/vmath.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kMaxPanel = 4;  // vectors a panel is wide: 6 x 4 accumulators + 4 operands of 32 registers
constexpr int panel_rows(int panel) { return panel >= 3 ? 6 : 8; }
#else
constexpr int kMaxPanel = 2;  // 6 x 2 accumulators + 2 operands + 1 broadcast of 16 registers
constexpr int panel_rows(int panel) { return panel == 2 ? 6 : 8; }
#endif

template <typename T>
using Vector = Vec<T>;

template <typename T>
inline int64_t padded(int64_t size) {
  return (size + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <typename T>
inline Vector<T> load(const T* source) {
  Vector<T> value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

template <typename T>
inline void store(T* target, Vector<T> value) {
  std::memcpy(target, &value, sizeof(value));
}

template <typename T>
inline Vector<T> splat(T value) {
  return value - Vector<T>{};
}

template <typename T>
inline Vector<T> maximum(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

// 2^x. float: relative error below 2^-23; results below 2^-126 become 0; NaN stays NaN.
inline Vector<float> exp2_vector(Vector<float> x) {
  using V = Vector<float>;
  using I = VecTraits<float>::integer;
  const V low = splat(-127.0f), high = splat(128.0f);
  V clamped = x < low ? low : x;
  clamped = clamped > high ? high : clamped;
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits of the mantissa.
  const V magic = splat(12582912.0f);
  const V shifted = clamped + magic;
  const V fraction = clamped - (shifted - magic);  // in [-0.5, 0.5]
  V result = splat(1.5252734e-5f);                 // ln(2)^k / k!, k = 7 .. 0
  result = result * fraction + splat(1.5403530e-4f);
  result = result * fraction + splat(1.3333558e-3f);
  result = result * fraction + splat(9.6181291e-3f);
  result = result * fraction + splat(5.5504109e-2f);
  result = result * fraction + splat(2.4022651e-1f);
  result = result * fraction + splat(6.9314718e-1f);
  result = result * fraction + splat(1.0f);
  I bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + (127 - 0x4b400000)) << 23;  // exponent field; -127 gives 0, 128 gives infinity
  V power;
  std::memcpy(&power, &bits, sizeof(power));
  return result * power;
}

inline Vector<double> exp2_vector(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// A score is sign * q.k, and its weight exp2(unit * (score - maximum)): scaling the difference leaves the largest
// weights exact. With scale 0 the sign is 0, since a unit of 0 would turn the -inf of a hidden score into NaN.
template <typename T>
inline T sign_of(double scale) {
  return scale > 0 ? T(1) : scale < 0 ? T(-1) : T(0);
}

template <typename T>
inline T unit_of(double scale) {
  constexpr double kLog2E = 1.4426950408889634;
  return static_cast<T>(scale == 0 ? 1.0 : std::abs(scale) * kLog2E);
}

// C[rows, panel] = (accumulate ? C : 0) + A[rows, depth] B[depth, panel]. A is read one scalar at a time through its
// two strides, so it may be transposed; rows of B and C are contiguous. The product is summed on its own and added to C
// once: over many calls that is blocked summation, whose error grows with the number of blocks and not of terms.
template <typename T, int ROWS, int PANEL>
inline void multiply_block(int64_t depth, const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_stride,
                           T* c, int64_t c_stride, bool accumulate) {
  Vector<T> sum[ROWS][PANEL];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < PANEL; ++p) sum[r][p] = Vector<T>{};
  }
  for (int64_t d = 0; d < depth; ++d) {
    Vector<T> operand[PANEL];
#pragma GCC unroll 4
    for (int p = 0; p < PANEL; ++p) operand[p] = load(b + d * b_stride + p * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const T scalar = a[r * a_row + d * a_depth];
#pragma GCC unroll 4
      for (int p = 0; p < PANEL; ++p) sum[r][p] += scalar * operand[p];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < PANEL; ++p) {
      T* target = c + r * c_stride + p * kLanes<T>;
      store(target, accumulate ? load(target) + sum[r][p] : sum[r][p]);
    }
  }
}

template <typename T, int PANEL>
void multiply_panel(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_depth, const T* b,
                    int64_t b_stride, T* c, int64_t c_stride, bool accumulate) {
  constexpr int kRows = panel_rows(PANEL);
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    multiply_block<T, kRows, PANEL>(depth, a + r * a_row, a_row, a_depth, b, b_stride, c + r * c_stride, c_stride,
                                    accumulate);
  for (; r + 4 <= rows; r += 4)
    multiply_block<T, 4, PANEL>(depth, a + r * a_row, a_row, a_depth, b, b_stride, c + r * c_stride, c_stride,
                                accumulate);
  for (; r + 2 <= rows; r += 2)
    multiply_block<T, 2, PANEL>(depth, a + r * a_row, a_row, a_depth, b, b_stride, c + r * c_stride, c_stride,
                                accumulate);
  for (; r < rows; ++r)
    multiply_block<T, 1, PANEL>(depth, a + r * a_row, a_row, a_depth, b, b_stride, c + r * c_stride, c_stride,
                                accumulate);
}

// C[rows, columns] (+)= A[rows, depth] B[depth, columns]; `columns` is a multiple of the vector length.
template <typename T>
void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_depth, const T* b,
              int64_t b_stride, T* c, int64_t c_stride, bool accumulate) {
  int64_t vectors = columns / kLanes<T>;
  while (vectors > 0) {
    // 5 vectors as 3 + 2: a last panel of one vector has too few accumulators to hide the latency of its additions.
    const int64_t panel = vectors == kMaxPanel + 1 ? (kMaxPanel + 2) / 2 : vectors < kMaxPanel ? vectors : kMaxPanel;
    switch (panel) {
#if defined(__AVX512F__)
      case 4:
        multiply_panel<T, 4>(rows, depth, a, a_row, a_depth, b, b_stride, c, c_stride, accumulate);
        break;
      case 3:
        multiply_panel<T, 3>(rows, depth, a, a_row, a_depth, b, b_stride, c, c_stride, accumulate);
        break;
#endif
      case 2:
        multiply_panel<T, 2>(rows, depth, a, a_row, a_depth, b, b_stride, c, c_stride, accumulate);
        break;
      default:
        multiply_panel<T, 1>(rows, depth, a, a_row, a_depth, b, b_stride, c, c_stride, accumulate);
    }
    b += panel * kLanes<T>;
    c += panel * kLanes<T>;
    vectors -= panel;
  }
}

// C = A B summed in blocks of about 32 terms: a product over the head dimension is as accurate as one in several lanes.
template <typename T>
void multiply_blocked(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, const T* b, T* c) {
  const int64_t blocks = std::max<int64_t>(1, (depth + 16) / 32);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = depth * i / blocks, last = depth * (i + 1) / blocks;
    multiply<T>(rows, columns, last - first, a + first, a_row, 1, b + first * columns, columns, c, columns, i > 0);
  }
}

// target[r, 0:columns] = source[r, :] widened, zero up to `target_stride`, which is `columns` rounded up to a vector.
template <typename S, typename T>
inline void pack_rows(const S* source, int64_t source_stride, int64_t rows, int64_t columns, T* target,
                      int64_t target_stride) {
  const int64_t whole = columns / kLanes<T> * kLanes<T>;
  for (int64_t r = 0; r < rows; ++r, source += source_stride, target += target_stride) {
    for (int64_t c = 0; c < whole; c += kLanes<T>) store(target + c, load_vec(source + c));
    if (whole < columns) store(target + whole, load_part(source + whole, static_cast<int>(columns - whole)));
  }
}

// target[c, r] = factor * source[r, c], zero from `rows` up to `target_stride`. Rows of the source are whole vectors.
template <typename T>
inline void transpose(const T* source, int64_t source_stride, int64_t rows, int64_t columns, T factor, T* target,
                      int64_t target_stride) {
#if defined(__AVX512F__)
  // Sixteen rows in registers: number by number, queries of 16 x 72 took an eighth of an item's time.
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t r = 0; r < target_stride; r += 16) {
      for (int64_t c = 0; c < columns; c += 16) {
        __m512i m[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const float* row = source + (r + i) * source_stride + c;
          m[i] = r + i < rows ? _mm512_loadu_si512(row) : _mm512_setzero_si512();
        }
        transpose_pairs(m);
        const int64_t count = std::min<int64_t>(16, columns - c);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          if (i < count) store(target + (c + i) * target_stride + r, factor * reinterpret_cast<Vec<float>>(m[i]));
        }
      }
    }
    return;
  }
#endif
  for (int64_t c = 0; c < columns; ++c) {
    T* to = target + c * target_stride;
    for (int64_t r = 0; r < rows; ++r) to[r] = factor * source[r * source_stride + c];
    for (int64_t r = rows; r < target_stride; ++r) to[r] = 0;
  }
}

#if defined(__AVX512F__)
// 2^(unit * difference) for a score less the maximum, to 2^-18; 0 from `lowest` = -125 / unit down; NaN stays NaN.
class Exponential {
 public:
  explicit Exponential(float unit)
      : unit_(splat(unit)), lowest_(splat(std::max(-125.0f / unit, -std::numeric_limits<float>::max()))) {}

  VK_ALWAYS_INLINE Vec<float> operator()(Vec<float> difference) const {
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits of the mantissa.
    const Vec<float> shifted = difference * unit_ + 12582912.0f;
    const Vec<float> fraction = difference * unit_ - (shifted - 12582912.0f);  // in [-0.5, 0.5]
    Vec<float> p = fraction * 0x1.3a02ccp-7f + 0x1.c9fc46p-5f;
    p = p * fraction + 0x1.ec0378p-3f;
    p = p * fraction + 0x1.62e12cp-1f;
    p = p * fraction + 1.0f;
    const __m512i power = _mm512_slli_epi32(reinterpret_cast<__m512i>(shifted), 23);  // added to the exponent
    const __mmask16 counts =
        _mm512_cmp_ps_mask(reinterpret_cast<__m512>(difference), reinterpret_cast<__m512>(lowest_), _CMP_NLT_UQ);
    return reinterpret_cast<Vec<float>>(_mm512_maskz_add_epi32(counts, reinterpret_cast<__m512i>(p), power));
  }

 private:
  Vec<float> unit_, lowest_;
};
#endif

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
