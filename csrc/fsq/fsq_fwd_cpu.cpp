// SPDX-License-Identifier: Apache-2.0
#include "fsq/fsq.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>
#include <vector>

#include "common/vmath.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

constexpr int kMaxSteps = 15;      // thresholds of one channel that the vector paths unroll
constexpr int kRunTokens = 16;     // tokens of one interleaved step: a multiple of every vector's lanes
constexpr int64_t kBlock = 1024;   // tokens of one planar step: z, codes and the index sums stay in the first cache
constexpr int64_t kGrain = 16384;  // elements per task: below 10 us a second thread costs more than it brings

template <typename A>
using VecInt = typename VecTraits<A>::integer;
template <typename A>
using Int = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

// The value as it is after rounding: the compiler may not fuse it into a following addition.
template <typename A>
VK_ALWAYS_INLINE Vec<A> rounded(Vec<A> value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  volatile Vec<A> stored = value;
  value = stored;
#endif
  return value;
}

template <typename A>
struct Grid {
  Vec<A> half, scale;
};

template <typename A>
VK_ALWAYS_INLINE Vec<A> level_value(Vec<A> digit, const Grid<A>& grid, bool symmetric) {
  return symmetric ? rounded<A>(digit * grid.scale) - A(1) : (digit - grid.half) / grid.half;
}

// NaN turns the sign bit on, and adding digits (whose total is below 2^31) never turns it off.
template <typename A>
VK_ALWAYS_INLINE VecInt<A> mark_nan(VecInt<A> index, Vec<A> v) {
  return index | ((v == v) ? VecInt<A>{} : VecInt<A>{} + Int<A>(std::numeric_limits<int32_t>::min()));
}

template <typename A>
VK_ALWAYS_INLINE int32_t finish_index(Int<A> sum) {
  return sum < 0 ? kFsqNanIndex : static_cast<int32_t>(sum);
}

// ---- NCTHW: one channel of one codebook over a block of tokens
// ----------------------------------------------------------

template <typename T, int kSteps>
void planar_channel(const T* z, T* codes, Int<accumulate_t<T>>* index, int64_t n, const accumulate_t<T>* thresholds,
                    const Grid<accumulate_t<T>>& grid, uint32_t basis, bool symmetric) {
  using A = accumulate_t<T>;
  constexpr int kWidth = kLanes<A>;
  const auto step = [&](Vec<A> v, int64_t i, auto&& store) {
    VecInt<A> digit{};
#pragma GCC unroll 16
    for (int k = 0; k < kSteps; ++k) digit -= (v >= thresholds[k]);
    if (index != nullptr) {
      VecInt<A> sum;
      std::memcpy(&sum, index + i, sizeof(sum));
      sum = mark_nan<A>(sum + digit * static_cast<Int<A>>(basis), v);
      std::memcpy(index + i, &sum, sizeof(sum));
    }
    if (codes == nullptr) return;
    const Vec<A> code = level_value<A>(__builtin_convertvector(digit, Vec<A>), grid, symmetric);
    store((v == v) ? code : v);
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    step(load_vec(z + i), i, [&](Vec<A> code) { store_vec(codes + i, code); });
  }
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    step(load_part(z + i, rest), i, [&](Vec<A> code) { store_part(codes + i, code, rest); });
  }
}

template <typename T>
using PlanarChannel = decltype(&planar_channel<T, 1>);
template <typename T, int... kSteps>
constexpr std::array<PlanarChannel<T>, sizeof...(kSteps)> planar_table(std::integer_sequence<int, kSteps...>) {
  return {&planar_channel<T, kSteps>...};
}

template <typename T>
void planar(const FsqFwdParams& p) {
  using A = accumulate_t<T>;
  static constexpr auto kChannel = planar_table<T>(std::make_integer_sequence<int, kMaxSteps + 1>());
  const TokenLayout& layout = p.layout;
  const std::vector<A> thresholds(p.thresholds, p.thresholds + p.threshold_count);
  const int64_t blocks = (layout.inner + kBlock - 1) / kBlock;
  const int64_t tasks = layout.outer * layout.codebooks * blocks;
  const int64_t grain = std::max<int64_t>(1, kGrain / (std::min(layout.inner, kBlock) * layout.channels));
  parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    Int<A> sums[kBlock + kLanes<A>];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * kBlock, book = task / blocks % layout.codebooks;
      const int64_t outer = task / blocks / layout.codebooks, n = std::min(kBlock, layout.inner - first);
      const T* z = static_cast<const T*>(p.z) + layout.offset(0, outer, first, book);
      T* codes = p.codes == nullptr ? nullptr : static_cast<T*>(p.codes) + layout.offset(1, outer, first, book);
      if (p.indices != nullptr) std::fill_n(sums, n + kLanes<A>, Int<A>(0));
      for (int64_t c = 0; c < layout.channels; ++c) {
        const FsqChannel& channel = p.channel[c];
        const auto scalar = fsq_grid<A>(channel.levels);
        const Grid<A> grid{broadcast<A>(scalar.half), broadcast<A>(scalar.scale)};
        T* to = codes == nullptr ? nullptr : codes + c * layout.operand[1].channel;
        kChannel[channel.levels - 1](z + c * layout.operand[0].channel, to, p.indices == nullptr ? nullptr : sums, n,
                                     thresholds.data() + channel.first_threshold, grid, channel.basis, p.symmetric);
      }
      if (p.indices == nullptr) continue;
      int32_t* indices = p.indices + (outer * layout.inner + first) * layout.codebooks + book;
      for (int64_t i = 0; i < n; ++i) indices[i * layout.codebooks] = finish_index<A>(sums[i]);
    }
  });
}

// ---- NDHWC and [tokens, channels]: runs of 16 tokens, with every per-channel constant laid out along the run
// -----------

template <typename A>
struct RunTables {
  int64_t length;            // 16 * channels
  std::vector<A> threshold;  // [steps, length]; NaN beyond a channel's own, which no value reaches
  std::vector<A> half, scale;
  std::vector<Int<A>> basis;

  RunTables(const FsqFwdParams& p, int steps)
      : length(kRunTokens * p.layout.channels),
        threshold(steps * length, std::numeric_limits<A>::quiet_NaN()),
        half(length),
        scale(length),
        basis(length) {
    for (int64_t e = 0; e < length; ++e) {
      const FsqChannel& channel = p.channel[e % p.layout.channels];
      const auto grid = fsq_grid<A>(channel.levels);
      half[e] = grid.half, scale[e] = grid.scale, basis[e] = static_cast<Int<A>>(channel.basis);
      for (int k = 0; k + 1 < channel.levels; ++k) {
        threshold[k * length + e] = static_cast<A>(p.thresholds[channel.first_threshold + k]);
      }
    }
  }
};

// Whether the run holds a NaN, whose token's index the caller then overwrites.
template <typename T, int kSteps>
bool interleaved_run(const T* z, T* codes, Int<accumulate_t<T>>* part, const RunTables<accumulate_t<T>>& tables,
                     bool symmetric) {
  using A = accumulate_t<T>;
  VecInt<A> nan_seen{};
  for (int64_t e = 0; e < tables.length; e += kLanes<A>) {
    const Vec<A> v = load_vec(z + e);
    VecInt<A> digit{};
#pragma GCC unroll 16
    for (int k = 0; k < kSteps; ++k) digit -= (v >= load_vec(tables.threshold.data() + k * tables.length + e));
    nan_seen |= (v != v);
    if (part != nullptr) {
      VecInt<A> basis;
      std::memcpy(&basis, tables.basis.data() + e, sizeof(basis));
      const VecInt<A> product = digit * basis;
      std::memcpy(part + e, &product, sizeof(product));
    }
    if (codes == nullptr) continue;
    const Grid<A> grid{load_vec(tables.half.data() + e), load_vec(tables.scale.data() + e)};
    const Vec<A> code = level_value<A>(__builtin_convertvector(digit, Vec<A>), grid, symmetric);
    store_vec(codes + e, (v == v) ? code : v);
  }
  Int<A> lanes[kLanes<A>], any = 0;
  std::memcpy(lanes, &nan_seen, sizeof(lanes));
  for (const Int<A> lane : lanes) any |= lane;
  return any != 0;
}

template <typename T>
using InterleavedRun = decltype(&interleaved_run<T, 1>);
template <typename T, int... kSteps>
constexpr std::array<InterleavedRun<T>, sizeof...(kSteps)> interleaved_table(std::integer_sequence<int, kSteps...>) {
  return {&interleaved_run<T, kSteps>...};
}

// Index of each token of a run: the sum of its channels' parts.
template <typename I, int kChannels>
void sum_parts(const I* part, int64_t channels, int64_t tokens, int32_t* indices) {
  const int64_t count = kChannels == 0 ? channels : kChannels;
  for (int64_t t = 0; t < tokens; ++t, part += count) {
    I sum = 0;
#pragma GCC unroll 8
    for (int64_t c = 0; c < count; ++c) sum += part[c];
    indices[t] = static_cast<int32_t>(sum);
  }
}

template <typename I>
using SumParts = decltype(&sum_parts<I, 0>);
// Published codebooks have 2 to 6 channels; a constant count lets the additions of a token overlap.
template <typename I>
SumParts<I> sum_parts_of(int64_t channels) {
  constexpr SumParts<I> kTable[] = {&sum_parts<I, 0>, &sum_parts<I, 0>, &sum_parts<I, 2>, &sum_parts<I, 3>,
                                    &sum_parts<I, 4>, &sum_parts<I, 5>, &sum_parts<I, 6>};
  return kTable[channels < 7 ? channels : 0];
}

template <typename T>
void mark_nan_tokens(const T* z, int64_t channels, int64_t tokens, int32_t* indices) {
  for (int64_t e = 0; e < tokens * channels; ++e) {
    if (to_float(z[e]) != to_float(z[e])) indices[e / channels] = kFsqNanIndex;
  }
}

template <typename T>
void interleaved(const FsqFwdParams& p, int steps) {
  using A = accumulate_t<T>;
  static constexpr auto kRun = interleaved_table<T>(std::make_integer_sequence<int, kMaxSteps + 1>());
  const TokenLayout& layout = p.layout;
  const RunTables<A> tables(p, steps);
  const auto sum = sum_parts_of<Int<A>>(p.layout.channels);
  const int64_t channels = layout.channels, per_outer = layout.inner * layout.codebooks;
  const int64_t runs = (per_outer + kRunTokens - 1) / kRunTokens;
  parallel_for(0, layout.outer * runs, std::max<int64_t>(1, kGrain / tables.length), [&](int64_t begin, int64_t end) {
    std::vector<Int<A>> part(p.indices == nullptr ? 0 : tables.length);
    std::vector<T> padded(2 * tables.length);
    Int<A>* parts = p.indices == nullptr ? nullptr : part.data();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t outer = task / runs, first = task % runs * kRunTokens;
      const int64_t tokens = std::min<int64_t>(kRunTokens, per_outer - first);
      const T* z = static_cast<const T*>(p.z) + outer * layout.operand[0].outer + first * channels;
      T* codes =
          p.codes == nullptr ? nullptr : static_cast<T*>(p.codes) + outer * layout.operand[1].outer + first * channels;
      bool has_nan = false;
      if (tokens == kRunTokens) {
        has_nan = kRun[steps](z, codes, parts, tables, p.symmetric);
      } else {
        T* scratch = padded.data() + tables.length;
        std::copy_n(z, tokens * channels, padded.data());
        has_nan = kRun[steps](padded.data(), codes == nullptr ? nullptr : scratch, parts, tables, p.symmetric);
        if (codes != nullptr) std::copy_n(scratch, tokens * channels, codes);
      }
      if (parts == nullptr) continue;
      int32_t* indices = p.indices + outer * per_outer + first;
      sum(parts, channels, tokens, indices);
      if (has_nan) mark_nan_tokens(z, channels, tokens, indices);
    }
  });
}

// ---- any strides, any number of levels
// ------------------------------------------------------------------------------------

template <typename T>
void strided(const FsqFwdParams& p) {
  using A = accumulate_t<T>;
  const TokenLayout& layout = p.layout;
  const std::vector<A> thresholds(p.thresholds, p.thresholds + p.threshold_count);
  const int64_t grain = std::max<int64_t>(1, kGrain / 16 / (layout.codebooks * layout.channels));
  parallel_for(0, layout.tokens(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t book = 0; book < layout.codebooks; ++book) {
        const int64_t outer = token / layout.inner, inner = token % layout.inner;
        const T* z = static_cast<const T*>(p.z) + layout.offset(0, outer, inner, book);
        uint32_t index = 0;
        bool has_nan = false;
        for (int64_t c = 0; c < layout.channels; ++c) {
          const FsqChannel& channel = p.channel[c];
          const A v = to_float(z[c * layout.operand[0].channel]);
          const A* first = thresholds.data() + channel.first_threshold;
          const auto digit = std::upper_bound(first, first + channel.levels - 1, v) - first;  // thresholds <= v
          index += static_cast<uint32_t>(digit) * channel.basis;
          has_nan |= v != v;
          if (p.codes == nullptr) continue;
          const auto scalar = fsq_grid<A>(channel.levels);
          const Grid<A> grid{broadcast<A>(scalar.half), broadcast<A>(scalar.scale)};
          const A code = level_value<A>(broadcast<A>(static_cast<A>(digit)), grid, p.symmetric)[0];
          T* codes = static_cast<T*>(p.codes) + layout.offset(1, outer, inner, book);
          codes[c * layout.operand[1].channel] = from_float<T>(v == v ? code : v);
        }
        if (p.indices == nullptr) continue;
        p.indices[token * layout.codebooks + book] = has_nan ? kFsqNanIndex : static_cast<int32_t>(index);
      }
    }
  });
}

}  // namespace

void fsq_fwd(const FsqFwdParams& p) {
  int32_t most = 2;
  for (int64_t c = 0; c < p.layout.channels; ++c) most = std::max(most, p.channel[c].levels);
  const int operands = p.codes == nullptr ? 1 : 2;
  VK_DISPATCH_FLOATING(p.dtype, [&] {
    if (most - 1 > kMaxSteps) return strided<scalar_t>(p);
    if (p.layout.interleaved(operands)) return interleaved<scalar_t>(p, most - 1);
    if (p.layout.planar(operands)) return planar<scalar_t>(p);
    strided<scalar_t>(p);
  });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
