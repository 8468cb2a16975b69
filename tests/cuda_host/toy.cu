// SPDX-License-Identifier: Apache-2.0
// Kernels for the tests of the shim itself: one that is right, and one for each fault the shim is there to find.
#include "common/cuda.h"

namespace vidkernels {
namespace {

// Rows minus their mean; one block a row, any block size that is a multiple of 32.
template <typename T>
__global__ void center_kernel(const T* __restrict__ x, T* __restrict__ y, int channels) {
  VK_DYNAMIC_SHARED(float, partial);
  __shared__ float mean;
  const T* row = x + static_cast<int64_t>(blockIdx.x) * channels;
  float sum = 0;
  for (int c = threadIdx.x; c < channels; c += blockDim.x) sum += cuda::widen(row[c]);
  sum = cuda::warp_sum(sum);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    mean = 0;
    for (unsigned i = 0; i < blockDim.x / 32; ++i) mean += partial[i];
    mean /= static_cast<float>(channels);
  }
  __syncthreads();
  T* out = y + static_cast<int64_t>(blockIdx.x) * channels;
  for (int c = threadIdx.x; c < channels; c += blockDim.x) out[c] = cuda::narrow<T>(cuda::widen(row[c]) - mean);
}

// Reverses a row through shared memory without the barrier between writing and reading.
__global__ void race_kernel(const float* x, float* y) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = tile[63 - threadIdx.x];
}

__global__ void overrun_kernel(float* y) {
  VK_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

__global__ void divergent_kernel(float* y) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 1.0f;
}

__global__ void deadlock_kernel(float* y) {
  if (threadIdx.x == 0) __syncthreads();
  y[threadIdx.x] = __shfl_sync(0xffffffffu, static_cast<float>(threadIdx.x), 0);
}

}  // namespace

void center_cuda(const void* x, void* y, int rows, int channels, DType dtype, cudaStream_t stream) {
  VK_CUDA_DISPATCH_FLOATING(dtype, [&] {
    VK_LAUNCH((center_kernel<scalar_t>), rows, 96, 3 * sizeof(float), stream)
    (static_cast<const scalar_t*>(x), static_cast<scalar_t*>(y), channels);
  });
  VK_CUDA_CHECK_LAUNCH();
}

void race_cuda(const float* x, float* y) { VK_LAUNCH(race_kernel, 1, 64, 0, nullptr)(x, y); }
void overrun_cuda(float* y) { VK_LAUNCH(overrun_kernel, 1, 64, 64 * sizeof(float), nullptr)(y); }
void divergent_cuda(float* y) { VK_LAUNCH(divergent_kernel, 1, 64, 0, nullptr)(y); }
// More shared memory than a GPU gives without being asked for it.
void greedy_cuda(const float* x, float* y) { VK_LAUNCH(race_kernel, 1, 64, 64 << 10, nullptr)(x, y); }
void deadlock_cuda(float* y) { VK_LAUNCH(deadlock_kernel, 1, 64, 0, nullptr)(y); }

}  // namespace vidkernels
