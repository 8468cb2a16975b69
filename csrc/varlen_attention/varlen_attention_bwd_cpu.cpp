// SPDX-License-Identifier: Apache-2.0
// Backward attention over packed segments: one item is one segment and one key head, so that gradients of K and V are
// summed by one thread, in one order. Five products per tile; weights are computed again, from the maximum and the sum
// that the forward saved of each row.
#include <limits>

#include "varlen_attention/tile_math.h"
#include "varlen_attention/varlen_attention.h"
#include "varlen_attention/work_list.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

constexpr int64_t kTileQ = 64;
constexpr int64_t kTileK = 64;

template <typename S>
class BackwardWorker {
  using T = accumulate_t<S>;
  using V = Vector<T>;

 public:
  BackwardWorker(const VarlenAttentionBwdParams& params, const WorkList& work)
      : params_(params), shape_(params.shape), work_(work), width_(padded<T>(shape_.head_dim)), arena_(elements()) {
    queries_ = take_tile(kTileQ);
    grads_ = take_tile(kTileQ);
    outs_ = take_tile(kTileQ);
    keys_ = take_tile(kTileK);
    values_ = take_tile(kTileK);
    grad_queries_ = take_tile(kTileQ);
    queries_t_ = take_tile(kTileQ);
    grads_t_ = take_tile(kTileQ);
    weights_ = arena_.take(kTileK * kTileQ);
    grad_scores_ = arena_.take(kTileK * kTileQ);
    shift_ = arena_.take(kTileQ);
    factor_ = arena_.take(kTileQ);
    delta_ = arena_.take(kTileQ);
    grad_keys_ = arena_.take(work_.max_length_k() * width_);
    grad_values_ = arena_.take(work_.max_length_k() * width_);
  }

  void operator()(int64_t index) {
    const int64_t head_k = index % shape_.heads_k, group = shape_.heads_q / shape_.heads_k;
    const Segment segment = work_[index / shape_.heads_k].segment;
    const bool wants_keys = params_.grad_k != nullptr;
    if (wants_keys) std::fill_n(grad_keys_, segment.length_k * width_, T(0));
    if (wants_keys) std::fill_n(grad_values_, segment.length_k * width_, T(0));
    for (int64_t head = head_k * group; head < (head_k + 1) * group; ++head) {
      for (int64_t first = 0; first < segment.length_q; first += kTileQ) query_tile(segment, first, head, head_k);
    }
    if (!wants_keys) return;
    write(params_.grad_k, segment.first_k, segment.length_k, shape_.heads_k, head_k, grad_keys_, T(shape_.scale));
    write(params_.grad_v, segment.first_k, segment.length_k, shape_.heads_k, head_k, grad_values_, T(1));
  }

 private:
  int64_t elements() const {
    const int64_t tile = Arena<T>::rounded(kTileQ * width_);
    return 8 * tile + 2 * kTileK * kTileQ + 3 * kTileQ + 2 * Arena<T>::rounded(work_.max_length_k() * width_) + 64;
  }

  T* take_tile(int64_t rows) { return arena_.take(rows * width_); }

  static const S* at(const PackedView& view, int64_t token, int64_t head) {
    return static_cast<const S*>(view.data) + token * view.token_stride + head * view.head_stride;
  }

  void query_tile(const Segment& segment, int64_t first, int64_t head, int64_t head_k) {
    const int64_t rows = std::min(kTileQ, segment.length_q - first), offset = segment.length_k - segment.length_q;
    int64_t visible = segment.length_k;
    if (shape_.causal) visible = std::min(visible, std::max<int64_t>(first + rows + offset, 0));
    load_queries(segment.first_q + first, rows, head);
    const bool wants_queries = params_.grad_q != nullptr;
    if (wants_queries) std::fill_n(grad_queries_, rows * width_, T(0));
    for (int64_t start = 0; start < visible; start += kTileK) {
      const int64_t count = std::min(kTileK, visible - start), d = shape_.head_dim, c = columns_;
      load_keys(segment.first_k + start, count, head_k);
      multiply_blocked<T>(count, c, d, keys_, width_, queries_t_, weights_);
      multiply_blocked<T>(count, c, d, values_, width_, grads_t_, grad_scores_);
      differentiate(count, shape_.causal ? first + offset - start + 1 : count, visible <= kTileK);
      if (params_.grad_k != nullptr) {
        multiply<T>(count, width_, rows, weights_, c, 1, grads_, width_, grad_values_ + start * width_, width_, true);
        multiply<T>(count, width_, rows, grad_scores_, c, 1, queries_, width_, grad_keys_ + start * width_, width_,
                    true);
      }
      if (wants_queries)
        multiply<T>(rows, width_, count, grad_scores_, 1, c, keys_, width_, grad_queries_, width_, true);
    }
    if (wants_queries)
      write(params_.grad_q, segment.first_q + first, rows, shape_.heads_q, head, grad_queries_, T(shape_.scale));
  }

  void load_queries(int64_t token, int64_t rows, int64_t head) {
    const int64_t d = shape_.head_dim;
    columns_ = padded<T>(rows);
    pack_rows(at(params_.q, token, head), params_.q.token_stride, rows, d, queries_, width_);
    pack_rows(at(params_.grad_out, token, head), params_.grad_out.token_stride, rows, d, grads_, width_);
    pack_rows(at(params_.out, token, head), params_.out.token_stride, rows, d, outs_, width_);
    transpose(queries_, width_, rows, d, sign_of<T>(shape_.scale), queries_t_, columns_);
    transpose(grads_, width_, rows, d, T(1), grads_t_, columns_);
    const T* maximum = static_cast<const T*>(params_.stats) + head * shape_.total_q + token;
    const T* total = maximum + shape_.heads_q * shape_.total_q;
    const T infinity = std::numeric_limits<T>::infinity();
    for (int64_t r = 0; r < rows; ++r) {
      V sum = {};
      for (int64_t c = 0; c < width_; c += kLanes<T>)
        sum += load(grads_ + r * width_ + c) * load(outs_ + r * width_ + c);
      delta_[r] = 0;
      for (int lane = 0; lane < kLanes<T>; ++lane) delta_[r] += sum[lane];
      // A query that sees no key has the maximum -inf; +inf makes each of its weights 0.
      shift_[r] = maximum[r] == -infinity && total[r] == 0 ? infinity : maximum[r];
      factor_[r] = total[r] == 0 ? T(1) : T(1) / total[r];
    }
    std::fill(delta_ + rows, delta_ + columns_, T(0));
    std::fill(shift_ + rows, shift_ + columns_, infinity);
    std::fill(factor_ + rows, factor_ + columns_, T(1));
  }

  void load_keys(int64_t token, int64_t count, int64_t head_k) {
    pack_rows(at(params_.k, token, head_k), params_.k.token_stride, count, shape_.head_dim, keys_, width_);
    pack_rows(at(params_.v, token, head_k), params_.v.token_stride, count, shape_.head_dim, values_, width_);
  }

  // weights_: scores -> softmax; grad_scores_: gradient of the softmax -> gradient of the scores (without the scale).
  void differentiate(int64_t count, int64_t limit, bool whole_row) {
    const V unit = splat(unit_of<T>(shape_.scale));
    for (int64_t j = 0; j < count; ++j) {
      T* weights = weights_ + j * columns_;
      for (int64_t c = 0; c < columns_; c += kLanes<T>)
        store(weights + c, exp2_vector((load(weights + c) - load(shift_ + c)) * unit) * load(factor_ + c));
      const int64_t hidden = std::min(columns_, j - limit + 1);  // query r sees the first limit + r keys
      if (hidden > 0) std::fill_n(weights, hidden, T(0));
      if (hidden > 0) std::fill_n(grad_scores_ + j * columns_, hidden, T(0));
    }
    if (whole_row) average(count);
    for (int64_t i = 0; i < count * columns_; i += columns_) {
      for (int64_t c = 0; c < columns_; c += kLanes<T>)
        store(grad_scores_ + i + c, load(weights_ + i + c) * (load(grad_scores_ + i + c) - load(delta_ + c)));
    }
  }

  // delta = sum_j weight_j grad_weight_j where one tile holds the row. It equals grad . out, but the difference above
  // then cancels exactly where one weight is near 1, as it does in softmax's own backward.
  void average(int64_t count) {
    for (int64_t c = 0; c < columns_; c += kLanes<T>) {
      V sum = {};
      for (int64_t i = c; i < count * columns_; i += columns_) sum += load(weights_ + i) * load(grad_scores_ + i);
      store(delta_ + c, sum);
    }
  }

  void write(void* target, int64_t token, int64_t rows, int64_t heads, int64_t head, const T* source, T factor) {
    S* to = static_cast<S*>(target) + (token * heads + head) * shape_.head_dim;
    for (int64_t r = 0; r < rows; ++r, to += heads * shape_.head_dim) {
      for (int64_t c = 0; c < shape_.head_dim; ++c) to[c] = from_float<S>(source[r * width_ + c] * factor);
    }
  }

  const VarlenAttentionBwdParams& params_;
  const VarlenAttentionShape& shape_;
  const WorkList& work_;
  int64_t width_, columns_ = 0;
  Arena<T> arena_;
  T *queries_, *grads_, *outs_, *keys_, *values_, *grad_queries_, *queries_t_, *grads_t_, *weights_, *grad_scores_;
  T *shift_, *factor_, *delta_, *grad_keys_, *grad_values_;
};

}  // namespace

void varlen_attention_bwd(const VarlenAttentionBwdParams& params) {
  const VarlenAttentionShape& shape = params.shape;
  if (shape.segments == 0 || shape.heads_q == 0 || shape.head_dim == 0) return;
  const WorkList work(shape.cu_seqlens_q, shape.cu_seqlens_k, shape.segments, 0);
  VK_DISPATCH_FLOATING(shape.dtype, [&] {
    for_each_item(work.size() * shape.heads_k, [&] { return BackwardWorker<scalar_t>(params, work); });
  });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
