// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of the stem share.
#pragma once

#include "common/token_kernels.cuh"
#include "lfq/lfq.h"

namespace vidkernels {

void lfq_fwd_cuda(const LfqFwdParams& p, cudaStream_t stream);
void lfq_bwd_cuda(const LfqBwdParams& p, cudaStream_t stream);
void lfq_decode_cuda(const LfqDecodeParams& p, cudaStream_t stream);

namespace cuda {

template <typename A>
__device__ inline A floored_norm(A square) {
  const A norm = sizeof(A) == 8 ? static_cast<A>(sqrt(static_cast<double>(square)))
                                : static_cast<A>(sqrtf(static_cast<float>(square)));
  return norm < A(kLfqNormFloor) ? A(kLfqNormFloor) : norm;
}

}  // namespace cuda
}  // namespace vidkernels
