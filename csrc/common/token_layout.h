// SPDX-License-Identifier: Apache-2.0
// Tensors whose channels lie on one axis and whose other axes are tokens: quantizers see them as
// [outer, inner tokens, codebooks, channels], so that a channel axis anywhere needs no permuted copy.
#pragma once

#include <cstdint>

namespace vidkernels {

constexpr int kTokenOperands = 3;

struct TokenStrides {
  int64_t outer = 0, inner = 0, channel = 0;  // elements; codebook k starts at channel k * channels
};

struct TokenLayout {
  int64_t outer = 1, inner = 1, codebooks = 1, channels = 1;
  TokenStrides operand[kTokenOperands];

  int64_t tokens() const { return outer * inner; }
  int64_t elements() const { return outer * inner * codebooks * channels; }

  // Offset of codebook `book` of token (o, i) in an operand.
  int64_t offset(int which, int64_t o, int64_t i, int64_t book) const {
    const TokenStrides& s = operand[which];
    return o * s.outer + i * s.inner + book * channels * s.channel;
  }

  // Tokens follow each other in memory, channel by channel (NCTHW): one channel is a vector.
  bool planar(int operands) const {
    for (int k = 0; k < operands; ++k) {
      if (operand[k].inner != 1) return false;
    }
    return true;
  }

  // The channels of a token follow each other, and so do the tokens (NDHWC, [B, N, C]): all is one run.
  bool interleaved(int operands) const {
    for (int k = 0; k < operands; ++k) {
      if (operand[k].channel != 1 || operand[k].inner != codebooks * channels) return false;
    }
    return true;
  }
};

// Merges the token axes of `operands` tensors of one shape into (outer, inner), keeping their logical order; false
// where they do not fit into two, which takes a copy. `axis` is the channel axis, strides[k][a] the stride of operand
// k.
inline bool collapse_tokens(const int64_t* sizes, int ndim, int axis, const int64_t* const* strides, int operands,
                            int64_t codebooks, TokenLayout* layout) {
  int groups = 0;
  int64_t size[2] = {1, 1};
  int64_t step[2][kTokenOperands] = {};
  for (int a = ndim - 1; a >= 0; --a) {
    if (a == axis || sizes[a] == 1) continue;
    bool joins = groups > 0;
    for (int k = 0; joins && k < operands; ++k) joins = strides[k][a] == step[groups - 1][k] * size[groups - 1];
    if (joins) {
      size[groups - 1] *= sizes[a];
      continue;
    }
    if (groups == 2) return false;
    size[groups] = sizes[a];
    for (int k = 0; k < operands; ++k) step[groups][k] = strides[k][a];
    ++groups;
  }
  layout->inner = size[0];
  layout->outer = size[1];
  layout->codebooks = codebooks;
  layout->channels = sizes[axis] / codebooks;
  for (int k = 0; k < operands; ++k) layout->operand[k] = {step[1][k], step[0][k], strides[k][axis]};
  // A single token or channel has no stride of its own: give it the one that the fast paths look for.
  for (int k = 0; k < operands; ++k) {
    TokenStrides& s = layout->operand[k];
    if (sizes[axis] == 1) s.channel = 1;
    if (layout->inner == 1) s.inner = s.channel == 1 ? sizes[axis] : 1;
  }
  return true;
}

}  // namespace vidkernels
