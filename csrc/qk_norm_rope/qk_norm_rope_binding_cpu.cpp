// SPDX-License-Identifier: Apache-2.0
#include "qk_norm_rope/qk_norm_rope_binding.h"

namespace vidkernels {
namespace {

struct Cpu {
  static void forward(const Tensor&, const QkNormRopeParams& p) { qk_norm_rope_fwd_cpu(p); }
  static void backward(const Tensor&, const QkNormRopeParams& p, Tensor (&)[2]) { qk_norm_rope_bwd_cpu(p); }
};

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CPU, m) {
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&vidkernels::qk_norm_rope_fwd_op<vidkernels::Cpu>));
  m.impl("qk_norm_rope_", TORCH_BOX(&vidkernels::qk_norm_rope_inplace_op<vidkernels::Cpu>));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&vidkernels::qk_norm_rope_bwd_op<vidkernels::Cpu>));
}
