// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <type_traits>

#include "common/vmath.h"
#include "lfq/lfq.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

constexpr int64_t kGrain = 16384;  // elements per task
constexpr int64_t kBlock = 1024;   // tokens of one planar step: their indices stay in the first cache

// The codes of a zero and of a one: they differ in the sign, which is all that a bit decides.
template <typename T>
class BitCode {
 public:
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

  explicit BitCode(double magnitude) {
    const T zero = from_float<T>(static_cast<accumulate_t<T>>(-magnitude));
    std::memcpy(&zero_, &zero, sizeof(zero_));
  }
  // for the lowest bit of `word`
  template <typename Word>
  VK_ALWAYS_INLINE Bits operator()(Word word) const {
    return static_cast<Bits>(zero_ ^ static_cast<Bits>(static_cast<Bits>(word) << (8 * sizeof(T) - 1)));
  }

 private:
  Bits zero_;
};

template <typename T, typename Word>
void write_codes(const Word* __restrict words, int bit, int64_t n, const BitCode<T> code, T* __restrict codes) {
  for (int64_t i = 0; i < n; ++i) {
    const auto value = code(words[i] >> bit);
    std::memcpy(codes + i, &value, sizeof(value));
  }
}

// NCTHW: one channel is one bit of a block of indices.
template <typename T, typename I>
void planar(const LfqDecodeParams& p) {
  // the indices by halves: the compiler narrows 32 bits to the 16 of a code well, and 64 badly
  using Half = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  const TokenLayout& layout = p.layout;
  const BitCode<T> code(p.magnitude);
  const int channels = static_cast<int>(layout.channels);
  const int64_t blocks = (layout.inner + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kGrain / (std::min(layout.inner, kBlock) * channels));
  parallel_for(0, layout.outer * layout.codebooks * blocks, grain, [&](int64_t begin, int64_t end) {
    Half half[2][kBlock];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * kBlock, book = task / blocks % layout.codebooks;
      const int64_t outer = task / blocks / layout.codebooks, n = std::min(kBlock, layout.inner - first);
      const int64_t from = (outer * layout.inner + first) * layout.codebooks + book;
      const I* indices = static_cast<const I*>(p.indices) + from;
      for (int64_t i = 0; i < n; ++i) {
        const uint64_t index = static_cast<uint64_t>(static_cast<int64_t>(indices[i * layout.codebooks]));
        half[0][i] = static_cast<uint32_t>(index);
        half[1][i] = static_cast<uint32_t>(index >> 32);
      }
      for (int c = 0; c < channels; ++c) {
        T* codes = static_cast<T*>(p.codes) + layout.offset(1, outer, first, book) + c * layout.operand[1].channel;
        const int bit = lfq_bit(c, channels, p.lsb_first);
        write_codes(half[bit / 32], bit % 32, n, code, codes);
      }
    }
  });
}

// The codes of eight neighbouring channels for every byte of bits.
template <typename T>
struct ByteTable {
  static constexpr int kChannels = 8;
  typename BitCode<T>::Bits row[256][kChannels];

  ByteTable(double magnitude, bool lsb_first) {
    const BitCode<T> code(magnitude);
    for (int byte = 0; byte < 256; ++byte) {
      for (int c = 0; c < kChannels; ++c) row[byte][c] = code(byte >> lfq_bit(c, kChannels, lsb_first));
    }
  }
};

// NDHWC and [tokens, channels], all of it one run. Rows are copied whole, each over the end of the one before; the last
// rows of a range may not reach into the next, which another thread writes.
template <typename T, typename I>
void interleaved(const LfqDecodeParams& p) {
  const ByteTable<T> table(p.magnitude, p.lsb_first);
  const int64_t channels = p.layout.channels, last = (channels - 1) / 8 * 8;  // the first channel of the last byte
  const int64_t tokens = p.layout.inner * p.layout.codebooks;
  parallel_for(0, tokens, std::max<int64_t>(1, kGrain / channels), [&](int64_t begin, int64_t end) {
    T* codes = static_cast<T*>(p.codes) + begin * channels;
    for (int64_t token = begin; token < end; ++token, codes += channels) {
      uint64_t rest = static_cast<uint64_t>(static_cast<int64_t>(static_cast<const I*>(p.indices)[token]));
      if (!p.lsb_first) rest = __builtin_bswap64(rest << (64 - channels));  // the first channels' byte comes lowest
      const auto next_row = [&] {
        const auto* row = table.row[rest & 0xff];
        rest >>= 8;
        return row;
      };
      for (int64_t c = 0; c < last; c += 8) std::memcpy(codes + c, next_row(), 8 * sizeof(T));
      if ((end - token) * channels >= last + 8) {
        std::memcpy(codes + last, next_row(), 8 * sizeof(T));
      } else {
        std::memcpy(codes + last, next_row(), (channels - last) * sizeof(T));
      }
    }
  });
}

// Any strides, and few tokens.
template <typename T, typename I>
void strided(const LfqDecodeParams& p) {
  using A = accumulate_t<T>;
  const TokenLayout& layout = p.layout;
  const int channels = static_cast<int>(layout.channels);
  const T code[2] = {from_float<T>(static_cast<A>(-p.magnitude)), from_float<T>(static_cast<A>(p.magnitude))};
  const int64_t grain = std::max<int64_t>(1, kGrain / 4 / (layout.codebooks * layout.channels));
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

template <typename T, typename I>
void decode(const LfqDecodeParams& p) {
  const TokenLayout& layout = p.layout;
  if (layout.outer == 1 && layout.interleaved(2) && layout.inner >= 256) return interleaved<T, I>(p);
  if (layout.planar(2)) return planar<T, I>(p);
  strided<T, I>(p);
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
