// SPDX-License-Identifier: Apache-2.0
#include "fsq/fsq_cuda.cuh"

namespace vidkernels {
namespace {

template <typename A>
struct DecodeTable {
  cuda::Level<A> level[kFsqMaxChannels];
  int64_t codebook_size;
  bool symmetric;
};

// A thread owns one code of one token; threads follow the codes' memory, so that stores fill whole lines.
template <typename T, typename I>
__global__ void __launch_bounds__(cuda::kThreads)
    decode_kernel(const __grid_constant__ DecodeTable<accumulate_t<T>> table,
                  const __grid_constant__ TokenLayout layout, bool channel_fastest, const I* __restrict__ indices,
                  T* __restrict__ codes) {
  using A = accumulate_t<T>;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * cuda::kThreads + threadIdx.x;
  const int64_t channels = layout.channels * layout.codebooks;
  if (thread >= layout.outer * layout.inner * channels) return;
  const int64_t outer = thread / (layout.inner * channels), rest = thread % (layout.inner * channels);
  const int64_t i = channel_fastest ? rest / channels : rest % layout.inner;
  const int64_t channel = channel_fastest ? rest % channels : rest / layout.inner;
  const int64_t book = channel / layout.channels;
  const int64_t index = indices[(outer * layout.inner + i) * layout.codebooks + book];
  const auto& level = table.level[channel % layout.channels];
  const bool valid = index >= 0 && index < table.codebook_size;
  const uint32_t digit = static_cast<uint32_t>(valid ? index : 0) / level.basis % static_cast<uint32_t>(level.levels);
  const A code = cuda::level_value(static_cast<A>(digit), level, table.symmetric);
  const TokenStrides& to = layout.operand[1];
  codes[outer * to.outer + i * to.inner + channel * to.channel] = cuda::narrow<T>(valid ? code : A(NAN));
}

template <typename T, typename I>
void launch(const FsqDecodeParams& p, cudaStream_t stream) {
  using A = accumulate_t<T>;
  DecodeTable<A> table = {};
  for (int64_t c = 0; c < p.layout.channels; ++c) table.level[c] = cuda::level_of<A>(p.channel[c]);
  table.codebook_size = p.codebook_size;
  table.symmetric = p.symmetric;
  VK_LAUNCH((decode_kernel<T, I>), cuda::blocks_for(p.layout.elements()), cuda::kThreads, 0, stream)
  (table, p.layout, p.layout.operand[1].channel == 1, static_cast<const I*>(p.indices), static_cast<T*>(p.codes));
}

}  // namespace

void fsq_decode_cuda(const FsqDecodeParams& p, cudaStream_t stream) {
  if (p.index_dtype == DType::int64) {
    VK_CUDA_DISPATCH_FLOATING(p.dtype, [&] { (launch<scalar_t, int64_t>(p, stream)); });
  } else {
    VK_CUDA_DISPATCH_FLOATING(p.dtype, [&] { (launch<scalar_t, int32_t>(p, stream)); });
  }
  VK_CUDA_CHECK_LAUNCH();
}

}  // namespace vidkernels
