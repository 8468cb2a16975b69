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
  A half, scale, inverse;  // inverse: 1 / half, rounded
};

template <typename A>
inline Level<A> level_of(const FsqChannel& channel) {
  const auto grid = fsq_grid<A>(channel.levels);
  return {channel.levels, channel.first_threshold, channel.basis, grid.half, grid.scale, A(1) / grid.half};
}

__device__ inline float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ inline float product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double product(double a, double b) { return __dmul_rn(a, b); }
__device__ inline float sum(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double sum(double a, double b) { return __dadd_rn(a, b); }

// The product is rounded before the subtraction: no fused multiply-add, so the bits are those of the formula. So are
// the quotient's: the estimate corrected by its remainder is the rounded quotient (Markstein 1990), in 3 instructions
// where a division takes 10.
// kEstimate: the quotient to be rounded to 16 bits, of at most 257 levels, for which the estimate alone gives the same
// code. A quotient by at most 128 that is no midpoint of two such numbers is further than 2^-19 of its size from the
// next one, and the estimate nearer than 2^-22 to the quotient.
template <bool kEstimate, typename A>
__device__ inline A level_value(A digit, const Level<A>& level, bool symmetric) {
  if (symmetric) return sum(product(digit, level.scale), A(-1));
  const A above = digit - level.half, quotient = product(above, level.inverse);
  if (kEstimate) return quotient;
  return fused(fused(-quotient, level.half, above), level.inverse, quotient);
}

}  // namespace cuda
}  // namespace vidkernels
