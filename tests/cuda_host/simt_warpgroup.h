// SPDX-License-Identifier: Apache-2.0
// csrc/common/warpgroup.cuh on the host. What runs asynchronously on a GPU is done here as late as the program allows,
// or (with threads in reverse) as early, or by chance: a buffer that is read before it is full, or filled again while
// it is read, gives other results.
//
//   copy_16        when the thread has waited for its group and called fence_async_proxy; never, if it does neither
//   bulk_copy      when somebody waits for the barrier and all threads have arrived
//   multiply       when the thread waits for its group
//
// A product is computed as PTX describes it: from operands in cores of 8 rows by 16 bytes without a swizzle.
#pragma once

#include <cstdint>
#include <vector>

#include "simt.h"

namespace simt {

void barrier_init(const void* barrier, int count);
void barrier_arrive(const void* barrier, uint32_t bytes);
void barrier_wait(const void* barrier, uint32_t parity);
void bulk_copy(void* to, const void* from, uint32_t bytes, const void* barrier);
void copy_16(void* to, const void* from, bool valid);
void copy_commit();
void copy_wait(int left);
void fence_async_proxy();

// 64 rows of `a` by `columns` of `b`, 16 products each.
struct Product {
  float* sums;
  int columns;
  uint64_t a, b;
  bool add;
  const float* values;  // of all patterns of 16 bits
};
void multiply(const Product& product);
void products_commit();
void products_wait(int left);

uint32_t shared_address(const void* pointer);

// float(T) of every pattern of bits.
template <typename T>
const float* values_of() {
  static const std::vector<float> values = [] {
    std::vector<float> all(1 << 16);
    for (uint32_t bits = 0; bits < all.size(); ++bits) {
      all[bits] = static_cast<float>(bit_cast<T>(static_cast<uint16_t>(bits)));
    }
    return all;
  }();
  return values.data();
}

}  // namespace simt

namespace vidkernels {
namespace cuda {

using simt::bulk_copy;
using simt::copy_16;
using simt::copy_commit;
using simt::fence_async_proxy;
using simt::products_commit;
using simt::shared_address;

inline void barrier_init(uint64_t* barrier, int count) { simt::barrier_init(barrier, count); }
inline void barrier_arrive(uint64_t* barrier) { simt::barrier_arrive(barrier, 0); }
inline void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) { simt::barrier_arrive(barrier, bytes); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity) { simt::barrier_wait(barrier, parity); }

inline float2 load_shared_pair(const float* from) { return {from[0], from[1]}; }
template <int N>
void copy_wait() {
  simt::copy_wait(N);
}

template <typename T, int N>
void multiply(float (&sums)[N], uint64_t a, uint64_t b, int add) {
  simt::multiply({sums, 2 * N, a, b, add != 0, simt::values_of<T>()});
}
inline void products_begin() {}
template <int N>
void products_wait() {
  simt::products_wait(N);
}
template <int N>
void after_wait(float (&)[N]) {}

template <int N>
void give_registers() {}
template <int N>
void take_registers() {}

}  // namespace cuda
}  // namespace vidkernels
