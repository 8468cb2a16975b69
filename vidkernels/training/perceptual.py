# SPDX-License-Identifier: Apache-2.0
"""LPIPS (arXiv 1801.03924) through the `lpips` package. Nothing is downloaded: the backbone's weights must be at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.errors import OptionError
from vidkernels.ops._checks import check_ndim, check_option

# Files of torchvision's hub cache, by lpips' name of the backbone.
BACKBONES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}


def _backbone_weights(net: str, path: str | Path | None) -> dict[str, Tensor]:
    file = Path(path) if path is not None else Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[net]
    if not file.is_file():
        remedy = f"Put torchvision's {BACKBONES[net]} there, or set perceptual_weight to 0."
        raise OptionError("perceptual weights", "the backbone's file", f"none at {file}", remedy)
    return torch.load(file, map_location="cpu", weights_only=True)


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
        except ImportError as error:
            raise OptionError(
                "perceptual_weight", "0 without the lpips package", "above 0", "pip install lpips"
            ) from error
        state = _backbone_weights(net, weights)
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
