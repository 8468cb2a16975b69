// SPDX-License-Identifier: Apache-2.0
#include "common/token_kernels.cuh"
#include "fsq/fsq_cuda.cuh"

namespace vidkernels {
namespace {

template <typename A>
struct FsqQuantizer {
  using Index = int32_t;
  struct State {
    uint32_t index;
    bool has_nan;
  };
  static constexpr bool kNeedsNorm = false;

  cuda::Level<A> level[kFsqMaxChannels];
  A threshold[kFsqMaxThresholds];
  int32_t channels;
  bool symmetric;

  __device__ void observe(State&, A) const {}

  // The level is the number of thresholds reached. NaN reaches none and stays NaN.
  __device__ A code(State& state, int c, A v) const {
    const cuda::Level<A>& grid = level[c];
    int32_t digit = 0;
    for (int k = 0; k + 1 < grid.levels; ++k) digit += v >= threshold[grid.first + k];
    state.index += static_cast<uint32_t>(digit) * grid.basis;
    state.has_nan |= v != v;
    return v == v ? cuda::level_value(static_cast<A>(digit), grid, symmetric) : v;
  }

  __device__ Index finish(const State& state) const {
    return state.has_nan ? kFsqNanIndex : static_cast<Index>(state.index);
  }
};

template <typename T>
void launch(const FsqFwdParams& p, cudaStream_t stream) {
  using A = accumulate_t<T>;
  FsqQuantizer<A> quantizer = {};
  quantizer.channels = static_cast<int32_t>(p.layout.channels);
  quantizer.symmetric = p.symmetric;
  for (int c = 0; c < quantizer.channels; ++c) quantizer.level[c] = cuda::level_of<A>(p.channel[c]);
  for (int k = 0; k < p.threshold_count; ++k) quantizer.threshold[k] = static_cast<A>(p.thresholds[k]);
  cuda::quantize_tokens<T>(quantizer, p.layout, static_cast<const T*>(p.z), static_cast<T*>(p.codes), p.indices,
                           stream);
}

}  // namespace

void fsq_fwd_cuda(const FsqFwdParams& p, cudaStream_t stream) {
  VK_CUDA_DISPATCH_FLOATING(p.dtype, [&] { launch<scalar_t>(p, stream); });
  VK_CUDA_CHECK_LAUNCH();
}

}  // namespace vidkernels
