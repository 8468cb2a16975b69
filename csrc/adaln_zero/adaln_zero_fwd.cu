// SPDX-License-Identifier: Apache-2.0
#include "adaln_zero/adaln_zero_cuda.h"

namespace vidkernels {
namespace adaln {
namespace {

enum class Mode { modulate, gate, chain };

// What is kept of the current row of modulation, by mode.
constexpr int kept_of(Mode mode) { return mode == Mode::modulate ? 2 : (mode == Mode::gate ? 1 : 3); }
template <int N, int C, Mode mode>
using KeptRow = Kept<kept_of(mode), N, C>;
constexpr int kept_a = 0, kept_s = 1;
constexpr int kept_gate(Mode mode) { return mode == Mode::gate ? 0 : 2; }

template <int N, int C, Mode mode>
__device__ void read_modulation(const ForwardParams& p, int64_t row, const Place& place,
                                const KeptRow<N, C, mode>& kept) {
#pragma unroll 1
  for (int j = 0; j < C / N; ++j) {
    if (!place.holds<N>(j)) continue;
    const int column = place.column<N>(j);
    float buffer[N];
    if (mode != Mode::gate) {
      read_factor<N>(p.scale, p.weight, row, column, buffer);
      kept.put(kept_a, j, buffer);
      read_offset<N>(p.scale, p.shift, p.bias, row, column, buffer);
      kept.put(kept_s, j, buffer);
    }
    if (mode != Mode::modulate) {
      read_table<N>(p.gate, row, column, 1.0f, buffer);
      kept.put(kept_gate(mode), j, buffer);
    }
  }
}

// A warp's sum, the mean of its values, the sum of squares about that, and how many values it has. Warps are combined
// about the common mean, so one barrier a row suffices and a large common offset costs no digits.
struct alignas(16) Moments {
  float sum, mean, squares, count;
};

struct Statistics {
  float mean, rstd;
};

// Values of a row that its warp `warp` holds, V vectors of N a thread.
template <int N, int V>
__device__ int held_by_warp(const Place& place, int warp) {
  const int width = place.lanes < 32 ? place.lanes : 32, vectors = place.channels / N;
  int held = 0;
  for (int j = 0; j < V && warp * width < place.lanes; ++j) {
    const int left = vectors - j * place.lanes - warp * width;
    held += left < 0 ? 0 : (left < width ? left : width);
  }
  return held * N;
}

// Statistics of a row held by `lanes` threads. Inverses are taken once a kernel: with ten quotients a row the kernel
// took 382 us for 5120 channels on an H100, where a copy takes 222.
template <typename T, int N, int V>
struct RowStatistics {
  const Place& place;
  Moments (*shared)[max_warps];
  int held;                        // of the thread's V vectors, the first that lie within the row
  float inverse, inverse_of_warp;  // of how many values the row and this thread's warp hold

  __device__ RowStatistics(const Place& where, Moments (*moments)[max_warps])
      : place(where), shared(moments), held(0), inverse(1.0f / static_cast<float>(where.channels)) {
    const int warp = place.lanes > 32 ? place.lane / 32 : 0;
    const auto count = static_cast<float>(held_by_warp<N, V>(place, warp));
    inverse_of_warp = count > 0.0f ? 1.0f / count : 0.0f;
#pragma unroll
    for (int j = 0; j < V; ++j) held += place.holds<N>(j) ? 1 : 0;
    if (threadIdx.x % 32 == 0) shared[0][warp].count = shared[1][warp].count = count;
  }

  // f of every value; a row is kept packed and widened where it is used, which costs an instruction and saves
  // registers.
  template <typename F>
  __device__ void each(const Part<T, N, V>& x, const F& f) const {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (j >= held) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) f(cuda::widen(x.vector[j].value[i]));
    }
  }

  // sum / channels as it would be rounded, but for ties.
  __device__ float mean_of(float sum) const {
    const float guess = sum * inverse;
    return fmaf(fmaf(-guess, static_cast<float>(place.channels), sum), inverse, guess);
  }

  // Takes the two halves of `shared` in turn, so that one barrier keeps a row's writers from its readers, and the next
  // row's writers from this row's readers.
  __device__ Statistics of_row(const Part<T, N, V>& x, int turn, const ForwardParams& p) const {
    if (p.norm == Norm::none) return {0.0f, 1.0f};
    float sum = 0, squares = 0;
    if (p.norm == Norm::layer) {
      each(x, [&](float value) { sum += value; });
      sum = lanes_sum(sum, place.lanes);
    }
    const float mean = sum * inverse_of_warp;
    each(x, [&](float value) { squares += (value - mean) * (value - mean); });
    squares = lanes_sum(squares, place.lanes);
    if (place.lanes > 32) {
      Moments& own = shared[turn][threadIdx.x / 32];
      if (threadIdx.x % 32 == 0) own.sum = sum, own.mean = mean, own.squares = squares;
      __syncthreads();
      // each lane takes one warp's, so that the number of warps costs no time
      const int warp = static_cast<int>(threadIdx.x) % max_warps;
      const Moments part = 32 * warp < place.lanes ? shared[turn][warp] : Moments{0.0f, 0.0f, 0.0f, 0.0f};
      sum = lanes_sum(part.sum, max_warps);
      const float distance = part.mean - sum * inverse;
      squares = lanes_sum(fmaf(part.count * distance, distance, part.squares), max_warps);
    }
    return {mean_of(sum), cuda::inverse_root(squares * inverse + static_cast<float>(p.eps))};
  }
};

// x becomes hidden = x + gate * branch, rounded as stored: that is what the norm reads.
template <typename T, int N, int C, Mode mode>
__device__ void residual_step(Part<T, N, C / N>& x, const Part<T, N, C / N>& branch, const KeptRow<N, C, mode>& kept,
                              void* hidden, int64_t token, bool active, const Place& place) {
#pragma unroll
  for (int j = 0; j < C / N; ++j) {
    float gate[N];
    kept.get(kept_gate(mode), j, gate);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float sum = fmaf(gate[i], cuda::widen(branch.vector[j].value[i]), cuda::widen(x.vector[j].value[i]));
      x.vector[j].value[i] = cuda::narrow<T>(sum);
    }
    if (active && place.holds<N>(j)) store_vector<T, N>(hidden, token, place.column<N>(j), place.channels, x.vector[j]);
  }
}

template <typename T, int N, int C, Mode mode>
__device__ void modulate_step(const Part<T, N, C / N>& x, const KeptRow<N, C, mode>& kept, Statistics statistics,
                              const ForwardParams& p, int64_t token, const Place& place) {
  if (place.lane == 0 && p.mean != nullptr) static_cast<float*>(p.mean)[token] = statistics.mean;
  if (place.lane == 0 && p.rstd != nullptr) static_cast<float*>(p.rstd)[token] = statistics.rstd;
#pragma unroll
  for (int j = 0; j < C / N; ++j) {
    if (!place.holds<N>(j)) continue;
    float a[N], s[N];
    kept.get(kept_a, j, a);
    kept.get(kept_s, j, s);
    cuda::Pack<T, N> out;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float xhat = (cuda::widen(x.vector[j].value[i]) - statistics.mean) * statistics.rstd;
      out.value[i] = cuda::narrow<T>(fmaf(xhat, a[i], s[i]));
    }
    store_vector<T, N>(p.y, token, place.column<N>(j), place.channels, out);
  }
}

// Rows of x and branch on their way, two tokens deep; unstaged, they are loaded when they are needed.
template <typename T, int N, int C, Mode mode, bool staged>
struct Source {
  static constexpr int tensors = mode == Mode::modulate ? 1 : 2;
  Stage<T, N, C / N> stage;

  __host__ __device__ static size_t shared_bytes(int threads) {
    return staged ? Stage<T, N, C / N>::shared_bytes(2 * tensors, threads) : 0;
  }

  __device__ void request(const ForwardParams& p, int64_t token, int turn, bool wanted, const Place& place) const {
    if (!staged) return;
    if (wanted) {
      stage.copy(turn * tensors, p.x, token, place);
      if (mode != Mode::modulate) stage.copy(turn * tensors + 1, p.branch, token, place);
    }
    commit_copies();
  }

  __device__ void receive(const ForwardParams& p, int64_t token, int turn, bool active, const Place& place,
                          Part<T, N, C / N>& x, Part<T, N, C / N>& branch) const {
    if (!staged) {
      if (active) load_part(x, p.x, token, place);
      if (active && mode != Mode::modulate) load_part(branch, p.branch, token, place);
      return;
    }
    await_copies<1>();
#pragma unroll
    for (int j = 0; j < C / N; ++j) {
      x.vector[j] = *stage.place(turn * tensors, j);
      if (mode != Mode::modulate) branch.vector[j] = *stage.place(turn * tensors + 1, j);
    }
  }
};

// Modulation alone has half the bytes of the chain under way in a block: three blocks of 320 threads want 64 registers.
constexpr int bound_of(int vector, Mode mode, bool staged) {
  return vector == 1 ? max_threads : (staged && mode == Mode::modulate ? 1024 : bound_threads);
}

template <typename T, int N, int C, Mode mode, bool staged>
__global__ void __launch_bounds__(bound_of(N, mode, staged), 1)
    forward_kernel(const ForwardParams p, const Shape shape, const int64_t chunk) {
  __shared__ Moments shared[2][max_warps];
  VK_DYNAMIC_SHARED(unsigned char, storage);
  const Place place{static_cast<int>(threadIdx.x) % shape.lanes, shape.lanes, static_cast<int>(p.channels)};
  const int64_t first = static_cast<int64_t>(blockIdx.x) * shape.rows + threadIdx.x / shape.lanes;
  const int64_t all = static_cast<int64_t>(gridDim.x) * shape.rows;
  const Run run = chunk > 0 ? Run(shape, first, chunk, p.tokens) : Run::striding(shape, first, all, p.tokens);
  const Source<T, N, C, mode, staged> source{{storage}};
  const KeptRow<N, C, mode> kept{reinterpret_cast<float*>(storage + source.shared_bytes(static_cast<int>(blockDim.x)))};

  const RowStatistics<T, N, C / N> statistics(place, shared);

  source.request(p, run.begin, 0, run.length > 0, place);
  int64_t stop = 0;
  int64_t token = run.begin;
  for (int step = 0; step < run.steps; ++step, token += run.stride) {
    const bool active = step < run.length;
    source.request(p, token + run.stride, (step + 1) & 1, step + 1 < run.length, place);
    if (active && token >= stop) {
      const int64_t row = row_of(p.rows, token);
      stop = run_end(p.rows, token, row, p.tokens);
      read_modulation<N, C, mode>(p, row, place, kept);
    }
    Part<T, N, C / N> x, branch;
    source.receive(p, token, step & 1, active, place, x, branch);
    if (mode != Mode::modulate) residual_step<T, N, C, mode>(x, branch, kept, p.hidden, token, active, place);
    if (mode == Mode::gate) continue;
    const Statistics of_row = statistics.of_row(x, step & 1, p);
    if (active) modulate_step<T, N, C, mode>(x, kept, of_row, p, token, place);
  }
}

template <typename T, int N, int C, Mode mode, bool staged>
size_t shared_bytes(int threads) {
  return Source<T, N, C, mode, staged>::shared_bytes(threads) + KeptRow<N, C, mode>::shared_bytes(threads);
}

template <typename T, int N, int C, Mode mode, bool staged>
void launch_kernel(const ForwardParams& p, const Shape& shape, cudaStream_t stream) {
  constexpr auto kernel = forward_kernel<T, N, C, mode, staged>;
  const int threads = shape.threads();
  const size_t bytes = shared_bytes<T, N, C, mode, staged>(threads);
  allow_shared<kernel>(bytes);
  // One wave: a block keeps its row of modulation over as many tokens as the device leaves to it. With few such rows it
  // takes every n-th token, so that all blocks sweep memory together, which DRAM serves faster than as many places.
  const int64_t rows = static_cast<int64_t>(multiprocessors()) * resident_blocks<kernel>(threads, bytes) * shape.rows;
  const int64_t share = (p.tokens + rows - 1) / rows;
  const bool striding = p.rows.index == nullptr && 4 * p.rows.count <= share;
  const int64_t chunk = striding ? 0 : share, per_block = share * shape.rows;
  const auto blocks = static_cast<unsigned>(striding ? rows / shape.rows : (p.tokens + per_block - 1) / per_block);
  VK_LAUNCH((kernel), blocks, threads, bytes, stream)(p, shape, chunk);
  VK_CUDA_CHECK_LAUNCH();
}

template <typename T, int N, int C, Mode mode>
void launch_mode(const ForwardParams& p, const Shape& shape, cudaStream_t stream) {
  constexpr bool can_stage = N > 1;
  if (can_stage && shared_bytes<T, N, C, mode, can_stage>(shape.threads()) + 1024 <= largest_block_shared()) {
    return launch_kernel<T, N, C, mode, can_stage>(p, shape, stream);
  }
  launch_kernel<T, N, C, mode, false>(p, shape, stream);
}

template <typename T, int N, int C>
void launch_columns(const ForwardParams& p, const Shape& shape, cudaStream_t stream) {
  if (p.y == nullptr) return launch_mode<T, N, C, Mode::gate>(p, shape, stream);
  if (p.branch == nullptr) return launch_mode<T, N, C, Mode::modulate>(p, shape, stream);
  launch_mode<T, N, C, Mode::chain>(p, shape, stream);
}

template <typename T>
void launch(const ForwardParams& p, cudaStream_t stream) {
  const bool aligned = aligned16(p.x) && aligned16(p.branch) && aligned16(p.hidden) && aligned16(p.y);
  const Shape shape = shape_for(p.channels, p.dtype, aligned);
  if (!shape.vectors) return launch_columns<T, 1, 16>(p, shape, stream);
  if (shape.columns == 8) return launch_columns<T, vector_width<T>, 8>(p, shape, stream);
  launch_columns<T, vector_width<T>, 16>(p, shape, stream);
}

}  // namespace

void forward_cuda(const ForwardParams& params, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (params.dtype == DType::float32) return launch<float>(params, on);
  if (params.dtype == DType::bfloat16) return launch<__nv_bfloat16>(params, on);
  launch<__half>(params, on);
}

}  // namespace adaln
}  // namespace vidkernels
