// SPDX-License-Identifier: Apache-2.0
// Forward attention over packed segments: one item is a few tiles of queries of one head. Scores are kept transposed,
// [keys, queries], so that a vector holds 4-16 queries: maxima, sums and exponentials need no reduction across lanes
// and K and V are read in the layout in which they come. Short segments take narrow tiles and pay for no padding.
#include <limits>

#include "varlen_attention/attention_tiles.h"
#include "varlen_attention/tile_math.h"
#include "varlen_attention/varlen_attention.h"
#include "varlen_attention/work_list.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

constexpr int64_t kTileQ = 64;
constexpr int64_t kTileK = 64;
// Queries of an item, which share the copies of keys and values: with 64 these took 0.4 of the products' time.
constexpr int64_t kMostQ = 512;

template <typename S>
class ForwardWorker {
  using T = accumulate_t<S>;
  using V = Vector<T>;

 public:
  ForwardWorker(const VarlenAttentionFwdParams& params, const WorkList& work, int64_t rows)
      : params_(params),
        shape_(params.shape),
        work_(work),
        width_(padded<T>(shape_.head_dim)),
        arena_(elements((rows + kTileQ - 1) / kTileQ)) {
    rows_ = arena_.take(kTileQ * width_);
    keys_ = arena_.take(kTileK * width_);
    values_ = arena_.take(kTileK * width_);
    weights_ = arena_.take(kTileK * kTileQ);
    correction_ = arena_.take(kTileQ);
    tiles_.resize((rows + kTileQ - 1) / kTileQ);
    for (Tile& tile : tiles_) {
      tile.queries = arena_.take(shape_.head_dim * kTileQ);
      tile.out = arena_.take(kTileQ * width_);
      tile.maximum = arena_.take(kTileQ);
      tile.sum = arena_.take(kTileQ);
    }
  }

  void operator()(int64_t index) {
    const int64_t head = index % shape_.heads_q;
    const WorkList::Item item = work_[index / shape_.heads_q];
    const int64_t offset = item.segment.length_k - item.segment.length_q, tiles = (item.rows + kTileQ - 1) / kTileQ;
    for (int64_t i = 0; i < tiles; ++i) start(item, head, i);
    const int64_t visible = seen_by(item.first_row + item.rows - 1 + offset, item.segment.length_k);
    for (int64_t first = 0; first < visible; first += kTileK) {
      const int64_t count = std::min(kTileK, visible - first);
      load_keys(item, head, first, count);
      for (int64_t i = 0; i < tiles; ++i) {
        Tile& tile = tiles_[i];
        // Query r sees the first limit + r keys.
        const int64_t limit = shape_.causal ? tile.first_row + offset - first + 1 : count;
        const int64_t seen = std::min(count, limit + tile.rows - 1);
        if (seen > 0) attend(tile, seen, limit, first == 0, item.segment, head);
      }
    }
    for (int64_t i = 0; i < tiles; ++i) finish(item.segment, head, tiles_[i]);
  }

 private:
  // Queries that share the registers of a product, and what is known of their sums so far.
  struct Tile {
    T *queries, *out, *maximum, *sum;  // queries transposed, [D, columns]
    int64_t first_row, rows, columns;  // of the segment; columns: rows rounded up to a vector
  };

  int64_t elements(int64_t tiles) const {
    const int64_t tile = (shape_.head_dim + width_ + 2) * kTileQ;
    return 64 + tiles * (tile + 4 * 16) + kTileQ * width_ + 2 * kTileK * width_ + kTileK * kTileQ + kTileQ + 5 * 16;
  }

  // Keys of `length` that the query sees which stands `position` keys behind the first.
  int64_t seen_by(int64_t position, int64_t length) const {
    return shape_.causal ? std::min(length, std::max<int64_t>(position + 1, 0)) : length;
  }

  void attend(Tile& tile, int64_t count, int64_t limit, bool first, const Segment& segment, int64_t head) {
    // The next item is the next head. The rows of a short segment are too short for the hardware to fetch ahead, and
    // still there when it begins; between the products there is nothing else to read from memory.
    const int64_t next = segment.length_k <= kTileK && segment.length_q <= kTileQ ? head + 1 : shape_.heads_q;
    const int64_t head_k = next / (shape_.heads_q / shape_.heads_k);
    multiply_blocked<T>(count, tile.columns, shape_.head_dim, keys_, width_, tile.queries, weights_);
    if (next < shape_.heads_q) fetch(params_.q, segment.first_q, segment.length_q, next);
    exponentiate(tile, count, limit);
    if (next < shape_.heads_q) fetch(params_.k, segment.first_k, segment.length_k, head_k);
    add_values(tile, count, limit, first);
    if (next < shape_.heads_q) fetch(params_.v, segment.first_k, segment.length_k, head_k);
  }

  void fetch(const PackedView& view, int64_t token, int64_t rows, int64_t head) const {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(S));
    for (int64_t r = 0; r < rows; ++r) {
      const S* row = at(view, token + r, head);
      for (int64_t c = 0; c < shape_.head_dim; c += kLine) __builtin_prefetch(row + c);
    }
  }

  static const S* at(const PackedView& view, int64_t token, int64_t head) {
    return static_cast<const S*>(view.data) + token * view.token_stride + head * view.head_stride;
  }

  void start(const WorkList::Item& item, int64_t head, int64_t index) {
    Tile& tile = tiles_[index];
    tile.first_row = item.first_row + index * kTileQ;
    tile.rows = std::min(kTileQ, item.rows - index * kTileQ);
    tile.columns = padded<T>(tile.rows);
    const S* q = at(params_.q, item.segment.first_q + tile.first_row, head);
    pack_rows(q, params_.q.token_stride, tile.rows, shape_.head_dim, rows_, width_);
    transpose(rows_, width_, tile.rows, shape_.head_dim, sign_of<T>(shape_.scale), tile.queries, tile.columns);
    std::fill_n(tile.maximum, tile.columns, -std::numeric_limits<T>::infinity());
    std::fill_n(tile.sum, tile.columns, T(0));
  }

  void load_keys(const WorkList::Item& item, int64_t head, int64_t first, int64_t count) {
    const int64_t token = item.segment.first_k + first, head_k = head / (shape_.heads_q / shape_.heads_k);
    const int64_t d = shape_.head_dim;
    pack_rows(at(params_.k, token, head_k), params_.k.token_stride, count, d, keys_, width_);
    pack_rows(at(params_.v, token, head_k), params_.v.token_stride, count, d, values_, width_);
  }

  // Turns scores into exponentials relative to the running maximum, and updates maximum, sum and correction.
  void exponentiate(Tile& tile, int64_t count, int64_t limit) {
    const V lowest = splat(-std::numeric_limits<T>::infinity());
    const V unit = splat(unit_of<T>(shape_.scale));
    hide(tile.columns, count, limit);
    for (int64_t c = 0; c < tile.columns; c += kLanes<T>) {
      T* weights = weights_ + c;
      const V before = load(tile.maximum + c), highest = highest_score(weights, tile.columns, count, before);
      const V shift = highest == lowest ? splat(T(0)) : highest;
      V sum = {};
      for (int64_t j = 0; j < count; ++j, weights += tile.columns) {
        const V weight = exp2_vector((load(weights) - shift) * unit);
        sum += weight;
        store(weights, weight);
      }
      const V correction = exp2_vector((before - shift) * unit);
      store(correction_ + c, correction);
      store(tile.sum + c, load(tile.sum + c) * correction + sum);
      store(tile.maximum + c, highest);
    }
  }

  // In four chains: one waits for the latency of each maximum.
  static V highest_score(const T* scores, int64_t stride, int64_t count, V before) {
    V highest[4] = {before, before, before, before};
    int64_t j = 0;
    for (; j + 4 <= count; j += 4, scores += 4 * stride) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) highest[i] = maximum<T>(highest[i], load(scores + i * stride));
    }
    for (; j < count; ++j, scores += stride) highest[0] = maximum<T>(highest[0], load(scores));
    return maximum<T>(maximum<T>(highest[0], highest[1]), maximum<T>(highest[2], highest[3]));
  }

  void hide(int64_t columns, int64_t count, int64_t limit) {
    for (int64_t j = std::max<int64_t>(limit, 0); j < count; ++j) {
      const int64_t hidden = std::min(columns, j - limit + 1);
      std::fill_n(weights_ + j * columns, hidden, -std::numeric_limits<T>::infinity());
    }
  }

  void add_values(const Tile& tile, int64_t count, int64_t limit, bool first) {
    for (int64_t r = 0; r < (first ? 0 : tile.rows); ++r) {
      if (correction_[r] == 1) continue;
      const V factor = splat(correction_[r]);
      T* out = tile.out + r * width_;
      for (int64_t c = 0; c < width_; c += kLanes<T>) store(out + c, load(out + c) * factor);
    }
    if (limit >= count || finite(count)) {
      multiply<T>(tile.rows, width_, count, weights_, 1, tile.columns, values_, width_, tile.out, width_, !first);
      return;
    }
    // 0 * inf and 0 * NaN are NaN: a hidden key would reach the queries before it.
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t seen = std::min(count, std::max<int64_t>(limit + r, 0));
      multiply<T>(1, width_, seen, weights_ + r, 1, tile.columns, values_, width_, tile.out + r * width_, width_,
                  !first);
    }
  }

  bool finite(int64_t count) const {
    V probe = {};
    for (int64_t i = 0; i < count * width_; i += kLanes<T>) probe += load(values_ + i) * T(0);
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      if (!(probe[lane] == 0)) return false;
    }
    return true;
  }

  void finish(const Segment& segment, int64_t head, const Tile& tile) {
    const int64_t token = segment.first_q + tile.first_row, offset = segment.length_k - segment.length_q;
    S* out = static_cast<S*>(params_.out) + (token * shape_.heads_q + head) * shape_.head_dim;
    T* maximum = static_cast<T*>(params_.stats) + head * shape_.total_q + token;
    T* sum = maximum + shape_.heads_q * shape_.total_q;
    for (int64_t r = 0; r < tile.rows; ++r, out += shape_.heads_q * shape_.head_dim) {
      const bool sees = seen_by(tile.first_row + r + offset, segment.length_k) > 0;
      write(out, tile.out + r * width_, sees ? T(1) / tile.sum[r] : T(0), sees);
      maximum[r] = sees ? tile.maximum[r] : -std::numeric_limits<T>::infinity();
      sum[r] = sees ? tile.sum[r] : T(0);
    }
  }

  void write(S* to, const T* from, T factor, bool sees) {
    const auto result = [&](int64_t c) { return sees ? load(from + c) * factor : V{}; };
    const int64_t whole = shape_.head_dim / kLanes<T> * kLanes<T>, rest = shape_.head_dim - whole;
    for (int64_t c = 0; c < whole; c += kLanes<T>) store_vec(to + c, result(c));
    if (rest > 0) store_part(to + whole, result(whole), static_cast<int>(rest));
  }

  const VarlenAttentionFwdParams& params_;
  const VarlenAttentionShape& shape_;
  const WorkList& work_;
  int64_t width_;
  Arena<T> arena_;
  std::vector<Tile> tiles_;
  T *rows_, *keys_, *values_, *weights_, *correction_;
};

}  // namespace

void varlen_attention_fwd(const VarlenAttentionFwdParams& params) {
  const VarlenAttentionShape& shape = params.shape;
  if (shape.total_q == 0 || shape.heads_q == 0 || shape.head_dim == 0) return;
#if defined(__AVX512BF16__) && defined(VK_CPU_HAS_AMX)
  const bool tiles = shape.dtype == DType::bfloat16 && cpu_has_tiles();
  if (tiles) attend_by_tiles(params);
  const auto wanted = [&](const Segment& segment) { return !tiles || !fills_tiles(segment); };
#else
  const auto wanted = [](const Segment&) { return true; };
#endif
  const int64_t rows = rows_of_item(shape, kTileQ, kMostQ);
  const WorkList work(shape.cu_seqlens_q, shape.cu_seqlens_k, shape.segments, rows, wanted);
  VK_DISPATCH_FLOATING(shape.dtype, [&] {
    for_each_item(work.size() * shape.heads_q, [&] { return ForwardWorker<scalar_t>(params, work, rows); });
  });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
