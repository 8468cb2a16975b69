// SPDX-License-Identifier: Apache-2.0
#include "adaln_zero/adaln_zero_binding.h"
#include "common/stable_cuda.h"

namespace vidkernels {
namespace {

using adaln::BackwardParams;
using adaln::ForwardParams;
using adaln::RowMap;

struct CudaBackend {
  static void forward(const Tensor& on, const ForwardParams& params) {
    const DeviceGuard guard(on);
    adaln::forward_cuda(params, current_stream(on));
  }
  static void backward(const Tensor& on, const BackwardParams& params) {
    const DeviceGuard guard(on);
    adaln::backward_cuda(params, current_stream(on));
  }
  static int64_t chunk_tokens(const Tensor& on, const BackwardParams& params) {
    const DeviceGuard guard(on);
    return adaln::backward_chunk_cuda(params);
  }
  // The values are on the device and are not waited for; the kernels keep what they read from them inside the tables.
  static void check_rows(const RowMap&, int64_t, int64_t, int64_t) {}
};

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CUDA, m) { vidkernels::adaln::register_ops<vidkernels::CudaBackend>(m); }
