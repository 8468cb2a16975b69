// SPDX-License-Identifier: Apache-2.0
// One pass from integers [outer, inner tokens, codebooks] to codes [outer, inner tokens, codebooks, channels]. The
// decoder is a small struct passed by value:
//
//   struct Decoder {
//     struct State;                                   // of one codebook of one token
//     __device__ State begin(int64_t index) const;
//     __device__ A next(State&, int channel) const;   // called for channels 0, 1, ... in turn
//   };
#pragma once

#include "common/token_kernels.cuh"

namespace vidkernels {
namespace cuda {

// NCTHW: a thread owns kVec tokens that follow each other.
template <typename D, typename T, typename I, int kVec>
__global__ void __launch_bounds__(kThreads)
    planar_decode_kernel(const __grid_constant__ D decoder, const __grid_constant__ TokenLayout layout,
                         const I* __restrict__ indices, T* __restrict__ codes) {
  const int64_t per_outer = layout.inner / kVec;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= layout.outer * layout.codebooks * per_outer) return;
  const int64_t i = thread % per_outer * kVec, book = thread / per_outer % layout.codebooks;
  const int64_t outer = thread / per_outer / layout.codebooks;
  const TokenStrides& to = layout.operand[1];
  indices += (outer * layout.inner + i) * layout.codebooks + book;
  codes += token_offset(to, outer, i, book, layout.channels);
  typename D::State state[kVec];
#pragma unroll
  for (int j = 0; j < kVec; ++j) state[j] = decoder.begin(__ldg(indices + j * layout.codebooks));
  for (int c = 0; c < layout.channels; ++c) {
    Pack<T, kVec> code;
#pragma unroll
    for (int j = 0; j < kVec; ++j) code.value[j] = narrow<T>(decoder.next(state[j], c));
    store_pack(codes + c * to.channel, code);
  }
}

// NDHWC and [tokens, channels]: a block's 256 tokens (codebooks counted as tokens) go through shared memory, so that
// whole lines are written whatever the number of channels, kPiece of a token's at once (see token_kernels.cuh).
template <typename D, typename T, typename I, int kVec, int kPiece>
__global__ void __launch_bounds__(kThreads)
    interleaved_decode_kernel(const __grid_constant__ D decoder, int channels, int64_t per_outer, int64_t codes_outer,
                              const I* __restrict__ indices, T* __restrict__ codes) {
  using W = typename Word<sizeof(T) * kVec>::type;
  using P = typename Word<sizeof(T) * kPiece>::type;
  VK_DYNAMIC_SHARED(T, tile);
  const int64_t tiles = (per_outer + kThreads - 1) / kThreads;
  const int64_t outer = blockIdx.x / tiles, first = blockIdx.x % tiles * kThreads, left = per_outer - first;
  const int tokens = left < kThreads ? static_cast<int>(left) : kThreads;
  const int count = tokens * channels, whole = count / kVec * kVec;
  if (static_cast<int>(threadIdx.x) < tokens) {
    typename D::State state = decoder.begin(__ldg(indices + outer * per_outer + first + threadIdx.x));
    T* token = tile + threadIdx.x * channels;
    for (int c = 0; c < channels; c += kPiece) {
      Pack<T, kPiece> piece;
#pragma unroll
      for (int k = 0; k < kPiece; ++k) piece.value[k] = narrow<T>(decoder.next(state, c + k));
      P word;
      memcpy(&word, &piece, sizeof(word));
      *reinterpret_cast<P*>(token + c) = word;
    }
  }
  __syncthreads();
  codes += outer * codes_outer + first * channels;
#pragma unroll 2
  for (int e = threadIdx.x * kVec; e < whole; e += kThreads * kVec) {
    store_word(reinterpret_cast<W*>(codes + e), *reinterpret_cast<const W*>(tile + e));
  }
  for (int e = whole + threadIdx.x; e < count; e += kThreads) codes[e] = tile[e];
}

// Any strides: a thread owns one codebook of one token.
template <typename D, typename T, typename I>
__global__ void __launch_bounds__(kThreads)
    strided_decode_kernel(const __grid_constant__ D decoder, const __grid_constant__ TokenLayout layout,
                          const I* __restrict__ indices, T* __restrict__ codes) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= layout.outer * layout.inner * layout.codebooks) return;
  const int64_t book = thread % layout.codebooks, i = thread / layout.codebooks % layout.inner;
  const TokenStrides& to = layout.operand[1];
  codes += token_offset(to, thread / layout.codebooks / layout.inner, i, book, layout.channels);
  typename D::State state = decoder.begin(indices[thread]);
  for (int c = 0; c < layout.channels; ++c) codes[c * to.channel] = narrow<T>(decoder.next(state, c));
}

// Operand 1 of the layout is codes.
template <typename T, typename I, typename D>
void decode_tokens(const D& decoder, const TokenLayout& layout, const I* indices, T* codes, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  const T* none = nullptr;
  const size_t shared = sizeof(T) * kThreads * layout.channels;
  if (layout.interleaved(2) && shared <= kTileBytes) {
    const int64_t per_outer = layout.inner * layout.codebooks;
    const int64_t tiles = layout.outer * ((per_outer + kThreads - 1) / kThreads);
    const auto start = [&](const auto& kernel) {
      VK_LAUNCH(kernel, static_cast<unsigned>(tiles), kThreads, shared, stream)
      (decoder, static_cast<int>(layout.channels), per_outer, layout.operand[1].outer, indices, codes);
    };
    if (!wide_tokens(layout, none, codes, false)) return start(interleaved_decode_kernel<D, T, I, 1, 1>);
    with_piece<T>(layout.channels, [&](auto piece) { start(interleaved_decode_kernel<D, T, I, kVec, piece.value>); });
  } else if (layout.planar(2)) {
    const bool wide = wide_tokens(layout, none, codes, true);
    const int64_t threads = layout.outer * layout.codebooks * (layout.inner / (wide ? kVec : 1));
    const auto kernel = wide ? planar_decode_kernel<D, T, I, kVec> : planar_decode_kernel<D, T, I, 1>;
    VK_LAUNCH(kernel, blocks_for(threads), kThreads, 0, stream)(decoder, layout, indices, codes);
  } else {
    VK_LAUNCH((strided_decode_kernel<D, T, I>), blocks_for(layout.tokens() * layout.codebooks), kThreads, 0, stream)
    (decoder, layout, indices, codes);
  }
}

}  // namespace cuda
}  // namespace vidkernels
