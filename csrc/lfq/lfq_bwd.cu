// SPDX-License-Identifier: Apache-2.0
#include "lfq/lfq_cuda.cuh"

namespace vidkernels {
namespace {

// A thread owns one codebook of one token: 9 to 36 channels, read twice, the second time from the first cache.
template <typename T>
__global__ void __launch_bounds__(cuda::kThreads)
    bwd_kernel(const __grid_constant__ TokenLayout layout, accumulate_t<T> scale, bool planar, const T* __restrict__ x,
               const T* __restrict__ grad, T* __restrict__ dx) {
  using A = accumulate_t<T>;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * cuda::kThreads + threadIdx.x;
  if (thread >= layout.outer * layout.inner * layout.codebooks) return;
  const int64_t rest = thread % (layout.inner * layout.codebooks), outer = thread / (layout.inner * layout.codebooks);
  const int64_t i = planar ? rest % layout.inner : rest / layout.codebooks;
  const int64_t book = planar ? rest / layout.inner : rest % layout.codebooks;
  const TokenStrides &sx = layout.operand[0], &sg = layout.operand[1], &sd = layout.operand[2];
  x += cuda::token_offset(sx, outer, i, book, layout.channels);
  grad += cuda::token_offset(sg, outer, i, book, layout.channels);
  dx += cuda::token_offset(sd, outer, i, book, layout.channels);
  A square = 0;
  for (int c = 0; c < layout.channels; ++c) {
    const A v = cuda::widen(x[c * sx.channel]);
    square += v * v;
  }
  const A norm = cuda::floored_norm(square);
  // Below the floor the divisor is a constant. Unit vectors first: <x, g> / |x|^2 would overflow for large x.
  const bool floored = norm == A(kLfqNormFloor);
  A dot = 0;
  for (int c = 0; c < layout.channels && !floored; ++c) {
    dot += cuda::widen(x[c * sx.channel]) / norm * cuda::widen(grad[c * sg.channel]);
  }
  for (int c = 0; c < layout.channels; ++c) {
    const A unit = cuda::widen(x[c * sx.channel]) / norm;
    dx[c * sd.channel] = cuda::narrow<T>(scale / norm * (cuda::widen(grad[c * sg.channel]) - unit * dot));
  }
}

}  // namespace

void lfq_bwd_cuda(const LfqBwdParams& p, cudaStream_t stream) {
  const unsigned blocks = cuda::blocks_for(p.layout.tokens() * p.layout.codebooks);
  VK_CUDA_DISPATCH_FLOATING(p.dtype, [&] {
    VK_LAUNCH((bwd_kernel<scalar_t>), blocks, cuda::kThreads, 0, stream)
    (p.layout, static_cast<accumulate_t<scalar_t>>(p.scale), p.layout.planar(3), static_cast<const scalar_t*>(p.x),
     static_cast<const scalar_t*>(p.grad), static_cast<scalar_t*>(p.dx));
  });
  VK_CUDA_CHECK_LAUNCH();
}

}  // namespace vidkernels
