// SPDX-License-Identifier: Apache-2.0
#include "channel_norm/channel_norm_binding.h"
#include "common/stable_cuda.h"

namespace vidkernels {

void channel_norm_fwd_cuda(const ChannelNormParams& p, cudaStream_t stream);
void channel_norm_bwd_cuda(const ChannelNormBackwardParams& p, cudaStream_t stream);
int64_t channel_norm_bwd_partials();

namespace {

struct Cuda {
  static void forward(const Tensor& like, const ChannelNormParams& params) {
    const DeviceGuard guard(like);
    channel_norm_fwd_cuda(params, current_stream(like));
  }
  static void backward(const Tensor& like, ChannelNormBackwardParams params) {
    const DeviceGuard guard(like);
    const int64_t rows = channel_norm_bwd_partials(), channels = params.forward.layout.channels;
    const auto dtype = params.forward.dtype == DType::float64 ? torch::headeronly::ScalarType::Double
                                                              : torch::headeronly::ScalarType::Float;
    const Tensor partial = empty_on(like, {rows, 2, channels}, dtype);
    params.partial = partial.data_ptr();
    channel_norm_bwd_cuda(params, current_stream(like));
  }
};

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CUDA, m) {
  m.impl("channel_norm_fwd", TORCH_BOX(&vidkernels::channel_norm_fwd_op<vidkernels::Cuda>));
  m.impl("channel_norm_bwd", TORCH_BOX(&vidkernels::channel_norm_bwd_op<vidkernels::Cuda>));
}
