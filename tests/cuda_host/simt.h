// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU, for tests under sanitizers. csrc/common/cuda.h includes this file instead of CUDA's
// launch syntax when VK_SIMT_SHIM is defined. Types, vectors and conversions come from CUDA's own headers.
//
// One fiber per thread of a block, blocks one after another. A thread runs until it meets a barrier or a warp exchange,
// so any order of threads between two barriers is possible: simt_set_order picks forward, reverse or shuffled, and a
// result that depends on it is a race. What stops with a message: threads of a block at different __syncthreads(), a
// deadlock, a launch that a GPU would refuse (empty or too large grids and blocks, more than 48 KB of dynamic shared
// memory that cudaFuncSetAttribute was not asked for), and whatever the address and undefined-behaviour sanitizers find
// (static and dynamic shared memory included; vectors at addresses that are no multiple of their size). Not covered:
// kernels with inline PTX (guard it and give a plain path under VK_SIMT_SHIM), blocks waiting for blocks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace simt {

constexpr int kLanes = 32;
constexpr size_t kSlot = 16;  // bytes of the widest value a warp can exchange

// What the lanes of one exchange brought. Slots of absent lanes hold 0xff bytes: NaN, or the largest integer.
struct Exchange {
  unsigned present;
  alignas(16) unsigned char slot[kLanes][kSlot];
};

// `kernel` tells kernels apart, as cudaFuncSetAttribute does.
void run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context);
void* dynamic_shared();
void barrier(int line);
int barrier_sum(int value, int line);
const Exchange& exchange(unsigned mask, const void* value, size_t bytes, int line);
unsigned alive_lanes();
int lane();

template <typename... P>
struct Launcher {
  void (*kernel)(P...);
  dim3 grid, block;
  size_t shared_bytes;

  struct Call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> arguments;
  };
  template <typename... A>
  void operator()(A&&... arguments) const {
    Call call{kernel, {std::forward<A>(arguments)...}};
    run(
        reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
        [](void* c) { std::apply(static_cast<Call*>(c)->kernel, static_cast<Call*>(c)->arguments); }, &call);
  }
};

template <typename... P>
Launcher<P...> launcher(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes) {
  return {kernel, grid, block, shared_bytes};
}

template <typename T>
T take(const Exchange& all, int from, const T& own) {
  T value = own;
  std::memcpy(static_cast<void*>(&value), all.slot[from], sizeof(T));
  return value;
}

}  // namespace simt

#define VK_LAUNCH(KERNEL, GRID, BLOCK, SHARED_BYTES, STREAM) \
  ((void)(STREAM), ::simt::launcher((KERNEL), dim3(GRID), dim3(BLOCK), (SHARED_BYTES)))
#define VK_DYNAMIC_SHARED(TYPE, NAME) TYPE* NAME = static_cast<TYPE*>(::simt::dynamic_shared())

// __builtin_LINE as a default argument is the caller's line: which barrier a thread stands at.
inline void __syncthreads(int line = __builtin_LINE()) { simt::barrier(line); }
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return simt::barrier_sum(predicate != 0, line);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return simt::barrier_sum(predicate != 0, line) != 0;
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return simt::barrier_sum(predicate == 0, line) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  simt::exchange(mask, nullptr, 0, line);
}
inline unsigned __activemask() { return simt::alive_lanes(); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, int line = __builtin_LINE()) {
  const int base = simt::lane() & ~(width - 1);
  return simt::take(simt::exchange(mask, &value, sizeof(T), line), base + (source & (width - 1)), value);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, int line = __builtin_LINE()) {
  const int lane = simt::lane(), source = lane ^ bits;
  const auto& all = simt::exchange(mask, &value, sizeof(T), line);
  return source < (lane & ~(width - 1)) + width ? simt::take(all, source, value) : value;
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, int line = __builtin_LINE()) {
  const int lane = simt::lane(), source = lane + static_cast<int>(delta);
  const auto& all = simt::exchange(mask, &value, sizeof(T), line);
  return source < (lane & ~(width - 1)) + width ? simt::take(all, source, value) : value;
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, int line = __builtin_LINE()) {
  const int lane = simt::lane(), source = lane - static_cast<int>(delta);
  const auto& all = simt::exchange(mask, &value, sizeof(T), line);
  return source >= (lane & ~(width - 1)) ? simt::take(all, source, value) : value;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  const int value = predicate != 0;
  const auto& all = simt::exchange(mask, &value, sizeof(value), line);
  unsigned ballot = 0;
  for (int i = 0; i < simt::kLanes; ++i) {
    if ((all.present >> i & 1u) && simt::take(all, i, 0) != 0) ballot |= 1u << i;
  }
  return ballot;
}
inline int __any_sync(unsigned mask, int p, int line = __builtin_LINE()) { return __ballot_sync(mask, p, line) != 0; }
inline int __all_sync(unsigned mask, int p, int line = __builtin_LINE()) { return __ballot_sync(mask, !p, line) == 0; }

#include "simt_math.h"
