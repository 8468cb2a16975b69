// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "common/vmath.h"
#include "lfq/lfq.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

template <typename T>
void backward(const LfqBwdParams& p) {
  using A = accumulate_t<T>;
  const TokenLayout& layout = p.layout;
  const int channels = static_cast<int>(layout.channels);
  const TokenStrides &sx = layout.operand[0], &sg = layout.operand[1], &sd = layout.operand[2];
  const A floor = static_cast<A>(kLfqNormFloor), scale = static_cast<A>(p.scale);
  const int64_t grain = std::max<int64_t>(1, 2048 / (layout.codebooks * layout.channels));
  parallel_for(0, layout.tokens(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t book = 0; book < layout.codebooks; ++book) {
        const int64_t outer = token / layout.inner, inner = token % layout.inner;
        const T* x = static_cast<const T*>(p.x) + layout.offset(0, outer, inner, book);
        const T* grad = static_cast<const T*>(p.grad) + layout.offset(1, outer, inner, book);
        T* dx = static_cast<T*>(p.dx) + layout.offset(2, outer, inner, book);
        A square = 0;
        for (int c = 0; c < channels; ++c) {
          const A v = to_float(x[c * sx.channel]);
          square += v * v;
        }
        const A norm = std::max(std::sqrt(square), floor);
        // Below the floor the divisor is a constant. Unit vectors first: <x, g> / |x|^2 would overflow for large x.
        A dot = 0;
        for (int c = 0; c < channels && std::sqrt(square) >= floor; ++c) {
          dot += to_float(x[c * sx.channel]) / norm * to_float(grad[c * sg.channel]);
        }
        for (int c = 0; c < channels; ++c) {
          const A unit = to_float(x[c * sx.channel]) / norm;
          dx[c * sd.channel] = from_float<T>(scale / norm * (to_float(grad[c * sg.channel]) - unit * dot));
        }
      }
    }
  });
}

}  // namespace

void lfq_bwd(const LfqBwdParams& p) {
  VK_DISPATCH_FLOATING(p.dtype, [&] { backward<scalar_t>(p); });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
