# SPDX-License-Identifier: Apache-2.0
"""Small transformers of every kind with nothing left at zero, and arguments for them."""

from __future__ import annotations

from typing import Any

import torch
from golden_rules import fill_transformer, manifest
from torch import Tensor, nn

from vidkernels import packing
from vidkernels.models.transformers import Goku, Latte, LatteT2V, STDiT3

ODD = {"depth": 3, "hidden_size": 24, "num_heads": 2, "input_size": 6, "num_frames": 3}


def filled(model: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    """Nothing is left at zero, so that every part counts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.2)
    return model.to(dtype).eval()


def stdit3(dtype: torch.dtype = torch.float64) -> STDiT3:
    return fill_transformer(STDiT3.from_config(manifest("stdit3.json.gz")["_tiny_config"])).to(dtype).eval()


def pixels(height: float, width: float, fps: float = 24.0) -> dict[str, Tensor]:
    return {"fps": torch.tensor([fps]), "height": torch.tensor([height]), "width": torch.tensor([width])}


GOKU = {"depth": 2, "hidden_size": 64, "num_heads": 2, "in_channels": 4, "axes": (8, 12, 12)}
# (T, H, W) of latents: an image, a clip of one token, odd grids, a long clip.
SIZES = ((1, 6, 4), (1, 2, 2), (3, 2, 6), (5, 6, 2), (2, 4, 4))


def goku_inputs(sizes: tuple, prompts: tuple[int, ...] | None, image: bool, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(len(sizes))
    packed = packing.pack([torch.randn(4, *size, generator=generator, dtype=dtype) for size in sizes])
    inputs: dict[str, Any] = {
        "tokens": packed.tokens,
        "t": torch.linspace(0, 1, len(sizes), dtype=dtype),
        "cu_seqlens": packed.cu_seqlens,
        "max_seqlen": packed.max_seqlen,
        "positions": packed.positions,
    }
    if prompts is not None:
        text = packing.pack_text([torch.randn(n, 24, generator=generator, dtype=dtype) for n in prompts])
        inputs |= {"text": text.tokens, "text_cu_seqlens": text.cu_seqlens, "text_max_seqlen": text.max_seqlen}
    else:
        inputs["labels"] = torch.arange(len(sizes)) % 4
    if image:
        inputs["condition"] = torch.randn(packed.tokens.shape, generator=generator, dtype=dtype)
    return inputs


def segment(inputs: dict[str, Any], i: int) -> dict[str, Any]:
    """One sample of a pack, alone."""
    a, b = inputs["cu_seqlens"][i : i + 2].tolist()
    found = {**inputs, "t": inputs["t"][i : i + 1], "max_seqlen": b - a}
    found["cu_seqlens"] = torch.tensor([0, b - a], dtype=torch.int32)
    found |= {name: inputs[name][a:b] for name in ("tokens", "positions", "condition") if name in inputs}
    if "labels" in inputs:
        found["labels"] = inputs["labels"][i : i + 1]
    else:
        c, d = inputs["text_cu_seqlens"][i : i + 2].tolist()
        found |= {"text": inputs["text"][c:d], "text_max_seqlen": d - c}
        found["text_cu_seqlens"] = torch.tensor([0, d - c], dtype=torch.int32)
    return found


def every_model() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """A float32 model of each kind and its arguments."""
    torch.manual_seed(1)
    t = torch.tensor([3.0, 700.0])
    found: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    kinds = [{"variant": variant} for variant in (1, 2, 3, 4)] + [{"conditioning": "all_tokens"}]
    for changes in kinds:
        model = Latte.from_config({**ODD, "num_classes": 5, **changes})
        arguments = {"x": torch.randn(2, 5, 4, 6, 6), "t": t, "y": torch.tensor([1, 2]), "use_image_num": 2}
        found[f"latte {changes}"] = (
            filled(model, torch.float32),
            {**arguments, "y_image": torch.tensor([[1, 2], [3, 4]])},
        )
    text = filled(LatteT2V.from_config(manifest("latte_diffusers.json.gz")["_config_tiny"]), torch.float32)
    arguments = {
        "hidden_states": torch.randn(2, 4, 5, 8, 8),
        "timestep": t,
        "encoder_hidden_states": torch.randn(2, 7, 32),
    }
    found["latte t2v"] = text, {**arguments, "encoder_attention_mask": (torch.arange(7) < 5).float().expand(2, 7)}
    x_mask, mask = torch.ones(2, 5, dtype=torch.bool), (torch.arange(20) < 9).int()[None]
    x_mask[0, 0] = False
    arguments = {"x": torch.randn(2, 4, 5, 9, 12), "timestep": t, "y": torch.randn(2, 1, 20, 32), "mask": mask}
    found["stdit3"] = stdit3(torch.float32), {**arguments, "x_mask": x_mask, **pixels(72.0, 96.0)}
    goku = filled(Goku.from_config({**GOKU, "text_channels": 24, "image_condition": True}), torch.float32)
    found["goku"] = goku, goku_inputs(SIZES[:3], (1, 7, 2), True, torch.float32)
    return found


KINDS = ["latte {'variant': 1}", "latte {'variant': 2}", "latte {'variant': 3}", "latte {'variant': 4}",
         "latte {'conditioning': 'all_tokens'}", "latte t2v", "stdit3", "goku"]  # fmt: skip
