// SPDX-License-Identifier: Apache-2.0
#include "common/stable.h"
#include "gated_activation/gated_activation.h"

namespace vidkernels {
namespace {

// Rows of x and of the output; x is contiguous, or two-dimensional with contiguous rows.
GatedActivationParams parameters(const Tensor& x, int64_t activation, bool gate_first) {
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(last >= 0 && x.size(last) % 2 == 0, "gated_activation: x must be [..., 2 D]");
  const bool plain = x.is_contiguous();
  STD_TORCH_CHECK(plain || (last == 1 && x.stride(1) == 1),
                  "gated_activation: x must be contiguous, or two-dimensional with contiguous rows");
  GatedActivationParams params;
  params.x = x.data_ptr();
  params.width = x.size(last) / 2;
  params.rows = x.numel() == 0 ? 0 : x.numel() / x.size(last);
  params.x_row = plain ? x.size(last) : x.stride(0);
  params.activation = static_cast<Activation>(activation);
  params.gate_first = gate_first;
  params.dtype = dtype_of(x);
  return params;
}

Tensor gated_activation_fwd_op(const Tensor& x, int64_t activation, bool gate_first) {
  GatedActivationParams params = parameters(x, activation, gate_first);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = params.width;
  Tensor y = empty_on(x, sizes, x.scalar_type());
  params.out = y.mutable_data_ptr();
  if (params.rows > 0) gated_activation_fwd_cpu(params);
  return y;
}

Tensor gated_activation_bwd_op(const Tensor& dy, const Tensor& x, int64_t activation, bool gate_first) {
  GatedActivationParams params = parameters(x, activation, gate_first);
  STD_TORCH_CHECK(dy.numel() * 2 == x.numel() && dy.scalar_type() == x.scalar_type(),
                  "gated_activation: dy must be [..., D] in the dtype of x");
  const Tensor dense = torch::stable::contiguous(dy);
  Tensor dx = empty_on(x, sizes_of(x), x.scalar_type());
  params.dy = dense.data_ptr();
  params.out = dx.mutable_data_ptr();
  if (params.rows > 0) gated_activation_bwd_cpu(params);
  return dx;
}

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CPU, m) {
  m.impl("gated_activation_fwd", TORCH_BOX(&vidkernels::gated_activation_fwd_op));
  m.impl("gated_activation_bwd", TORCH_BOX(&vidkernels::gated_activation_bwd_op));
}
