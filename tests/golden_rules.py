# SPDX-License-Identifier: Apache-2.0
"""Parameters and inputs of the golden files, rebuilt from tests/golden/vidtok/RULE.md: no weights are stored."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch

VIDTOK = Path(__file__).resolve().parent / "golden" / "vidtok"


def uniform(name: str, count: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1) that belong to a name."""
    key = int.from_bytes(hashlib.sha256(f"vidtok-golden-v1:{name}".encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def vidtok_parameter(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Section 2 of the rule: the value of one parameter."""
    r = ((uniform(name, math.prod(shape)) - 0.5) * math.sqrt(12)).reshape(shape)
    if name.endswith("mix_factor"):
        value = r
    elif name.endswith(".norm.weight"):
        value = 1 + 0.1 * r
    elif name.endswith(".norm.bias"):
        value = 0.05 * r
    elif name.endswith(".weight"):
        gain = 3.0 if ".conv_in." in name else 2.0 if name.startswith("encoder.conv_out.") else 1.0
        value = r * (gain / math.sqrt(math.prod(shape[1:])))
        if len(shape) in (3, 5) and shape[2] == 3:
            taps = np.array([0.4, 0.7, 1.3])
            value = value * taps.reshape((1, 1, 3) + (1,) * (len(shape) - 3))
    else:
        value = 0.02 * r
    return torch.from_numpy(value.astype(np.float32))


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Give a model the golden parameters, by the names in its state_dict."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(vidtok_parameter(name, tuple(parameter.shape)))
    return model.eval()


def vidtok_clip() -> torch.Tensor:
    """Section 3: the input clip [1, 3, 18, 64, 64]."""
    return torch.from_numpy(np.load(VIDTOK / "input.npz")["clip"])


def vidtok_manifest() -> dict[str, dict[str, list[int]]]:
    """Keys and shapes of the 23 published checkpoints."""
    return json.loads(gzip.decompress((VIDTOK / "manifest.json.gz").read_bytes()))


def golden(file: str) -> dict[str, torch.Tensor]:
    """All arrays of one golden file."""
    return {key: torch.from_numpy(value) for key, value in np.load(VIDTOK / file).items()}


LATTE = Path(__file__).resolve().parent / "golden" / "latte_adacache"


def draw(name: str, *shape: int) -> torch.Tensor:
    """Standard normal float32 input of a name, by tests/golden/latte_adacache/RULE.md."""
    return torch.from_numpy(_normal(name, shape).astype(np.float32))


def _normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(size=shape)


def fill_transformer(
    model: torch.nn.Module, keep: tuple[str, ...] = ("pos_embed", "temp_embed", "rope.freqs")
) -> torch.nn.Module:
    """Give every state_dict entry its golden value, except the fixed tables."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name in keep:
                continue
            shape = tuple(value.shape)
            n = _normal(name, shape)
            if len(shape) == 1:
                filled = 0.1 * n if name.endswith(".bias") else 1 + 0.1 * n
            else:
                filled = n / math.sqrt(math.prod(shape[1:]))
            value.copy_(torch.from_numpy(filled.astype(np.float32)))
    return model.eval()


def latte_golden(file: str) -> dict[str, torch.Tensor]:
    """All arrays of one golden file of the transformers."""
    return {key: torch.from_numpy(value) for key, value in np.load(LATTE / file).items()}


def manifest(file: str) -> dict:
    """A key manifest, e.g. `stdit3.json.gz`."""
    return json.loads(gzip.decompress((LATTE / file).read_bytes()))
