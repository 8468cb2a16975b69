# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other implementations: their key names mapped to ours, wrong files refused by naming what differs.

A layout says which keys and shapes a foreign file must have. It is derived from our own model, so that a file is checked
key by key before anything is converted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vidkernels.errors import OptionError
from vidkernels.models.tokenizers._checkpoint import check_keys, read_tensors, unwrapped

if TYPE_CHECKING:
    from vidkernels.models.tokenizers.magvit2 import MAGVIT2

Source = str | Path | Mapping[str, Any]


def tensors_of(source: Source, entry: str = "state_dict") -> tuple[dict[str, Tensor], str]:
    """Tensors of a file or of a state dict, and how errors call it."""
    if isinstance(source, Mapping):
        inner = source.get(entry, source)
        return unwrapped(inner), "state_dict"
    return read_tensors(Path(source), (entry,)), str(source)


def averaged_tensors(
    tensors: Mapping[str, Tensor], keys: Mapping[str, Tensor], prefix: str, where: str
) -> dict[str, Tensor]:
    """Tensors with a Lightning-style average in place of each: it is stored under the key without its dots."""
    names = {key: prefix + key.replace(".", "") for key in keys}
    missing = [name for name in names.values() if name not in tensors]
    if missing:
        raise OptionError("averaged", f"False for a file without averages of all weights ({where})", f"no {missing[0]}")
    return {key: tensors[name] for key, name in names.items()}


def _open_magvit2_key(key: str, levels: int, blocks: int) -> str:
    """Open-MAGVIT2's name of one of our keys, but for the adaptive norms."""

    def level(match: re.Match[str]) -> str:
        return f"decoder.up.{levels - 1 - int(match[1])}."

    # A convolution keeps its kernel in `conv_1` there and in `conv` here.
    key = re.sub(r"\.conv\.(weight|bias)$", r".conv_1.\1", key)
    key = re.sub(r"^(encoder|decoder)\.mid\.", r"\1.mid_block.", key)
    key = re.sub(rf"^encoder\.stages\.(\d+)\.{blocks}\.conv\.", r"encoder.down.\1.downsample.", key)
    key = re.sub(r"^encoder\.stages\.(\d+)\.(\d+)\.", r"encoder.down.\1.block.\2.", key)
    key = re.sub(r"^decoder\.stages\.(\d+)\.", level, key)
    return key.replace(".blocks.", ".block.").replace(".upsample.conv_1.", ".upsample.conv1.conv_1.")


def open_magvit2_layout(model: MAGVIT2) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(our key -> their key, their key -> a tensor of the right shape), adaptive norms and absent biases apart.

    Their residual blocks and the encoder's first convolution have no bias; ours are zero then.
    """
    levels, blocks = len(model.config.channel_multipliers), model.config.residual_blocks
    names, expected = {}, {}
    for key, value in model.state_dict().items():
        if ".adaptive." in key:
            continue
        name = _open_magvit2_key(key, levels, blocks)
        if name.endswith("bias") and re.search(r"\.block\.\d+\.(conv|nin)|mid_block\.\d+\.conv|encoder\.conv_in", name):
            continue
        names[key], expected[name] = name, value
    for stage in range(levels):
        adaptive = model.decoder.get_submodule(f"stages.{stage}.adaptive.modulation")
        assert isinstance(adaptive, nn.Linear)
        width, latent = adaptive.out_features // 2, adaptive.in_features // 2
        for part in ("gamma", "beta"):
            name = f"decoder.adaptive.{levels - 1 - stage}.{part}"
            expected[f"{name}.weight"] = adaptive.weight[:width, :latent]
            expected[f"{name}.bias"] = adaptive.bias[:width]
    return names, expected


def load_open_magvit2(model: MAGVIT2, source: Source, averaged: bool) -> None:
    """See `MAGVIT2.from_open_magvit2`."""
    tensors, where = tensors_of(source)
    names, expected = open_magvit2_layout(model)
    own = {key: value for key, value in tensors.items() if key.startswith(("encoder.", "decoder."))}
    check_keys(expected, own, where, "Open-MAGVIT2's video tokenizer")
    if averaged:
        own = averaged_tensors(tensors, expected, "model_ema.", where)
        check_keys(expected, own, where, "Open-MAGVIT2's averages")
    state = {key: own[names[key]] if key in names else torch.zeros_like(v) for key, v in model.state_dict().items()}
    levels = len(model.config.channel_multipliers)
    for stage in range(levels):
        theirs = f"decoder.adaptive.{levels - 1 - stage}"
        ours = f"decoder.stages.{stage}.adaptive.modulation"
        gamma, beta = own[f"{theirs}.gamma.weight"], own[f"{theirs}.beta.weight"]
        # Rows of our input: means, then deviations. Their scale is gamma(deviation), ours 1 + scale; the shift is beta(mean).
        zero = torch.zeros_like(gamma)
        state[f"{ours}.weight"] = torch.cat([torch.cat([zero, gamma], 1), torch.cat([beta, zero], 1)])
        state[f"{ours}.bias"] = torch.cat([own[f"{theirs}.gamma.bias"] - 1, own[f"{theirs}.beta.bias"]])
    model.load_state_dict(state)
