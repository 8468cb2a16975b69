// SPDX-License-Identifier: Apache-2.0
#include "common/stable_cuda.h"

#include <dlfcn.h>

#include <stdexcept>

namespace vidkernels {
namespace {

using CurrentStream = int32_t (*)(int32_t device_index, void** stream);

// The symbol lives in libtorch_cuda, which a CPU-only torch does not have and a CUDA torch loads privately: a direct
// reference would make this library unloadable in both, so it is looked up in the copy that torch has loaded.
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  if (library == nullptr)
    throw std::runtime_error("vidkernels: libtorch_cuda.so is not loaded; is this a CUDA build of torch?");
  void* symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
  if (symbol == nullptr)
    throw std::runtime_error("vidkernels: libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<CurrentStream>(symbol);
}

}  // namespace

cudaStream_t current_stream(const Tensor& tensor) {
  static const CurrentStream get = find_current_stream();
  void* stream = nullptr;
  if (get(tensor.get_device_index(), &stream) != 0)
    throw std::runtime_error("vidkernels: torch gave no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace vidkernels
