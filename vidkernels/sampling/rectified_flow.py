# SPDX-License-Identifier: Apache-2.0
"""Rectified flow (arXiv 2209.03003) in both orientations: SD3's and Open-Sora's sigma (1 is noise), Goku's t (1 is data)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vidkernels.errors import OptionError, ShapeError
from vidkernels.ops._checks import (
    check_callable,
    check_floating,
    check_number,
    check_option,
    check_positive,
    check_same_device,
    check_shape,
    whole_number,
)
from vidkernels.sampling._unipc import UniPC

MAX_STEPS = 2**20
DENSITIES = ("logit_normal", "uniform")
Velocity = Callable[[Tensor, Tensor], Tensor]


def shift_time(sigma: Tensor, shift: float) -> Tensor:
    """Shift noise levels to s sigma / (1 + (s - 1) sigma): more steps near the noise for long sequences (arXiv 2403.03206)."""
    check_floating("sigma", sigma)
    check_positive("shift", shift)
    return shift * sigma / (1 + (shift - 1) * sigma)


def open_sora_shift(height: float, width: float, latent_frames: int) -> float:
    """Open-Sora 1.2's shift by resolution, sqrt(h w / 512^2) * sqrt(latent frames), of which 17 frames have 5."""
    return math.sqrt(height * width / 512**2) * math.sqrt(latent_frames)


def guided(model: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance: the model sees cat[x, x] (its conditions are [prompt, null]) in one call.

    v = v_null + scale * (v_prompt - v_null).
    """

    check_callable("model", model, "a function (x, t)")
    check_number("scale", scale)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        prompt, null = model(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        return null + scale * (prompt - null)

    return velocity


class RectifiedFlow:
    """Rectified flow: training and sampling along straight paths between noise and data.

    Args:
        orientation: "sigma": x = (1 - s) data + s noise, the model predicts noise - data (SD3, Wan, diffusers) unless
            `predicts="data"`; "t": x = t data + (1 - t) noise, the model predicts data - noise (Goku).
        predicts: "noise" or "data": which end the predicted velocity points to. Default: "noise" for sigma, "data" for t.
        shift: see `shift_time`; applied to the noise level in either orientation.
        time_scale: the model is told level * time_scale (1000 for Open-Sora and Wan, 1 for Goku).
    """

    def __init__(
        self, orientation: str = "sigma", *, predicts: str | None = None, shift: float = 1.0, time_scale: float = 1000.0
    ) -> None:
        check_option("orientation", orientation, ("sigma", "t"))
        self.orientation = orientation
        self.predicts = ("noise" if orientation == "sigma" else "data") if predicts is None else predicts
        check_option("predicts", self.predicts, ("noise", "data"))
        check_positive("shift", shift)
        check_number("time_scale", time_scale)
        self.shift, self.time_scale = shift, time_scale

    def levels(self, steps: int, device: torch.device | None = None) -> Tensor:
        """Noise levels 1 = s_0 > ... > s_steps = 0, shifted, float64 [steps + 1]."""
        if whole_number(steps, 1) is None or steps > MAX_STEPS:
            raise OptionError("steps", f"at least 1, at most {MAX_STEPS}", repr(steps))
        return shift_time(1 - torch.arange(steps + 1, dtype=torch.float64, device=device) / steps, self.shift)

    def model_time(self, sigma: Tensor) -> Tensor:
        """What the model is told at a noise level."""
        return (sigma if self.orientation == "sigma" else 1 - sigma) * self.time_scale

    def sample_levels(
        self,
        batch: int,
        *,
        density: str = "logit_normal",
        mean: float = 0.0,
        std: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Random training noise levels [batch], "logit_normal" or "uniform", then shifted."""
        check_option("density", density, DENSITIES)
        if whole_number(batch, 0) is None:
            raise OptionError("batch", "an int of at least 0", repr(batch))
        check_number("mean", mean)
        check_number("std", std, 0)
        if density == "uniform":
            level = torch.rand(batch, generator=generator, dtype=torch.float32)
        else:
            level = torch.sigmoid(mean + std * torch.randn(batch, generator=generator, dtype=torch.float32))
        return shift_time(level, self.shift)

    def interpolate(self, data: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """x at noise levels [B], and the velocity that the model is to predict."""
        check_floating("data", data)
        check_floating("noise", noise)
        check_floating("sigma", sigma)
        check_shape("noise", noise, tuple(data.shape), "that of data")
        check_same_device("noise", noise, "data", data)
        check_same_device("sigma", sigma, "data", data)
        if data.ndim < 1 or sigma.ndim > 1 or sigma.numel() not in (1, data.shape[0]):
            raise ShapeError("sigma", "[B], one level per sample of data", tuple(sigma.shape))
        level = sigma.to(data.dtype).reshape(-1, *[1] * (data.ndim - 1))
        target = noise - data if self.predicts == "noise" else data - noise
        return (1 - level) * data + level * noise, target

    def sample(
        self,
        model: Velocity,
        noise: Tensor,
        steps: int,
        *,
        method: str = "euler",
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Integrate from noise to data.

        Args:
            model: (x, t [B]) -> velocity.
            noise: x at level 1.
            steps: number of steps; "heun" calls the model twice a step but the last.
            method: "euler", "heun", or "unipc" (second order with one call a step, needs diffusers).
            callback: called with (step, x) after each step, steps counted from 1.
        """
        check_option("method", method, ("euler", "heun", "unipc"))
        check_callable("model", model, "a function (x, t)")
        check_floating("noise", noise)
        if noise.ndim < 1:
            raise ShapeError("noise", "[B, ...]", "a scalar", "Add the batch axis.")
        levels = self.levels(steps, noise.device)
        lengths = levels.diff().tolist()  # once: read step by step, each would wait for the model before it
        solver = UniPC(levels) if method == "unipc" else None
        sign = 1.0 if self.predicts == "noise" else -1.0

        def velocity(x: Tensor, level: Tensor) -> Tensor:
            t = self.model_time(level).float().expand(x.shape[0])
            found = model(x, t)
            check_shape("model", found, tuple(x.shape), "of x")  # one channel would spread over all without a word
            return sign * found  # d x / d sigma

        x = noise
        for index in range(steps):
            here, there = levels[index], levels[index + 1]
            slope = velocity(x, here)
            step = lengths[index]
            moved = x + step * slope if solver is None else solver.step(slope, x)
            if method == "heun" and index + 1 < steps:
                moved = x + step * 0.5 * (slope + velocity(moved, there))
            x = moved
            if callback is not None:
                callback(index + 1, x)
        return x
