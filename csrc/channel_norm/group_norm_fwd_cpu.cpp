// SPDX-License-Identifier: Apache-2.0
// Forward of the group norm in two passes over memory: statistics, then results. A piece's statistics are taken about
// its own mean, and pieces are merged in float64, so a large mean costs no digits.
#include <numeric>

#include "channel_norm/group_norm_cpu.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

// Rows after which sums in registers begin anew: long chains lose digits.
constexpr int64_t kRowsPerSum = 32;
// Rows that are asked for while these are summed for the first time: channels are summed a few at a time, so that
// memory is not read in the order in which it lies.
constexpr int64_t kRowsAhead = 32;

struct Moments {
  double count = 0, mean = 0, square_sum = 0;
};

// Of values whose squares leave float32, or that are not finite.
template <typename T>
__attribute__((noinline, cold)) Moments wide_moments(const T* x, int64_t rows, int64_t row_stride, int64_t columns) {
  const auto sum = [&](double mean, bool squares) {
    double total = 0;
    for (int64_t i = 0; i < rows * columns; ++i) {
      const double d = static_cast<double>(to_float(x[i / columns * row_stride + i % columns])) - mean;
      total += squares ? d * d : d;
    }
    return total;
  };
  const double count = static_cast<double>(rows * columns), mean = sum(0, false) / count;
  return {count, mean, sum(mean, true)};
}

template <typename T>
struct GroupForward : GroupKernel<T> {
  using Base = GroupKernel<T>;
  using Base::L;
  using Base::p;
  using Base::per_group;
  using Base::pieces;
  using typename Base::A;
  using typename Base::Coefficients;
  using typename Base::V;

  explicit GroupForward(const GroupNormParams& params) : Base(params) {}

  // Scratch of one thread, one value per channel.
  struct RowSums {
    std::vector<A> mean, first, second;
    explicit RowSums(int64_t length) : mean(length), first(length), second(length) {}
  };

  // Adds N vectors of channels from c on: sums of x - mean, and of its square if kSquares, over some rows.
  template <int N, bool kSquares, typename Load>
  VK_ALWAYS_INLINE void sum_columns(const T* x, int64_t rows, int64_t c, const Load& load, RowSums& s) const {
    V first[N] = {}, second[N] = {};
    for (int64_t i = 0; i < rows; ++i) {
      for (int n = 0; n < N; ++n) {
        if (!kSquares) __builtin_prefetch(x + (i + kRowsAhead) * p.position_stride + c + n * L, 0, 2);
        const V d = load(x + i * p.position_stride + c + n * L) - load_vec(&s.mean[c + n * L]);
        first[n] += d;
        if (kSquares) second[n] += d * d;
      }
    }
    for (int n = 0; n < N; ++n) {
      const int64_t at = c + n * L;
      store_vec(&s.first[at], load_vec(&s.first[at]) + first[n]);
      if (kSquares) store_vec(&s.second[at], load_vec(&s.second[at]) + second[n]);
    }
  }

  // Per channel: sums of x - mean, and of its square if kSquares, over the piece.
  template <bool kSquares>
  void sum_rows(const Piece& piece, RowSums& s) const {
    std::fill(s.first.begin(), s.first.end(), A(0));
    std::fill(s.second.begin(), s.second.end(), A(0));
    const int64_t whole = p.channels / L * L;
    const int tail = static_cast<int>(p.channels - whole);
    const auto full = [](const T* from) { return load_vec(from); };
    for (int64_t begin = 0; begin < piece.count; begin += kRowsPerSum) {
      const T* x = static_cast<const T*>(p.x) + pieces.offset(piece) + begin * p.position_stride;
      const int64_t rows = std::min(kRowsPerSum, piece.count - begin);
      int64_t c = 0;
      for (; c + 4 * L <= whole; c += 4 * L) sum_columns<4, kSquares>(x, rows, c, full, s);
      for (; c < whole; c += L) sum_columns<1, kSquares>(x, rows, c, full, s);
      if (tail != 0) sum_columns<1, kSquares>(x, rows, c, [=](const T* from) { return load_part(from, tail); }, s);
    }
  }

  // Statistics of a piece of rows by group. The second pass is about the mean of the first, and what it still finds of
  // a mean corrects both moments: float32 sums about zero leave one off by 1e-6 of a large mean.
  void row_moments_of(const Piece& piece, Moments* out, RowSums& s) const {
    const double count = static_cast<double>(piece.count * per_group);
    const auto folded = [&](const std::vector<A>& sums, int64_t group) {
      return std::accumulate(sums.begin() + group * per_group, sums.begin() + (group + 1) * per_group, 0.0);
    };
    std::fill(s.mean.begin(), s.mean.end(), A(0));
    sum_rows<false>(piece, s);
    for (int64_t g = 0; g < p.groups; ++g) {
      std::fill_n(s.mean.begin() + g * per_group, per_group, static_cast<A>(folded(s.first, g) / count));
    }
    sum_rows<true>(piece, s);
    for (int64_t g = 0; g < p.groups; ++g) {
      const double rest = folded(s.first, g) / count;
      out[g] = {count, static_cast<double>(s.mean[g * per_group]) + rest, folded(s.second, g) - rest * rest * count};
      if (std::isfinite(out[g].square_sum)) continue;
      const T* x = static_cast<const T*>(p.x) + pieces.offset(piece) + g * per_group;
      out[g] = wide_moments(x, piece.count, p.position_stride, per_group);
    }
  }

  // The same of a piece of one channel.
  Moments plane_moments_of(const Piece& piece) const {
    const T* x = static_cast<const T*>(p.x) + pieces.offset(piece);
    const double count = static_cast<double>(piece.count);
    const A mean = static_cast<A>(static_cast<double>(plane_sums<false>(x, piece.count, A(0)).first) / count);
    const PlaneSums sums = plane_sums<true>(x, piece.count, mean);
    const double rest = static_cast<double>(sums.first) / count;
    const double square_sum = static_cast<double>(sums.second) - rest * rest * count;
    if (!std::isfinite(square_sum)) return wide_moments(x, 1, 0, piece.count);
    return {count, static_cast<double>(mean) + rest, square_sum};
  }

  struct PlaneSums {
    A first, second;
  };
  // Sums of x - mean, and of its square if kSquares, over `count` adjacent values.
  template <bool kSquares>
  PlaneSums plane_sums(const T* x, int64_t count, A mean) const {
    V first[4] = {}, second[4] = {};
    const auto add = [&](int chain, V d) __attribute__((always_inline)) {
      first[chain] += d;
      if (kSquares) second[chain] += d * d;
    };
    int64_t i = 0;
    for (; i + 4 * L <= count; i += 4 * L) {
      for (int n = 0; n < 4; ++n) add(n, load_vec(x + i + n * L) - mean);
    }
    for (; i + L <= count; i += L) add(0, load_vec(x + i) - mean);
    const int tail = static_cast<int>(count - i);
    if (tail != 0) add(1, (load_part(x + i, tail) - mean) * lane_flags<A>(tail));
    return {sum_lanes<A>((first[0] + first[1]) + (first[2] + first[3])),
            sum_lanes<A>((second[0] + second[1]) + (second[2] + second[3]))};
  }

  void statistics() const {
    const int64_t per_piece = p.rows() ? p.groups : 1;
    std::vector<Moments> parts(pieces.count() * per_piece);
    parallel_for(0, pieces.count(), pieces.grain(), [&](int64_t begin, int64_t end) {
      RowSums sums(p.channels + L);
      for (int64_t i = begin; i < end; ++i) {
        if (p.rows()) {
          row_moments_of(pieces.at(i), parts.data() + i * per_piece, sums);
        } else {
          parts[i] = plane_moments_of(pieces.at(i));
        }
      }
    });
    const int64_t count = p.rows() ? pieces.per_sample() : per_group * pieces.per_channel();
    const int64_t grain = std::max<int64_t>(1, kParallelGrain / 8 / count);
    parallel_for(0, p.samples() * p.groups, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t g = i % p.groups, first = i / p.groups * pieces.per_sample() + (p.rows() ? 0 : g * count);
        merge(parts.data() + first * per_piece + (p.rows() ? g : 0), count, per_piece, p.mean[i], p.rstd[i]);
      }
    });
  }

  // Of `count` pieces, `stride` apart: two sums over all of them, where merging one by one would divide twice for each.
  void merge(const Moments* parts, int64_t count, int64_t stride, double& mean, double& rstd) const {
    double values = 0, sum = 0, square_sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      values += parts[i * stride].count;
      sum += parts[i * stride].count * parts[i * stride].mean;
    }
    mean = sum / values;
    for (int64_t i = 0; i < count; ++i) {
      const Moments& part = parts[i * stride];
      square_sum += part.square_sum + part.count * (part.mean - mean) * (part.mean - mean);
    }
    rstd = 1 / std::sqrt(square_sum / values + p.eps);
  }

  template <Ending kEnding>
  static VK_ALWAYS_INLINE V finish(V x, V mean, V scale, V shift) {
    return ended_as<T, kEnding>((x - mean) * scale + shift);
  }

  template <Ending kEnding>
  void write(const Piece& piece, const Coefficients& k) const {
    const int64_t offset = pieces.offset(piece);
    const T* x = static_cast<const T*>(p.x) + offset;
    T* y = static_cast<T*>(p.y) + offset;
    if (!p.rows()) {
      const int64_t c = piece.channel;
      const V mean = broadcast(k.mean[c]), scale = broadcast(k.scale[c]), shift = broadcast(k.shift[c]);
      int64_t i = 0;
      for (; i + L <= piece.count; i += L) store_vec(y + i, finish<kEnding>(load_vec(x + i), mean, scale, shift));
      const int tail = static_cast<int>(piece.count - i);
      if (tail != 0) store_part(y + i, finish<kEnding>(load_part(x + i, tail), mean, scale, shift), tail);
      return;
    }
    const int64_t whole = p.channels / L * L;
    const int tail = static_cast<int>(p.channels - whole);
    for (int64_t i = 0; i < piece.count; ++i, x += p.position_stride, y += p.position_stride) {
      const auto at = [&](V value, int64_t c) {
        return finish<kEnding>(value, load_vec(&k.mean[c]), load_vec(&k.scale[c]), load_vec(&k.shift[c]));
      };
      for (int64_t c = 0; c < whole; c += L) store_vec(y + c, at(load_vec(x + c), c));
      if (tail != 0) store_part(y + whole, at(load_part(x + whole, tail), whole), tail);
    }
  }
};

}  // namespace

void group_norm_fwd(const GroupNormParams& params) {
  VK_DISPATCH_FLOATING(params.dtype, [&] {
    using Kernel = GroupForward<scalar_t>;
    const Kernel kernel(params);
    kernel.statistics();
    kernel.with_ending([&](auto ending) {
      kernel.for_pieces([&](int64_t, const Piece& piece, const typename Kernel::Coefficients& k) {
        kernel.template write<decltype(ending)::value>(piece, k);
      });
    });
  });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
