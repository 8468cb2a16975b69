// SPDX-License-Identifier: Apache-2.0
#include "adaln_zero/adaln_zero_bwd_cuda.h"

namespace vidkernels {
namespace adaln {
namespace {

template <typename T, int N, int C, Mode mode, bool staged>
__global__ void __launch_bounds__(N > 1 && C * sizeof(T) <= 32 ? bound_threads : max_threads, 1)
    backward_kernel(const BackwardParams p, const Shape shape) {
  __shared__ float2 shared[2][max_warps];
  VK_DYNAMIC_SHARED(unsigned char, storage);
  const Place place{static_cast<int>(threadIdx.x) % shape.lanes, shape.lanes, static_cast<int>(p.channels)};
  const Source<T, N, C, mode, staged> source{p, place, {storage}};
  const KeptRow<N, C, mode> kept{reinterpret_cast<float*>(storage + source.shared_bytes(static_cast<int>(blockDim.x)))};
  const int chunk = static_cast<int>(blockIdx.x) * shape.rows + static_cast<int>(threadIdx.x) / shape.lanes;
  const Run run(shape, chunk, p.chunk, p.tokens);

  // A row cannot begin without what was saved of it, so that is read a row ahead, unless a register would be spilled.
  constexpr bool read_ahead = normed(mode) && (mode == Mode::modulate || C == 8);
  Token next{run.length > 0 ? token_of(p.rows, run.begin) : 0, 0.0f, 1.0f};
  if (read_ahead && run.length > 0) read_saved(p, next);
  source.request_norm(next.index, 0, run.length > 0);
  source.request_residual(next.index, run.length > 0);
  if (normed(mode) && p.affine[0] != nullptr && run.length > 0) clear_affine<N, C>(p, chunk, place);
  Sums<C> sums;
  int stop = 0;
  int row = -1;  // rows of modulation and chunks are counted in 32 bits, tokens in 64
  for (int step = 0; step < run.steps; ++step) {
    const bool active = step < run.length, more = step + 1 < run.length;
    const int turn = step & 1;
    Token token = next;
    if (more) next.index = token_of(p.rows, run.begin + step + 1);
    if (read_ahead && more) read_saved(p, next);
    source.request_norm(next.index, turn ^ 1, more);
    if (active && step >= stop) {
      if (row >= 0) end_row<N, C, mode>(p, row, chunk, place, kept, sums);
      row = static_cast<int>(row_of(p.rows, run.begin + step));
      const int64_t end = run_end(p.rows, run.begin + step, row, p.tokens) - run.begin;
      stop = end < run.length ? static_cast<int>(end) : run.length;
      read_modulation<N, C, mode>(p, row, place, kept);
      sums.clear();  // last, so that no register is held through the above
    }
    float2 factors{0.0f, 0.0f};
    if (normed(mode)) {
      if (!read_ahead && active) read_saved(p, token);
      source.await_norm();
      if (active) factors = norm_sums<T, N, C, mode, staged>(source, kept, token, turn, sums);
      factors = row_factors(factors, shared, turn, token.rstd, shape.lanes, p);
    }
    source.await_residual();
    if (active) write_token<T, N, C, mode, staged>(source, kept, token, turn, factors, sums);
    source.request_residual(next.index, more);
  }
  if (row >= 0) end_row<N, C, mode>(p, row, chunk, place, kept, sums);
}

// ---- second stage: sums over slots

constexpr int reduce_columns = 32, reduce_ways = 16;

// Sum of the slots [first, last) in one column, in float64, since up to two thousand blocks have a slot; every way
// takes each 16th slot, then the ways are added in order.
__device__ float sum_slots(const void* source, int64_t first, int64_t last, int column, int channels,
                           double (*shared)[reduce_columns]) {
  double sum = 0;
  if (source != nullptr && column < channels) {
    const float* values = static_cast<const float*>(source) + column;
#pragma unroll 4
    for (int64_t slot = first + threadIdx.y; slot < last; slot += reduce_ways) sum += values[slot * channels];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int way = 0; way < reduce_ways; ++way) sum += shared[way][threadIdx.x];
  __syncthreads();
  return static_cast<float>(sum);
}

__global__ void __launch_bounds__(reduce_columns* reduce_ways) reduce_rows_kernel(const BackwardParams p) {
  __shared__ double shared[reduce_ways][reduce_columns];
  const int column = static_cast<int>(blockIdx.x) * reduce_columns + static_cast<int>(threadIdx.x);
  const int channels = static_cast<int>(p.channels);
  for (int64_t row = blockIdx.y; row < p.rows.count; row += gridDim.y) {
    int64_t begin = row_begin(p.rows, row), end = row_end(p.rows, row, p.tokens);
    begin = begin < 0 ? 0 : begin;
    end = end > p.tokens ? p.tokens : end;
    const int64_t first = slot_of(begin / p.chunk, row);
    const int64_t last = end > begin ? slot_of((end - 1) / p.chunk, row) + 1 : first;
    float sums[3][1];
    for (int k = 0; k < 3; ++k) sums[k][0] = sum_slots(p.partial[k], first, last, column, channels, shared);
    if (threadIdx.y != 0 || column >= channels) continue;
    finish_modulation<1>(p, row, column, sums[sum_p], sums[sum_q]);
    write_grad<1>(p.dgate, row, column, channels, sums[sum_g]);
  }
}

__global__ void __launch_bounds__(reduce_columns* reduce_ways)
    reduce_affine_kernel(const BackwardParams p, int64_t chunks) {
  __shared__ double shared[reduce_ways][reduce_columns];
  const int column = static_cast<int>(blockIdx.x) * reduce_columns + static_cast<int>(threadIdx.x);
  const float sum[1] = {sum_slots(p.affine[blockIdx.y], 0, chunks, column, static_cast<int>(p.channels), shared)};
  if (threadIdx.y != 0 || column >= p.channels) return;
  write_grad<1>(blockIdx.y == 0 ? p.dweight : p.dbias, 0, column, static_cast<int>(p.channels), sum);
}

void launch_reductions(const BackwardParams& p, cudaStream_t stream) {
  const auto columns = static_cast<unsigned>((p.channels + reduce_columns - 1) / reduce_columns);
  const dim3 block(reduce_columns, reduce_ways);
  const bool wanted = p.dshift.data != nullptr || p.dscale.data != nullptr || p.dgate.data != nullptr;
  if (wanted && (!p.direct || p.tokens == 0)) {
    const auto rows = static_cast<unsigned>(p.rows.count < 65535 ? p.rows.count : 65535);
    VK_LAUNCH(reduce_rows_kernel, dim3(columns, rows), block, 0, stream)(p);
    VK_CUDA_CHECK_LAUNCH();
  }
  if (p.affine[0] != nullptr) {
    const int64_t chunks = (p.tokens + p.chunk - 1) / p.chunk;
    VK_LAUNCH(reduce_affine_kernel, dim3(columns, 2), block, 0, stream)(p, chunks);
    VK_CUDA_CHECK_LAUNCH();
  }
}

// ---- first stage: one kernel per (type, columns, mode, staged)

// Either launches or, with `rows` given, says how many rows the device holds at once.
struct Task {
  cudaStream_t stream;
  int64_t* rows;
};

template <typename T, int N, int C, Mode mode, bool staged>
void run_kernel(const BackwardParams& p, const Shape& shape, const Task& task) {
  constexpr auto kernel = backward_kernel<T, N, C, mode, staged>;
  const int threads = shape.threads();
  const size_t bytes =
      Source<T, N, C, mode, staged>::shared_bytes(threads) + KeptRow<N, C, mode>::shared_bytes(threads);
  if (task.rows != nullptr) {
    *task.rows = static_cast<int64_t>(multiprocessors()) * resident_blocks<kernel>(threads, bytes) * shape.rows;
    return;
  }
  allow_shared<kernel>(bytes);
  const int64_t per_block = p.chunk * shape.rows;
  const auto blocks = static_cast<unsigned>((p.tokens + per_block - 1) / per_block);
  VK_LAUNCH((kernel), blocks, threads, bytes, task.stream)(p, shape);
  VK_CUDA_CHECK_LAUNCH();
}

template <typename T, int N, int C, Mode mode>
void run_mode(const BackwardParams& p, const Shape& shape, const Task& task) {
  const int threads = shape.threads();
  const size_t bytes =
      Source<T, N, C, mode, N != 1>::shared_bytes(threads) + KeptRow<N, C, mode>::shared_bytes(threads);
  if (N > 1 && bytes + 1024 <= largest_block_shared()) return run_kernel<T, N, C, mode, N != 1>(p, shape, task);
  run_kernel<T, N, C, mode, false>(p, shape, task);
}

template <typename T, int N, int C>
void run_columns(const BackwardParams& p, const Shape& shape, const Task& task) {
  if (p.dy == nullptr) return run_mode<T, N, C, Mode::gate>(p, shape, task);
  if (p.dbranch == nullptr && p.dgate.data == nullptr) return run_mode<T, N, C, Mode::modulate>(p, shape, task);
  run_mode<T, N, C, Mode::chain>(p, shape, task);
}

template <typename T>
void run_type(const BackwardParams& p, const Task& task) {
  const bool aligned = aligned16(p.dhidden) && aligned16(p.dy) && aligned16(p.hidden) && aligned16(p.branch) &&
                       aligned16(p.dx) && aligned16(p.dbranch);
  const Shape shape = shape_for(p.channels, p.dtype, aligned);
  if (!shape.vectors) return run_columns<T, 1, 16>(p, shape, task);
  if (shape.columns == 8) return run_columns<T, vector_width<T>, 8>(p, shape, task);
  run_columns<T, vector_width<T>, 16>(p, shape, task);
}

void run_backward(const BackwardParams& p, const Task& task) {
  if (p.dtype == DType::float32) return run_type<float>(p, task);
  if (p.dtype == DType::bfloat16) return run_type<__nv_bfloat16>(p, task);
  run_type<__half>(p, task);
}

}  // namespace

int64_t backward_chunk_cuda(const BackwardParams& params) {
  int64_t rows = 1;
  run_backward(params, Task{nullptr, &rows});
  return (params.tokens + rows - 1) / rows;
}

void backward_cuda(const BackwardParams& params, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (params.tokens > 0) run_backward(params, Task{on, nullptr});
  launch_reductions(params, on);
}

}  // namespace adaln
}  // namespace vidkernels
