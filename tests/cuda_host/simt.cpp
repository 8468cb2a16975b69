// SPDX-License-Identifier: Apache-2.0
#include "simt.h"

#include "simt_block.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kMaxThreads = 1024;
constexpr size_t kDefaultShared = 48 << 10, kMaxShared = 227 << 10;

struct Fiber {
  ucontext_t context;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;
  uint3 index;
  bool done = false;
  // Warp exchange: what this lane brought and, once every lane named in the mask has come, what all of them brought.
  bool waiting = false;
  unsigned mask = 0;
  int line = 0;
  unsigned char value[kSlot];
  Exchange received;
};

struct Block {
  std::vector<Fiber> fibers;
  int alive = 0, arrived = 0, line = 0, sum = 0, last_sum = 0;
  unsigned generation = 0;
  uint64_t progress = 0;
  bool first_again = false;
};

Block block;
void* shared_base = nullptr;
size_t shared_size = 0;
int current = -1;
ucontext_t scheduler;
void (*kernel_body)(void*) = nullptr;
void* kernel_context = nullptr;
Order thread_order = Order::forward;
std::mt19937 random_engine{1};
int64_t launches = 0;
uint64_t blocks = 0;

// Dynamic shared memory that each kernel may be launched with.
std::map<const void*, size_t> shared_asked_for;
size_t allowed_shared(const void* kernel) {
  const auto found = shared_asked_for.find(kernel);
  return found == shared_asked_for.end() ? kDefaultShared : std::max(kDefaultShared, found->second);
}

[[noreturn]] void fail(const char* what, int line_a, int line_b) {
  std::fprintf(stderr, "simt: %s (lines %d and %d), block (%u, %u, %u), thread %d\n", what, line_a, line_b, blockIdx.x,
               blockIdx.y, blockIdx.z, current);
  std::abort();
}

void start_switch(void** save, const void* bottom, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, bottom, size);
#else
  (void)save, (void)bottom, (void)size;
#endif
}

const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;

void finish_switch(void* saved, bool from_scheduler) {
#if defined(__SANITIZE_ADDRESS__)
  if (from_scheduler) {
    __sanitizer_finish_switch_fiber(saved, &scheduler_stack, &scheduler_stack_size);
  } else {
    __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
  }
#else
  (void)saved, (void)from_scheduler;
#endif
}

void release_barrier_if_full() {
  if (block.arrived == 0 || block.arrived < block.alive) return;
  block.arrived = 0;
  block.last_sum = block.sum;
  block.sum = 0;
  ++block.generation;
  ++block.progress;
}

unsigned alive_mask(int warp) {
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) {
    const size_t thread = static_cast<size_t>(warp) * kLanes + i;
    if (thread < block.fibers.size() && !block.fibers[thread].done) mask |= 1u << i;
  }
  return mask;
}

// Complete the exchange of the lanes in `mask` if all that still run are waiting in it.
void complete_exchange(int warp, unsigned mask) {
  const unsigned needed = mask & alive_mask(warp);
  Fiber* lanes = &block.fibers[static_cast<size_t>(warp) * kLanes];
  for (int i = 0; i < kLanes; ++i) {
    if ((needed >> i & 1u) && !(lanes[i].waiting && lanes[i].mask == mask)) return;
  }
  Exchange all;
  all.present = needed;
  std::memset(all.slot, 0xff, sizeof(all.slot));
  for (int i = 0; i < kLanes; ++i) {
    if (needed >> i & 1u) std::memcpy(all.slot[i], lanes[i].value, kSlot);
  }
  for (int i = 0; i < kLanes; ++i) {
    if (needed >> i & 1u) lanes[i].received = all, lanes[i].waiting = false;
  }
  ++block.progress;
}

void thread_main() {
  finish_switch(nullptr, true);
  kernel_body(kernel_context);
  Fiber& fiber = block.fibers[current];
  fiber.done = true;
  --block.alive;
  ++block.progress;
  // Threads that have returned no longer count, as on the GPU: those that wait for them go on.
  release_barrier_if_full();
  const int warp = current / kLanes;
  for (int i = 0; i < kLanes; ++i) {
    const size_t other = static_cast<size_t>(warp) * kLanes + i;
    if (other < block.fibers.size() && block.fibers[other].waiting) complete_exchange(warp, block.fibers[other].mask);
  }
  start_switch(nullptr, scheduler_stack, scheduler_stack_size);
  setcontext(&scheduler);
}

void resume(int thread) {
  Fiber& fiber = block.fibers[thread];
  current = thread;
  threadIdx = fiber.index;
  void* fake_stack = nullptr;
  start_switch(&fake_stack, fiber.stack, kStack);
  swapcontext(&scheduler, &fiber.context);
  finish_switch(fake_stack, false);
}

// Stacks live as long as the process, below each a page that stops an overflow.
unsigned char* stack_of(int thread) {
  static std::vector<unsigned char*> stacks;
  constexpr size_t kPage = 4096;
  while (stacks.size() <= static_cast<size_t>(thread)) {
    void* memory =
        mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for a thread's stack", 0, 0);
    mprotect(memory, kPage, PROT_NONE);
    stacks.push_back(static_cast<unsigned char*>(memory) + kPage);
  }
  return stacks[thread];
}

void prepare(int thread) {
  Fiber& fiber = block.fibers[thread];
  fiber = Fiber{};
  fiber.stack = stack_of(thread);
  const unsigned x = blockDim.x, y = blockDim.y, id = static_cast<unsigned>(thread);
  fiber.index = make_uint3(id % x, id / x % y, id / (x * y));
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStack);
#endif
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, thread_main, 0);
}

void run_block(int threads) {
  block.fibers.resize(static_cast<size_t>(threads));
  block.alive = threads;
  block.arrived = 0;
  ++blocks;
  for (int i = 0; i < threads; ++i) prepare(i);
  std::memset(shared_base, 0xff, shared_size);
  std::vector<int> turn(static_cast<size_t>(threads));
  for (int i = 0; i < threads; ++i) turn[i] = thread_order == Order::reverse ? threads - 1 - i : i;
  while (block.alive > 0) {
    if (thread_order == Order::shuffled) std::shuffle(turn.begin(), turn.end(), random_engine);
    const uint64_t before = block.progress;
    for (const int thread : turn) {
      if (!block.fibers[thread].done) resume(thread);
      if (block.first_again) break;
    }
    block.first_again = false;
    if (block.progress == before)
      fail("deadlock: every thread that is left waits", block.line, block.fibers[turn[0]].line);
  }
}

}  // namespace

void yield() {
  Fiber& fiber = block.fibers[current];
  start_switch(&fiber.fake_stack, scheduler_stack, scheduler_stack_size);
  swapcontext(&fiber.context, &scheduler);
  finish_switch(fiber.fake_stack, true);
}
void let_waiting_threads_go_on() {
  ++block.progress;
  block.first_again = thread_order == Order::forward;
}
Order order() { return thread_order; }
int thread_number() { return current; }
uint64_t block_number() { return blocks; }

void* dynamic_shared() { return shared_base; }
size_t dynamic_shared_bytes() { return shared_size; }
int lane() { return current % kLanes; }
unsigned alive_lanes() { return alive_mask(current / kLanes); }

void barrier(int line) { barrier_sum(0, line); }

int barrier_sum(int value, int line) {
  if (block.arrived > 0 && block.line != line)
    fail("threads of one block stand at different __syncthreads()", block.line, line);
  block.line = line;
  block.sum += value;
  ++block.arrived;
  const unsigned generation = block.generation;
  release_barrier_if_full();
  while (block.generation == generation) yield();
  return block.last_sum;
}

const Exchange& exchange(unsigned mask, const void* value, size_t bytes, int line) {
  if (bytes > kSlot) fail("a warp exchanges at most 16 bytes a lane", line, line);
  Fiber& fiber = block.fibers[current];
  if (!(mask >> lane() & 1u)) fail("a lane calls a warp function whose mask does not name it", line, line);
  fiber.mask = mask;
  fiber.line = line;
  fiber.waiting = true;
  std::memset(fiber.value, 0xff, kSlot);
  if (bytes > 0) std::memcpy(fiber.value, value, bytes);
  complete_exchange(current / kLanes, mask);
  while (block.fibers[current].waiting) yield();
  return block.fibers[current].received;
}

void run(const void* kernel, dim3 grid, dim3 block_shape, size_t shared_bytes, void (*body)(void*), void* context) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  const int threads = static_cast<int>(block_shape.x * block_shape.y * block_shape.z);
  if (threads < 1 || threads > kMaxThreads || block_shape.z > 64 || grid.x * grid.y * grid.z == 0 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    fail("launch outside CUDA's limits", threads, static_cast<int>(grid.x));
  }
  if (shared_bytes > allowed_shared(kernel)) {
    fail("more dynamic shared memory than cudaFuncSetAttribute was asked for (48 KB)", static_cast<int>(shared_bytes),
         static_cast<int>(allowed_shared(kernel)));
  }
  ++launches;
  gridDim = grid, blockDim = block_shape;
  kernel_body = body, kernel_context = context;
  // Its own allocation of the stated size, so that the address sanitizer sees the first byte beyond it.
  shared_size = shared_bytes;
  if (posix_memalign(&shared_base, 1024, shared_bytes) != 0) fail("no shared memory", 0, 0);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        const bool backwards = thread_order == Order::reverse;
        blockIdx =
            make_uint3(backwards ? grid.x - 1 - x : x, backwards ? grid.y - 1 - y : y, backwards ? grid.z - 1 - z : z);
        run_block(threads);
      }
    }
  }
  std::free(shared_base);
}

}  // namespace simt

extern "C" {

__attribute__((visibility("default"))) void simt_set_order(int which, unsigned seed) {
  simt::thread_order = static_cast<simt::Order>(which);
  simt::random_engine.seed(seed);
}
__attribute__((visibility("default"))) int64_t simt_launches() { return simt::launches; }

// The part of CUDA's runtime that launchers use, for one small device.
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "no error"; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > simt::kMaxShared) return cudaErrorInvalidValue;
  simt::shared_asked_for[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  return std::memset(address, value, bytes), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 232448;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = 2, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 2, cudaSuccess;
}
}
