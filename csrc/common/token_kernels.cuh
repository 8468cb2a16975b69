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
//     __device__ A code(State&, int channel, A value) const;
//     __device__ Index finish(const State&) const;
//   };
#pragma once

#include "common/cuda.h"
#include "common/token_layout.h"

namespace vidkernels {
namespace cuda {

constexpr int kThreads = 256;

inline unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

inline bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Offset of codebook `book` of token (outer, i); the member of TokenLayout is host code.
__device__ inline int64_t token_offset(const TokenStrides& s, int64_t outer, int64_t i, int64_t book,
                                       int64_t channels) {
  return outer * s.outer + i * s.inner + book * channels * s.channel;
}

// NCTHW: a thread owns kVec tokens that follow each other, and walks over the channels.
template <typename Q, typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    planar_tokens_kernel(const __grid_constant__ Q quantizer, const __grid_constant__ TokenLayout layout,
                         const T* __restrict__ x, T* __restrict__ codes, typename Q::Index* __restrict__ indices) {
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
    for (int c = 0; c < quantizer.channels; ++c) {
      const Pack<T, kVec> v = *reinterpret_cast<const Pack<T, kVec>*>(x + c * from.channel);
#pragma unroll
      for (int j = 0; j < kVec; ++j) quantizer.observe(state[j], widen(v.value[j]));
    }
  }
  for (int c = 0; c < quantizer.channels; ++c) {
    Pack<T, kVec> v = *reinterpret_cast<const Pack<T, kVec>*>(x + c * from.channel);
#pragma unroll
    for (int j = 0; j < kVec; ++j) v.value[j] = narrow<T>(quantizer.code(state[j], c, widen(v.value[j])));
    if (codes != nullptr) *reinterpret_cast<Pack<T, kVec>*>(codes + c * to.channel) = v;
  }
  if (indices == nullptr) return;
  indices += (outer * layout.inner + i) * layout.codebooks + book;
#pragma unroll
  for (int j = 0; j < kVec; ++j) indices[j * layout.codebooks] = quantizer.finish(state[j]);
}

// NDHWC and [tokens, channels]: a block moves 256 tokens through shared memory, so that global memory sees whole lines
// whatever the number of channels. `per_outer` counts codebooks as tokens: they follow each other as well.
template <typename Q, typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    interleaved_tokens_kernel(const __grid_constant__ Q quantizer, int64_t per_outer, int64_t x_outer,
                              int64_t codes_outer, const T* __restrict__ x, T* __restrict__ codes,
                              typename Q::Index* __restrict__ indices) {
  VK_DYNAMIC_SHARED(T, tile);
  const int64_t tiles = (per_outer + kThreads - 1) / kThreads;
  const int64_t outer = blockIdx.x / tiles, first = blockIdx.x % tiles * kThreads, left = per_outer - first;
  const int tokens = left < kThreads ? static_cast<int>(left) : kThreads;
  const int count = tokens * quantizer.channels, whole = count / kVec * kVec;
  x += outer * x_outer + first * quantizer.channels;
  for (int e = threadIdx.x * kVec; e < whole; e += kThreads * kVec) {
    *reinterpret_cast<Pack<T, kVec>*>(tile + e) = *reinterpret_cast<const Pack<T, kVec>*>(x + e);
  }
  for (int e = whole + threadIdx.x; e < count; e += kThreads) tile[e] = x[e];
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < tokens) {
    T* token = tile + threadIdx.x * quantizer.channels;
    typename Q::State state = {};
    if constexpr (Q::kNeedsNorm) {
      for (int c = 0; c < quantizer.channels; ++c) quantizer.observe(state, widen(token[c]));
    }
    for (int c = 0; c < quantizer.channels; ++c) token[c] = narrow<T>(quantizer.code(state, c, widen(token[c])));
    if (indices != nullptr) indices[outer * per_outer + first + threadIdx.x] = quantizer.finish(state);
  }
  if (codes == nullptr) return;
  __syncthreads();
  codes += outer * codes_outer + first * quantizer.channels;
  for (int e = threadIdx.x * kVec; e < whole; e += kThreads * kVec) {
    *reinterpret_cast<Pack<T, kVec>*>(codes + e) = *reinterpret_cast<const Pack<T, kVec>*>(tile + e);
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
  typename Q::State state = {};
  if constexpr (Q::kNeedsNorm) {
    for (int c = 0; c < quantizer.channels; ++c) quantizer.observe(state, widen(x[c * from.channel]));
  }
  for (int c = 0; c < quantizer.channels; ++c) {
    const auto code = quantizer.code(state, c, widen(x[c * from.channel]));
    if (codes != nullptr) codes[c * to.channel] = narrow<T>(code);
  }
  if (indices != nullptr) indices[thread] = quantizer.finish(state);
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

// Operands of the layout: 0 x, 1 codes. `codes` and `indices` may be null.
template <typename T, typename Q>
void quantize_tokens(const Q& quantizer, const TokenLayout& layout, const T* x, T* codes, typename Q::Index* indices,
                     cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  const int operands = codes == nullptr ? 1 : 2;
  const size_t shared = sizeof(T) * kThreads * layout.channels;
  if (layout.interleaved(operands) && shared <= 48 * 1024) {
    const int64_t per_outer = layout.inner * layout.codebooks;
    const int64_t tiles = layout.outer * ((per_outer + kThreads - 1) / kThreads);
    const auto kernel = wide_tokens(layout, x, codes, false) ? interleaved_tokens_kernel<Q, T, kVec>
                                                             : interleaved_tokens_kernel<Q, T, 1>;
    VK_LAUNCH(kernel, static_cast<unsigned>(tiles), kThreads, shared, stream)
    (quantizer, per_outer, layout.operand[0].outer, layout.operand[1].outer, x, codes, indices);
  } else if (layout.planar(operands)) {
    const bool wide = wide_tokens(layout, x, codes, true);
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
