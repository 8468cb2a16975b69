// SPDX-License-Identifier: Apache-2.0
#include "causal_conv3d/causal_conv3d_binding.h"

namespace vidkernels {
namespace {

// y = residual + act(conv(x, weight) + bias); see ops/causal_conv3d.py. y is a view with any strides but the channels'.
void causal_conv3d_out(Tensor y, Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> history,
                       std::optional<Tensor> residual, Ints stride, Ints dilation, Ints before, int64_t time_mode,
                       int64_t space_mode, int64_t activation, int64_t algorithm) {
  CausalConv3dParams p{};
  describe_tensors(p, y, x, weight);
  describe_epilogue(p, bias, residual, activation);
  describe_padding(p, history, stride, dilation, before, time_mode, space_mode);
  p.algorithm = static_cast<ConvAlgorithm>(algorithm);
  causal_conv3d_cpu(p);
}

// dweight = gradient of the weight, from the gradient of the convolution's sum.
void causal_conv3d_wgrad_out(Tensor dweight, Tensor grad, Tensor x, std::optional<Tensor> history, Ints stride,
                             Ints dilation, Ints before, int64_t time_mode, int64_t space_mode, int64_t algorithm) {
  CausalConv3dWgradParams p{};
  STD_TORCH_CHECK(dweight.is_contiguous(), "causal_conv3d_wgrad_out: dweight: expected no gaps");
  describe_tensors(p.conv, grad, x, dweight);
  p.grad = grad.data_ptr();
  p.dweight = dweight.data_ptr();
  describe_padding(p.conv, history, stride, dilation, before, time_mode, space_mode);
  p.conv.algorithm = static_cast<ConvAlgorithm>(algorithm);
  causal_conv3d_wgrad_cpu(p);
}

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CPU, m) {
  m.impl("causal_conv3d_out", TORCH_BOX(&vidkernels::causal_conv3d_out));
  m.impl("causal_conv3d_wgrad_out", TORCH_BOX(&vidkernels::causal_conv3d_wgrad_out));
}
