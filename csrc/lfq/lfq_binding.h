// SPDX-License-Identifier: Apache-2.0
// From tensors to parameters, for the CPU and the CUDA binding alike. A Backend supplies
//   static void forward(const Tensor&, const LfqFwdParams&), backward(const Tensor&, const LfqBwdParams&),
//   decode(const Tensor&, const LfqDecodeParams&)
#pragma once

#include <cmath>

#include "common/token_tensors.h"
#include "lfq/lfq.h"

namespace vidkernels {

using torch::headeronly::ScalarType;

// Absolute value of every channel of a code: scale, or scale / sqrt(bits), rounded step by step in the type that the
// kernels compute in.
template <typename A>
inline A lfq_code_magnitude(int64_t bits, double scale, bool spherical) {
  const A unit = A(1) / std::sqrt(static_cast<A>(bits));
  return spherical ? unit * static_cast<A>(scale) : static_cast<A>(scale);
}
inline double lfq_magnitude(int64_t bits, double scale, bool spherical, DType dtype) {
  return dtype == DType::float64 ? lfq_code_magnitude<double>(bits, scale, spherical)
                                 : lfq_code_magnitude<float>(bits, scale, spherical);
}

template <typename Backend>
std::tuple<Tensor, Tensor> lfq_fwd_op(Tensor x, double scale, bool lsb_first, bool spherical, bool additive,
                                      int64_t dim, int64_t num_codebooks, bool return_values, bool return_indices) {
  LfqFwdParams p;
  const int64_t bits = x.size(dim) / num_codebooks;
  STD_TORCH_CHECK(bits * num_codebooks == x.size(dim) && bits <= kLfqMaxBits, "x: expected ", num_codebooks,
                  " codebooks of at most ", kLfqMaxBits, " channels at axis ", dim, ", got ", x.size(dim));
  const std::vector<int64_t> none{0};
  Tensor values = return_values ? torch::stable::empty_like(x) : empty_on(x, none, x.scalar_type());
  Tensor indices = empty_on(x, return_indices ? index_sizes(sizes_of(x), dim, num_codebooks) : none, ScalarType::Long);
  if (x.numel() == 0) return {values, indices};

  Tensor source = x, target = values;
  std::vector<const Tensor*> operands{&source};
  if (return_values) operands.push_back(&target);
  if (!token_layout(operands, dim, num_codebooks, &p.layout)) {
    source = torch::stable::contiguous(x);
    if (return_values) target = torch::stable::empty_like(source);
    token_layout(operands, dim, num_codebooks, &p.layout);
  }
  p.x = source.data_ptr();
  p.values = return_values ? target.data_ptr() : nullptr;
  p.indices = return_indices ? static_cast<int64_t*>(indices.data_ptr()) : nullptr;
  p.dtype = dtype_of(x);
  p.magnitude = lfq_magnitude(bits, scale, spherical, p.dtype);
  p.scale = scale;
  p.lsb_first = lsb_first;
  p.spherical = spherical;
  p.additive = additive;
  Backend::forward(x, p);
  if (return_values && target.data_ptr() != values.data_ptr()) torch::stable::copy_(values, target);
  return {values, indices};
}

template <typename Backend>
Tensor lfq_bwd_op(Tensor grad, Tensor x, double scale, int64_t dim, int64_t num_codebooks) {
  Tensor dx = torch::stable::empty_like(x);
  if (x.numel() == 0) return dx;
  LfqBwdParams p;
  Tensor source = x, gradient = grad, target = dx;
  std::vector<const Tensor*> operands{&source, &gradient, &target};
  if (!token_layout(operands, dim, num_codebooks, &p.layout)) {
    source = torch::stable::contiguous(x);
    gradient = torch::stable::contiguous(grad);
    target = torch::stable::empty_like(source);
    token_layout(operands, dim, num_codebooks, &p.layout);
  }
  p.x = source.data_ptr();
  p.grad = gradient.data_ptr();
  p.dx = target.data_ptr();
  p.scale = scale;
  p.dtype = dtype_of(x);
  Backend::backward(x, p);
  if (target.data_ptr() != dx.data_ptr()) torch::stable::copy_(dx, target);
  return dx;
}

template <typename Backend>
Tensor lfq_decode_op(Tensor indices, int64_t bits, double scale, bool lsb_first, bool spherical, int64_t dim,
                     int64_t num_codebooks, ScalarType dtype) {
  STD_TORCH_CHECK(bits >= 1 && bits <= kLfqMaxBits, "bits: expected 1 to ", kLfqMaxBits, ", got ", bits);
  LfqDecodeParams p;
  Tensor codes = empty_on(indices, code_sizes(indices, dim, num_codebooks, bits), dtype);
  if (codes.numel() == 0) return codes;
  const Tensor dense = torch::stable::contiguous(indices);
  token_layout({&codes, &codes}, dim, num_codebooks, &p.layout);
  p.indices = dense.data_ptr();
  p.codes = codes.data_ptr();
  p.dtype = static_cast<DType>(dtype);
  p.magnitude = lfq_magnitude(bits, scale, spherical, p.dtype);
  p.index_dtype = dtype_of(indices);
  p.lsb_first = lsb_first;
  Backend::decode(indices, p);
  return codes;
}

}  // namespace vidkernels
