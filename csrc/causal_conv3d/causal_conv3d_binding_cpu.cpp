// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "causal_conv3d/causal_conv3d_binding.h"
#include "causal_conv3d/sum_taps.h"

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
  if (y.numel() > 0) causal_conv3d_cpu(p);
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
  if (grad.numel() > 0 && x.numel() > 0) return causal_conv3d_wgrad_cpu(p);
  torch::stable::zero_(dweight);
}

using Rows = std::vector<double>;

int64_t tap_at(const Ints& at, const int64_t (&kernel)[3]) {
  int64_t tap = 0;
  for (size_t i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(at.size() == 3 && at[i] >= 0 && at[i] < kernel[i], "sum_taps_out: smooth_at: expected (t, h, w)");
    tap = tap * kernel[i] + at[i];
  }
  return tap;
}

// Linear maps on the taps of a weight; see sum_taps.h. `rows` of an axis: one after the other, none: as it is. With
// `mix_factor` the weight has its share of a blend, and the smooth part is added at tap `smooth_at` (t, h, w).
void sum_taps_out(Tensor out, Tensor weight, std::optional<Tensor> mix_factor, Rows t, Rows h, Rows w, Ints smooth_at) {
  SumTapsParams p{};
  STD_TORCH_CHECK(weight.dim() == 5, "sum_taps_out: weight: expected [K, C, kt, kh, kw]");
  STD_TORCH_CHECK(out.dim() == 5 && out.size(0) == weight.size(0) && out.size(1) == weight.size(1),
                  "sum_taps_out: out: expected filters and channels of weight");
  STD_TORCH_CHECK(out.size(0) == 1 || out.stride(0) == 1, "sum_taps_out: out: expected filters side by side");
  const Rows* rows[3] = {&t, &h, &w};
  for (int axis = 0; axis < 3; ++axis) {
    p.kernel[axis] = weight.size(2 + axis);
    p.count[axis] = out.size(2 + axis);
    const int64_t expected = p.count[axis] * p.kernel[axis], given = static_cast<int64_t>(rows[axis]->size());
    STD_TORCH_CHECK(given == 0 ? p.count[axis] == p.kernel[axis] : given == expected,
                    "sum_taps_out: rows: expected one number per tap and row");
    p.rows[axis] = given == 0 ? nullptr : rows[axis]->data();
  }
  for (int i = 0; i < 5; ++i) p.weight_stride[i] = weight.stride(i), p.out_stride[i] = out.stride(i);
  p.out = out.data_ptr();
  p.weight = weight.data_ptr();
  p.filters = weight.size(0);
  p.channels = weight.size(1);
  p.dtype = dtype_of(weight);
  p.out_dtype = dtype_of(out);
  const DType wide = p.dtype == DType::float64 ? DType::float64 : DType::float32;
  STD_TORCH_CHECK(p.out_dtype == p.dtype || p.out_dtype == wide, "sum_taps_out: out: expected the weight's dtype");
  p.share = 1;
  p.smooth_tap = -1;
  if (mix_factor.has_value()) {
    double mix = 0;
    VK_DISPATCH_FLOATING(dtype_of(*mix_factor),
                         ([&] { mix = to_float(*static_cast<const scalar_t*>(mix_factor->data_ptr())); }));
    p.share = 1 / (1 + std::exp(mix));
    p.smooth = 1 / (1 + std::exp(-mix));
    if (!smooth_at.empty()) p.smooth_tap = tap_at(smooth_at, p.kernel);
  }
  sum_taps_cpu(p);
}

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CPU, m) {
  m.impl("causal_conv3d_out", TORCH_BOX(&vidkernels::causal_conv3d_out));
  m.impl("sum_taps_out", TORCH_BOX(&vidkernels::sum_taps_out));
  m.impl("causal_conv3d_wgrad_out", TORCH_BOX(&vidkernels::causal_conv3d_wgrad_out));
}
