# SPDX-License-Identifier: Apache-2.0
"""Query/key norm with rotary embedding as a module, and the rotary conventions of published video transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.errors import DTypeError, OptionError
from vidkernels.ops._checks import (
    check_eps,
    check_flag,
    check_option,
    check_positive,
    check_sizes,
    is_finite,
    whole_numbers,
)
from vidkernels.ops._qk_norm_rope_checks import NORMS


def video_positions(frames: int, height: int, width: int, *, device: torch.device | str | None = None) -> Tensor:
    """(t, h, w) of every token of one video in row-major order: int32 `[frames * height * width, 3]`."""
    if whole_numbers((frames, height, width), 0) is None:
        raise OptionError("frames, height, width", "whole numbers of at least 0", repr((frames, height, width)))
    axes = [torch.arange(n, dtype=torch.int32, device=device) for n in (frames, height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary options of `ops.qk_norm_rope` in one value; the class methods name the convention of a published model.

    Args:
        axes: rotated dimensions per position axis.
        theta: base of the frequencies per axis.
        position_scale: factor on the positions per axis.
        layout: "interleaved", "half" or "axis_half".
    """

    axes: tuple[int, ...]
    theta: tuple[float, ...]
    position_scale: tuple[float, ...]
    layout: str = "interleaved"

    @classmethod
    def cogvideox(cls, head_dim: int) -> RotaryConfig:
        """CogVideoX, and this package's default for Goku: a quarter of the head for t, three eighths each for h and w."""
        check_sizes(head_dim=head_dim)
        if head_dim % 16:
            raise OptionError("head_dim", "a multiple of 16", head_dim, "d/4 and 3d/8 must be even.")
        return cls((head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8), (1e4,) * 3, (1.0,) * 3)

    @classmethod
    def wan(cls, head_dim: int) -> RotaryConfig:
        """Wan: `2*floor(d/6)` for h and w, the rest for t."""
        check_sizes(head_dim=head_dim)
        side = 2 * (head_dim // 6)
        return cls((head_dim - 2 * side, side, side), (1e4,) * 3, (1.0,) * 3)

    @classmethod
    def hunyuan_video(cls, axes: Sequence[int] = (16, 56, 56)) -> RotaryConfig:
        """HunyuanVideo: base 256."""
        if (found := whole_numbers(axes, 0)) is None or len(found) != 3:
            raise OptionError("axes", "three even numbers (t, h, w)", repr(axes))
        return cls(tuple(axes), (256.0,) * 3, (1.0,) * 3)

    @classmethod
    def cosmos(
        cls,
        head_dim: int,
        *,
        rope_scale: Sequence[float] = (2.0, 1.0, 1.0),
        fps: float | None = None,
        base_fps: float = 24,
    ) -> RotaryConfig:
        """Cosmos: halves, bases stretched by `rope_scale**(d/(d-2))`, time in units of `base_fps` (images: fps None)."""
        check_sizes(head_dim=head_dim)
        _check_scales("rope_scale", rope_scale)
        check_positive("base_fps", base_fps)
        if fps is not None:
            check_positive("fps", fps)
        if head_dim < 24 or head_dim % 2:
            raise OptionError("head_dim", "an even number of at least 24", head_dim, "Each axis has several pairs.")
        side = head_dim // 6 * 2
        axes = (head_dim - 2 * side, side, side)
        theta = tuple(1e4 * scale ** (dims / (dims - 2)) for scale, dims in zip(rope_scale, axes, strict=True))
        return cls(axes, theta, (1.0 if fps is None else base_fps / fps, 1.0, 1.0), "half")

    @classmethod
    def allegro(cls, head_dim: int, *, interpolation_scale: Sequence[float] = (1.0, 1.0, 1.0)) -> RotaryConfig:
        """Allegro: equal thirds, halves inside each, positions divided by the interpolation scale."""
        check_sizes(head_dim=head_dim)
        _check_scales("interpolation_scale", interpolation_scale)
        if head_dim % 6:
            raise OptionError("head_dim", "a multiple of 6", head_dim, "Each axis has an even third.")
        return cls((head_dim // 3,) * 3, (1e4,) * 3, tuple(1.0 / scale for scale in interpolation_scale), "axis_half")

    @classmethod
    def temporal(cls, head_dim: int) -> RotaryConfig:
        """Open-Sora's STDiT3: one axis, the frame index, over the whole head."""
        check_sizes(head_dim=head_dim)
        return cls((head_dim,), (1e4,), (1.0,))


def _check_scales(name: str, scales: object) -> None:
    if not isinstance(scales, Sequence) or len(scales) != 3 or not all(is_finite(s) and s > 0 for s in scales):
        raise OptionError(name, "three positive numbers (t, h, w)", repr(scales))


def ltx_frequencies(heads: int, head_dim: int, theta: float = 10000.0) -> Tensor:
    """LTX-Video's frequencies, float64 `[3, heads, head_dim // 2]`, for positions `2 * coordinate - 1`.

    The three axes take turns from pair to pair over the full width of all heads; frequencies rise from pi/2 to
    `theta * pi/2`; the first `(heads * head_dim) % 6` channels are not rotated.
    """
    check_sizes(heads=heads, head_dim=head_dim)
    check_positive("theta", theta)
    if head_dim % 2:
        raise OptionError("head_dim", "an even number", head_dim, "Pairs of channels turn together.")
    width = heads * head_dim
    count = width // 6
    rising = theta ** torch.linspace(0, 1, count, dtype=torch.float64) * (math.pi / 2)
    table = torch.zeros(3, width // 2, dtype=torch.float64)
    for axis in range(3):
        table[axis, (width % 6) // 2 + axis :: 3] = rising
    return table.view(3, heads, head_dim // 2)


class QKNormRope(nn.Module):
    """RMSNorm of queries and keys and their rotation, in one launch: `ops.qk_norm_rope` with its weights and options.

    Args:
        heads: query heads.
        head_dim: channels of a head.
        norm: "head", "full" or None.
        rotary: rotary convention; None leaves out the rotation.
        kv_heads: key heads, default `heads`.
        eps: added to the mean square.
        elementwise_affine: learn the weights `q_weight` and `k_weight`.

    Shapes: q `[tokens, H, D]` or `[B, T, H, D]`, positions `[tokens or T, A]` or `[B, T, A]` -> (q, k).
    """

    q_weight: nn.Parameter | None
    k_weight: nn.Parameter | None

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        norm: str | None = "head",
        rotary: RotaryConfig | None = None,
        kv_heads: int | None = None,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_option("norm", norm, NORMS)
        check_sizes(heads=heads, head_dim=head_dim, **({} if kv_heads is None else {"kv_heads": kv_heads}))
        check_flag("elementwise_affine", elementwise_affine)
        check_eps(eps)
        if rotary is not None and not isinstance(rotary, RotaryConfig):
            raise DTypeError(
                "rotary", "a RotaryConfig", type(rotary).__name__, "For example RotaryConfig.wan(head_dim)."
            )
        self.norm, self.eps, self.rotary = norm, eps, rotary
        sizes = [
            head_dim if norm == "head" else head_dim * count
            for count in (heads, heads if kv_heads is None else kv_heads)
        ]
        for name, size in zip(("q_weight", "k_weight"), sizes, strict=True):
            learned = elementwise_affine and norm is not None
            self.register_parameter(
                name, nn.Parameter(torch.ones(size, device=device, dtype=dtype)) if learned else None
            )

    def forward(
        self, q: Tensor, k: Tensor | None, positions: Tensor | None = None, *, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Norm and rotate; without positions only norm. With k None, only q."""
        rotary = self.rotary
        options: dict[str, Any] = {} if rotary is None else {
            "axes": rotary.axes, "theta": rotary.theta, "position_scale": rotary.position_scale, "layout": rotary.layout,
        }  # fmt: skip
        return ops.qk_norm_rope(
            q, k, self.q_weight, None if k is None else self.k_weight, None if rotary is None else positions,
            norm=self.norm, eps=self.eps, inplace=inplace, **options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Options in the module's printed form."""
        return f"norm={self.norm!r}, eps={self.eps}, rotary={self.rotary}"
