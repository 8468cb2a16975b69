// SPDX-License-Identifier: Apache-2.0
#include "fsq/fsq_binding.h"

namespace vidkernels {
namespace {

struct Cpu {
  static void forward(const Tensor&, const FsqFwdParams& p) { fsq_fwd_cpu(p); }
  static void backward(const Tensor&, const FsqBwdParams& p) { fsq_bwd_cpu(p); }
  static void decode(const Tensor&, const FsqDecodeParams& p) { fsq_decode_cpu(p); }
};

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CPU, m) {
  m.impl("fsq_fwd", TORCH_BOX(&vidkernels::fsq_fwd_op<vidkernels::Cpu>));
  m.impl("fsq_bwd", TORCH_BOX(&vidkernels::fsq_bwd_op<vidkernels::Cpu>));
  m.impl("fsq_decode", TORCH_BOX(&vidkernels::fsq_decode_op<vidkernels::Cpu>));
}
