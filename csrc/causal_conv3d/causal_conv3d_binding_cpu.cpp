// SPDX-License-Identifier: Apache-2.0
#include "causal_conv3d/causal_conv3d.h"
#include "common/stable.h"

namespace vidkernels {
namespace {

using Ints = std::vector<int64_t>;

// Strides of [B, C, T, H, W] without the channels, which must lie next to each other.
void strides_of(const Tensor& tensor, const char* name, int64_t (&stride)[4]) {
  STD_TORCH_CHECK(tensor.dim() == 5, "causal_conv3d: ", name, ": expected [B, C, T, H, W]");
  STD_TORCH_CHECK(tensor.size(1) == 1 || tensor.stride(1) == 1, "causal_conv3d: ", name, ": expected channels_last_3d");
  const int axes[4] = {0, 2, 3, 4};
  for (int i = 0; i < 4; ++i) stride[i] = tensor.stride(axes[i]);
}

void copy3(const Ints& from, int64_t (&to)[3]) {
  STD_TORCH_CHECK(from.size() == 3, "causal_conv3d: expected three numbers (t, h, w)");
  for (int i = 0; i < 3; ++i) to[i] = from[i];
}

void describe_tensors(CausalConv3dParams& p, Tensor& y, const Tensor& x, const Tensor& weight) {
  p.y = y.data_ptr();
  p.x = x.data_ptr();
  p.weight = weight.data_ptr();
  strides_of(y, "y", p.y_stride);
  strides_of(x, "x", p.x_stride);
  STD_TORCH_CHECK(weight.dim() == 5, "causal_conv3d: weight: expected [K, C, kt, kh, kw]");
  for (int i = 0; i < 5; ++i) p.weight_stride[i] = weight.stride(i);
  for (int i = 0; i < 3; ++i) {
    p.in_size[i] = x.size(2 + i);
    p.out_size[i] = y.size(2 + i);
    p.kernel[i] = weight.size(2 + i);
  }
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.filters = weight.size(0);
  p.dtype = dtype_of(x);
  p.weight_dtype = dtype_of(weight);
}

void describe_padding(CausalConv3dParams& p, const std::optional<Tensor>& history, const Ints& stride,
                      const Ints& dilation, const Ints& before, int64_t time_mode, int64_t space_mode) {
  p.history = data_or_null(history);
  p.history_frames = history.has_value() ? history->size(2) : 0;
  if (history.has_value()) strides_of(*history, "history", p.history_stride);
  copy3(stride, p.stride);
  copy3(dilation, p.dilation);
  copy3(before, p.before);
  p.replicate_time = time_mode != 0;
  p.replicate_space = space_mode != 0;
}

// y = residual + act(conv(x, weight) + bias); see ops/causal_conv3d.py. y is a view with any strides but the channels'.
void causal_conv3d_out(Tensor y, Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> history,
                       std::optional<Tensor> residual, Ints stride, Ints dilation, Ints before, int64_t time_mode,
                       int64_t space_mode, int64_t activation, int64_t algorithm) {
  CausalConv3dParams p{};
  describe_tensors(p, y, x, weight);
  p.bias = data_or_null(bias);
  p.bias_stride = bias.has_value() ? bias->stride(0) : 0;
  p.residual = data_or_null(residual);
  if (residual.has_value()) strides_of(*residual, "residual", p.residual_stride);
  describe_padding(p, history, stride, dilation, before, time_mode, space_mode);
  p.silu = activation != 0;
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
