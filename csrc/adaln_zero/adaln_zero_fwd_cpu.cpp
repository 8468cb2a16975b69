// SPDX-License-Identifier: Apache-2.0
#include "adaln_zero/adaln_zero_cpu.h"

namespace vidkernels {
namespace adaln {
inline namespace VK_CPU_CAPABILITY {
namespace {

template <typename T>
void gate_row(const T* x, const T* branch, const accumulate_t<T>* gate, T* hidden, int64_t channels) {
  for_row<T>(channels, [&](int64_t i, auto extent, int) {
    store(hidden + i, load(x + i, extent) + load(gate + i, extent) * load(branch + i, extent), extent);
  });
}

// Two passes over a row that sits in the first-level cache: the sum of squares is taken about the mean, so a large
// common offset costs no digits.
template <typename T>
void row_statistics(const T* x, int64_t channels, Norm norm, double eps, accumulate_t<T>* mean, accumulate_t<T>* rstd) {
  using A = accumulate_t<T>;
  *mean = 0;
  *rstd = 1;
  if (norm == Norm::none) return;
  if (norm == Norm::layer) {
    Total<A> total;
    for_row<T>(channels, [&](int64_t i, auto extent, int k) { accumulate<A>(total.part[k], load(x + i, extent)); });
    *mean = static_cast<A>(total.sum() / static_cast<double>(channels));
  }
  const Vec<A> centre = broadcast<A>(*mean);
  Total<A> squares;
  for_row<T>(channels, [&](int64_t i, auto extent, int k) {
    const auto d = keep(load(x + i, extent) - all<A>(centre, extent), extent);
    accumulate<A>(squares.part[k], d * d);
  });
  *rstd = static_cast<A>(1.0 / std::sqrt(squares.sum() / static_cast<double>(channels) + eps));
}

template <typename T>
void modulate_row(const T* x, const accumulate_t<T>* a, const accumulate_t<T>* s, accumulate_t<T> mean,
                  accumulate_t<T> rstd, T* y, int64_t channels) {
  using A = accumulate_t<T>;
  const Vec<A> centre = broadcast<A>(mean), factor = broadcast<A>(rstd);
  for_row<T>(channels, [&](int64_t i, auto extent, int) {
    const auto xhat = (load(x + i, extent) - all<A>(centre, extent)) * all<A>(factor, extent);
    store(y + i, xhat * load(a + i, extent) + load(s + i, extent), extent);
  });
}

template <typename T>
void forward_range(const ForwardParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t channels = p.channels;
  const Buffer<A> buffer(4 * channels);
  A *factor = buffer.data(), *a = factor + channels, *s = a + channels, *gate = s + channels;
  for (int64_t token = begin; token < end;) {
    const int64_t row = row_of(p.rows, token);
    int64_t stop = run_end(p.rows, token, row, p.tokens);
    stop = stop < end ? stop : end;
    if (p.y != nullptr) fold(factor, a, s, p.scale, p.shift, p.weight, p.bias, row, channels);
    if (p.branch != nullptr) widen(gate, p.gate, row, channels, A(1));
    if (p.y != nullptr) arrange<T>(a, channels), arrange<T>(s, channels);
    if (p.branch != nullptr) arrange<T>(gate, channels);
    for (; token < stop; ++token) {
      const T* x = row_at<T>(p.x, token, channels);
      if (p.branch != nullptr) {
        T* hidden = row_at<T>(p.hidden, token, channels);
        gate_row(x, row_at<T>(p.branch, token, channels), gate, hidden, channels);
        x = hidden;
      }
      if (p.y == nullptr) continue;
      A mean, rstd;
      row_statistics(x, channels, p.norm, p.eps, &mean, &rstd);
      if (p.mean != nullptr) static_cast<A*>(p.mean)[token] = mean;
      if (p.rstd != nullptr) static_cast<A*>(p.rstd)[token] = rstd;
      modulate_row(x, a, s, mean, rstd, row_at<T>(p.y, token, channels), channels);
    }
  }
}

}  // namespace
}  // namespace VK_CPU_CAPABILITY
}  // namespace adaln

namespace VK_CPU_CAPABILITY {

void adaln_forward(const adaln::ForwardParams& params) {
  const int64_t grain = 1 + 32768 / (params.channels + 1);  // about 64 KB of bfloat16: far above the cost of a task
  VK_DISPATCH_FLOATING(params.dtype, ([&] {
                         parallel_for(0, params.tokens, grain, [&](int64_t begin, int64_t end) {
                           adaln::forward_range<scalar_t>(params, begin, end);
                         });
                       }));
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
