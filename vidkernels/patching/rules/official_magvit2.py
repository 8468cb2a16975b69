# SPDX-License-Identifier: Apache-2.0
"""Rules for Open-MAGVIT2's networks for clips, in SEED-Voken and copies of it, found by the digests of their methods.

A network brings its input to channels-last memory once, and what is below keeps the format. Norms see the whole clip, as
upstream's: a block needs three tensors, the residual stream and two temporaries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.nn._residual import PIECE_CPU, PIECE_GPU, is_traced
from vidkernels.patching._guard import child_reason, guarded, is_autocast
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._vae_memory import may_write, overwriting
from vidkernels.patching.rules._vae_units import as_rows, channels_last, restored, video_reason


def causal(
    owner: Any, conv: Any, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None, **more: Any
) -> Tensor:
    """A `ConvBlock3D`: its zeros around the clip as coordinates."""
    left, right, top, bottom, front, back = conv.padding
    options = {"time_padding": "zeros", "pad_frames": (front, back), "spatial_padding": (left, right, top, bottom)}
    return units.convolve(owner, conv._modules["conv_1"], x, residual, out, **options, **more)


class _Family(Fused):
    def _conv_reason(self, conv: Any) -> str | None:
        return child_reason(conv, self._vidkernels_home.ConvBlock3D) or _kernel_reason(conv)


def _kernel_reason(conv: Any) -> str | None:
    """Why the convolution inside a `ConvBlock3D` must be called."""
    kernel = conv._modules["conv_1"]
    reason = units.kernel_reason(kernel, nn.Conv3d)
    return reason or ("a convolution pads twice" if any(kernel.padding) else None)


class ConvForward(_Family):
    """`ConvBlock3D.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, K, T', H', W']."""
        return causal(self, self, x)

    def _reason(self, x: Tensor) -> str | None:
        return video_reason(x) or _kernel_reason(self)


class BlockForward(_Family):
    """`ResBlock.forward`."""

    @guarded
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """[B, in_filters, T, H, W] -> [B, out_filters, T, H, W]."""
        stream = channels_last(x)
        writes = may_write(stream)
        h = causal(self, self.conv1, units.group_normed(self, self.norm1, stream))
        h = units.group_normed(self, self.norm2, h)
        shortcut = stream if self.in_filters == self.out_filters else causal(self, self._shortcut(), stream)
        return restored(causal(self, self.conv2, h, shortcut, shortcut if writes else None), x)

    def _shortcut(self) -> Any:
        return self.conv_shortcut if self.use_conv_shortcut else self.nin_shortcut

    def _reason(self, x: Tensor, **rest: Any) -> str | None:
        reason = video_reason(x) or units.group_reason(self.norm1, self.norm2)
        reason = reason or self._conv_reason(self.conv1) or self._conv_reason(self.conv2)
        if reason is None and self.in_filters != self.out_filters:
            reason = self._conv_reason(self._shortcut())
        return reason


def adapted(module: Any, x: Tensor, codes: Tensor) -> Tensor:
    """An `AdaptiveGroupNorm` of x [B, C, T, H, W] in channels-last memory: normalized, scaled by a map of the deviation of
    codes [B, z, ...] over their positions, and shifted by a map of their mean."""
    rows, norm = codes.flatten(2), module.gn
    scale, shift = module.gamma((rows.var(dim=-1) + module.eps).sqrt()), module.beta(rows.mean(dim=-1))
    options: dict[str, Any] = {"eps": norm.eps, "backend": module._vidkernels_backend("group_norm")}
    if x.shape[0] == 1 and not is_autocast(x):
        y: Tensor = ops.group_norm(x, norm.num_groups, scale[0], shift[0], **options)
        return y
    scale, shift = (row[..., None, None, None] for row in (scale, shift))
    if is_autocast(x):  # everywhere but on CPUs it makes norms float32, and so the sum
        return scale * ops.group_norm(x if x.is_cpu else x.float(), norm.num_groups, **options) + shift
    return torch.addcmul(shift, scale, ops.group_norm(x, norm.num_groups, **options))


def adapted_reason(module: Any, x: Tensor) -> str | None:
    """Why an `AdaptiveGroupNorm` must be called."""
    reason = units.group_reason(module.gn)
    if reason is None and module.gn.affine:
        reason = "its norm has a scale of its own"
    if reason is None and not is_autocast(x):
        weight = getattr(module.beta, "weight", None)  # a wrapper may have none
        dtype = weight.dtype if isinstance(weight, Tensor) else None
        if x.dtype != dtype:
            reason = f"its input has dtype {x.dtype}, its weights {dtype}"
    return reason


class AdaptiveNormForward(_Family):
    """`AdaptiveGroupNorm.forward`."""

    @guarded
    def forward(self, x: Tensor, quantizer: Tensor) -> Tensor:
        """x [B, C, T, H, W], quantizer [B, z, t, h, w] -> [B, C, T, H, W]."""
        return restored(adapted(self, channels_last(x), quantizer), x)

    def _reason(self, x: Tensor, quantizer: Tensor) -> str | None:
        return video_reason(x, quantizer) or adapted_reason(self, x)


class UpForward(_Family):
    """`Upsampler.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T, 2 H, 2 W] or [B, C, 2 T - 1, 2 H, 2 W]: the second frame is left out."""
        stream = channels_last(x)
        if torch.is_grad_enabled() or is_traced() or is_autocast(x):
            y = units.from_channels(causal(self, self.conv1, stream), self.block_size, box_first=True)
            if self.block_size[0] > 1:
                y = torch.cat([y[:, :, :1], y[:, :, 2:]], 2)
        else:
            y = self._in_pieces(stream)
        return restored(y, x)

    def _in_pieces(self, x: Tensor) -> Tensor:
        """The same without gradients: some frames of the convolution's result at a time, each moved to its place at once."""
        times, rows, columns = self.block_size
        batch, _, frames, height, width = x.shape
        kernel = self.conv1.conv_1
        channels, seen = kernel.out_channels // (times * rows * columns), self.conv1.padding[4]
        size = batch, channels, times * frames - (times - 1), height * rows, width * columns
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
        each = batch * kernel.out_channels * height * width
        count = max(1, (PIECE_CPU if x.is_cpu else PIECE_GPU) // max(1, each))
        for start in range(0, frames, count):
            piece = x[:, :, start : start + count]
            history = x[:, :, max(0, start - seen) : start] if start else None
            wide = as_rows(causal(self, self.conv1, piece, history=history))
            boxes = wide.unflatten(-1, (times, rows, columns, channels)).permute(0, 1, 4, 2, 5, 3, 6, 7)
            self._place(as_rows(y), boxes, start)
        return y

    def _place(self, y: Tensor, boxes: Tensor, start: int) -> None:
        """Boxes [B, t, times, H, rows, W, columns, C] from latent frame `start` on to y [B, T, H, W, C]."""
        times = boxes.shape[2]
        if start == 0 and times > 1:
            _spread(y[:, :1], boxes[:, :1, :1])
            boxes, start = boxes[:, 1:], 1
        begin = start * times - (times - 1)
        _spread(y[:, begin : begin + boxes.shape[1] * times], boxes)

    def _reason(self, x: Tensor) -> str | None:
        reason = video_reason(x) or self._conv_reason(self.conv1)
        if reason is None and self.depth2space is not self._vidkernels_home.depth_to_space3d:
            reason = "its channels become positions by a function of its own"
        return reason or _block_reason(self)


def _spread(y: Tensor, boxes: Tensor) -> None:
    """Write boxes [B, t, times, H, rows, W, columns, C] to y [B, t * times, H * rows, W * columns, C]."""
    for axis in (3, 2, 1):
        y = y.unflatten(axis, tuple(boxes.shape[2 * axis - 1 : 2 * axis + 1]))
    y.copy_(boxes)


def _block_reason(upsampler: Any) -> str | None:
    conv, block = upsampler.conv1, tuple(upsampler.block_size)
    plain = conv.conv_1.stride == (1, 1, 1) and conv.padding[5] == 0
    if len(block) == 3 and block[0] in (1, 2) and plain:
        return None
    return f"it makes boxes of {block} by a convolution of stride {conv.conv_1.stride}"


class _Network(_Family):
    def _reason(self, x: Tensor) -> str | None:
        return video_reason(x) or units.group_reason(self.norm_out)

    def _end(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv_out(units.group_normed(self, self.norm_out, channels_last(x))).contiguous()
        return y


class EncoderForward(_Network):
    """`Encoder.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> [B, z, t, h, w] in front of the quantizer."""
        with overwriting(self, x):
            h = self.conv_in(channels_last(x))
            for level in self.down:
                for block in level.block:
                    h = block(h)
                if hasattr(level, "downsample"):
                    h = level.downsample(h)
            for block in self.mid_block:
                h = block(h)
        return self._end(h)


class DecoderForward(_Network):
    """`Decoder.forward`."""

    @guarded
    def forward(self, z: Tensor) -> Tensor:
        """Codes [B, z, t, h, w] -> frames [B, 3, T, H, W]."""
        with overwriting(self, z):
            h = self.conv_in(channels_last(z))
            for block in self.mid_block:
                h = block(h)
            for i in reversed(range(len(self.up))):
                level, h = self.up[i], self.adaptive[i](h, z)
                for block in level.block:
                    h = block(h)
                if hasattr(level, "upsample"):
                    h = level.upsample(h)
        return self._end(h)

    def _reason(self, z: Tensor) -> str | None:
        return super()._reason(z)


def norm_check(module: Any) -> str | None:
    """Why no call of a module can be served: copies of the file have norms of their own."""
    if getattr(module, "use_agn", False):
        return "it has no first norm (use_agn=True)"
    for name in ("norm1", "norm2", "norm_out", "gn"):
        norm = getattr(module, name, None)
        if norm is not None and not isinstance(norm, nn.GroupNorm):
            return f"its {name} is a {type(norm).__name__}, not a GroupNorm"
    return None


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    channels = next(p for p in module.parameters() if p.ndim == 5).shape[1]
    return (units.like_parameters(module, 1, channels, 3, 8, 8),), {}


def _encoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    side = 2 ** len(module.down)
    return (units.like_parameters(module, 1, module.conv_in.conv_1.in_channels, 5, side, side),), {}


def _norm_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = units.like_parameters(module, 1, module.gn.num_channels, 3, 8, 8)
    return (x, units.like_parameters(module, 1, module.gamma.in_features, 2, 4, 4)), {}


_SWISH = {"swish": "8b32ccd8c8b19e4f"}


def _rule(
    name: str, target: str, mixin: type, uses: str, digests: dict[str, str], features: tuple[str, ...], **more: Any
) -> Rule:
    options: dict[str, Any] = {"check": norm_check, "sample": _sample, **more}
    return Rule(
        name=f"open_magvit2.video_{name}",
        ops=tuple(uses.split()),
        targets=(f"src.Open_MAGVIT2.modules.diffusionmodules.improved_video_model:{target}",),
        mixin=mixin,
        digests={key: (value,) for key, value in digests.items()},
        features=features,
        tested_versions=("SEED-Voken bea0671",),
        **options,
    )


_BOTH, _CONV = "causal_conv3d group_norm", "causal_conv3d"
_CONV_CODE = {"ConvBlock3D.forward": "99506155fc00a877"}

RULES = (
    _rule(
        "encoder", "Encoder", EncoderForward, "group_norm", {"Encoder.forward": "40e2fe903e9b5be2", **_SWISH},
        ("conv_in.conv_1", "conv_out.conv_1", "mid_block", "down", "norm_out"), reads=("norm_out",),
        sample=_encoder_sample,
    ),
    _rule(
        "decoder", "Decoder", DecoderForward, "group_norm", {"Decoder.forward": "dd8e05f95f510692", **_SWISH},
        ("conv_in.conv_1", "conv_out.conv_1", "mid_block", "adaptive", "norm_out"), reads=("norm_out",),
    ),
    _rule(
        "block", "ResBlock", BlockForward, _BOTH,
        {"ResBlock.forward": "dd5fd212d238ed6d", **_SWISH, **_CONV_CODE}, ("conv1.conv_1", "conv2.conv_1", "norm2"),
        reads=("*",),
    ),
    _rule(
        "adaptive_norm", "AdaptiveGroupNorm", AdaptiveNormForward, "group_norm",
        {"AdaptiveGroupNorm.forward": "06aac437b51ba6a9"}, ("gn", "gamma", "beta"), sample=_norm_sample,
    ),
    _rule(
        "upsample", "Upsampler", UpForward, _CONV,
        {"Upsampler.forward": "ba1c8b91f6e8610f", "depth_to_space3d": "7efc39553e2c2196", **_CONV_CODE},
        ("conv1.conv_1", "block_size", "depth2space"), reads=("*",), check=_block_reason,
    ),
    _rule(
        "conv", "ConvBlock3D", ConvForward, _CONV, _CONV_CODE, ("conv_1", "padding"), reads=("conv_1",), check=None,
    ),
)  # fmt: skip
