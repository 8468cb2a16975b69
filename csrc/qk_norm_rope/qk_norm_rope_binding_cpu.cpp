// SPDX-License-Identifier: Apache-2.0
#include "qk_norm_rope/qk_norm_rope_params.h"

namespace vidkernels {
namespace {

std::tuple<Tensor, Tensor> fwd(Tensor q, Tensor k, OptionalTensor q_weight, OptionalTensor k_weight,
                               OptionalTensor positions, OptionalTensor frequencies, std::vector<int64_t> axes,
                               std::vector<double> theta, std::vector<double> position_scale, int64_t norm, double eps,
                               int64_t layout) {
  Tensor q_out = torch::stable::empty_like(q), k_out = torch::stable::empty_like(k);
  qk_norm_rope_fwd_cpu(make_params(q, k, q_out, k_out, q_weight, k_weight, positions, frequencies, axes, theta,
                                   position_scale, norm, eps, layout));
  return {q_out, k_out};
}

void fwd_inplace(Tensor q, Tensor k, OptionalTensor q_weight, OptionalTensor k_weight, OptionalTensor positions,
                 OptionalTensor frequencies, std::vector<int64_t> axes, std::vector<double> theta,
                 std::vector<double> position_scale, int64_t norm, double eps, int64_t layout) {
  qk_norm_rope_fwd_cpu(make_params(q, k, q, k, q_weight, k_weight, positions, frequencies, axes, theta, position_scale,
                                   norm, eps, layout));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(Tensor dq, Tensor dk, Tensor q, Tensor k, OptionalTensor q_weight,
                                               OptionalTensor k_weight, OptionalTensor positions,
                                               OptionalTensor frequencies, std::vector<int64_t> axes,
                                               std::vector<double> theta, std::vector<double> position_scale,
                                               int64_t norm, double eps, int64_t layout, bool weight_grads) {
  Tensor dq_out = torch::stable::empty_like(q), dk_out = torch::stable::empty_like(k);
  QkNormRopeParams p = make_params(q, k, dq_out, dk_out, q_weight, k_weight, positions, frequencies, axes, theta,
                                   position_scale, norm, eps, layout);
  add_cotangents(p, dq, dk);
  Tensor dq_weight = make_dweight(p.side[0], q, q_weight, weight_grads);
  Tensor dk_weight = make_dweight(p.side[1], k, k_weight, weight_grads);
  qk_norm_rope_bwd_cpu(p);
  return {dq_out, dk_out, dq_weight, dk_weight};
}

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CPU, m) {
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&vidkernels::fwd));
  m.impl("qk_norm_rope_", TORCH_BOX(&vidkernels::fwd_inplace));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&vidkernels::bwd));
}
