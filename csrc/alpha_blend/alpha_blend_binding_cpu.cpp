// SPDX-License-Identifier: Apache-2.0
#include "alpha_blend/alpha_blend_binding.h"

namespace vidkernels {
namespace {

Tensor alpha_blend_fwd_binding(const Tensor& x, const Tensor& b, const Tensor& mix_factor,
                               const std::optional<Tensor>& history, const std::optional<Tensor>& lookahead,
                               int64_t mode, int64_t split) {
  Tensor y = torch::stable::empty_like(b);
  BlendInputs in{x, with_strides_of(b, y), mix_factor, history, lookahead};
  if (static_cast<BlendMode>(mode) == BlendMode::plain) in.x = with_strides_of(x, y);
  const BlendFrames frames = blend_frames(in, mode, split);
  if (y.numel() == 0) return y;
  AlphaBlendParams params = blend_params(in, frames, blend_layout(in, y, nullptr, frames.mode));
  params.y = y.mutable_data_ptr();
  alpha_blend_fwd_cpu(params);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> alpha_blend_bwd_binding(
    const Tensor& dy, const Tensor& x, const Tensor& b, const Tensor& mix_factor, const std::optional<Tensor>& history,
    const std::optional<Tensor>& lookahead, int64_t mode, int64_t split, bool want_x, bool want_b, bool want_mix,
    bool want_history, bool want_lookahead) {
  const Tensor like = torch::stable::empty_like(b);
  BlendInputs in{x, with_strides_of(b, like), mix_factor, history, lookahead};
  if (static_cast<BlendMode>(mode) == BlendMode::plain) in.x = with_strides_of(x, like);
  const BlendFrames frames = blend_frames(in, mode, split);
  BlendGradients grads = blend_gradients(in, {want_x, want_b, want_mix, want_history, want_lookahead});
  if (like.numel() == 0) {
    for (Tensor* grad : {&grads.dx, &grads.db, &grads.dmix, &grads.dhistory, &grads.dlookahead})
      torch::stable::zero_(*grad);
  } else {
    const BlendLayout layout = blend_layout(in, like, &grads, frames.mode);
    alpha_blend_bwd_cpu(blend_backward_params(blend_params(in, frames, layout), with_strides_of(dy, like), grads));
  }
  return {grads.dx, grads.db, grads.dmix, grads.dhistory, grads.dlookahead};
}

}  // namespace
}  // namespace vidkernels

STABLE_TORCH_LIBRARY_IMPL(vidkernels, CPU, m) {
  m.impl("alpha_blend_fwd", TORCH_BOX(&vidkernels::alpha_blend_fwd_binding));
  m.impl("alpha_blend_bwd", TORCH_BOX(&vidkernels::alpha_blend_bwd_binding));
}
