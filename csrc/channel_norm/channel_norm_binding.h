// SPDX-License-Identifier: Apache-2.0
// From tensors to the parameters of the channel norm kernels, for the CPU and the CUDA binding.
#pragma once

#include <optional>

#include "channel_norm/channel_norm.h"
#include "common/stable.h"

namespace vidkernels {

struct ChannelNormOptions {
  int64_t dim;
  int64_t kind;
  double eps;
  bool silu;
};

inline Affine affine_of(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return {};
  return {tensor->data_ptr(), dtype_of(*tensor)};
}

// `x` itself where the kernels can walk it beside `like` (the output, dense in x's order), else its values in a tensor
// with the strides of `like`.
inline Tensor walkable(const Tensor& x, const Tensor& like, int64_t dim, ChannelLayout& layout) {
  if (make_channel_layout(x.dim(), x.sizes().data(), x.strides().data(), like.strides().data(), dim, layout)) return x;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, x);
  STD_TORCH_CHECK(
      make_channel_layout(x.dim(), x.sizes().data(), copy.strides().data(), like.strides().data(), dim, layout),
      "channel_norm: x has more than ", kMaxPositionDims + 1, " axes");
  return copy;
}

inline ChannelNormParams channel_norm_params(const Tensor& x, const std::optional<Tensor>& weight,
                                             const std::optional<Tensor>& bias, const ChannelNormOptions& options,
                                             const ChannelLayout& layout) {
  ChannelNormParams params;
  params.x = x.data_ptr();
  params.weight = affine_of(weight);
  params.bias = affine_of(bias);
  params.layout = layout;
  params.kind = static_cast<NormKind>(options.kind);
  params.silu = options.silu;
  params.eps = options.eps;
  params.dtype = dtype_of(x);
  return params;
}

struct Wanted {
  bool x, weight, bias;
};

// Operands and results of a backward call; results that are not wanted are empty.
struct BackwardTensors {
  Tensor x, dy, dx, dweight, dbias;
  ChannelLayout layout;
};

// A vector for the gradient of weight or bias, of the dtype of `affine`; empty where it is not wanted.
inline Tensor affine_grad(const Tensor& x, const std::optional<Tensor>& affine, bool wanted) {
  const auto dtype = affine.has_value() ? affine->scalar_type() : x.scalar_type();
  return empty_on(x, {wanted && affine.has_value() ? affine->size(0) : 0}, dtype);
}

inline BackwardTensors backward_tensors(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& weight,
                                        const std::optional<Tensor>& bias, int64_t dim, const Wanted& wanted) {
  Tensor like = torch::stable::empty_like(x);
  BackwardTensors tensors{x,
                          dy,
                          wanted.x ? like : empty_on(x, {0}, x.scalar_type()),
                          affine_grad(x, weight, wanted.weight),
                          affine_grad(x, bias, wanted.bias),
                          {}};
  if (x.numel() == 0) return tensors;
  tensors.x = walkable(x, like, dim, tensors.layout);
  if (!same_strides(dy, like)) {
    tensors.dy = torch::stable::empty_like(like);
    torch::stable::copy_(tensors.dy, dy);
  }
  return tensors;
}

inline ChannelNormBackwardParams backward_params(const BackwardTensors& tensors, const std::optional<Tensor>& weight,
                                                 const std::optional<Tensor>& bias, const ChannelNormOptions& options) {
  ChannelNormBackwardParams params;
  params.forward = channel_norm_params(tensors.x, weight, bias, options, tensors.layout);
  params.dy = tensors.dy.data_ptr();
  params.dx = tensors.dx.numel() > 0 ? tensors.dx.data_ptr() : nullptr;
  params.dweight = tensors.dweight.numel() > 0 ? tensors.dweight.data_ptr() : nullptr;
  params.dbias = tensors.dbias.numel() > 0 ? tensors.dbias.data_ptr() : nullptr;
  params.dweight_dtype = dtype_of(tensors.dweight);
  params.dbias_dtype = dtype_of(tensors.dbias);
  return params;
}

// The bare ops. `Backend` runs the kernels: `forward(like, params)`, `backward(like, params)`.
template <typename Backend>
Tensor channel_norm_fwd_op(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                           int64_t dim, int64_t kind, double eps, bool silu) {
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  ChannelLayout layout;
  const Tensor source = walkable(x, y, dim, layout);
  ChannelNormParams params = channel_norm_params(source, weight, bias, {dim, kind, eps, silu}, layout);
  params.y = y.mutable_data_ptr();
  Backend::forward(y, params);
  return y;
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> channel_norm_bwd_op(const Tensor& dy, const Tensor& x,
                                                       const std::optional<Tensor>& weight,
                                                       const std::optional<Tensor>& bias, int64_t dim, int64_t kind,
                                                       double eps, bool silu, bool want_x, bool want_weight,
                                                       bool want_bias) {
  BackwardTensors tensors = backward_tensors(dy, x, weight, bias, dim, {want_x, want_weight, want_bias});
  if (x.numel() == 0) {
    torch::stable::zero_(tensors.dweight);
    torch::stable::zero_(tensors.dbias);
  } else if (want_x || want_weight || want_bias) {
    Backend::backward(tensors.dy, backward_params(tensors, weight, bias, {dim, kind, eps, silu}));
  }
  return {tensors.dx, tensors.dweight, tensors.dbias};
}

}  // namespace vidkernels
