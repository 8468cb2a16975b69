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

  // The level is the number of thresholds reached. NaN reaches none and stays NaN. A threshold is read once for all N.
  template <int N>
  __device__ void codes(State (&state)[N], int c, A (&v)[N]) const {
    const cuda::Level<A>& grid = level[c];
    int32_t digit[N] = {};
    for (int k = 0; k + 1 < grid.levels; ++k) {
      const A limit = threshold[grid.first + k];
#pragma unroll
      for (int j = 0; j < N; ++j) digit[j] += v[j] >= limit;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      state[j].index += static_cast<uint32_t>(digit[j]) * grid.basis;
      state[j].has_nan |= v[j] != v[j];
      v[j] = v[j] == v[j] ? cuda::level_value(static_cast<A>(digit[j]), grid, symmetric) : v[j];
    }
  }

  __device__ Index finish(const State& state) const {
    return state.has_nan ? kFsqNanIndex : static_cast<Index>(state.index);
  }
};

template <typename T>
void launch(const FsqFwdParams& p, cudaStream_t stream) {
  using A = accumulate_t<T>;
  if (p.threshold_count > kFsqMaxThresholds)
    throw std::runtime_error("fsq: the CUDA kernel takes at most " + std::to_string(kFsqMaxThresholds) +
                             " distinct thresholds, got " + std::to_string(p.threshold_count));
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
