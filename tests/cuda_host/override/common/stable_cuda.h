// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/common/stable_cuda.h under the shim: CUDA bindings are registered for CPU tensors, whose "stream"
// is null. Included before a binding registers its ops, hence the last line.
#pragma once

#include <cuda_runtime.h>

#include "common/stable.h"

namespace vidkernels {

inline cudaStream_t current_stream(const Tensor&) { return nullptr; }

class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor&) {}
};

}  // namespace vidkernels

#define CUDA CPU
