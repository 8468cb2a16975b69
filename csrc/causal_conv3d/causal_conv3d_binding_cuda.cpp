// SPDX-License-Identifier: Apache-2.0
#if defined(VK_SM90A)
#include "causal_conv3d/causal_conv3d_binding.h"
#include "causal_conv3d/causal_conv3d_cuda.h"
#include "common/stable_cuda.h"

namespace vidkernels {

void causal_conv3d_box_cuda(const CausalConv3dBoxParams& params, cudaStream_t stream);

namespace {

// y = residual + act(conv(x, weight) + bias); see _conv/cuda.py, which has checked what the kernel asks for.
void causal_conv3d_box_out(Tensor y, Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> history,
                           std::optional<Tensor> residual, Ints before, int64_t time_mode, int64_t space_mode,
                           int64_t activation, Ints tile) {
  STD_TORCH_CHECK(tile.size() == 4, "causal_conv3d_box_out: tile: expected filters, rows, columns and group");
  CausalConv3dBoxParams p{};
  const Ints ones(3, 1);
  describe_tensors(p.conv, y, x, weight);
  describe_epilogue(p.conv, bias, residual, activation);
  describe_padding(p.conv, history, ones, ones, before, time_mode, space_mode);
  p.tile_filters = tile[0];
  p.block_rows = tile[1];
  p.block_columns = tile[2];
  p.group = tile[3];
  const int64_t blocks = tile_blocks(p.tile_filters);
  STD_TORCH_CHECK(blocks > 0 && p.block_rows > 0 && p.group > 0 && p.block_rows * p.block_columns == blocks &&
                      p.conv.filters % p.tile_filters == 0,
                  "causal_conv3d_box_out: tile: no kernel for ", p.block_rows, " x ", p.block_columns, " blocks of ",
                  p.tile_filters, " of ", p.conv.filters, " filters");
  const int64_t bytes = packed_bytes(p.conv);
  const Tensor packed = empty_on(x, {bytes}, torch::headeronly::ScalarType::Byte);
  p.packed = packed.data_ptr();
  const DeviceGuard guard(x);
  causal_conv3d_box_cuda(p, current_stream(x));
}

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CUDA, m) {
  m.impl("causal_conv3d_box_out", TORCH_BOX(&vidkernels::causal_conv3d_box_out));
}
#endif
