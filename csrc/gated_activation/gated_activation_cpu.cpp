// SPDX-License-Identifier: Apache-2.0
// One pass over pieces of rows; every element is read and written once. The normal distribution is the same polynomial
// as in vidkernels/triton/gated_activation.py: no branches, where erf has two forms.
#include "gated_activation/gated_activation.h"

#include <algorithm>
#include <cmath>

#include "common/pack.h"
#include "common/sigmoid.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

constexpr int64_t kPiece = 4096;                                            // columns that one unit of work takes
constexpr int64_t kParallelGrain = 8192;                                    // values that are worth a thread
constexpr double kDensity = 0.3989422804014327;                             // 1 / sqrt(2 pi)
constexpr double kTanh1 = 0.7978845608028654, kTanh3 = 0.0356774081363001;  // sqrt(2 / pi), and that times 0.044715

// exp(-z^2 / 2) and the normal distribution's Phi(z).
template <typename A>
struct Normal {
  Vec<A> density, share;
};

// Phi(-|z|) = exp(-z^2 / 2) P(1 / (1 + 0.4 |z|)), to 3e-8.
VK_ALWAYS_INLINE Normal<float> normal(Vec<float> z) {
  const Vec<float> e = exp_nonpositive(z * z * -0.5f);
  const Vec<float> size = max_of(broadcast(-64.0f), minus_abs<float>(z));  // e is 0 long before; no 0 * infinity
  const Vec<float> t = reciprocal<float>(1.0f - 0.4f * size);
  Vec<float> p = t * 0.054970529f - 0.2490496f;
  p = p * t + 0.33080384f;
  p = p * t + 0.020133203f;
  p = p * t + 0.1860286f;
  p = p * t + 0.15711346f;
  const Vec<float> tail = p * t * e;
  return {e, z < 0.0f ? tail : 1.0f - tail};
}
inline Normal<double> normal(Vec<double> z) {
  Normal<double> result;
  for (int i = 0; i < kLanes<double>; ++i) {
    result.density[i] = std::exp(-0.5 * z[i] * z[i]);
    result.share[i] = 0.5 * std::erfc(z[i] * -0.7071067811865476);
  }
  return result;
}

template <typename A, Activation kActivation>
VK_ALWAYS_INLINE Vec<A> activate(Vec<A> z) {
  if (kActivation == Activation::gelu) return z * normal(z).share;
  if (kActivation == Activation::silu) return silu<A>(z);
  return z * sigmoid_pair<A>(z * (z * z * A(2 * kTanh3) + A(2 * kTanh1))).plus;
}

// act(z) and its derivative.
template <typename A>
struct Slope {
  Vec<A> value, slope;
};
template <typename A, Activation kActivation>
VK_ALWAYS_INLINE Slope<A> activate_with_slope(Vec<A> z) {
  if (kActivation == Activation::gelu) {
    const Normal<A> n = normal(z);
    return {z * n.share, n.share + z * n.density * A(kDensity)};
  }
  if (kActivation == Activation::silu) {
    const Sigmoid<A> s = sigmoid_pair<A>(z);
    return {z * s.plus, silu_slope<A>(z, s)};
  }
  const Sigmoid<A> s = sigmoid_pair<A>(z * (z * z * A(2 * kTanh3) + A(2 * kTanh1)));
  const Vec<A> curve = z * (s.plus * s.minus);  // 0 before any power of z overflows
  return {z * s.plus, s.plus + (curve * A(2 * kTanh1) + curve * z * z * A(6 * kTanh3))};
}

// f(load, store) for packs of `count` neighbours; load(pointer) and store(pointer, pack) serve whole packs and the
// rest.
template <typename T, typename F>
VK_ALWAYS_INLINE void for_packs(int64_t count, const F& f) {
  int64_t at = 0;
  for (; at + kPack<T> <= count; at += kPack<T>) {
    f([at](const T* from) { return load_pack<T>(from + at); },
      [at](T* to, const Pack<T>& pack) { store_pack<T>(to + at, pack); });
  }
  const int rest = static_cast<int>(count - at);
  if (rest == 0) return;
  f([at, rest](const T* from) { return load_pack_part<T>(from + at, rest); },
    [at, rest](T* to, const Pack<T>& pack) { store_pack_part<T>(to + at, pack, rest); });
}

template <typename T, Activation kActivation>
struct Gated {
  using A = accumulate_t<T>;

  static void forward(const T* hidden, const T* gate, T* y, int64_t count) {
    for_packs<T>(count, [&](const auto& load, const auto& store) {
      const Pack<T> h = load(hidden), g = load(gate);
      store(y, {{h.v[0] * activate<A, kActivation>(g.v[0]), h.v[1] * activate<A, kActivation>(g.v[1])}});
    });
  }

  static void backward(const T* hidden, const T* gate, const T* dy, T* dhidden, T* dgate, int64_t count) {
    for_packs<T>(count, [&](const auto& load, const auto& store) {
      const Pack<T> h = load(hidden), g = load(gate), grad = load(dy);
      Pack<T> to_hidden, to_gate;
      for (int i = 0; i < 2; ++i) {
        const Slope<A> s = activate_with_slope<A, kActivation>(g.v[i]);
        to_hidden.v[i] = grad.v[i] * s.value;
        to_gate.v[i] = grad.v[i] * h.v[i] * s.slope;
      }
      store(dhidden, to_hidden);
      store(dgate, to_gate);
    });
  }
};

// f(row, first column, columns) over all pieces of all rows.
template <typename F>
void for_pieces(const GatedActivationParams& p, const F& f) {
  const int64_t pieces = (p.width + kPiece - 1) / kPiece;
  const int64_t grain = std::max<int64_t>(1, kParallelGrain / std::min(kPiece, p.width));
  parallel_for(0, p.rows * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i % pieces * kPiece;
      f(i / pieces, column, std::min(kPiece, p.width - column));
    }
  });
}

template <typename T, Activation kActivation>
void forward(const GatedActivationParams& p) {
  for_pieces(p, [&](int64_t row, int64_t column, int64_t count) {
    const T* first = static_cast<const T*>(p.x) + row * p.x_row + column;
    const T* second = first + p.width;
    T* y = static_cast<T*>(p.out) + row * p.width + column;
    Gated<T, kActivation>::forward(p.gate_first ? second : first, p.gate_first ? first : second, y, count);
  });
}

template <typename T, Activation kActivation>
void backward(const GatedActivationParams& p) {
  for_pieces(p, [&](int64_t row, int64_t column, int64_t count) {
    const int64_t hidden = p.gate_first ? p.width : 0, gate = p.width - hidden;
    const T* x = static_cast<const T*>(p.x) + row * p.x_row + column;
    const T* dy = static_cast<const T*>(p.dy) + row * p.width + column;
    T* dx = static_cast<T*>(p.out) + row * 2 * p.width + column;
    Gated<T, kActivation>::backward(x + hidden, x + gate, dy, dx + hidden, dx + gate, count);
  });
}

// f(activation) with the activation as a compile-time constant.
template <typename F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return f(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::silu:
      return f(std::integral_constant<Activation, Activation::silu>{});
  }
}

}  // namespace

void gated_activation_fwd(const GatedActivationParams& params) {
  with_activation(params.activation, [&](auto activation) {
    VK_DISPATCH_FLOATING(params.dtype, ([&] { forward<scalar_t, decltype(activation)::value>(params); }));
  });
}

void gated_activation_bwd(const GatedActivationParams& params) {
  with_activation(params.activation, [&](auto activation) {
    VK_DISPATCH_FLOATING(params.dtype, ([&] { backward<scalar_t, decltype(activation)::value>(params); }));
  });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
