// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/cpu.h"

namespace vidkernels {

// A packed tensor [tokens, heads, head_dim]; strides in elements, the last axis is contiguous.
struct PackedView {
  const void* data;
  int64_t token_stride;
  int64_t head_stride;
};

struct VarlenAttentionShape {
  DType dtype;
  int64_t segments;
  int64_t total_q;
  int64_t total_k;
  int64_t heads_q;
  int64_t heads_k;
  int64_t head_dim;
  const int32_t* cu_seqlens_q;  // [segments + 1]
  const int32_t* cu_seqlens_k;  // [segments + 1]
  bool causal;                  // aligned at the end: query i sees keys j <= i + Lk - Lq
  double scale;
};

struct VarlenAttentionFwdParams {
  VarlenAttentionShape shape;
  PackedView q;
  PackedView k;
  PackedView v;
  void* out;  // [total_q, heads_q, head_dim], contiguous
  // [2, heads_q, total_q], float32 (float64 for float64): the maximum of sign(scale) q.k and the sum of exp(|scale|
  // (q.k - maximum)); -inf and 0 where no key is seen. Both and not their log-sum-exp: near 8 that is off by 2^-22 in
  // float32, and the backward would pass this on to every weight of the row.
  void* stats;
};

struct VarlenAttentionBwdParams {
  VarlenAttentionShape shape;
  PackedView q;
  PackedView k;
  PackedView v;
  PackedView out;
  PackedView grad_out;
  const void* stats;
  void* grad_q;  // [total_q, heads_q, head_dim], contiguous, or null
  void* grad_k;  // [total_k, heads_k, head_dim], contiguous, or null together with grad_v
  void* grad_v;
};

VK_DECLARE_CPU(varlen_attention_fwd, VarlenAttentionFwdParams)
VK_DECLARE_CPU(varlen_attention_bwd, VarlenAttentionBwdParams)

}  // namespace vidkernels
