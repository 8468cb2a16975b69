// SPDX-License-Identifier: Apache-2.0
#include "channel_norm/channel_norm_binding.h"

namespace vidkernels {
namespace {

struct Cpu {
  static void forward(const Tensor&, const ChannelNormParams& params) { channel_norm_fwd_cpu(params); }
  static void backward(const Tensor&, const ChannelNormBackwardParams& params) { channel_norm_bwd_cpu(params); }
};

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CPU, m) {
  m.impl("channel_norm_fwd", TORCH_BOX(&vidkernels::channel_norm_fwd_op<vidkernels::Cpu>));
  m.impl("channel_norm_bwd", TORCH_BOX(&vidkernels::channel_norm_bwd_op<vidkernels::Cpu>));
}
