# SPDX-License-Identifier: Apache-2.0
"""Losses of tokenizers. Every one is a mean over the samples, in float32 or above, so that weights do not depend on the batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels.errors import OptionError, ShapeError
from vidkernels.ops._checks import check_option

ADVERSARIAL = ("hinge", "nonsaturating")


def wide(x: Tensor) -> Tensor:
    """Half precision in float32; float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


def reconstruction_loss(video: Tensor, reconstruction: Tensor, kind: str = "l1") -> Tensor:
    """mean |x - y| ("l1") or mean (x - y)^2 ("l2")."""
    check_option("kind", kind, ("l1", "l2"))
    if video.shape != reconstruction.shape:
        raise ShapeError("reconstruction", f"the video's shape {tuple(video.shape)}", tuple(reconstruction.shape))
    difference = wide(video) - wide(reconstruction)
    return difference.abs().mean() if kind == "l1" else difference.square().mean()


def kl_loss(mean: Tensor, log_variance: Tensor, reduction: str = "sample") -> Tensor:
    """KL divergence of N(mean, exp(log_variance)) from N(0, 1): 0.5 (mean^2 + exp(lv) - 1 - lv).

    Args:
        reduction: "sample": summed over a sample, averaged over the batch (VidTok, VQGAN's code); "element": averaged over
            everything, a weight that does not depend on the clip's size.
    """
    check_option("reduction", reduction, ("sample", "element"))
    mean, log_variance = wide(mean), wide(log_variance)
    each = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return each.mean() if reduction == "element" else each.sum() / max(mean.shape[0], 1)


def commitment_loss(features: Tensor, codes: Tensor) -> Tensor:
    """mean (x - sg(q))^2: draws the encoder's output to the codes that it chose."""
    return (wide(features) - wide(codes.detach())).square().mean()


def ramp(step: int, steps: int, first: float) -> float:
    """Factor that falls linearly from `first` to 1 over `steps` (MAGVIT-v2's entropy weight: 3 over 2000 steps)."""
    return 1.0 if step >= steps else first + (1.0 - first) * step / steps


def generator_loss(fake: Tensor, kind: str = "hinge") -> Tensor:
    """-mean D(fake) ("hinge", arXiv 1705.02894), or mean softplus(-D(fake)) ("nonsaturating", arXiv 1406.2661)."""
    check_option("kind", kind, ADVERSARIAL)
    fake = wide(fake)
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "hinge") -> Tensor:
    """mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake)), or mean softplus(-D(real)) + mean softplus(D(fake)).

    VQGAN's code halves the hinge form; here nothing is halved, and a weight may do so.
    """
    check_option("kind", kind, ADVERSARIAL)
    real, fake = wide(real), wide(fake)
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def r1_penalty(real: Tensor, video: Tensor) -> Tensor:
    """0.5 E_b || d D(x_b) / d x_b ||^2 (arXiv 1801.04406), the square summed over a sample; logits of a sample are averaged.

    Args:
        real: D(video), computed with `video.requires_grad`. The discriminator must be twice differentiable: torch's own
            convolutions are, the kernels of this package are not.
    """
    if not video.requires_grad:
        raise OptionError(
            "video", "a tensor that requires a gradient", "requires_grad=False", "Set it before D(video)."
        )
    per_sample = wide(real).reshape(video.shape[0], -1).mean(1).sum()
    (gradient,) = torch.autograd.grad(per_sample, video, create_graph=True)
    return 0.5 * wide(gradient).square().sum() / video.shape[0]


def _mean_over_ranks(x: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, *, epsilon: float = 1e-4, largest: float = 1e4
) -> Tensor:
    """||d rec / d w|| / (||d adv / d w|| + epsilon), at most `largest`, w the decoder's last kernel (VQGAN, arXiv 2012.09841).

    The gradients are those of all ranks together: every rank gets one weight, that of one process with the whole batch.
    """
    norms = []
    for loss in (reconstruction, adversarial):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append(_mean_over_ranks(wide(gradient)).norm())
    return (norms[0] / (norms[1] + epsilon)).clamp(0.0, largest).detach()


class LeCam(nn.Module):
    """LeCam regularisation (arXiv 2104.03310): mean max(0, D(real) - a_fake)^2 + mean max(0, a_real - D(fake))^2.

    a_real and a_fake are moving averages of the logits' means over all ranks; they are buffers, so a checkpoint has them.

    Args:
        decay: of the averages.
    """

    averages: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("averages", torch.zeros(2))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The penalty with the averages so far, which then take in these logits (in training mode)."""
        real, fake = wide(real), wide(fake)
        average_real, average_fake = self.averages.to(real.dtype).clone()
        penalty = F.relu(real - average_fake).square().mean() + F.relu(average_real - fake).square().mean()
        if self.training:
            means = torch.stack([real.detach().mean(), fake.detach().mean()]).to(self.averages.dtype)
            means = _mean_over_ranks(means)
            # A step without a finite gradient is skipped; averages that took it in would spoil all that follow.
            self.averages.lerp_(torch.where(means.isfinite(), means, self.averages), 1 - self.decay)
        return penalty
