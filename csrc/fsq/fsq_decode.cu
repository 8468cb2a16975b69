// SPDX-License-Identifier: Apache-2.0
#include "common/token_decode.cuh"
#include "fsq/fsq_cuda.cuh"

namespace vidkernels {
namespace {

// n / divisor as high_word(n * factor) >> shift for n < 2^31: the factor is 2^(32 + shift) / divisor, rounded up
// (Granlund and Montgomery 1994, 31 bits). A division by a number known only at run time takes 15 instructions.
struct Divisor {
  uint32_t divisor, factor;
  int32_t shift;
};

inline Divisor divisor_of(int32_t levels) {
  int32_t bits = 1;  // of levels - 1
  while (bits < 31 && (int64_t{1} << bits) < levels) ++bits;
  const uint64_t power = uint64_t{1} << (31 + bits);
  return {static_cast<uint32_t>(levels), static_cast<uint32_t>(power / static_cast<uint64_t>(levels) + 1), bits - 1};
}

template <typename A>
struct FsqDecoder {
  struct State {
    uint32_t rest;
    bool valid;
  };

  cuda::Level<A> level[kFsqMaxChannels];
  Divisor by[kFsqMaxChannels];
  int64_t codebook_size;
  bool symmetric;

  __device__ State begin(int64_t index) const {
    const bool valid = index >= 0 && index < codebook_size;
    return {valid ? static_cast<uint32_t>(index) : 0u, valid};
  }

  __device__ A next(State& state, int c) const {
    const uint32_t above = __umulhi(state.rest, by[c].factor) >> by[c].shift;
    const uint32_t digit = state.rest - above * by[c].divisor;
    state.rest = above;
    return state.valid ? cuda::level_value<false>(static_cast<A>(digit), level[c], symmetric) : A(NAN);
  }
};

template <typename T, typename I>
void launch(const FsqDecodeParams& p, cudaStream_t stream) {
  using A = accumulate_t<T>;
  FsqDecoder<A> decoder = {};
  for (int64_t c = 0; c < p.layout.channels; ++c) {
    decoder.level[c] = cuda::level_of<A>(p.channel[c]);
    decoder.by[c] = divisor_of(p.channel[c].levels);
  }
  decoder.codebook_size = p.codebook_size;
  decoder.symmetric = p.symmetric;
  cuda::decode_tokens<T>(decoder, p.layout, static_cast<const I*>(p.indices), static_cast<T*>(p.codes), stream);
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
