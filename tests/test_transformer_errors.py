# SPDX-License-Identifier: Apache-2.0
"""Transformers refuse configurations and arguments that do not fit, by name, before they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from vidkernels import packing
from vidkernels.errors import VidkernelsError
from vidkernels.models.transformers import Goku, Latte, LatteT2V, STDiT3, STDiT3Config

SMALL: dict[type[nn.Module], dict[str, Any]] = {
    Latte: {"depth": 2, "hidden_size": 16, "num_heads": 2, "input_size": 4, "num_frames": 2, "num_classes": 3},
    LatteT2V: {
        "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "cross_attention_dim": 16, "sample_size": 4,
        "caption_channels": 6, "video_length": 2,
    },
    STDiT3: {"depth": 1, "hidden_size": 16, "num_heads": 2, "caption_channels": 6, "model_max_length": 5},
    Goku: {"depth": 1, "hidden_size": 16, "num_heads": 2, "in_channels": 4, "text_channels": 6},
}  # fmt: skip


def given(kind: type[nn.Module]) -> dict[str, Any]:
    if kind is Latte:
        return {"x": torch.randn(2, 2, 4, 4, 4), "t": torch.tensor([3, 4]), "y": torch.tensor([1, 3])}
    if kind is LatteT2V:
        caption = torch.randn(2, 5, 6)
        return {
            "hidden_states": torch.randn(2, 4, 2, 4, 4),
            "timestep": torch.tensor([3, 4]),
            "encoder_hidden_states": caption,
        }
    if kind is STDiT3:
        sizes = {name: torch.tensor([64.0]) for name in ("fps", "height", "width")}
        x, y = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 1, 5, 6)
        return {"x": x, "timestep": torch.tensor([3.0, 4.0]), "y": y, "mask": torch.ones(2, 5), **sizes}
    packed = packing.pack([torch.randn(4, 2, 4, 4), torch.randn(4, 1, 4, 6)], (1, 2, 2))
    text = packing.pack_text([torch.randn(3, 6), torch.randn(2, 6)])
    return {
        "tokens": packed.tokens, "t": torch.tensor([0.2, 0.7]), "cu_seqlens": packed.cu_seqlens, "max_seqlen": packed.max_seqlen,
        "positions": packed.positions, "text": text.tokens, "text_cu_seqlens": text.cu_seqlens, "text_max_seqlen": 3,
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(SMALL))
def test_what_fits_is_taken(kind: Any) -> None:
    assert torch.isfinite(kind.from_config(SMALL[kind]).eval()(**given(kind))).all()


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        (Latte, {"colour": 1}, "config: expected keys among"),
        (Latte, {"depth": 0}, "depth: expected a whole number of at least 1, got 0"),
        (Latte, {"num_heads": 3}, "hidden_size: expected a multiple of num_heads=3, got 16"),
        (Latte, {"hidden_size": 18, "num_heads": 3}, "hidden_size: expected a multiple of 4"),
        (Latte, {"num_frames": 2.0}, "num_frames: expected a whole number"),
        (Latte, {"num_classes": -1}, "num_classes: expected a whole number of at least 1, got -1"),
        (Latte, {"class_dropout_prob": 2.0}, "class_dropout_prob: expected a share from 0 to 1"),
        (Latte, {"mlp_ratio": float("nan")}, "mlp_ratio: expected a positive number, got nan"),
        (LatteT2V, {"cross_attention_dim": 24}, "cross_attention_dim: expected num_attention_heads"),
        (LatteT2V, {"num_layers": 0}, "num_layers: expected a whole number"),
        (STDiT3, {"num_heads": 16}, "hidden_size: expected an even width for each of num_heads=16"),
        (STDiT3, {"patch_size": [1, 2]}, "patch_size: expected three sides"),
        (STDiT3, {"skip_y_embedder": True}, "skip_y_embedder: expected False, got True"),
        (STDiT3, {"drop_path": 0.1}, "drop_path: expected 0.0"),
        (Goku, {"colour": 1}, "config: expected keys among"),
        (Goku, {"axes": [2, 2]}, "axes: expected three even numbers"),
        (STDiT3, {"input_sq_size": 0}, "input_sq_size: expected a positive number"),
        (Goku, {"axes": 4}, "axes: expected three even numbers"),
        (Goku, {"axes": [-2, 4, 4]}, "axes: expected three even numbers"),
        (Goku, {"theta": "10000"}, "theta: expected a positive number, got '10000'"),
        (Goku, {"text_channels": 0}, "text_channels: expected a whole number of at least 1"),
        (Goku, {"patch_size": [0, 2, 2]}, "patch_size: expected three sides"),
    ],
)
def test_configurations(kind: Any, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(VidkernelsError, match=text):
        kind.from_config({**SMALL[kind], **changes})


def test_changes_to_a_name_are_checked_too() -> None:
    for kind, name in ((Latte, "Latte-S/2"), (Goku, "goku-2b")):
        with pytest.raises(VidkernelsError, match="config: expected keys among"):
            kind.from_config(name, colour=1)


def test_the_published_configuration_file_of_stdit3_is_read() -> None:
    published = {
        "_name_or_path": "", "architectures": ["STDiT3"], "auto_map": {}, "caption_channels": 4096, "class_dropout_prob": 0.1,
        "depth": 28, "drop_path": 0.0, "enable_flash_attn": True, "enable_layernorm_kernel": True,
        "enable_sequence_parallelism": False, "freeze_y_embedder": True, "hidden_size": 1152, "in_channels": 4,
        "input_size": [None, None, None], "input_sq_size": 512, "mlp_ratio": 4.0, "model_max_length": 300, "model_type": "STDiT3",
        "num_heads": 16, "only_train_temporal": False, "patch_size": [1, 2, 2], "pred_sigma": True, "qk_norm": True,
        "skip_y_embedder": False, "torch_dtype": "float32", "transformers_version": "4.36.2",
    }  # fmt: skip
    assert STDiT3Config.from_dict(published) == STDiT3Config()


CASES: list[tuple[Any, Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    (Latte, lambda a: {"y": a["y"][:1]}, "y: expected shape"),
    (Latte, lambda a: {"y": a["y"].float()}, "y: expected int64 or int32 labels"),
    (Latte, lambda a: {"y": torch.tensor([0, 4])}, "y: expected labels 0 to 3, got 0 to 4"),
    (Latte, lambda a: {"use_image_num": -1}, "use_image_num: expected at least 0"),
    (LatteT2V, lambda a: {"timestep": 3}, "timestep: expected a tensor"),
    (LatteT2V, lambda a: {"timestep": torch.zeros(3)}, "timestep: expected a tensor"),
    (LatteT2V, lambda a: {"encoder_attention_mask": torch.ones(2, 4)}, "encoder_attention_mask: expected size 5"),
    (LatteT2V, lambda a: {"encoder_attention_mask": torch.ones(3, 5)}, "encoder_attention_mask: expected size 2"),
    (LatteT2V, lambda a: {"encoder_attention_mask": torch.ones(4, 2, 5)}, "encoder_attention_mask: expected shape"),
    (STDiT3, lambda a: {"y": torch.randn(2, 1, 5, 7)}, "y: expected shape"),
    (STDiT3, lambda a: {"mask": torch.ones(0, 5)}, "mask: expected"),
    (STDiT3, lambda a: {"fps": 24.0}, "fps: expected a tensor"),
    (STDiT3, lambda a: {"x": a["x"][:, :, :0]}, "x: expected"),
    (Goku, lambda a: {"t": torch.tensor(0.5)}, "t: expected 1 dimensions"),
    (Goku, lambda a: {"tokens": a["tokens"].long()}, "tokens: expected float32"),
    (Goku, lambda a: {"max_seqlen": 7}, "max_seqlen: expected at least 8, the longest segment, got 7"),
    (Goku, lambda a: {"text_max_seqlen": 2}, "text_max_seqlen: expected at least 3"),
]


@pytest.mark.parametrize(("kind", "change", "text"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_arguments(kind: Any, change: Callable[[dict[str, Any]], dict[str, Any]], text: str) -> None:
    model, arguments = kind.from_config(SMALL[kind]).eval(), given(kind)
    with pytest.raises(VidkernelsError, match=text):
        model(**{**arguments, **change(arguments)})


def test_text_states_of_another_encoder_are_named() -> None:
    latte = Latte.from_config({**SMALL[Latte], "num_classes": None, "text": True}).eval()
    x, t = torch.randn(2, 2, 4, 4, 4), torch.tensor([1, 2])
    assert torch.isfinite(latte(x, t, text_embedding=torch.randn(2, 77, 768))).all()
    for wrong in (torch.randn(2, 3, 77, 768), torch.randn(2, 77, 512), torch.randn(1, 77, 768)):
        with pytest.raises(VidkernelsError, match="text_embedding: expected"):
            latte(x, t, text_embedding=wrong)


def test_guidance_needs_both_halves_and_classes_take_no_text() -> None:
    latte = Latte.from_config(SMALL[Latte]).eval()
    x, t, y = torch.randn(3, 2, 4, 4, 4), torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3])
    with pytest.raises(VidkernelsError, match="x: expected an even batch"):
        latte.forward_with_cfg(x, t, y, 7.0)
    goku = Goku.from_config({**SMALL[Goku], "text_channels": None, "num_classes": 2}).eval()
    with pytest.raises(VidkernelsError, match="text: expected None"):
        goku(**given(Goku), labels=torch.tensor([0, 2]))
    without = {key: value for key, value in given(Goku).items() if "text" not in key}
    with pytest.raises(VidkernelsError, match="labels: expected labels 0 to 2, got 0 to 3"):
        goku(**without, labels=torch.tensor([0, 3]))
