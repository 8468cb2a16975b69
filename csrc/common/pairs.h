// SPDX-License-Identifier: Apache-2.0
// For kernel files: operands of products whose terms come in pairs of bfloat16.
#pragma once

#include "common/dtype.h"
#include "common/vmath.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

#if defined(__AVX512F__)
// Sixteen vectors of pairs, or of float32, transposed.
VK_ALWAYS_INLINE void transpose_pairs(__m512i (&m)[16]) {
  using Lanes = VecTraits<float>::integer;
  const Lanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
  for (int s = 1; s < 16; s *= 2) {  // blocks of s x s change places across the diagonal
    const Lanes low = (lane & s) != 0 ? lane - s + 16 : lane, high = (lane & s) != 0 ? lane + 16 : lane + s;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if ((i & s) != 0) continue;
      const __m512i a = m[i], b = m[i + s];
      m[i] = _mm512_permutex2var_epi32(a, reinterpret_cast<__m512i>(low), b);
      m[i + s] = _mm512_permutex2var_epi32(a, reinterpret_cast<__m512i>(high), b);
    }
  }
}

#endif

#if defined(__AVX512BF16__)
// Sixteen pairs of two rows, of which either may be null: zeros. `live`: which pairs exist.
VK_ALWAYS_INLINE __m512i pair_up(const bfloat16* first, const bfloat16* second, __mmask16 live) {
  const auto wide = [live](const bfloat16* row) {
    return row == nullptr ? _mm512_setzero_si512() : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, row));
  };
  return _mm512_or_si512(wide(first), _mm512_slli_epi32(wide(second), 16));
}
#endif

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
