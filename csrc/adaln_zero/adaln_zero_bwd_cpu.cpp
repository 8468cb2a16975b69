// SPDX-License-Identifier: Apache-2.0
#include "adaln_zero/adaln_zero_cpu.h"

namespace vidkernels {
namespace adaln {
inline namespace VK_CPU_CAPABILITY {
namespace {

// Tokens taken together: each column's sums are loaded and stored once per block, and four rows give enough independent
// additions to hide their latency.
constexpr int block = 4;

// What one thread keeps while it walks a chunk: the row of modulation, and the sums that belong to it. The sums are
// float64: a row may collect thousands of tokens, and adding a block's float32 sum to them costs one conversion.
template <typename A>
struct Work {
  explicit Work(int64_t channels) : rows(3 * channels), sums(5 * channels) {
    factor = rows.data();
    a = factor + channels;
    gate = a + channels;
    p = sums.data();
    q = p + channels;
    g = q + channels;
    dweight = g + channels;
    dbias = dweight + channels;
  }
  const Buffer<A> rows;
  const Buffer<double> sums;
  A *factor, *a, *gate;
  double *p, *q, *g, *dweight, *dbias;
};

template <typename Extent>
VK_ALWAYS_INLINE void add_to(double* target, Vec<double> value, Extent extent) {
  store(target, load(target, extent) + value, extent);
}
VK_ALWAYS_INLINE void add_to(double* target, Vec<float> value, Whole) {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  Half halves[2];
  std::memcpy(halves, &value, sizeof(value));
  for (int i = 0; i < 2; ++i) {
    double* to = target + i * kLanes<double>;
    store_vec(to, load_vec(to) + __builtin_convertvector(halves[i], Vec<double>));
  }
}
VK_ALWAYS_INLINE void add_to(double* target, Vec<float> value, Part part) {
  for (int i = 0; i < part.count; ++i) target[i] += static_cast<double>(value[i]);
}

// One block of tokens: rows of the operands, null where absent, and each token's statistics.
template <typename T, int K>
struct Tokens {
  using A = accumulate_t<T>;
  const T *dhidden[K], *dy[K], *x[K], *branch[K];
  T *dx[K], *dbranch[K];
  Vec<A> mean[K], rstd[K], mean_g[K], mean_gx[K];

  Tokens(const BackwardParams& p, int64_t position) {
    for (int k = 0; k < K; ++k) {
      const int64_t token = token_of(p.rows, position + k);
      dhidden[k] = row_at<T>(p.dhidden, token, p.channels);
      dy[k] = row_at<T>(p.dy, token, p.channels);
      x[k] = row_at<T>(p.hidden, token, p.channels);
      branch[k] = row_at<T>(p.branch, token, p.channels);
      dx[k] = row_at<T>(p.dx, token, p.channels);
      dbranch[k] = row_at<T>(p.dbranch, token, p.channels);
      const bool normed = p.dy != nullptr;
      mean[k] = broadcast<A>(normed && p.norm == Norm::layer ? static_cast<const A*>(p.mean)[token] : A(0));
      rstd[k] = broadcast<A>(normed && p.norm != Norm::none ? static_cast<const A*>(p.rstd)[token] : A(1));
      mean_g[k] = mean_gx[k] = Vec<A>{};
    }
  }
};

// Adds to P and Q, and sets the two means that the norm's derivative needs: of g and of g * xhat, g = dy * a.
template <typename T, int K>
void sums_of_rows(const BackwardParams& p, Tokens<T, K>& t, const Work<accumulate_t<T>>& w) {
  using A = accumulate_t<T>;
  Vec<A> sum_g[K] = {}, sum_gx[K] = {};
  for_row<A>(p.channels, [&](int64_t i, auto extent, int) {
    const Vec<A> a = load(w.a + i, extent);
    Vec<A> sum_p = {}, sum_q = {};
    for (int k = 0; k < K; ++k) {
      const Vec<A> d = load(t.dy[k] + i, extent);
      const Vec<A> xhat = keep((load(t.x[k] + i, extent) - t.mean[k]) * t.rstd[k], extent);
      sum_p += d * xhat;
      sum_q += d;
      sum_g[k] += d * a;
      sum_gx[k] += d * a * xhat;
    }
    add_to(w.p + i, sum_p, extent);
    add_to(w.q + i, sum_q, extent);
  });
  const double channels = static_cast<double>(p.channels);
  for (int k = 0; k < K; ++k) {
    if (p.norm == Norm::layer) t.mean_g[k] = broadcast<A>(static_cast<A>(sum_lanes<A>(sum_g[k]) / channels));
    if (p.norm != Norm::none) t.mean_gx[k] = broadcast<A>(static_cast<A>(sum_lanes<A>(sum_gx[k]) / channels));
  }
}

// The gradient at hidden, dhidden + rstd * (g - mean(g) - xhat * mean(g * xhat)), and what follows from it.
template <typename T, int K, bool normed>
void gradients_of_rows(const BackwardParams& p, const Tokens<T, K>& t, const Work<accumulate_t<T>>& w) {
  using A = accumulate_t<T>;
  const bool gated = p.dgate.data != nullptr;
  for_row<A>(p.channels, [&](int64_t i, auto extent, int) {
    const Vec<A> a = load(w.a + i, extent), gate = load(w.gate + i, extent);
    Vec<A> sum_g = {};
    for (int k = 0; k < K; ++k) {
      Vec<A> d = {};
      if (normed) {
        const Vec<A> xhat = (load(t.x[k] + i, extent) - t.mean[k]) * t.rstd[k];
        d = t.rstd[k] * (load(t.dy[k] + i, extent) * a - t.mean_g[k] - xhat * t.mean_gx[k]);
      }
      if (t.dhidden[k] != nullptr) d += load(t.dhidden[k] + i, extent);
      if (t.dx[k] != nullptr) store(t.dx[k] + i, d, extent);
      if (t.dbranch[k] != nullptr) store(t.dbranch[k] + i, d * gate, extent);
      if (gated) sum_g += d * load(t.branch[k] + i, extent);
    }
    if (gated) add_to(w.g + i, sum_g, extent);
  });
}

template <typename T, int K>
void backward_tokens(const BackwardParams& p, int64_t position, const Work<accumulate_t<T>>& w) {
  Tokens<T, K> tokens(p, position);
  if (p.dy == nullptr) return gradients_of_rows<T, K, false>(p, tokens, w);
  sums_of_rows(p, tokens, w);
  if (p.dx != nullptr || p.dbranch != nullptr || p.dgate.data != nullptr) gradients_of_rows<T, K, true>(p, tokens, w);
}

// dshift, dscale and dgate of one row from its complete sums. Overwrites p.
void finish_row(const BackwardParams& params, int64_t row, double* p, const double* q, const double* g) {
  const int64_t channels = params.channels;
  narrow_row(params.dshift, row, channels, q);
  narrow_row(params.dgate, row, channels, g);
  if (params.dscale.data == nullptr) return;
  if (params.weight.data != nullptr)
    for_table<double>(params.weight, 0, channels, [&](int64_t c, double weight) { p[c] *= weight; });
  if (params.bias.data != nullptr)
    for_table<double>(params.bias, 0, channels, [&](int64_t c, double bias) { p[c] += q[c] * bias; });
  narrow_row(params.dscale, row, channels, p);
}

template <typename A>
void flush(const BackwardParams& params, int64_t row, int64_t chunk, const Work<A>& w) {
  const int64_t channels = params.channels;
  for (int64_t c = 0; c < channels; ++c) {
    w.dweight[c] += w.factor[c] * w.p[c];
    w.dbias[c] += w.factor[c] * w.q[c];
  }
  if (params.direct) return finish_row(params, row, w.p, w.q, w.g);
  const double* const sums[3] = {w.p, w.q, w.g};
  for (int k = 0; k < 3; ++k) {
    A* target = row_at<A>(params.partial[k], slot_of(chunk, row), channels);
    for (int64_t c = 0; target != nullptr && c < channels; ++c) target[c] = static_cast<A>(sums[k][c]);
  }
}

template <typename T>
void backward_chunk(const BackwardParams& p, int64_t chunk, const Work<accumulate_t<T>>& w) {
  using A = accumulate_t<T>;
  const int64_t channels = p.channels;
  const int64_t limit = (chunk + 1) * p.chunk, end = limit < p.tokens ? limit : p.tokens;
  std::memset(w.dweight, 0, 2 * channels * sizeof(double));  // and dbias, which follows
  for (int64_t position = chunk * p.chunk; position < end;) {
    const int64_t row = row_of(p.rows, position);
    const int64_t run = run_end(p.rows, position, row, p.tokens), stop = run < end ? run : end;
    fold<A>(w.factor, w.a, nullptr, p.scale, Table{}, p.weight, Table{}, row, channels);
    widen(w.gate, p.gate, row, channels, A(1));
    std::memset(w.p, 0, 3 * channels * sizeof(double));  // and q, g, which follow
    for (; position + block <= stop; position += block) backward_tokens<T, block>(p, position, w);
    for (; position < stop; ++position) backward_tokens<T, 1>(p, position, w);
    flush(p, row, chunk, w);
  }
  const double* const sums[2] = {w.dweight, w.dbias};
  for (int k = 0; k < 2; ++k) {
    A* target = row_at<A>(p.affine[k], chunk, channels);
    for (int64_t c = 0; target != nullptr && c < channels; ++c) target[c] = static_cast<A>(sums[k][c]);
  }
}

// target = sum of the slots [begin, end) of one scratch array, in order.
template <typename A>
void add_slots(const void* source, int64_t begin, int64_t end, int64_t channels, double* target) {
  std::memset(target, 0, channels * sizeof(double));
  if (source == nullptr) return;
  for (int64_t slot = begin; slot < end; ++slot) {
    const A* part = row_at<A>(source, slot, channels);
    for (int64_t c = 0; c < channels; ++c) target[c] += part[c];
  }
}

template <typename A>
void reduce_row(const BackwardParams& p, int64_t row, double* sums) {
  const int64_t begin = row_begin(p.rows, row), end = row_end(p.rows, row, p.tokens);
  const int64_t first = slot_of(begin / p.chunk, row),
                last = end > begin ? slot_of((end - 1) / p.chunk, row) + 1 : first;
  for (int k = 0; k < 3; ++k) add_slots<A>(p.partial[k], first, last, p.channels, sums + k * p.channels);
  finish_row(p, row, sums, sums + p.channels, sums + 2 * p.channels);
}

template <typename T>
void backward(const BackwardParams& p) {
  using A = accumulate_t<T>;
  const int64_t chunks = (p.tokens + p.chunk - 1) / p.chunk;
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    const Work<A> work(p.channels);
    for (int64_t chunk = begin; chunk < end; ++chunk) backward_chunk<T>(p, chunk, work);
  });
  const bool wanted = p.dshift.data != nullptr || p.dscale.data != nullptr || p.dgate.data != nullptr;
  if (wanted && !(p.direct && chunks > 0)) {
    parallel_for(0, p.rows.count, 1, [&](int64_t begin, int64_t end) {
      const Buffer<double> sums(3 * p.channels);
      for (int64_t row = begin; row < end; ++row) reduce_row<A>(p, row, sums.data());
    });
  }
  const Buffer<double> total(p.channels);
  for (int k = 0; k < 2; ++k) {
    const TableGrad& grad = k == 0 ? p.dweight : p.dbias;
    if (grad.data == nullptr) continue;
    add_slots<A>(p.affine[k], 0, chunks, p.channels, total.data());
    narrow_row(grad, 0, p.channels, total.data());
  }
}

}  // namespace
}  // namespace VK_CPU_CAPABILITY
}  // namespace adaln

namespace VK_CPU_CAPABILITY {

void adaln_backward(const adaln::BackwardParams& params) {
  VK_DISPATCH_FLOATING(params.dtype, ([&] { adaln::backward<scalar_t>(params); }));
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
