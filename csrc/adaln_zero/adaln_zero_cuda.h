// SPDX-License-Identifier: Apache-2.0
// Device code that the forward and backward kernels share.
//
// A row of C values belongs to `lanes` threads (8 or 16 threads, or whole warps), each holding `columns` of its values
// in registers, in 16-byte vectors dealt out round robin: vector v of the row is held by thread v % lanes. No width is
// padded: only the last vectors of a row that is no multiple of lanes * 16 bytes are predicated off.
// A block takes one row at a time over a run of consecutive tokens, so a row of modulation is read once per run.
#pragma once

#include <atomic>

#include "adaln_zero/adaln_zero.h"
#include "common/cuda.h"

namespace vidkernels {
namespace adaln {

constexpr int max_threads = 512;  // a row of 8192 values in 16 columns a thread
constexpr int max_warps = max_threads / 32;
// What the compiler is told: two blocks of the 320 threads that a row of 5120 takes must fit into a multiprocessor.
constexpr int bound_threads = 640;

// How threads share rows: `lanes` threads a row, `rows` rows side by side in a block.
struct Shape {
  int lanes = 32;
  int rows = 1;
  int columns = 8;
  bool vectors = true;

  int threads() const { return lanes * rows; }
};

// Threads for a row of `vectors` vectors, `held` of them in each thread: 8, 16 or a multiple of 32.
inline int lanes_for(int64_t vectors, int held) {
  const int64_t needed = (vectors + held - 1) / held;
  if (needed <= 8) return 8;
  if (needed <= 16) return 16;
  return static_cast<int>((needed + 31) / 32 * 32);
}

// 8 columns a thread, or 16 where that takes more than 256 threads and wastes no more lanes: fewer threads meet at the
// row's barrier and each has more loads in flight.
inline Shape shape_for(int64_t channels, DType dtype, bool aligned) {
  const int width = dtype == DType::float32 ? 4 : 8;
  Shape shape;
  shape.vectors = aligned && channels % width == 0;
  const int per_vector = shape.vectors ? width : 1;
  const int64_t vectors = channels / per_vector;
  const int narrow = lanes_for(vectors, 8 / per_vector), wide = lanes_for(vectors, 16 / per_vector);
  const bool take_wide = narrow > max_threads || (narrow > 256 && 2 * wide <= narrow + 32);
  shape.columns = !shape.vectors || take_wide ? 16 : 8;
  shape.lanes = shape.columns == 16 ? wide : narrow;
  if (shape.lanes > max_threads)
    throw std::runtime_error("adaln_zero: the CUDA kernels take at most " + std::to_string(16 * max_threads) +
                             " channels, got " + std::to_string(channels));
  shape.rows = shape.lanes > 32 ? 1 : 128 / shape.lanes;
  return shape;
}

// Static shared memory of a kernel at most.
constexpr size_t static_shared = 1024;

// More than 48 KB of shared memory, static and dynamic, must be asked for, on each device.
template <auto kernel>
void allow_shared(size_t bytes) {
  if (bytes + static_shared <= 48 * 1024) return;
  VK_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(bytes)));
}

// Blocks of a kernel that run at once on one multiprocessor, asked once per kernel and number of warps.
template <auto kernel>
int resident_blocks(int threads, size_t shared_bytes) {
  static std::atomic<int> known[max_warps + 1];
  std::atomic<int>& blocks = known[threads / 32];
  if (blocks.load(std::memory_order_relaxed) == 0) {
    int found = 0;
    allow_shared<kernel>(shared_bytes);
    VK_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, reinterpret_cast<const void*>(kernel), threads,
                                                                shared_bytes));
    blocks.store(found > 0 ? found : 1, std::memory_order_relaxed);
  }
  return blocks.load(std::memory_order_relaxed);
}

using cuda::aligned16;
using cuda::multiprocessors;

#if defined(VK_SIMT_SHIM)
}  // namespace adaln
}  // namespace vidkernels
// Lets a test stand for a device with little shared memory; 0 asks the shim.
extern "C" {
__attribute__((visibility("default"))) inline int64_t vk_adaln_shared_limit = 0;
}
namespace vidkernels {
namespace adaln {
#endif

// Dynamic shared memory that a block may ask for: 99 KB on graphics cards, 163 to 227 KB on data-centre parts.
inline size_t largest_block_shared() {
#if defined(VK_SIMT_SHIM)
  if (vk_adaln_shared_limit > 0) return static_cast<size_t>(vk_adaln_shared_limit);
#endif
  int device = 0, bytes = 0;
  VK_CUDA_CHECK(cudaGetDevice(&device));
  VK_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return static_cast<size_t>(bytes);
}

template <typename T>
constexpr int vector_width = 16 / static_cast<int>(sizeof(T));

// One thread's part of a row: V vectors of N values.
template <typename T, int N, int V>
struct Part {
  cuda::Pack<T, N> vector[V];
};

// The thread's place: which row of the block, which vectors of it.
struct Place {
  int lane, lanes, channels;

  template <int N>
  __device__ bool holds(int j) const {
    return column<N>(j) < channels;
  }
  template <int N>
  __device__ int column(int j) const {
    return (lane + j * lanes) * N;
  }
};

template <typename T, int N, int V>
__device__ inline void load_part(Part<T, N, V>& part, const void* base, int64_t row, const Place& place) {
  const T* source = static_cast<const T*>(base) + row * place.channels;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (place.holds<N>(j)) part.vector[j] = *reinterpret_cast<const cuda::Pack<T, N>*>(source + place.column<N>(j));
  }
}

template <typename T, int N>
__device__ inline void store_vector(void* base, int64_t row, int column, int channels, const cuda::Pack<T, N>& value) {
  cuda::store_pack(static_cast<T*>(base) + row * channels + column, value);
}

// N consecutive values of a table's row as float32; the table's type and alignment are looked at here, once per run.
template <int N, typename S>
__device__ inline void read_as(const S* source, float (&value)[N]) {
  constexpr int step = N < vector_width<S> ? N : vector_width<S>;
  if (step > 1 && reinterpret_cast<uintptr_t>(source) % (sizeof(S) * step) == 0) {
#pragma unroll
    for (int i = 0; i < N; i += step) {
      const cuda::Pack<S, step> vector = *reinterpret_cast<const cuda::Pack<S, step>*>(source + i);
#pragma unroll
      for (int k = 0; k < step; ++k) value[i + k] = cuda::widen(vector.value[k]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) value[i] = cuda::widen(source[i]);
}

template <int N>
__device__ inline void read_table(const Table& table, int64_t row, int column, float missing, float (&value)[N]) {
  if (table.data == nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = missing;
    return;
  }
  const int64_t offset = row * table.stride + column;
  if (table.dtype == DType::float32) {
    read_as<N>(static_cast<const float*>(table.data) + offset, value);
  } else if (table.dtype == DType::bfloat16) {
    read_as<N>(static_cast<const __nv_bfloat16*>(table.data) + offset, value);
  } else {
    read_as<N>(static_cast<const __half*>(table.data) + offset, value);
  }
}

template <int N>
__device__ inline void write_grad(const TableGrad& grad, int64_t row, int column, int channels,
                                  const float (&value)[N]) {
  if (grad.data == nullptr) return;
  const int64_t offset = row * channels + column;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (grad.dtype == DType::float32) {
      static_cast<float*>(grad.data)[offset + i] = value[i];
    } else if (grad.dtype == DType::bfloat16) {
      static_cast<__nv_bfloat16*>(grad.data)[offset + i] = cuda::narrow<__nv_bfloat16>(value[i]);
    } else {
      static_cast<__half*>(grad.data)[offset + i] = cuda::narrow<__half>(value[i]);
    }
  }
}

// a = weight * (1 + scale) and, where wanted, s = bias * (1 + scale) + shift for N columns.
template <int N>
__device__ inline void read_factor(const Table& scale, const Table& weight, int64_t row, int column, float (&a)[N]) {
  float w[N];
  read_table<N>(scale, row, column, 0.0f, a);
  read_table<N>(weight, 0, column, 1.0f, w);
#pragma unroll
  for (int i = 0; i < N; ++i) a[i] = w[i] * (1.0f + a[i]);
}

template <int N>
__device__ inline void read_offset(const Table& scale, const Table& shift, const Table& bias, int64_t row, int column,
                                   float (&s)[N]) {
  read_table<N>(shift, row, column, 0.0f, s);
  if (bias.data == nullptr) return;
  float b[N], factor[N];
  read_table<N>(bias, 0, column, 0.0f, b);
  read_table<N>(scale, row, column, 0.0f, factor);
#pragma unroll
  for (int i = 0; i < N; ++i) s[i] += b[i] * (1.0f + factor[i]);
}

// The positions that one row of a block takes: begin, begin + stride, ... A run is far shorter than 2^31, so steps are
// 32-bit. Rows side by side in a warp take the same number of steps, so that all its threads meet in the shuffles.
struct Run {
  int64_t begin, stride;
  int length, steps;

  // `chunk` consecutive positions.
  __device__ Run(const Shape& shape, int64_t chunk_index, int64_t chunk, int64_t tokens)
      : begin(chunk_index * chunk), stride(1) {
    const int64_t left = tokens - begin;
    length = static_cast<int>(left < 0 ? 0 : (left < chunk ? left : chunk));
    steps = shape.rows > 1 ? static_cast<int>(chunk) : length;
  }

  // Every `all`-th position.
  __device__ static Run striding(const Shape& shape, int64_t first, int64_t all, int64_t tokens) {
    Run run(shape, first, 1, tokens);
    run.stride = all;
    run.length = first < tokens ? static_cast<int>((tokens - first + all - 1) / all) : 0;
    run.steps = shape.rows > 1 ? static_cast<int>((tokens + all - 1) / all) : run.length;
    return run;
  }
};

// K kinds of float32 values that each thread keeps for its C columns over a run of tokens. They live in shared memory,
// where a thread reads back only what it wrote itself, so no barrier is needed; in registers they would cost a quarter
// of the resident threads. At 3 TB/s a kernel reads a fifth of what shared memory delivers.
template <int K, int N, int C>
struct Kept {
  static constexpr int W = N < 4 ? N : 4;  // the threads of a warp touch consecutive 4 * W bytes
  float* shared;

  __host__ __device__ static size_t shared_bytes(int threads) { return sizeof(float) * K * C * threads; }

  __device__ cuda::Pack<float, W>& pack(int kind, int j, int i) const {
    const int index = (kind * C + j * N + i) / W;
    return reinterpret_cast<cuda::Pack<float, W>*>(
        shared)[index * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)];
  }

  __device__ void put(int kind, int j, const float (&value)[N]) const {
#pragma unroll
    for (int i = 0; i < N; i += W) {
      cuda::Pack<float, W> next;
#pragma unroll
      for (int w = 0; w < W; ++w) next.value[w] = value[i + w];
      pack(kind, j, i) = next;
    }
  }

  __device__ void get(int kind, int j, float (&value)[N]) const {
#pragma unroll
    for (int i = 0; i < N; i += W) {
      const cuda::Pack<float, W> next = pack(kind, j, i);
#pragma unroll
      for (int w = 0; w < W; ++w) value[i + w] = next.value[w];
    }
  }
};

// Asynchronous copies from global to shared memory: a row is on its way while the one before is reduced, and takes no
// registers meanwhile. A thread waits for, and reads, only what it copied itself: no barrier. sm_80 and later.
__device__ inline void copy_async(void* to, const void* from) {
#if defined(VK_SIMT_SHIM)
  std::memcpy(to, from, 16);
#else
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#endif
}

__device__ inline void commit_copies() {
#if !defined(VK_SIMT_SHIM)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all but the last `pending` groups of copies have arrived.
template <int pending>
__device__ inline void await_copies() {
#if !defined(VK_SIMT_SHIM)
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// `rows` places in shared memory for a row of V 16-byte vectors a thread.
template <typename T, int N, int V>
struct Stage {
  unsigned char* shared;

  __host__ __device__ static size_t shared_bytes(int rows, int threads) {
    return static_cast<size_t>(rows) * V * 16 * threads;
  }

  __device__ cuda::Pack<T, N>* place(int row, int j) const {
    return reinterpret_cast<cuda::Pack<T, N>*>(
        shared + ((row * V + j) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * 16);
  }

  __device__ void copy(int row, const void* base, int64_t token, const Place& where) const {
    const T* source = static_cast<const T*>(base) + token * where.channels;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (where.holds<N>(j)) copy_async(place(row, j), source + where.column<N>(j));
    }
  }
};

// Sum over the threads of a warp that share a row: `lanes` (a power of two) of them, or all; every thread of the warp
// takes part. The same bits in every lane: each step adds the same pairs in all of them.
__device__ inline float lanes_sum(float value, int lanes) {
  if (lanes >= 32) return cuda::warp_sum(value);  // unrolled
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

}  // namespace adaln
}  // namespace vidkernels
