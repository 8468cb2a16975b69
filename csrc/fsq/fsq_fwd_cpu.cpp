// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>
#include <vector>

#include "fsq/fsq_levels_cpu.h"
#include "fsq/fsq_runs_cpu.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

constexpr int64_t kBlock = 1024;  // tokens of one planar step: z, codes and the index sums stay in the first cache

// NaN turns the sign bit on, and adding digits (whose total is below 2^31) never turns it off.
template <typename A>
VK_ALWAYS_INLINE VecInt<A> mark_nan(VecInt<A> index, Vec<A> v) {
  return index | ((v == v) ? VecInt<A>{} : VecInt<A>{} + Int<A>(std::numeric_limits<int32_t>::min()));
}

template <typename A>
VK_ALWAYS_INLINE int32_t finish_index(Int<A> sum) {
  return sum < 0 ? kFsqNanIndex : static_cast<int32_t>(sum);
}

// NCTHW: one channel of one codebook over a block of tokens.

template <typename T, int kDepth, CodeForm form>
void planar_channel(const T* z, T* codes, Int<accumulate_t<T>>* index, int64_t n, const accumulate_t<T>* thresholds,
                    const LevelCode<accumulate_t<T>>& level, uint32_t basis) {
  using A = accumulate_t<T>;
  constexpr int kWidth = kLanes<A>;
  Vec<A> threshold[(1 << kDepth) - 1];
  for (int k = 0; k < (1 << kDepth) - 1; ++k) threshold[k] = broadcast<A>(thresholds[k]);
  const Vec<A> half = broadcast<A>(level.half), factor = broadcast<A>(level.factor);
  const auto step = [&](Vec<A> v, int64_t i, auto&& store) {
    const VecInt<A> digit = reached<A, kDepth>(v, threshold);
    if (index != nullptr) {
      VecInt<A> sum;
      std::memcpy(&sum, index + i, sizeof(sum));
      sum = mark_nan<A>(sum + digit * static_cast<Int<A>>(basis), v);
      std::memcpy(index + i, &sum, sizeof(sum));
    }
    if (codes == nullptr) return;
    const Vec<A> code = code_of<A, form>(__builtin_convertvector(digit, Vec<A>), half, factor);
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
using PlanarChannel = decltype(&planar_channel<T, 1, CodeForm::product>);
template <typename T, CodeForm form>
constexpr PlanarChannel<T> kPlanarChannel[kMaxDepth] = {&planar_channel<T, 1, form>, &planar_channel<T, 2, form>,
                                                        &planar_channel<T, 3, form>, &planar_channel<T, 4, form>};
template <typename T>
PlanarChannel<T> planar_channel_of(int depth, CodeForm form) {
  if (form == CodeForm::quotient) return kPlanarChannel<T, CodeForm::quotient>[depth - 1];
  if (form == CodeForm::centred) return kPlanarChannel<T, CodeForm::centred>[depth - 1];
  return kPlanarChannel<T, CodeForm::product>[depth - 1];
}

// What a block needs to know of one channel.
template <typename T>
struct Channel {
  using A = accumulate_t<T>;
  LevelCode<A> code;
  A threshold[kMaxSteps];
  uint32_t basis;
  PlanarChannel<T> quantize;

  void set(const FsqFwdParams& p, const FsqChannel& channel) {
    code = level_code<A>(channel.levels, p.symmetric);
    std::fill_n(threshold, kMaxSteps, std::numeric_limits<A>::quiet_NaN());
    for (int k = 0; k + 1 < channel.levels; ++k)
      threshold[k] = static_cast<A>(p.thresholds[channel.first_threshold + k]);
    basis = channel.basis;
    quantize = planar_channel_of<T>(search_depth(channel.levels), code.form);
  }
};

template <typename T>
void planar(const FsqFwdParams& p) {
  using A = accumulate_t<T>;
  const TokenLayout& layout = p.layout;
  Channel<T> channel[kFsqMaxChannels];
  for (int64_t c = 0; c < layout.channels; ++c) channel[c].set(p, p.channel[c]);
  const int64_t blocks = (layout.inner + kBlock - 1) / kBlock;
  const int64_t tasks = layout.outer * layout.codebooks * blocks;
  const int64_t grain = std::max<int64_t>(1, kFsqForwardGrain / (std::min(layout.inner, kBlock) * layout.channels));
  parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    Int<A> sums[kBlock + kLanes<A>];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * kBlock, book = task / blocks % layout.codebooks;
      const int64_t outer = task / blocks / layout.codebooks, n = std::min(kBlock, layout.inner - first);
      const T* z = static_cast<const T*>(p.z) + layout.offset(0, outer, first, book);
      T* codes = p.codes == nullptr ? nullptr : static_cast<T*>(p.codes) + layout.offset(1, outer, first, book);
      if (p.indices != nullptr) std::fill_n(sums, n + kLanes<A>, Int<A>(0));
      for (int64_t c = 0; c < layout.channels; ++c) {
        T* to = codes == nullptr ? nullptr : codes + c * layout.operand[1].channel;
        channel[c].quantize(z + c * layout.operand[0].channel, to, p.indices == nullptr ? nullptr : sums, n,
                            channel[c].threshold, channel[c].code, channel[c].basis);
      }
      if (p.indices == nullptr) continue;
      int32_t* indices = p.indices + (outer * layout.inner + first) * layout.codebooks + book;
      for (int64_t i = 0; i < n; ++i) indices[i * layout.codebooks] = finish_index<A>(sums[i]);
    }
  });
}

// Any strides, any number of levels.

template <typename T>
void strided(const FsqFwdParams& p) {
  using A = accumulate_t<T>;
  const TokenLayout& layout = p.layout;
  const std::vector<A> thresholds(p.thresholds, p.thresholds + p.threshold_count);
  const int64_t grain = std::max<int64_t>(1, kFsqForwardGrain / 16 / (layout.codebooks * layout.channels));
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
          const FsqGrid<A> grid = fsq_grid<A>(channel.levels);
          const A level = static_cast<A>(digit);
          volatile A product = level * grid.scale;  // rounded before the subtraction
          const A code = p.symmetric ? product - A(1) : (level - grid.half) / grid.half;
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
    if (p.layout.interleaved(operands)) return interleaved<scalar_t>(p, search_depth(most));
    if (p.layout.planar(operands)) return planar<scalar_t>(p);
    strided<scalar_t>(p);
  });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
