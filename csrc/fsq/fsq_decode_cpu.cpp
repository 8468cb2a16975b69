// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>
#include <vector>

#include "common/vmath.h"
#include "fsq/fsq.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

// All values of all channels, in the type they are stored in: decoding is then one division and one load an element.
template <typename T>
std::vector<T> level_values(const FsqDecodeParams& p, std::vector<int64_t>* first) {
  using A = accumulate_t<T>;
  std::vector<T> values;
  for (int64_t c = 0; c < p.layout.channels; ++c) {
    first->push_back(static_cast<int64_t>(values.size()));
    const auto grid = fsq_grid<A>(p.channel[c].levels);
    for (int32_t digit = 0; digit < p.channel[c].levels; ++digit) {
      const A level = static_cast<A>(digit);
      volatile A product = level * grid.scale;  // rounded before the subtraction
      values.push_back(from_float<T>(p.symmetric ? product - A(1) : (level - grid.half) / grid.half));
    }
  }
  return values;
}

template <typename T, typename I>
void decode(const FsqDecodeParams& p) {
  using A = accumulate_t<T>;
  const TokenLayout& layout = p.layout;
  std::vector<int64_t> first;
  const std::vector<T> values = level_values<T>(p, &first);
  const T outside = from_float<T>(std::numeric_limits<A>::quiet_NaN());
  const int64_t grain = std::max<int64_t>(1, 4096 / (layout.codebooks * layout.channels));
  parallel_for(0, layout.tokens(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t book = 0; book < layout.codebooks; ++book) {
        const int64_t index = static_cast<const I*>(p.indices)[token * layout.codebooks + book];
        const bool valid = index >= 0 && index < p.codebook_size;
        T* codes = static_cast<T*>(p.codes) + layout.offset(1, token / layout.inner, token % layout.inner, book);
        uint32_t rest = valid ? static_cast<uint32_t>(index) : 0;
        for (int64_t c = 0; c < layout.channels; ++c) {
          const uint32_t levels = static_cast<uint32_t>(p.channel[c].levels);
          codes[c * layout.operand[1].channel] = valid ? values[first[c] + rest % levels] : outside;
          rest /= levels;
        }
      }
    }
  });
}

}  // namespace

void fsq_decode(const FsqDecodeParams& p) {
  if (p.index_dtype == DType::int64) {
    VK_DISPATCH_FLOATING(p.dtype, [&] { (decode<scalar_t, int64_t>(p)); });
  } else {
    VK_DISPATCH_FLOATING(p.dtype, [&] { (decode<scalar_t, int32_t>(p)); });
  }
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
