// SPDX-License-Identifier: Apache-2.0
#include "common/stable_cuda.h"
#include "lfq/lfq_binding.h"

namespace vidkernels {

void lfq_fwd_cuda(const LfqFwdParams& p, cudaStream_t stream);
void lfq_bwd_cuda(const LfqBwdParams& p, cudaStream_t stream);
void lfq_decode_cuda(const LfqDecodeParams& p, cudaStream_t stream);

namespace {

struct Cuda {
  static void forward(const Tensor& like, const LfqFwdParams& p) {
    const DeviceGuard guard(like);
    lfq_fwd_cuda(p, current_stream(like));
  }
  static void backward(const Tensor& like, const LfqBwdParams& p) {
    const DeviceGuard guard(like);
    lfq_bwd_cuda(p, current_stream(like));
  }
  static void decode(const Tensor& like, const LfqDecodeParams& p) {
    const DeviceGuard guard(like);
    lfq_decode_cuda(p, current_stream(like));
  }
};

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CUDA, m) {
  m.impl("lfq_fwd", TORCH_BOX(&vidkernels::lfq_fwd_op<vidkernels::Cuda>));
  m.impl("lfq_bwd", TORCH_BOX(&vidkernels::lfq_bwd_op<vidkernels::Cuda>));
  m.impl("lfq_decode", TORCH_BOX(&vidkernels::lfq_decode_op<vidkernels::Cuda>));
}
