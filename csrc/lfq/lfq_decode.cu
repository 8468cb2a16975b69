// SPDX-License-Identifier: Apache-2.0
#include "common/token_decode.cuh"
#include "lfq/lfq_cuda.cuh"

namespace vidkernels {
namespace {

template <typename A>
struct LfqDecoder {
  struct State {
    uint64_t index;
  };

  A magnitude;
  int32_t channels;
  bool lsb_first;

  __device__ State begin(int64_t index) const { return {static_cast<uint64_t>(index)}; }

  __device__ A next(State& state, int c) const {
    return state.index >> lfq_bit(c, channels, lsb_first) & 1u ? magnitude : -magnitude;
  }
};

template <typename T, typename I>
void launch(const LfqDecodeParams& p, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const LfqDecoder<A> decoder{static_cast<A>(p.magnitude), static_cast<int32_t>(p.layout.channels), p.lsb_first};
  cuda::decode_tokens<T>(decoder, p.layout, static_cast<const I*>(p.indices), static_cast<T*>(p.codes), stream);
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
