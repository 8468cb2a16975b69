// SPDX-License-Identifier: Apache-2.0
#include <optional>

#include "channel_norm/channel_norm_binding.h"
#include "channel_norm/group_norm.h"

namespace vidkernels {
namespace {

constexpr int64_t kFrameAxis = 2;

// Tensors with the strides of x, which is dense: contiguous or channels last.
GroupNormParams group_norm_params(const Tensor& x, const std::optional<Tensor>& weight,
                                  const std::optional<Tensor>& bias, int64_t groups, double eps, bool silu,
                                  bool per_frame) {
  GroupNormParams p;
  p.x = x.data_ptr();
  p.weight = data_or_null(weight);
  p.bias = data_or_null(bias);
  p.dtype = dtype_of(x);
  if (weight.has_value()) p.weight_dtype = dtype_of(*weight);
  if (bias.has_value()) p.bias_dtype = dtype_of(*bias);
  p.batch = x.size(0);
  p.batch_stride = x.stride(0);
  p.channels = x.size(1);
  p.channel_stride = x.stride(1);
  p.groups = groups;
  if (per_frame) {
    p.frames = x.size(kFrameAxis);
    p.frame_stride = x.stride(kFrameAxis);
  }
  p.silu = silu;
  p.eps = eps;
  bool walkable = true;
  int64_t inner = 0;  // stride of the innermost position axis, once found
  for (int64_t axis = x.dim() - 1; axis > (per_frame ? kFrameAxis : 1); --axis) {
    if (x.size(axis) == 1) continue;
    if (inner == 0) inner = x.stride(axis);
    walkable = walkable && x.stride(axis) == inner * p.positions;
    p.positions *= x.size(axis);
  }
  p.position_stride = inner == 0 ? 1 : inner;
  const bool row = p.channels > 1 && p.channel_stride == 1;
  walkable = walkable && (inner == 0 || row || p.position_stride == 1);
  STD_TORCH_CHECK(walkable, "group_norm: x must be contiguous or channels last");
  return p;
}

void check_like(const Tensor& x, const Tensor& other) {
  STD_TORCH_CHECK(sizes_of(other) == sizes_of(x) && same_strides(x, other),
                  "group_norm: tensors differ in memory format");
}

Tensor statistics(const Tensor& x, int64_t groups, bool per_frame) {
  const int64_t samples = x.size(0) * (per_frame ? x.size(kFrameAxis) : 1);
  return empty_on(x, {samples, groups}, torch::headeronly::ScalarType::Double);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_fwd_binding(const Tensor& x, const std::optional<Tensor>& weight,
                                                          const std::optional<Tensor>& bias, int64_t groups, double eps,
                                                          bool silu, bool per_frame) {
  Tensor y = torch::stable::empty_like(x);
  check_like(x, y);
  Tensor mean = statistics(x, groups, per_frame), rstd = statistics(x, groups, per_frame);
  if (x.numel() == 0) return {y, torch::stable::zero_(mean), torch::stable::zero_(rstd)};
  GroupNormParams params = group_norm_params(x, weight, bias, groups, eps, silu, per_frame);
  params.y = y.mutable_data_ptr();
  params.mean = static_cast<double*>(mean.mutable_data_ptr());
  params.rstd = static_cast<double*>(rstd.mutable_data_ptr());
  group_norm_fwd_cpu(params);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_bwd_binding(const Tensor& dy, const Tensor& x, const Tensor& mean,
                                                          const Tensor& rstd, const std::optional<Tensor>& weight,
                                                          const std::optional<Tensor>& bias, int64_t groups, bool silu,
                                                          bool per_frame, bool want_x, bool want_weight,
                                                          bool want_bias) {
  check_like(x, dy);
  STD_TORCH_CHECK(dtype_of(mean) == DType::float64 && dtype_of(rstd) == DType::float64,
                  "group_norm: mean and rstd must be float64, as group_norm_fwd returns them");
  Tensor dx = want_x ? torch::stable::empty_like(x) : empty_on(x, {0}, x.scalar_type());
  Tensor dweight = affine_grad(x, weight, want_weight), dbias = affine_grad(x, bias, want_bias);
  if (x.numel() == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
    return {dx, dweight, dbias};
  }
  GroupNormBackwardParams params;
  params.forward = group_norm_params(x, weight, bias, groups, 0, silu, per_frame);
  params.forward.mean = static_cast<double*>(mean.data_ptr());
  params.forward.rstd = static_cast<double*>(rstd.data_ptr());
  params.dy = dy.data_ptr();
  params.dx = dx.numel() > 0 ? dx.data_ptr() : nullptr;
  params.dweight = dweight.numel() > 0 ? dweight.data_ptr() : nullptr;
  params.dbias = dbias.numel() > 0 ? dbias.data_ptr() : nullptr;
  group_norm_bwd_cpu(params);
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CPU, m) {
  m.impl("group_norm_fwd", TORCH_BOX(&vidkernels::group_norm_fwd_binding));
  m.impl("group_norm_bwd", TORCH_BOX(&vidkernels::group_norm_bwd_binding));
}
