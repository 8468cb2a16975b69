// SPDX-License-Identifier: Apache-2.0
// Weight gradient of any convolution as matrix products over blocks of pixels: rows are (tap, channel) pairs, gathered
// as in the forward pass, columns are the filters of the output's gradient.
//
// Swapped (few filters, stride 1 and zero padding in space) the roles change: rows are (tap, filter) pairs, gathered
// from the output's gradient around every pixel of the input, columns are channels. A matrix of 3 columns would leave
// 13 of 16 lanes empty.
//
// With pairs of bfloat16 as operands (E, see matrix.h), a pair is a value of two pixels that follow each other.
#pragma once

#include "causal_conv3d/wgrad.h"
#include "common/pairs.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

template <typename S, bool Swapped, typename E = accumulate_t<S>>
class DirectWgrad {
 public:
  using A = accumulate_t<S>;
  using Cell = cell_of<E>;
  static constexpr int64_t L = kLanes<A>, kTerms = Operand<E>::kTerms;

  explicit DirectWgrad(const CausalConv3dWgradParams& p)
      : p_(p.conv),
        grad_(static_cast<const S*>(p.grad)),
        dweight_(static_cast<A*>(p.dweight)),
        area_(p_.kernel[1] * p_.kernel[2]),
        rows_(Swapped ? p_.filters : p_.channels, kTerms * kWgradRows, L),
        columns_(Swapped ? p_.channels : p_.filters, kTerms * kWgradColumns, PanelLayout<A>::kWide),
        taps_at_once_(std::clamp<int64_t>(kTerms * kWgradRows / rows_.size, 1, area_)),
        groups_((area_ + taps_at_once_ - 1) / taps_at_once_),
        row_(round_up(taps_at_once_ * std::min(rows_.block, rows_.size), kTerms * L) + kTerms * L),
        parts_(p_.kernel[0] * area_, rows_.size, columns_.size, p_.kernel[0] * groups_ * rows_.count * columns_.count,
               p_.batch * p_.out_size[0] * height() * width()) {}

  void run() const {
    const int64_t items = parts_.count() * p_.kernel[0] * groups_ * rows_.count * columns_.count;
    parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      const int64_t columns = round_up(columns_.block, L);
      const Scratch<E> pixels(kDepthBlock * row_), panel(kDepthBlock * columns);
      const Scratch<Cell> cells(kTerms == 1 ? 0 : kTerms * kDepthBlock * row_);
      const Scratch<A> sums(row_ * columns);
      for (int64_t item = begin; item < end; ++item) {
        run_item(item, pixels.get(), cells.get(), panel.get(), sums.get());
      }
    });
    const int64_t taps = p_.kernel[0] * area_, filter = p_.channels * taps;
    parts_.reduce(dweight_, Swapped ? filter : taps, Swapped ? taps : filter);
  }

 private:
  using Grid = WgradGrid<S>;

  // Rows of an item: `count` taps from the frame's tap `tap` on, of the channels (filters) [first, first + rows).
  struct Group {
    int64_t tap, count, first, rows;
  };

  int64_t height() const { return Swapped ? p_.in_size[1] : p_.out_size[1]; }
  int64_t width() const { return Swapped ? p_.in_size[2] : p_.out_size[2]; }

  Frame<S> gradient(int64_t b, int64_t t) const {
    return {grad_ + b * p_.y_stride[0] + t * p_.y_stride[1], p_.y_stride[2], p_.y_stride[3]};
  }

  void run_item(int64_t item, E* pixels, Cell* cells, E* panel, A* sums) const {
    const int64_t column = item % columns_.count, row = item / columns_.count % rows_.count;
    const int64_t group = item / columns_.count / rows_.count % groups_;
    const int64_t frame = item / columns_.count / rows_.count / groups_ % p_.kernel[0];
    const int64_t part = item / columns_.count / rows_.count / groups_ / p_.kernel[0];
    const int64_t tap = group * taps_at_once_;
    const Group rows{tap, std::min(taps_at_once_, area_ - tap), rows_.first(row), rows_.length(row)};
    const int64_t columns = columns_.length(column), padded = round_up(columns, L), depth = rows.count * rows.rows;
    const Grid grid(p_, frame, height(), width());
    const int64_t begin = part * grid.size() / parts_.count(), end = (part + 1) * grid.size() / parts_.count();
    const int64_t most = kTerms * kDepthBlock, blocks = (end - begin + most - 1) / most;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = begin + block * (end - begin) / blocks;
      const int64_t count = begin + (block + 1) * (end - begin) / blocks - first;
      const PanelLayout<A> layout((count + kTerms - 1) / kTerms, columns);
      if constexpr (kTerms == 1) {
        gather(grid, first, count, rows, pixels);
      } else {
        gather(grid, first, count, rows, cells);
        pair_pixels(cells, count, depth, pixels);
      }
      read_columns(grid, first, count, columns_.first(column), layout, panel);
      multiply<E, true>(pixels, row_, depth, panel, layout, sums, padded, block == 0);
    }
    if (blocks == 0) std::memset(sums, 0, depth * padded * sizeof(A));
    for (int64_t r = 0; r < depth; ++r) {
      const int64_t at = rows.tap + r / rows.rows, to = frame * area_ + (Swapped ? area_ - 1 - at : at);
      std::copy_n(sums + r * padded, padded, parts_.at(part, to, rows.first + r % rows.rows) + columns_.first(column));
    }
  }

  // Swapped, taps are counted from the last one: the pixels of the gradient that they read lie as those of the input
  // do.
  void gather(const Grid& grid, int64_t first, int64_t count, const Group& rows, Cell* pixels) const {
    const int64_t high = Swapped ? p_.out_size[1] : p_.in_size[1], wide = Swapped ? p_.out_size[2] : p_.in_size[2];
    int64_t before[3], stride[3];
    for (int i = 1; i < 3; ++i) {
      before[i] = Swapped ? (p_.kernel[i] - 1) * p_.dilation[i] - p_.before[i] : p_.before[i];
      stride[i] = Swapped ? 1 : p_.stride[i];
    }
    typename Grid::Position at = grid.at(first);
    for (int64_t n = 0; n < count; ++n, grid.step(at)) {
      const Frame<S> frame = Swapped ? gradient(at.b, at.t) : grid.frame(at.b, at.t);
      for (int64_t i = 0, run; i < rows.count; i += run) {
        const int64_t y = (rows.tap + i) / p_.kernel[2], x = (rows.tap + i) % p_.kernel[2];
        const int64_t h = at.h * stride[1] + y * p_.dilation[1] - before[1];
        const int64_t w = at.w * stride[2] + x * p_.dilation[2] - before[2];
        run = std::min(p_.kernel[2] - x, rows.count - i);
        const int64_t reach = (run - 1) * p_.dilation[2];
        const bool inside = h >= 0 && h < high && w >= 0 && w + reach < wide;
        Cell* to = pixels + n * row_ + i * rows.rows;
        if (inside && (run == 1 || reach * frame.column == (run - 1) * rows.rows)) {  // next to each other in memory
          copy_values(frame.data + h * frame.row + w * frame.column + rows.first, run * rows.rows, to);
          continue;
        }
        for (int64_t j = 0; j < run; ++j) {
          const S* pixel = pixel_of(frame, high, wide, h, w + j * p_.dilation[2]);
          copy_values(pixel == nullptr ? pixel : pixel + rows.first, rows.rows, to + j * rows.rows);
        }
      }
    }
  }

  const S* pixel_of(const Frame<S>& frame, int64_t high, int64_t wide, int64_t h, int64_t w) const {
    if (!Swapped) return pixel_at(p_, frame, h, w);
    const bool inside = h >= 0 && h < high && w >= 0 && w < wide;
    return inside ? frame.data + h * frame.row + w * frame.column : nullptr;
  }

  void pair_pixels(const Cell* cells, int64_t count, int64_t width, E* pixels) const {
#if defined(__AVX512BF16__)
    if constexpr (kTerms == 2) {
      for (int64_t n = 0; n < count; n += 2) {
        const Cell* from = cells + n * row_;
        for (int64_t r = 0; r < width; r += L) {
          const __m512i pairs = pair_up(from + r, n + 1 < count ? from + row_ + r : nullptr, 0xffff);
          _mm512_storeu_si512(pixels + n / 2 * row_ + r, pairs);
        }
      }
    }
#endif
  }

  void read_columns(const Grid& grid, int64_t first, int64_t count, int64_t column, const PanelLayout<A>& layout,
                    E* panel) const {
    constexpr int64_t wide = PanelLayout<A>::kWide;
    typename Grid::Position at = grid.at(first);
    const auto next = [&] {
      const Frame<S> frame = Swapped ? grid.frame(at.b, at.t) : gradient(at.b, at.t);
      const S* from = frame.data + at.h * frame.row + at.w * frame.column + column;
      grid.step(at);
      return from;
    };
    for (int64_t n = 0; n < layout.depth; ++n) {
      const S* from = next();
      if constexpr (kTerms == 1) {
        for (int64_t f = 0; f < layout.filters; f += wide) {
          copy_values(from + f, std::min(wide, layout.filters - f), panel + layout.block(0, f) + n * layout.width(f));
        }
      } else {
#if defined(__AVX512BF16__)
        const S* second = 2 * n + 1 < count ? next() : nullptr;
        for (int64_t f = 0; f < layout.padded; f += L) {
          const auto live = static_cast<__mmask16>(0xffffu >> (L - std::min(L, layout.filters - f)));
          const int64_t block = f / wide * wide;
          E* to = panel + layout.block(0, block) + n * layout.width(block) + f - block;
          _mm512_storeu_si512(to, pair_up(from + f, second == nullptr ? second : second + f, live));
        }
#endif
      }
    }
  }

  const CausalConv3dParams& p_;
  const S* grad_;
  A* dweight_;
  const int64_t area_;
  const Blocks rows_, columns_;
  const int64_t taps_at_once_, groups_, row_;
  const WgradParts<A> parts_;
};

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
