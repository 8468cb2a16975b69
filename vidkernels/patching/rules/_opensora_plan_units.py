# SPDX-License-Identifier: Apache-2.0
"""Units of Open-Sora-Plan's causal VAEs: convolutions that repeat the first frame, and methods that it calls frame by frame.

Every file of its repository looks for an NPU and keeps a configuration of it, `npu_config`; where there is none it is None
or says so. A convolution that was told to keep frames for a next chunk is called as it is.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels.patching._guard import child_reason
from vidkernels.patching._match import digest
from vidkernels.patching._mechanism import Fused
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._vae_units import channels_last, video_reason


class Family(Fused):
    """What all modules of the VAE share."""

    def _clip_reason(self, x: Any) -> str | None:
        """Why a call cannot use kernels whatever the module's layers are."""
        npu = getattr(self._vidkernels_home, "npu_config", None)
        return video_reason(x) or ("it runs on an NPU" if npu is not None and npu.on_npu else None)

    def _conv_reason(self, *convs: Any) -> str | None:
        """Why causal convolutions must be called."""
        for conv in convs:
            reason = child_reason(conv, self._vidkernels_home.CausalConv3d) or causal_reason(conv)
            if reason is not None:
                return reason
        return None


def causal_reason(conv: Any) -> str | None:
    """Why a causal convolution must run its own forward."""
    reason = units.kernel_reason(conv._modules["conv"], nn.Conv3d)
    if reason is None and conv._modules["conv"].padding[0] != 0:
        reason = "a convolution pads frames twice"
    keeps = getattr(conv, "enable_cached", False) or not getattr(conv, "is_first_chunk", True)
    # What is kept was None at first, and is a list later.
    if reason is None and (keeps or getattr(conv, "causal_cached", None)):
        reason = "a convolution keeps frames for the next chunk"
    return reason


def causal(
    owner: Any, conv: Any, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None, **space: Any
) -> Tensor:
    """A causal convolution; the repeated frames are coordinates. `space`: other spatial padding than the layer's own."""
    kernel = conv._modules["conv"]
    options = {"spatial_padding": kernel.padding[1:], **space}
    front = kernel.kernel_size[0] - 1
    return units.convolve(owner, kernel, x, residual, out, time_padding="replicate", pad_frames=front, **options)


def averaged(x: Tensor, count: int) -> Tensor:
    """Means of `count` frames, every second one and those before it, where the first frame is repeated."""
    padded = torch.cat([x[:, :, :1].expand(-1, -1, count - 1, -1, -1), x], 2)
    behind = 2 * ((x.shape[2] - 1) // 2) + 1
    # torch has no such mean in bfloat16 on a CPU; half precision is summed in float32, as its pooling does elsewhere.
    wide = torch.promote_types(x.dtype, torch.float32)
    total = padded[:, :, :behind:2].to(wide)
    for start in range(1, count):
        total = total + padded[:, :, start : start + behind : 2]
    return channels_last((total / count).to(x.dtype))


def interpolated(x: Tensor, *factors: tuple[int, int, int]) -> Tensor:
    """Linear in all axes, by one factor after the other; the first frame stays one frame."""
    first = _raised(x[:, :, :1], *((1, height, width) for _, height, width in factors))
    if x.shape[2] == 1:
        return channels_last(first)
    return channels_last(torch.cat([first, _raised(x[:, :, 1:], *factors)], 2))


def _raised(x: Tensor, *factors: tuple[int, int, int]) -> Tensor:
    for factor in factors:
        if factor != (1, 1, 1):
            x = F.interpolate(x, scale_factor=factor, mode="trilinear")
    return x


def framewise_check(known: dict[str, tuple[str, ...]], name: str) -> Any:
    """Check of a method behind a decorator that calls it for frames: a rule's digest is the decorator's alone."""

    def check(module: Any) -> str | None:
        cells = getattr(type(module).forward, "__closure__", None) or ()
        inner = next((cell.cell_contents for cell in cells if isinstance(cell.cell_contents, FunctionType)), None)
        found = digest(inner)
        return None if found in known[name] else f"what its forward calls for frames has digest {found}"

    return check
