// SPDX-License-Identifier: Apache-2.0
// FSQ forward of NDHWC and [tokens, channels]: the channels of all tokens are one run in memory. A vector holds several
// channels, and the pattern of channels repeats after a few vectors (three for six channels and 16 lanes). Vectors at
// the same place of four patterns are quantized together and share the loads of their constants; more of them, apart by
// longer strides, would leave the order in which memory is fetched ahead (a block at a time: twice the time).
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "fsq/fsq_levels_cpu.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

constexpr int kRunTokens = 16;       // a multiple of every vector's lanes
constexpr int64_t kRunBlock = 2048;  // elements of one step: z, codes and digits stay in the first cache
constexpr int kPatterns = 4;         // patterns quantized together
constexpr int kPackedChannels = 8;   // channels whose digits share one 64-bit word

template <int count>
using Count = std::integral_constant<int, count>;

// Constants of every place of the pattern.
template <typename A>
struct RunTables {
  int places;
  CodeForm form = CodeForm::product;
  Vec<A> threshold[kFsqMaxChannels][kMaxSteps];
  Vec<A> half[kFsqMaxChannels], factor[kFsqMaxChannels];

  RunTables(const FsqFwdParams& p, int depth) {
    const int channels = static_cast<int>(p.layout.channels);
    places = channels / std::gcd(channels, kLanes<A>);
    for (int e = 0; e < places * kLanes<A>; ++e) {
      const int place = e / kLanes<A>, lane = e % kLanes<A>;
      const FsqChannel& channel = p.channel[e % channels];
      const LevelCode<A> code = level_code<A>(channel.levels, p.symmetric);
      form = std::max(form, code.form);
      half[place][lane] = code.half, factor[place][lane] = code.factor;
      for (int k = 0; k < (1 << depth) - 1; ++k) {
        threshold[place][k][lane] = k + 1 < channel.levels ? static_cast<A>(p.thresholds[channel.first_threshold + k])
                                                           : std::numeric_limits<A>::quiet_NaN();
      }
    }
  }
};

// Digits of a vector of values on their way to bytes. AVX-512 narrows them in one instruction; elsewhere GCC 12 would
// take them apart lane by lane, while it narrows a whole block well.
#if defined(__AVX512F__)
template <typename A>
using Wide = uint8_t;
template <typename A>
VK_ALWAYS_INLINE void store_digits(uint8_t* to, VecInt<A> digit) {
  typedef uint8_t Narrow __attribute__((vector_size(kLanes<A>)));
  const Narrow narrow = __builtin_convertvector(digit, Narrow);
  std::memcpy(to, &narrow, sizeof(narrow));
}
#else
template <typename A>
using Wide = Int<A>;
template <typename A>
VK_ALWAYS_INLINE void store_digits(Int<A>* to, VecInt<A> digit) {
  std::memcpy(to, &digit, sizeof(digit));
}
#endif

// Whether the run holds a NaN, whose token's index the caller then overwrites. `length` is a multiple of
// kRunTokens * channels; codes and digits may be null.
template <typename T, int kDepth, CodeForm form>
bool quantize_run(const T* z, T* codes, Wide<accumulate_t<T>>* digits, int64_t length,
                  const RunTables<accumulate_t<T>>& tables) {
  using A = accumulate_t<T>;
  const int64_t pattern = tables.places * kLanes<A>;
  VecInt<A> nan_seen{};
  const auto vectors = [&](int64_t first, auto count) {
    for (int64_t place = 0, e = first; place < tables.places; ++place, e += kLanes<A>) {
      Vec<A> threshold[(1 << kDepth) - 1];
      for (int k = 0; k < (1 << kDepth) - 1; ++k) threshold[k] = tables.threshold[place][k];
      const Vec<A> half = tables.half[place], factor = tables.factor[place];
      for (int i = 0; i < count; ++i) {
        const int64_t at = e + i * pattern;
        const Vec<A> v = load_vec(z + at);
        const VecInt<A> digit = reached<A, kDepth>(v, threshold);
        nan_seen |= (v != v);
        if (digits != nullptr) store_digits<A>(digits + at, digit);
        if (codes == nullptr) continue;
        const Vec<A> code = code_of<A, form>(__builtin_convertvector(digit, Vec<A>), half, factor);
        store_vec(codes + at, (v == v) ? code : v);
      }
    }
  };
  int64_t e = 0;
  for (; e + kPatterns * pattern <= length; e += kPatterns * pattern) vectors(e, Count<kPatterns>());
  for (; e < length; e += pattern) vectors(e, Count<1>());
  Int<A> lanes[kLanes<A>], any = 0;
  std::memcpy(lanes, &nan_seen, sizeof(lanes));
  for (const Int<A> lane : lanes) any |= lane;
  return any != 0;
}

template <typename T>
using QuantizeRun = decltype(&quantize_run<T, 1, CodeForm::product>);
template <typename T, CodeForm form>
constexpr QuantizeRun<T> kQuantizeRun[kMaxDepth] = {&quantize_run<T, 1, form>, &quantize_run<T, 2, form>,
                                                    &quantize_run<T, 3, form>, &quantize_run<T, 4, form>};
template <typename T>
QuantizeRun<T> quantize_run_of(int depth, CodeForm form) {
  if (form == CodeForm::quotient) return kQuantizeRun<T, CodeForm::quotient>[depth - 1];
  if (form == CodeForm::centred) return kQuantizeRun<T, CodeForm::centred>[depth - 1];
  return kQuantizeRun<T, CodeForm::product>[depth - 1];
}

// Weights that add up to eight digits of a token, one byte each in a 64-bit word, by halves: pairs of bytes, pairs of
// 16-bit sums, two 32-bit sums. With at most 16 levels a channel no sum outgrows its lane: 255, 65535, the index.
class PackedIndex {
 public:
  PackedIndex(const FsqChannel* channel, int channels) : channels_(channels) {
    const auto levels = [&](int c) { return c < channels ? static_cast<uint32_t>(channel[c].levels) : 1u; };
    for (int i = 0; i < kWords; ++i) {
      for (int pair = 0; pair < 4; ++pair) odd_digit_[4 * i + pair] = static_cast<uint16_t>(levels(2 * pair));
      for (int quad = 0; quad < 2; ++quad) {
        odd_pair_[2 * i + quad] = static_cast<uint32_t>(levels(4 * quad) * levels(4 * quad + 1));
      }
      upper_[2 * i] = levels(0) * levels(1) * levels(2) * levels(3);
      upper_[2 * i + 1] = 0;
      keep_[i] = channels == kPackedChannels ? ~uint64_t{0} : (uint64_t{1} << (8 * channels)) - 1;
    }
#if defined(__AVX512BW__)
    for (int pair = 0; pair < 4; ++pair) {  // two tokens a lane of 16 bytes
      const int first = 2 * pair * channels;
      for (int i = 0; i < 4; ++i) from_[4 * pair + i] = std::min(first / 4 + i, 15);
      for (int i = 0; i < 16; ++i) {
        spread_[16 * pair + i] = i % 8 < channels ? static_cast<char>(first % 4 + i / 8 * channels + i % 8) : -128;
      }
    }
#endif
  }

  // `tokens` is a multiple of kRunTokens; reads up to 64 bytes beyond the digits.
  VK_ALWAYS_INLINE void operator()(const uint8_t* digits, int64_t tokens, int32_t* indices) const {
    for (int64_t t = 0; t < tokens; t += kWords) {
      const Bits16 bytes = reinterpret_cast<Bits16>(words_of(digits + t * channels_));
      const Bits32 pairs = reinterpret_cast<Bits32>((bytes & 0xff) + (bytes >> 8) * odd_digit_);
      const Bits64 quads = reinterpret_cast<Bits64>((pairs & 0xffff) + (pairs >> 16) * odd_pair_);
      const Bits32 upper = reinterpret_cast<Bits32>(quads >> 32) * upper_;
      const Bits64 index = reinterpret_cast<Bits64>(reinterpret_cast<Bits32>(quads) + upper);
      typedef int32_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
      const Narrow narrow = __builtin_convertvector(index, Narrow);
      std::memcpy(indices + t, &narrow, sizeof(narrow));
    }
  }

 private:
  typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Bits64 __attribute__((vector_size(kVectorBytes)));
  static constexpr int kWords = kVectorBytes / 8;

  // The digits of kWords tokens, each token in a word of its own.
  VK_ALWAYS_INLINE Bits64 words_of(const uint8_t* digits) const {
#if defined(__AVX512BW__)
    const __m512i packed = _mm512_permutexvar_epi32(_mm512_load_si512(from_), _mm512_loadu_si512(digits));
    return reinterpret_cast<Bits64>(_mm512_shuffle_epi8(packed, _mm512_load_si512(spread_)));
#else
    Bits64 words;
    for (int i = 0; i < kWords; ++i) {
      uint64_t word;
      std::memcpy(&word, digits + i * channels_, sizeof(word));
      words[i] = word;
    }
    return words & keep_;
#endif
  }

  int channels_;
  Bits16 odd_digit_;
  Bits32 odd_pair_, upper_;
  Bits64 keep_;
#if defined(__AVX512BW__)
  alignas(64) int32_t from_[16];
  alignas(64) char spread_[64];
#endif
};

// Index of each token: digits times the products of the levels before them. More channels than a word holds are rare.
inline void sum_digits(const uint8_t* digits, const FsqChannel* channel, int64_t channels, int64_t tokens,
                       int32_t* indices) {
  for (int64_t t = 0; t < tokens; ++t, digits += channels) {
    uint32_t sum = 0;
    for (int64_t c = 0; c < channels; ++c) sum += digits[c] * channel[c].basis;
    indices[t] = static_cast<int32_t>(sum);
  }
}

template <typename T>
void mark_nan_tokens(const T* z, int64_t channels, int64_t tokens, int32_t* indices) {
  for (int64_t e = 0; e < tokens * channels; ++e) {
    if (to_float(z[e]) != to_float(z[e])) indices[e / channels] = kFsqNanIndex;
  }
}

template <typename T>
void interleaved(const FsqFwdParams& p, int depth) {
  using A = accumulate_t<T>;
  const TokenLayout& layout = p.layout;
  const RunTables<A> tables(p, depth);
  const auto run = quantize_run_of<T>(depth, tables.form);
  const int64_t channels = layout.channels, per_outer = layout.inner * layout.codebooks;
  const PackedIndex packed(p.channel, static_cast<int>(std::min<int64_t>(channels, kPackedChannels)));
  const int64_t block = kRunBlock / channels / kRunTokens * kRunTokens, blocks = (per_outer + block - 1) / block;
  const int64_t grain = std::max<int64_t>(1, kFsqForwardGrain / (block * channels));
  parallel_for(0, layout.outer * blocks, grain, [&](int64_t begin, int64_t end) {
    uint8_t digits[kRunBlock + 64];
#if !defined(__AVX512F__)
    Int<A> wide[kRunBlock];
#endif
    T padded[2][kRunTokens * kFsqMaxChannels] = {};
    // whole runs of tokens
    const auto quantize = [&](const T* z, T* codes, int32_t* indices, int64_t tokens) {
#if defined(__AVX512F__)
      const bool has_nan = run(z, codes, indices == nullptr ? nullptr : digits, tokens * channels, tables);
      if (indices == nullptr) return;
#else
      const bool has_nan = run(z, codes, indices == nullptr ? nullptr : wide, tokens * channels, tables);
      if (indices == nullptr) return;
      for (int64_t e = 0; e < tokens * channels; ++e) digits[e] = static_cast<uint8_t>(wide[e]);
#endif
      if (channels <= kPackedChannels) {
        packed(digits, tokens, indices);
      } else {
        sum_digits(digits, p.channel, channels, tokens, indices);
      }
      if (has_nan) mark_nan_tokens(z, channels, tokens, indices);
    };
    for (int64_t task = begin; task < end; ++task) {
      const int64_t outer = task / blocks, first = task % blocks * block;
      const int64_t tokens = std::min(block, per_outer - first), whole = tokens / kRunTokens * kRunTokens;
      const T* z = static_cast<const T*>(p.z) + outer * layout.operand[0].outer + first * channels;
      T* codes =
          p.codes == nullptr ? nullptr : static_cast<T*>(p.codes) + outer * layout.operand[1].outer + first * channels;
      int32_t* indices = p.indices == nullptr ? nullptr : p.indices + outer * per_outer + first;
      if (whole > 0) quantize(z, codes, indices, whole);
      const int64_t rest = tokens - whole;
      if (rest == 0) continue;
      int32_t last[kRunTokens];
      std::copy_n(z + whole * channels, rest * channels, padded[0]);
      quantize(padded[0], codes == nullptr ? nullptr : padded[1], indices == nullptr ? nullptr : last, kRunTokens);
      if (codes != nullptr) std::copy_n(padded[1], rest * channels, codes + whole * channels);
      if (indices != nullptr) std::copy_n(last, rest, indices + whole);
    }
  });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
