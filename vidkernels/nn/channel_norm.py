# SPDX-License-Identifier: Apache-2.0
"""Norms of video tokenizers as modules, with the SiLU that follows nearly all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.errors import OptionError
from vidkernels.ops._checks import check_flag, check_flags, is_whole, whole_number


class _Affine(nn.Module):
    """`weight` (ones) and `bias` (zeros) of [channels], or None."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, channels: int, weight: bool, bias: bool, **factory: Any) -> None:
        super().__init__()
        if whole_number(channels, 1) is None:
            raise OptionError("channels", "an int of at least 1", repr(channels))
        check_flags(weight=weight, bias=bias)
        self.channels = channels
        for name, wanted in (("weight", weight), ("bias", bias)):
            self.register_parameter(name, nn.Parameter(torch.empty(channels, **factory)) if wanted else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ChannelNorm(_Affine):
    """Norm over the channel axis at every position, then SiLU if asked: `ops.channel_norm` with parameters.

    Args:
        channels: C.
        kind, eps, dim, activation, backend: as in `ops.channel_norm`.
        weight, bias: whether there are such parameters, named so, of shape [C].
        device, dtype: of the parameters.

    Each position stands alone, so a clip in chunks gives the same bits as the whole clip.
    """

    def __init__(
        self,
        channels: int,
        *,
        kind: str = "layer",
        eps: float | None = None,
        dim: int = 1,
        activation: str | None = None,
        weight: bool = True,
        bias: bool = True,
        backend: str = "auto",
        **factory: Any,
    ) -> None:
        super().__init__(channels, weight, bias, **factory)
        self.kind, self.eps, self.dim, self.activation, self.backend = kind, eps, dim, activation, backend

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] to the same shape and memory format."""
        return ops.channel_norm(
            x,
            self.weight,
            self.bias,
            kind=self.kind,
            eps=self.eps,
            dim=self.dim,
            activation=self.activation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{self.channels}, kind={self.kind!r}, eps={self.eps}, activation={self.activation!r}"


class GroupNorm(_Affine):
    """GroupNorm of [B, C, T, H, W], per frame or over the clip, then SiLU if asked: `ops.group_norm` with parameters.

    Args:
        num_groups, channels: as in `torch.nn.GroupNorm`, whose parameter names it has.
        eps, activation, per_frame, backend: as in `ops.group_norm`.
        affine: whether there are weight and bias.
        device, dtype: of the parameters.

    With `per_frame` a clip in chunks equals the whole clip; otherwise the statistics need the whole clip at once.
    """

    def __init__(
        self,
        num_groups: int,
        channels: int,
        *,
        eps: float = 1e-6,
        activation: str | None = None,
        per_frame: bool = False,
        affine: bool = True,
        backend: str = "auto",
        **factory: Any,
    ) -> None:
        check_flag("affine", affine)
        super().__init__(channels, affine, affine, **factory)
        check_flag("per_frame", per_frame)
        if not is_whole(num_groups) or channels % num_groups:
            raise OptionError(
                "num_groups", f"a divisor of the {channels} channels", repr(num_groups), "Groups are equal."
            )
        self.num_groups, self.eps, self.activation = num_groups, eps, activation
        self.per_frame, self.backend = per_frame, backend

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] to the same shape and memory format."""
        return ops.group_norm(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            eps=self.eps,
            activation=self.activation,
            per_frame=self.per_frame,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.channels}, eps={self.eps}, per_frame={self.per_frame}"
