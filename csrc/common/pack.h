// SPDX-License-Identifier: Apache-2.0
// For kernel files (<stem>_cpu.cpp): packs, the values of two vectors that lie side by side in memory.
//
// A pack of bfloat16 is one vector of memory: its even elements become one vector of float32 and its odd ones the
// other, by a shift and a mask. That takes half the instructions of widening them in order. So element i of a pack is
// in vector i / kLanes, lane i % kLanes, but for bfloat16 in vector i % 2, lane i / 2: `place_in_pack`. Everything that
// meets such values (affine parameters, sums per channel) is kept in the same order.
#pragma once

#include "common/vmath.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

template <typename T>
constexpr int kPack = 2 * kLanes<accumulate_t<T>>;

// Where element `i` of a row of packs is kept.
template <typename T>
VK_ALWAYS_INLINE int64_t place_in_pack(int64_t i) {
  if (!std::is_same<T, bfloat16>::value) return i;
  const int64_t rest = i % kPack<T>;
  return i - rest + rest % 2 * kLanes<float> + rest / 2;
}

template <typename T>
struct Pack {
  using V = Vec<accumulate_t<T>>;
  V v[2];
};

template <typename T>
VK_ALWAYS_INLINE Pack<T> load_pack(const T* from) {
  return {{load_vec(from), load_vec(from + kLanes<accumulate_t<T>>)}};
}
template <typename T>
VK_ALWAYS_INLINE void store_pack(T* to, const Pack<T>& pack) {
  store_vec(to, pack.v[0]);
  store_vec(to + kLanes<accumulate_t<T>>, pack.v[1]);
}
// The first `count` elements, 0 <= count <= kPack; loads fill the rest with zeros.
template <typename T>
VK_ALWAYS_INLINE Pack<T> load_pack_part(const T* from, int count) {
  constexpr int L = kLanes<accumulate_t<T>>;
  const int first = count < L ? count : L;
  return {{load_part(from, first), load_part(from + first, count - first)}};
}
template <typename T>
VK_ALWAYS_INLINE void store_pack_part(T* to, const Pack<T>& pack, int count) {
  constexpr int L = kLanes<accumulate_t<T>>;
  const int first = count < L ? count : L;
  store_part(to, pack.v[0], first);
  store_part(to + first, pack.v[1], count - first);
}

VK_ALWAYS_INLINE Pack<bfloat16> split_pack(VecTraits<float>::bits both) {
  return {{reinterpret_cast<Vec<float>>(both << 16), reinterpret_cast<Vec<float>>(both & 0xffff0000u)}};
}
VK_ALWAYS_INLINE VecTraits<float>::bits join_pack(const Pack<bfloat16>& pack) {
  return join_bfloat16(pack.v[0], pack.v[1]);
}
template <>
VK_ALWAYS_INLINE Pack<bfloat16> load_pack(const bfloat16* from) {
  VecTraits<float>::bits both;
  std::memcpy(&both, from, sizeof(both));
  return split_pack(both);
}
template <>
VK_ALWAYS_INLINE void store_pack(bfloat16* to, const Pack<bfloat16>& pack) {
  const VecTraits<float>::bits both = join_pack(pack);
  std::memcpy(to, &both, sizeof(both));
}
template <>
VK_ALWAYS_INLINE Pack<bfloat16> load_pack_part(const bfloat16* from, int count) {
#if defined(__AVX512F__)
  const __mmask32 mask = static_cast<__mmask32>((1ull << count) - 1);
  return split_pack(reinterpret_cast<VecTraits<float>::bits>(_mm512_maskz_loadu_epi16(mask, from)));
#else
  bfloat16 padded[kPack<bfloat16>] = {};
  for (int i = 0; i < count; ++i) padded[i] = from[i];
  return load_pack<bfloat16>(padded);
#endif
}
template <>
VK_ALWAYS_INLINE void store_pack_part(bfloat16* to, const Pack<bfloat16>& pack, int count) {
#if defined(__AVX512F__)
  const __mmask32 mask = static_cast<__mmask32>((1ull << count) - 1);
  _mm512_mask_storeu_epi16(to, mask, reinterpret_cast<__m512i>(join_pack(pack)));
#else
  bfloat16 padded[kPack<bfloat16>];
  store_pack<bfloat16>(padded, pack);
  for (int i = 0; i < count; ++i) to[i] = padded[i];
#endif
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
