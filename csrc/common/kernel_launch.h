// SPDX-License-Identifier: Apache-2.0
// A launch that is repeated with other addresses. `vidkernels/triton/_launch.py` mirrors these structs by ctypes.
#pragma once

#include <cstdint>

#define VK_EXPORT __attribute__((visibility("default")))

enum { VK_MOST_ARGUMENTS = 128, VK_MOST_MAPS = 8 };
// What an argument is: a number (as many low bytes as the kernel takes), the address of a tensor, a tensor map.
enum { VK_NUMBER = 0, VK_TENSOR = 1, VK_TENSOR_MAP = 2 };

struct VkArgument {
  int64_t kind;
  int64_t value;  // the number, or an index into the addresses or the maps
};

struct VkTensorMap {
  int32_t tensor;  // index into the addresses
  int32_t dtype;   // CUtensorMapDataType
  int32_t rank;
  int32_t swizzle;
  uint64_t sizes[5];    // innermost first
  uint64_t strides[5];  // bytes, of the second innermost on
  uint32_t box[5];
};

struct VkLaunch {
  void* function;  // CUfunction
  uint32_t grid[3];
  uint32_t threads;
  uint32_t shared_bytes;
  int32_t argument_count;
  int32_t map_count;
  VkArgument arguments[VK_MOST_ARGUMENTS];
  VkTensorMap maps[VK_MOST_MAPS];
};

extern "C" {
// Returns 0, the driver's error, or -1 where there is no driver. `addresses` are those of the tensors, in the plan's
// order.
VK_EXPORT int vidkernels_launch(const VkLaunch* plan, void* stream, const uint64_t* addresses);
VK_EXPORT const char* vidkernels_launch_error(int error);
}
