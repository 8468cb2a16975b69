// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "common/vmath.h"
#include "lfq/lfq.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

template <typename T, typename I>
void decode(const LfqDecodeParams& p) {
  using A = accumulate_t<T>;
  const TokenLayout& layout = p.layout;
  const int channels = static_cast<int>(layout.channels);
  const T code[2] = {from_float<T>(static_cast<A>(-p.magnitude)), from_float<T>(static_cast<A>(p.magnitude))};
  const int64_t grain = std::max<int64_t>(1, 8192 / (layout.codebooks * layout.channels));
  parallel_for(0, layout.tokens(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t book = 0; book < layout.codebooks; ++book) {
        const I signed_index = static_cast<const I*>(p.indices)[token * layout.codebooks + book];
        const uint64_t index = static_cast<uint64_t>(static_cast<int64_t>(signed_index));
        T* codes = static_cast<T*>(p.codes) + layout.offset(1, token / layout.inner, token % layout.inner, book);
        for (int c = 0; c < channels; ++c) {
          codes[c * layout.operand[1].channel] = code[index >> lfq_bit(c, channels, p.lsb_first) & 1];
        }
      }
    }
  });
}

}  // namespace

void lfq_decode(const LfqDecodeParams& p) {
  if (p.index_dtype == DType::int64) {
    VK_DISPATCH_FLOATING(p.dtype, [&] { (decode<scalar_t, int64_t>(p)); });
  } else {
    VK_DISPATCH_FLOATING(p.dtype, [&] { (decode<scalar_t, int32_t>(p)); });
  }
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
