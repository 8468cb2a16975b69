// SPDX-License-Identifier: Apache-2.0
// Weight gradient of any convolution of bfloat16 by AMX's tiles: dW[filter][channel] of a tap is the product of the
// output's gradient, rows of filters, and of the pixels that the tap reads, whose depth are the positions of a frame as
// tile_axis.h lays it out. Positions of the border have a gradient of zero. B has two positions next to each other in
// memory: once an even one and the next, once an odd one and the next, for taps that read an odd distance away. Shifted
// gradients would do with one, but rows of A that begin within a line of the cache took 1.25 times as long.
//
// An item's sums are 32 filters times 32 channels of one frame of taps, over all positions in one order: the same bits
// for any number of threads. Frames are laid out a batch at a time.
#pragma once

#include <vector>

#include "causal_conv3d/direct_wgrad.h"
#include "causal_conv3d/tile_axis.h"

#if defined(__AVX512BF16__) && defined(VK_CPU_HAS_AMX)

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

class DirectTilesWgrad {
 public:
  explicit DirectTilesWgrad(const CausalConv3dWgradParams& params)
      : p_(params.conv),
        grad_(static_cast<const bfloat16*>(params.grad)),
        dweight_(static_cast<float*>(params.dweight)),
        merged_(merges_taps(p_)),
        rows_(tile_axis(p_, 1)),
        columns_(tile_axis(p_, 2)),
        taps_(rows_.taps * columns_.taps),
        planes_(rows_.planes() * columns_.planes()),
        channels_(merged_ ? p_.kernel[1] * p_.kernel[2] * p_.channels : p_.channels),
        depth_(round_up(channels_, kWide)),
        filters_(round_up(p_.filters, kWide)),
        width_(p_.out_size[2] + columns_.border()),
        y_blocks_(p_.out_size[1], std::max<int64_t>(kFrameValues / (width_ * (2 * planes_ * depth_ + filters_)), 1), 1),
        positions_(round_up((y_blocks_.block + rows_.border()) * width_, kTileTerms) + kTileTerms),
        plane_(2 * positions_ * depth_),
        grad_row_(row_of(y_blocks_.block * width_)),
        t_blocks_(p_.out_size[0], std::max<int64_t>(kBatchValues / (planes_ * plane_ + grad_row_ * filters_), 1), 1),
        sums_(p_.kernel[0] * taps_ * filters_ * depth_) {}

  void run() const {
    std::memset(sums_.get(), 0, p_.kernel[0] * taps_ * filters_ * depth_ * sizeof(float));
    const Scratch<bfloat16> pixels(t_blocks_.block * p_.kernel[0] * planes_ * plane_);
    const Scratch<bfloat16> gradients(t_blocks_.block * filters_ * grad_row_);
    for (int64_t b = 0; b < p_.batch; ++b) {
      for (int64_t y = 0; y < y_blocks_.count; ++y) {
        for (int64_t t = 0; t < t_blocks_.count; ++t) {
          const Batch batch = batch_of(b, y, t);
          lay_out(batch, pixels.get(), gradients.get());
          multiply(batch, pixels.get(), gradients.get());
        }
      }
    }
    write();
  }

 private:
  static constexpr int64_t kWide = 2 * kTileRows;            // filters, and channels, of an item: two tiles
  static constexpr int64_t kFrameValues = int64_t{1} << 22;  // 8 MB
  static constexpr int64_t kBatchValues = int64_t{1} << 25;  // 64 MB
  static constexpr int64_t kLaidOut = 16 * kTileTerms;       // positions that a thread lays out at a time
  static constexpr int64_t kSummed = 32 * kTileTerms;        // positions before an item's next tap
  static constexpr int64_t kSquare = kWide * kWide;

  // Rows [y, y + rows) of some output frames.
  struct Batch {
    int64_t b, t, frames, y, rows;
    std::vector<Frame<bfloat16>> sources;  // that they read
    std::vector<int64_t> source;           // [frame, frame of taps]: which of them, or -1 for zeros
  };

  // An odd number of lines of the cache: rows that fall into few sets of it push each other out.
  static int64_t row_of(int64_t length) { return (round_up(length, kTileTerms) / kTileTerms | 1) * kTileTerms; }

  Batch batch_of(int64_t b, int64_t y, int64_t t) const {
    Batch batch{b, t_blocks_.first(t), t_blocks_.length(t), y_blocks_.first(y), y_blocks_.length(y), {}, {}};
    for (int64_t i = 0; i < batch.frames * p_.kernel[0]; ++i) {
      const int64_t at = (batch.t + i / p_.kernel[0]) * p_.stride[0] + i % p_.kernel[0] * p_.dilation[0];
      const Frame<bfloat16> frame = frame_at<bfloat16>(p_, b, at - p_.before[0]);
      const auto known = std::find(batch.sources.begin(), batch.sources.end(), frame);
      batch.source.push_back(frame.data == nullptr ? -1 : known - batch.sources.begin());
      if (frame.data != nullptr && known == batch.sources.end()) batch.sources.push_back(frame);
    }
    return batch;
  }

  void lay_out(const Batch& batch, bfloat16* pixels, bfloat16* gradients) const {
    const int64_t parts = (positions_ + kLaidOut - 1) / kLaidOut;  // of a plane, which has more than a gradient
    const int64_t planes = static_cast<int64_t>(batch.sources.size()) * planes_;
    parallel_for(0, (planes + batch.frames) * parts, 1, [&](int64_t begin, int64_t end) {
      const Scratch<bfloat16> own(3 * (depth_ + kTileTerms));
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item % parts * kLaidOut, last = std::min(first + kLaidOut, positions_);
        const int64_t plane = item / parts;
        if (plane < planes) {
          lay_out_pixels(batch, plane, first, last, own.get(), pixels + plane * plane_);
        } else {
          const int64_t t = plane - planes, end = std::min(last, grad_row_);
          lay_out_gradient(batch, t, first, end, gradients + t * filters_ * grad_row_);
        }
      }
    });
  }

  // to[channel / 32][odd][position / 2][channel % 32][position % 2]: what an item reads lies together.
  void lay_out_pixels(const Batch& batch, int64_t plane, int64_t first, int64_t last, bfloat16* own,
                      bfloat16* to) const {
    const Frame<bfloat16>& frame = batch.sources[plane / planes_];
    const int64_t residue = plane % planes_, h = rows_.residue(residue / columns_.planes());
    const int64_t w = columns_.residue(residue % columns_.planes()), end = (batch.rows + rows_.border()) * width_;
    const auto pixel = [&](int64_t at, bfloat16* gathered) -> const bfloat16* {
      const int64_t y = batch.y + at / width_, x = at % width_;
      if (at >= end) return nullptr;
      if (merged_) {
        gather_pixel(p_, frame, y, x, gathered);
        return gathered;
      }
      return pixel_at(p_, frame, (y + rows_.low()) * p_.stride[1] + h, (x + columns_.low()) * p_.stride[2] + w);
    };
    const int64_t size = depth_ + kTileTerms;  // of a pixel that is gathered
    const bfloat16* even = pixel(first, own);
    for (int64_t at = first; at < last; at += 2) {
      const bfloat16 *odd = pixel(at + 1, own + size), *next = pixel(at + 2, own + 2 * size);
      for (int64_t c = 0; c < depth_; c += kTileRows) {
        bfloat16* row = to + (c / kWide * 2 * positions_ + at) * kWide + 2 * (c % kWide);
        const __mmask16 exist = live(channels_ - c);
        _mm512_storeu_si512(row, pair_up(part(even, c), part(odd, c), exist));
        _mm512_storeu_si512(row + positions_ * kWide, pair_up(part(odd, c), part(next, c), exist));
      }
      if (next != nullptr && merged_) std::memcpy(own, next, size * sizeof(bfloat16));
      even = next == nullptr || !merged_ ? next : own;
    }
  }
  static const bfloat16* part(const bfloat16* pixel, int64_t c) { return pixel == nullptr ? pixel : pixel + c; }
  static __mmask16 live(int64_t left) {
    return static_cast<__mmask16>(left <= 0 ? 0u : 0xffffu >> (kTileRows - std::min(left, kTileRows)));
  }

  // to[filter][position]: zeros at the border and behind the frame.
  void lay_out_gradient(const Batch& batch, int64_t t, int64_t first, int64_t last, bfloat16* to) const {
    const bfloat16* frame = grad_ + batch.b * p_.y_stride[0] + (batch.t + t) * p_.y_stride[1];
    const auto pixel = [&](int64_t at) -> const bfloat16* {
      const int64_t y = at / width_, x = at % width_;
      if (y >= batch.rows || x >= p_.out_size[2]) return nullptr;
      return frame + (batch.y + y) * p_.y_stride[2] + x * p_.y_stride[3];
    };
    const bfloat16* places[kTileTerms];
    for (int64_t at = first; at < last; at += kTileTerms) {
      for (int64_t i = 0; i < kTileTerms; ++i) places[i] = pixel(at + i);
      for (int64_t f = 0; f < p_.filters; f += kTileRows) {
        __m512i m[kTileRows];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kTileRows; ++i) {
          const bfloat16 *even = places[2 * i], *odd = places[2 * i + 1];
          m[i] = pair_up(part(even, f), part(odd, f), live(p_.filters - f));
        }
        transpose_pairs(m);
        const int64_t count = std::min(kTileRows, p_.filters - f);
        for (int64_t i = 0; i < count; ++i) _mm512_storeu_si512(to + (f + i) * grad_row_ + at, m[i]);
      }
    }
  }

  void multiply(const Batch& batch, const bfloat16* pixels, const bfloat16* gradients) const {
    const int64_t rows = filters_ / kWide, columns = depth_ / kWide;
    parallel_for(0, p_.kernel[0] * rows * columns, 1, [&](int64_t begin, int64_t end) {
      const TileScope scope;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t column = item % columns, row = item / columns % rows, k = item / columns / rows;
        for (int64_t t = 0; t < batch.frames; ++t) {
          const int64_t source = batch.source[t * p_.kernel[0] + k];
          if (source < 0) continue;
          const bfloat16* b = pixels + source * planes_ * plane_ + column * 2 * positions_ * kWide;
          const bfloat16* a = gradients + (t * filters_ + row * kWide) * grad_row_;
          float* sums = sums_.get() + ((k * rows + row) * columns + column) * taps_ * kSquare;
          if (p_.filters - row * kWide > kTileRows) {
            multiply_frame<2>(batch, a, b, sums);
          } else {
            multiply_frame<1>(batch, a, b, sums);
          }
        }
      }
    });
  }

  template <int M>
  void multiply_frame(const Batch& batch, const bfloat16* a, const bfloat16* b, float* sums) const {
    const int64_t positions = (batch.rows - 1) * width_ + p_.out_size[2];
    for (int64_t first = 0; first < positions; first += kSummed) {
      const int64_t count = std::min(kSummed, round_up(positions - first, kTileTerms));
      for (int64_t tap = 0; tap < taps_; ++tap) {
        const int64_t y = tap / columns_.taps, x = tap % columns_.taps;
        const int64_t plane = rows_.plane(y) * columns_.planes() + columns_.plane(x);
        const int64_t distance = (rows_.shift(y) - rows_.low()) * width_ + columns_.shift(x) - columns_.low();
        const int64_t odd = distance % 2, read = odd * positions_ + first + distance - odd;
        multiply_block<M>(a + first, b + plane * plane_ + read * kWide, count, sums + tap * kSquare);
      }
    }
  }

  template <int M>
  void multiply_block(const bfloat16* a, const bfloat16* b, int64_t positions, float* sums) const {
    constexpr int64_t kRow = kWide * sizeof(float), b_stride = 2 * kWide * sizeof(bfloat16);
    const int64_t a_stride = grad_row_ * static_cast<int64_t>(sizeof(bfloat16));
    float* lower = sums + kTileRows * kWide;
    load_sums<M, 2>(sums, lower, kRow);
    for (int64_t at = 0; at < positions; at += kTileTerms, a += kTileTerms, b += kTileTerms * kWide) {
      add_products<M, 2>(a, a + kTileRows * grad_row_, a_stride, b, b + 2 * kTileRows, b_stride);
    }
    store_sums<M, 2>(sums, lower, kRow);
  }

  void write() const {
    const int64_t area = p_.kernel[1] * p_.kernel[2], rows = filters_ / kWide, columns = depth_ / kWide;
    parallel_for(0, p_.filters, 1, [&](int64_t begin, int64_t end) {
      for (int64_t f = begin; f < end; ++f) {
        for (int64_t c = 0; c < channels_; ++c) {
          const int64_t channel = merged_ ? c % p_.channels : c;
          for (int64_t k = 0; k < p_.kernel[0]; ++k) {
            float* to = dweight_ + ((f * p_.channels + channel) * p_.kernel[0] + k) * area;
            const float* from = sums_.get() + ((k * rows + f / kWide) * columns + c / kWide) * taps_ * kSquare +
                                f % kWide * kWide + c % kWide;
            if (merged_) to[c / p_.channels] = *from;
            for (int64_t tap = 0; tap < taps_ && !merged_; ++tap) to[tap] = from[tap * kSquare];
          }
        }
      }
    });
  }

  const CausalConv3dParams& p_;
  const bfloat16* grad_;
  float* dweight_;
  const bool merged_;
  const TileAxis rows_, columns_;
  const int64_t taps_, planes_, channels_, depth_, filters_, width_;
  const Blocks y_blocks_;
  const int64_t positions_, plane_, grad_row_;
  const Blocks t_blocks_;
  const Scratch<float> sums_;
};

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels

#endif
