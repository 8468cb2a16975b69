// SPDX-License-Identifier: Apache-2.0
// For .cu files: types, launch, error check. The same kernels compile for the CPU under a SIMT shim (VK_SIMT_SHIM, see
// tests/cuda_host/simt.h), which is why launches and dynamic shared memory go through macros.
#pragma once

#if defined(VK_SIMT_SHIM)
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// VK_LAUNCH((kernel<float, 4>), grid, block, shared_bytes, stream)(arguments...);
#define VK_LAUNCH(KERNEL, GRID, BLOCK, SHARED_BYTES, STREAM) KERNEL<<<GRID, BLOCK, SHARED_BYTES, STREAM>>>

// Inside a kernel: `VK_DYNAMIC_SHARED(float, tile);` declares `float* tile`, aligned for bulk tensor copies.
#define VK_DYNAMIC_SHARED(TYPE, NAME)                                  \
  extern __shared__ __align__(1024) unsigned char vk_dynamic_shared[]; \
  TYPE* NAME = reinterpret_cast<TYPE*>(vk_dynamic_shared)
#endif

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "common/dtype.h"

namespace vidkernels {
namespace cuda {

// What can be done about an error, beyond CUDA's own sentence.
inline std::string remedy(cudaError_t status) {
  int driver = 0, device = 0, major = 0, minor = 0;
  const auto version = [](int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 100 / 10);
  };
  if (status == cudaErrorInsufficientDriver) {
    cudaDriverGetVersion(&driver);
    return "; vidkernels was built with CUDA " + version(CUDART_VERSION) + ", the driver serves up to " +
           version(driver) + ": update the driver, or rebuild with an older toolkit (CUDA_HOME)";
  }
  if (status != cudaErrorNoKernelImageForDevice) return "";
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  return "; this GPU has compute capability " + capability +
         ", for which vidkernels was not built: rebuild with TORCH_CUDA_ARCH_LIST=" + capability;
}

// The error is taken off the runtime before it is thrown, or the next launch would report it again.
[[noreturn]] inline void fail(cudaError_t status, const char* what) {
  const std::string text = std::string(what) + ": " + cudaGetErrorString(status) + remedy(status);
  cudaGetLastError();
  throw std::runtime_error(text);
}

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) fail(status, what);
}

// N values moved by one instruction where sizeof(T) * N is 4, 8 or 16 and the address is a multiple of that.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

// The unsigned type of as many bytes, and its store to global memory. `__stwb` would be a store that other threads of
// the multiprocessor must see at once.
template <int bytes>
struct Word {};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};
#if defined(VK_SIMT_SHIM)
template <typename W>
__device__ inline void store_word(W* to, const W& word) {
  *to = word;
}
#else
__device__ inline void store_word(unsigned short* to, unsigned short word) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(to), "h"(word) : "memory");
}
__device__ inline void store_word(unsigned* to, unsigned word) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}
__device__ inline void store_word(uint2* to, uint2 word) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(word.x), "r"(word.y) : "memory");
}
__device__ inline void store_word(uint4* to, uint4 word) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
}
#endif

// A pack from memory that nobody writes while the kernel runs, and a pack to memory: one instruction each. Plain
// assignments may come out as one access per 4 bytes wherever the compiler has taken a pack apart and does not put it
// together again (nvcc 13.0 did so with the stores of the alpha blend and of the channel norm), and each of these is a
// transaction of its own to the second cache. Loads that are said to be read-only may also rise above earlier stores.
template <int N, typename T>
__device__ inline Pack<T, N> load_pack(const T* from) {
  using W = typename Word<sizeof(Pack<T, N>)>::type;
  const W word = __ldg(reinterpret_cast<const W*>(from));
  Pack<T, N> pack;
  memcpy(&pack, &word, sizeof(pack));
  return pack;
}
template <typename T, int N>
__device__ inline void store_pack(T* to, const Pack<T, N>& pack) {
  using W = typename Word<sizeof(pack)>::type;
  W word;
  memcpy(&word, &pack, sizeof(word));
  store_word(reinterpret_cast<W*>(to), word);
}

__host__ __device__ inline float widen(float value) { return value; }
__host__ __device__ inline double widen(double value) { return value; }
__host__ __device__ inline float widen(__half value) { return __half2float(value); }
__host__ __device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// narrow<T>(x): rounds to nearest, ties to even.
template <typename T>
struct Narrow {
  __host__ __device__ static T from(float value) { return value; }
};
template <>
struct Narrow<double> {
  __host__ __device__ static double from(double value) { return value; }
};
template <>
struct Narrow<__half> {
  __host__ __device__ static __half from(float value) { return __float2half_rn(value); }
};
template <>
struct Narrow<__nv_bfloat16> {
  __host__ __device__ static __nv_bfloat16 from(float value) { return __float2bfloat16_rn(value); }
};
template <typename T>
__host__ __device__ inline T narrow(accumulate_t<T> value) {
  return Narrow<T>::from(value);
}

// Element `at` of a tensor whose dtype is known at run time.
__device__ inline void store_rounded(void* to, DType dtype, int64_t at, double value) {
  switch (dtype) {
    case DType::float32:
      static_cast<float*>(to)[at] = static_cast<float>(value);
      break;
    case DType::float64:
      static_cast<double*>(to)[at] = value;
      break;
    case DType::bfloat16:
      static_cast<__nv_bfloat16*>(to)[at] = __float2bfloat16_rn(static_cast<float>(value));
      break;
    default:
      static_cast<__half*>(to)[at] = __float2half_rn(static_cast<float>(value));
      break;
  }
}

// 1 / sqrt(x) within 2 units of the last place: 4 instructions, where the rounded root and quotient take 30.
__device__ inline float inverse_root(float x) {
#if defined(VK_SIMT_SHIM)
  return 1.0f / sqrtf(x);
#else
  return rsqrtf(x);
#endif
}
__device__ inline double inverse_root(double x) { return 1.0 / sqrt(x); }

inline bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }
inline bool aligned16(const void* pointer) { return aligned(pointer, 16); }

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

// Sum over the lanes of a warp, the same bits in every lane: each step adds the same pairs in all of them.
template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

}  // namespace cuda
}  // namespace vidkernels

// Throws std::runtime_error, which the binding's caller sees as RuntimeError.
#define VK_CUDA_CHECK(CALL) ::vidkernels::cuda::check((CALL), #CALL)
#define VK_CUDA_CHECK_LAUNCH() ::vidkernels::cuda::check(cudaGetLastError(), __func__)

// VK_DISPATCH_FLOATING of common/dtype.h with CUDA's own types.
#define VK_CUDA_DISPATCH_FLOATING(DTYPE, BODY) \
  switch (DTYPE) {                             \
    case ::vidkernels::DType::float32: {       \
      using scalar_t = float;                  \
      BODY();                                  \
      break;                                   \
    }                                          \
    case ::vidkernels::DType::float64: {       \
      using scalar_t = double;                 \
      BODY();                                  \
      break;                                   \
    }                                          \
    case ::vidkernels::DType::bfloat16: {      \
      using scalar_t = __nv_bfloat16;          \
      BODY();                                  \
      break;                                   \
    }                                          \
    case ::vidkernels::DType::float16: {       \
      using scalar_t = __half;                 \
      BODY();                                  \
      break;                                   \
    }                                          \
    default:                                   \
      break;                                   \
  }
