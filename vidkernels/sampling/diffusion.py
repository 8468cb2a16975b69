# SPDX-License-Identifier: Apache-2.0
"""DDPM (arXiv 2006.11239) and DDIM (arXiv 2010.02502) with respacing and learned-range variance (arXiv 2102.09672),
as Latte samples and trains. Schedules are float64; a step runs in the dtype of the sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidkernels.errors import DTypeError, OptionError, ShapeError
from vidkernels.ops._checks import (
    check_callable,
    check_flag,
    check_floating,
    check_number,
    check_option,
    check_same_device,
    check_shape,
    check_tensor,
    is_unread,
    is_whole,
    whole_numbers,
)

Model = Callable[[Tensor, Tensor], Tensor]
MAX_STEPS = 2**20  # of a trained process; published ones have 1000


def respaced_steps(spec: str | int | Sequence[int], num_steps: int = 1000) -> list[int]:
    """The steps of the original process that a respaced one keeps, ascending.

    Args:
        spec: `"250"`: 250 steps with a fractional stride, first and last included; `"10,15,20"`: so many in each of three
            equal sections; `"ddim50"`: the integer stride that gives 50 steps from 0. Numbers may also be an int or a sequence.
        num_steps: length of the trained process.

    Raises:
        OptionError: a section has fewer steps than are wanted of it, or no stride gives the count.
    """
    _check_steps(num_steps)
    if isinstance(spec, str) and spec.startswith("ddim"):
        count = _counts(spec.removeprefix("ddim"), spec)[0]
        for every in range(1, num_steps):
            if len(range(0, num_steps, every)) == count:
                return list(range(0, num_steps, every))
        raise OptionError("spec", f"a count that an integer stride over {num_steps} steps gives", repr(spec))
    counts, steps, start = _counts(spec, spec), [], 0
    for section, count in enumerate(counts):
        size = num_steps // len(counts) + (section < num_steps % len(counts))
        if not 1 <= count <= size:
            raise OptionError("spec", f"1 to {size} steps of each section's {size}", repr(spec))
        stride, position = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += size
    return steps


def _counts(numbers: str | int | Sequence[int], spec: object) -> list[int]:
    try:
        counts = [int(part) for part in numbers.split(",")] if isinstance(numbers, str) else numbers
    except ValueError:
        counts = ()
    found = whole_numbers([counts] if isinstance(counts, int) else counts, 0)
    if not found:
        raise OptionError("spec", "a number of steps, 'ddim50', or several as '10,15,20'", repr(spec))
    return list(found)


def _check_steps(num_steps: object) -> None:
    if not is_whole(num_steps) or num_steps > MAX_STEPS:  # type: ignore[operator]
        raise OptionError("num_steps", f"an int from 1 to {MAX_STEPS}", repr(num_steps))


@dataclass(frozen=True)
class Step:
    """One reverse step: index in the respaced process, and the original index that the model is told."""

    index: int
    original: int


class GaussianDiffusion:
    """Noise-predicting diffusion with linear betas 1e-4 to 2e-2 and, optionally, a learned variance.

    Args:
        spec: steps to keep, see `respaced_steps`; None keeps all.
        num_steps: length of the trained process.
        learned_range: the model's output has twice the channels; the second half interpolates the log-variance between
            the posterior's and beta's.
        channel_dim: axis of the channels in the model's output.
        fixed_variance: where none is learned: "large", beta, as the official DiT and Latte codes sample models without
            `learn_sigma`; or "small", the posterior's.
    """

    def __init__(
        self,
        spec: str | int | Sequence[int] | None = None,
        *,
        num_steps: int = 1000,
        learned_range: bool = True,
        channel_dim: int = 2,
        fixed_variance: str = "large",
    ) -> None:
        check_option("fixed_variance", fixed_variance, ("small", "large"))
        check_flag("learned_range", learned_range)
        if not isinstance(channel_dim, int) or isinstance(channel_dim, bool):
            raise OptionError("channel_dim", "an int", repr(channel_dim), "The axis of the channels.")
        _check_steps(num_steps)
        betas = torch.linspace(1e-4, 2e-2, num_steps, dtype=torch.float64)
        cumulative = torch.cumprod(1 - betas, 0)
        self.steps = list(range(num_steps)) if spec is None else respaced_steps(spec, num_steps)
        kept = cumulative[self.steps]
        self.betas = 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        self.learned_range, self.channel_dim = learned_range, channel_dim
        alphas = 1 - self.betas
        self.cumulative = torch.cumprod(alphas, 0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), self.cumulative[:-1]])
        self.previous = previous
        variance = self.betas * (1 - previous) / (1 - self.cumulative)
        # The first posterior variance is 0: its logarithm is taken from the second.
        self.log_variance = torch.log(torch.cat([variance[1:2], variance[1:]]) if len(variance) > 1 else self.betas)
        self.fixed_log_variance = self.log_variance if fixed_variance == "small" else self.betas.log()
        self.mean_x0 = self.betas * previous.sqrt() / (1 - self.cumulative)
        self.mean_xt = (1 - previous) * alphas.sqrt() / (1 - self.cumulative)
        self._schedules = {
            "steps": torch.tensor(self.steps),
            "signal": self.cumulative.sqrt(),
            "noise": (1 - self.cumulative).sqrt(),
            "cumulative": self.cumulative,
            "mean_x0": self.mean_x0,
            "mean_xt": self.mean_xt,
            "log_variance": self.log_variance,
            "log_beta": self.betas.log(),
        }
        self._kept: dict[tuple[str, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self.steps)

    def timesteps(self) -> Iterator[Step]:
        """The reverse process, from noise to data."""
        for index in reversed(range(len(self.steps))):
            yield Step(index, self.steps[index])

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """q(x_t | x_0) = sqrt(a_t) x_0 + sqrt(1 - a_t) noise; t [B] are respaced indices."""
        self._check_pair(x0, t, noise)
        return self._at("signal", t, x0) * x0 + self._at("noise", t, x0) * noise

    def sample(
        self,
        model: Model,
        noise: Tensor,
        *,
        method: str = "ddpm",
        eta: float = 0.0,
        clip_denoised: bool = False,
        generator: torch.Generator | None = None,
        step_noise: Callable[[int], Tensor] | None = None,
        callback: Callable[[Step, Tensor], None] | None = None,
    ) -> Tensor:
        """Run the reverse process.

        Args:
            model: (x, t [B] original indices as float) -> noise prediction, and variance where `learned_range`.
            noise: x at the noisiest step.
            method: "ddpm" or "ddim".
            eta: DDIM's stochasticity, 0 is deterministic.
            clip_denoised: clamp each step's prediction of x_0 to -1..1, for data that keep to it (pixels; not latents).
            generator: of the noise of each step.
            step_noise: respaced index -> noise, instead of drawing it.
            callback: called after each step.
        """
        check_option("method", method, ("ddpm", "ddim"))
        check_callable("model", model, "a function (x, t)")
        check_floating("noise", noise)
        if noise.ndim < 1:
            raise ShapeError("noise", "[B, ...]", "a scalar", "Add the batch axis.")
        check_number("eta", eta, 0)
        check_flag("clip_denoised", clip_denoised)
        x = noise
        for step in self.timesteps():
            t = torch.full((x.shape[0],), step.original, dtype=torch.float32, device=x.device)
            output = model(x, t)
            if method == "ddpm":
                fresh = self._noise(x, step.index, generator, step_noise)
                x = self._ddpm(x, output, step.index, fresh, clip_denoised)
            else:
                drawn = self._noise(x, step.index, generator, step_noise) if eta > 0 else None
                x = self._ddim(x, output, step.index, eta, drawn, clip_denoised)
            if callback is not None:
                callback(step, x)
        return x

    def training_losses(self, model: Model, x0: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Loss per sample [B]: `mse` of the noise, `vb` of the variance head in bits per dimension, `loss` their sum.

        Args:
            model: as in `sample`.
            x0: data; t: respaced indices [B]; noise: like x0.
        """
        check_callable("model", model, "a function (x, t)")
        x = self.add_noise(x0, t, noise)  # checks them
        epsilon, variance = self._split(model(x, self._schedule("steps", t.device)[t].float()))
        losses = {"mse": (noise - epsilon).square().flatten(1).mean(1)}
        if variance is not None:
            # The bound trains the variance alone: the mean enters without gradient.
            losses["vb"] = self._variational_bound(x0, x, t, epsilon.detach(), variance)
        losses["loss"] = sum(losses.values(), torch.zeros_like(losses["mse"]))
        return losses

    def _check_pair(self, x0: Tensor, t: Tensor, noise: Tensor) -> None:
        check_floating("x0", x0)
        check_floating("noise", noise)
        check_tensor("t", t)
        check_shape("noise", noise, tuple(x0.shape), "that of x0")
        check_same_device("noise", noise, "x0", x0)
        check_same_device("t", t, "x0", x0)
        if t.dtype not in (torch.int32, torch.int64):  # torch takes indices of uint8 for a mask
            raise DTypeError("t", "int32 or int64", t.dtype, "Convert it: t.long().")
        if x0.ndim < 1 or t.ndim > 1 or t.numel() not in (1, x0.shape[0]):
            raise ShapeError("t", "[B], one index per sample of x0", tuple(t.shape))
        if not is_unread(t) and t.numel() and not 0 <= int(t.min()) <= int(t.max()) < len(self.steps):
            got = f"{int(t.min())} to {int(t.max())}"
            raise OptionError("t", f"indices from 0 to {len(self.steps) - 1}", got, "They count respaced steps.")

    def _variational_bound(self, x0: Tensor, x: Tensor, t: Tensor, epsilon: Tensor, variance: Tensor) -> Tensor:
        """KL of the true posterior to the predicted one, or at t = 0 the discretised likelihood, in bits."""
        a = self._at("cumulative", t, x)
        predicted_x0 = (1 / a).sqrt() * x - (1 / a - 1).sqrt() * epsilon
        c0, c1 = self._at("mean_x0", t, x), self._at("mean_xt", t, x)
        true_mean, mean = c0 * x0 + c1 * x, c0 * predicted_x0 + c1 * x
        low, high = self._at("log_variance", t, x), self._at("log_beta", t, x)
        fraction = (variance + 1) / 2
        log_variance = fraction * high + (1 - fraction) * low
        difference = low - log_variance
        kl = 0.5 * (-1.0 - difference + difference.exp() + (true_mean - mean).square() * (-log_variance).exp())
        likelihood = -_discretized_log_likelihood(x0, mean, 0.5 * log_variance)
        bits = torch.stack([likelihood.flatten(1).mean(1), kl.flatten(1).mean(1)]) / math.log(2.0)
        return torch.where(t == 0, bits[0], bits[1])

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.learned_range:
            return output, None
        place = self.channel_dim
        if not -output.ndim <= place < output.ndim or output.shape[place] % 2:
            expected = f"twice the channels at axis {place}: the noise and its variance"
            raise ShapeError("model", expected, tuple(output.shape), "Models without a variance: learned_range=False.")
        epsilon, variance = output.chunk(2, dim=place)
        return epsilon, variance

    def _schedule(self, name: str, device: torch.device) -> Tensor:
        """One number a step, on a device. Kept there: to copy it to a GPU means to wait for it, in each step of a training."""
        found = self._kept.get((name, device))
        if found is None:
            with torch.inference_mode(False):
                found = self._schedules[name].to(device)
            if not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack():  # else it may be a fake
                self._kept[name, device] = found
        return found

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        return self._schedule(name, t.device)[t].to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))

    def _predict_x0(self, x: Tensor, epsilon: Tensor, index: int, clip: bool) -> Tensor:
        a = self.cumulative[index].item()
        x0 = math.sqrt(1 / a) * x - math.sqrt(1 / a - 1) * epsilon
        return x0.clamp(-1, 1) if clip else x0

    def _log_variance(self, variance: Tensor | None, index: int) -> Tensor | float:
        if variance is None:
            return self.fixed_log_variance[index].item()
        low, high = self.log_variance[index].item(), math.log(self.betas[index].item())
        fraction = (variance + 1) / 2
        return fraction * high + (1 - fraction) * low

    def _ddpm(self, x: Tensor, output: Tensor, index: int, noise: Tensor, clip: bool) -> Tensor:
        epsilon, variance = self._split(output)
        x0 = self._predict_x0(x, epsilon, index, clip)
        mean = self.mean_x0[index].item() * x0 + self.mean_xt[index].item() * x
        if index == 0:
            return mean
        log_variance = self._log_variance(variance, index)
        spread = math.exp(0.5 * log_variance) if isinstance(log_variance, float) else (0.5 * log_variance).exp()
        return mean + spread * noise

    def _ddim(self, x: Tensor, output: Tensor, index: int, eta: float, noise: Tensor | None, clip: bool) -> Tensor:
        epsilon, _ = self._split(output)
        x0 = self._predict_x0(x, epsilon, index, clip)
        a, previous = self.cumulative[index].item(), self.previous[index].item()
        if clip:  # the noise that leads from x to the clamped x_0
            epsilon = (math.sqrt(1 / a) * x - x0) / math.sqrt(1 / a - 1)
        sigma = eta * math.sqrt((1 - previous) / (1 - a)) * math.sqrt(1 - a / previous)
        mean = math.sqrt(previous) * x0 + math.sqrt(max(1 - previous - sigma**2, 0.0)) * epsilon
        return mean if noise is None or index == 0 else mean + sigma * noise

    @staticmethod
    def _noise(
        x: Tensor, index: int, generator: torch.Generator | None, step_noise: Callable[[int], Tensor] | None
    ) -> Tensor:
        if step_noise is not None:
            return step_noise(index)
        return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of 8-bit data in -1..1 under a Gaussian integrated over each value's bin (tanh approximation)."""

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))

    inverse = (-log_scale).exp()
    upper, lower = cdf(inverse * (x - mean + 1 / 255)), cdf(inverse * (x - mean - 1 / 255))
    inside = (upper - lower).clamp(min=1e-12).log()
    inside = torch.where(x > 0.999, (1 - lower).clamp(min=1e-12).log(), inside)
    return torch.where(x < -0.999, upper.clamp(min=1e-12).log(), inside)
