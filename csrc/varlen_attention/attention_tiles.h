// SPDX-License-Identifier: Apache-2.0
// Forward attention of bfloat16 by the tile registers of AMX. An item is a block of queries of one head; its keys and
// values are packed 384 at a time for all of the block, as pairs along the product's depth: keys transposed, values two
// rows interleaved. Then 32 queries at a time take scores, exponentials and the product with values in a scratch of
// 50 KB. Sums leave the registers once every 384 keys.
//
// Weights are rounded to bfloat16 for the product, and the denominator is the sum of the rounded ones: equal values
// give exactly themselves. The sum in float32 goes into the stats, since the backward does not round.
#pragma once

#include <limits>

#include "common/amx.h"
#include "common/pairs.h"
#include "common/round_up.h"
#include "varlen_attention/tile_math.h"
#include "varlen_attention/varlen_attention.h"
#include "varlen_attention/work_list.h"

#if defined(__AVX512BF16__) && defined(VK_CPU_HAS_AMX)

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

constexpr int64_t kPairTile = kTileRows * kTileBytes;  // bytes of a tile
constexpr int64_t kStep = 2 * kTileRows;               // terms of a product

// C[16 R, 16 N] (+)= A B over `steps` products. Rows of A lie `a_row` bytes apart, those of C `c_row` values; tiles of
// B are whole, those of one column `b_column` bytes from those of the next.
template <int R, int N>
VK_ALWAYS_INLINE void multiply_tiles(int64_t steps, const char* a, int64_t a_row, const char* b, int64_t b_column,
                                     float* c, int64_t c_row, bool add) {
  float* lower = c + kTileRows * c_row;
  const int64_t stride = c_row * static_cast<int64_t>(sizeof(float));
  if (add) {
    load_sums<R, N>(c, lower, stride);
  } else {
    clear_sums();
  }
  for (int64_t s = 0; s < steps; ++s, a += kTileBytes, b += kPairTile) {
    add_products<R, N>(a, a + kTileRows * a_row, a_row, b, b + b_column, kTileBytes);
  }
  store_sums<R, N>(c, lower, stride);
}

class TileForwardWorker {
  using V = Vec<float>;

 public:
  TileForwardWorker(const VarlenAttentionFwdParams& params, const WorkList& work, int64_t rows)
      : params_(params),
        shape_(params.shape),
        work_(work),
        steps_(round_up(shape_.head_dim, kStep) / kStep),
        columns_(round_up(shape_.head_dim, kTileRows) / kTileRows),
        depth_(steps_ * kStep),
        width_(columns_ * kTileRows),
        exponential_(unit_of<float>(shape_.scale)),
        arena_(bytes(round_up(rows, kRows))) {
    rows = round_up(rows, kRows);
    queries_ = take<bfloat16>(rows * depth_);
    keys_ = arena_.take(kKeys / kTileRows * steps_ * kPairTile);
    values_ = arena_.take(columns_ * kKeySteps * kPairTile);
    scores_ = take<float>(kRows * kScoreRow);
    out_ = take<float>(rows * width_);
    maximum_ = take<float>(rows);
    sum_ = take<float>(rows * kTileRows);
    rounded_sum_ = take<float>(rows * kTileRows);
  }

  void operator()(int64_t index) {
    const int64_t head = index % shape_.heads_q, head_k = head / (shape_.heads_q / shape_.heads_k);
    const WorkList::Item item = work_[index / shape_.heads_q];
    offset_ = item.segment.length_k - item.segment.length_q + item.first_row;
    start(item, head);
    const int64_t visible = seen_by(item.rows - 1, item.segment.length_k);
    for (int64_t first = 0; first < visible; first += kKeys) {
      const int64_t count = std::min(kKeys, item.segment.length_k - first);
      const bfloat16* values = at(params_.v, item.segment.first_k + first, head_k);
      pack_keys(at(params_.k, item.segment.first_k + first, head_k), count);
      const bool finite = pack_values(values, count);
      for (int64_t row = 0; row < item.rows; row += kRows) {
        const Part part{row, std::min(kRows, item.rows - row), first, count,
                        finite || !shape_.causal ? nullptr : values};
        if (part.rows > kTileRows) {
          attend<2>(part);
        } else {
          attend<1>(part);
        }
      }
    }
    finish(item, head);
  }

 private:
  static constexpr int64_t kRows = 2 * kTileRows;
  static constexpr int64_t kKeys = 384;
  static constexpr int64_t kKeySteps = kKeys / kStep;
  // A line more than the keys, or sixteen rows would fall into four sets of the first cache.
  static constexpr int64_t kScoreRow = kKeys + kTileRows;

  // Some queries of the item and some keys of the segment.
  struct Part {
    int64_t row, rows, first, count;
    const bfloat16* not_finite;  // the values, if some of them became 0
  };

  static __mmask32 mask_of(int64_t count) { return count >= 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1; }
  static const bfloat16* at(const PackedView& view, int64_t token, int64_t head) {
    return static_cast<const bfloat16*>(view.data) + token * view.token_stride + head * view.head_stride;
  }

  int64_t bytes(int64_t rows) const {
    const int64_t packed = (kKeys / kTileRows * steps_ + columns_ * kKeySteps) * kPairTile;
    const int64_t floats = kRows * kScoreRow + rows * (width_ + 1 + 2 * kTileRows);
    return packed + rows * depth_ * sizeof(bfloat16) + floats * sizeof(float) + 8 * kTileBytes;
  }
  template <typename T>
  T* take(int64_t elements) {
    return reinterpret_cast<T*>(arena_.take(elements * sizeof(T)));
  }

  // How many of the first `count` keys from the key `first` on this query of the item sees.
  int64_t seen_by(int64_t row, int64_t count, int64_t first = 0) const {
    return shape_.causal ? std::clamp<int64_t>(offset_ + row + 1 - first, 0, count) : count;
  }

  void start(const WorkList::Item& item, int64_t head) {
    const bfloat16* from = at(params_.q, item.segment.first_q + item.first_row, head);
    const float sign = sign_of<float>(shape_.scale);
    const int64_t rows = round_up(item.rows, kRows);
    for (int64_t r = 0; r < rows; ++r, from += params_.q.token_stride) {
      bfloat16* to = queries_ + r * depth_;
      for (int64_t c = 0; c < depth_; c += kStep) {
        const __mmask32 live = r < item.rows ? mask_of(shape_.head_dim - c) : 0;
        _mm512_storeu_si512(to + c, _mm512_maskz_loadu_epi16(live, from + c));
      }
      if (sign == 1) continue;
      for (int64_t c = 0; c < depth_; ++c) to[c] = from_float<bfloat16>(sign * to_float(to[c]));
    }
    std::fill_n(maximum_, rows, -std::numeric_limits<float>::infinity());
    std::fill_n(sum_, rows * kTileRows, 0.0f);
    std::fill_n(rounded_sum_, rows * kTileRows, 0.0f);
  }

  // Rows of one head lie too far apart for the processor to see a pattern: 3 % of the whole with 8 heads of 128.
  static void prefetch_rows(const bfloat16* row, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i, row += stride) __builtin_prefetch(row);
  }

  // Tiles [16 keys][step], rows are pairs along the head dimension.
  void pack_keys(const bfloat16* from, int64_t count) {
    char* to = keys_;
    for (int64_t key = 0; key < round_up(count, kStep); key += kTileRows) {
      for (int64_t c = 0; c < depth_; c += kStep, to += kPairTile) {
        const __mmask32 live = mask_of(shape_.head_dim - c);
        prefetch_rows(from + (key + kStep) * params_.k.token_stride + c, params_.k.token_stride, kTileRows);
        __m512i m[kTileRows];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kTileRows; ++i) {
          m[i] = _mm512_maskz_loadu_epi16(key + i < count ? live : 0, from + (key + i) * params_.k.token_stride + c);
        }
        transpose_pairs(m);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kTileRows; ++i) _mm512_store_si512(to + i * kTileBytes, m[i]);
      }
    }
  }

  // Tiles [16 columns][step], rows are pairs of keys. Returns whether all values are finite; under a causal mask those
  // that are not become 0, since 0 * inf and 0 * NaN would reach the queries before them: `add_not_finite` adds them.
  bool pack_values(const bfloat16* from, int64_t count) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 not_finite = 0;
    for (int64_t key = 0; key < round_up(count, kStep); key += 2) {
      const bfloat16* row = from + key * params_.v.token_stride;
      for (int64_t c = 0; c < width_; c += kStep) {
        prefetch_rows(row + kStep * params_.v.token_stride + c, params_.v.token_stride, 2);
      }
      char* to = values_ + key / 2 * kTileBytes;  // the pair's row, since the tiles of a column follow each other
      for (int64_t c = 0; c < width_; c += kTileRows, to += kKeySteps * kPairTile) {
        const __mmask16 live = static_cast<__mmask16>(mask_of(shape_.head_dim - c));
        const bfloat16* even = key < count ? row + c : nullptr;
        const __m512i pairs = pair_up(even, key + 1 < count ? even + params_.v.token_stride : nullptr, live);
        const __mmask32 beyond = _mm512_cmpeq_epi16_mask(_mm512_and_si512(pairs, exponent), exponent);
        not_finite |= beyond;
        _mm512_store_si512(to, shape_.causal ? _mm512_maskz_mov_epi16(~beyond, pairs) : pairs);
      }
    }
    return not_finite == 0;
  }

  template <int R>
  void attend(const Part& part) {
    const int64_t visible = seen_by(part.row + part.rows - 1, part.count, part.first);
    if (visible == 0) return;
    const int64_t key_steps = round_up(visible, kStep) / kStep;
    const char* queries = reinterpret_cast<const char*>(queries_ + part.row * depth_);
    for (int64_t i = 0; i < key_steps; ++i) {
      multiply_tiles<R, 2>(steps_, queries, depth_ * sizeof(bfloat16), keys_ + 2 * i * steps_ * kPairTile,
                           steps_ * kPairTile, scores_ + i * kStep, kScoreRow, false);
    }
    exponentiate(part, key_steps * kStep);
    add_values<R>(part, key_steps);
    if (part.not_finite != nullptr) add_not_finite(part, visible);
  }

  // Turns scores into weights relative to the running maximum, and updates maximum, sums and what was summed of values.
  void exponentiate(const Part& part, int64_t keys) {
    alignas(64) float highest[kRows], correction[kRows];
    std::fill_n(highest, kRows, -std::numeric_limits<float>::infinity());
    for (int64_t r = 0; r < part.rows; ++r) {
      highest[r] = highest_score(scores_ + r * kScoreRow, seen_by(part.row + r, part.count, part.first));
    }
    for (int64_t r = 0; r < kRows; r += kTileRows) {
      const V lowest = splat(-std::numeric_limits<float>::infinity());
      const V before = load(maximum_ + part.row + r), all = max_of(before, load(highest + r));
      const V shift = all == lowest ? V{} : all;
      store(maximum_ + part.row + r, all);
      store(highest + r, shift);
      store(correction + r, exp2_vector((before - shift) * unit_of<float>(shape_.scale)));
    }
    for (int64_t r = 0; r < part.rows; ++r) {
      const int64_t row = part.row + r;
      if (part.first > 0 && correction[r] != 1) rescale(row, correction[r]);
      weigh(row, scores_ + r * kScoreRow, seen_by(row, part.count, part.first), keys, highest[r]);
    }
  }

  static float highest_score(const float* scores, int64_t seen) {
    V highest = splat(-std::numeric_limits<float>::infinity());
    int64_t j = 0;
    for (; j + kTileRows <= seen; j += kTileRows) highest = max_of(highest, load(scores + j));
    const __m512 all = reinterpret_cast<__m512>(highest);
    return _mm512_reduce_max_ps(
        _mm512_mask_max_ps(all, static_cast<__mmask16>(mask_of(seen - j)), all, _mm512_loadu_ps(scores + j)));
  }

  void rescale(int64_t row, float factor) {
    store(sum_ + row * kTileRows, load(sum_ + row * kTileRows) * factor);
    store(rounded_sum_ + row * kTileRows, load(rounded_sum_ + row * kTileRows) * factor);
    for (int64_t c = row * width_; c < (row + 1) * width_; c += kTileRows) store(out_ + c, load(out_ + c) * factor);
  }

  // Weights take the place of the scores' first half, which have been read by then; those of keys not seen are 0.
  void weigh(int64_t row, float* scores, int64_t seen, int64_t keys, float shift) {
    V even = load(sum_ + row * kTileRows), odd = {};
    __m512 rounded = _mm512_load_ps(rounded_sum_ + row * kTileRows);
    const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
    const auto round = [&](int64_t j, V first, V second) __attribute__((always_inline)) {
      even += first, odd += second;
      const __m512bh pairs = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
      rounded = _mm512_dpbf16_ps(rounded, pairs, ones);
      _mm512_store_si512(scores + j / 2, reinterpret_cast<__m512i>(pairs));
    };
    int64_t j = 0;
    for (; j + kStep <= seen; j += kStep) {
      round(j, exponential_(load(scores + j) - shift), exponential_(load(scores + j + kTileRows) - shift));
    }
    for (; j < keys; j += kStep) {
      const __mmask32 live = mask_of(std::max<int64_t>(seen - j, 0));
      const V first = exponential_(load(scores + j) - shift),
              second = exponential_(load(scores + j + kTileRows) - shift);
      round(j, reinterpret_cast<V>(_mm512_maskz_mov_ps(static_cast<__mmask16>(live), reinterpret_cast<__m512>(first))),
            reinterpret_cast<V>(
                _mm512_maskz_mov_ps(static_cast<__mmask16>(live >> 16), reinterpret_cast<__m512>(second))));
    }
    store(sum_ + row * kTileRows, even + odd);
    _mm512_store_ps(rounded_sum_ + row * kTileRows, rounded);
  }

  template <int R>
  void add_values(const Part& part, int64_t key_steps) {
    const char* weights = reinterpret_cast<const char*>(scores_);
    const int64_t row = kScoreRow * sizeof(float), column = kKeySteps * kPairTile;
    float* out = out_ + part.row * width_;
    int64_t i = 0;
    for (; i + 2 <= columns_; i += 2) {
      multiply_tiles<R, 2>(key_steps, weights, row, values_ + i * column, column, out + i * kTileRows, width_,
                           part.first > 0);
    }
    if (i == columns_) return;
    multiply_tiles<R, 1>(key_steps, weights, row, values_ + i * column, column, out + i * kTileRows, width_,
                         part.first > 0);
  }

  void add_not_finite(const Part& part, int64_t visible) {
    for (int64_t j = 0; j < visible; ++j) {
      for (int64_t c = 0; c < shape_.head_dim; ++c) {
        const float value = to_float(part.not_finite[j * params_.v.token_stride + c]);
        if (std::isfinite(value)) continue;
        for (int64_t r = 0; r < part.rows; ++r) {
          const bfloat16* weights = reinterpret_cast<const bfloat16*>(scores_ + r * kScoreRow);
          const bool sees = j < seen_by(part.row + r, part.count, part.first);
          if (sees) out_[(part.row + r) * width_ + c] += to_float(weights[j]) * value;
        }
      }
    }
  }

  void finish(const WorkList::Item& item, int64_t head) {
    const int64_t token = item.segment.first_q + item.first_row;
    bfloat16* out = static_cast<bfloat16*>(params_.out) + (token * shape_.heads_q + head) * shape_.head_dim;
    float* maximum = static_cast<float*>(params_.stats) + head * shape_.total_q + token;
    float* sum = maximum + shape_.heads_q * shape_.total_q;
    for (int64_t r = 0; r < item.rows; ++r, out += shape_.heads_q * shape_.head_dim) {
      const bool sees = seen_by(r, item.segment.length_k) > 0;
      const V inverse = splat(1 / _mm512_reduce_add_ps(_mm512_load_ps(rounded_sum_ + r * kTileRows)));
      for (int64_t c = 0; c < width_; c += kTileRows) {
        const V result = sees ? load(out_ + r * width_ + c) * inverse : V{};
        _mm256_mask_storeu_epi16(out + c, static_cast<__mmask16>(mask_of(shape_.head_dim - c)),
                                 reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(result))));
      }
      maximum[r] = maximum_[r];
      sum[r] = _mm512_reduce_add_ps(_mm512_load_ps(sum_ + r * kTileRows));
    }
  }

  const VarlenAttentionFwdParams& params_;
  const VarlenAttentionShape& shape_;
  const WorkList& work_;
  int64_t steps_, columns_, depth_, width_, offset_ = 0;
  Exponential exponential_;
  Arena<char> arena_;
  TileScope scope_;
  bfloat16* queries_;
  char *keys_, *values_;
  float *scores_, *out_, *maximum_, *sum_, *rounded_sum_;
};

// Whether tiles are as fast as vectors: 64 segments of 16 tokens, 16 heads of 72 take 1.2 ms by either, 128 of 8 tokens
// 2.1 and 1.6. For one query of 2048 keys they are, too.
inline bool fills_tiles(const Segment& segment) { return segment.length_k > 8; }

inline void attend_by_tiles(const VarlenAttentionFwdParams& params) {
  const VarlenAttentionShape& shape = params.shape;
  const int64_t rows = rows_of_item(shape, 64, 1024);
  const WorkList work(shape.cu_seqlens_q, shape.cu_seqlens_k, shape.segments, rows, fills_tiles);
  for_each_item(work.size() * shape.heads_q, [&] { return TileForwardWorker(params, work, rows); });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels

#endif
