// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <type_traits>
#include <vector>

#include "qk_norm_rope/rotary_angles_cpu.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

// Loops over the channels of a head are inlined everywhere with the head dimension a constant for the usual sizes:
// with 64 channels, 4 vectors, their start and end would cost more than their work.
#define VK_INLINE inline __attribute__((always_inline))

template <typename scalar_t>
VK_INLINE void load(const void* data, int64_t offset, accumulate_t<scalar_t>* VK_RESTRICT row, int64_t count) {
  const scalar_t* VK_RESTRICT source = static_cast<const scalar_t*>(data) + offset;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) row[i] = to_float(source[i]);
}

template <typename scalar_t>
VK_INLINE void store(void* data, int64_t offset, const accumulate_t<scalar_t>* VK_RESTRICT row, int64_t count) {
  scalar_t* VK_RESTRICT target = static_cast<scalar_t*>(data) + offset;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) target[i] = from_float<scalar_t>(row[i]);
}

// Sixteen partial sums, then a tree: the same order in every instruction set, where a reduction clause would end in a
// chain of additions per lane, as long as the rest of a 64-channel row.
template <typename acc_t>
VK_INLINE acc_t dot(const acc_t* a, const acc_t* b, int64_t count) {
  constexpr int kLanes = 16;
  acc_t lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) lane[j] += a[i + j] * b[i + j];
  }
  for (int j = 0; i + j < count; ++j) lane[j] += a[i + j] * b[i + j];
  for (int width = kLanes / 2; width > 0; width /= 2) {
#pragma omp simd
    for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
  }
  return lane[0];
}

template <typename acc_t>
VK_INLINE void scale(acc_t* VK_RESTRICT row, acc_t factor, const acc_t* VK_RESTRICT weight, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) row[i] = row[i] * factor * weight[i];
}

// Backward: x becomes xhat = x * factor, `dweight` gathers g * xhat, then g becomes g * weight.
template <typename acc_t>
VK_INLINE void normalise_cotangent(acc_t* VK_RESTRICT x, acc_t* VK_RESTRICT g, acc_t factor,
                                   const acc_t* VK_RESTRICT weight, double* VK_RESTRICT dweight, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
  if (dweight != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) dweight[i] += g[i] * x[i];
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) g[i] *= weight[i];
}

// Backward: g becomes factor * (g - xhat * mean).
template <typename acc_t>
VK_INLINE void subtract_mean(acc_t* VK_RESTRICT g, const acc_t* VK_RESTRICT xhat, acc_t factor, acc_t mean,
                             int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) g[i] = factor * (g[i] - xhat[i] * mean);
}

// Turns `count` pairs (first[i], second[i]); `direction` is 1, or -1 for the backward.
template <typename acc_t>
VK_INLINE void rotate_halves(acc_t* VK_RESTRICT first, acc_t* VK_RESTRICT second, const acc_t* VK_RESTRICT cosine,
                             const acc_t* VK_RESTRICT sine, int64_t count, acc_t direction) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const acc_t a = first[i], b = second[i], s = direction * sine[i];
    first[i] = a * cosine[i] - b * s;
    second[i] = b * cosine[i] + a * s;
  }
}

template <typename acc_t>
VK_INLINE void rotate_neighbours(acc_t* VK_RESTRICT row, const acc_t* VK_RESTRICT cosine, const acc_t* VK_RESTRICT sine,
                                 int64_t count, acc_t direction) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const acc_t a = row[2 * i], b = row[2 * i + 1], s = direction * sine[i];
    row[2 * i] = a * cosine[i] - b * s;
    row[2 * i + 1] = b * cosine[i] + a * s;
  }
}

// `dims` is the head dimension; the usual case that all of it turns gets loops of constant length.
template <typename acc_t>
VK_INLINE void rotate(const QkNormRopeParams& p, const Angles<acc_t>& angles, acc_t* row, int64_t dims,
                      acc_t direction) {
  const acc_t* cosine = angles.cosine();
  const acc_t* sine = angles.sine();
  if (p.layout == RotaryLayout::axis_half) {
    int64_t begin = 0;
    for (int axis = 0; axis < p.axes; ++axis) {
      const int64_t count = p.axis_pairs[axis];
      rotate_halves(row + 2 * begin, row + 2 * begin + count, cosine + begin, sine + begin, count, direction);
      begin += count;
    }
    return;
  }
  const bool half = p.layout == RotaryLayout::half;
  if (2 * p.pairs == dims) {
    if (half) return rotate_halves(row, row + dims / 2, cosine, sine, dims / 2, direction);
    return rotate_neighbours(row, cosine, sine, dims / 2, direction);
  }
  if (half) return rotate_halves(row, row + p.pairs, cosine, sine, p.pairs, direction);
  rotate_neighbours(row, cosine, sine, p.pairs, direction);
}

// The norm's weight in the accumulation type, one value per channel of a head or of the whole token; ones for no
// weight.
template <typename scalar_t>
std::vector<accumulate_t<scalar_t>> load_weight(const QkNormRopeParams& p, const QkSide& side) {
  const int64_t count = p.norm == QkNorm::full ? side.heads * p.head_dim : p.head_dim;
  std::vector<accumulate_t<scalar_t>> weight(count, accumulate_t<scalar_t>(1));
  if (side.weight == nullptr) return weight;
  if (side.weight_dtype == DType::float32) {
    const float* source = static_cast<const float*>(side.weight);
    std::copy(source, source + count, weight.begin());
  } else {
    load<scalar_t>(side.weight, 0, weight.data(), count);
  }
  return weight;
}

int64_t offset_of(const int64_t (&stride)[3], int64_t batch, int64_t token, int64_t head) {
  return batch * stride[0] + token * stride[1] + head * stride[2];
}

// Scratch rows that start at a cache line: vectors that straddle two lines cost twice.
template <typename acc_t>
class RowBuffer {
 public:
  explicit RowBuffer(int64_t count) : memory_(count + kLine / sizeof(acc_t)) {}
  acc_t* data() {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + ((kLine - address % kLine) % kLine) / sizeof(acc_t);
  }

 private:
  static constexpr size_t kLine = 64;
  std::vector<acc_t> memory_;
};

// Scratch of one thread: all heads of one token, and one sum per head.
template <typename acc_t>
struct Scratch {
  explicit Scratch(const QkNormRopeParams& p)
      : heads(std::max(p.side[0].heads, p.side[1].heads)),
        x(heads * p.head_dim),
        g(heads * p.head_dim),
        sum(heads),
        factor(heads) {}
  int64_t heads;
  RowBuffer<acc_t> x, g, sum, factor;
};

// In place: from every head's sum to its mean, over the head or, for the full norm, over all heads.
template <typename acc_t>
void sums_to_means(const QkNormRopeParams& p, acc_t* sum, int64_t heads) {
  if (p.norm == QkNorm::full) {
    acc_t total = 0;
    for (int64_t head = 0; head < heads; ++head) total += sum[head];
    for (int64_t head = 0; head < heads; ++head) sum[head] = total / static_cast<acc_t>(heads);
  }
  for (int64_t head = 0; head < heads; ++head) sum[head] /= static_cast<acc_t>(p.head_dim);
}

// factor = 1 / sqrt(mean of squares + eps). One loop over all heads: a root and a division per head, each waiting for
// the row before it, would take as long as everything else.
template <typename acc_t>
void norm_factors(const QkNormRopeParams& p, acc_t* sum, acc_t* VK_RESTRICT factor, int64_t heads) {
  sums_to_means(p, sum, heads);
  const acc_t eps = static_cast<acc_t>(p.eps);
#pragma omp simd
  for (int64_t head = 0; head < heads; ++head) factor[head] = 1 / std::sqrt(sum[head] + eps);
}

template <typename scalar_t, int64_t kDims>
void forward_token(const QkNormRopeParams& p, const QkSide& side, const accumulate_t<scalar_t>* weight,
                   Angles<accumulate_t<scalar_t>>& angles, int64_t batch, int64_t token,
                   Scratch<accumulate_t<scalar_t>>& scratch) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t dims = kDims > 0 ? kDims : p.head_dim;
  const int64_t weight_step = p.norm == QkNorm::full ? dims : 0;
  acc_t *x = scratch.x.data(), *sum = scratch.sum.data(), *factor = scratch.factor.data();
  for (int64_t head = 0; head < side.heads; ++head) {
    load<scalar_t>(side.x, offset_of(side.x_stride, batch, token, head), x + head * dims, dims);
    if (p.norm != QkNorm::none) sum[head] = dot(x + head * dims, x + head * dims, dims);
  }
  if (p.norm != QkNorm::none) norm_factors(p, sum, factor, side.heads);
  for (int64_t head = 0; head < side.heads; ++head) {
    acc_t* row = x + head * dims;
    if (p.norm != QkNorm::none) scale(row, factor[head], weight + head * weight_step, dims);
    if (p.pairs > 0) {
      angles.move_to_head(head);
      rotate(p, angles, row, dims, acc_t(1));
    }
    store<scalar_t>(side.y, offset_of(side.y_stride, batch, token, head), row, dims);
  }
}

// dx = r (g - xhat mean(g xhat)) with xhat = x r, g = weight * dz and dz = the rotation of dy backwards; `dweight`, if
// any, gathers dz * xhat.
template <typename scalar_t, int64_t kDims>
void backward_token(const QkNormRopeParams& p, const QkSide& side, const accumulate_t<scalar_t>* weight,
                    Angles<accumulate_t<scalar_t>>& angles, int64_t batch, int64_t token,
                    Scratch<accumulate_t<scalar_t>>& scratch, double* dweight) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t dims = kDims > 0 ? kDims : p.head_dim;
  const int64_t weight_step = p.norm == QkNorm::full ? dims : 0;
  acc_t *x = scratch.x.data(), *g = scratch.g.data(), *sum = scratch.sum.data(), *factor = scratch.factor.data();
  for (int64_t head = 0; head < side.heads; ++head) {
    load<scalar_t>(side.dy, offset_of(side.dy_stride, batch, token, head), g + head * dims, dims);
    if (p.pairs > 0) {
      angles.move_to_head(head);
      rotate(p, angles, g + head * dims, dims, acc_t(-1));
    }
    if (p.norm == QkNorm::none) continue;
    load<scalar_t>(side.x, offset_of(side.x_stride, batch, token, head), x + head * dims, dims);
    sum[head] = dot(x + head * dims, x + head * dims, dims);
  }
  if (p.norm != QkNorm::none) {
    norm_factors(p, sum, factor, side.heads);
    for (int64_t head = 0; head < side.heads; ++head) {
      acc_t *x_row = x + head * dims, *g_row = g + head * dims;
      normalise_cotangent(x_row, g_row, factor[head], weight + head * weight_step,
                          dweight == nullptr ? nullptr : dweight + head * weight_step, dims);
      sum[head] = dot(g_row, x_row, dims);
    }
    sums_to_means(p, sum, side.heads);
  }
  for (int64_t head = 0; head < side.heads; ++head) {
    acc_t* row = g + head * dims;
    if (p.norm != QkNorm::none) subtract_mean(row, x + head * dims, factor[head], sum[head], dims);
    store<scalar_t>(side.y, offset_of(side.y_stride, batch, token, head), row, dims);
  }
}

// Calls f(std::integral_constant<int64_t, dims>) for the usual head dimensions in float32 and below, with 0 for others.
template <typename scalar_t, typename F>
void with_head_dim(int64_t dims, const F& f) {
  if constexpr (!std::is_same_v<scalar_t, double>) {
    if (dims == 64) return f(std::integral_constant<int64_t, 64>{});
    if (dims == 72) return f(std::integral_constant<int64_t, 72>{});
    if (dims == 128) return f(std::integral_constant<int64_t, 128>{});
  }
  f(std::integral_constant<int64_t, 0>{});
}

// About 16 KB of q and k a task, so that threads share the work of short sequences too.
int64_t token_grain(const QkNormRopeParams& p) {
  const int64_t values = std::max<int64_t>(1, (p.side[0].heads + p.side[1].heads) * p.head_dim);
  return std::max<int64_t>(1, 4096 / values);
}

template <typename scalar_t, int64_t kDims>
void forward(const QkNormRopeParams& p) {
  using acc_t = accumulate_t<scalar_t>;
  const Rotation rotation = make_rotation(p);
  const std::vector<acc_t> weights[2] = {load_weight<scalar_t>(p, p.side[0]), load_weight<scalar_t>(p, p.side[1])};
  parallel_for(0, p.batch * p.tokens, token_grain(p), [&](int64_t begin, int64_t end) {
    Scratch<acc_t> scratch(p);
    Angles<acc_t> angles(p, rotation);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / p.tokens, token = i % p.tokens;
      if (p.pairs > 0) angles.move_to(batch, token);
      for (int side = 0; side < 2; ++side) {
        forward_token<scalar_t, kDims>(p, p.side[side], weights[side].data(), angles, batch, token, scratch);
      }
    }
  });
}

template <typename weight_t>
void sum_partials(const std::vector<double>& partial, int64_t parts, int64_t stride, int64_t count, void* out) {
  weight_t* target = static_cast<weight_t*>(out);
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += partial[part * stride + i];
    target[i] = from_float<weight_t>(static_cast<accumulate_t<weight_t>>(sum));
  }
}

// The weights' gradients are summed in float64 over at most 64 parts of the tokens, cut by the number of tokens alone
// and added in order: the result does not depend on the number of threads.
template <typename scalar_t, int64_t kDims>
void backward(const QkNormRopeParams& p) {
  using acc_t = accumulate_t<scalar_t>;
  const Rotation rotation = make_rotation(p);
  const std::vector<acc_t> weights[2] = {load_weight<scalar_t>(p, p.side[0]), load_weight<scalar_t>(p, p.side[1])};
  const int64_t total = p.batch * p.tokens;
  const int64_t part_tokens = std::max<int64_t>((total + 63) / 64, token_grain(p));
  const int64_t parts = (total + part_tokens - 1) / part_tokens;
  std::vector<double> partial[2];
  for (int side = 0; side < 2; ++side) {
    if (p.side[side].dweight != nullptr) partial[side].assign(parts * weights[side].size(), 0.0);
  }
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    Scratch<acc_t> scratch(p);
    Angles<acc_t> angles(p, rotation);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t stop = std::min(total, (part + 1) * part_tokens);
      for (int64_t i = part * part_tokens; i < stop; ++i) {
        const int64_t batch = i / p.tokens, token = i % p.tokens;
        if (p.pairs > 0) angles.move_to(batch, token);
        for (int side = 0; side < 2; ++side) {
          double* dweight = partial[side].empty() ? nullptr : partial[side].data() + part * weights[side].size();
          backward_token<scalar_t, kDims>(p, p.side[side], weights[side].data(), angles, batch, token, scratch,
                                          dweight);
        }
      }
    }
  });
  for (int side = 0; side < 2; ++side) {
    const int64_t count = static_cast<int64_t>(weights[side].size());
    if (p.side[side].dweight == nullptr) continue;
    if (p.side[side].weight_dtype == DType::float32) {
      sum_partials<float>(partial[side], parts, count, count, p.side[side].dweight);
    } else {
      sum_partials<scalar_t>(partial[side], parts, count, count, p.side[side].dweight);
    }
  }
}

}  // namespace

void qk_norm_rope_fwd(const QkNormRopeParams& params) {
  VK_DISPATCH_FLOATING(params.dtype, [&] {
    with_head_dim<scalar_t>(params.head_dim, [&](auto dims) { forward<scalar_t, dims.value>(params); });
  });
}

void qk_norm_rope_bwd(const QkNormRopeParams& params) {
  VK_DISPATCH_FLOATING(params.dtype, [&] {
    with_head_dim<scalar_t>(params.head_dim, [&](auto dims) { backward<scalar_t, dims.value>(params); });
  });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
