// SPDX-License-Identifier: Apache-2.0
// One unit of work is a piece of the inner positions of one outer position, through all frames: small enough that the
// frames a sum needs are still in the cache when their neighbours need them again, so x, b and dy are read once from
// memory. Units depend on the shape alone, and each has its own share of dmix, so threads do not change results.
#include "alpha_blend/alpha_blend.h"

#include <algorithm>
#include <vector>

#include "common/vmath.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

// Elements of a piece: 3 frames of x, b and y in float32 stay under the 32 KB of a level 1 cache. Where every element
// is read once there is nothing to keep.
constexpr int64_t kPiece = 1024;
constexpr int64_t kPlainPiece = 8192;
constexpr int64_t kParallelGrain = 32768;

double load_scalar(const void* from, DType dtype) {
  double value = 0;
  VK_DISPATCH_FLOATING(dtype, [&] { value = static_cast<double>(to_float(*static_cast<const scalar_t*>(from))); });
  return value;
}

// sigmoid without cancellation on either side.
double sigmoid(double m) { return m >= 0 ? 1 / (1 + std::exp(-m)) : std::exp(m) / (1 + std::exp(m)); }

// A sum of up to 4 frames, each with a coefficient.
template <typename T>
struct Mixture {
  using A = accumulate_t<T>;
  int count = 0;
  const T* from[4];
  A coefficient[4];

  void add(const T* frame, const Tap& tap) {
    from[count] = frame;
    coefficient[count++] = static_cast<A>(tap.coefficient);
  }
};

// f(N) with the number of frames as a compile-time constant.
template <typename F>
VK_ALWAYS_INLINE auto with_count(int count, const F& f) {
  switch (count) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    default:
      return f(std::integral_constant<int, 0>{});
  }
}

// f(position, load, store) over n elements; load(pointer) and store(pointer, vector) serve whole vectors and the rest.
template <typename T, typename F>
VK_ALWAYS_INLINE void for_vectors(int64_t n, const F& f) {
  constexpr int L = kLanes<accumulate_t<T>>;
  int64_t at = 0;
  for (; at + L <= n; at += L) {
    f([at](const T* from) { return load_vec(from + at); }, [at](T* to, auto v) { store_vec(to + at, v); });
  }
  const int rest = static_cast<int>(n - at);
  if (rest == 0) return;
  f([at, rest](const T* from) { return load_part(from + at, rest); },
    [at, rest](T* to, auto v) { store_part(to + at, v, rest); });
}

template <typename T, int N, typename Load>
VK_ALWAYS_INLINE Vec<accumulate_t<T>> mix(const Mixture<T>& mixture, const Load& load) {
  Vec<accumulate_t<T>> sum{};
  for (int k = 0; k < N; ++k)
    sum =
        k == 0 ? load(mixture.from[0]) * mixture.coefficient[0] : sum + load(mixture.from[k]) * mixture.coefficient[k];
  return sum;
}

template <typename T>
struct Blend {
  using A = accumulate_t<T>;
  using V = Vec<A>;

  const AlphaBlendParams& p;
  A alpha, beta, scale;
  int64_t piece, pieces;  // elements of a piece; pieces of one outer position

  explicit Blend(const AlphaBlendParams& params)
      : p(params), piece(params.frames.mode == BlendMode::plain ? kPlainPiece : kPiece) {
    const double m = load_scalar(p.mix_factor, p.mix_dtype);
    alpha = static_cast<A>(sigmoid(m));
    beta = static_cast<A>(sigmoid(-m));
    scale = static_cast<A>(tap_scale(p.frames.mode));
    pieces = (p.layout.inner + piece - 1) / piece;
  }

  int64_t units() const { return p.layout.outer() * pieces; }
  int64_t grain() const {
    const int64_t frames = p.frames.frames + p.frames.out_frames;
    return std::max<int64_t>(1, kParallelGrain / (std::min(piece, p.layout.inner) * std::max<int64_t>(1, frames)));
  }

  struct Unit {
    int64_t outer, first, count;
  };
  Unit unit(int64_t index) const {
    const int64_t first = index % pieces * piece;
    return {index / pieces, first, std::min(piece, p.layout.inner - first)};
  }
  int64_t at(BlendOperand operand, const Unit& u) const { return p.layout.offset(operand, u.outer) + u.first; }

  // The frames of x (or history or lookahead) that make output frame j.
  Mixture<T> sources(const Unit& u, int64_t j) const {
    Mixture<T> mixture;
    for (int k = 0; k < forward_terms(p.frames.mode); ++k) {
      const Tap tap = forward_tap(p.frames, j, k);
      if (tap.coefficient == 0) continue;
      const int64_t i = tap.frame;
      const BlendOperand operand = i < 0 ? kBlendHistory : i >= p.frames.frames ? kBlendLookahead : kBlendX;
      const void* base = i < 0 ? p.history : i >= p.frames.frames ? p.lookahead : p.x;
      const int64_t frame = i < 0 ? i + p.frames.history : i >= p.frames.frames ? i - p.frames.frames : i;
      mixture.add(static_cast<const T*>(base) + at(operand, u) + frame * p.layout.frame_stride[operand], tap);
    }
    return mixture;
  }

  template <int N>
  void frame(const Mixture<T>& mixture, const T* b, T* y, int64_t n) const {
    const A factor = alpha * scale;
    for_vectors<T>(
        n, [&](const auto& load, const auto& store) { store(y, factor * mix<T, N>(mixture, load) + beta * load(b)); });
  }

  void forward(int64_t index) const {
    const Unit u = unit(index);
    for (int64_t j = 0; j < p.frames.out_frames; ++j) {
      const Mixture<T> mixture = sources(u, j);
      const int64_t offset = at(kBlendY, u) + j * p.layout.frame_stride[kBlendY];
      const T* b = static_cast<const T*>(p.b) + offset;
      T* y = static_cast<T*>(p.y) + offset;
      with_count(mixture.count, [&](auto n) { frame<decltype(n)::value>(mixture, b, y, u.count); });
    }
  }
};

template <typename T>
struct BlendBackward {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  using Unit = typename Blend<T>::Unit;

  const AlphaBlendBackwardParams& p;
  Blend<T> blend;

  explicit BlendBackward(const AlphaBlendBackwardParams& params) : p(params), blend(params.forward) {}

  // db of one frame, and its share of sum dy * (S(x) - b), in float64: millions of terms of either sign.
  template <int N>
  double frame(const Mixture<T>& mixture, const T* b, const T* dy, T* db, int64_t n) const {
    WideSum<A> sum;
    const double scale = tap_scale(p.forward.frames.mode);
    for_vectors<T>(n, [&](const auto& load, const auto& store) {
      const V grad = load(dy);
      if (db != nullptr) store(db, blend.beta * grad);
      if (p.dmix == nullptr) return;
      V taps[N > 0 ? N : 1];
      for (int k = 0; k < N; ++k) taps[k] = load(mixture.from[k]);
      sum.template add<N>(grad, taps, mixture.coefficient, scale, load(b));
    });
    return sum.total();
  }

  // The gradient of one frame of x, history or lookahead.
  template <int N>
  void gather(const Mixture<T>& mixture, T* dx, int64_t n) const {
    const A factor = blend.alpha * blend.scale;
    for_vectors<T>(n, [&](const auto& load, const auto& store) { store(dx, factor * mix<T, N>(mixture, load)); });
  }

  void gather_frames(const Unit& u, BlendOperand operand, void* to, int64_t first, int64_t count) const {
    if (to == nullptr) return;
    const T* dy = static_cast<const T*>(p.dy) + blend.at(kBlendY, u);
    for (int64_t i = 0; i < count; ++i) {
      Mixture<T> mixture;
      for (int k = 0; k < backward_terms(p.forward.frames.mode); ++k) {
        const Tap tap = backward_tap(p.forward.frames, first + i, k);
        if (tap.coefficient != 0) mixture.add(dy + tap.frame * p.forward.layout.frame_stride[kBlendY], tap);
      }
      T* dx = static_cast<T*>(to) + blend.at(operand, u) + i * p.forward.layout.frame_stride[operand];
      with_count(mixture.count, [&](auto n) { gather<decltype(n)::value>(mixture, dx, u.count); });
    }
  }

  double backward(int64_t index) const {
    const Unit u = blend.unit(index);
    const BlendFrames& f = p.forward.frames;
    double total = 0;
    for (int64_t j = 0; j < f.out_frames && (p.db != nullptr || p.dmix != nullptr); ++j) {
      const Mixture<T> mixture = blend.sources(u, j);
      const int64_t offset = blend.at(kBlendY, u) + j * p.forward.layout.frame_stride[kBlendY];
      const T* b = static_cast<const T*>(p.forward.b) + offset;
      const T* dy = static_cast<const T*>(p.dy) + offset;
      T* db = p.db == nullptr ? nullptr : static_cast<T*>(p.db) + offset;
      total +=
          with_count(mixture.count, [&](auto n) { return frame<decltype(n)::value>(mixture, b, dy, db, u.count); });
    }
    gather_frames(u, kBlendDx, p.dx, 0, f.frames);
    gather_frames(u, kBlendDhistory, p.dhistory, -f.history, f.history);
    gather_frames(u, kBlendDlookahead, p.dlookahead, f.frames, f.lookahead);
    return total;
  }
};

}  // namespace

void alpha_blend_fwd(const AlphaBlendParams& params) {
  VK_DISPATCH_FLOATING(params.dtype, [&] {
    const Blend<scalar_t> blend(params);
    parallel_for(0, blend.units(), blend.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) blend.forward(i);
    });
  });
}

void alpha_blend_bwd(const AlphaBlendBackwardParams& params) {
  VK_DISPATCH_FLOATING(params.forward.dtype, [&] {
    const BlendBackward<scalar_t> work(params);
    std::vector<double> parts(work.blend.units());
    parallel_for(0, work.blend.units(), work.blend.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) parts[i] = work.backward(i);
    });
    if (params.dmix == nullptr) return;
    double total = 0;
    for (const double part : parts) total += part;
    const double m = load_scalar(params.forward.mix_factor, params.forward.mix_dtype);
    total *= sigmoid(m) * sigmoid(-m);
    VK_DISPATCH_FLOATING(params.forward.mix_dtype, [&] {
      *static_cast<scalar_t*>(params.dmix) = from_float<scalar_t>(static_cast<accumulate_t<scalar_t>>(total));
    });
  });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
