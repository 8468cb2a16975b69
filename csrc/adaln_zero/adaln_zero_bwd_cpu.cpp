// SPDX-License-Identifier: Apache-2.0
#include <initializer_list>

#include "adaln_zero/adaln_zero_cpu.h"

namespace vidkernels {
namespace adaln {
inline namespace VK_CPU_CAPABILITY {
namespace {

// Tokens taken together: each column's sums are loaded and stored once per block, and four rows give enough independent
// additions to hide their latency.
constexpr int block = 4;
// Tokens whose sums are taken in the activations' accumulator before they join the float64 sums: conversion, load and
// store of those would otherwise take a third of the time. The shorter stretch of float32 keeps its error within twice
// that of sums in order, with a margin.
template <typename T>
constexpr int64_t stretch = sizeof(T) == 2 ? 32 : 16;

// What one thread keeps while it walks a chunk: the row of modulation, and the sums that belong to it, of a stretch of
// tokens and, since a row may collect thousands of tokens, in float64 of all of them.
template <typename A>
struct Work {
  explicit Work(int64_t channels) : rows(6 * channels), sums(5 * channels) {
    factor = rows.data();
    a = factor + channels;
    gate = a + channels;
    near = gate + channels;
    p = sums.data();
    q = p + channels;
    g = q + channels;
    dweight = g + channels;
    dbias = dweight + channels;
  }
  const Buffer<A> rows;
  const Buffer<double> sums;
  A *factor, *a, *gate, *near;
  double *p, *q, *g, *dweight, *dbias;
};

template <typename A, typename V, typename Extent>
VK_ALWAYS_INLINE void add_to(A* target, V value, Extent extent) {
  store(target, load(target, extent) + value, extent);
}

// One block of tokens: rows of the operands, null where absent, and each token's statistics.
template <typename T, int K>
struct Tokens {
  using A = accumulate_t<T>;
  const T *dhidden[K], *dy[K], *x[K], *branch[K];
  T *dx[K], *dbranch[K];
  Vec<A> mean[K], rstd[K], offset[K], slope[K];

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
      offset[k] = slope[k] = Vec<A>{};
    }
  }
};

// Which operands and results a call has. The common calls have theirs at compile time, since a choice per vector costs
// a third of the time of gate_residual's backward.
struct Wanted {
  bool normed, dhidden, dx, dbranch, gated;

  explicit Wanted(const BackwardParams& p)
      : normed(p.dy != nullptr),
        dhidden(p.dhidden != nullptr),
        dx(p.dx != nullptr),
        dbranch(p.dbranch != nullptr),
        gated(p.dgate.data != nullptr) {}
};
struct ModulateWanted {
  static constexpr bool normed = true, dhidden = false, dx = true, dbranch = false, gated = false;
};
struct GateWanted {
  static constexpr bool normed = false, dhidden = true, dx = false, dbranch = true, gated = true;
};
struct ChainWanted {
  static constexpr bool normed = true, dhidden = true, dx = true, dbranch = true, gated = true;
};
template <typename Static>
bool is(const Wanted& w) {
  return w.normed == Static::normed && w.dhidden == Static::dhidden && w.dx == Static::dx &&
         w.dbranch == Static::dbranch && w.gated == Static::gated;
}

// Adds to P and Q, and sets what the norm's derivative needs of the means of g and g * xhat over the row, g = dy * a:
// the derivative is rstd * g - (x - mean) * slope - offset.
template <typename T, int K, typename W>
void sums_of_rows(const BackwardParams& p, Tokens<T, K>& t, const Work<accumulate_t<T>>& w, W wanted) {
  using A = accumulate_t<T>;
  A *near_p = w.near, *near_q = near_p + p.channels;
  Vec<A> sum_g[K] = {}, sum_gx[K] = {};
  for_row<T>(p.channels, [&](int64_t i, auto extent, int) {
    const auto a = load(w.a + i, extent);
    auto sum_p = all<A>(Vec<A>{}, extent), sum_q = sum_p;
    for (int k = 0; k < K; ++k) {
      if (wanted.dhidden) fetch(t.dhidden[k] + i);
      if (wanted.gated) fetch(t.branch[k] + i);
      if (wanted.dx) fetch_to_write(t.dx[k] + i);
      if (wanted.dbranch) fetch_to_write(t.dbranch[k] + i);
      const auto d = load(t.dy[k] + i, extent);
      const auto xhat =
          keep((load(t.x[k] + i, extent) - all<A>(t.mean[k], extent)) * all<A>(t.rstd[k], extent), extent);
      const auto g = d * a;
      sum_p = sum_p + d * xhat;
      sum_q = sum_q + d;
      accumulate<A>(sum_g[k], g);
      accumulate<A>(sum_gx[k], g * xhat);
    }
    add_to(near_p + i, sum_p, extent);
    add_to(near_q + i, sum_q, extent);
  });
  const double channels = static_cast<double>(p.channels);
  for (int k = 0; k < K; ++k) {
    const Vec<A> rstd = t.rstd[k];
    if (p.norm == Norm::layer) t.offset[k] = rstd * broadcast<A>(static_cast<A>(sum_lanes<A>(sum_g[k]) / channels));
    if (p.norm == Norm::none) continue;
    t.slope[k] = rstd * rstd * broadcast<A>(static_cast<A>(sum_lanes<A>(sum_gx[k]) / channels));
  }
}

// The gradient at hidden, dhidden + rstd * (g - mean(g) - xhat * mean(g * xhat)), and what follows from it.
template <typename T, int K, typename W>
void gradients_of_rows(const BackwardParams& p, const Tokens<T, K>& t, const Work<accumulate_t<T>>& w, W wanted) {
  using A = accumulate_t<T>;
  A* near_g = w.near + 2 * p.channels;
  for_row<T>(p.channels, [&](int64_t i, auto extent, int) {
    const auto nothing = all<A>(Vec<A>{}, extent);
    const auto a = wanted.normed ? load(w.a + i, extent) : nothing;
    const auto gate = wanted.dbranch ? load(w.gate + i, extent) : nothing;
    auto sum_g = nothing;
    for (int k = 0; k < K; ++k) {
      const int64_t later = i + K * p.channels;  // the block after this one, which only a hint may look at
      auto d = wanted.dhidden ? load(t.dhidden[k] + i, extent) : nothing;
      if (wanted.normed) {
        fetch(t.x[k] + later);
        fetch(t.dy[k] + later);
        const auto centred = load(t.x[k] + i, extent) - all<A>(t.mean[k], extent);
        const auto common = centred * all<A>(t.slope[k], extent) + all<A>(t.offset[k], extent);
        const auto inner = load(t.dy[k] + i, extent) * a * all<A>(t.rstd[k], extent) - common;
        d = wanted.dhidden ? d + inner : inner;
      } else {
        if (wanted.dhidden) fetch(t.dhidden[k] + later);
        if (wanted.gated) fetch(t.branch[k] + later);
        if (wanted.dbranch) fetch_to_write(t.dbranch[k] + later);
      }
      if (wanted.dx) store(t.dx[k] + i, d, extent);
      if (wanted.dbranch) store(t.dbranch[k] + i, d * gate, extent);
      if (wanted.gated) sum_g = sum_g + d * load(t.branch[k] + i, extent);
    }
    if (wanted.gated) add_to(near_g + i, sum_g, extent);
  });
}

template <typename T, int K, typename W>
void backward_tokens(const BackwardParams& p, int64_t position, const Work<accumulate_t<T>>& w, W wanted) {
  Tokens<T, K> tokens(p, position);
  if (wanted.normed) sums_of_rows(p, tokens, w, wanted);
  if (wanted.dx || wanted.dbranch || wanted.gated) gradients_of_rows(p, tokens, w, wanted);
}

// A stretch of tokens of one row.
template <typename T>
void backward_stretch(const BackwardParams& p, int64_t position, int64_t stop, const Work<accumulate_t<T>>& w) {
  using A = accumulate_t<T>;
  const int64_t sums = (p.dgate.data != nullptr ? 3 : 2) * p.channels;
  std::memset(w.near, 0, sums * sizeof(A));
  const Wanted wanted(p);
  const auto blocks = [&](auto known) {
    for (; position + block <= stop; position += block) backward_tokens<T, block>(p, position, w, known);
  };
  if (is<ModulateWanted>(wanted)) {
    blocks(ModulateWanted());
  } else if (is<GateWanted>(wanted)) {
    blocks(GateWanted());
  } else if (is<ChainWanted>(wanted)) {
    blocks(ChainWanted());
  } else {
    blocks(wanted);
  }
  for (; position < stop; ++position) backward_tokens<T, 1>(p, position, w, wanted);
  for (int64_t c = 0; c < sums; ++c) w.p[c] += w.near[c];  // and q, g, which follow
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

template <typename T>
void flush(const BackwardParams& params, int64_t row, int64_t chunk, const Work<accumulate_t<T>>& w) {
  using A = accumulate_t<T>;
  const int64_t channels = params.channels;
  for (double* sums : {w.p, w.q, w.g}) arrange_back<T>(sums, channels);
  const bool affine = params.affine[0] != nullptr || params.affine[1] != nullptr;
  for (int64_t c = 0; affine && c < channels; ++c) {
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
    arrange<T>(w.a, channels);
    arrange<T>(w.gate, channels);
    for (; position < stop; position += stretch<T>) {
      backward_stretch<T>(p, position, stop < position + stretch<T> ? stop : position + stretch<T>, w);
    }
    position = stop;
    flush<T>(p, row, chunk, w);
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
