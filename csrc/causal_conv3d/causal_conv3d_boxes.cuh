// SPDX-License-Identifier: Apache-2.0
// What the warps of a convolution by boxes agree upon: which boxes a block makes, the steps of each, the buffers
// between those who copy and those who multiply.
#pragma once

#include "causal_conv3d/causal_conv3d_cuda.h"
#include "common/cuda.h"

namespace vidkernels {
namespace cuda {

constexpr int kVectors = kBoxChannels / 8;  // of 16 bytes: 8 channels
constexpr int kBoxes = 3, kRows = 4;        // buffers of boxes, and of weights: those of a row of three taps

template <typename T>
struct Frame {
  const T* data;  // null: padded with zeros
  const int64_t* stride;
};

struct Tile {
  int filter, batch, frame, row, column;  // of the first filter and position
};

// How boxes lie in frames and in shared memory, from the sizes in the parameters.
struct BoxLayout {
  int columns, rows, programs, tile_filters;  // boxes of a frame, and all of them for each tile of filters
  int group, block_columns, height, width;    // of a box
  int line, lines, plane;  // positions with the border: in a row, rows, and from 8 channels to the next
};

struct Problem {
  CausalConv3dParams conv;
  const void* packed;
  const float* bias;  // behind the packed weights, zeros if there is none
  BoxLayout box;
};

__device__ inline Tile tile_at(const Problem& p, int index) {
  const BoxLayout& box = p.box;
  const int filter_tiles = static_cast<int>(p.conv.filters) / box.tile_filters;
  const int frames = static_cast<int>(p.conv.out_size[0]), clip = box.rows * box.columns * frames;
  Tile tile;
  tile.filter = index % filter_tiles * box.tile_filters;
  index /= filter_tiles;
  tile.batch = index / clip;
  index -= tile.batch * clip;
  const int first = index / (box.group * box.columns * frames) * box.group;
  index -= first * box.columns * frames;
  const int boxes = min(box.rows - first, box.group) * box.columns;
  tile.frame = index / boxes;
  index -= tile.frame * boxes;
  tile.row = (first + index / box.columns) * box.height;
  tile.column = index % box.columns * box.width;
  return tile;
}

// Frame t of the source, in front of it of the history, and what is repeated.
template <typename T>
__device__ Frame<T> frame_at(const CausalConv3dParams& p, int64_t batch, int64_t t) {
  if (t >= p.in_size[0] && !p.replicate_time) return {nullptr, nullptr};
  if (t < -p.history_frames && !p.replicate_time) return {nullptr, nullptr};
  t = max(min(t, p.in_size[0] - 1), -p.history_frames);
  if (t < 0) {
    const int64_t at = batch * p.history_stride[0] + (t + p.history_frames) * p.history_stride[1];
    return {static_cast<const T*>(p.history) + at, p.history_stride};
  }
  return {static_cast<const T*>(p.x) + batch * p.x_stride[0] + t * p.x_stride[1], p.x_stride};
}

// step(frame, tap along time, first channel) for all that are not zero.
template <typename T, typename F>
__device__ void for_each_step(const Problem& p, const Tile& tile, F step) {
  for (int tap = 0; tap < p.conv.kernel[0]; ++tap) {
    const Frame<T> frame = frame_at<T>(p.conv, tile.batch, tile.frame - p.conv.before[0] + tap);
    if (frame.data == nullptr) continue;
    for (int channel = 0; channel < p.conv.channels; channel += kBoxChannels) step(frame, tap, channel);
  }
}

// Of a ring of buffers: which is next, and the parity of its phase.
template <int kBuffers>
struct Cursor {
  int at = 0;
  uint32_t parity = 0;
  __device__ int before() const { return (at == 0 ? kBuffers : at) - 1; }
  __device__ void advance() {
    if (++at < kBuffers) return;
    at = 0;
    parity ^= 1;
  }
};

struct Barriers {
  uint64_t full_box[kBoxes], empty_box[kBoxes], full_row[kRows], empty_row[kRows], full_bias, empty_bias;
};

// Shared memory: barriers, rows of weights as [tap][8 channels][filter][8], boxes as [8 channels][position][8], the
// bias, and where in a frame the positions of a box are.
constexpr int kBarrierBytes = 128;
static_assert(sizeof(Barriers) <= kBarrierBytes);
__host__ __device__ constexpr int row_bytes(int filters) { return 3 * kVectors * filters * 16; }
__host__ __device__ inline int box_bytes(const BoxLayout& box) { return kVectors * box.plane * 16; }
inline int shared_bytes(const BoxLayout& box) {
  const int words = box.tile_filters + box.line * box.lines;
  return kBarrierBytes + kRows * row_bytes(box.tile_filters) + kBoxes * box_bytes(box) + 4 * words;
}

}  // namespace cuda
}  // namespace vidkernels
