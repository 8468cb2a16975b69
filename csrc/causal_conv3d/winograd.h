// SPDX-License-Identifier: Apache-2.0
// 3x3 convolutions of stride 1 in space by Winograd's F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308), with any taps in
// time: every frame is transformed by itself, and products are summed over the taps in time before going back. So an
// output does not depend on where a chunk of the clip begins.
//
// Per block of 2x2-pixel tiles: V = B^T d B for every channel, one matrix product per position of V, Y = A^T M A.
// Only the block's V and M exist in memory.
#pragma once

#include "causal_conv3d/source.h"
#include "causal_conv3d/weights.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

// B^T d along one axis. Plain: 4 inputs d, 4 results. Upsampled: d holds the 3 pixels under the 4 doubled ones
// (d0, d1, d1, d2), whose third result is zero; the second one's factor 2 is in the weights.
template <typename A, bool Upsampled>
VK_ALWAYS_INLINE void transform_pixels(const Vec<A>* d, Vec<A>* v) {
  if (Upsampled) {
    v[0] = d[0] - d[1];
    v[1] = d[1];
    v[2] = d[1] - d[2];
  } else {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
}

// A^T m along one axis, A^T = [1 1 1 0; 0 1 -1 -1].
template <typename A, bool Upsampled>
VK_ALWAYS_INLINE void transform_products(const Vec<A>* m, Vec<A>* y) {
  if (Upsampled) {
    y[0] = m[0] + m[1];
    y[1] = m[1] - m[2];
  } else {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
}

// V = B^T d B of one vector of channels; `load(i)` is pixel i of the tile, the results lie `plane` apart.
template <typename A, bool Upsampled, typename Load>
VK_ALWAYS_INLINE void transform_tile(const Load& load, int64_t plane, A* to) {
  constexpr int P = products(Upsampled);
  Vec<A> columns[P][P], v[P];
#pragma GCC unroll 4
  for (int j = 0; j < P; ++j) {
    Vec<A> d[P];
#pragma GCC unroll 4
    for (int i = 0; i < P; ++i) d[i] = load(i * P + j);
    transform_pixels<A, Upsampled>(d, v);
#pragma GCC unroll 4
    for (int i = 0; i < P; ++i) columns[i][j] = v[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < P; ++i) {
    transform_pixels<A, Upsampled>(columns[i], v);
#pragma GCC unroll 4
    for (int j = 0; j < P; ++j) store_vec(to + (i * P + j) * plane, v[j]);
  }
}

// The same of `channels` channels; whole vectors are written.
template <typename S, bool Upsampled>
inline void read_tile(const S* const* pixels, int64_t channels, int64_t plane, accumulate_t<S>* to) {
  using A = accumulate_t<S>;
  constexpr int64_t L = kLanes<A>;
  int64_t c = 0;
  for (; c + L <= channels; c += L) {
    transform_tile<A, Upsampled>([&](int i) __attribute__((always_inline)) { return load_vec(pixels[i] + c); }, plane,
                                 to + c);
  }
  const int rest = static_cast<int>(channels - c);
  if (rest > 0) transform_tile<A, Upsampled>([&](int i) { return load_part(pixels[i] + c, rest); }, plane, to + c);
}

template <typename S, bool Upsampled>
class Winograd {
 public:
  using A = accumulate_t<S>;
  static constexpr int P = products(Upsampled);  // pixels read along each side of a tile, and products
  static constexpr int64_t L = kLanes<A>;

  explicit Winograd(const CausalConv3dParams& p)
      : p_(p),
        layout_(p.channels, p.filters),
        tiles_high_((p.out_size[1] + 1) / 2),
        tiles_wide_((p.out_size[2] + 1) / 2),
        tiles_(tiles_high_ * tiles_wide_),
        blocks_((tiles_ + kRowsAtOnce - 1) / kRowsAtOnce),
        // One more cache line than a power of two, so that the rows of a matrix fall into different cache sets.
        row_(round_up(p.channels, L) + L),
        weights_(p.kernel[0] * P * P * layout_.size()),
        bias_(layout_.padded),
        zeros_(p.channels + L) {
    VK_DISPATCH_FLOATING(p.weight_dtype, ([&] { pack_winograd<A, scalar_t, Upsampled>(p, weights_.get()); }));
    read_bias<A>(p, bias_.get());
    std::memset(zeros_.get(), 0, (p.channels + L) * sizeof(S));
  }

  void run() const {
    const int64_t most = std::min(kRowsAtOnce, tiles_);
    parallel_for(0, p_.batch * p_.out_size[0] * blocks_, 1, [&](int64_t begin, int64_t end) {
      const Scratch<A> inputs(P * P * most * row_), sums(P * P * most * layout_.padded);
      for (int64_t item = begin; item < end; ++item) run_block(item, inputs.get(), sums.get());
    });
  }

 private:
  void run_block(int64_t item, A* inputs, A* sums) const {
    const int64_t block = item % blocks_, t = item / blocks_ % p_.out_size[0], b = item / blocks_ / p_.out_size[0];
    const int64_t first = block * tiles_ / blocks_, count = (block + 1) * tiles_ / blocks_ - first;
    Frame<S> current{nullptr, 0, 0};
    bool empty = true;
    for (int64_t tap = 0; tap < p_.kernel[0]; ++tap) {
      const Frame<S> frame = frame_at<S>(p_, b, t * p_.stride[0] - p_.before[0] + tap * p_.dilation[0]);
      if (frame.data == nullptr) continue;
      if (!(frame == current)) read_tiles(frame, first, count, inputs);
      current = frame;
      for (int i = 0; i < P * P; ++i) {
        multiply<A>(inputs + i * count * row_, row_, count, weights_.get() + (tap * P * P + i) * layout_.size(),
                    layout_, sums + i * count * layout_.padded, layout_.padded, empty);
      }
      empty = false;
    }
    if (empty) std::memset(sums, 0, P * P * count * layout_.padded * sizeof(A));
    write_tiles(b, t, first, count, sums);
  }

  void read_tiles(const Frame<S>& frame, int64_t first, int64_t count, A* inputs) const {
    // Upsampled: the tile of doubled pixels 2i-1 .. 2i+2 lies over the pixels i-1 .. i+1.
    constexpr int64_t step = Upsampled ? 1 : 2;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t h = (first + n) / tiles_wide_ * step - p_.before[1],
                    w = (first + n) % tiles_wide_ * step - p_.before[2];
      const S* pixels[P * P];
      for (int i = 0; i < P * P; ++i) {
        const S* pixel = pixel_at(p_, frame, h + i / P, w + i % P);
        pixels[i] = pixel == nullptr ? zeros_.get() : pixel;
      }
      read_tile<S, Upsampled>(pixels, p_.channels, count * row_, inputs + n * row_);
    }
  }

  void write_tiles(int64_t b, int64_t t, int64_t first, int64_t count, const A* sums) const {
    const Epilogue<S> epilogue(p_, bias_.get());
    const int64_t plane = count * layout_.padded;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t h = (first + n) / tiles_wide_ * 2, w = (first + n) % tiles_wide_ * 2;
      int64_t y[4], residual[4];
      for (int i = 0; i < 4; ++i) {
        y[i] = epilogue.y_offset(b, t, h + i / 2, w + i % 2);
        residual[i] = epilogue.residual_offset(b, t, h + i / 2, w + i % 2);
      }
      const bool below = h + 1 < p_.out_size[1], right = w + 1 < p_.out_size[2];
      for (int64_t f = 0; f < p_.filters; f += L) {
        const A* from = sums + n * layout_.padded + f;
        Vec<A> rows[2][P], out[2];
#pragma GCC unroll 4
        for (int j = 0; j < P; ++j) {
          Vec<A> m[P];
#pragma GCC unroll 4
          for (int i = 0; i < P; ++i) m[i] = load_vec(from + (i * P + j) * plane);
          transform_products<A, Upsampled>(m, out);
          rows[0][j] = out[0];
          rows[1][j] = out[1];
        }
        transform_products<A, Upsampled>(rows[0], out);
        epilogue.store(y[0], residual[0], f, out[0]);
        if (right) epilogue.store(y[1], residual[1], f, out[1]);
        if (!below) continue;
        transform_products<A, Upsampled>(rows[1], out);
        epilogue.store(y[2], residual[2], f, out[0]);
        if (right) epilogue.store(y[3], residual[3], f, out[1]);
      }
    }
  }

  const CausalConv3dParams& p_;
  const PanelLayout<A> layout_;
  const int64_t tiles_high_, tiles_wide_, tiles_, blocks_, row_;
  const Scratch<A> weights_, bias_;
  const Scratch<S> zeros_;
};

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
