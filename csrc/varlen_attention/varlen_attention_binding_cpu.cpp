// SPDX-License-Identifier: Apache-2.0
#include "common/stable.h"
#include "varlen_attention/varlen_attention.h"

namespace vidkernels {
namespace {

// The kernels trust the offsets, so they are checked here once: O(segments).
void check_offsets(const Tensor& cu_seqlens, int64_t total, const char* name) {
  STD_TORCH_CHECK(cu_seqlens.scalar_type() == torch::headeronly::ScalarType::Int && cu_seqlens.dim() == 1 &&
                      cu_seqlens.size(0) >= 1 && cu_seqlens.is_contiguous(),
                  name, ": expected a contiguous int32 vector with at least one element");
  const auto* offsets = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  const int64_t last = cu_seqlens.size(0) - 1;
  STD_TORCH_CHECK(offsets[0] == 0 && offsets[last] == total, name, ": expected offsets from 0 to ", total, ", got ",
                  offsets[0], " to ", offsets[last]);
  for (int64_t i = 0; i < last; ++i)
    STD_TORCH_CHECK(offsets[i] <= offsets[i + 1], name, ": offsets decrease after segment ", i);
}

VarlenAttentionShape shape_of(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                              bool causal, double scale) {
  check_offsets(cu_seqlens_q, q.size(0), "cu_seqlens_q");
  check_offsets(cu_seqlens_k, k.size(0), "cu_seqlens_k");
  STD_TORCH_CHECK(cu_seqlens_q.size(0) == cu_seqlens_k.size(0),
                  "cu_seqlens_k: expected as many segments as cu_seqlens_q");
  VarlenAttentionShape shape{};
  shape.dtype = dtype_of(q);
  shape.segments = cu_seqlens_q.size(0) - 1;
  shape.total_q = q.size(0);
  shape.total_k = k.size(0);
  shape.heads_q = q.size(1);
  shape.heads_k = k.size(1);
  shape.head_dim = q.size(2);
  shape.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q.data_ptr());
  shape.cu_seqlens_k = static_cast<const int32_t*>(cu_seqlens_k.data_ptr());
  shape.causal = causal;
  shape.scale = scale;
  return shape;
}

PackedView view_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 3 && (tensor.stride(2) == 1 || tensor.size(2) <= 1 || tensor.numel() == 0), name,
                  ": expected [tokens, heads, head_dim] with a contiguous last axis");
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1)};
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                   const Tensor& cu_seqlens_k, int64_t /*max_seqlen_q*/, int64_t /*max_seqlen_k*/,
                                   bool causal, double scale) {
  VarlenAttentionFwdParams params{};
  params.shape = shape_of(q, k, cu_seqlens_q, cu_seqlens_k, causal, scale);
  Tensor out = empty_on(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  using torch::headeronly::ScalarType;
  const ScalarType wide = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor stats = empty_on(q, {2, q.size(1), q.size(0)}, wide);
  params.q = view_of(q, "q");
  params.k = view_of(k, "k");
  params.v = view_of(v, "v");
  params.out = out.data_ptr();
  params.stats = stats.data_ptr();
  varlen_attention_fwd_cpu(params);
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& out, const Tensor& stats, const Tensor& cu_seqlens_q,
                                            const Tensor& cu_seqlens_k, int64_t /*max_seqlen_q*/,
                                            int64_t /*max_seqlen_k*/, bool causal, double scale, bool need_q,
                                            bool need_kv) {
  VarlenAttentionBwdParams params{};
  params.shape = shape_of(q, k, cu_seqlens_q, cu_seqlens_k, causal, scale);
  const auto like = [](const Tensor& tensor, bool needed) {
    return empty_on(tensor, {needed ? tensor.size(0) : 0, tensor.size(1), tensor.size(2)}, tensor.scalar_type());
  };
  Tensor grad_q = like(q, need_q), grad_k = like(k, need_kv), grad_v = like(v, need_kv);
  params.q = view_of(q, "q");
  params.k = view_of(k, "k");
  params.v = view_of(v, "v");
  params.out = view_of(out, "out");
  params.grad_out = view_of(grad_out, "grad_out");
  params.stats = stats.data_ptr();
  params.grad_q = need_q ? grad_q.data_ptr() : nullptr;
  params.grad_k = need_kv ? grad_k.data_ptr() : nullptr;
  params.grad_v = need_kv ? grad_v.data_ptr() : nullptr;
  varlen_attention_bwd_cpu(params);
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CPU, m) {
  m.impl("varlen_attention_fwd", TORCH_BOX(&vidkernels::forward));
  m.impl("varlen_attention_bwd", TORCH_BOX(&vidkernels::backward));
}
