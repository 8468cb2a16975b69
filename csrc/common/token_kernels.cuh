// SPDX-License-Identifier: Apache-2.0
// One pass of a quantizer over [outer, inner tokens, codebooks, channels]: every value becomes a code, every codebook
// of a token an integer. The quantizer is a small struct passed by value (launch arguments lie in constant memory):
//
//   struct Quantizer {
//     using Index = int32_t;
//     struct State;                                   // of one codebook of one token; value-initialised
//     static constexpr bool kNeedsNorm;               // whether `observe` must see all channels first
//     int32_t channels;
//     __device__ void observe(State&, A value) const;
//     template <int N>                                // values of one channel become codes, N tokens at a time
//     __device__ void codes(State (&)[N], int channel, T (&value)[N]) const;
//     template <int N>
//     __device__ Index finish(const State (&)[N], int token) const;
//   };
#pragma once

#include <type_traits>

#include "common/cuda.h"
#include "common/token_layout.h"

namespace vidkernels {
namespace cuda {

constexpr int kThreads = 256;

inline unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

// Offset of codebook `book` of token (outer, i); the member of TokenLayout is host code.
__device__ inline int64_t token_offset(const TokenStrides& s, int64_t outer, int64_t i, int64_t book,
                                       int64_t channels) {
  return outer * s.outer + i * s.inner + book * channels * s.channel;
}

// N integers that follow each other, 16 bytes an instruction where they fill that: one by one, the lanes of a warp
// would write a piece of every sector N times.
template <int N, typename I>
__device__ inline void store_run(I* to, const I (&value)[N]) {
  constexpr int kStep = N * sizeof(I) < 16 ? N : 16 / sizeof(I);
#pragma unroll
  for (int j = 0; j < N; j += kStep) {
    Pack<I, kStep> pack;
#pragma unroll
    for (int k = 0; k < kStep; ++k) pack.value[k] = value[j + k];
    store_pack(to + j, pack);
  }
}

// NCTHW: a thread owns kVec tokens that follow each other, and walks over the channels, the next one on its way.
template <typename Q, typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    planar_tokens_kernel(const __grid_constant__ Q quantizer, const __grid_constant__ TokenLayout layout,
                         const T* __restrict__ x, T* __restrict__ codes, typename Q::Index* __restrict__ indices) {
  using W = typename Word<sizeof(T) * kVec>::type;
  const int64_t per_outer = layout.inner / kVec;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= layout.outer * layout.codebooks * per_outer) return;
  const int64_t i = thread % per_outer * kVec, book = thread / per_outer % layout.codebooks;
  const int64_t outer = thread / per_outer / layout.codebooks;
  const TokenStrides &from = layout.operand[0], &to = layout.operand[1];
  x += token_offset(from, outer, i, book, layout.channels);
  if (codes != nullptr) codes += token_offset(to, outer, i, book, layout.channels);
  typename Q::State state[kVec] = {};
  if constexpr (Q::kNeedsNorm) {
#pragma unroll 4
    for (int c = 0; c < quantizer.channels; ++c) {
      const Pack<T, kVec> v = load_pack<kVec>(x + c * from.channel);
#pragma unroll
      for (int j = 0; j < kVec; ++j) quantizer.observe(state[j], widen(v.value[j]));
    }
  }
  W next = __ldg(reinterpret_cast<const W*>(x));
  for (int c = 0; c < quantizer.channels; ++c) {
    Pack<T, kVec> v;
    memcpy(&v, &next, sizeof(v));
    if (c + 1 < quantizer.channels) next = __ldg(reinterpret_cast<const W*>(x + (c + 1) * from.channel));
    quantizer.codes(state, c, v.value);
    if (codes != nullptr) store_pack(codes + c * to.channel, v);
  }
  if (indices == nullptr) return;
  indices += (outer * layout.inner + i) * layout.codebooks + book;
  typename Q::Index index[kVec];
#pragma unroll
  for (int j = 0; j < kVec; ++j) index[j] = quantizer.finish(state, j);
  if (layout.codebooks == 1) return store_run(indices, index);
#pragma unroll
  for (int j = 0; j < kVec; ++j) indices[j * layout.codebooks] = index[j];
}

// NDHWC and [tokens, channels]: a block moves kTokens * 256 tokens through shared memory, so that global memory sees
// whole lines whatever the number of channels. `per_outer` counts codebooks as tokens: they follow each other as well.
// A thread takes kPiece channels of its tokens at once. One by one, 16 channels of 2 bytes put the 32 lanes of a warp
// on 4 of the 32 banks, 8 wavefronts an access and 256 for reading and writing 32 tokens; 4 by 4 it is 64.
template <typename Q, typename T, int kVec, int kTokens, int kPiece>
__global__ void __launch_bounds__(kThreads)
    interleaved_tokens_kernel(const __grid_constant__ Q quantizer, int64_t per_outer, int64_t x_outer,
                              int64_t codes_outer, const T* __restrict__ x, T* __restrict__ codes,
                              typename Q::Index* __restrict__ indices) {
  using W = typename Word<sizeof(T) * kVec>::type;
  using P = typename Word<sizeof(T) * kPiece>::type;
  constexpr int kTile = kTokens * kThreads;
  VK_DYNAMIC_SHARED(T, tile);
  const int64_t tiles = (per_outer + kTile - 1) / kTile;
  const int64_t outer = blockIdx.x / tiles, first = blockIdx.x % tiles * kTile, left = per_outer - first;
  const int tokens = left < kTile ? static_cast<int>(left) : kTile;
  const int count = tokens * quantizer.channels, whole = count / kVec * kVec;
  x += outer * x_outer + first * quantizer.channels;
#pragma unroll 4
  for (int e = threadIdx.x * kVec; e < whole; e += kThreads * kVec) {
    *reinterpret_cast<W*>(tile + e) = __ldg(reinterpret_cast<const W*>(x + e));
  }
  for (int e = whole + threadIdx.x; e < count; e += kThreads) tile[e] = x[e];
  __syncthreads();
  // Tokens beyond the last are computed like the others, from whatever the tile holds, and never leave it.
  typename Q::State state[kTokens] = {};
  const auto at = [&](int j, int c) -> P& {
    const int token = j * kThreads + static_cast<int>(threadIdx.x);
    return *reinterpret_cast<P*>(tile + token * quantizer.channels + c);
  };
  Pack<T, kPiece> piece[kTokens];
  for (int c = 0; Q::kNeedsNorm && c < quantizer.channels; c += kPiece) {
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const P word = at(j, c);
      memcpy(&piece[j], &word, sizeof(P));
#pragma unroll
      for (int k = 0; k < kPiece; ++k) quantizer.observe(state[j], widen(piece[j].value[k]));
    }
  }
  for (int c = 0; c < quantizer.channels; c += kPiece) {
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const P word = at(j, c);
      memcpy(&piece[j], &word, sizeof(P));
    }
#pragma unroll
    for (int k = 0; k < kPiece; ++k) {
      T value[kTokens];
#pragma unroll
      for (int j = 0; j < kTokens; ++j) value[j] = piece[j].value[k];
      quantizer.codes(state, c + k, value);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) piece[j].value[k] = value[j];
    }
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      P word;
      memcpy(&word, &piece[j], sizeof(P));
      at(j, c) = word;
    }
  }
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    const int token = j * kThreads + static_cast<int>(threadIdx.x);
    if (indices != nullptr && token < tokens) indices[outer * per_outer + first + token] = quantizer.finish(state, j);
  }
  if (codes == nullptr) return;
  __syncthreads();
  codes += outer * codes_outer + first * quantizer.channels;
#pragma unroll 4
  for (int e = threadIdx.x * kVec; e < whole; e += kThreads * kVec) {
    store_word(reinterpret_cast<W*>(codes + e), *reinterpret_cast<const W*>(tile + e));
  }
  for (int e = whole + threadIdx.x; e < count; e += kThreads) codes[e] = tile[e];
}

// Any strides: a thread owns one codebook of one token.
template <typename Q, typename T>
__global__ void __launch_bounds__(kThreads)
    strided_tokens_kernel(const __grid_constant__ Q quantizer, const __grid_constant__ TokenLayout layout,
                          const T* __restrict__ x, T* __restrict__ codes, typename Q::Index* __restrict__ indices) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= layout.outer * layout.inner * layout.codebooks) return;
  const int64_t book = thread % layout.codebooks, i = thread / layout.codebooks % layout.inner;
  const int64_t outer = thread / layout.codebooks / layout.inner;
  const TokenStrides &from = layout.operand[0], &to = layout.operand[1];
  x += token_offset(from, outer, i, book, layout.channels);
  if (codes != nullptr) codes += token_offset(to, outer, i, book, layout.channels);
  typename Q::State state[1] = {};
  if constexpr (Q::kNeedsNorm) {
    for (int c = 0; c < quantizer.channels; ++c) quantizer.observe(state[0], widen(x[c * from.channel]));
  }
  for (int c = 0; c < quantizer.channels; ++c) {
    T value[1] = {x[c * from.channel]};
    quantizer.codes(state, c, value);
    if (codes != nullptr) codes[c * to.channel] = value[0];
  }
  if (indices != nullptr) indices[thread] = quantizer.finish(state, 0);
}

// 16 bytes at a time need 16-byte boundaries after every stride that a thread adds to the base.
template <typename T>
bool wide_tokens(const TokenLayout& layout, const T* x, const T* codes, bool planar) {
  constexpr int64_t kVec = 16 / sizeof(T);
  const T* operands[] = {x, codes};
  for (int k = 0; k < 2; ++k) {
    if (operands[k] == nullptr) continue;
    const TokenStrides& s = layout.operand[k];
    if (!aligned(operands[k], 16) || s.outer % kVec != 0) return false;
    if (planar && (layout.inner % kVec != 0 || s.channel % kVec != 0)) return false;
  }
  return true;
}

// Bytes of a tile that needs no asking for, and tiles for every multiprocessor from which on they hold more tokens:
// five blocks of 256 threads, each with one token of 12 bytes on its way, would leave most of the bandwidth idle.
constexpr size_t kTileBytes = 48 * 1024;
constexpr int kWideTokens = 4;

// Calls f with the largest of 1, 2 and 4 (an integral constant) that divides `channels` and makes at most 16 bytes.
template <typename T, typename F>
void with_piece(int64_t channels, const F& f) {
  if constexpr (sizeof(T) <= 4) {
    if (channels % 4 == 0) return f(std::integral_constant<int, 4>{});
  }
  if (channels % 2 == 0) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 1>{});
}

template <typename T, typename Q, int kTokens>
void quantize_interleaved(const Q& quantizer, const TokenLayout& layout, const T* x, T* codes,
                          typename Q::Index* indices, cudaStream_t stream) {
  const int64_t per_outer = layout.inner * layout.codebooks, tile = kTokens * kThreads;
  const int64_t tiles = layout.outer * ((per_outer + tile - 1) / tile);
  const auto start = [&](const auto& kernel) {
    VK_LAUNCH(kernel, static_cast<unsigned>(tiles), kThreads, sizeof(T) * tile * layout.channels, stream)
    (quantizer, per_outer, layout.operand[0].outer, layout.operand[1].outer, x, codes, indices);
  };
  if (!wide_tokens(layout, x, codes, false)) return start(interleaved_tokens_kernel<Q, T, 1, kTokens, 1>);
  with_piece<T>(layout.channels, [&](auto piece) {
    start(interleaved_tokens_kernel<Q, T, 16 / static_cast<int>(sizeof(T)), kTokens, piece.value>);
  });
}

// Operands of the layout: 0 x, 1 codes. `codes` and `indices` may be null.
template <typename T, typename Q>
void quantize_tokens(const Q& quantizer, const TokenLayout& layout, const T* x, T* codes, typename Q::Index* indices,
                     cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  const int operands = codes == nullptr ? 1 : 2;
  const size_t shared = sizeof(T) * kThreads * layout.channels;
  if (layout.interleaved(operands) && shared <= kTileBytes) {
    const int64_t tiles = layout.outer * (layout.inner * layout.codebooks / (kWideTokens * kThreads));
    if (kWideTokens * shared <= kTileBytes && tiles >= 2 * multiprocessors()) {
      return quantize_interleaved<T, Q, kWideTokens>(quantizer, layout, x, codes, indices, stream);
    }
    quantize_interleaved<T, Q, 1>(quantizer, layout, x, codes, indices, stream);
  } else if (layout.planar(operands)) {
    const bool wide = wide_tokens(layout, x, codes, true) && aligned(indices, 16);
    const int64_t threads = layout.outer * layout.codebooks * (layout.inner / (wide ? kVec : 1));
    const auto kernel = wide ? planar_tokens_kernel<Q, T, kVec> : planar_tokens_kernel<Q, T, 1>;
    VK_LAUNCH(kernel, blocks_for(threads), kThreads, 0, stream)(quantizer, layout, x, codes, indices);
  } else {
    VK_LAUNCH((strided_tokens_kernel<Q, T>), blocks_for(layout.tokens() * layout.codebooks), kThreads, 0, stream)
    (quantizer, layout, x, codes, indices);
  }
}

}  // namespace cuda
}  // namespace vidkernels
