// SPDX-License-Identifier: Apache-2.0
#include "common/two_sum.cuh"
#include "lfq/lfq_cuda.cuh"

namespace vidkernels {
namespace {

using cuda::kThreads;
using cuda::Pack;
using cuda::TwoSum;
using cuda::widen;

// What a token's gradient needs of all its channels, and the gradient of one. Below the floor the divisor is a
// constant. Unit vectors first: <x, g> / |x|^2 would overflow for large x. One reciprocal a token: a division for each
// value would be a third of all instructions, twice.
template <typename A>
struct Row {
  A square = 0, dot = 0, inverse = 0, factor = 0;
  bool floored = false;

  __device__ void observe(A x) { square += x * x; }
  __device__ void close(A scale) {
    const A norm = cuda::floored_norm(square);
    floored = norm == A(kLfqNormFloor);
    inverse = A(1) / norm;
    factor = scale * inverse;
  }
  __device__ void project(A x, A g) { dot += x * inverse * g; }
  __device__ A gradient(A x, A g) const { return factor * (g - x * inverse * (floored ? A(0) : dot)); }
};

// Rounded once. In float32 the six roundings above would add up to three units in the last place of a vector with few
// channels, whose reference may be right to half of one.
struct ExactRow {
  TwoSum square, dot, inverse, factor;
  bool floored = false;

  __device__ void observe(float x) { square.add(TwoSum::product(x, x)); }
  __device__ void close(float scale) {
    const float norm = cuda::floored_norm(square.high);
    floored = norm == static_cast<float>(kLfqNormFloor);
    const float rest =
        floored ? cuda::two_parts(kLfqNormFloor).low : (fmaf(-norm, norm, square.high) + square.low) / (2.0f * norm);
    inverse.high = 1.0f / norm;
    // The square of a large vector is infinite, and its rest not a number.
    if (norm <= 3.4e38f) inverse.low = inverse.high * (fmaf(-norm, inverse.high, 1.0f) - rest * inverse.high);
    factor = inverse.times(scale);
  }
  __device__ void project(float x, float g) { dot.add(inverse.times(x).times(g)); }
  __device__ float gradient(float x, float g) const {
    const TwoSum along = inverse.times(x).times(floored ? TwoSum{} : dot);
    const TwoSum rest = TwoSum::difference(g, along.high);
    const float value = rest.high * factor.high;
    if (!(fabsf(value) <= 3.4e38f)) return value;
    return fmaf(rest.high, factor.high, rest.high * factor.low + (rest.low - along.low) * factor.high);
  }
};
template <typename T>
using RowOf = std::conditional_t<std::is_same_v<T, float>, ExactRow, Row<accumulate_t<T>>>;

// Channels innermost: a block's 256 tokens (codebooks counted as tokens) go through shared memory, x and gradient, 16
// bytes at a time. Read from where they are, the 2 bytes of 32 tokens with 18 channels lie in 9 lines, 108 accesses a
// token: a quarter of the memory's rate.
template <typename T, int kVec, int kPiece>
__global__ void __launch_bounds__(kThreads)
    interleaved_kernel(const __grid_constant__ TokenLayout layout, accumulate_t<T> scale, const T* __restrict__ x,
                       const T* __restrict__ grad, T* __restrict__ dx) {
  using W = typename cuda::Word<sizeof(T) * kVec>::type;
  using P = typename cuda::Word<sizeof(T) * kPiece>::type;
  VK_DYNAMIC_SHARED(T, tile);
  const int channels = static_cast<int>(layout.channels), thread = static_cast<int>(threadIdx.x);
  const int64_t per_outer = layout.inner * layout.codebooks, tiles = (per_outer + kThreads - 1) / kThreads;
  const int64_t outer = blockIdx.x / tiles, first = blockIdx.x % tiles * kThreads, left = per_outer - first;
  const int tokens = left < kThreads ? static_cast<int>(left) : kThreads;
  const int count = tokens * channels, whole = count / kVec * kVec;
  T* grads = tile + kThreads * channels;
  x += outer * layout.operand[0].outer + first * channels;
  grad += outer * layout.operand[1].outer + first * channels;
  dx += outer * layout.operand[2].outer + first * channels;
#pragma unroll 2
  for (int e = thread * kVec; e < whole; e += kThreads * kVec) {
    *reinterpret_cast<W*>(tile + e) = __ldg(reinterpret_cast<const W*>(x + e));
    *reinterpret_cast<W*>(grads + e) = __ldg(reinterpret_cast<const W*>(grad + e));
  }
  for (int e = whole + thread; e < count; e += kThreads) {
    tile[e] = x[e];
    grads[e] = grad[e];
  }
  __syncthreads();
  if (thread < tokens) {
    const auto piece = [&](const T* from, int c) {
      const P word = *reinterpret_cast<const P*>(from + thread * channels + c);
      Pack<T, kPiece> pack;
      memcpy(&pack, &word, sizeof(pack));
      return pack;
    };
    RowOf<T> row;
    for (int c = 0; c < channels; c += kPiece) {
      const auto xs = piece(tile, c);
#pragma unroll
      for (int k = 0; k < kPiece; ++k) row.observe(widen(xs.value[k]));
    }
    row.close(scale);
    for (int c = 0; c < channels; c += kPiece) {
      const auto xs = piece(tile, c), gs = piece(grads, c);
#pragma unroll
      for (int k = 0; k < kPiece; ++k) row.project(widen(xs.value[k]), widen(gs.value[k]));
    }
    for (int c = 0; c < channels; c += kPiece) {
      const auto xs = piece(tile, c);
      auto gs = piece(grads, c);
#pragma unroll
      for (int k = 0; k < kPiece; ++k) {
        gs.value[k] = cuda::narrow<T>(row.gradient(widen(xs.value[k]), widen(gs.value[k])));
      }
      P word;
      memcpy(&word, &gs, sizeof(word));
      *reinterpret_cast<P*>(grads + thread * channels + c) = word;
    }
  }
  __syncthreads();
#pragma unroll 2
  for (int e = thread * kVec; e < whole; e += kThreads * kVec) {
    cuda::store_word(reinterpret_cast<W*>(dx + e), *reinterpret_cast<const W*>(grads + e));
  }
  for (int e = whole + thread; e < count; e += kThreads) dx[e] = grads[e];
}

// Any strides: a thread owns one codebook of kVec tokens that follow each other, read again for every pass. No more
// than 4 bytes a channel: x and gradient of 1024 threads with 18 channels then take 147 KB, and stay in the first
// cache.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    bwd_kernel(const __grid_constant__ TokenLayout layout, accumulate_t<T> scale, bool planar, const T* __restrict__ x,
               const T* __restrict__ grad, T* __restrict__ dx) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t inner = layout.inner / kVec, per_outer = inner * layout.codebooks;
  if (thread >= layout.outer * per_outer) return;
  const int64_t rest = thread % per_outer, outer = thread / per_outer;
  const int64_t i = (planar ? rest % inner : rest / layout.codebooks) * kVec;
  const int64_t book = planar ? rest / inner : rest % layout.codebooks;
  const TokenStrides &sx = layout.operand[0], &sg = layout.operand[1], &sd = layout.operand[2];
  x += cuda::token_offset(sx, outer, i, book, layout.channels);
  grad += cuda::token_offset(sg, outer, i, book, layout.channels);
  dx += cuda::token_offset(sd, outer, i, book, layout.channels);
  const int channels = static_cast<int>(layout.channels);
  RowOf<T> row[kVec];
#pragma unroll 4
  for (int c = 0; c < channels; ++c) {
    const Pack<T, kVec> xs = cuda::load_pack<kVec>(x + c * sx.channel);
#pragma unroll
    for (int j = 0; j < kVec; ++j) row[j].observe(widen(xs.value[j]));
  }
#pragma unroll
  for (int j = 0; j < kVec; ++j) row[j].close(scale);
#pragma unroll 4
  for (int c = 0; c < channels; ++c) {
    const Pack<T, kVec> xs = cuda::load_pack<kVec>(x + c * sx.channel);
    const Pack<T, kVec> gs = cuda::load_pack<kVec>(grad + c * sg.channel);
#pragma unroll
    for (int j = 0; j < kVec; ++j) row[j].project(widen(xs.value[j]), widen(gs.value[j]));
  }
#pragma unroll 4
  for (int c = 0; c < channels; ++c) {
    const Pack<T, kVec> xs = cuda::load_pack<kVec>(x + c * sx.channel);
    Pack<T, kVec> gs = cuda::load_pack<kVec>(grad + c * sg.channel);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      gs.value[j] = cuda::narrow<T>(row[j].gradient(widen(xs.value[j]), widen(gs.value[j])));
    }
    cuda::store_pack(dx + c * sd.channel, gs);
  }
}

template <typename T>
void launch(const LfqBwdParams& p, cudaStream_t stream) {
  const TokenLayout& layout = p.layout;
  const T *x = static_cast<const T*>(p.x), *grad = static_cast<const T*>(p.grad);
  T* dx = static_cast<T*>(p.dx);
  const auto scale = static_cast<accumulate_t<T>>(p.scale);
  const auto fits = [&](int64_t values, bool planar) {  // runs of `values` everywhere begin at whole multiples of them
    bool fit = !planar || layout.inner % values == 0;
    for (const void* pointer : {p.x, p.grad, static_cast<const void*>(p.dx)}) {
      fit = fit && cuda::aligned(pointer, values * sizeof(T));
    }
    for (const TokenStrides& s : layout.operand) {
      fit = fit && s.outer % values == 0 && (!planar || s.channel % values == 0);
    }
    return fit;
  };
  const size_t shared = 2 * sizeof(T) * kThreads * layout.channels;
  if (layout.interleaved(3) && shared <= cuda::kTileBytes) {
    const int64_t tiles = layout.outer * ((layout.inner * layout.codebooks + kThreads - 1) / kThreads);
    const auto start = [&](const auto& kernel) {
      VK_LAUNCH(kernel, static_cast<unsigned>(tiles), kThreads, shared, stream)(layout, scale, x, grad, dx);
    };
    constexpr int kVec = 16 / sizeof(T);
    if (!fits(kVec, false)) return start(interleaved_kernel<T, 1, 1>);
    return cuda::with_piece<T>(layout.channels, [&](auto piece) { start(interleaved_kernel<T, kVec, piece.value>); });
  }
  constexpr int kVec = sizeof(T) < 4 ? 4 / sizeof(T) : 1;
  const bool planar = layout.planar(3), wide = kVec > 1 && planar && fits(kVec, true);
  const unsigned blocks = cuda::blocks_for(layout.tokens() * layout.codebooks / (wide ? kVec : 1));
  const auto kernel = wide ? bwd_kernel<T, kVec> : bwd_kernel<T, 1>;
  VK_LAUNCH(kernel, blocks, kThreads, 0, stream)(layout, scale, planar, x, grad, dx);
}

}  // namespace

void lfq_bwd_cuda(const LfqBwdParams& p, cudaStream_t stream) {
  VK_CUDA_DISPATCH_FLOATING(p.dtype, [&] { launch<scalar_t>(p, stream); });
  VK_CUDA_CHECK_LAUNCH();
}

}  // namespace vidkernels
