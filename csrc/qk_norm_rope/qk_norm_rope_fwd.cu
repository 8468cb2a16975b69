// SPDX-License-Identifier: Apache-2.0
#include "qk_norm_rope/qk_norm_rope_rows.cuh"

namespace vidkernels {
namespace rope {
namespace {

template <typename T, bool kInterleaved, int kChunk>
__global__ void __launch_bounds__(kMaxThreads, 1)
    forward_kernel(const __grid_constant__ QkNormRopeParams p, const __grid_constant__ Plan plan) {
  constexpr int kValues = UnitShape<kInterleaved, kChunk>::values;
  constexpr int kUnits = UnitShape<kInterleaved, kChunk>::units;
  VK_DYNAMIC_SHARED(unsigned char, memory);
  const AngleTable angles{reinterpret_cast<TurnsPerUnit*>(memory),
                          reinterpret_cast<float2*>(memory + kMaxPairs * sizeof(TurnsPerUnit)),
                          static_cast<int>(p.pairs)};
  const int table_rows = p.frequency_heads == 1 ? 2 * blockDim.y : 0;
  const SumTable<float> sums{reinterpret_cast<float*>(angles.values + table_rows * AngleTable::row_size(angles.pairs)),
                             plan.sums};
  Unit units[kUnits];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) units[i] = make_unit<kInterleaved, kChunk>(p, plan, i * blockDim.x + threadIdx.x);
  angles.begin(plan);
  __syncthreads();
  int turn = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < plan.tokens; first += step, turn ^= 1) {
    const int64_t token = first + threadIdx.y;
    const bool inside = token < plan.tokens;
    const int64_t batch = batch_of(p, token), in_batch = token - batch * p.tokens;
    float value[kUnits][kValues], sum[kUnits];
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const Unit unit = anew(units[i]);
      if (!inside || !unit.active()) continue;
      const QkSide& side = p.side[unit.side()];
      const T* head = static_cast<const T*>(side.x) + offset_of(side.x_stride, batch, in_batch, unit.head());
      load_unit<T, kInterleaved, kChunk>(head, unit, value[i]);
    }
    if (p.frequency_heads == 1) angles.fill(p, plan, turn, first);
    if (p.norm != QkNorm::none) {
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        sum[i] = 0.0f;
        if (!inside || !units[i].active()) continue;
#pragma unroll
        for (int j = 0; j < kValues; ++j) sum[i] = fmaf(value[i][j], value[i][j], sum[i]);
      }
      if (plan.head_lanes > 0) {
        head_sums(plan, sum);
      } else {
        put_sums<float, kUnits>(p, sums, turn, units, sum);
      }
    }
    // Two turns of shared memory: nobody overwrites what a slower warp still reads, so one barrier a token is enough.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const Unit unit = anew(units[i]);
      if (!inside || !unit.active()) continue;
      if (p.norm != QkNorm::none) {
        const float total = plan.head_lanes > 0 ? sum[i] : get_sum(p, plan, sums, turn, unit);
        const float factor = cuda::inverse_root(total * plan.part[unit.side()] + static_cast<float>(p.eps));
        float weight[kValues];
        load_weight<T, kInterleaved, kChunk>(p, unit, weight);
#pragma unroll
        for (int j = 0; j < kValues; ++j) value[i][j] = value[i][j] * factor * weight[j];
      }
      rotate_unit<kInterleaved, kChunk>(p, plan, angles, turn, token, unit, 1.0f, value[i]);
      const QkSide& side = p.side[unit.side()];
      T* head = static_cast<T*>(side.y) + offset_of(side.y_stride, batch, in_batch, unit.head());
      store_unit<T, kInterleaved, kChunk>(head, unit, value[i]);
    }
  }
}

template <typename T>
void launch_forward(const QkNormRopeParams& p, cudaStream_t stream) {
  with_shape<T>(p, [&](auto interleaved, auto chunk) {
    // float32 in neighbouring pairs has 4 units a thread, whose addresses do not fit into the registers.
    if constexpr (chunk.value == kWideChunk<T> && !(sizeof(T) == 4 && interleaved.value)) {
      if (rows_fit(p)) return launch_rows<T, interleaved.value>(p, stream);
    }
    constexpr int kValues = UnitShape<interleaved.value, chunk.value>::values;
    const Plan plan = make_plan(p, kValues);
    const dim3 block = block_of(plan, kValues);
    const int64_t bytes = angle_bytes(p, block) + 2 * block.y * plan.sums * sizeof(float);
    const dim3 grid(static_cast<unsigned>(grid_of(plan, block, 2048)));
    VK_LAUNCH((forward_kernel<T, interleaved.value, chunk.value>), grid, block, bytes, stream)(p, plan);
    VK_CUDA_CHECK_LAUNCH();
  });
}

}  // namespace
}  // namespace rope

void qk_norm_rope_fwd_cuda(const QkNormRopeParams& p, cudaStream_t stream) {
  if (p.batch * p.tokens == 0 || p.side[0].heads + p.side[1].heads == 0) return;
  rope::check_limits(p);
  rope::in_launches(p, [&](const QkNormRopeParams& part) {
    if (p.dtype == DType::float32) rope::launch_forward<float>(part, stream);
    if (p.dtype == DType::bfloat16) rope::launch_forward<__nv_bfloat16>(part, stream);
    if (p.dtype == DType::float16) rope::launch_forward<__half>(part, stream);
  });
}

}  // namespace vidkernels
