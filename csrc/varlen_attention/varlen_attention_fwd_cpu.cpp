// SPDX-License-Identifier: Apache-2.0
// Forward attention over packed segments: one item is one tile of queries of one head. Scores are kept transposed,
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

template <typename S>
class ForwardWorker {
  using T = accumulate_t<S>;
  using V = Vector<T>;

 public:
  ForwardWorker(const VarlenAttentionFwdParams& params, const WorkList& work)
      : params_(params), shape_(params.shape), work_(work), width_(padded<T>(shape_.head_dim)), arena_(elements()) {
    queries_ = arena_.take(shape_.head_dim * kTileQ);
    rows_ = arena_.take(kTileQ * width_);
    keys_ = arena_.take(kTileK * width_);
    values_ = arena_.take(kTileK * width_);
    weights_ = arena_.take(kTileK * kTileQ);
    out_ = arena_.take(kTileQ * width_);
    maximum_ = arena_.take(kTileQ);
    sum_ = arena_.take(kTileQ);
    correction_ = arena_.take(kTileQ);
  }

  void operator()(int64_t index) {
    const int64_t head = index % shape_.heads_q;
    const WorkList::Item item = work_[index / shape_.heads_q];
    start(item, head);
    const int64_t offset = item.segment.length_k - item.segment.length_q;
    int64_t visible = item.segment.length_k;
    if (shape_.causal) visible = std::min(visible, std::max<int64_t>(item.first_row + item.rows + offset, 0));
    for (int64_t first = 0; first < visible; first += kTileK) {
      const int64_t count = std::min(kTileK, visible - first);
      load_keys(item, head, first, count);
      multiply_blocked<T>(count, columns_, shape_.head_dim, keys_, width_, queries_, weights_);
      // Query r sees the first limit + r keys of this tile.
      const int64_t limit = shape_.causal ? item.first_row + offset - first + 1 : count;
      exponentiate(count, limit);
      add_values(item, count, limit, first == 0);
    }
    finish(item, head, visible > 0);
  }

 private:
  int64_t elements() const {
    const int64_t d = shape_.head_dim;
    return 64 + d * kTileQ + 2 * kTileQ * width_ + 2 * kTileK * width_ + kTileK * kTileQ + 3 * kTileQ + 8 * 16;
  }

  static const S* at(const PackedView& view, int64_t token, int64_t head) {
    return static_cast<const S*>(view.data) + token * view.token_stride + head * view.head_stride;
  }

  void start(const WorkList::Item& item, int64_t head) {
    columns_ = padded<T>(item.rows);
    const S* q = at(params_.q, item.segment.first_q + item.first_row, head);
    pack_rows(q, params_.q.token_stride, item.rows, shape_.head_dim, rows_, width_);
    transpose(rows_, width_, item.rows, shape_.head_dim, sign_of<T>(shape_.scale), queries_, columns_);
    std::fill_n(maximum_, columns_, -std::numeric_limits<T>::infinity());
    std::fill_n(sum_, columns_, T(0));
  }

  void load_keys(const WorkList::Item& item, int64_t head, int64_t first, int64_t count) {
    const int64_t token = item.segment.first_k + first, head_k = head / (shape_.heads_q / shape_.heads_k);
    pack_rows(at(params_.k, token, head_k), params_.k.token_stride, count, shape_.head_dim, keys_, width_);
    pack_rows(at(params_.v, token, head_k), params_.v.token_stride, count, shape_.head_dim, values_, width_);
  }

  // Turns scores into exponentials relative to the running maximum, and updates maximum, sum and correction.
  void exponentiate(int64_t count, int64_t limit) {
    const V lowest = splat(-std::numeric_limits<T>::infinity());
    const V unit = splat(unit_of<T>(shape_.scale));
    hide(count, limit);
    for (int64_t c = 0; c < columns_; c += kLanes<T>) {
      const V before = load(maximum_ + c);
      V highest = before;
      for (int64_t j = 0; j < count; ++j) highest = maximum<T>(highest, load(weights_ + j * columns_ + c));
      const V shift = highest == lowest ? splat(T(0)) : highest;
      V sum = {};
      for (int64_t j = 0; j < count; ++j) {
        const V weight = exp2_vector((load(weights_ + j * columns_ + c) - shift) * unit);
        sum += weight;
        store(weights_ + j * columns_ + c, weight);
      }
      const V correction = exp2_vector((before - shift) * unit);
      store(correction_ + c, correction);
      store(sum_ + c, load(sum_ + c) * correction + sum);
      store(maximum_ + c, highest);
    }
  }

  void hide(int64_t count, int64_t limit) {
    for (int64_t j = std::max<int64_t>(limit, 0); j < count; ++j) {
      const int64_t hidden = std::min(columns_, j - limit + 1);
      std::fill_n(weights_ + j * columns_, hidden, -std::numeric_limits<T>::infinity());
    }
  }

  void add_values(const WorkList::Item& item, int64_t count, int64_t limit, bool first) {
    if (!first) {
      for (int64_t r = 0; r < item.rows; ++r) {
        const V factor = splat(correction_[r]);
        for (int64_t c = 0; c < width_; c += kLanes<T>)
          store(out_ + r * width_ + c, load(out_ + r * width_ + c) * factor);
      }
    }
    if (limit >= count || finite(count)) {
      multiply<T>(item.rows, width_, count, weights_, 1, columns_, values_, width_, out_, width_, !first);
      return;
    }
    // 0 * inf and 0 * NaN are NaN: a hidden key would reach the queries before it.
    for (int64_t r = 0; r < item.rows; ++r) {
      const int64_t seen = std::min(count, std::max<int64_t>(limit + r, 0));
      multiply<T>(1, width_, seen, weights_ + r, 1, columns_, values_, width_, out_ + r * width_, width_, !first);
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

  void finish(const WorkList::Item& item, int64_t head, bool any) {
    const int64_t token = item.segment.first_q + item.first_row, offset = item.segment.length_k - item.segment.length_q;
    S* out = static_cast<S*>(params_.out) + (token * shape_.heads_q + head) * shape_.head_dim;
    T* maximum = static_cast<T*>(params_.stats) + head * shape_.total_q + token;
    T* sum = maximum + shape_.heads_q * shape_.total_q;
    for (int64_t r = 0; r < item.rows; ++r, out += shape_.heads_q * shape_.head_dim) {
      const bool sees = any && !(shape_.causal && item.first_row + r + offset < 0);
      const T inverse = T(1) / sum_[r];
      for (int64_t c = 0; c < shape_.head_dim; ++c)
        out[c] = from_float<S>(sees ? out_[r * width_ + c] * inverse : T(0));
      maximum[r] = sees ? maximum_[r] : -std::numeric_limits<T>::infinity();
      sum[r] = sees ? sum_[r] : T(0);
    }
  }

  const VarlenAttentionFwdParams& params_;
  const VarlenAttentionShape& shape_;
  const WorkList& work_;
  int64_t width_, columns_ = 0;
  Arena<T> arena_;
  T *queries_, *rows_, *keys_, *values_, *weights_, *out_, *maximum_, *sum_, *correction_;
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
  const WorkList work(shape.cu_seqlens_q, shape.cu_seqlens_k, shape.segments, kTileQ, wanted);
  VK_DISPATCH_FLOATING(shape.dtype, [&] {
    for_each_item(work.size() * shape.heads_q, [&] { return ForwardWorker<scalar_t>(params, work); });
  });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
