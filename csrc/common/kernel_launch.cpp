// SPDX-License-Identifier: Apache-2.0
// Launches of compiled kernels (Triton's) whose arguments but for the tensors' addresses are the same as in an earlier
// launch. The driver is loaded at run time: this file is part of the CPU library, which is built without CUDA.
#include <dlfcn.h>

#include <cstdint>
#include <cstring>

#include "common/kernel_launch.h"

namespace {

// The three functions of libcuda.so.1 that are called, with its types spelled out.
using EncodeTiled = int (*)(void* map, int dtype, uint32_t rank, void* address, const uint64_t* sizes,
                            const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,
                            int swizzle, int promotion, int fill);
using LaunchKernel = int (*)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                             unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** arguments,
                             void** extra);
using ErrorName = int (*)(int error, const char** name);

constexpr int kPromotion128 = 2;  // CU_TENSOR_MAP_L2_PROMOTION_L2_128B, as Triton asks for
constexpr int kNotFound = -1;

struct Driver {
  EncodeTiled encode = nullptr;
  LaunchKernel launch = nullptr;
  ErrorName error_name = nullptr;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr) return;
    encode = reinterpret_cast<EncodeTiled>(dlsym(library, "cuTensorMapEncodeTiled"));
    launch = reinterpret_cast<LaunchKernel>(dlsym(library, "cuLaunchKernel"));
    error_name = reinterpret_cast<ErrorName>(dlsym(library, "cuGetErrorName"));
  }
};

const Driver& driver() {
  static const Driver loaded;
  return loaded;
}

struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

}  // namespace

extern "C" {

VK_EXPORT int vidkernels_launch(const VkLaunch* plan, void* stream, const uint64_t* addresses) {
  const Driver& cuda = driver();
  if (cuda.launch == nullptr || (plan->map_count > 0 && cuda.encode == nullptr)) return kNotFound;
  TensorMap maps[VK_MOST_MAPS];
  const uint32_t steps[5] = {1, 1, 1, 1, 1};
  for (int32_t i = 0; i < plan->map_count; ++i) {
    const VkTensorMap& map = plan->maps[i];
    void* address = reinterpret_cast<void*>(addresses[map.tensor]);
    int error = cuda.encode(&maps[i], map.dtype, map.rank, address, map.sizes, map.strides, map.box, steps, 0,
                            map.swizzle, kPromotion128, 0);
    if (error != 0) return error;
  }
  void* arguments[VK_MOST_ARGUMENTS];
  for (int32_t i = 0; i < plan->argument_count; ++i) {
    const VkArgument& argument = plan->arguments[i];
    switch (argument.kind) {
      case VK_TENSOR:
        arguments[i] = const_cast<uint64_t*>(addresses + argument.value);
        break;
      case VK_TENSOR_MAP:
        arguments[i] = &maps[argument.value];
        break;
      default:
        arguments[i] = const_cast<int64_t*>(&argument.value);
    }
  }
  return cuda.launch(plan->function, plan->grid[0], plan->grid[1], plan->grid[2], plan->threads, 1, 1,
                     plan->shared_bytes, stream, arguments, nullptr);
}

VK_EXPORT const char* vidkernels_launch_error(int error) {
  const char* name = nullptr;
  if (error == kNotFound) return "libcuda.so.1 was not found";
  if (driver().error_name != nullptr && driver().error_name(error, &name) == 0 && name != nullptr) return name;
  return "unknown error";
}

}  // extern "C"
