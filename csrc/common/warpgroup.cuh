// SPDX-License-Identifier: Apache-2.0
// What sm_90a adds for warpgroups: barriers that count arrivals and bytes, asynchronous copies, matrix products from
// shared memory. Each function is one instruction, named after it. On the host tests/cuda_host/simt_warpgroup.h stands
// for them.
//
// Shared memory has two kinds of readers and writers. Threads and `copy_16` are of one, bulk copies and matrix products
// of the other ("async proxy"): whoever writes with the first what the second reads calls `fence_async_proxy` between.
#pragma once

#include "common/cuda.h"

#if defined(VK_SIMT_SHIM)
#include "simt_warpgroup.h"
#else
#include "common/wgmma.cuh"

namespace vidkernels {
namespace cuda {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A phase of a barrier ends when `count` threads have arrived and all bytes that were expected have come.
__device__ inline void barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity has ended. The phase before the first counts as ended, with parity 1.
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra "
      "WAIT;\nDONE:\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Loaded anew whenever it is asked for: what the compiler keeps instead, it takes registers from sums for.
__device__ inline float2 load_shared_pair(const float* from) {
  float2 pair;
  asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(shared_address(from)));
  return pair;
}

// 16 bytes from global to shared memory, or zeros. Of this thread's groups that were committed, `copy_wait` leaves N.
__device__ inline void copy_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// `bytes`, a multiple of 16, which the barrier is told about when they have come.
__device__ inline void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Registers of sums are the products' from `products_begin` on; of the groups committed `products_wait` leaves N.
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from reading sums before the wait in front of this, which it does not know to belong to them.
template <int N>
__device__ inline void after_wait(float (&sums)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Of the registers of a thread, when all four warps of a warpgroup say so.
template <int N>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

}  // namespace cuda
}  // namespace vidkernels
#endif

namespace vidkernels {
namespace cuda {

// An operand in cores of 8 rows by 16 bytes, each 128 bytes without a gap: how far it is to the next 8 rows, and to the
// next 16 bytes of the same rows, in units of 16 bytes. No swizzle: any multiple of 16 may be its address.
__device__ inline uint64_t operand(const void* at, uint32_t next_rows, uint32_t next_bytes) {
  return static_cast<uint64_t>(shared_address(at) >> 4 & 0x3fff) | static_cast<uint64_t>(next_bytes) << 16 |
         static_cast<uint64_t>(next_rows) << 32;
}
// The same operand, `units` of 16 bytes further on.
__device__ inline uint64_t moved(uint64_t operand, uint32_t units) { return operand + units; }

}  // namespace cuda
}  // namespace vidkernels
