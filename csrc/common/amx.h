// SPDX-License-Identifier: Apache-2.0
// For kernel files: the eight tile registers of AMX, 16 rows of 64 bytes each, and the product of two of them that
// holds pairs of bfloat16: C[m][n] += sum over 16 pairs of A[m][pair] B[pair][n], in float32; subnormal numbers count
// as zero. One instruction takes 16 cycles for 8192 products. Instructions are written out, since GCC's intrinsics want
// the register's number as a literal. `VK_EMULATE_TILES` puts arrays in the registers' place, for sanitizers and
// processors without them.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

constexpr int64_t kTileRows = 16, kTileBytes = 64;

#if defined(VK_EMULATE_TILES)

inline unsigned char (&tile_register(int n)) [kTileRows][kTileBytes] {
  static thread_local unsigned char registers[8][kTileRows][kTileBytes];
  return registers[n];
}

struct TileScope {};

template <int N>
inline void tile_zero() {
  std::memset(tile_register(N), 0, kTileRows * kTileBytes);
}
template <int N>
inline void tile_load(const void* from, int64_t stride) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    std::memcpy(tile_register(N)[r], static_cast<const char*>(from) + r * stride, kTileBytes);
  }
}
template <int N>
inline void tile_store(void* to, int64_t stride) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tile_register(N)[r], kTileBytes);
  }
}
template <int C, int A, int B>
inline void tile_multiply() {
  float sums[kTileRows][kTileRows];
  bfloat16 a[kTileRows][2 * kTileRows], b[kTileRows][2 * kTileRows];
  std::memcpy(sums, tile_register(C), sizeof(sums));
  std::memcpy(a, tile_register(A), sizeof(a));
  std::memcpy(b, tile_register(B), sizeof(b));
  for (int64_t m = 0; m < kTileRows; ++m) {
    for (int64_t k = 0; k < 2 * kTileRows; ++k) {
      for (int64_t n = 0; n < kTileRows; ++n) sums[m][n] += to_float(a[m][k]) * to_float(b[k / 2][2 * n + k % 2]);
    }
  }
  std::memcpy(tile_register(C), sums, sizeof(sums));
}

#else

// All registers whole; released at the end, so that they cost nothing at the next change of threads.
class TileScope {
 public:
  TileScope() {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int n = 0; n < 8; ++n) shape.row_bytes[n] = kTileBytes, shape.rows[n] = kTileRows;
    static_assert(sizeof(shape) == 64, "what LDTILECFG reads");
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~TileScope() { __asm__ volatile("tilerelease"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

template <int N>
inline __attribute__((always_inline)) void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(N));
}
// 16 rows, `stride` bytes apart.
template <int N>
inline __attribute__((always_inline)) void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(N) : "memory");
}
template <int N>
inline __attribute__((always_inline)) void tile_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(N) : "memory");
}
template <int C, int A, int B>
inline __attribute__((always_inline)) void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

// Sums of R x N tiles stay in the registers 0 to 3; `upper` and `lower` are those of 16 rows each, N tiles side by
// side.
inline __attribute__((always_inline)) void clear_sums() {
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
}
template <int R, int N>
inline __attribute__((always_inline)) void load_sums(const float* upper, const float* lower, int64_t stride) {
  tile_load<0>(upper, stride);
  if constexpr (N == 2) tile_load<1>(upper + kTileRows, stride);
  if constexpr (R == 2) tile_load<2>(lower, stride);
  if constexpr (R == 2 && N == 2) tile_load<3>(lower + kTileRows, stride);
}
template <int R, int N>
inline __attribute__((always_inline)) void store_sums(float* upper, float* lower, int64_t stride) {
  tile_store<0>(upper, stride);
  if constexpr (N == 2) tile_store<1>(upper + kTileRows, stride);
  if constexpr (R == 2) tile_store<2>(lower, stride);
  if constexpr (R == 2 && N == 2) tile_store<3>(lower + kTileRows, stride);
}
// Sums += A B for one tile of depth. Rows of A are in the registers 4 and 5, columns of B in 6 and 7: two by two, each
// tile that is loaded is multiplied twice.
template <int R, int N>
inline __attribute__((always_inline)) void add_products(const void* upper, const void* lower, int64_t a_stride,
                                                        const void* left, const void* right, int64_t b_stride) {
  tile_load<6>(left, b_stride);
  tile_load<4>(upper, a_stride);
  tile_multiply<0, 4, 6>();
  if constexpr (N == 2) {
    tile_load<7>(right, b_stride);
    tile_multiply<1, 4, 7>();
  }
  if constexpr (R == 2) {
    tile_load<5>(lower, a_stride);
    tile_multiply<2, 5, 6>();
  }
  if constexpr (R == 2 && N == 2) tile_multiply<3, 5, 7>();
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
