// SPDX-License-Identifier: Apache-2.0
// 3x3 taps in space on sm_90a. Copying a box anew for each tap, as a matrix product of gathered rows does, asks the
// second cache for 9 times the box, and that is what limits it (docs/performance.md). Here a box with its border goes
// to shared memory once for 32 channels of a frame, and the nine taps read it there at nine addresses.
//
// One warpgroup copies: a warp the weights, three warps boxes. Two multiply. All pass through the same steps (a frame
// that a tap along time meets, 32 channels of it) of the same boxes, and meet at barriers that say a buffer is full or
// empty.
#if defined(VK_SM90A)
#include <algorithm>

#include "causal_conv3d/causal_conv3d_store.cuh"

namespace vidkernels {
namespace {

using namespace cuda;

constexpr int kThreads = 3 * 128, kConsumerWarps = 8, kCopyThreads = 96;
constexpr int kPositionsAtOnce = kCopyThreads / kVectors;

// Where the positions of a tile's box are in a frame of these strides; -1 for padding. The warps do not share
// positions, so that each knows its own without the others: 8 in a row of every 24, 4 lanes for each when they are
// copied.
__device__ void find_places(const Problem& p, const Tile& tile, const int64_t* stride, int thread, int* places) {
  const int height = static_cast<int>(p.conv.in_size[1]), width = static_cast<int>(p.conv.in_size[2]);
  const int first_row = tile.row - static_cast<int>(p.conv.before[1]);
  const int first_column = tile.column - static_cast<int>(p.conv.before[2]);
  const int positions = p.box.line * p.box.lines, lane = thread % 32;
  int position = thread / 32 * 8 + lane % 8 + lane / 8 * kPositionsAtOnce;
  __syncwarp();  // other lanes may still read the places of the tile before
  for (; position < positions; position += 4 * kPositionsAtOnce) {
    const int line = position / p.box.line;
    int h = first_row + line, w = first_column + position - line * p.box.line;
    if (p.conv.replicate_space) h = max(0, min(h, height - 1)), w = max(0, min(w, width - 1));
    const bool valid = h >= 0 && h < height && w >= 0 && w < width;
    places[position] = valid ? h * static_cast<int>(stride[2]) + w * static_cast<int>(stride[3]) : -1;
  }
  __syncwarp();
}

// 96 threads copy a box with its border, 4 of them what one position has.
template <typename T>
__device__ void copy_box(const Problem& p, const Frame<T>& frame, int channel, int thread, const int* places,
                         unsigned char* to) {
  const int vector = thread % kVectors, positions = p.box.line * p.box.lines;
  const bool inside = channel + 8 * vector < p.conv.channels;
  const T* from = inside ? frame.data + channel + 8 * vector : static_cast<const T*>(p.conv.x);
  to += vector * p.box.plane * 16;
#pragma unroll 4
  for (int position = thread / kVectors; position < positions; position += kPositionsAtOnce) {
    const int place = places[position];
    copy_16(to + position * 16, from + max(place, 0), inside && place >= 0);
  }
}

template <typename T>
__device__ void copy_boxes(const Problem& p, Barriers& barriers, unsigned char* boxes, int* places, int thread) {
  Cursor<kBoxes> cursor;
  int copying = -1;  // the buffer whose copies are on their way
  for (int index = blockIdx.x; index < p.box.programs; index += gridDim.x) {
    const Tile tile = tile_at(p, index);
    const int64_t* stride = nullptr;  // those that places are for
    for_each_step<T>(p, tile, [&](const Frame<T>& frame, int, int channel) {
      if (frame.stride != stride) find_places(p, tile, frame.stride, thread, places);
      stride = frame.stride;
      barrier_wait(&barriers.empty_box[cursor.at], cursor.parity ^ 1);
      copy_box(p, frame, channel, thread, places, boxes + cursor.at * box_bytes(p.box));
      copy_commit();
      if (copying >= 0) {
        copy_wait<1>();
        fence_async_proxy();
        barrier_arrive(&barriers.full_box[copying]);
      }
      copying = cursor.at;
      cursor.advance();
    });
  }
  if (copying < 0) return;
  copy_wait<0>();
  fence_async_proxy();
  barrier_arrive(&barriers.full_box[copying]);
}

template <typename T>
__device__ void copy_weights(const Problem& p, Barriers& barriers, unsigned char* rows, float* bias) {
  Cursor<kRows> cursor;
  Cursor<1> bias_cursor;
  const int bytes = row_bytes(p.box.tile_filters), taps = static_cast<int>(p.conv.kernel[0]);
  const int64_t steps = channel_steps(p.conv);
  for (int index = blockIdx.x; index < p.box.programs; index += gridDim.x) {
    const Tile tile = tile_at(p, index);
    for_each_step<T>(p, tile, [&](const Frame<T>&, int tap, int channel) {
      const int64_t step = (tile.filter / p.box.tile_filters * taps + tap) * steps;
      const auto* from = static_cast<const unsigned char*>(p.packed) + (step + channel / kBoxChannels) * 3 * bytes;
      for (int row = 0; row < 3; ++row) {
        barrier_wait(&barriers.empty_row[cursor.at], cursor.parity ^ 1);
        barrier_arrive_expect(&barriers.full_row[cursor.at], bytes);
        bulk_copy(rows + cursor.at * bytes, from + row * bytes, bytes, &barriers.full_row[cursor.at]);
        cursor.advance();
      }
    });
    // last, since it waits until the sums of the box before are stored
    const int bias_bytes = p.box.tile_filters * static_cast<int>(sizeof(float));
    barrier_wait(&barriers.empty_bias, bias_cursor.parity ^ 1);
    barrier_arrive_expect(&barriers.full_bias, bias_bytes);
    bulk_copy(bias, p.bias + tile.filter, bias_bytes, &barriers.full_bias);
    bias_cursor.advance();
  }
}

// kBlocks of 64 positions by kFilters, for each of the two warpgroups.
template <typename T, int kFilters, int kBlocks>
__device__ void multiply_boxes(const Problem& p, Barriers& barriers, const unsigned char* boxes,
                               const unsigned char* rows, const float* bias, int warpgroup) {
  const BoxLayout& box = p.box;
  Cursor<kBoxes> box_cursor;
  Cursor<kRows> row_cursor;
  Cursor<1> bias_cursor;
  float sums[kBlocks][kFilters / 2];
  int at[kBlocks];  // the first position of a block in a box
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    const int block = warpgroup * kBlocks + i;
    at[i] = block / box.block_columns * 8 * box.line + block % box.block_columns * 8;
  }
  for (int index = blockIdx.x; index < box.programs; index += gridDim.x) {
    const Tile tile = tile_at(p, index);
    int add = 0;  // from the second row of taps on
    const auto release = [&](uint64_t* barrier) {
      if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
    };
    for_each_step<T>(p, tile, [&](const Frame<T>&, int, int) {
      barrier_wait(&barriers.full_box[box_cursor.at], box_cursor.parity);
      const uint64_t positions = operand(boxes + box_cursor.at * box_bytes(box), box.line, box.plane);
      for (int tap_row = 0; tap_row < 3; ++tap_row) {
        barrier_wait(&barriers.full_row[row_cursor.at], row_cursor.parity);
        const uint64_t filters = operand(rows + row_cursor.at * row_bytes(kFilters), 8, kFilters);
        products_begin();
#pragma unroll
        for (int i = 0; i < 3 * kVectors / 2; ++i) {
          const int tap = i / (kVectors / 2), vector = i % (kVectors / 2) * 2;
          const uint64_t b = moved(filters, (tap * kVectors + vector) * kFilters);
#pragma unroll
          for (int block = 0; block < kBlocks; ++block) {
            const int first = at[block] + tap_row * box.line + tap + vector * box.plane;
            multiply<T>(sums[block], moved(positions, first), b, i == 0 ? add : 1);
          }
        }
        products_commit();
        products_wait<1>();  // those of the row before
        __syncwarp();
        if (add) {
          release(barriers.empty_row + row_cursor.before());
          if (tap_row == 0) release(barriers.empty_box + box_cursor.before());
        }
        row_cursor.advance();
        add = 1;
      }
      box_cursor.advance();
    });
    products_wait<0>();
    __syncwarp();
    if (add) {
      release(barriers.empty_row + row_cursor.before());
      release(barriers.empty_box + box_cursor.before());
    }
    barrier_wait(&barriers.full_bias, bias_cursor.parity);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      after_wait(sums[i]);
      if (add == 0) {
        for (float& sum : sums[i]) sum = 0.0f;
      }
    }
    store_tile<T, kFilters, kBlocks>(p, tile, bias, warpgroup, sums);
    __syncwarp();
    release(&barriers.empty_bias);
    bias_cursor.advance();
  }
}

template <typename T, int kFilters, int kBlocks>
__global__ void __launch_bounds__(kThreads, 1) conv_box_kernel(const __grid_constant__ Problem p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(VK_SIMT_SHIM)  // empty for the other architectures of a list
  VK_DYNAMIC_SHARED(unsigned char, shared);
  Barriers& barriers = *reinterpret_cast<Barriers*>(shared);
  unsigned char* rows = shared + kBarrierBytes;
  unsigned char* boxes = rows + kRows * row_bytes(kFilters);
  float* bias = reinterpret_cast<float*>(boxes + kBoxes * box_bytes(p.box));
  int* places = reinterpret_cast<int*>(bias + kFilters);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kBoxes; ++i) {
      barrier_init(&barriers.full_box[i], kCopyThreads);
      barrier_init(&barriers.empty_box[i], kConsumerWarps);
    }
    for (int i = 0; i < kRows; ++i) {
      barrier_init(&barriers.full_row[i], 1);
      barrier_init(&barriers.empty_row[i], kConsumerWarps);
    }
    barrier_init(&barriers.full_bias, 1);
    barrier_init(&barriers.empty_bias, kConsumerWarps);
    fence_async_proxy();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    give_registers<56>();
    if (threadIdx.x >= 32) {
      copy_boxes<T>(p, barriers, boxes, places, threadIdx.x - 32);
    } else if (threadIdx.x == 0) {
      copy_weights<T>(p, barriers, rows, bias);
    }
  } else {
    take_registers<224>();
    multiply_boxes<T, kFilters, kBlocks>(p, barriers, boxes, rows, bias, warpgroup - 1);
  }
#endif
}

// Weights [K, C, kt, 3, 3] as [tile of filters][kt][32 channels][3][3][8 channels][filter][8], 8 channels a thread, and
// the bias in float32.
template <typename T>
__global__ void __launch_bounds__(256) pack_kernel(const __grid_constant__ Problem p, T* packed, float* bias) {
  const CausalConv3dParams& c = p.conv;
  int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int64_t vectors = packed_elements(c) / 8;
  if (index >= vectors) {
    index -= vectors;
    if (index >= c.filters) return;
    bias[index] = c.bias == nullptr ? 0.0f : widen(static_cast<const T*>(c.bias)[index * c.bias_stride]);
    return;
  }
  const int64_t steps = channel_steps(c);
  int64_t rest = index / p.box.tile_filters;
  const int64_t filter = index - rest * p.box.tile_filters;
  const int64_t vector = rest % kVectors, column = rest / kVectors % 3, row = rest / (3 * kVectors) % 3;
  rest /= 9 * kVectors;
  const int64_t step = rest % steps, tap = rest / steps % c.kernel[0], tile = rest / steps / c.kernel[0];
  const int64_t channel = step * kBoxChannels + vector * 8;
  const T* from = static_cast<const T*>(c.weight) + (tile * p.box.tile_filters + filter) * c.weight_stride[0] +
                  channel * c.weight_stride[1] + tap * c.weight_stride[2] + row * c.weight_stride[3] +
                  column * c.weight_stride[4];
  Pack<T, 8> values;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    values.value[i] = channel + i < c.channels ? from[i * c.weight_stride[1]] : narrow<T>(0.0f);
  }
  store_pack(packed + index * 8, values);
}

BoxLayout layout_of(const CausalConv3dBoxParams& p) {
  BoxLayout box;
  box.block_columns = static_cast<int>(p.block_columns);
  box.height = static_cast<int>(p.block_rows) * 8;
  box.width = box.block_columns * 8;
  box.rows = static_cast<int>((p.conv.out_size[1] + box.height - 1) / box.height);
  box.columns = static_cast<int>((p.conv.out_size[2] + box.width - 1) / box.width);
  box.tile_filters = static_cast<int>(p.tile_filters);
  box.programs =
      static_cast<int>(p.conv.batch * p.conv.out_size[0] * box.rows * box.columns * (p.conv.filters / p.tile_filters));
  box.group = static_cast<int>(p.group);
  box.line = box.width + 2;
  box.lines = box.height + 2;
  // 2 more than a multiple of 8: what 8 lanes write, 2 positions of 4 vectors, then lies in 32 different banks.
  box.plane = (box.line * box.lines + 5) / 8 * 8 + 2;
  return box;
}

template <typename T, int kFilters>
void run(const CausalConv3dBoxParams& params, cudaStream_t stream) {
  const int64_t elements = packed_elements(params.conv);
  T* const packed = static_cast<T*>(params.packed);
  float* const bias = reinterpret_cast<float*>(packed + elements);
  const Problem problem{params.conv, packed, bias, layout_of(params)};
  if (problem.box.programs == 0) return;
  const int64_t threads = elements / 8 + params.conv.filters;
  VK_LAUNCH((pack_kernel<T>), static_cast<unsigned>((threads + 255) / 256), 256, 0, stream)(problem, packed, bias);
  VK_CUDA_CHECK_LAUNCH();
  const int bytes = shared_bytes(problem.box);
  const auto kernel = conv_box_kernel<T, kFilters, tile_blocks(kFilters) / 2>;
  VK_CUDA_CHECK(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const int blocks = std::min(problem.box.programs, multiprocessors());
  VK_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreads, bytes, stream)(problem);
  VK_CUDA_CHECK_LAUNCH();
}

template <typename T>
void run_tile(const CausalConv3dBoxParams& params, cudaStream_t stream) {
  switch (params.tile_filters) {
    case 96:
      return run<T, 96>(params, stream);
    case 128:
      return run<T, 128>(params, stream);
    case 160:
      return run<T, 160>(params, stream);
    default:
      return run<T, 192>(params, stream);
  }
}

}  // namespace

void causal_conv3d_box_cuda(const CausalConv3dBoxParams& params, cudaStream_t stream) {
  if (params.conv.dtype == DType::bfloat16) return run_tile<__nv_bfloat16>(params, stream);
  run_tile<__half>(params, stream);
}

}  // namespace vidkernels
#endif
