# SPDX-License-Identifier: Apache-2.0
"""Plain attributes and children that somebody changes on a patched model: the result is that of an unpatched model changed
alike, by the original code where kernels do not serve the change."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import test_patching_dit
import test_patching_flux
import test_patching_hunyuan_video
import test_patching_image_vae
import test_patching_ltx2
import test_patching_vidtok
import test_patching_wan
import torch
import vae_cases as cases
from torch import nn

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning

diffusers = pytest.importorskip("diffusers", minversion="0.42")
_WAN_DOWN = "encoder.down_blocks.1.resample"
# A small model, a module of it, an attribute and its new value.
CHANGES: list[tuple[str, str, str, Any]] = [
    ("wan2.1", "encoder.down_blocks.0.norm1", "scale", 3.0),
    ("wan2.1", "decoder.norm_out", "bias", 0.5),
    ("wan2.1", "encoder.conv_in", "padding", (0, 1, 1)),
    ("wan2.1", "encoder.conv_out", "padding_mode", "replicate"),
    ("wan2.1", "encoder.conv_out", "stride", (1, 2, 1)),
    ("wan2.1", "encoder.conv_in", "_padding", (1, 1, 1, 1, 2, 2)),
    ("wan2.1", f"{_WAN_DOWN}.0", "value", 1.0),
    ("wan2.1", f"{_WAN_DOWN}.0", "padding", (1, 0, 1, 0)),
    ("wan2.1", f"{_WAN_DOWN}.1", "padding", (0, 1)),
    ("qwenimage", "decoder.norm_out", "scale", 2.0),
    ("cogvideox", "encoder.conv_in.conv", "padding", (1, 1, 1)),
    ("cogvideox", "encoder.down_blocks.0.downsamplers.0.conv", "padding", (0, 2)),
    ("hunyuan", "encoder.conv_in", "time_causal_padding", (1, 1, 1, 1, 2, 1)),
    ("hunyuan", "encoder.conv_in.conv", "padding", (1, 0, 0)),
    ("ltx", "encoder.conv_in.conv", "padding", (1, 1, 1)),
    ("magvit", "encoder.conv_in", "padding_mode", "replicate"),
    ("cosmos", "encoder.conv_in.conv_s", "padding", (1, 0, 0)),
    ("cosmos", "encoder.down_blocks.0.downsamplers.0.conv1", "pad_mode", "replicate"),
    ("cosmos", "encoder.down_blocks.0.downsamplers.0.conv1", "spatial_pad", (1, 0, 0, 0)),
]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VidkernelsFallbackWarning)
        yield


def both(model: Any) -> tuple[Any, Any]:
    """An unpatched copy and the patched model."""
    original = copy.deepcopy(model)
    vidkernels.patch(model)
    return original, model


def through(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        z = cases.latents(model, x)
        return torch.cat([z.flatten(), cases.decode(model, z).flatten()])


@pytest.mark.parametrize(("name", "path", "attribute", "value"), CHANGES)
def test_attributes_of_a_vae(name: str, path: str, attribute: str, value: Any) -> None:
    torch.manual_seed(0)
    x = cases.clip(name, cases.VAES[name].frames[1])
    models = both(cases.build(name))
    before = through(models[1], x)
    for model in models:
        setattr(model.get_submodule(path), attribute, value)
    expected, actual = (through(model, x) for model in models)
    # upstream's downsampler pads by zeros itself, whatever its convolution's mode
    changed = attribute != "pad_mode"
    assert not changed or expected.shape != before.shape or not torch.allclose(expected, before, atol=1e-3)
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "suite",
    [
        test_patching_dit.TestDiT,
        test_patching_flux.TestFlux,
        test_patching_hunyuan_video.TestHunyuanVideo,
        test_patching_ltx2.TestLTX2,
        test_patching_wan.TestWan,
    ],
)
def test_another_feed_forward(suite: Any) -> None:
    """A layer of one's own in the place of a block's MLP, without its `net`, is called."""
    model, arguments = suite().ready(), suite().inputs()
    models = both(model)
    for changed in models:
        for module in list(changed.modules()):
            for name, child in module.named_children():
                if type(child).__name__ == "FeedForward":
                    setattr(module, name, nn.Tanh())
    with torch.no_grad():
        expected, actual = (torch.cat([y.flatten() for y in model(**arguments).to_tuple()]) for model in models)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_exact_gelu_beside_attention() -> None:
    """torch's exact GELU ignores the strides of its `out` on a CPU."""
    models, arguments = (
        both(test_patching_hunyuan_video.TestHunyuanVideo().ready()),
        test_patching_hunyuan_video.TestHunyuanVideo().inputs(),
    )
    for model in models:
        for block in model.single_transformer_blocks:
            block.act_mlp.approximate = "none"
    with torch.no_grad():
        expected, actual = (model(**arguments).sample for model in models)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_other_layers_in_vaes() -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    models = both(diffusers.AutoencoderKL(**blocks, block_out_channels=(16, 32), norm_num_groups=4).eval())
    x = torch.randn(2, 3, 16, 16)
    for model in models:
        model.encoder.mid_block = nn.Tanh()
    with torch.no_grad():
        expected, actual = (model.encode(x).latent_dist.mode() for model in models)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    models, clip = both(cases.build("wan2.1")), cases.clip("wan2.1", 5)
    for model in models:
        model.decoder.norm_out = nn.Tanh()
    torch.testing.assert_close(through(models[1], clip), through(models[0], clip), atol=3e-5, rtol=1e-4)


def test_a_scripted_layer_of_a_vae() -> None:
    """Its class has no `forward`, by which the networks look whether they may write over their blocks' inputs."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    models = both(diffusers.AutoencoderKL(**blocks, block_out_channels=(16, 32), norm_num_groups=4).eval())
    for model in models:
        model.decoder.mid_block.resnets[0].norm1 = torch.jit.script(model.decoder.mid_block.resnets[0].norm1)
    z = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected, actual = (model.decode(z).sample for model in models)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


class Wrapper(nn.Module):
    """Around a module, without its attributes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    ("build", "shape", "path"),
    [
        (lambda: cases.build("cogvideox"), (1, 4, 2, 4, 4), "decoder.mid_block.resnets.0.norm2.conv_y.conv"),
        (test_patching_vidtok.build, (1, 4, 2, 4, 4), "decoder.up_temporal.2.upsample"),
        (lambda: test_patching_image_vae.build("temporal"), (2, 4, 4, 4), "decoder.up_blocks.0.resnets.0"),
    ],
    ids=["convolution of cogvideox", "sampler of vidtok", "block of the temporal decoder"],
)
def test_a_wrapper_without_attributes(build: Any, shape: tuple[int, ...], path: str) -> None:
    """What is wrapped is called; nothing is asked of the wrapper."""
    models, z = both(build()), torch.randn(shape)
    for model in models:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Wrapper(model.get_submodule(path)))
    options = {"num_frames": 2} if z.ndim == 4 else {}
    with torch.no_grad():
        expected, actual = (model.decode(z, **options) for model in models)
    torch.testing.assert_close(
        getattr(actual, "sample", actual), getattr(expected, "sample", expected), atol=3e-5, rtol=1e-4
    )


def test_a_wrapper_around_the_first_convolution_of_wan() -> None:
    """Its width says how many chunks go through the encoder at once."""
    models = both(cases.build("wan2.1"))
    for model in models:
        model.encoder.conv_in = Wrapper(model.encoder.conv_in)
    with torch.no_grad():
        expected, actual = (cases.encode(model, torch.ones(1, 3, 5, 32, 32)) for model in models)
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-4)
