// SPDX-License-Identifier: Apache-2.0
#include "alpha_blend/alpha_blend_binding.h"
#include "common/stable_cuda.h"

namespace vidkernels {

void alpha_blend_fwd_cuda(const AlphaBlendParams& p, cudaStream_t stream);
void alpha_blend_bwd_cuda(const AlphaBlendBackwardParams& p, cudaStream_t stream);
// Most blocks of the backward's grid: sums it needs room for.
int64_t alpha_blend_bwd_blocks(const AlphaBlendBackwardParams& p);

namespace {

struct Cuda {
  static void forward(const Tensor& like, const AlphaBlendParams& params) {
    const DeviceGuard guard(like);
    alpha_blend_fwd_cuda(params, current_stream(like));
  }
  static void backward(const Tensor& like, AlphaBlendBackwardParams params) {
    const DeviceGuard guard(like);
    const int64_t blocks = params.dmix == nullptr ? 0 : alpha_blend_bwd_blocks(params);
    const Tensor partial = empty_on(like, {blocks}, torch::headeronly::ScalarType::Double);
    params.partial = static_cast<double*>(partial.data_ptr());
    alpha_blend_bwd_cuda(params, current_stream(like));
  }
};

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CUDA, m) {
  m.impl("alpha_blend_fwd", TORCH_BOX(&vidkernels::alpha_blend_fwd_op<vidkernels::Cuda>));
  m.impl("alpha_blend_bwd", TORCH_BOX(&vidkernels::alpha_blend_bwd_op<vidkernels::Cuda>));
}
