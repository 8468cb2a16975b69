// SPDX-License-Identifier: Apache-2.0
#include "channel_norm/channel_norm_binding.h"

namespace vidkernels {
namespace {

Tensor channel_norm_fwd_binding(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                int64_t dim, int64_t kind, double eps, bool silu) {
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  ChannelLayout layout;
  const Tensor source = walkable(x, y, dim, layout);
  ChannelNormParams params = channel_norm_params(source, weight, bias, {dim, kind, eps, silu}, layout);
  params.y = y.mutable_data_ptr();
  channel_norm_fwd_cpu(params);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> channel_norm_bwd_binding(const Tensor& dy, const Tensor& x,
                                                            const std::optional<Tensor>& weight,
                                                            const std::optional<Tensor>& bias, int64_t dim,
                                                            int64_t kind, double eps, bool silu, bool want_x,
                                                            bool want_weight, bool want_bias) {
  BackwardTensors tensors = backward_tensors(dy, x, weight, bias, dim, {want_x, want_weight, want_bias});
  ChannelNormBackwardParams params = backward_params(tensors, weight, bias, {dim, kind, eps, silu});
  if (x.numel() == 0) {
    torch::stable::zero_(tensors.dweight);
    torch::stable::zero_(tensors.dbias);
  } else if (want_x || want_weight || want_bias) {
    channel_norm_bwd_cpu(params);
  }
  return {tensors.dx, tensors.dweight, tensors.dbias};
}

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CPU, m) {
  m.impl("channel_norm_fwd", TORCH_BOX(&vidkernels::channel_norm_fwd_binding));
  m.impl("channel_norm_bwd", TORCH_BOX(&vidkernels::channel_norm_bwd_binding));
}
