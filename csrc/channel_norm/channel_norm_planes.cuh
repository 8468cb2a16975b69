// SPDX-License-Identifier: Apache-2.0
// A block's tile of the channel norm where positions are adjacent: X * VEC positions, all channels. Thread (x, y) holds
// positions [x * VEC, x * VEC + VEC) of channels y, y + blockDim.y, ....
#pragma once

#include "channel_norm/channel_norm_cuda.cuh"

namespace vidkernels {
namespace cuda {

template <int VEC, int X>
inline int64_t plane_tiles_per_plane(int64_t inner) {
  return (inner + VEC * X - 1) / (VEC * X);
}
template <int VEC, int X>
inline int64_t plane_tiles(const ChannelLayout& layout) {
  return layout.positions() / layout.inner() * plane_tiles_per_plane<VEC, X>(layout.inner());
}

// Most threads of a block: with 512 the compiler may give each 128 registers.
constexpr int kPlaneThreads = 512;

// Threads along the channels, and channels of each of them (iters 0: as many as it takes).
struct PlaneShape {
  int columns, iters;
};
template <int X>
inline PlaneShape plane_shape(int64_t channels, int max_iters) {
  for (int iters = 4; iters <= max_iters; iters *= 2) {
    for (int columns = kNormThreads / X; columns * X <= kPlaneThreads; columns *= 2) {
      if (channels <= static_cast<int64_t>(iters) * columns) return {columns, iters};
    }
  }
  return {kNormThreads / X, 0};
}

// Sums of every position that are added up together at most.
constexpr int kPlaneSums = 3;

// Shared memory: for every warp kPlaneSums sums per position, then the totals, then weight and bias where x is held.
template <typename A, int VEC, int X, int ITERS>
inline size_t plane_shared_bytes(int columns, int64_t channels) {
  const size_t staged = ITERS > 0 ? 2 * static_cast<size_t>(channels) : 0;
  return ((static_cast<size_t>(columns) * X / 32 + 1) * kPlaneSums * X * VEC + staged) * sizeof(A);
}

template <typename T, int VEC, int X, int ITERS>
struct PlaneTile {
  using A = accumulate_t<T>;

  const ChannelNormParams& p;
  A* scratch;
  int64_t x_offset = 0, y_offset = 0;  // of this thread's positions at channel 0
  bool active = false;                 // whether those positions exist
  A mean[VEC], rstd[VEC];
  bool fixed[VEC];
  Pack<T, VEC> held[ITERS > 0 ? ITERS : 1];

  __device__ PlaneTile(const ChannelNormParams& params, A* shared) : p(params), scratch(shared) {}

  // Weight and bias go to shared memory; one of the sums below must lie between this and `affine`. Read where they are
  // needed, each was a wait for the second cache, two for every channel of a thread, one after another.
  __device__ void stage() const {
    const int channels = static_cast<int>(p.layout.channels);
    for (int c = threadIdx.y * X + threadIdx.x; ITERS > 0 && c < channels; c += blockDim.y * X) {
      staged()[c] = affine_value<A>(p.weight, c, A(1));
      staged()[channels + c] = affine_value<A>(p.bias, c, A(0));
    }
  }
  __device__ A* staged() const { return scratch + (blockDim.y * X / 32 + 1) * kPlaneSums * X * VEC; }

  __device__ void affine(int64_t c, A& weight, A& bias) const {
    if constexpr (ITERS > 0) {
      weight = staged()[c];
      bias = staged()[c + p.layout.channels];
    } else {
      weight = affine_value<A>(p.weight, c, A(1));
      bias = affine_value<A>(p.bias, c, A(0));
    }
  }

  // Moves to tile number `index`.
  __device__ void locate(int64_t index) {
    const int64_t inner = p.layout.size[p.layout.dims - 1];
    const int64_t per_plane = (inner + VEC * X - 1) / (VEC * X);
    const int64_t plane = index / per_plane;
    const int64_t first = (index - plane * per_plane) * VEC * X + static_cast<int64_t>(threadIdx.x) * VEC;
    const int dims = p.layout.dims - 1;
    const PositionOffsets at = position_offsets(p.layout, dims, plane);
    active = first < inner;
    x_offset = at.x + first;
    y_offset = at.y + first;
  }

  __device__ void load() {
    if constexpr (ITERS > 0) {
#pragma unroll
      for (int i = 0; i < ITERS; ++i) {
        const int64_t c = threadIdx.y + static_cast<int64_t>(i) * blockDim.y;
        if (active && c < p.layout.channels) held[i] = at_channel(c);
      }
    }
  }

  __device__ Pack<T, VEC> at_channel(int64_t c) const {
    return load_pack<VEC>(static_cast<const T*>(p.x) + x_offset + c * p.layout.x_channel);
  }

  // f(pack, c, i) for this thread's channels.
  template <typename F>
  __device__ void for_channels(const F& f) const {
    if (!active) return;
    if constexpr (ITERS == 0) {
      int i = 0;
      for (int64_t c = threadIdx.y; c < p.layout.channels; c += blockDim.y) f(at_channel(c), c, i++);
    } else {
#pragma unroll
      for (int i = 0; i < ITERS; ++i) {
        const int64_t c = threadIdx.y + static_cast<int64_t>(i) * blockDim.y;
        if (c < p.layout.channels) f(held[i], c, i);
      }
    }
  }

  // Totals over the block's channels, in a fixed order; every thread gets those of its positions.
  template <int N>
  __device__ void total(A (&values)[N][VEC]) {
    constexpr int kSums = N * X * VEC;
    static_assert(N <= kPlaneSums && kSums <= kNormThreads, "a thread for every sum, and shared memory");
    const int thread = threadIdx.y * X + threadIdx.x, warp = thread / 32, warps = blockDim.y * X / 32;
    // At one place whatever N: threads still read the last totals while others write the next sums.
    A* totals = scratch + warps * kPlaneSums * X * VEC;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
#pragma unroll
        for (int offset = 16; offset >= X; offset /= 2) {
          values[n][v] += __shfl_xor_sync(0xffffffffu, values[n][v], offset);
        }
      }
    }
    if (thread % 32 < X) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int v = 0; v < VEC; ++v) scratch[warp * kSums + (n * X + threadIdx.x) * VEC + v] = values[n][v];
      }
    }
    __syncthreads();
    if (thread < kSums) {
      A sum = 0;
      for (int first = 0; first < warps; first += kNormThreads / 32) {
#pragma unroll
        for (int w = 0; w < kNormThreads / 32; ++w) sum += scratch[(first + w) * kSums + thread];
      }
      totals[thread] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) values[n][v] = totals[(n * X + threadIdx.x) * VEC + v];
    }
  }

  // Two passes, and the mean corrected by the mean of what is left after subtracting it (channel_norm_rows.h).
  __device__ void statistics() {
    const NormConstants<A> constants(p);
    const bool is_layer = p.kind == NormKind::layer;
#pragma unroll
    for (int v = 0; v < VEC; ++v) mean[v] = 0;
    if (is_layer) {
      A sum[1][VEC] = {};
      for_channels([&](const Pack<T, VEC>& x, int64_t, int) {
#pragma unroll
        for (int v = 0; v < VEC; ++v) sum[0][v] += widen(x.value[v]);
      });
      total(sum);
#pragma unroll
      for (int v = 0; v < VEC; ++v) mean[v] = sum[0][v] * constants.part;
    }
    A sums[2][VEC] = {};  // of squares, of what is left
    for_channels([&](const Pack<T, VEC>& x, int64_t, int) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        const A d = widen(x.value[v]) - mean[v];
        sums[0][v] += d * d;
        sums[1][v] += d;
      }
    });
    total(sums);
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      if (is_layer) {
        sums[0][v] -= sums[1][v] * sums[1][v] * constants.part;
        mean[v] += sums[1][v] * constants.part;
      }
      const NormScale<A> scale = norm_scale(p, constants, sums[0][v]);
      rstd[v] = scale.rstd;
      fixed[v] = scale.fixed;
    }
  }
};

}  // namespace cuda
}  // namespace vidkernels
