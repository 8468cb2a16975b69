// SPDX-License-Identifier: Apache-2.0
#include "common/stable_cuda.h"
#include "qk_norm_rope/qk_norm_rope_binding.h"

namespace vidkernels {

void qk_norm_rope_fwd_cuda(const QkNormRopeParams& p, cudaStream_t stream);
void qk_norm_rope_bwd_cuda(const QkNormRopeParams& p, cudaStream_t stream);
// Blocks of the backward's grid: rows of partial sums it needs for the weights' gradients.
int64_t qk_norm_rope_bwd_blocks(const QkNormRopeParams& p);

namespace {

struct Cuda {
  static void forward(const Tensor& like, const QkNormRopeParams& p) {
    const DeviceGuard guard(like);
    qk_norm_rope_fwd_cuda(p, current_stream(like));
  }
  static void backward(const Tensor& like, QkNormRopeParams p, Tensor (&dweight)[2]) {
    const DeviceGuard guard(like);
    const bool wanted = p.side[0].dweight != nullptr || p.side[1].dweight != nullptr;
    p.partials = wanted ? qk_norm_rope_bwd_blocks(p) : 0;
    if (wanted && p.partials == 0) {
      for (Tensor& gradient : dweight) torch::stable::zero_(gradient);
      return;
    }
    const Tensor partial =
        empty_on(like, {p.partials, qk_norm_rope_weight_columns(p)}, torch::headeronly::ScalarType::Float);
    if (wanted) p.partial = static_cast<float*>(partial.data_ptr());
    qk_norm_rope_bwd_cuda(p, current_stream(like));
  }
};

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CUDA, m) {
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&vidkernels::qk_norm_rope_fwd_op<vidkernels::Cuda>));
  m.impl("qk_norm_rope_", TORCH_BOX(&vidkernels::qk_norm_rope_inplace_op<vidkernels::Cuda>));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&vidkernels::qk_norm_rope_bwd_op<vidkernels::Cuda>));
}
