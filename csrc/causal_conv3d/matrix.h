// SPDX-License-Identifier: Apache-2.0
// Small matrix products C[rows, filters] += A[rows, depth] * B[depth, filters] that the convolutions' algorithms end
// in.
//
// A is row-major (Transposed: column-major, as weight gradients have it) and read by broadcasts; B is packed
// (PanelLayout); C is row-major. Sums over at most kDepthBlock terms stay in registers and are then added to C: 14 x 32
// partial sums fill 28 of AVX-512's 32 registers (6 x 16 fill 12 of AVX2's 16), and the short chains keep the rounding
// error near that of pairwise summation.
//
// Operands are floats, doubles, or pairs of bfloat16: neighbours along the depth, whose two products one instruction of
// AVX512_BF16 adds to a sum of float32. Depths, strides and panels then count pairs.
#pragma once

#include <algorithm>
#include <array>
#include <cstdlib>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/cpu.h"
#include "common/round_up.h"
#include "common/vmath.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kRowsInRegisters = 14;
#elif defined(__AVX2__)
constexpr int kRowsInRegisters = 6;
#else
constexpr int kRowsInRegisters = 4;
#endif
constexpr int64_t kDepthBlock = 128;
// Rows of A that the algorithms prepare at a time: at least 64, and whole tiles (64 rows of 14 left 6 % of the products
// empty or in lower tiles).
constexpr int64_t kRowsAtOnce = (64 + kRowsInRegisters - 1) / kRowsInRegisters * kRowsInRegisters;

// Scratch memory, aligned to cache lines and not initialised. From 4 MiB on in pages of 2 MiB where the system has
// them: the 50 MB of transformed weights of 512 x 512 x 27 took 42 ms, 21 of them faults of 4 KiB pages.
template <typename A>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = std::max<int64_t>(count, 1) * sizeof(A);
    const size_t page = bytes < (size_t{4} << 20) ? 64 : size_t{2} << 20, whole = (bytes + page - 1) / page * page;
    data_ = static_cast<A*>(std::aligned_alloc(page, whole));
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (page > 64) madvise(data_, whole, MADV_HUGEPAGE);  // a wish: any answer will do
#endif
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* get() const { return data_; }

 private:
  A* data_;
};

// [0, size) in nearly equal blocks, multiples of `unit`, of at most `most`.
struct Blocks {
  int64_t size, block, count;

  Blocks(int64_t size_, int64_t most, int64_t unit)
      : size(size_), block(round_up((size_ + (size_ + most - 1) / most - 1) / ((size_ + most - 1) / most), unit)) {
    count = (size + block - 1) / block;
  }
  int64_t first(int64_t i) const { return i * block; }
  int64_t length(int64_t i) const { return std::min(block, size - i * block); }
};

// Depth of each block when `depth` is cut into nearly equal blocks, whole tiles of AMX, of at most kDepthBlock.
inline int64_t depth_block(int64_t depth) {
  const int64_t blocks = (depth + kDepthBlock - 1) / kDepthBlock;
  return blocks == 0 ? 1 : round_up((depth + blocks - 1) / blocks, 16);
}

// Places of B's elements: blocks of depth, in them blocks of 2 vectors of filters (the last may have 1), in them the
// rows of B one after the other. A panel is one matrix B.
template <typename A>
struct PanelLayout {
  static constexpr int64_t kWide = 2 * kLanes<A>;

  int64_t depth, filters, padded;  // padded: filters up to whole vectors

  PanelLayout(int64_t depth_, int64_t filters_)
      : depth(depth_), filters(filters_), padded(round_up(filters_, kLanes<A>)) {}
  int64_t size() const { return depth * padded; }
  int64_t width(int64_t filter) const { return std::min(kWide, padded - filter); }
  // Offset of the block that begins at this depth (a multiple of depth_block) and filter (a multiple of kWide).
  int64_t block(int64_t at_depth, int64_t filter) const {
    return at_depth * padded + filter * std::min(depth_block(depth), depth - at_depth);
  }
};

// One operand. `Cell`: what memory holds of it, kTerms times. `Sum`: what products are added up in.
template <typename E>
struct Operand {
  using Cell = E;
  using Sum = E;
  using Lanes = Vec<E>;
  static constexpr int64_t kTerms = 1;

  static VK_ALWAYS_INLINE Lanes load(const E* from) { return load_vec(from); }
  static VK_ALWAYS_INLINE Lanes repeat(const E* from) { return broadcast(*from); }
  static VK_ALWAYS_INLINE Vec<E> add(Vec<E> sum, Lanes a, Lanes b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
// Subnormal numbers count as zero.
struct Bfloat16Pair {
  bfloat16 terms[2];
};
template <>
struct Operand<Bfloat16Pair> {
  using Cell = bfloat16;
  using Sum = float;
  using Lanes = __m512i;
  static constexpr int64_t kTerms = 2;

  static VK_ALWAYS_INLINE Lanes load(const Bfloat16Pair* from) { return _mm512_loadu_si512(from); }
  static VK_ALWAYS_INLINE Lanes repeat(const Bfloat16Pair* from) {
    int32_t both;
    std::memcpy(&both, from, sizeof(both));
    return _mm512_set1_epi32(both);
  }
  static VK_ALWAYS_INLINE Vec<float> add(Vec<float> sum, Lanes a, Lanes b) {
    const __m512 wide = reinterpret_cast<__m512>(sum);
    return reinterpret_cast<Vec<float>>(
        _mm512_dpbf16_ps(wide, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }
};
#endif

template <typename E>
using sum_of = typename Operand<E>::Sum;
template <typename E>
using cell_of = typename Operand<E>::Cell;

template <typename E, bool Transposed, int R, int V>
void multiply_block(const E* a, int64_t lda, const E* b, int64_t depth, sum_of<E>* c, int64_t ldc, bool first) {
  using A = sum_of<E>;
  constexpr int L = kLanes<A>;
  Vec<A> sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[r][v] = Vec<A>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    typename Operand<E>::Lanes row[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) row[v] = Operand<E>::load(b + (k * V + v) * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto value = Operand<E>::repeat(Transposed ? a + k * lda + r : a + r * lda + k);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] = Operand<E>::add(sum[r][v], value, row[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      A* to = c + r * ldc + v * L;
      store_vec(to, first ? sum[r][v] : load_vec(to) + sum[r][v]);
    }
  }
}

template <typename E>
using BlockKernel = void (*)(const E*, int64_t, const E*, int64_t, sum_of<E>*, int64_t, bool);

template <typename E, bool Transposed, int V, int... R>
constexpr std::array<BlockKernel<E>, sizeof...(R)> block_kernels(std::integer_sequence<int, R...>) {
  return {&multiply_block<E, Transposed, R + 1, V>...};
}

// Memory that is read and written next. The product asks for it piece by piece: pixels far apart in memory come too
// late otherwise (5 % of a pointwise convolution's time).
struct Ahead {
  const char *read = nullptr, *write = nullptr;
  int64_t read_bytes = 0, write_bytes = 0;

  VK_ALWAYS_INLINE void touch(int64_t part, int64_t parts) const {
    for (int64_t i = read_bytes * part / parts; i < read_bytes * (part + 1) / parts; i += 64) {
      __builtin_prefetch(read + i, 0, 2);
    }
    for (int64_t i = write_bytes * part / parts; i < write_bytes * (part + 1) / parts; i += 64) {
      __builtin_prefetch(write + i, 1, 2);
    }
  }
};

// Rows of A and the rows of C that their products are added to; both `lda` and `ldc` apart.
template <typename E>
struct MatrixRows {
  const E* a;
  int64_t lda;
  sum_of<E>* c;
  int64_t ldc;
  int64_t count;
};

// C (+)= A * B for the filters [begin, end) of one panel, begin a multiple of kWide; `first` overwrites C. `tile(i)`
// are at most kRowsInRegisters rows each.
template <typename E, bool Transposed = false, typename Tile>
inline void multiply_tiles(const Tile& tile, int64_t count, const E* panel, const PanelLayout<sum_of<E>>& layout,
                           bool first, const Ahead& ahead = {}, int64_t begin = 0,
                           int64_t end = std::numeric_limits<int64_t>::max()) {
  using A = sum_of<E>;
  using Rows = std::make_integer_sequence<int, kRowsInRegisters>;
  static constexpr auto wide = block_kernels<E, Transposed, 2>(Rows{});
  static constexpr auto narrow = block_kernels<E, Transposed, 1>(Rows{});
  const int64_t step = depth_block(layout.depth), width = PanelLayout<A>::kWide;
  constexpr int64_t kBytes = sizeof(E);
  const int64_t stop = std::min(end, layout.padded);
  const int64_t parts = (layout.depth + step - 1) / step * ((stop - begin + width - 1) / width);
  int64_t part = 0;
  for (int64_t d = 0; d < layout.depth; d += step) {
    const int64_t depth = std::min(step, layout.depth - d);
    for (int64_t f = begin; f < stop; f += width, ++part) {
      const auto& kernels = layout.width(f) == width ? wide : narrow;
      const E* b = panel + layout.block(d, f);
      // Twice the products a second read weights twice as fast: the next block is on its way before it is needed.
      const Ahead next{reinterpret_cast<const char*>(b + depth * width), nullptr, depth * width * kBytes, 0};
      for (int64_t i = 0; i < count; ++i) {
        const MatrixRows<E> rows = tile(i);
        ahead.touch(part * count + i, parts * count);
        if (Operand<E>::kTerms > 1) next.touch(i, count);
        const E* from = rows.a + (Transposed ? d * rows.lda : d);
        kernels[rows.count - 1](from, rows.lda, b, depth, rows.c + f, rows.ldc, first && d == 0);
      }
    }
  }
}

// The i-th of `tiles` tiles of nearly equal height.
template <typename E, bool Transposed = false>
inline MatrixRows<E> tile_of(const MatrixRows<E>& rows, int64_t i, int64_t tiles) {
  const int64_t first = rows.count * i / tiles, end = rows.count * (i + 1) / tiles;
  const E* from = rows.a + (Transposed ? first : first * rows.lda);
  return {from, rows.lda, rows.c + first * rows.ldc, rows.ldc, end - first};
}
inline int64_t tiles_for(int64_t rows) { return (rows + kRowsInRegisters - 1) / kRowsInRegisters; }

// The same for rows that are one matrix.
template <typename E, bool Transposed = false>
inline void multiply(const E* a, int64_t lda, int64_t rows, const E* panel, const PanelLayout<sum_of<E>>& layout,
                     sum_of<E>* c, int64_t ldc, bool first) {
  const int64_t tiles = tiles_for(rows);
  const auto tile = [&](int64_t i) { return tile_of<E, Transposed>({a, lda, c, ldc, rows}, i, tiles); };
  multiply_tiles<E, Transposed>(tile, tiles, panel, layout, first);
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
