// SPDX-License-Identifier: Apache-2.0
// From tensors to the parameters of the alpha blend kernels, for the CPU and the CUDA binding.
#pragma once

#include <optional>

#include "alpha_blend/alpha_blend.h"
#include "common/stable.h"

namespace vidkernels {

constexpr int64_t kFrameAxis = 2;  // of [B, C, T, H, W]

struct BlendInputs {
  Tensor x, b, mix_factor;
  std::optional<Tensor> history, lookahead;
};

struct BlendWanted {
  bool x = false, b = false, mix = false, history = false, lookahead = false;
};

struct BlendGradients {
  Tensor dx, db, dmix, dhistory, dlookahead;
};

inline BlendFrames blend_frames(const BlendInputs& in, int64_t mode, int64_t split) {
  BlendFrames frames;
  frames.mode = static_cast<BlendMode>(mode);
  if (frames.mode == BlendMode::plain) return frames;
  frames.frames = in.x.size(kFrameAxis);
  frames.history = in.history.has_value() ? in.history->size(kFrameAxis) : 0;
  frames.lookahead = in.lookahead.has_value() ? in.lookahead->size(kFrameAxis) : 0;
  frames.split = split;
  frames.out_frames = out_frames_of(frames);
  STD_TORCH_CHECK(in.b.size(kFrameAxis) == frames.out_frames, "alpha_blend: b must have ", frames.out_frames,
                  " frames, got ", in.b.size(kFrameAxis));
  return frames;
}

// `tensor` with the strides of `like`, which has its sizes: itself or a copy.
inline Tensor with_strides_of(const Tensor& tensor, const Tensor& like) {
  if (same_strides(tensor, like)) return tensor;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, tensor);
  return copy;
}

inline const int64_t* strides_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->strides().data() : nullptr;
}

// Layout of a call's operands; throws where they do not lie alike in memory, which the Python layer arranges.
inline BlendLayout blend_layout(const BlendInputs& in, const Tensor& y, const BlendGradients* grads, BlendMode mode) {
  const bool plain = mode == BlendMode::plain;
  const auto given = [](const Tensor* grad) {
    return grad != nullptr && grad->numel() > 0 ? grad->strides().data() : nullptr;
  };
  const int64_t* strides[kBlendOperands] = {in.x.strides().data(),
                                            y.strides().data(),
                                            strides_or_null(in.history),
                                            strides_or_null(in.lookahead),
                                            given(grads == nullptr ? nullptr : &grads->dx),
                                            given(grads == nullptr ? nullptr : &grads->dhistory),
                                            given(grads == nullptr ? nullptr : &grads->dlookahead)};
  BlendLayout layout;
  const bool ok =
      make_frame_layout<kBlendOperands>(y.dim(), y.sizes().data(), strides, kBlendY, plain ? -1 : kFrameAxis, layout);
  STD_TORCH_CHECK(ok, "alpha_blend: the operands differ in memory format");
  return layout;
}

inline AlphaBlendParams blend_params(const BlendInputs& in, const BlendFrames& frames, const BlendLayout& layout) {
  AlphaBlendParams params;
  params.x = in.x.data_ptr();
  params.b = in.b.data_ptr();
  params.history = data_or_null(in.history);
  params.lookahead = data_or_null(in.lookahead);
  params.mix_factor = in.mix_factor.data_ptr();
  params.frames = frames;
  params.layout = layout;
  params.dtype = dtype_of(in.x);
  params.mix_dtype = dtype_of(in.mix_factor);
  return params;
}

inline Tensor gradient_like(const Tensor& tensor, bool wanted) {
  return wanted ? torch::stable::empty_like(tensor) : empty_on(tensor, {0}, tensor.scalar_type());
}
inline Tensor gradient_like(const std::optional<Tensor>& tensor, bool wanted, const Tensor& x) {
  return tensor.has_value() ? gradient_like(*tensor, wanted) : empty_on(x, {0}, x.scalar_type());
}

inline BlendGradients blend_gradients(const BlendInputs& in, const BlendWanted& wanted) {
  return {gradient_like(in.x, wanted.x), gradient_like(in.b, wanted.b), gradient_like(in.mix_factor, wanted.mix),
          gradient_like(in.history, wanted.history, in.x), gradient_like(in.lookahead, wanted.lookahead, in.x)};
}

inline void* data_if_any(const Tensor& tensor) { return tensor.numel() > 0 ? tensor.data_ptr() : nullptr; }

inline AlphaBlendBackwardParams blend_backward_params(const AlphaBlendParams& forward, const Tensor& dy,
                                                      const BlendGradients& grads) {
  AlphaBlendBackwardParams params;
  params.forward = forward;
  params.dy = dy.data_ptr();
  params.dx = data_if_any(grads.dx);
  params.db = data_if_any(grads.db);
  params.dmix = data_if_any(grads.dmix);
  params.dhistory = data_if_any(grads.dhistory);
  params.dlookahead = data_if_any(grads.dlookahead);
  return params;
}

// The bare ops. `Backend` runs the kernels: `forward(like, params)`, `backward(like, params)`.
template <typename Backend>
Tensor alpha_blend_fwd_op(const Tensor& x, const Tensor& b, const Tensor& mix_factor,
                          const std::optional<Tensor>& history, const std::optional<Tensor>& lookahead, int64_t mode,
                          int64_t split) {
  Tensor y = torch::stable::empty_like(b);
  BlendInputs in{x, with_strides_of(b, y), mix_factor, history, lookahead};
  if (static_cast<BlendMode>(mode) == BlendMode::plain) in.x = with_strides_of(x, y);
  const BlendFrames frames = blend_frames(in, mode, split);
  if (y.numel() == 0) return y;
  AlphaBlendParams params = blend_params(in, frames, blend_layout(in, y, nullptr, frames.mode));
  params.y = y.mutable_data_ptr();
  Backend::forward(y, params);
  return y;
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> alpha_blend_bwd_op(
    const Tensor& dy, const Tensor& x, const Tensor& b, const Tensor& mix_factor, const std::optional<Tensor>& history,
    const std::optional<Tensor>& lookahead, int64_t mode, int64_t split, bool want_x, bool want_b, bool want_mix,
    bool want_history, bool want_lookahead) {
  const Tensor like = torch::stable::empty_like(b);
  BlendInputs in{x, with_strides_of(b, like), mix_factor, history, lookahead};
  if (static_cast<BlendMode>(mode) == BlendMode::plain) in.x = with_strides_of(x, like);
  const BlendFrames frames = blend_frames(in, mode, split);
  BlendGradients grads = blend_gradients(in, {want_x, want_b, want_mix, want_history, want_lookahead});
  if (like.numel() == 0) {
    for (Tensor* grad : {&grads.dx, &grads.db, &grads.dmix, &grads.dhistory, &grads.dlookahead}) {
      torch::stable::zero_(*grad);
    }
  } else {
    const BlendLayout layout = blend_layout(in, like, &grads, frames.mode);
    const Tensor source = with_strides_of(dy, like);
    Backend::backward(like, blend_backward_params(blend_params(in, frames, layout), source, grads));
  }
  return {grads.dx, grads.db, grads.dmix, grads.dhistory, grads.dlookahead};
}

}  // namespace vidkernels
