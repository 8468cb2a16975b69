// SPDX-License-Identifier: Apache-2.0
// The steps of the backward kernel for one token and for one row of modulation. Included by adaln_zero_bwd.cu alone.
#pragma once

#include "adaln_zero/adaln_zero_cuda.h"

namespace vidkernels {
namespace adaln {
namespace {

enum class Mode { modulate, gate, chain };

constexpr bool normed(Mode mode) { return mode != Mode::gate; }
constexpr bool gated(Mode mode) { return mode != Mode::modulate; }

// What is kept of the current row of modulation: a and gate; at the row's end the same places hand on its sums.
constexpr int kept_of(Mode mode) { return mode == Mode::gate ? 1 : 2; }
constexpr int kept_a = 0;
constexpr int kept_gate(Mode mode) { return mode == Mode::gate ? 0 : 1; }
template <int N, int C, Mode mode>
using KeptRow = Kept<kept_of(mode), N, C>;

template <int N, int C, Mode mode>
__device__ void read_modulation(const BackwardParams& p, int64_t row, const Place& place,
                                const KeptRow<N, C, mode>& kept) {
#pragma unroll 1
  for (int j = 0; j < C / N; ++j) {
    if (!place.holds<N>(j)) continue;
    float buffer[N];
    if (normed(mode)) {
      read_factor<N>(p.scale, p.weight, row, place.column<N>(j), buffer);
      kept.put(kept_a, j, buffer);
    }
    if (gated(mode)) {
      read_table<N>(p.gate, row, place.column<N>(j), 1.0f, buffer);
      kept.put(kept_gate(mode), j, buffer);
    }
  }
}

// The sums over the tokens of the current row, in registers.
template <int C>
struct Sums {
  float p[C], q[C], g[C];

  __device__ void clear() {
#pragma unroll
    for (int c = 0; c < C; ++c) p[c] = q[c] = g[c] = 0.0f;
  }
};

// dshift and dscale of N columns from a row's complete sums.
template <int N>
__device__ void finish_modulation(const BackwardParams& p, int64_t row, int column, const float (&sum_of_p)[N],
                                  const float (&sum_of_q)[N]) {
  const int channels = static_cast<int>(p.channels);
  write_grad<N>(p.dshift, row, column, channels, sum_of_q);
  if (p.dscale.data == nullptr) return;
  float w[N], b[N];
  read_table<N>(p.weight, 0, column, 1.0f, w);
  read_table<N>(p.bias, 0, column, 0.0f, b);
#pragma unroll
  for (int i = 0; i < N; ++i) w[i] = w[i] * sum_of_p[i] + b[i] * sum_of_q[i];
  write_grad<N>(p.dscale, row, column, channels, w);
}

// N columns of a scratch array: written, or added to what the thread wrote there before.
template <int N, bool add>
__device__ void put_columns(void* base, int64_t row, int column, int channels, const float (&value)[N]) {
  if (base == nullptr) return;
  float* target = static_cast<float*>(base) + row * channels + column;
#pragma unroll
  for (int i = 0; i < N; ++i) target[i] = add ? target[i] + value[i] : value[i];
}

// dweight and dbias of the chunk begin at zero; each run adds to them.
template <int N, int C>
__device__ void clear_affine(const BackwardParams& p, int chunk, const Place& place) {
  const float zero[N] = {};
#pragma unroll 1
  for (int j = 0; j < C / N; ++j) {
    if (!place.holds<N>(j)) continue;
    put_columns<N, false>(p.affine[0], chunk, place.column<N>(j), place.channels, zero);
    put_columns<N, false>(p.affine[1], chunk, place.column<N>(j), place.channels, zero);
  }
}

// One kind of sums from registers, where only constant indices reach, to shared memory.
template <int N, int C, Mode mode>
__device__ void hand_over(const KeptRow<N, C, mode>& kept, int kind, const float (&sums)[C]) {
#pragma unroll
  for (int j = 0; j < C / N; ++j) {
    float buffer[N];
#pragma unroll
    for (int i = 0; i < N; ++i) buffer[i] = sums[j * N + i];
    kept.put(kind, j, buffer);
  }
}

// P and Q of the run that ends: to the gradients at once, or to the piece's slot; and to dweight, dbias of the chunk.
template <int N, int C, Mode mode>
__device__ void end_modulation(const BackwardParams& p, int row, int chunk, const Place& place,
                               const KeptRow<N, C, mode>& kept) {
#pragma unroll 1
  for (int j = 0; j < C / N; ++j) {
    if (!place.holds<N>(j)) continue;
    const int column = place.column<N>(j);
    float of_p[N], of_q[N];
    kept.get(0, j, of_p);
    kept.get(1, j, of_q);
    if (p.direct) {
      finish_modulation<N>(p, row, column, of_p, of_q);
    } else {
      put_columns<N, false>(p.partial[sum_p], slot_of(chunk, row), column, place.channels, of_p);
      put_columns<N, false>(p.partial[sum_q], slot_of(chunk, row), column, place.channels, of_q);
    }
    if (p.affine[0] == nullptr) continue;
    float factor[N];
    read_table<N>(p.scale, row, column, 0.0f, factor);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      of_p[i] *= 1.0f + factor[i];
      of_q[i] *= 1.0f + factor[i];
    }
    put_columns<N, true>(p.affine[0], chunk, column, place.channels, of_p);
    put_columns<N, true>(p.affine[1], chunk, column, place.channels, of_q);
  }
}

// G of the run that ends.
template <int N, int C, Mode mode>
__device__ void end_gate(const BackwardParams& p, int row, int chunk, const Place& place,
                         const KeptRow<N, C, mode>& kept) {
#pragma unroll 1
  for (int j = 0; j < C / N; ++j) {
    if (!place.holds<N>(j)) continue;
    float of_g[N];
    kept.get(0, j, of_g);
    if (p.direct) write_grad<N>(p.dgate, row, place.column<N>(j), place.channels, of_g);
    if (!p.direct)
      put_columns<N, false>(p.partial[sum_g], slot_of(chunk, row), place.column<N>(j), place.channels, of_g);
  }
}

// Hands on the sums of the run that ends; the row of modulation is gone afterwards.
template <int N, int C, Mode mode>
__device__ void end_row(const BackwardParams& p, int row, int chunk, const Place& place,
                        const KeptRow<N, C, mode>& kept, const Sums<C>& sums) {
  if (normed(mode)) {
    hand_over<N, C, mode>(kept, 0, sums.p);
    hand_over<N, C, mode>(kept, 1, sums.q);
    end_modulation<N, C, mode>(p, row, chunk, place, kept);
  }
  if (gated(mode)) {
    hand_over<N, C, mode>(kept, 0, sums.g);
    end_gate<N, C, mode>(p, row, chunk, place, kept);
  }
}

// Where the operands of a token come from. Staged, dy and x are two tokens deep and dhidden and branch one, which is
// asked for as soon as the token before has used it; so a row is always on its way. Unstaged, vectors are loaded where
// they are used and dy and x twice, the second time from a near cache.
template <typename T, int N, int C, Mode mode, bool staged>
struct Source {
  static constexpr int V = C / N;
  // Wide float32 rows would not fit: their dhidden and branch are loaded where they are used.
  static constexpr bool late = !staged || sizeof(T) * C > 32;
  static constexpr int early_tensors = normed(mode) ? 2 : 0;
  static constexpr int late_place = 2 * early_tensors;
  const BackwardParams& p;
  const Place& place;
  Stage<T, N, V> stage;

  __host__ __device__ static size_t shared_bytes(int threads) {
    return staged ? Stage<T, N, V>::shared_bytes(late_place + (late ? 0 : 2), threads) : 0;
  }

  __device__ bool branched() const { return gated(mode) && p.dgate.data != nullptr; }

  __device__ void request_norm(int64_t token, int turn, bool wanted) const {
    if (!staged || !normed(mode)) return;
    if (wanted) {
      stage.copy(turn * early_tensors, p.dy, token, place);
      stage.copy(turn * early_tensors + 1, p.hidden, token, place);
    }
    commit_copies();
  }

  __device__ void request_residual(int64_t token, bool wanted) const {
    if (late) return;
    if (wanted && p.dhidden != nullptr) stage.copy(late_place, p.dhidden, token, place);
    if (wanted && branched()) stage.copy(late_place + 1, p.branch, token, place);
    commit_copies();
  }

  // At the loop's top the groups in flight are, oldest first: this token's dy and x, its dhidden and branch, the next
  // token's dy and x.
  __device__ void await_norm() const {
    if (staged && normed(mode)) await_copies<late ? 1 : 2>();
  }
  __device__ void await_residual() const {
    if (!late) await_copies<normed(mode) ? 1 : 0>();
  }

  __device__ cuda::Pack<T, N> read(const void* base, bool on_stage, int row, int64_t token, int j) const {
    if (on_stage) return *stage.place(row, j);
    return *reinterpret_cast<const cuda::Pack<T, N>*>(static_cast<const T*>(base) + token * place.channels +
                                                      place.column<N>(j));
  }
  __device__ cuda::Pack<T, N> dy(int64_t token, int turn, int j) const {
    return read(p.dy, staged, turn * early_tensors, token, j);
  }
  __device__ cuda::Pack<T, N> x(int64_t token, int turn, int j) const {
    return read(p.hidden, staged, turn * early_tensors + 1, token, j);
  }
  __device__ cuda::Pack<T, N> dhidden(int64_t token, int j) const {
    return read(p.dhidden, !late, late_place, token, j);
  }
  __device__ cuda::Pack<T, N> branch(int64_t token, int j) const {
    return read(p.branch, !late, late_place + 1, token, j);
  }
};

// A token's place and what the norm saved of it.
struct Token {
  int64_t index;
  float mean, rstd;
};

// What the norm saved of the token.
__device__ void read_saved(const BackwardParams& p, Token& token) {
  if (p.norm == Norm::layer) token.mean = static_cast<const float*>(p.mean)[token.index];
  if (p.norm != Norm::none) token.rstd = static_cast<const float*>(p.rstd)[token.index];
}

// sum g and sum g * xhat over the thread's columns, g = dy * a; also adds the token to P and Q.
template <typename T, int N, int C, Mode mode, bool staged>
__device__ float2 norm_sums(const Source<T, N, C, mode, staged>& source, const KeptRow<N, C, mode>& kept,
                            const Token& token, int turn, Sums<C>& sums) {
  float sum_g = 0, sum_gx = 0;
#pragma unroll
  for (int j = 0; j < C / N; ++j) {
    if (!source.place.template holds<N>(j)) continue;
    const cuda::Pack<T, N> dy = source.dy(token.index, turn, j), x = source.x(token.index, turn, j);
    float a[N];
    kept.get(kept_a, j, a);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float d = cuda::widen(dy.value[i]);
      const float xhat = (cuda::widen(x.value[i]) - token.mean) * token.rstd;
      sums.p[j * N + i] = fmaf(d, xhat, sums.p[j * N + i]);
      sums.q[j * N + i] += d;
      sum_g = fmaf(d, a[i], sum_g);
      sum_gx = fmaf(d * a[i], xhat, sum_gx);
    }
  }
  return {sum_g, sum_gx};
}

// What multiplies 1 and x - mean in the norm's derivative, rstd * (g - mean(g) - xhat * mean(g * xhat)), from the sums
// of all threads of the row: -rstd * mean(g) and -rstd^2 * mean(g * xhat). `shared` is used in turn, as in the forward;
// each lane takes one warp's sums, so that the number of warps costs no time.
__device__ float2 row_factors(float2 own, float2 (*shared)[max_warps], int turn, float rstd, int lanes,
                              const BackwardParams& p) {
  if (p.norm == Norm::none) return {0.0f, 0.0f};
  own.x = lanes_sum(own.x, lanes);
  own.y = lanes_sum(own.y, lanes);
  if (lanes > 32) {
    if (threadIdx.x % 32 == 0) shared[turn][threadIdx.x / 32] = own;
    __syncthreads();
    const int warp = static_cast<int>(threadIdx.x) % max_warps;
    own = 32 * warp < lanes ? shared[turn][warp] : float2{0.0f, 0.0f};
    own.x = lanes_sum(own.x, max_warps);
    own.y = lanes_sum(own.y, max_warps);
  }
  const float factor = -__fdividef(rstd, static_cast<float>(p.channels));
  return {p.norm == Norm::layer ? own.x * factor : 0.0f, own.y * factor * rstd};
}

// The gradient at hidden in N columns: dhidden plus what comes through the norm.
template <typename T, int N, int C, Mode mode, bool staged>
__device__ void hidden_gradient(const Source<T, N, C, mode, staged>& source, const KeptRow<N, C, mode>& kept,
                                const Token& token, int turn, float2 factors, int j, float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) d[i] = 0.0f;
  if (source.p.dhidden != nullptr) {
    const cuda::Pack<T, N> dhidden = source.dhidden(token.index, j);
#pragma unroll
    for (int i = 0; i < N; ++i) d[i] = cuda::widen(dhidden.value[i]);
  }
  if (!normed(mode)) return;
  const cuda::Pack<T, N> dy = source.dy(token.index, turn, j), x = source.x(token.index, turn, j);
  float a[N];
  kept.get(kept_a, j, a);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float g = fmaf(cuda::widen(dy.value[i]) * a[i], token.rstd, factors.x);
    d[i] += fmaf(cuda::widen(x.value[i]) - token.mean, factors.y, g);
  }
}

// dx = d, dbranch = gate * d, and G += d * branch.
template <typename T, int N, int C, Mode mode, bool staged>
__device__ void write_token(const Source<T, N, C, mode, staged>& source, const KeptRow<N, C, mode>& kept,
                            const Token& token, int turn, float2 factors, Sums<C>& sums) {
  const BackwardParams& p = source.p;
#pragma unroll
  for (int j = 0; j < C / N; ++j) {
    if (!source.place.template holds<N>(j)) continue;
    float d[N];
    hidden_gradient<T, N, C, mode, staged>(source, kept, token, turn, factors, j, d);
    const int column = source.place.template column<N>(j);
    cuda::Pack<T, N> out;
    if (p.dx != nullptr) {
#pragma unroll
      for (int i = 0; i < N; ++i) out.value[i] = cuda::narrow<T>(d[i]);
      store_vector<T, N>(p.dx, token.index, column, source.place.channels, out);
    }
    if (source.branched()) {
      const cuda::Pack<T, N> branch = source.branch(token.index, j);
#pragma unroll
      for (int i = 0; i < N; ++i) sums.g[j * N + i] = fmaf(d[i], cuda::widen(branch.value[i]), sums.g[j * N + i]);
    }
    if (gated(mode) && p.dbranch != nullptr) {
      float gate[N];
      kept.get(kept_gate(mode), j, gate);
#pragma unroll
      for (int i = 0; i < N; ++i) out.value[i] = cuda::narrow<T>(d[i] * gate[i]);
      store_vector<T, N>(p.dbranch, token.index, column, source.place.channels, out);
    }
  }
}

}  // namespace
}  // namespace adaln
}  // namespace vidkernels
