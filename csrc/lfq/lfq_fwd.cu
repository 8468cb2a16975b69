// SPDX-License-Identifier: Apache-2.0
#include "common/token_kernels.cuh"
#include "lfq/lfq_cuda.cuh"

namespace vidkernels {
namespace {

template <typename T, bool kSpherical>
struct LfqQuantizer {
  using A = accumulate_t<T>;
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
  __device__ void codes(State (&state)[N], int c, T (&x)[N]) const {
    const uint64_t bit = uint64_t{1} << lfq_bit(c, channels, lsb_first);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const A v = cuda::widen(x[j]), u = kSpherical ? v / cuda::floored_norm(state[j].square) * scale : v;
      const bool positive = u > A(0);
      if (positive) state[j].index |= bit;
      const A value = positive ? magnitude : -magnitude;
      x[j] = cuda::narrow<T>(additive ? u + (value - u) : value);
    }
  }

  template <int N>
  __device__ Index finish(const State (&state)[N], int token) const {
    return static_cast<Index>(state[token].index);
  }
};

template <typename T, bool kSpherical>
void launch(const LfqFwdParams& p, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const LfqQuantizer<T, kSpherical> quantizer{static_cast<A>(p.magnitude), static_cast<A>(p.scale),
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
