// SPDX-License-Identifier: Apache-2.0
#include "causal_conv3d/direct.h"
#include "causal_conv3d/direct_wgrad.h"
#include "causal_conv3d/few_filters.h"
#include "causal_conv3d/winograd.h"
#include "causal_conv3d/winograd_wgrad.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

void causal_conv3d(const CausalConv3dParams& params) {
  VK_DISPATCH_FLOATING(params.dtype, ([&] {
                         switch (params.algorithm) {
                           case ConvAlgorithm::winograd:
                             return Winograd<scalar_t, false>(params).run();
                           case ConvAlgorithm::winograd_upsampled:
                             return Winograd<scalar_t, true>(params).run();
                           case ConvAlgorithm::few_filters:
                             return FewFilters<scalar_t>(params).run();
                           default:
                             return Direct<scalar_t>(params).run();
                         }
                       }));
}

void causal_conv3d_wgrad(const CausalConv3dWgradParams& params) {
  VK_DISPATCH_FLOATING(params.conv.dtype, ([&] {
                         switch (params.conv.algorithm) {
                           case ConvAlgorithm::winograd:
                             return WinogradWgrad<scalar_t, false>(params).run();
                           case ConvAlgorithm::winograd_upsampled:
                             return WinogradWgrad<scalar_t, true>(params).run();
                           case ConvAlgorithm::few_filters:
                             return DirectWgrad<scalar_t, true>(params).run();
                           default:
                             return DirectWgrad<scalar_t, false>(params).run();
                         }
                       }));
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
