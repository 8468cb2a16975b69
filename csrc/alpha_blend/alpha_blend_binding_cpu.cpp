// SPDX-License-Identifier: Apache-2.0
#include "alpha_blend/alpha_blend_binding.h"

namespace vidkernels {
namespace {

struct Cpu {
  static void forward(const Tensor&, const AlphaBlendParams& params) { alpha_blend_fwd_cpu(params); }
  static void backward(const Tensor&, const AlphaBlendBackwardParams& params) { alpha_blend_bwd_cpu(params); }
};

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CPU, m) {
  m.impl("alpha_blend_fwd", TORCH_BOX(&vidkernels::alpha_blend_fwd_op<vidkernels::Cpu>));
  m.impl("alpha_blend_bwd", TORCH_BOX(&vidkernels::alpha_blend_bwd_op<vidkernels::Cpu>));
}
