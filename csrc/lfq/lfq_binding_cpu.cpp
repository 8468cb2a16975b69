// SPDX-License-Identifier: Apache-2.0
#include "lfq/lfq_binding.h"

namespace vidkernels {
namespace {

struct Cpu {
  static void forward(const Tensor&, const LfqFwdParams& p) { lfq_fwd_cpu(p); }
  static void backward(const Tensor&, const LfqBwdParams& p) { lfq_bwd_cpu(p); }
  static void decode(const Tensor&, const LfqDecodeParams& p) { lfq_decode_cpu(p); }
};

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CPU, m) {
  m.impl("lfq_fwd", TORCH_BOX(&vidkernels::lfq_fwd_op<vidkernels::Cpu>));
  m.impl("lfq_bwd", TORCH_BOX(&vidkernels::lfq_bwd_op<vidkernels::Cpu>));
  m.impl("lfq_decode", TORCH_BOX(&vidkernels::lfq_decode_op<vidkernels::Cpu>));
}
