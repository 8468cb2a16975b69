// SPDX-License-Identifier: Apache-2.0
// Backward in one pass over (x, dy), and a small second launch that adds the blocks' sums for the weights' gradients in
// a fixed order. With xhat = x * r and dz = dy turned back: dx = r (w dz - xhat mean(w dz xhat)), dw = sum dz xhat.
#include "qk_norm_rope/qk_norm_rope_launch.h"

namespace vidkernels {
namespace rope {
namespace {

// First channel of a unit's head in a row that holds q's heads, then k's.
__device__ inline int64_t row_offset(const QkNormRopeParams& p, const Unit& unit) {
  return ((unit.side() == 0 ? 0 : p.side[0].heads) + unit.head()) * p.head_dim;
}

// Sums of dz * xhat over the tokens of a block, per channel of every head, in shared memory: they would take as many
// registers as x and dz together. Every thread touches its own channels only.
struct WeightSums {
  float* gathered;  // [blockDim.y, heads of q and k * head_dim]
  int64_t row;

  // add: += value, else = value.
  template <bool kInterleaved, int kChunk>
  __device__ void put(const QkNormRopeParams& p, const Unit& unit, bool add,
                      const float (&value)[UnitShape<kInterleaved, kChunk>::values]) const {
    constexpr int kStep = kChunk < 4 ? kChunk : 4;
    float* target = gathered + threadIdx.y * row + row_offset(p, unit);
#pragma unroll
    for (int j = 0; j < UnitShape<kInterleaved, kChunk>::values; j += kStep) {
      const int channel = j < kChunk ? unit.first() + j : unit.second() + j - kChunk;
      auto& place = *reinterpret_cast<cuda::Pack<float, kStep>*>(target + channel);
      cuda::Pack<float, kStep> sum = place;
#pragma unroll
      for (int i = 0; i < kStep; ++i) sum.value[i] = add ? sum.value[i] + value[j + i] : value[j + i];
      place = sum;
    }
  }

  // After a barrier: this block's row of p.partial, heads added up for a weight that they share.
  __device__ void hand_over(const QkNormRopeParams& p) const {
    const bool full = p.norm == QkNorm::full;
    const int64_t columns = full ? row : 2 * p.head_dim;
    for (int64_t c = threadIdx.y * blockDim.x + threadIdx.x; c < columns; c += blockDim.x * blockDim.y) {
      const int side = !full && c >= p.head_dim ? 1 : 0;
      const int64_t start = full ? c : c + side * (p.side[0].heads - 1) * p.head_dim;
      const int64_t heads = full ? 1 : p.side[side].heads;
      float sum = 0.0f;
      for (unsigned slot = 0; slot < blockDim.y; ++slot) {
        for (int64_t head = 0; head < heads; ++head) sum += gathered[slot * row + start + head * p.head_dim];
      }
      p.partial[blockIdx.x * columns + c] = sum;
    }
  }
};

template <typename T, bool kInterleaved, int kChunk>
__global__ void __launch_bounds__(kMaxThreads)
    backward_kernel(const __grid_constant__ QkNormRopeParams p, const __grid_constant__ Plan plan) {
  constexpr int kValues = UnitShape<kInterleaved, kChunk>::values;
  constexpr int kUnits = UnitShape<kInterleaved, kChunk>::units;
  VK_DYNAMIC_SHARED(unsigned char, memory);
  const AngleTable angles{reinterpret_cast<TurnsPerUnit*>(memory),
                          reinterpret_cast<float2*>(memory + kMaxPairs * sizeof(TurnsPerUnit)),
                          static_cast<int>(p.pairs)};
  const int table_rows = p.frequency_heads == 1 ? 2 * blockDim.y : 0;
  const SumTable<float2> sums{angles.values + table_rows * AngleTable::row_size(angles.pairs), plan.sums};
  const WeightSums weight_sums{reinterpret_cast<float*>(sums.values + 2 * blockDim.y * plan.sums),
                               (p.side[0].heads + p.side[1].heads) * p.head_dim};
  Unit units[kUnits];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    units[i] = make_unit<kInterleaved, kChunk>(p, plan, i * blockDim.x + threadIdx.x);
    const float zeros[kValues] = {};
    if (p.partial != nullptr && units[i].active()) weight_sums.put<kInterleaved, kChunk>(p, units[i], false, zeros);
  }
  angles.begin(plan);
  __syncthreads();
  int turn = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < plan.tokens; first += step, turn ^= 1) {
    const int64_t token = first + threadIdx.y;
    const bool inside = token < plan.tokens;
    const int64_t batch = batch_of(p, token), in_batch = token - batch * p.tokens;
    float x[kUnits][kValues], dz[kUnits][kValues];
    float2 sum[kUnits];
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const Unit unit = anew(units[i]);
      if (!inside || !unit.active()) continue;
      const QkSide& side = p.side[unit.side()];
      const T* dy = static_cast<const T*>(side.dy) + offset_of(side.dy_stride, batch, in_batch, unit.head());
      load_unit<T, kInterleaved, kChunk>(dy, unit, dz[i]);
      if (p.norm == QkNorm::none) continue;
      const T* head = static_cast<const T*>(side.x) + offset_of(side.x_stride, batch, in_batch, unit.head());
      load_unit<T, kInterleaved, kChunk>(head, unit, x[i]);
    }
    if (p.frequency_heads == 1) angles.fill(p, plan, turn, first);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      sum[i] = {0.0f, 0.0f};
      const Unit unit = anew(units[i]);
      if (!inside || !unit.active()) continue;
      rotate_unit<kInterleaved, kChunk>(p, plan, angles, turn, token, unit, -1.0f, dz[i]);
      if (p.norm == QkNorm::none) continue;
      float weight[kValues];
      load_weight<T, kInterleaved, kChunk>(p, unit, weight);
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        sum[i].x = fmaf(x[i][j], x[i][j], sum[i].x);
        sum[i].y = fmaf(dz[i][j] * weight[j], x[i][j], sum[i].y);
      }
    }
    if (plan.head_lanes > 0) {
      head_sums(plan, sum);
    } else if (p.norm != QkNorm::none) {
      put_sums<float2, kUnits>(p, sums, turn, units, sum);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const Unit unit = anew(units[i]);
      if (!inside || !unit.active()) continue;
      const QkSide& side = p.side[unit.side()];
      if (p.norm != QkNorm::none) {
        const float2 total = plan.head_lanes > 0 ? sum[i] : get_sum(p, plan, sums, turn, unit);
        const float part = plan.part[unit.side()];
        const float r = cuda::inverse_root(total.x * part + static_cast<float>(p.eps));
        const float mean = r * total.y * part;
        float weight[kValues];
        load_weight<T, kInterleaved, kChunk>(p, unit, weight);
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
          const float xhat = x[i][j] * r;
          x[i][j] = dz[i][j] * xhat;
          dz[i][j] = r * (dz[i][j] * weight[j] - xhat * mean);
        }
        if (p.partial != nullptr) weight_sums.put<kInterleaved, kChunk>(p, unit, true, x[i]);
      }
      T* dx = static_cast<T*>(side.y) + offset_of(side.y_stride, batch, in_batch, unit.head());
      store_unit<T, kInterleaved, kChunk>(dx, unit, dz[i]);
    }
  }
  if (p.partial == nullptr) return;
  __syncthreads();
  weight_sums.hand_over(p);
}

// dweight[c] = sum over the blocks' rows; 16 ways take every 16th row, then the ways are added in order.
constexpr int kReduceColumns = 32, kReduceWays = 16;

template <typename T>
__global__ void __launch_bounds__(kReduceColumns* kReduceWays)
    weight_kernel(const __grid_constant__ QkNormRopeParams p) {
  __shared__ float ways[kReduceWays][kReduceColumns];
  const bool full = p.norm == QkNorm::full;
  const int64_t of_q = full ? p.side[0].heads * p.head_dim : p.head_dim;
  const int64_t columns = of_q + (full ? p.side[1].heads * p.head_dim : p.head_dim);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kReduceColumns + threadIdx.x;
  float sum = 0.0f;
  if (column < columns) {
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < p.partials; row += kReduceWays) sum += p.partial[row * columns + column];
  }
  ways[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
  sum = 0.0f;
  for (int way = 0; way < kReduceWays; ++way) sum += ways[way][threadIdx.x];
  const QkSide& side = p.side[column < of_q ? 0 : 1];
  const int64_t at = column < of_q ? column : column - of_q;
  if (side.dweight == nullptr) return;
  if (side.weight_dtype == DType::float32) {
    static_cast<float*>(side.dweight)[at] = sum;
  } else {
    static_cast<T*>(side.dweight)[at] = cuda::narrow<T>(sum);
  }
}

constexpr int64_t kDefaultShared = 48 * 1024;
constexpr int kThreadsPerMultiprocessor = 1024;

template <typename T>
void launch_backward(const QkNormRopeParams& p, cudaStream_t stream) {
  with_shape<T>(p, [&](auto interleaved, auto chunk) {
    constexpr int kValues = UnitShape<interleaved.value, chunk.value>::values;
    const auto kernel = backward_kernel<T, interleaved.value, chunk.value>;
    const Plan plan = make_plan(p, kValues);
    const dim3 block = block_of(plan, kValues);
    const int64_t row = (p.side[0].heads + p.side[1].heads) * p.head_dim;
    const int64_t bytes = angle_bytes(p, block) + 2 * block.y * plan.sums * sizeof(float2) +
                          (p.partial == nullptr ? 0 : block.y * row * sizeof(float));
    if (bytes > kDefaultShared) {
      VK_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    }
    const int64_t grid = p.partial == nullptr ? grid_of(plan, block, kThreadsPerMultiprocessor) : p.partials;
    VK_LAUNCH(kernel, dim3(static_cast<unsigned>(grid)), block, bytes, stream)(p, plan);
    VK_CUDA_CHECK_LAUNCH();
  });
  if (p.partial == nullptr) return;
  const int64_t columns = qk_norm_rope_weight_columns(p);
  const dim3 grid(static_cast<unsigned>((columns + kReduceColumns - 1) / kReduceColumns));
  VK_LAUNCH((weight_kernel<T>), grid, dim3(kReduceColumns, kReduceWays), 0, stream)(p);
  VK_CUDA_CHECK_LAUNCH();
}

// Blocks of the backward's grid; the larger number if each side gets its own launch.
template <typename T>
int64_t backward_blocks(const QkNormRopeParams& p) {
  int64_t blocks = 0;
  in_launches(p, [&](const QkNormRopeParams& part) {
    with_shape<T>(part, [&](auto interleaved, auto chunk) {
      constexpr int kValues = UnitShape<interleaved.value, chunk.value>::values;
      const Plan plan = make_plan(part, kValues);
      blocks = std::max(blocks, grid_of(plan, block_of(plan, kValues), kThreadsPerMultiprocessor));
    });
  });
  return blocks;
}

}  // namespace
}  // namespace rope

int64_t qk_norm_rope_bwd_blocks(const QkNormRopeParams& p) {
  rope::check_limits(p);
  if (p.batch * p.tokens == 0 || p.side[0].heads + p.side[1].heads == 0) return 0;
  if (p.dtype == DType::float32) return rope::backward_blocks<float>(p);
  if (p.dtype == DType::bfloat16) return rope::backward_blocks<__nv_bfloat16>(p);
  return rope::backward_blocks<__half>(p);
}

void qk_norm_rope_bwd_cuda(const QkNormRopeParams& p, cudaStream_t stream) {
  if (p.batch * p.tokens == 0 || p.side[0].heads + p.side[1].heads == 0) return;
  rope::check_limits(p);
  rope::in_launches(p, [&](QkNormRopeParams part) {
    if (part.side[0].heads == 0) part.side[0].dweight = nullptr;
    if (part.side[1].heads == 0) part.side[1].dweight = nullptr;
    if (p.dtype == DType::float32) rope::launch_backward<float>(part, stream);
    if (p.dtype == DType::bfloat16) rope::launch_backward<__nv_bfloat16>(part, stream);
    if (p.dtype == DType::float16) rope::launch_backward<__half>(part, stream);
  });
}

}  // namespace vidkernels
