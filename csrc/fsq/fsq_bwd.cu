// SPDX-License-Identifier: Apache-2.0
#include "fsq/fsq_cuda.cuh"

namespace vidkernels {
namespace {

using cuda::Pack;

constexpr int kMaxVec = 8;  // 16 bytes

template <typename A>
struct ChannelSlope {
  A shift, slope;
};

// The channels, and the first ones again, so that a vector may begin at any of them.
template <typename A>
struct BwdTable {
  ChannelSlope<A> channel[kFsqMaxChannels + kMaxVec];
};

// 1 / d for 1 <= d <= 2, or NaN: the bits of the rounded quotient's usual way, without the branch to its other one.
// Branches keep the values of a vector from being computed side by side.
__device__ inline float inverse(float d) {
#if defined(VK_SIMT_SHIM)
  return 1.0f / d;
#else
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  return cuda::fused(cuda::fused(-d, r, 1.0f), r, r);
#endif
}
__device__ inline double inverse(double d) { return 1.0 / d; }
__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

// 1 - tanh^2(u) from e = exp(-2 |u|): as 4 e / (1 + e)^2 where the difference would cancel, as the difference where it
// has fewer roundings.
template <typename A, bool kHardClamp>
__device__ inline A squash_slope(A u) {
  const A size = fabs(u);
  if (kHardClamp) return size <= A(1) ? A(1) : (size == size ? A(0) : size);
  const A e = exponential(A(-2) * size), r = inverse(A(1) + e), t = (A(1) - e) * r;
  const A near = A(1) - t * t, far = A(4) * e * r * r;
  return t < A(0.7) ? near : far;
}

template <typename T, bool kHardClamp>
__device__ inline T gradient(const ChannelSlope<accumulate_t<T>>& channel, T z, T dcode) {
  using A = accumulate_t<T>;
  const A slope = squash_slope<A, kHardClamp>(cuda::widen(z) + channel.shift);
  return cuda::narrow<T>(cuda::widen(dcode) * channel.slope * slope);
}

// All three tensors are one dense run in the same order; the channel of element e is e / spread % channels. A vector of
// kVec elements has kVec channels where they are innermost (spread 1), a single one where `spread`, the inner tokens,
// is a multiple of kVec, or any.
enum class Vector { channels, tokens, mixed };

// A thread's vectors are kThreads * kVec elements apart: so many times `spread`, taken modulo the channels, and a rest.
struct DenseRun {
  int64_t count, spread, step_within;
  int channels, step_channel;
};
constexpr int kRounds = 2;

// The channel differs between lanes: constant memory, where the arguments lie, serves one address at a time, shared
// memory all of them. With computations free of branches this takes 100 instructions a KB in float32 and 200 in
// bfloat16; 200 and 350 before, the latter more than the memory leaves time for.
template <typename T, int kVec, Vector kVector, bool kHardClamp>
__global__ void __launch_bounds__(cuda::kThreads)
    dense_kernel(const __grid_constant__ BwdTable<accumulate_t<T>> table, const __grid_constant__ DenseRun run,
                 const T* __restrict__ z, const T* __restrict__ dcodes, T* __restrict__ dz) {
  using A = accumulate_t<T>;
  constexpr int64_t kStep = cuda::kThreads * kVec;
  __shared__ ChannelSlope<A> shared[kFsqMaxChannels + kMaxVec];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kStep * kRounds + static_cast<int64_t>(threadIdx.x) * kVec;
  Pack<T, kVec> v[kRounds] = {}, g[kRounds] = {};
#pragma unroll
  for (int k = 0; k < kRounds; ++k) {
    const int64_t at = first + k * kStep;
    if (at + kVec > run.count) continue;
    v[k] = cuda::load_pack<kVec>(z + at);
    g[k] = cuda::load_pack<kVec>(dcodes + at);
  }
  if (threadIdx.x < kFsqMaxChannels + kMaxVec) shared[threadIdx.x] = table.channel[threadIdx.x];
  __syncthreads();
  int64_t within = kVector == Vector::channels ? 0 : first % run.spread;
  int c = static_cast<int>((kVector == Vector::channels ? first : first / run.spread) % run.channels);
#pragma unroll
  for (int k = 0; k < kRounds; ++k) {
    const int64_t at = first + k * kStep;
    int64_t inside = within;
    int channel = c;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const int here = kVector == Vector::channels ? c + j : channel;
      g[k].value[j] = gradient<T, kHardClamp>(shared[here], v[k].value[j], g[k].value[j]);
      if (kVector == Vector::mixed && ++inside == run.spread) {
        inside = 0;
        channel = channel + 1 == run.channels ? 0 : channel + 1;
      }
    }
    if (at + kVec <= run.count) cuda::store_pack(dz + at, g[k]);
    c += run.step_channel;
    if (kVector != Vector::channels) {
      within += run.step_within;
      if (within >= run.spread) {
        within -= run.spread;
        ++c;
      }
    }
    if (c >= run.channels) c -= run.channels;
  }
  const int64_t e = run.count / kVec * kVec + threadIdx.x;  // what fills no vector
  if (blockIdx.x == 0 && e < run.count) {
    dz[e] = gradient<T, kHardClamp>(shared[e / run.spread % run.channels], z[e], dcodes[e]);
  }
}

template <typename T, bool kHardClamp>
__global__ void __launch_bounds__(cuda::kThreads)
    strided_kernel(const __grid_constant__ BwdTable<accumulate_t<T>> table, const __grid_constant__ TokenLayout layout,
                   const T* __restrict__ z, const T* __restrict__ dcodes, T* __restrict__ dz) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * cuda::kThreads + threadIdx.x;
  const int64_t channels = layout.channels * layout.codebooks;
  if (thread >= layout.outer * layout.inner * channels) return;
  const int64_t i = thread % layout.inner, c = thread / layout.inner % channels;
  const int64_t outer = thread / layout.inner / channels;
  const auto at = [&](const TokenStrides& s) { return outer * s.outer + i * s.inner + c * s.channel; };
  dz[at(layout.operand[2])] = gradient<T, kHardClamp>(table.channel[c % layout.channels], z[at(layout.operand[0])],
                                                      dcodes[at(layout.operand[1])]);
}

// Innermost extent of a channel if all operands are one dense run in the same order, else 0.
int64_t dense_spread(const TokenLayout& layout) {
  const int64_t channels = layout.channels * layout.codebooks;
  const bool interleaved = layout.interleaved(3), planar = layout.planar(3);
  if (!interleaved && !planar) return 0;
  for (const TokenStrides& s : layout.operand) {
    if (layout.outer > 1 && s.outer != channels * layout.inner) return 0;
    if (!interleaved && channels > 1 && s.channel != layout.inner) return 0;
  }
  return interleaved ? 1 : layout.inner;
}

template <typename T, int kVec, Vector kVector, bool kHardClamp>
void launch_dense(const BwdTable<accumulate_t<T>>& table, const FsqBwdParams& p, int64_t spread, cudaStream_t stream) {
  constexpr int64_t kStep = cuda::kThreads * kVec;
  const int64_t count = p.layout.elements(), blocks = (count + kStep * kRounds - 1) / (kStep * kRounds);
  const int channels = static_cast<int>(p.layout.channels);
  const DenseRun run = {count, spread, kStep % spread, channels, static_cast<int>(kStep / spread % channels)};
  VK_LAUNCH((dense_kernel<T, kVec, kVector, kHardClamp>), static_cast<unsigned>(blocks), cuda::kThreads, 0, stream)
  (table, run, static_cast<const T*>(p.z), static_cast<const T*>(p.dcodes), static_cast<T*>(p.dz));
}

template <typename T, bool kHardClamp>
void launch_bound(const FsqBwdParams& p, cudaStream_t stream) {
  using A = accumulate_t<T>;
  BwdTable<A> table = {};
  for (int64_t k = 0; k < kFsqMaxChannels + kMaxVec; ++k) {
    const int64_t c = k % p.layout.channels;
    table.channel[k] = {static_cast<A>(p.shift[c]), static_cast<A>(p.slope[c])};
  }
  const int64_t spread = dense_spread(p.layout);
  if (spread == 0) {
    VK_LAUNCH((strided_kernel<T, kHardClamp>), cuda::blocks_for(p.layout.elements()), cuda::kThreads, 0, stream)
    (table, p.layout, static_cast<const T*>(p.z), static_cast<const T*>(p.dcodes), static_cast<T*>(p.dz));
    return;
  }
  constexpr int kVec = 16 / sizeof(T);
  if (!cuda::aligned(p.z, 16) || !cuda::aligned(p.dcodes, 16) || !cuda::aligned(p.dz, 16)) {
    return launch_dense<T, 1, Vector::tokens, kHardClamp>(table, p, spread, stream);
  }
  if (spread == 1) return launch_dense<T, kVec, Vector::channels, kHardClamp>(table, p, spread, stream);
  if (spread % kVec == 0) return launch_dense<T, kVec, Vector::tokens, kHardClamp>(table, p, spread, stream);
  launch_dense<T, kVec, Vector::mixed, kHardClamp>(table, p, spread, stream);
}

template <typename T>
void launch(const FsqBwdParams& p, cudaStream_t stream) {
  p.hard_clamp ? launch_bound<T, true>(p, stream) : launch_bound<T, false>(p, stream);
}

}  // namespace

void fsq_bwd_cuda(const FsqBwdParams& p, cudaStream_t stream) {
  VK_CUDA_DISPATCH_FLOATING(p.dtype, [&] { launch<scalar_t>(p, stream); });
  VK_CUDA_CHECK_LAUNCH();
}

}  // namespace vidkernels
