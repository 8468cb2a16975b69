// SPDX-License-Identifier: Apache-2.0
// What leaves a convolution by boxes: sums of products, in the registers of warpgroups, as results in device memory.
#pragma once

#include "causal_conv3d/causal_conv3d_boxes.cuh"
#include "common/warpgroup.cuh"

namespace vidkernels {
namespace cuda {

// Of 4 lanes next to each other, lane q brings columns 8 g + 2 q + (0, 1) of all groups g, and takes the 8 of group q.
__device__ inline void transpose_in_quad(uint32_t (&v)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int distance = 1; distance <= 2; ++distance) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = distance == 1 ? 2 * i : i, high = low + distance;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? v[low] : v[high], distance);
      v[low] = upper ? got : v[low];
      v[high] = upper ? v[high] : got;
    }
  }
}

// Of 64 positions: row r of `sums` is position (r / 8, r % 8) of a block. Offsets in a frame have 32 bits: with 64 the
// sums would not have the registers to themselves.
template <typename T, int kFilters, bool kResidual>
__device__ void store_sums(const Problem& p, const Tile& tile, int row, int column, const float (&sums)[kFilters / 2]) {
  const CausalConv3dParams& c = p.conv;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, filter = tile.filter + 8 * (lane % 4);
  const auto offset = [&](const int64_t (&stride)[4]) { return tile.batch * stride[0] + tile.frame * stride[1]; };
  T* const y = static_cast<T*>(c.y) + offset(c.y_stride);
  const T* const residual = static_cast<const T*>(c.residual) + (kResidual ? offset(c.residual_stride) : 0);
  const int w = column + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int h = row + 2 * warp + half;
    const bool inside = h < c.out_size[1] && w < c.out_size[2];
    const int at = h * static_cast<int>(c.y_stride[2]) + w * static_cast<int>(c.y_stride[3]) + filter;
    const int from = h * static_cast<int>(c.residual_stride[2]) + w * static_cast<int>(c.residual_stride[3]) +
                     tile.filter + 2 * (lane % 4);
#pragma unroll
    for (int first = 0; first < kFilters; first += 32) {
      uint32_t v[4] = {};
      if (kResidual) {
        // 4 bytes at a time, since those of all groups at once have no registers
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[i] = inside ? __ldg(reinterpret_cast<const uint32_t*>(residual + from + first + 8 * i)) : 0;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Pack<T, 2> pair;
        memcpy(&pair, &v[i], sizeof(pair));
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float sum = sums[first / 2 + 4 * i + 2 * half + e];
          pair.value[e] = narrow<T>(kResidual ? sum + widen(pair.value[e]) : sum);
        }
        memcpy(&v[i], &pair, sizeof(pair));
      }
      transpose_in_quad(v);
      Pack<T, 8> result;
      memcpy(&result, v, sizeof(v));
      if (inside) store_pack(y + at + first, result);
    }
  }
}

// y = residual + act(sum + bias). What is the same for all blocks is asked outside of the loops over sums, which are
// then without branches: a load or an exchange waits for hundreds of clocks, the next one's need not.
template <typename T, int kFilters, int kBlocks>
__device__ void store_tile(const Problem& p, const Tile& tile, const float* bias, int warpgroup,
                           float (&sums)[kBlocks][kFilters / 2]) {
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < kFilters / 8; ++i) {
      const float2 added = load_shared_pair(bias + 8 * i + threadIdx.x % 4 * 2);
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[block][4 * i + k] += k % 2 == 0 ? added.x : added.y;
    }
  }
  if (p.conv.silu) {
#pragma unroll
    for (auto& of_block : sums) {
#pragma unroll
      for (float& sum : of_block) sum = __fdividef(sum, 1.0f + __expf(-sum));
    }
  }
  const int columns = p.box.block_columns, first = warpgroup * kBlocks;
  if (p.conv.residual == nullptr) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int row = (first + i) / columns * 8, column = (first + i) % columns * 8;
      store_sums<T, kFilters, false>(p, tile, tile.row + row, tile.column + column, sums[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int row = (first + i) / columns * 8, column = (first + i) % columns * 8;
      store_sums<T, kFilters, true>(p, tile, tile.row + row, tile.column + column, sums[i]);
    }
  }
}

}  // namespace cuda
}  // namespace vidkernels
