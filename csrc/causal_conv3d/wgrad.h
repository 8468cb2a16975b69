// SPDX-License-Identifier: Apache-2.0
// What the weight gradient's algorithms share. The pixels of all frames are the depth of its matrix products, so the
// work is cut along the pixels as well, into parts whose sums are added at the end. Their number follows from the shape
// alone: the result has the same bits for any number of threads.
#pragma once

#include "causal_conv3d/matrix.h"
#include "causal_conv3d/source.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

constexpr int64_t kWgradRows = 64, kWgradColumns = 128;  // of one item's sums: 0.5 MB with 16 Winograd products
constexpr int64_t kWgradItems = 32;                      // wanted at least, so that threads get equal shares
constexpr int64_t kWgradSteps = 512;                     // pixels or tiles of a part at least
constexpr int64_t kWgradPartBytes = 16 << 20;            // of the sums of all parts

// Positions (batch entry, output frame, row, column) of a grid over the output frames for which one frame of taps reads
// something, counted in that order.
template <typename S>
class WgradGrid {
 public:
  struct Position {
    int64_t b, t, h, w;
  };

  WgradGrid(const CausalConv3dParams& p, int64_t tap, int64_t height, int64_t width)
      : p_(p), tap_(tap), height_(height), width_(width), first_(0), end_(p.out_size[0]) {
    while (first_ < end_ && frame(0, first_).data == nullptr) ++first_;
    while (first_ < end_ && frame(0, end_ - 1).data == nullptr) --end_;
  }
  int64_t size() const { return p_.batch * (end_ - first_) * height_ * width_; }
  Frame<S> frame(int64_t b, int64_t t) const {
    return frame_at<S>(p_, b, t * p_.stride[0] - p_.before[0] + tap_ * p_.dilation[0]);
  }
  Position at(int64_t i) const {
    const int64_t frames = end_ - first_, area = height_ * width_;
    return {i / area / frames, first_ + i / area % frames, i % area / width_, i % width_};
  }
  void step(Position& position) const {
    if (++position.w < width_) return;
    position.w = 0;
    if (++position.h < height_) return;
    position.h = 0;
    if (++position.t < end_) return;
    position.t = first_;
    ++position.b;
  }

 private:
  const CausalConv3dParams& p_;
  const int64_t tap_, height_, width_;
  int64_t first_, end_;
};

// Sums of the parts, [part][tap][row][column], columns up to whole vectors. Rows and columns are channels and filters,
// or the other way round.
template <typename A>
class WgradParts {
 public:
  static constexpr int64_t L = kLanes<A>;

  // `items`: blocks of rows, columns and taps that every part consists of; `steps`: pixels or tiles to be cut.
  WgradParts(int64_t taps, int64_t rows, int64_t columns, int64_t items, int64_t steps)
      : taps_(taps),
        rows_(rows),
        columns_(columns),
        padded_(round_up(columns, L)),
        count_(number(taps * rows * padded_ * sizeof(A), items, steps)),
        sums_(count_ * taps * rows * padded_) {}
  int64_t count() const { return count_; }
  int64_t padded() const { return padded_; }
  A* at(int64_t part, int64_t tap, int64_t row) const {
    return sums_.get() + ((part * taps_ + tap) * rows_ + row) * padded_;
  }

  // gradient[row * row_stride + column * column_stride + tap] = the sum of all parts.
  void reduce(A* gradient, int64_t row_stride, int64_t column_stride) const {
    constexpr int64_t R = 16;  // rows at a time: their taps are neighbours in memory
    const int64_t row_blocks = (rows_ + R - 1) / R;
    parallel_for(0, padded_ / L * row_blocks, 1, [&](int64_t begin, int64_t end) {
      const Scratch<A> block(R * taps_ * L);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t column = item / row_blocks * L, row = item % row_blocks * R, rows = std::min(R, rows_ - row);
        for (int64_t tap = 0; tap < taps_; ++tap) {
          for (int64_t r = 0; r < rows; ++r) {
            Vec<A> sum = load_vec(at(0, tap, row + r) + column);
            for (int64_t part = 1; part < count_; ++part) sum += load_vec(at(part, tap, row + r) + column);
            store_vec(block.get() + (r * taps_ + tap) * L, sum);
          }
        }
        for (int64_t c = 0; c < std::min(L, columns_ - column); ++c) {
          for (int64_t r = 0; r < rows; ++r) {
            A* to = gradient + (row + r) * row_stride + (column + c) * column_stride;
            for (int64_t tap = 0; tap < taps_; ++tap) to[tap] = block.get()[(r * taps_ + tap) * L + c];
          }
        }
      }
    });
  }

 private:
  static int64_t number(int64_t bytes, int64_t items, int64_t steps) {
    const int64_t wanted = (kWgradItems + items - 1) / items;
    return std::max<int64_t>(1, std::min({wanted, steps / kWgradSteps, kWgradPartBytes / bytes}));
  }

  const int64_t taps_, rows_, columns_, padded_, count_;
  const Scratch<A> sums_;
};

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
