// SPDX-License-Identifier: Apache-2.0
#include "common/stable_cuda.h"
#include "fsq/fsq_binding.h"

namespace vidkernels {

void fsq_fwd_cuda(const FsqFwdParams& p, cudaStream_t stream);
void fsq_bwd_cuda(const FsqBwdParams& p, cudaStream_t stream);
void fsq_decode_cuda(const FsqDecodeParams& p, cudaStream_t stream);

namespace {

struct Cuda {
  static void forward(const Tensor& like, const FsqFwdParams& p) {
    const DeviceGuard guard(like);
    fsq_fwd_cuda(p, current_stream(like));
  }
  static void backward(const Tensor& like, const FsqBwdParams& p) {
    const DeviceGuard guard(like);
    fsq_bwd_cuda(p, current_stream(like));
  }
  static void decode(const Tensor& like, const FsqDecodeParams& p) {
    const DeviceGuard guard(like);
    fsq_decode_cuda(p, current_stream(like));
  }
};

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CUDA, m) {
  m.impl("fsq_fwd", TORCH_BOX(&vidkernels::fsq_fwd_op<vidkernels::Cuda>));
  m.impl("fsq_bwd", TORCH_BOX(&vidkernels::fsq_bwd_op<vidkernels::Cuda>));
  m.impl("fsq_decode", TORCH_BOX(&vidkernels::fsq_decode_op<vidkernels::Cuda>));
}
