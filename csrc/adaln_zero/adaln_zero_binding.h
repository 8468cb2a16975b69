// SPDX-License-Identifier: Apache-2.0
// From tensors to parameters, for the CPU and the CUDA binding alike. A Backend supplies
//   static void forward(const Tensor&, const ForwardParams&), backward(const Tensor&, const BackwardParams&)
//   static int64_t chunk_tokens(const Tensor&, const BackwardParams&)  tokens that one partial sum covers
//   static void check_rows(const RowMap&, int64_t groups, int64_t tokens, int64_t table_rows)
#pragma once

#include <algorithm>

#include "adaln_zero/adaln_zero.h"
#include "common/stable.h"

namespace vidkernels {
namespace adaln {

using torch::headeronly::ScalarType;
using MaybeTensor = std::optional<Tensor>;

// Bits of the `needs` argument: which gradients to compute; the others come back with zero elements.
enum Needs : int64_t {
  need_x = 1,
  need_branch = 2,
  need_gate = 4,
  need_shift = 8,
  need_scale = 16,
  need_weight = 32,
  need_bias = 64,
};

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A table of rows whose leading axes collapse to one stride, copied only if they do not.
inline Table table_of(MaybeTensor& tensor) {
  if (!tensor.has_value() || tensor->numel() == 0) return {};
  const int64_t dims = tensor->dim();
  int64_t stride = tensor->size(dims - 1);
  bool collapses = tensor->stride(dims - 1) == 1 || tensor->size(dims - 1) == 1;
  bool seen = false;
  int64_t expected = 0;
  for (int64_t d = dims - 2; d >= 0; --d) {
    if (tensor->size(d) == 1) continue;
    if (!seen) stride = tensor->stride(d);
    collapses = collapses && (!seen || tensor->stride(d) == expected);
    seen = true;
    expected = tensor->stride(d) * tensor->size(d);
  }
  if (!collapses) {
    *tensor = torch::stable::contiguous(*tensor);
    stride = tensor->size(dims - 1);
  }
  return {tensor->data_ptr(), stride, dtype_of(*tensor)};
}

inline ScalarType wide_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t rows_of(const MaybeTensor& table) {
  if (!table.has_value()) return 0;
  const int64_t channels = table->size(table->dim() - 1);
  return channels == 0 ? 0 : table->numel() / channels;
}

inline int64_t tokens_of(const Tensor& x) {
  const int64_t channels = x.size(x.dim() - 1);
  return channels == 0 ? 0 : x.numel() / channels;
}

// `grouping` is the integer vector of the call: `rows` in a forward, `order` in a backward.
template <typename Backend>
RowMap row_map(const MaybeTensor& grouping, const MaybeTensor& cu_seqlens, int64_t count, int64_t tokens,
               bool backward) {
  RowMap map;
  map.count = std::max<int64_t>(count, 1);
  const int64_t groups = grouping.has_value() ? grouping->numel() : (cu_seqlens.has_value() ? tokens : map.count);
  map.unit = groups > 0 && tokens > 0 ? tokens / groups : 1;
  STD_TORCH_CHECK(tokens == 0 || (groups > 0 && map.unit * groups == tokens),
                  "rows: expected groups of equal size, got ", tokens, " tokens and ", groups, " groups");
  if (cu_seqlens.has_value()) map.cu_seqlens = static_cast<const int32_t*>(cu_seqlens->data_ptr());
  if (grouping.has_value()) (backward ? map.order : map.index) = static_cast<const int32_t*>(grouping->data_ptr());
  Backend::check_rows(map, groups, tokens, count);
  return map;
}

inline Tensor output_like(const Tensor& x) { return empty_on(x, sizes_of(x), x.scalar_type()); }

struct Modulation {
  MaybeTensor gate, shift, scale, weight, bias;
  int64_t count() const { return std::max({rows_of(gate), rows_of(shift), rows_of(scale)}); }
};

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& input, const MaybeTensor& branch, Modulation tables,
                                                   const MaybeTensor& rows, const MaybeTensor& cu_seqlens,
                                                   bool modulate, int64_t norm, double eps, bool save) {
  const Tensor x = dense(input);
  ForwardParams p;
  p.tokens = tokens_of(x);
  p.channels = x.size(x.dim() - 1);
  p.norm = static_cast<Norm>(norm);
  p.eps = eps;
  p.dtype = dtype_of(x);
  p.rows = row_map<Backend>(rows, cu_seqlens, tables.count(), p.tokens, false);
  const int64_t saved = modulate && save ? p.tokens : 0;
  const MaybeTensor other = branch.has_value() ? MaybeTensor(dense(*branch)) : std::nullopt;
  Tensor hidden, y, mean, rstd;  // undefined where the op does not return it: an empty tensor takes 0.5 us
  if (other.has_value()) hidden = output_like(x);
  if (modulate) {
    y = output_like(x);
    mean = empty_on(x, {p.norm == Norm::layer ? saved : 0}, wide_dtype(x));
    rstd = empty_on(x, {p.norm == Norm::none ? 0 : saved}, wide_dtype(x));
  }
  if (x.numel() == 0) return {hidden, y, mean, rstd};
  p.x = x.data_ptr();
  p.branch = data_or_null(other);
  p.hidden = other.has_value() ? hidden.data_ptr() : nullptr;
  p.y = modulate ? y.data_ptr() : nullptr;
  p.mean = modulate && mean.numel() > 0 ? mean.data_ptr() : nullptr;
  p.rstd = modulate && rstd.numel() > 0 ? rstd.data_ptr() : nullptr;
  p.gate = table_of(tables.gate);
  p.shift = table_of(tables.shift);
  p.scale = table_of(tables.scale);
  p.weight = table_of(tables.weight);
  p.bias = table_of(tables.bias);
  Backend::forward(x, p);
  return {hidden, y, mean, rstd};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> adaln_modulate_fwd(const Tensor& x, MaybeTensor shift, MaybeTensor scale,
                                                      MaybeTensor weight, MaybeTensor bias, MaybeTensor rows,
                                                      MaybeTensor cu_seqlens, int64_t norm, double eps, bool save) {
  auto [hidden, y, mean, rstd] = forward<Backend>(x, std::nullopt, {std::nullopt, shift, scale, weight, bias}, rows,
                                                  cu_seqlens, true, norm, eps, save);
  return {y, mean, rstd};
}

template <typename Backend>
Tensor gate_residual_fwd(const Tensor& residual, const Tensor& branch, MaybeTensor gate, MaybeTensor rows,
                         MaybeTensor cu_seqlens) {
  return std::get<0>(
      forward<Backend>(residual, branch, {gate, {}, {}, {}, {}}, rows, cu_seqlens, false, 0, 0.0, false));
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> adaln_zero_fwd(const Tensor& residual, const Tensor& branch,
                                                          MaybeTensor gate, MaybeTensor shift, MaybeTensor scale,
                                                          MaybeTensor weight, MaybeTensor bias, MaybeTensor rows,
                                                          MaybeTensor cu_seqlens, int64_t norm, double eps, bool save) {
  return forward<Backend>(residual, branch, {gate, shift, scale, weight, bias}, rows, cu_seqlens, true, norm, eps,
                          save);
}

struct BackwardInputs {
  MaybeTensor dhidden, dy, hidden, branch, mean, rstd;
};

struct BackwardOutputs {
  Tensor dx, dbranch, dgate, dshift, dscale, dweight, dbias;
};

// Scratch for the partial sums of rows that span several chunks, and for dweight and dbias.
struct Scratch {
  std::vector<Tensor> kept;

  void* make(const Tensor& like, int64_t rows, int64_t channels) {
    kept.push_back(empty_on(like, {rows, channels}, wide_dtype(like)));
    return kept.back().data_ptr();
  }
};

template <typename Backend>
void allocate_scratch(BackwardParams& p, const Tensor& like, Scratch& scratch) {
  const bool gate = p.dgate.data != nullptr;
  const bool affine = p.dweight.data != nullptr || p.dbias.data != nullptr;
  const bool modulation = p.dshift.data != nullptr || p.dscale.data != nullptr || affine;
  p.chunk = std::max<int64_t>(Backend::chunk_tokens(like, p), 1);
  p.direct = p.rows.cu_seqlens == nullptr && p.rows.index == nullptr && p.rows.unit <= p.chunk;
  if (p.direct) p.chunk -= p.chunk % p.rows.unit;
  const int64_t chunks = (p.tokens + p.chunk - 1) / p.chunk;
  const int64_t slots = chunks + p.rows.count;
  if (!p.direct && modulation) p.partial[sum_p] = scratch.make(like, slots, p.channels);
  if (!p.direct && modulation) p.partial[sum_q] = scratch.make(like, slots, p.channels);
  if (!p.direct && gate) p.partial[sum_g] = scratch.make(like, slots, p.channels);
  for (int k = 0; affine && k < 2; ++k) p.affine[k] = scratch.make(like, chunks, p.channels);
}

inline TableGrad grad_of(const Tensor& tensor) {
  if (!tensor.defined()) return {};
  return {tensor.numel() > 0 ? tensor.data_ptr() : nullptr, dtype_of(tensor)};
}

// The gradients that an op returns, bits of Needs.
constexpr int64_t of_modulate = need_x | need_shift | need_scale | need_weight | need_bias;
constexpr int64_t of_gate = need_branch | need_gate;

// The tensor of every gradient that the op returns, with zero elements where `needs` does not ask for it; undefined
// where the op does not return it.
template <typename Backend>
BackwardOutputs allocate_outputs(const Tensor& like, const Modulation& tables, int64_t count, int64_t channels,
                                 int64_t needs, int64_t returned) {
  const MaybeTensor& typed = tables.scale.has_value() ? tables.scale : tables.gate;
  const ScalarType row_type = typed.has_value() ? typed->scalar_type() : wide_dtype(like);
  const auto full = [&](int64_t bit) {
    if (!(returned & bit)) return Tensor();
    return needs & bit ? output_like(like) : empty_on(like, {0}, like.scalar_type());
  };
  const auto table = [&](int64_t bit) {
    if (!(returned & bit)) return Tensor();
    return needs & bit ? empty_on(like, {count, channels}, row_type) : empty_on(like, {0}, row_type);
  };
  const auto vector = [&](int64_t bit, const MaybeTensor& of) {
    if (!(returned & bit)) return Tensor();
    return needs & bit ? empty_on(like, {channels}, of->scalar_type()) : empty_on(like, {0}, wide_dtype(like));
  };
  return {full(need_x),
          full(need_branch),
          table(need_gate),
          table(need_shift),
          table(need_scale),
          vector(need_weight, tables.weight),
          vector(need_bias, tables.bias)};
}

template <typename Backend>
BackwardOutputs backward(BackwardInputs inputs, Modulation tables, const MaybeTensor& order,
                         const MaybeTensor& cu_seqlens, int64_t count, int64_t norm, int64_t needs, int64_t returned) {
  for (MaybeTensor* tensor : {&inputs.dhidden, &inputs.dy, &inputs.hidden, &inputs.branch}) {
    if (tensor->has_value()) *tensor = dense(**tensor);
  }
  const Tensor& like = inputs.dy.has_value() ? *inputs.dy : *inputs.dhidden;
  BackwardParams p;
  p.tokens = tokens_of(like);
  p.channels = like.size(like.dim() - 1);
  p.norm = static_cast<Norm>(norm);
  p.dtype = dtype_of(like);
  p.rows = row_map<Backend>(order, cu_seqlens, count, p.tokens, true);
  BackwardOutputs out = allocate_outputs<Backend>(like, tables, count, p.channels, needs, returned);
  if (p.channels == 0) return out;
  p.dhidden = data_or_null(inputs.dhidden);
  p.dy = data_or_null(inputs.dy);
  p.hidden = data_or_null(inputs.hidden);
  p.branch = data_or_null(inputs.branch);
  p.mean = data_or_null(inputs.mean);
  p.rstd = data_or_null(inputs.rstd);
  p.gate = table_of(tables.gate);
  p.scale = table_of(tables.scale);
  p.weight = table_of(tables.weight);
  p.bias = table_of(tables.bias);
  p.dx = grad_of(out.dx).data;
  p.dbranch = grad_of(out.dbranch).data;
  p.dgate = grad_of(out.dgate);
  p.dshift = grad_of(out.dshift);
  p.dscale = grad_of(out.dscale);
  p.dweight = grad_of(out.dweight);
  p.dbias = grad_of(out.dbias);
  Scratch scratch;
  allocate_scratch<Backend>(p, like, scratch);
  Backend::backward(like, p);
  return out;
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adaln_modulate_bwd(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, MaybeTensor scale, MaybeTensor weight,
    MaybeTensor bias, MaybeTensor order, MaybeTensor cu_seqlens, int64_t count, int64_t norm, int64_t needs) {
  BackwardOutputs out = backward<Backend>({std::nullopt, dy, x, std::nullopt, mean, rstd},
                                          {std::nullopt, std::nullopt, scale, weight, bias}, order, cu_seqlens, count,
                                          norm, needs, of_modulate);
  return {out.dx, out.dshift, out.dscale, out.dweight, out.dbias};
}

template <typename Backend>
std::tuple<Tensor, Tensor> gate_residual_bwd(const Tensor& dout, MaybeTensor branch, MaybeTensor gate,
                                             MaybeTensor order, MaybeTensor cu_seqlens, int64_t count, int64_t needs) {
  BackwardOutputs out = backward<Backend>({dout, {}, {}, branch, {}, {}}, {gate, {}, {}, {}, {}}, order, cu_seqlens,
                                          count, 0, needs, of_gate);
  return {out.dbranch, out.dgate};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adaln_zero_bwd(
    MaybeTensor dhidden, const Tensor& dy, const Tensor& hidden, MaybeTensor branch, const Tensor& mean,
    const Tensor& rstd, MaybeTensor gate, MaybeTensor scale, MaybeTensor weight, MaybeTensor bias, MaybeTensor order,
    MaybeTensor cu_seqlens, int64_t count, int64_t norm, int64_t needs) {
  BackwardOutputs out =
      backward<Backend>({dhidden, dy, hidden, branch, mean, rstd}, {gate, std::nullopt, scale, weight, bias}, order,
                        cu_seqlens, count, norm, needs, of_modulate | of_gate);
  return {out.dx, out.dbranch, out.dgate, out.dshift, out.dscale, out.dweight, out.dbias};
}

template <typename Backend, typename Library>
void register_ops(Library& m) {
  m.impl("adaln_modulate_fwd", TORCH_BOX(&adaln_modulate_fwd<Backend>));
  m.impl("adaln_modulate_bwd", TORCH_BOX(&adaln_modulate_bwd<Backend>));
  m.impl("gate_residual_fwd", TORCH_BOX(&gate_residual_fwd<Backend>));
  m.impl("gate_residual_bwd", TORCH_BOX(&gate_residual_bwd<Backend>));
  m.impl("adaln_zero_fwd", TORCH_BOX(&adaln_zero_fwd<Backend>));
  m.impl("adaln_zero_bwd", TORCH_BOX(&adaln_zero_bwd<Backend>));
}

}  // namespace adaln
}  // namespace vidkernels
