// SPDX-License-Identifier: Apache-2.0
// The bare ops, from tensors to QkNormRopeParams, for the CPU and the CUDA binding.
#pragma once

#include "common/stable.h"
#include "qk_norm_rope/qk_norm_rope.h"

namespace vidkernels {

using OptionalTensor = std::optional<Tensor>;

inline void fill_strides(const Tensor& tensor, int64_t (&stride)[3]) {
  const auto strides = tensor.strides();
  const size_t packed = strides.size() == 3 ? 1 : 0;
  stride[0] = packed ? 0 : strides[0];
  stride[1] = strides[1 - packed];
  stride[2] = strides[2 - packed];
}

inline QkSide make_side(const Tensor& x, const Tensor& y, const OptionalTensor& weight) {
  QkSide side{};
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(x.numel() == 0 || x.strides()[sizes.size() - 1] == 1,
                  "qk_norm_rope: channels must be neighbours in memory");
  side.x = x.data_ptr();
  side.y = y.data_ptr();
  side.weight = data_or_null(weight);
  side.weight_dtype = weight.has_value() ? dtype_of(*weight) : DType::float32;
  side.heads = sizes[sizes.size() - 2];
  fill_strides(x, side.x_stride);
  fill_strides(y, side.y_stride);
  return side;
}

inline void fill_rotation(QkNormRopeParams& p, const OptionalTensor& positions, const OptionalTensor& frequencies,
                          const std::vector<int64_t>& axes, const std::vector<double>& theta,
                          const std::vector<double>& position_scale) {
  if (!positions.has_value()) return;
  const auto sizes = positions->sizes();
  const auto strides = positions->strides();
  const size_t last = sizes.size() - 1;
  p.positions = positions->data_ptr();
  p.position_dtype = dtype_of(*positions);
  p.position_stride[0] = sizes.size() == 3 ? strides[0] : 0;  // [T, A] is shared by the batch
  p.position_stride[1] = strides[last - 1];
  p.position_stride[2] = strides[last];
  p.axes = static_cast<int>(sizes[last]);
  STD_TORCH_CHECK(p.axes <= kRotaryMaxAxes, "qk_norm_rope: at most 3 position axes");
  for (const int64_t dims : axes) p.pairs += dims / 2;
  if (frequencies.has_value()) {
    p.frequencies = frequencies->data_ptr();
    p.frequency_dtype = dtype_of(*frequencies);
    p.frequency_heads = frequencies->sizes().size() == 3 ? frequencies->sizes()[1] : 1;
    return;
  }
  STD_TORCH_CHECK(static_cast<int>(axes.size()) == p.axes, "qk_norm_rope: one entry of axes per position axis");
  for (int axis = 0; axis < p.axes; ++axis) {
    p.axis_pairs[axis] = axes[axis] / 2;
    p.theta[axis] = theta[axis];
    p.position_scale[axis] = position_scale[axis];
  }
}

inline QkNormRopeParams make_params(const Tensor& q, const Tensor& k, const Tensor& q_out, const Tensor& k_out,
                                    const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                                    const OptionalTensor& positions, const OptionalTensor& frequencies,
                                    const std::vector<int64_t>& axes, const std::vector<double>& theta,
                                    const std::vector<double>& position_scale, int64_t norm, double eps,
                                    int64_t layout) {
  QkNormRopeParams p{};
  const auto sizes = q.sizes();
  p.batch = sizes.size() == 4 ? sizes[0] : 1;
  p.tokens = sizes[sizes.size() - 3];
  p.head_dim = sizes[sizes.size() - 1];
  p.side[0] = make_side(q, q_out, q_weight);
  p.side[1] = make_side(k, k_out, k_weight);
  p.dtype = dtype_of(q);
  p.norm = static_cast<QkNorm>(norm);
  p.eps = eps;
  p.layout = static_cast<RotaryLayout>(layout);
  p.frequency_heads = 1;
  fill_rotation(p, positions, frequencies, axes, theta, position_scale);
  STD_TORCH_CHECK(2 * p.pairs <= p.head_dim, "qk_norm_rope: more rotated dimensions than the head has");
  return p;
}

// Adds what the backward needs beyond make_params(q, k, dq_out, dk_out, ...).
inline void add_cotangents(QkNormRopeParams& p, const Tensor& dq, const Tensor& dk) {
  p.side[0].dy = dq.data_ptr();
  p.side[1].dy = dk.data_ptr();
  fill_strides(dq, p.side[0].dy_stride);
  fill_strides(dk, p.side[1].dy_stride);
}

// The gradient of a weight, or an empty tensor where none is wanted; its pointer goes into the parameters.
inline Tensor make_dweight(QkSide& side, const Tensor& x, const OptionalTensor& weight, bool wanted) {
  if (!wanted || !weight.has_value()) return empty_on(x, {0}, x.scalar_type());
  Tensor dweight = torch::stable::empty_like(*weight);
  side.dweight = dweight.data_ptr();
  return dweight;
}

// The bare ops. `Backend` runs the kernels: `forward(like, params)` and `backward(like, params, dweights)`.
template <typename Backend>
std::tuple<Tensor, Tensor> qk_norm_rope_fwd_op(Tensor q, Tensor k, OptionalTensor q_weight, OptionalTensor k_weight,
                                               OptionalTensor positions, OptionalTensor frequencies,
                                               std::vector<int64_t> axes, std::vector<double> theta,
                                               std::vector<double> position_scale, int64_t norm, double eps,
                                               int64_t layout) {
  Tensor q_out = torch::stable::empty_like(q), k_out = torch::stable::empty_like(k);
  Backend::forward(q, make_params(q, k, q_out, k_out, q_weight, k_weight, positions, frequencies, axes, theta,
                                  position_scale, norm, eps, layout));
  return {q_out, k_out};
}

template <typename Backend>
void qk_norm_rope_inplace_op(Tensor q, Tensor k, OptionalTensor q_weight, OptionalTensor k_weight,
                             OptionalTensor positions, OptionalTensor frequencies, std::vector<int64_t> axes,
                             std::vector<double> theta, std::vector<double> position_scale, int64_t norm, double eps,
                             int64_t layout) {
  Backend::forward(q, make_params(q, k, q, k, q_weight, k_weight, positions, frequencies, axes, theta, position_scale,
                                  norm, eps, layout));
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_bwd_op(Tensor dq, Tensor dk, Tensor q, Tensor k,
                                                               OptionalTensor q_weight, OptionalTensor k_weight,
                                                               OptionalTensor positions, OptionalTensor frequencies,
                                                               std::vector<int64_t> axes, std::vector<double> theta,
                                                               std::vector<double> position_scale, int64_t norm,
                                                               double eps, int64_t layout, bool weight_grads) {
  Tensor dq_out = torch::stable::empty_like(q), dk_out = torch::stable::empty_like(k);
  QkNormRopeParams p = make_params(q, k, dq_out, dk_out, q_weight, k_weight, positions, frequencies, axes, theta,
                                   position_scale, norm, eps, layout);
  add_cotangents(p, dq, dk);
  Tensor dweight[2] = {make_dweight(p.side[0], q, q_weight, weight_grads),
                       make_dweight(p.side[1], k, k_weight, weight_grads)};
  Backend::backward(q, p, dweight);
  return {dq_out, dk_out, dweight[0], dweight[1]};
}

}  // namespace vidkernels
