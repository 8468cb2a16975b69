// SPDX-License-Identifier: Apache-2.0
#include "lfq/lfq_cuda.cuh"

namespace vidkernels {
namespace {

// A thread owns one code of one token; threads follow the codes' memory, so that stores fill whole lines.
template <typename T, typename I>
__global__ void __launch_bounds__(cuda::kThreads)
    decode_kernel(const __grid_constant__ TokenLayout layout, accumulate_t<T> magnitude, bool lsb_first,
                  const I* __restrict__ indices, T* __restrict__ codes) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * cuda::kThreads + threadIdx.x;
  const int64_t channels = layout.channels * layout.codebooks;
  if (thread >= layout.outer * layout.inner * channels) return;
  const TokenStrides& to = layout.operand[1];
  const int64_t outer = thread / (layout.inner * channels), rest = thread % (layout.inner * channels);
  const int64_t i = to.channel == 1 ? rest / channels : rest % layout.inner;
  const int64_t channel = to.channel == 1 ? rest % channels : rest / layout.inner;
  const int64_t index = indices[(outer * layout.inner + i) * layout.codebooks + channel / layout.channels];
  const int bit = lfq_bit(static_cast<int>(channel % layout.channels), static_cast<int>(layout.channels), lsb_first);
  const bool positive = static_cast<uint64_t>(index) >> bit & 1u;
  codes[outer * to.outer + i * to.inner + channel * to.channel] = cuda::narrow<T>(positive ? magnitude : -magnitude);
}

template <typename T, typename I>
void launch(const LfqDecodeParams& p, cudaStream_t stream) {
  VK_LAUNCH((decode_kernel<T, I>), cuda::blocks_for(p.layout.elements()), cuda::kThreads, 0, stream)
  (p.layout, static_cast<accumulate_t<T>>(p.magnitude), p.lsb_first, static_cast<const I*>(p.indices),
   static_cast<T*>(p.codes));
}

}  // namespace

void lfq_decode_cuda(const LfqDecodeParams& p, cudaStream_t stream) {
  if (p.index_dtype == DType::int64) {
    VK_CUDA_DISPATCH_FLOATING(p.dtype, [&] { (launch<scalar_t, int64_t>(p, stream)); });
  } else {
    VK_CUDA_DISPATCH_FLOATING(p.dtype, [&] { (launch<scalar_t, int32_t>(p, stream)); });
  }
  VK_CUDA_CHECK_LAUNCH();
}

}  // namespace vidkernels
