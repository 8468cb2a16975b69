# SPDX-License-Identifier: Apache-2.0
"""Rules for the official VAEs of Wan 2.1 (`vae.py`, `vae2_1.py`) and 2.2 (`vae2_2.py`) and copies of them, by digest.

What the forwards do is said in `_wan_units`; `_official_wan_units` gives them the official names. The autoencoder's own
calls differ between projects most: without its rule, as in streaming forks, networks and blocks are fused all the same.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _official_wan_units as official
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules import _wan_shortcuts as shortcuts
from vidkernels.patching.rules.diffusers_wan_vae import (
    clip_sample,
    down_sample,
    norm_sample,
    resample_check,
    resample_sample,
    widen,
)

Sample = tuple[tuple[Any, ...], dict[str, Any]]

_TESTED = ("Wan2.1 vae.py (f1f7c88)", "Wan2.2 vae2_1.py (84b91a8), vae2_2.py (bf69229)")
_CODE: dict[str, tuple[str, ...]] = {
    "CausalConv3d.__init__": ("cddb7ae49919732e",),
    "CausalConv3d.forward": ("01f7c335892ddd78",),
    "RMS_norm.__init__": ("17913286caba9a38",),
    "RMS_norm.forward": ("380f6c82270f8128",),
    "Upsample.forward": ("6c83557b0cc12256",),
    "Resample.__init__": ("6289e5149e8ca8d4", "2aff869a2630d932"),  # half the width, and in 2.2 all of it
    "Resample.forward": ("ded8b354d7dd6e0f",),
    "ResidualBlock.__init__": ("6078630f8f0c7922",),
    "ResidualBlock.forward": ("c10f1c9279a70d06",),
    "AttentionBlock.forward": ("d787398250dca3ad",),
    "Encoder3d.forward": ("d6cf46ec8072a68d",),
    "AvgDown3D.__init__": ("d6bda75e7aa1a1da",),
    "AvgDown3D.forward": ("093c658178239315",),
    "DupUp3D.__init__": ("a8f6a98cd9eb200e",),
    "DupUp3D.forward": ("16820f8a345bea52",),
    "Down_ResidualBlock.forward": ("03e66cd1a97d656f",),
    "Up_ResidualBlock.forward": ("31c65df725b6c54a",),
    "WanVAE_.clear_cache": ("d8637f9acbfb536a",),
    "patchify": ("bf0e89a0ab5d0040",),
    "unpatchify": ("5a45bfce2ecb838d",),
}
_PATHS = ("wan.modules.vae", "wan.modules.vae2_1", "wan.modules.vae2_2")


def _encoder_sample(module: Any) -> Sample:
    return (units.like_parameters(module, 1, module.conv1.in_channels, 1, 32, 32),), {}


def _plain_decoder_sample(module: Any) -> Sample:
    return (units.like_parameters(module, 1, module.conv1.in_channels, 1, 4, 4),), {}


def _decoder_sample(module: Any) -> Sample:
    # Blocks hear of the first chunk with a cache only, and without it their shortcuts repeat more frames than there are.
    convolutions = sum(isinstance(child, nn.Conv3d) for child in module.modules())
    stream = {"feat_cache": [None] * convolutions, "feat_idx": [0], "first_chunk": True}
    return _plain_decoder_sample(module)[0], stream


def _up_sample(module: Any) -> Sample:
    # Without a cache the frames stay, which only the first chunk's shortcut fits.
    return (units.like_parameters(module, 1, module.upsamples[0].in_dim, 1, 6, 6),), {"first_chunk": True}


def _autoencoder_sample(module: Any) -> Sample:
    return (units.like_parameters(module, 1, 3, 5, 32, 32),), {}


def _no_sample(module: Any) -> None:
    """2.1's own `WanVAE_.forward` calls `encode` without the scale that this needs."""


def _block_check(module: Any) -> str | None:
    return None if len(module.residual) == 7 else f"its residual branch has {len(module.residual)} layers"


def _rule(
    part: str, name: str, mixin: type, ops: str, parts: str, features: str, sample: Any, check: Any = None, **own: Any
) -> Rule:
    """A rule for class `name`; `parts`: classes and functions whose code is stood in for besides, `own`: digests of its
    methods where they are not those of all versions."""
    digests = {k: v for k, v in _CODE.items() if k.partition(".")[0] in (name, *parts.split())}
    return Rule(
        name=f"wan_vae.{part}",
        ops=tuple(ops.split()),
        targets=tuple(f"{path}:{name}" for path in _PATHS),
        mixin=mixin,
        digests={**digests, **{f"{name}.{method}": (value,) for method, value in own.items()}},
        features=tuple(features.split()),
        check=check,
        widen=widen,
        sample=sample,
        tested_versions=_TESTED,
    )


_CONV, _BOTH = "causal_conv3d", "causal_conv3d channel_norm"
_LAYERS, _ENDS = "CausalConv3d RMS_norm", "conv1 middle head.2"
_WHOLE = "encoder decoder conv1 conv2 z_dim"

RULES = (
    _rule(
        *("autoencoder", "WanVAE_", official.ScaledCalls, _CONV, "", _WHOLE, _no_sample),
        encode="e437410f884bb957", decode="4d8c2b94fbaa0b33",
    ),
    _rule(
        *("autoencoder_2_2", "WanVAE_", official.PatchedCalls, _CONV, "patchify unpatchify", _WHOLE, _autoencoder_sample),
        encode="0806047a9ad4f2a5", decode="6548d9f37345b957",
    ),
    _rule(
        *("autoencoder_moments", "WanVAE_", official.MomentsCalls, _CONV, "", _WHOLE, _autoencoder_sample),
        encode="2974bc8d82acfdc9", decode="102faa082d27d485",
    ),
    _rule("encoder", "Encoder3d", official.EncoderForward, _BOTH, _LAYERS, f"{_ENDS} downsamples", _encoder_sample),
    _rule(
        *("decoder", "Decoder3d", official.PlainDecoderForward, _BOTH, _LAYERS, f"{_ENDS} upsamples", _plain_decoder_sample),
        forward="8a9de6daa4e09316",
    ),
    _rule(
        *("decoder_2_2", "Decoder3d", official.DecoderForward, _BOTH, _LAYERS, f"{_ENDS} upsamples", _decoder_sample),
        forward="98d65450f7f25c19",
    ),
    _rule(
        *("down_block", "Down_ResidualBlock", official.DownBlockForward, _CONV, "AvgDown3D"),
        *("avg_shortcut downsamples", down_sample, shortcuts.shortcut_check),
    ),
    _rule(
        *("up_block", "Up_ResidualBlock", official.UpBlockForward, _CONV, "DupUp3D"),
        *("avg_shortcut upsamples", _up_sample, shortcuts.shortcut_check),
    ),
    _rule(
        *("resnet", "ResidualBlock", official.BlockForward, _BOTH, _LAYERS),
        *("residual shortcut in_dim", clip_sample, _block_check),
    ),
    _rule("attention", "AttentionBlock", official.AttentionForward, _BOTH, "RMS_norm", "norm to_qkv proj", clip_sample),
    _rule(
        *("resample", "Resample", official.ResampleForward, _CONV, "CausalConv3d Upsample"),
        *("resample mode dim", resample_sample, resample_check),
    ),
    _rule("conv", "CausalConv3d", official.ConvForward, _CONV, "", "_padding weight", clip_sample),
    _rule("norm", "RMS_norm", official.NormForward, "channel_norm", "", "gamma channel_first scale", norm_sample),
)  # fmt: skip
