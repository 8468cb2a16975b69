# SPDX-License-Identifier: Apache-2.0
"""Weights of generate's models: the bits of a model made first and loaded then, and nothing drawn or allocated for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidkernels import _pipeline
from vidkernels._pipeline import KINDS, Pipeline, PipelineConfig, Request, build
from vidkernels._pipeline_sample import sample
from vidkernels.errors import OptionError, ShapeError

GOKU = {"depth": 2, "hidden_size": 32, "num_heads": 2, "in_channels": 4, "text_channels": None, "num_classes": 3}
LATTE = {"depth": 2, "hidden_size": 16, "num_heads": 2, "input_size": 4, "num_frames": 2, "num_classes": 3}
STDIT3 = {"depth": 1, "hidden_size": 16, "num_heads": 2, "caption_channels": 8, "model_max_length": 4}
LATTE_T2V = {
    "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "cross_attention_dim": 16, "caption_channels": 8,
    "sample_size": 4, "video_length": 2, "out_channels": 8,
}  # fmt: skip
CONFIGS = {"goku": GOKU, "latte": LATTE, "stdit3": STDIT3, "latte_t2v": LATTE_T2V}
LABELLED = ("goku", "latte")


def config_of(kind: str) -> PipelineConfig:
    return PipelineConfig(kind, CONFIGS[kind], size=(2, 4, 4))


def state_of(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights, none of them as a model starts."""
    state = build(config_of(kind), None, 1, "cpu", torch.float32).model.state_dict()
    generator = torch.Generator().manual_seed(2)
    noise = {key: torch.randn(value.shape, generator=generator, dtype=torch.float64) for key, value in state.items()}
    return {key: (value + 0.02 * noise[key]).to(dtype) for key, value in state.items()}


def loaded_after(kind: str, state: dict[str, Tensor], dtype: torch.dtype) -> Pipeline:
    """A model that is made with values, and given those of the file then."""
    model = KINDS[kind].from_config(CONFIGS[kind])
    model.load_state_dict(state)
    config = PipelineConfig(kind, asdict(model.config), size=(2, 4, 4))
    return Pipeline(config, model.eval().requires_grad_(False).to("cpu", dtype))


def saved(state: dict[str, Any], folder: Path, ending: str) -> Path:
    path = folder / f"weights{ending}"
    if ending == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, str(path))
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_have_the_bits_of_a_copy(
    kind: str, stored: torch.dtype, dtype: torch.dtype, ending: str, tmp_path: Path
) -> None:
    state = state_of(kind, stored)
    expected = loaded_after(kind, state, dtype)
    found = build(config_of(kind), saved(state, tmp_path, ending), None, "cpu", dtype)
    assert found.config == expected.config and not found.model.training
    for tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
        pairs = dict(tensors(expected.model)), dict(tensors(found.model))
        assert list(pairs[0]) == list(pairs[1])
        for key, value in pairs[0].items():
            other = pairs[1][key]
            assert type(other) is type(value) and other.dtype == value.dtype and torch.equal(other, value), key
            assert other.stride() == value.stride() and not other.requires_grad, key
    if stored == torch.float32:
        states = {"label": 1} if kind in LABELLED else {"text": torch.randn(3, 8), "null_text": torch.randn(2, 8)}
        request = Request((2, 4, 4), **states, steps=2, seed=3)
        assert torch.equal(sample(found, request), sample(expected, request))


@pytest.mark.parametrize("kind", CONFIGS)
def test_nothing_is_drawn_nor_allocated_for_weights_of_a_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(state_of(kind), tmp_path, ".pt")
    made: list[bool] = []
    build_one: Callable[..., nn.Module] = KINDS[kind].from_config

    class Spy:
        @staticmethod
        def from_config(config: Any) -> nn.Module:
            model = build_one(config)
            made.extend(value.is_meta for value in model.state_dict().values())
            return model

    monkeypatch.setitem(_pipeline.KINDS, kind, Spy)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    build(config_of(kind), path, None, "cpu", torch.float32)
    assert made and all(made)
    assert torch.equal(torch.get_rng_state(), before)
    made.clear()
    build(config_of(kind), None, 0, "cpu", torch.float32)
    assert not any(made) and not torch.equal(torch.get_rng_state(), before)


def test_tensors_of_a_file_that_share_memory_are_apart_in_the_model(tmp_path: Path) -> None:
    """Views of one tensor, one tensor under two names, transposed ones and parameters."""
    state = state_of("goku")
    twins = [key for key in state if key.endswith("q_proj.weight")][:2]
    whole = torch.stack([state[key] for key in twins])
    shared = {**state, twins[0]: whole[0], twins[1]: whole[0]}
    turned = next(key for key in state if key.endswith("o_proj.weight"))
    shared[turned] = state[turned].t().contiguous().t()
    last = next(key for key in state if key.endswith("v_proj.weight"))
    shared[last] = nn.Parameter(state[last])
    model = build(config_of("goku"), saved(shared, tmp_path, ".pt"), None, "cpu", torch.float32).model
    found = dict(model.named_parameters())
    addresses = [value.untyped_storage().data_ptr() for value in found.values()]
    assert len(set(addresses)) == len(addresses)
    for key, value in found.items():
        assert torch.equal(value, shared[key]) and value.is_contiguous() and not value.requires_grad
        assert value.untyped_storage().nbytes() == value.nbytes


@pytest.mark.parametrize("kind", CONFIGS)
def test_damaged_files_are_refused_with_the_name_of_the_key(kind: str, tmp_path: Path) -> None:
    state = state_of(kind)
    key = next(key for key, value in state.items() if value.ndim == 2)
    short = {name: value for name, value in state.items() if name != key}
    cases: list[tuple[dict[str, Tensor], type[Exception]]] = [
        (short, ShapeError),
        ({**short, key: state[key][:-1]}, ShapeError),
        ({**short, key: state[key].to(torch.int8)}, OptionError),
    ]
    for damaged, error in cases:
        path = saved({name: value.clone() for name, value in damaged.items()}, tmp_path, ".pt")
        with pytest.raises(error, match=rf"^--weights: expected .*{key}"):
            build(config_of(kind), path, None, "cpu", torch.float32)
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:length])
        with pytest.raises(OptionError, match="expected a file of tensors"):
            build(config_of(kind), path, None, "cpu", torch.float32)
