// SPDX-License-Identifier: Apache-2.0
#include "causal_conv3d/direct.h"
#include "causal_conv3d/direct_tiles.h"
#include "causal_conv3d/direct_tiles_wgrad.h"
#include "causal_conv3d/direct_wgrad.h"
#include "causal_conv3d/few_filters.h"
#include "causal_conv3d/winograd.h"
#include "causal_conv3d/winograd_wgrad.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

void causal_conv3d(const CausalConv3dParams& params) {
#if defined(__AVX512BF16__)
  if (params.dtype == DType::bfloat16 && params.weight_dtype == DType::bfloat16) {
#if defined(VK_CPU_HAS_AMX)
    if (params.algorithm == ConvAlgorithm::direct_tiles && cpu_has_tiles()) return DirectTiles(params).run();
#endif
    const bool tiles = params.algorithm == ConvAlgorithm::direct_tiles;
    if (tiles || params.algorithm == ConvAlgorithm::direct_pairs) return Direct<bfloat16, Bfloat16Pair>(params).run();
    if (params.algorithm == ConvAlgorithm::few_filters_pairs) return FewFilters<bfloat16, Bfloat16Pair>(params).run();
  }
#endif
  VK_DISPATCH_FLOATING(params.dtype, ([&] {
                         switch (params.algorithm) {
                           case ConvAlgorithm::winograd:
                             return Winograd<scalar_t, false>(params).run();
                           case ConvAlgorithm::winograd_upsampled:
                             return Winograd<scalar_t, true>(params).run();
                           case ConvAlgorithm::few_filters:
                           case ConvAlgorithm::few_filters_pairs:
                             return FewFilters<scalar_t>(params).run();
                           default:
                             return Direct<scalar_t>(params).run();
                         }
                       }));
}

void causal_conv3d_wgrad(const CausalConv3dWgradParams& params) {
#if defined(__AVX512BF16__)
  if (params.conv.dtype == DType::bfloat16) {
    const ConvAlgorithm algorithm = params.conv.algorithm;
#if defined(VK_CPU_HAS_AMX)
    if (algorithm == ConvAlgorithm::direct_tiles && cpu_has_tiles()) return DirectTilesWgrad(params).run();
#endif
    const bool tiles = algorithm == ConvAlgorithm::direct_tiles;
    if (tiles || algorithm == ConvAlgorithm::direct_pairs)
      return DirectWgrad<bfloat16, false, Bfloat16Pair>(params).run();
    if (algorithm == ConvAlgorithm::few_filters_pairs) return DirectWgrad<bfloat16, true, Bfloat16Pair>(params).run();
  }
#endif
  VK_DISPATCH_FLOATING(params.conv.dtype, ([&] {
                         switch (params.conv.algorithm) {
                           case ConvAlgorithm::winograd:
                             return WinogradWgrad<scalar_t, false>(params).run();
                           case ConvAlgorithm::winograd_upsampled:
                             return WinogradWgrad<scalar_t, true>(params).run();
                           case ConvAlgorithm::few_filters:
                           case ConvAlgorithm::few_filters_pairs:
                             return DirectWgrad<scalar_t, true>(params).run();
                           default:
                             return DirectWgrad<scalar_t, false>(params).run();
                         }
                       }));
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
