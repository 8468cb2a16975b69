// SPDX-License-Identifier: Apache-2.0
// Any convolution of bfloat16 by the tile registers of AMX, whose products take an eighth of the time of those of
// AVX512_BF16. Rows of A have to be one distance apart, so each frame that a strip of output pixels reads is copied
// with its border, as one plane for each residue of the stride: pixels that follow each other in the result, rows end
// to end, follow each other there, whichever tap reads them. Sixteen of them are a tile: of one row, or across rows
// with the border in between, whose results are dropped, where that takes fewer tiles. Where channels are few, the taps
// of a frame lie side by side in a pixel instead.
//
// Two by two tiles of sums stay in registers over all taps, 144 products at most (of 864 with 1024 channels, all of
// them took 1.27 times as long): 1.4 TFLOP/s a thread with 128 channels 3x3x3, where registers alone would allow 2.3.
// The rest is what tiles take from the second cache, 1.75 alone, copies and results. From 512 channels on, taps come
// before channels, which reads a line of pixels nine times while the first cache holds it, and pixels lie a line
// further apart, since 16 of them a multiple of 1 KB apart fall into 4 sets of it: 1.24 to 1.38 TFLOP/s with 512
// channels.
#pragma once

#include <vector>

#include "causal_conv3d/source.h"
#include "causal_conv3d/tile_axis.h"
#include "causal_conv3d/weights.h"

#if defined(__AVX512BF16__) && defined(VK_CPU_HAS_AMX)

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

class DirectTiles {
 public:
  explicit DirectTiles(const CausalConv3dParams& p)
      : p_(p),
        area_(p.kernel[1] * p.kernel[2]),
        merged_(merges_taps(p)),
        rows_(tile_axis(p, 1)),
        columns_(tile_axis(p, 2)),
        taps_(rows_.taps * columns_.taps),
        planes_(rows_.planes() * columns_.planes()),
        depth_(round_up(merged_ ? area_ * p.channels : p.channels, kStep)),
        taps_first_(depth_ > kManyChannels),
        pixel_(depth_ + (taps_first_ ? kStep : 0)),
        most_(std::clamp<int64_t>(kScratchValues / (p.kernel[0] * planes_ * pixel_), kTileRows, kMostPixels)),
        x_blocks_(p.out_size[2], std::max<int64_t>(most_ / 4, 32), 1),
        y_blocks_(p.out_size[1], rows_at_once(), 1),
        t_blocks_(p.out_size[0], std::max<int64_t>(most_ / (width(x_blocks_.block) * height(y_blocks_.block)), 1), 1),
        filters_(p.filters, filters_at_once(), kWide),
        panels_{p.kernel[0] * area_, area_ / taps_, p.channels, p.filters, kTileRows},
        weights_(panels_.size()),
        bias_(round_up(p.filters, kWide)) {
    pack_direct<Bfloat16Pair>(p, panels_, weights_.get());
    const int64_t steps = taps_ * depth_ / kStep;
    places_.resize(p.kernel[0] * steps);
    for (int64_t i = 0; i < p.kernel[0] * taps_; ++i) {
      const auto panel = panels_.layout(i * panels_.per_panel);
      const int64_t block = depth_block(panel.depth);
      for (int64_t at = 0; at < panel.depth; at += kTileRows) {
        const int64_t first = at / block * block, origin = panels_.first(i * panels_.per_panel) + first * panel.padded;
        Place& place = places_[i / taps_ * steps + step_at(i % taps_, at / kTileRows)];
        place = {origin, std::min(block, panel.depth - first), at - first};
      }
    }
    std::fill_n(bias_.get(), round_up(p.filters, kWide), 0.0f);
    read_bias<float>(p, bias_.get());
  }

  void run() const {
    const int64_t strips = p_.batch * t_blocks_.count * y_blocks_.count * x_blocks_.count;
    const int64_t t_most = t_blocks_.block, rows = y_blocks_.block;
    const int64_t pixels = height(rows) * width(x_blocks_.block) + kTileRows;
    const int64_t results = rows * (width(x_blocks_.block) + kTileRows) + kTileRows;
    parallel_for(0, strips * filters_.count, 1, [&](int64_t begin, int64_t end) {
      const Scratch<bfloat16> scratch(t_most * p_.kernel[0] * planes_ * pixels * pixel_ + kStep);
      const Scratch<float> sums(t_most * results * kWide);
      const TileScope scope;
      Strip strip;
      for (int64_t item = begin; item < end; ++item) {
        place(item, strip);
        copy_frames(strip, scratch.get());
        run_strip(strip, scratch.get(), sums.get());
      }
    });
  }

 private:
  static constexpr int64_t kStep = kTileTerms;                 // channels of a product
  static constexpr int64_t kWide = 2 * kTileRows;              // filters of a block: two tiles
  static constexpr int64_t kMostPixels = 512;                  // of a strip
  static constexpr int64_t kScratchValues = int64_t{1} << 19;  // 1 MB: half a core's second cache
  static constexpr int64_t kChunkSteps = 144;                  // 288 KB of weights
  static constexpr int64_t kManyChannels = 384;
  static constexpr int64_t kItems = 8;  // wanted at least, so that threads get equal shares

  // A part of some frames and the filters [begin, end).
  struct Strip {
    int64_t b, t, frames, y, rows, x, columns, begin, end;
    int64_t pitch;  // results from one row to the next
    int64_t place = -1;
    std::vector<Frame<bfloat16>> held;  // copies there are, of the strip's part of frames
    std::vector<int64_t> source;        // [frame, frame of taps]: which of them is read, or -1 for zeros
  };
  // One product: the distance of its pixels from those of the first, which weights, and where they are.
  struct Step {
    int64_t a, place;
    const Bfloat16Pair* b;
  };
  // Where the weights of a step lie: origin + filter * depth + row * (the block's filters).
  struct Place {
    int64_t origin, depth, row;
  };
  // Sixteen results of a frame.
  struct Tile {
    const bfloat16* a;
    float* c;
    int64_t t, first;
  };
  // Tiles of frames whose taps read frames the same distances apart.
  struct Group {
    std::vector<Step> steps;
    std::vector<Tile> tiles;
  };

  int64_t width(int64_t columns) const { return columns + columns_.border(); }
  int64_t height(int64_t rows) const { return rows + rows_.border(); }
  int64_t plane_size(const Strip& s) const { return (height(s.rows) * width(s.columns) + kTileRows) * pixel_; }
  // Tiles of a frame whose rows are this far apart.
  static int64_t tiles_of(const Strip& s, int64_t pitch) {
    return ((s.rows - 1) * pitch + s.columns + kTileRows - 1) / kTileRows;
  }

  // Of several frames, where borders in time are wider than those in space: each is copied once for all that read it.
  int64_t rows_at_once() const {
    const int64_t frames = rows_.border() > 0 ? 1 : std::min<int64_t>(p_.out_size[0], 4 * (p_.kernel[0] - 1) + 1);
    return std::clamp<int64_t>(most_ / (width(x_blocks_.block) * frames), 1, p_.out_size[1]);
  }
  int64_t filters_at_once() const {
    const int64_t strips = p_.batch * t_blocks_.count * y_blocks_.count * x_blocks_.count;
    const int64_t parts = strips % max_threads() == 0 ? 1 : (kItems + strips - 1) / strips;
    return std::max(round_up((p_.filters + parts - 1) / parts, kWide), kWide);
  }

  // Strips of one place follow each other in time, and find most of what they read copied already.
  void place(int64_t item, Strip& s) const {
    const int64_t part = item % filters_.count, t = item / filters_.count % t_blocks_.count;
    const int64_t place = item / filters_.count / t_blocks_.count, y = place / x_blocks_.count % y_blocks_.count;
    s.b = place / x_blocks_.count / y_blocks_.count;
    s.t = t_blocks_.first(t), s.frames = t_blocks_.length(t);
    s.y = y_blocks_.first(y), s.rows = y_blocks_.length(y);
    s.x = x_blocks_.first(place % x_blocks_.count), s.columns = x_blocks_.length(place % x_blocks_.count);
    s.begin = filters_.first(part), s.end = s.begin + filters_.length(part);
    const int64_t whole = round_up(s.columns, kTileRows);
    s.pitch = tiles_of(s, whole) <= tiles_of(s, width(s.columns)) ? whole : width(s.columns);
    if (place != s.place) s.held.assign(t_blocks_.block * p_.kernel[0], {nullptr, 0, 0});
    s.place = place;
  }

  void copy_frames(Strip& s, bfloat16* scratch) const {
    const int64_t taps = p_.kernel[0], count = s.frames * taps;
    std::vector<Frame<bfloat16>> read(count);
    std::vector<bool> wanted(s.held.size(), false);
    s.source.assign(count, -1);
    const auto find = [&](int64_t i) {
      const int64_t at = std::find(s.held.begin(), s.held.end(), read[i]) - s.held.begin();
      return at < static_cast<int64_t>(s.held.size()) ? at : -1;
    };
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = (s.t + i / taps) * p_.stride[0] + i % taps * p_.dilation[0] - p_.before[0];
      read[i] = frame_at<bfloat16>(p_, s.b, t);
      if (read[i].data != nullptr) s.source[i] = find(i);
      if (s.source[i] >= 0) wanted[s.source[i]] = true;
    }
    int64_t next = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (read[i].data == nullptr || s.source[i] >= 0) continue;
      s.source[i] = find(i);  // copied a moment ago
      if (s.source[i] >= 0) continue;
      while (wanted[next]) ++next;
      s.held[next] = read[i], s.source[i] = next, wanted[next] = true;
      copy_frame(s, read[i], scratch + next * planes_ * plane_size(s));
    }
  }

  void copy_frame(const Strip& s, const Frame<bfloat16>& frame, bfloat16* to) const {
    if (merged_) return gather_taps(s, frame, to);
    for (int64_t i = 0; i < planes_; ++i, to += plane_size(s)) {
      const int64_t h = rows_.residue(i / columns_.planes()), w = columns_.residue(i % columns_.planes());
      for (int64_t y = 0; y < height(s.rows); ++y) {
        const int64_t row = (s.y + y + rows_.low()) * p_.stride[1] + h;
        copy_row(s, frame, row, w, to + y * width(s.columns) * pixel_);
      }
    }
  }

  void copy_row(const Strip& s, const Frame<bfloat16>& frame, int64_t row, int64_t residue, bfloat16* to) const {
    const int64_t step = p_.stride[2], count = width(s.columns), first = (s.x + columns_.low()) * step + residue;
    // Pixels [inside, outside) of the row lie in the frame.
    const int64_t inside = std::clamp<int64_t>((-first + step - 1) / step, 0, count);
    const int64_t outside = std::clamp<int64_t>((p_.in_size[2] - first + step - 1) / step, inside, count);
    const bool exists = p_.replicate_space || (row >= 0 && row < p_.in_size[1]);
    const auto copy = [&](int64_t x) __attribute__((always_inline)) {
      copy_values(exists ? pixel_at(p_, frame, row, first + x * step) : nullptr, p_.channels, to + x * pixel_);
    };
    for (int64_t x = 0; x < inside; ++x) copy(x);
    if (exists && step * frame.column == pixel_ && pixel_ == p_.channels && outside > inside) {
      std::memcpy(to + inside * pixel_, pixel_at(p_, frame, row, first + inside * step),
                  (outside - inside) * pixel_ * sizeof(bfloat16));
    } else {
      for (int64_t x = inside; x < outside; ++x) copy(x);
    }
    for (int64_t x = outside; x < count; ++x) copy(x);
  }

  void gather_taps(const Strip& s, const Frame<bfloat16>& frame, bfloat16* to) const {
    for (int64_t i = 0; i < s.rows * s.columns; ++i, to += pixel_) {
      copy_values(nullptr, kStep, to + depth_ - kStep);
      gather_pixel(p_, frame, s.y + i / s.columns, s.x + i % s.columns, to);
    }
  }

  void run_strip(const Strip& s, const bfloat16* scratch, float* sums) const {
    std::vector<Group> groups = groups_of(s, scratch, sums);
    for (int64_t f = s.begin; f < s.end; f += kWide) {
      const int64_t width = panels_.layout(0).width(f);
      for (Group& group : groups) {
        for (Step& step : group.steps) {
          const Place& place = places_[step.place];
          step.b = weights_.get() + place.origin + f * place.depth + place.row * width;
        }
        if (width == kWide) {
          multiply_steps<2>(s, f, group);
        } else {
          multiply_steps<1>(s, f, group);
        }
      }
    }
  }

  std::vector<Group> groups_of(const Strip& s, const bfloat16* scratch, float* sums) const {
    const int64_t tiles = tiles_of(s, s.pitch), taps = p_.kernel[0], frame = planes_ * plane_size(s);
    const std::vector<int64_t> spots = spots_of(s);
    const int64_t size = static_cast<int64_t>(spots.size());
    std::vector<Group> groups;
    std::vector<int64_t> distances(taps), last;  // of the frames read from the first that is, -1: zeros
    for (int64_t t = 0; t < s.frames; ++t) {
      const int64_t* source = s.source.data() + t * taps;
      int64_t first = -1;
      for (int64_t k = 0; k < taps; ++k) {
        if (first < 0) first = source[k];
        distances[k] = source[k] < 0 ? -1 : source[k] - first + s.frames * taps;
      }
      if (groups.empty() || distances != last) {
        groups.emplace_back();
        for (int64_t k = 0; k < taps; ++k) {
          const int64_t from = source[k] < 0 ? -1 : (source[k] - first) * frame;
          for (int64_t i = 0; i < size && source[k] >= 0; ++i) {
            groups.back().steps.push_back({from + spots[i], k * size + i, nullptr});
          }
        }
        last = distances;
      }
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t at = i * kTileRows, pixel = at / s.pitch * width(s.columns) + at % s.pitch;
        const bfloat16* a = scratch + std::max<int64_t>(first, 0) * frame + pixel * pixel_;
        groups.back().tiles.push_back({a, sums + (t * tiles + i) * kTileRows * kWide, t, at});
      }
    }
    return groups;
  }

  // The distances between the pixels that the products of one frame of taps read.
  std::vector<int64_t> spots_of(const Strip& s) const {
    const int64_t blocks = depth_ / kStep;
    std::vector<int64_t> spots(taps_ * blocks);
    for (int64_t i = 0; i < taps_; ++i) {
      const int64_t y = i / columns_.taps, x = i % columns_.taps;
      const int64_t row = rows_.shift(y) - rows_.low(), column = columns_.shift(x) - columns_.low();
      const int64_t a = (rows_.plane(y) * columns_.planes() + columns_.plane(x)) * plane_size(s) +
                        (row * width(s.columns) + column) * pixel_;
      for (int64_t c = 0; c < blocks; ++c) spots[step_at(i, c)] = a + c * kStep;
    }
    return spots;
  }
  // Of tap i in space and block c of channels.
  int64_t step_at(int64_t i, int64_t c) const { return taps_first_ ? c * taps_ + i : i * (depth_ / kStep) + c; }

  template <int V>
  void multiply_steps(const Strip& s, int64_t filter, const Group& group) const {
    const int64_t count = static_cast<int64_t>(group.steps.size());
    const int64_t chunks = std::max<int64_t>(1, (count + kChunkSteps - 1) / kChunkSteps);
    const int64_t size = static_cast<int64_t>(group.tiles.size());
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Step* begin = group.steps.data() + chunk * count / chunks;
      const Step* end = group.steps.data() + (chunk + 1) * count / chunks;
      for (int64_t i = 0; i < size; i += 2) {
        const Tile *top = &group.tiles[i], *bottom = top + 1;
        if (i + 1 < size) {
          multiply_tiles<2, V>(begin, end, *top, *bottom, chunk == 0);
        } else {
          multiply_tiles<1, V>(begin, end, *top, *top, chunk == 0);
        }
        if (chunk + 1 < chunks) continue;
        write(s, filter, *top);
        if (i + 1 < size) write(s, filter, *bottom);
      }
    }
  }

  template <int M, int V>
  void multiply_tiles(const Step* begin, const Step* end, const Tile& top, const Tile& bottom, bool start) const {
    constexpr int64_t kRow = kWide * sizeof(float), b_stride = V * kTileBytes;
    const int64_t a_stride = pixel_ * static_cast<int64_t>(sizeof(bfloat16));
    if (start) {
      clear_sums();
    } else {
      load_sums<M, V>(top.c, bottom.c, kRow);
    }
    for (const Step* step = begin; step < end; ++step) {
      add_products<M, V>(top.a + step->a, bottom.a + step->a, a_stride, step->b, step->b + kTileRows, b_stride);
    }
    store_sums<M, V>(top.c, bottom.c, kRow);
  }

  void write(const Strip& s, int64_t filter, const Tile& tile) const {
    const Epilogue<bfloat16> epilogue(p_, bias_.get());
    const int64_t end = std::min(filter + kWide, p_.filters);
    constexpr int64_t L = kLanes<float>;
    int64_t y = tile.first / s.pitch, x = tile.first % s.pitch;
    const float* row = tile.c;
    for (int64_t left = kTileRows; left > 0 && y < s.rows; ++y, x = 0) {
      const int64_t count = std::min(left, s.pitch - x), inside = std::min(x + count, s.columns);
      int64_t to = epilogue.y_offset(s.b, s.t + tile.t, s.y + y, s.x + x);
      int64_t residual = epilogue.residual_offset(s.b, s.t + tile.t, s.y + y, s.x + x);
      const float* sums = row;
      for (int64_t i = x; i < inside; ++i, sums += kWide) {
        if (filter + kWide == end) {
          epilogue.store_both(to, residual, filter, load_vec(sums), load_vec(sums + L));
        } else {
          for (int64_t f = filter; f < end; f += L) epilogue.store(to, residual, f, load_vec(sums + f - filter));
        }
        to += p_.y_stride[3], residual += p_.residual_stride[3];
      }
      row += count * kWide;
      left -= count;
    }
  }

  const CausalConv3dParams& p_;
  const int64_t area_;
  const bool merged_;
  const TileAxis rows_, columns_;
  const int64_t taps_, planes_, depth_;
  const bool taps_first_;
  const int64_t pixel_, most_;
  const Blocks x_blocks_, y_blocks_, t_blocks_, filters_;
  const DirectPanels<Bfloat16Pair> panels_;
  const Scratch<Bfloat16Pair> weights_;
  const Scratch<float> bias_;
  std::vector<Place> places_;
};

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels

#endif
