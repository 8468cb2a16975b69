// SPDX-License-Identifier: Apache-2.0
#include "common/token_kernels.cuh"
#include "lfq/lfq_cuda.cuh"

namespace vidkernels {
namespace {

template <typename A, bool kSpherical>
struct LfqQuantizer {
  using Index = int64_t;
  struct State {
    uint64_t index;
    A square;
  };
  static constexpr bool kNeedsNorm = kSpherical;

  A magnitude, scale;
  int32_t channels;
  bool lsb_first, additive;

  __device__ void observe(State& state, A v) const { state.square += v * v; }

  template <int N>
  __device__ void codes(State (&state)[N], int c, A (&v)[N]) const {
    const int bit = lfq_bit(c, channels, lsb_first);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const A u = kSpherical ? v[j] / cuda::floored_norm(state[j].square) * scale : v[j];
      const bool positive = u > A(0);
      state[j].index |= static_cast<uint64_t>(positive) << bit;
      const A value = positive ? magnitude : -magnitude;
      v[j] = additive ? u + (value - u) : value;
    }
  }

  __device__ Index finish(const State& state) const { return static_cast<Index>(state.index); }
};

template <typename T, bool kSpherical>
void launch(const LfqFwdParams& p, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const LfqQuantizer<A, kSpherical> quantizer{static_cast<A>(p.magnitude), static_cast<A>(p.scale),
                                              static_cast<int32_t>(p.layout.channels), p.lsb_first, p.additive};
  cuda::quantize_tokens<T>(quantizer, p.layout, static_cast<const T*>(p.x), static_cast<T*>(p.values), p.indices,
                           stream);
}

}  // namespace

void lfq_fwd_cuda(const LfqFwdParams& p, cudaStream_t stream) {
  if (p.spherical) {
    VK_CUDA_DISPATCH_FLOATING(p.dtype, [&] { (launch<scalar_t, true>(p, stream)); });
  } else {
    VK_CUDA_DISPATCH_FLOATING(p.dtype, [&] { (launch<scalar_t, false>(p, stream)); });
  }
  VK_CUDA_CHECK_LAUNCH();
}

}  // namespace vidkernels
