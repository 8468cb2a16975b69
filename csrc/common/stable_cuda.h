// SPDX-License-Identifier: Apache-2.0
// For CUDA bindings: the current stream and the device guard of a tensor.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/stable.h"

namespace vidkernels {

// torch's current stream on the device of `tensor` (stable_cuda.cpp).
cudaStream_t current_stream(const Tensor& tensor);

// Makes the device of `tensor` current for the guard's lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace vidkernels
