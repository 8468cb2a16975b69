# SPDX-License-Identifier: Apache-2.0
"""LPIPS (arXiv 1801.03924) through the `lpips` package, and MAGVIT's loss on the logits of a ResNet-50 through torchvision.
Nothing is downloaded: the networks' weights must be at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.tokenizers._checkpoint import check_keys, read_tensors
from vidkernels.ops._checks import check_floating, check_ndim, check_option, check_size
from vidkernels.training.losses import wide

# Files of torchvision's hub cache, by lpips' name of the backbone.
BACKBONES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}
# IMAGENET1K_V1: the plain recipe that MAGVIT's own network had; the later weights have other logits.
RESNET50 = "resnet50-0676ba61.pth"
IMAGENET_MEAN, IMAGENET_STD, IMAGENET_SIDE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224


def _weights(path: str | Path | None, cached: str, weight: str) -> tuple[dict[str, Tensor], Path]:
    """Tensors of a file or of torch's hub cache; `weight` is the setting that turns the loss off."""
    file = Path(path) if path is not None else Path(torch.hub.get_dir()) / "checkpoints" / cached
    if not file.is_file():
        remedy = f"Put torchvision's {cached} there, or set {weight} to 0."
        raise OptionError("perceptual weights", "the backbone's file", f"none at {file}", remedy)
    return read_tensors(file), file


def _above_zero(error: Exception) -> str:
    return f"above 0 ({' '.join(str(error).split())[:100]})"


class LPIPS(nn.Module):
    """Mean LPIPS distance of the frames of two videos in -1..1; its parameters are frozen and it is always in eval mode.

    Args:
        net: "vgg" (training), "alex" (evaluation) or "squeeze".
        weights: torchvision's state dict of the backbone; default: its place in torch's hub cache.

    Raises:
        OptionError: the package or the weights are missing.
    """

    def __init__(self, net: str = "vgg", weights: str | Path | None = None) -> None:
        super().__init__()
        check_option("net", net, tuple(BACKBONES))
        try:
            import lpips
        except (ImportError, RuntimeError) as error:  # RuntimeError: its torchvision was built for another torch
            raise OptionError(
                "perceptual_weight", "0 without the lpips package", _above_zero(error), "pip install lpips"
            ) from error
        state, _ = _weights(weights, BACKBONES[net], "perceptual_weight")
        # pnet_rand: no download; the slices keep torchvision's layer numbers, so its state dict fills them by name.
        self.distance: Any = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        own = self.distance.net.state_dict()
        features = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
        filled = {key: features.get(key.split(".", 1)[1]) for key in own}
        missing = [key for key, value in filled.items() if value is None or value.shape != own[key].shape]
        if missing:
            raise OptionError("perceptual weights", f"torchvision's weights of {net}", f"no tensor for {missing[:3]}")
        self.distance.net.load_state_dict(filled)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, video: Tensor, reconstruction: Tensor) -> Tensor:
        """Scalar: mean over the frames of [B, 3, T, H, W]."""
        check_ndim("video", video, 5)
        x, y = (v.movedim(2, 1).flatten(0, 1) for v in (video, reconstruction))
        return self.distance(x, y).float().mean()


def resnet50(weights: str | Path | None = None) -> nn.Module:
    """torchvision's ResNet-50 with ImageNet's weights: images [N, 3, H, W], normalized, to logits [N, 1000].

    Args:
        weights: torchvision's state dict of it; default: IMAGENET1K_V1's place in torch's hub cache.

    Raises:
        OptionError: torchvision or the file is missing. ShapeError: the file is of another network; names the first keys.
    """
    try:
        from torchvision.models import resnet50 as build
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        remedy = "pip install torchvision, in the version that fits torch."
        raise OptionError("logit_loss", "0 without torchvision", _above_zero(error), remedy) from error
    state, file = _weights(weights, RESNET50, "logit_loss")
    network = build(weights=None)

    def used(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # old files lack the batch norms' step counters, which nothing reads in eval mode
        return {key: value for key, value in tensors.items() if not key.endswith(".num_batches_tracked")}

    check_keys(used(network.state_dict()), used(state), str(file), "torchvision's resnet50")
    network.load_state_dict(state, strict=False)
    return network


class LogitLoss(nn.Module):
    """mean (f(x) - f(y))^2 of a classifier's logits f, over the frames of two videos in -1..1 (MAGVIT, arXiv 2212.05199).

    Frames are resized to 224 x 224 (bilinear, antialiased) and normalized with ImageNet's mean and deviation. The network is
    frozen and always in eval mode; gradients flow through it to the videos. MAGVIT's own network was not published.

    Args:
        network: [N, 3, 224, 224] to logits [N, K]; default: `resnet50()`.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = resnet50() if network is None else network
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LogitLoss:
        """Stays in eval mode."""
        return super().train(False)

    def logits(self, video: Tensor) -> Tensor:
        """Logits [B * T, K] of the frames of [B, 3, T, H, W]."""
        frames = video.to(self.mean.dtype).movedim(2, 1).flatten(0, 1)
        size = (IMAGENET_SIDE, IMAGENET_SIDE)
        frames = F.interpolate((frames + 1) / 2, size, mode="bilinear", antialias=True)
        return wide(self.network((frames - self.mean) / self.deviation))

    def forward(self, video: Tensor, reconstruction: Tensor) -> Tensor:
        """Scalar."""
        for name, clip in (("video", video), ("reconstruction", reconstruction)):
            check_floating(name, clip)
            check_ndim(name, clip, 5)
            check_size(name, clip, 1, 3)
        if video.shape != reconstruction.shape:
            raise ShapeError("reconstruction", f"the video's shape {tuple(video.shape)}", tuple(reconstruction.shape))
        return (self.logits(video) - self.logits(reconstruction)).square().mean()
