// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/vmath.h"
#include "fsq/fsq_levels_cpu.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

constexpr int64_t kBlock = 1024;                          // tokens of one step: their indices stay in the first cache
constexpr int64_t kPaddedBlock = kBlock + kLanes<float>;  // vectors reach beyond the last token
constexpr int64_t kGrain = 16384;                         // elements per task

// floor(n / divisor) as (n + 1/2) / divisor - 1/2 rounded to nearest: four operations in place of a division of
// integers. The distance to the next half-integer is 1 / (2 divisor), and three roundings of n / divisor stay below it
// while n < 2^21 in float32 and 2^50 in float64. NaN, which stands for an index outside the codebook, stays NaN.
template <typename A>
class Divisor {
 public:
  explicit Divisor(int32_t divisor)
      : factor_(broadcast<A>(static_cast<A>(1.0 / divisor))),
        offset_(broadcast<A>(static_cast<A>(0.5 / divisor - 0.5))) {}

  VK_ALWAYS_INLINE Vec<A> floor_quotient(Vec<A> n) const {
    constexpr A kToInteger = sizeof(A) == 4 ? A(0x1.8p23) : A(0x1.8p52);
    return (n * factor_ + offset_ + kToInteger) - kToInteger;
  }

 private:
  Vec<A> factor_, offset_;
};
template <typename A>
constexpr int64_t kLargestCodebook = sizeof(A) == 4 ? int64_t{1} << 21 : int64_t{1} << 31;

// Indices as floating-point numbers, zeros up to a whole vector; those outside the codebook become NaN.
template <typename A, typename I>
void read_typed(const I* indices, int64_t step, int64_t n, int64_t codebook_size, A* numbers) {
  using Unsigned = std::make_unsigned_t<I>;
  const Unsigned size = static_cast<Unsigned>(codebook_size);
  const auto number = [size](I index) {
    const A value = static_cast<A>(static_cast<int32_t>(index));
    return static_cast<Unsigned>(index) < size ? value : std::numeric_limits<A>::quiet_NaN();
  };
  if (step == 1) {
    for (int64_t i = 0; i < n; ++i) numbers[i] = number(indices[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) numbers[i] = number(indices[i * step]);
  }
  std::fill_n(numbers + n, kLanes<A>, A(0));
}

// `n` indices from place `from` on, `step` apart. Their type is looked at here alone, once for each block.
template <typename A>
void read_indices(const FsqDecodeParams& p, int64_t from, int64_t step, int64_t n, A* numbers) {
  if (p.index_dtype == DType::int64) {
    read_typed(static_cast<const int64_t*>(p.indices) + from, step, n, p.codebook_size, numbers);
  } else {
    read_typed(static_cast<const int32_t*>(p.indices) + from, step, n, p.codebook_size, numbers);
  }
}

inline int64_t read_index(const FsqDecodeParams& p, int64_t at) {
  return p.index_dtype == DType::int64 ? static_cast<const int64_t*>(p.indices)[at]
                                       : static_cast<const int32_t*>(p.indices)[at];
}

// The codes of all levels of a channel, in the type they are stored in.
template <typename T>
std::vector<T> level_values(int32_t levels, bool symmetric) {
  using A = accumulate_t<T>;
  const FsqGrid<A> grid = fsq_grid<A>(levels);
  std::vector<T> values;
  for (int32_t digit = 0; digit < levels; ++digit) {
    const A level = static_cast<A>(digit);
    volatile A product = level * grid.scale;  // rounded before the subtraction
    values.push_back(from_float<T>(symmetric ? product - A(1) : (level - grid.half) / grid.half));
  }
  return values;
}

// NCTHW: one channel after the other takes its digit from what the channels before it have left of the indices.
template <typename T, CodeForm form>
void planar(const FsqDecodeParams& p, const LevelCode<accumulate_t<T>>* code) {
  using A = accumulate_t<T>;
  const TokenLayout& layout = p.layout;
  const int64_t blocks = (layout.inner + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kGrain / (std::min(layout.inner, kBlock) * layout.channels));
  parallel_for(0, layout.outer * layout.codebooks * blocks, grain, [&](int64_t begin, int64_t end) {
    A rest[kPaddedBlock];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * kBlock, book = task / blocks % layout.codebooks;
      const int64_t outer = task / blocks / layout.codebooks, n = std::min(kBlock, layout.inner - first);
      const int64_t from = (outer * layout.inner + first) * layout.codebooks + book;
      read_indices(p, from, layout.codebooks, n, rest);
      for (int64_t c = 0; c < layout.channels; ++c) {
        T* to = static_cast<T*>(p.codes) + layout.offset(1, outer, first, book) + c * layout.operand[1].channel;
        const A levels = static_cast<A>(p.channel[c].levels);
        const Divisor<A> divisor(p.channel[c].levels);
        const Vec<A> half = broadcast<A>(code[c].half), factor = broadcast<A>(code[c].factor);
        const auto next = [&](int64_t i) {
          const Vec<A> number = load_vec(rest + i), quotient = divisor.floor_quotient(number);
          store_vec(rest + i, quotient);
          return code_of<A, form>(number - quotient * levels, half, factor);
        };
        int64_t i = 0;
        for (; i + kLanes<A> <= n; i += kLanes<A>) store_vec(to + i, next(i));
        if (i < n) store_part(to + i, next(i), static_cast<int>(n - i));
      }
    }
  });
}

// Neighbouring channels whose codes are looked up together. Row d of the table holds the codes of their digits, which
// d combines, padded to kRowChannels; the last row is NaN.
constexpr int kRowChannels = 4;
constexpr int32_t kMaxRows = 1024;  // 16 kB of float32: two tables stay in the first cache
template <typename T>
struct Rows {
  int64_t first_channel = 0, channels = 0;
  int32_t count = 1;
  std::vector<T> table;

  void fill(const FsqDecodeParams& p) {
    table.assign((count + 1) * kRowChannels, from_float<T>(std::numeric_limits<accumulate_t<T>>::quiet_NaN()));
    int32_t repeats = 1;
    for (int64_t c = 0; c < channels; ++c) {
      const int32_t levels = p.channel[first_channel + c].levels;
      const std::vector<T> values = level_values<T>(levels, p.symmetric);
      for (int32_t row = 0; row < count; ++row) table[row * kRowChannels + c] = values[row / repeats % levels];
      repeats *= levels;
    }
  }
};

template <typename T>
std::vector<Rows<T>> group_channels(const FsqDecodeParams& p) {
  std::vector<Rows<T>> groups;
  for (int64_t c = 0; c < p.layout.channels; ++c) {
    const int32_t levels = p.channel[c].levels;
    if (groups.empty() || groups.back().channels == kRowChannels || groups.back().count > kMaxRows / levels) {
      groups.push_back({c, 0, 1, {}});
    }
    groups.back().count *= levels;
    groups.back().channels += 1;
  }
  return groups;
}

// Offsets of the rows that the indices mean: groups take their digits as the channels of `planar` do.
template <typename T>
void find_rows(const std::vector<Rows<T>>& groups, int64_t tokens, accumulate_t<T>* rest, int32_t* rows) {
  using A = accumulate_t<T>;
  typedef int32_t Offsets __attribute__((vector_size(4 * kLanes<A>)));
  for (const Rows<T>& group : groups) {
    const A count = static_cast<A>(group.count);
    const Divisor<A> divisor(group.count);
    for (int64_t i = 0; i < tokens; i += kLanes<A>) {
      const Vec<A> number = load_vec(rest + i), quotient = divisor.floor_quotient(number);
      store_vec(rest + i, quotient);
      const Vec<A> digit = number - quotient * count;
      const Vec<A> row = (digit == digit) ? digit : broadcast<A>(count);
      const Offsets offset = __builtin_convertvector(row, Offsets) * kRowChannels;
      std::memcpy(rows + i, &offset, sizeof(offset));
    }
    rows += kPaddedBlock;
  }
}

// Rows are copied at their padded width, each over the padding of the one before.
template <int kGroups, typename T>
void copy_rows(const std::vector<Rows<T>>& groups, const int32_t* rows, int64_t channels, int64_t tokens, T* codes) {
  const T* table[kFsqMaxChannels];
  int64_t first[kFsqMaxChannels];
  const int count = kGroups > 0 ? kGroups : static_cast<int>(groups.size());
  for (int k = 0; k < count; ++k) table[k] = groups[k].table.data(), first[k] = groups[k].first_channel;
  const int64_t padded = std::max<int64_t>(0, tokens - (kRowChannels - 1));
  for (int64_t t = 0; t < padded; ++t, codes += channels) {
    for (int k = 0; k < count; ++k) {
      std::memcpy(codes + first[k], table[k] + rows[k * kPaddedBlock + t], kRowChannels * sizeof(T));
    }
  }
  for (int64_t t = padded; t < tokens; ++t, codes += channels) {
    for (int k = 0; k < count; ++k) {
      std::copy_n(table[k] + rows[k * kPaddedBlock + t], groups[k].channels, codes + first[k]);
    }
  }
}

// NDHWC and [tokens, channels].
template <typename T>
void interleaved(const FsqDecodeParams& p, const std::vector<Rows<T>>& groups) {
  using A = accumulate_t<T>;
  const TokenLayout& layout = p.layout;
  const int64_t channels = layout.channels, per_outer = layout.inner * layout.codebooks;
  const int64_t blocks = (per_outer + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kGrain / (kBlock * channels));
  const auto copy = groups.size() == 1   ? &copy_rows<1, T>
                    : groups.size() == 2 ? &copy_rows<2, T>
                    : groups.size() == 3 ? &copy_rows<3, T>
                                         : &copy_rows<0, T>;
  parallel_for(0, layout.outer * blocks, grain, [&](int64_t begin, int64_t end) {
    A numbers[kPaddedBlock];
    std::vector<int32_t> rows(groups.size() * kPaddedBlock);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t outer = task / blocks, first = task % blocks * kBlock;
      const int64_t tokens = std::min(kBlock, per_outer - first);
      read_indices(p, outer * per_outer + first, 1, tokens, numbers);
      find_rows(groups, tokens, numbers, rows.data());
      T* codes = static_cast<T*>(p.codes) + outer * layout.operand[1].outer + first * channels;
      copy(groups, rows.data(), channels, tokens, codes);
    }
  });
}

// Any strides, any number of levels.
template <typename T>
void strided(const FsqDecodeParams& p) {
  const TokenLayout& layout = p.layout;
  std::vector<T> values[kFsqMaxChannels];
  for (int64_t c = 0; c < layout.channels; ++c) values[c] = level_values<T>(p.channel[c].levels, p.symmetric);
  const T outside = from_float<T>(std::numeric_limits<accumulate_t<T>>::quiet_NaN());
  const int64_t grain = std::max<int64_t>(1, kGrain / 4 / (layout.codebooks * layout.channels));
  parallel_for(0, layout.tokens(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t book = 0; book < layout.codebooks; ++book) {
        const int64_t index = read_index(p, token * layout.codebooks + book);
        const bool valid = index >= 0 && index < p.codebook_size;
        T* codes = static_cast<T*>(p.codes) + layout.offset(1, token / layout.inner, token % layout.inner, book);
        uint32_t rest = valid ? static_cast<uint32_t>(index) : 0;
        for (int64_t c = 0; c < layout.channels; ++c) {
          const uint32_t levels = static_cast<uint32_t>(p.channel[c].levels);
          codes[c * layout.operand[1].channel] = valid ? values[c][rest % levels] : outside;
          rest /= levels;
        }
      }
    }
  });
}

template <typename T>
void decode(const FsqDecodeParams& p) {
  using A = accumulate_t<T>;
  const TokenLayout& layout = p.layout;
  if (p.codebook_size > kLargestCodebook<A>) return strided<T>(p);
  if (layout.interleaved(2)) {
    std::vector<Rows<T>> groups = group_channels<T>(p);
    int64_t rows = 0;
    for (const Rows<T>& group : groups) rows += group.count;
    if (rows > layout.tokens() * layout.codebooks) return strided<T>(p);
    for (Rows<T>& group : groups) group.fill(p);
    return interleaved<T>(p, groups);
  }
  if (!layout.planar(2)) return strided<T>(p);
  LevelCode<A> code[kFsqMaxChannels];
  CodeForm form = CodeForm::product;
  for (int64_t c = 0; c < layout.channels; ++c) {
    code[c] = level_code<A>(p.channel[c].levels, p.symmetric);
    form = std::max(form, code[c].form);
  }
  if (form == CodeForm::quotient) return planar<T, CodeForm::quotient>(p, code);
  if (form == CodeForm::centred) return planar<T, CodeForm::centred>(p, code);
  planar<T, CodeForm::product>(p, code);
}

}  // namespace

void fsq_decode(const FsqDecodeParams& p) {
  VK_DISPATCH_FLOATING(p.dtype, [&] { decode<scalar_t>(p); });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
