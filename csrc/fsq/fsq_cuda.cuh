// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of the stem share: the level grid by value in the launch arguments, and the launchers.
#pragma once

#include "common/token_kernels.cuh"
#include "fsq/fsq.h"

namespace vidkernels {

void fsq_fwd_cuda(const FsqFwdParams& p, cudaStream_t stream);
void fsq_bwd_cuda(const FsqBwdParams& p, cudaStream_t stream);
void fsq_decode_cuda(const FsqDecodeParams& p, cudaStream_t stream);

namespace cuda {

// One channel's grid. Launch arguments lie in constant memory, and all threads read the same channel at the same time.
template <typename A>
struct Level {
  int32_t levels, first;
  uint32_t basis;
  A half, scale;
};

template <typename A>
inline Level<A> level_of(const FsqChannel& channel) {
  const auto grid = fsq_grid<A>(channel.levels);
  return {channel.levels, channel.first_threshold, channel.basis, grid.half, grid.scale};
}

// The product is rounded before the subtraction: no fused multiply-add, so the bits are those of the formula.
__device__ inline float level_value(float digit, const Level<float>& level, bool symmetric) {
  return symmetric ? __fadd_rn(__fmul_rn(digit, level.scale), -1.0f) : (digit - level.half) / level.half;
}
__device__ inline double level_value(double digit, const Level<double>& level, bool symmetric) {
  return symmetric ? __dadd_rn(__dmul_rn(digit, level.scale), -1.0) : (digit - level.half) / level.half;
}

}  // namespace cuda
}  // namespace vidkernels
