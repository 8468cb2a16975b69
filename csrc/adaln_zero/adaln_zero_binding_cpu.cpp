// SPDX-License-Identifier: Apache-2.0
#include "adaln_zero/adaln_zero_binding.h"

namespace vidkernels {
namespace {

using adaln::BackwardParams;
using adaln::ForwardParams;
using adaln::RowMap;

struct CpuBackend {
  static void forward(const Tensor&, const ForwardParams& params) { adaln_forward_cpu(params); }
  static void backward(const Tensor&, const BackwardParams& params) { adaln_backward_cpu(params); }

  // At most 256 partial sums per operand, whatever the number of threads, so that results do not depend on it, and none
  // of so few tokens that folding the row and adding the sums up takes as long as they do (10 % at 64).
  static int64_t chunk_tokens(const Tensor&, const BackwardParams& params) {
    return std::max<int64_t>(64, (params.tokens + 255) / 256);
  }

  // The kernels trust these numbers as addresses.
  static void check_rows(const RowMap& map, int64_t groups, int64_t tokens, int64_t table_rows) {
    const int32_t* indices = map.index != nullptr ? map.index : map.order;
    const int64_t limit = map.index != nullptr ? table_rows : groups;
    for (int64_t i = 0; indices != nullptr && i < groups; ++i) {
      STD_TORCH_CHECK(indices[i] >= 0 && indices[i] < limit, "rows: expected values in [0, ", limit, "), got ",
                      indices[i]);
    }
    if (map.cu_seqlens == nullptr) return;
    const int64_t last = map.cu_seqlens[map.count] * map.unit;
    STD_TORCH_CHECK(map.cu_seqlens[0] == 0 && last == tokens, "cu_seqlens: expected to begin at 0 and to end at ",
                    tokens, ", got ", last);
    for (int64_t i = 0; i < map.count; ++i) {
      STD_TORCH_CHECK(map.cu_seqlens[i] <= map.cu_seqlens[i + 1], "cu_seqlens: expected values that do not decrease");
    }
  }
};

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CPU, m) { vidkernels::adaln::register_ops<vidkernels::CpuBackend>(m); }
