// SPDX-License-Identifier: Apache-2.0
// `toy NAME`: runs one of the kernels of toy.cu in the order of threads given by the second argument.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "common/cuda.h"

extern "C" void simt_set_order(int which, unsigned seed);

namespace vidkernels {
void center_cuda(const void* x, void* y, int rows, int channels, DType dtype, cudaStream_t stream);
void race_cuda(const float* x, float* y);
void greedy_cuda(const float* x, float* y);
void overrun_cuda(float* y);
void divergent_cuda(float* y);
void deadlock_cuda(float* y);
}  // namespace vidkernels

namespace {

// Largest error of the centred rows, in units of the dtype's rounding of the largest value.
template <typename T>
double center_error(vidkernels::DType dtype, double rounding) {
  using vidkernels::cuda::widen;
  constexpr int kRows = 3, kChannels = 101;
  std::mt19937 engine(7);
  std::normal_distribution<float> normal(0.5f);
  std::vector<T> x(kRows * kChannels), y(kRows * kChannels);
  for (T& value : x) value = vidkernels::cuda::narrow<T>(normal(engine));
  vidkernels::center_cuda(x.data(), y.data(), kRows, kChannels, dtype, nullptr);
  double worst = 0, largest = 0;
  for (int r = 0; r < kRows; ++r) {
    double mean = 0;
    for (int c = 0; c < kChannels; ++c) mean += static_cast<double>(widen(x[r * kChannels + c])) / kChannels;
    for (int c = 0; c < kChannels; ++c) {
      const double exact = static_cast<double>(widen(x[r * kChannels + c])) - mean;
      worst = std::fmax(worst, std::fabs(exact - static_cast<double>(widen(y[r * kChannels + c]))));
      largest = std::fmax(largest, std::fabs(exact));
    }
  }
  return worst / (rounding * largest);
}

// What a user reads when the runtime refuses a launch.
void print_error(cudaError_t status) {
  try {
    vidkernels::cuda::check(status, "launch");
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const char* name = arguments[1];
  simt_set_order(std::atoi(arguments[2]), 11);
  std::vector<float> x(64), y(64, -1.0f);
  for (int i = 0; i < 64; ++i) x[i] = static_cast<float>(i);
  if (std::strcmp(name, "center") == 0) {
    std::printf("%g %g %g\n", center_error<float>(vidkernels::DType::float32, std::ldexp(1.0, -24)),
                center_error<__nv_bfloat16>(vidkernels::DType::bfloat16, std::ldexp(1.0, -8)),
                center_error<__half>(vidkernels::DType::float16, std::ldexp(1.0, -11)));
    return 0;
  }
  if (std::strcmp(name, "errors") == 0) {
    print_error(cudaErrorInsufficientDriver);
    print_error(cudaErrorNoKernelImageForDevice);
    return 0;
  }
  if (std::strcmp(name, "race") == 0) vidkernels::race_cuda(x.data(), y.data());
  if (std::strcmp(name, "greedy") == 0) vidkernels::greedy_cuda(x.data(), y.data());
  if (std::strcmp(name, "overrun") == 0) vidkernels::overrun_cuda(y.data());
  if (std::strcmp(name, "divergent") == 0) vidkernels::divergent_cuda(y.data());
  if (std::strcmp(name, "deadlock") == 0) vidkernels::deadlock_cuda(y.data());
  for (const float value : y) std::printf("%g ", static_cast<double>(value));
  return 0;
}
