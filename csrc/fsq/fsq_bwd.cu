// SPDX-License-Identifier: Apache-2.0
#include "fsq/fsq_cuda.cuh"

namespace vidkernels {
namespace {

using cuda::Pack;

template <typename A>
struct BwdTable {
  A shift[kFsqMaxChannels];
  A slope[kFsqMaxChannels];
  bool hard_clamp;
};

// 1 - tanh^2(u) from e = exp(-2 |u|): as 4 e / (1 + e)^2 where the difference would cancel, as the difference where it
// has fewer roundings.
template <typename A>
__device__ inline A squash_slope(A u, bool hard_clamp) {
  const A size = u < A(0) ? -u : u;
  if (hard_clamp) return size <= A(1) ? A(1) : (size == size ? A(0) : size);
  const A e = sizeof(A) == 8 ? static_cast<A>(exp(-2.0 * static_cast<double>(size)))
                             : static_cast<A>(expf(-2.0f * static_cast<float>(size)));
  const A r = A(1) / (A(1) + e), t = (A(1) - e) * r;
  return t < A(0.7) ? A(1) - t * t : A(4) * e * r * r;
}

template <typename T>
__device__ inline T gradient(const BwdTable<accumulate_t<T>>& table, int c, T z, T dcode) {
  using A = accumulate_t<T>;
  const A slope = squash_slope<A>(cuda::widen(z) + table.shift[c], table.hard_clamp);
  return cuda::narrow<T>(cuda::widen(dcode) * table.slope[c] * slope);
}

// All three tensors are one dense run in the same order, kVec elements a thread; the channel of element e is
// e / spread % channels (spread 1 where channels are innermost, the inner tokens where they are not).
template <typename T, int kVec>
__global__ void __launch_bounds__(cuda::kThreads)
    dense_kernel(const __grid_constant__ BwdTable<accumulate_t<T>> table, int64_t count, int64_t spread, int channels,
                 const T* __restrict__ z, const T* __restrict__ dcodes, T* __restrict__ dz) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * cuda::kThreads + threadIdx.x) * kVec;
  if (first >= count) return;
  int64_t within = first % spread;
  int c = static_cast<int>(first / spread % channels);
  if (first + kVec > count) {
    for (int64_t e = first; e < count; ++e) {
      dz[e] = gradient<T>(table, static_cast<int>(e / spread % channels), z[e], dcodes[e]);
    }
    return;
  }
  const Pack<T, kVec> v = cuda::load_pack<kVec>(z + first);
  Pack<T, kVec> g = cuda::load_pack<kVec>(dcodes + first);
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    g.value[j] = gradient<T>(table, c, v.value[j], g.value[j]);
    if (++within == spread) {
      within = 0;
      c = c + 1 == channels ? 0 : c + 1;
    }
  }
  cuda::store_pack(dz + first, g);
}

template <typename T>
__global__ void __launch_bounds__(cuda::kThreads)
    strided_kernel(const __grid_constant__ BwdTable<accumulate_t<T>> table, const __grid_constant__ TokenLayout layout,
                   const T* __restrict__ z, const T* __restrict__ dcodes, T* __restrict__ dz) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * cuda::kThreads + threadIdx.x;
  const int64_t channels = layout.channels * layout.codebooks;
  if (thread >= layout.outer * layout.inner * channels) return;
  const int64_t i = thread % layout.inner, c = thread / layout.inner % channels;
  const int64_t outer = thread / layout.inner / channels;
  const auto at = [&](const TokenStrides& s) { return outer * s.outer + i * s.inner + c * s.channel; };
  dz[at(layout.operand[2])] = gradient<T>(table, static_cast<int>(c % layout.channels), z[at(layout.operand[0])],
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

template <typename T>
void launch(const FsqBwdParams& p, cudaStream_t stream) {
  using A = accumulate_t<T>;
  BwdTable<A> table = {};
  for (int64_t c = 0; c < p.layout.channels; ++c) {
    table.shift[c] = static_cast<A>(p.shift[c]);
    table.slope[c] = static_cast<A>(p.slope[c]);
  }
  table.hard_clamp = p.hard_clamp;
  const T* z = static_cast<const T*>(p.z);
  const T* dcodes = static_cast<const T*>(p.dcodes);
  T* dz = static_cast<T*>(p.dz);
  const int64_t count = p.layout.elements(), spread = dense_spread(p.layout);
  if (spread == 0) {
    VK_LAUNCH((strided_kernel<T>), cuda::blocks_for(count), cuda::kThreads, 0, stream)(table, p.layout, z, dcodes, dz);
    return;
  }
  constexpr int kVec = 16 / sizeof(T);
  bool wide = true;
  for (const void* pointer : {p.z, p.dcodes, static_cast<const void*>(p.dz)}) {
    wide = wide && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  }
  const auto kernel = wide ? dense_kernel<T, kVec> : dense_kernel<T, 1>;
  const int64_t threads = wide ? (count + kVec - 1) / kVec : count;
  VK_LAUNCH(kernel, cuda::blocks_for(threads), cuda::kThreads, 0, stream)
  (table, count, spread, static_cast<int>(p.layout.channels), z, dcodes, dz);
}

}  // namespace

void fsq_bwd_cuda(const FsqBwdParams& p, cudaStream_t stream) {
  VK_CUDA_DISPATCH_FLOATING(p.dtype, [&] { launch<scalar_t>(p, stream); });
  VK_CUDA_CHECK_LAUNCH();
}

}  // namespace vidkernels
