// SPDX-License-Identifier: Apache-2.0
// CUDA: the forward where chunks are 16 bytes and tokens lie at one distance in all batch entries, as models call it.
//
// A thread keeps its units' addresses and weights in registers, and the next token's loads are on their way while it
// works on this one: 20 KB a multiprocessor. The general kernel widens within a branch and so waits for each load in
// turn, and one warp makes a token's angles before each barrier; here 4 tokens share a barrier and all warps work.
#pragma once

#include "qk_norm_rope/qk_norm_rope_launch.h"

namespace vidkernels {
namespace rope {

constexpr int kAnglesAhead = 4;  // tokens of a thread whose angles are made together

template <typename T>
constexpr int kWideChunk = 16 / static_cast<int>(sizeof(T));

// One unit's way through the tokens: addresses of its first chunk, and how far the next token of this thread is.
template <typename T>
struct Course {
  const T* x;
  T* y;
  int64_t x_step, y_step;
};

template <typename T, bool kInterleaved>
struct WideUnit {
  static constexpr int chunk = kWideChunk<T>;
  static constexpr int chunks = UnitShape<kInterleaved, chunk>::chunks;
  static constexpr int values = UnitShape<kInterleaved, chunk>::values;
  static constexpr int pairs = UnitShape<kInterleaved, chunk>::pairs;
  static constexpr int units = UnitShape<kInterleaved, chunk>::units;
  using Raw = cuda::Pack<T, chunk>;
};

template <typename T>
__device__ inline Course<T> make_course(const QkNormRopeParams& p, const Unit& unit, int64_t token, int64_t step) {
  const QkSide& side = p.side[unit.side()];
  return {static_cast<const T*>(side.x) + token * side.x_stride[1] + unit.head() * side.x_stride[2] + unit.first(),
          static_cast<T*>(side.y) + token * side.y_stride[1] + unit.head() * side.y_stride[2] + unit.first(),
          step * side.x_stride[1], step * side.y_stride[1]};
}

// Reads what this launch may overwrite later (in place), so not through the read-only cache.
__device__ inline uint4 load_word(const void* from) {
#if defined(VK_SIMT_SHIM)
  return *static_cast<const uint4*>(from);
#else
  uint4 word;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(from)
               : "memory");
  return word;
#endif
}

// Whole 16-byte words, widened later and asked for without a branch: the compiler makes a load that may not take place
// wait where it stands. Threads without a token or a unit read again what is there.
template <typename T, bool kInterleaved>
__device__ inline void load_raw(const T* x, const Unit& unit, uint4 (&raw)[WideUnit<T, kInterleaved>::chunks]) {
#pragma unroll
  for (int c = 0; c < WideUnit<T, kInterleaved>::chunks; ++c) {
    raw[c] = load_word(x + (c == 0 ? 0 : unit.second() - unit.first()));
  }
}

template <typename T, bool kInterleaved>
__device__ inline void widen_raw(const uint4 (&raw)[WideUnit<T, kInterleaved>::chunks],
                                 float (&value)[WideUnit<T, kInterleaved>::values]) {
  constexpr int kChunk = WideUnit<T, kInterleaved>::chunk;
#pragma unroll
  for (int c = 0; c < WideUnit<T, kInterleaved>::chunks; ++c) {
    typename WideUnit<T, kInterleaved>::Raw pack;
    memcpy(&pack, &raw[c], sizeof(pack));
#pragma unroll
    for (int j = 0; j < kChunk; ++j) value[c * kChunk + j] = cuda::widen(pack.value[j]);
  }
}

template <typename T, bool kInterleaved>
__device__ inline void store_values(T* y, const Unit& unit, const float (&value)[WideUnit<T, kInterleaved>::values]) {
  constexpr int kChunk = WideUnit<T, kInterleaved>::chunk;
#pragma unroll
  for (int c = 0; c < WideUnit<T, kInterleaved>::chunks; ++c) {
    typename WideUnit<T, kInterleaved>::Raw pack;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) pack.value[j] = cuda::narrow<T>(value[c * kChunk + j]);
    cuda::store_pack(y + (c == 0 ? 0 : unit.second() - unit.first()), pack);
  }
}

// rotate_unit without the angles of single heads, which would hold registers; no branch a pair where all are rotated.
template <typename T, bool kInterleaved>
__device__ inline void rotate_wide(const float2* row, const Unit& unit, int pairs,
                                   float (&value)[WideUnit<T, kInterleaved>::values]) {
  constexpr int kChunk = WideUnit<T, kInterleaved>::chunk, kPairs = WideUnit<T, kInterleaved>::pairs;
  const int rotated = pairs - unit.pair();
  if (rotated <= 0) return;
#pragma unroll
  for (int i = 0; i < kPairs; i += 2) {
    const float4 two = *reinterpret_cast<const float4*>(row + unit.pair() + i);
    const float2 angle[2] = {{two.x, two.y}, {two.z, two.w}};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at_a = kInterleaved ? 2 * (i + j) : i + j, at_b = kInterleaved ? at_a + 1 : kChunk + i + j;
      const float a = value[at_a], b = value[at_b];
      value[at_a] = i + j < rotated ? a * angle[j].x - b * angle[j].y : a;
      value[at_b] = i + j < rotated ? b * angle[j].x + a * angle[j].y : b;
    }
  }
}

// (cosine, sine) of the next kAnglesAhead tokens of every thread of the block, into the rows of one turn.
__device__ inline void fill_ahead(const QkNormRopeParams& p, const Plan& plan, const AngleTable& table, int turn,
                                  int64_t first, int64_t step) {
  const int rows = kAnglesAhead * static_cast<int>(blockDim.y);
  const int count = table.pairs * rows;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < count; i += blockDim.x * blockDim.y) {
    const int row = i / table.pairs, pair = i - row * table.pairs;
    const int ahead = row / static_cast<int>(blockDim.y), slot = row - ahead * static_cast<int>(blockDim.y);
    const int64_t token = first + ahead * step + slot;
    if (token >= plan.tokens) break;
    table.row(turn * kAnglesAhead + ahead, slot)[pair] =
        cos_sin(p, plan, table.frequencies, position_offset(p, token), pair, 0);
  }
}

template <typename T, bool kInterleaved>
__global__ void __launch_bounds__(kMaxThreads, 1)
    rows_kernel(const __grid_constant__ QkNormRopeParams p, const __grid_constant__ Plan plan) {
  using Shape = WideUnit<T, kInterleaved>;
  constexpr int kUnits = Shape::units, kValues = Shape::values;
  VK_DYNAMIC_SHARED(unsigned char, memory);
  const AngleTable angles{reinterpret_cast<TurnsPerUnit*>(memory),
                          reinterpret_cast<float2*>(memory + kMaxPairs * sizeof(TurnsPerUnit)),
                          static_cast<int>(p.pairs)};
  const int table_rows = 2 * kAnglesAhead * blockDim.y;
  const SumTable<float> sums{reinterpret_cast<float*>(angles.values + table_rows * AngleTable::row_size(angles.pairs)),
                             plan.sums};
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y;
  Unit units[kUnits];
  Course<T> course[kUnits];
  uint4 raw[kUnits][Shape::chunks];
  float weight[kUnits][kValues];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int index = i * blockDim.x + threadIdx.x;
    units[i] = make_unit<kInterleaved, Shape::chunk>(p, plan, index);
    const Unit read = make_unit<kInterleaved, Shape::chunk>(p, plan, min(index, plan.units - 1));
    const int64_t token = first + threadIdx.y;
    course[i] = make_course<T>(p, read, token < plan.tokens ? token : plan.tokens - 1, step);
    load_raw<T, kInterleaved>(course[i].x, read, raw[i]);
  }
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    if (p.norm != QkNorm::none && units[i].active()) {
      load_weight<T, kInterleaved, Shape::chunk>(p, units[i], weight[i]);
    }
  }
  angles.begin(plan);
  __syncthreads();
  for (int visit = 0; first < plan.tokens; first += step, ++visit) {
    const int turn = visit / kAnglesAhead % 2;
    if (angles.pairs > 0 && visit % kAnglesAhead == 0) {
      // Two turns: nobody overwrites what a slower warp still reads, so one barrier a turn is enough.
      fill_ahead(p, plan, angles, turn, first, step);
      __syncthreads();
    }
    const int64_t token = first + threadIdx.y;
    const bool inside = token < plan.tokens;
    float value[kUnits][kValues], sum[kUnits];
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      widen_raw<T, kInterleaved>(raw[i], value[i]);
      if (token + step < plan.tokens) course[i].x += course[i].x_step;
      load_raw<T, kInterleaved>(course[i].x, units[i], raw[i]);
    }
    if (p.norm != QkNorm::none) {
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        sum[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < kValues; ++j) sum[i] = fmaf(value[i][j], value[i][j], sum[i]);
      }
      if (plan.head_lanes > 0) {
        head_sums(plan, sum);
      } else {
        put_sums<float, kUnits>(p, sums, visit % 2, units, sum);
        __syncthreads();
      }
    }
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if (!inside || !units[i].active()) continue;
      if (p.norm != QkNorm::none) {
        const float total = plan.head_lanes > 0 ? sum[i] : get_sum(p, plan, sums, visit % 2, units[i]);
        const float factor = cuda::inverse_root(total * plan.part[units[i].side()] + static_cast<float>(p.eps));
#pragma unroll
        for (int j = 0; j < kValues; ++j) value[i][j] = value[i][j] * factor * weight[i][j];
      }
      rotate_wide<T, kInterleaved>(angles.row(turn * kAnglesAhead + visit % kAnglesAhead, threadIdx.y), units[i],
                                   angles.pairs, value[i]);
      store_values<T, kInterleaved>(course[i].y, units[i], value[i]);
      course[i].y += course[i].y_step;
    }
  }
}

// Whether all heads turn alike and a token of any batch entry is at token * stride[1].
inline bool rows_fit(const QkNormRopeParams& p) {
  if (p.frequency_heads > 1) return false;
  const auto even = [&](const int64_t (&stride)[3]) { return p.batch == 1 || stride[0] == p.tokens * stride[1]; };
  for (const QkSide& side : p.side) {
    if (side.heads > 0 && !(even(side.x_stride) && even(side.y_stride))) return false;
  }
  return true;
}

template <typename T, bool kInterleaved>
void launch_rows(const QkNormRopeParams& p, cudaStream_t stream) {
  constexpr int kValues = WideUnit<T, kInterleaved>::values;
  const Plan plan = make_plan(p, kValues);
  const dim3 block = block_of(plan, kValues);
  const int64_t row = AngleTable::row_size(static_cast<int>(p.pairs)) * sizeof(float2);
  const int64_t angles = 2 * kAnglesAhead * block.y * row;
  const int64_t bytes = kMaxPairs * sizeof(TurnsPerUnit) + angles + 2 * block.y * plan.sums * sizeof(float);
  const int threads = static_cast<int>(block.x * block.y);
  const auto kernel = rows_kernel<T, kInterleaved>;
  // As many blocks as run at once: half a wave more costs as much as a whole one.
  int resident = 0;
  VK_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, reinterpret_cast<const void*>(kernel), threads,
                                                              static_cast<size_t>(bytes)));
  const dim3 grid(static_cast<unsigned>(grid_of(plan, block, std::max(1, resident) * threads)));
  VK_LAUNCH(kernel, grid, block, bytes, stream)(p, plan);
  VK_CUDA_CHECK_LAUNCH();
}

}  // namespace rope
}  // namespace vidkernels
