// SPDX-License-Identifier: Apache-2.0
// From tensors to parameters, for the CPU and the CUDA binding alike. A Backend supplies
//   static void forward(const Tensor&, const FsqFwdParams&), backward(const Tensor&, const FsqBwdParams&),
//   decode(const Tensor&, const FsqDecodeParams&)
#pragma once

#include <map>

#include "common/token_tensors.h"
#include "fsq/fsq.h"

namespace vidkernels {

using torch::headeronly::ScalarType;

// Fills the channels of a codebook; thresholds of equal level counts are shared, in order of first appearance.
inline int32_t fsq_channels(const std::vector<int64_t>& levels, FsqChannel* channel) {
  STD_TORCH_CHECK(levels.size() <= kFsqMaxChannels, "levels: expected at most ", kFsqMaxChannels, " channels, got ",
                  levels.size());
  std::map<int64_t, int32_t> first;
  int32_t count = 0;
  uint32_t basis = 1;
  for (size_t c = 0; c < levels.size(); ++c) {
    STD_TORCH_CHECK(levels[c] >= 2, "levels: expected at least 2, got ", levels[c]);
    const auto [place, is_new] = first.emplace(levels[c], count);
    if (is_new) count += static_cast<int32_t>(levels[c]) - 1;
    channel[c] = {static_cast<int32_t>(levels[c]), place->second, basis};
    basis *= static_cast<uint32_t>(levels[c]);
  }
  return count;
}

template <typename Backend>
std::tuple<Tensor, Tensor> fsq_fwd_op(Tensor z, std::vector<int64_t> levels, std::vector<double> thresholds,
                                      bool symmetric, int64_t dim, int64_t num_codebooks, bool return_codes,
                                      bool return_indices) {
  FsqFwdParams p;
  p.threshold_count = fsq_channels(levels, p.channel);
  STD_TORCH_CHECK(p.threshold_count == static_cast<int64_t>(thresholds.size()), "thresholds: expected ",
                  p.threshold_count, ", got ", thresholds.size());
  STD_TORCH_CHECK(z.size(dim) == num_codebooks * static_cast<int64_t>(levels.size()), "z: expected ",
                  num_codebooks * levels.size(), " channels at axis ", dim, ", got ", z.size(dim));
  const std::vector<int64_t> none{0};
  Tensor codes = return_codes ? torch::stable::empty_like(z) : empty_on(z, none, z.scalar_type());
  Tensor indices = empty_on(z, return_indices ? index_sizes(sizes_of(z), dim, num_codebooks) : none, ScalarType::Int);
  if (z.numel() == 0) return {codes, indices};

  Tensor source = z, target = codes;
  std::vector<const Tensor*> operands{&source};
  if (return_codes) operands.push_back(&target);
  if (!token_layout(operands, dim, num_codebooks, &p.layout)) {
    source = torch::stable::contiguous(z);
    if (return_codes) target = torch::stable::empty_like(source);
    token_layout(operands, dim, num_codebooks, &p.layout);
  }
  p.z = source.data_ptr();
  p.codes = return_codes ? target.data_ptr() : nullptr;
  p.indices = return_indices ? static_cast<int32_t*>(indices.data_ptr()) : nullptr;
  p.thresholds = thresholds.data();
  p.dtype = dtype_of(z);
  p.symmetric = symmetric;
  Backend::forward(z, p);
  if (return_codes && target.data_ptr() != codes.data_ptr()) torch::stable::copy_(codes, target);
  return {codes, indices};
}

template <typename Backend>
Tensor fsq_bwd_op(Tensor dcodes, Tensor z, std::vector<double> shift, std::vector<double> slope, bool hard_clamp,
                  int64_t dim, int64_t num_codebooks) {
  Tensor dz = torch::stable::empty_like(z);
  if (z.numel() == 0) return dz;
  FsqBwdParams p;
  STD_TORCH_CHECK(shift.size() == slope.size() && shift.size() <= kFsqMaxChannels,
                  "shift, slope: expected one number a channel");
  STD_TORCH_CHECK(z.size(dim) == num_codebooks * static_cast<int64_t>(shift.size()), "z: expected ",
                  num_codebooks * shift.size(), " channels at axis ", dim, ", got ", z.size(dim));
  Tensor source = z, grad = dcodes, target = dz;
  std::vector<const Tensor*> operands{&source, &grad, &target};
  if (!token_layout(operands, dim, num_codebooks, &p.layout)) {
    source = torch::stable::contiguous(z);
    grad = torch::stable::contiguous(dcodes);
    target = torch::stable::empty_like(source);
    token_layout(operands, dim, num_codebooks, &p.layout);
  }
  p.z = source.data_ptr();
  p.dcodes = grad.data_ptr();
  p.dz = target.data_ptr();
  std::copy(shift.begin(), shift.end(), p.shift);
  std::copy(slope.begin(), slope.end(), p.slope);
  p.dtype = dtype_of(z);
  p.hard_clamp = hard_clamp;
  Backend::backward(z, p);
  if (target.data_ptr() != dz.data_ptr()) torch::stable::copy_(dz, target);
  return dz;
}

template <typename Backend>
Tensor fsq_decode_op(Tensor indices, std::vector<int64_t> levels, bool symmetric, int64_t dim, int64_t num_codebooks,
                     ScalarType dtype) {
  FsqDecodeParams p;
  fsq_channels(levels, p.channel);
  const int64_t channels = static_cast<int64_t>(levels.size());
  Tensor codes = empty_on(indices, code_sizes(indices, dim, num_codebooks, channels), dtype);
  if (codes.numel() == 0) return codes;
  const Tensor dense = torch::stable::contiguous(indices);
  token_layout({&codes, &codes}, dim, num_codebooks, &p.layout);
  p.indices = dense.data_ptr();
  p.codes = codes.data_ptr();
  p.codebook_size = 1;
  for (const int64_t level : levels) p.codebook_size *= level;
  p.dtype = static_cast<DType>(dtype);
  p.index_dtype = dtype_of(indices);
  p.symmetric = symmetric;
  Backend::decode(indices, p);
  return codes;
}

}  // namespace vidkernels
