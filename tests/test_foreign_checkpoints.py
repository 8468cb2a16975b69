# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of Open-MAGVIT2, magvit2-pytorch and taming-transformers: keys, values, and wrong files refused by name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_rules import uniform
from helpers import ROOT, assert_within_promise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.tokenizers import (
    MAGVIT,
    MAGVIT2,
    VQGAN,
    MAGVIT2Config,
    MAGVIT2Layers,
    MAGVIT2LayersConfig,
    MAGVITConfig,
    VQGANConfig,
)

WIDTHS, BLOCKS, BITS, BASE = (1, 2, 2), 2, 6, 32
SMALL = MAGVIT2Config(
    channels=BASE,
    channel_multipliers=WIDTHS,
    temporal_down=(False, True),
    residual_blocks=BLOCKS,
    bits=BITS,
    norm="group",
    dropped_frame=1,
)


def conv_shapes(name: str, cin: int, cout: int, k: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.conv_1.weight": (cout, cin, k, k, k), **({f"{name}.conv_1.bias": (cout,)} if bias else {})}


def block_shapes(name: str, cin: int, cout: int) -> dict[str, tuple[int, ...]]:
    found = {f"{name}.norm1.{p}": (cin,) for p in ("weight", "bias")}
    found |= {f"{name}.norm2.{p}": (cout,) for p in ("weight", "bias")}
    found |= conv_shapes(f"{name}.conv1", cin, cout, 3, False) | conv_shapes(f"{name}.conv2", cout, cout, 3, False)
    return found if cin == cout else found | conv_shapes(f"{name}.nin_shortcut", cin, cout, 1, False)


def open_magvit2_shapes(base: int, widths: tuple[int, ...], blocks: int, bits: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of Open-MAGVIT2's video encoder and decoder, from the structure of its published source."""
    last = base * widths[-1]
    found = conv_shapes("encoder.conv_in", 3, base, 3, False)
    width = base
    for i, multiplier in enumerate(widths):
        for j in range(blocks):
            found |= block_shapes(f"encoder.down.{i}.block.{j}", width, base * multiplier)
            width = base * multiplier
        if i + 1 < len(widths):
            found |= conv_shapes(f"encoder.down.{i}.downsample", width, width, 3, True)
    for side in ("encoder", "decoder"):
        for j in range(blocks):
            found |= block_shapes(f"{side}.mid_block.{j}", last, last)
    found |= {f"encoder.norm_out.{p}": (last,) for p in ("weight", "bias")}
    found |= conv_shapes("encoder.conv_out", last, bits, 1, True) | conv_shapes("decoder.conv_in", bits, last, 3, True)
    width = last
    for i in reversed(range(len(widths))):
        for part in ("gamma", "beta"):
            found |= {
                f"decoder.adaptive.{i}.{part}.weight": (width, bits),
                f"decoder.adaptive.{i}.{part}.bias": (width,),
            }
        for j in range(blocks):
            found |= block_shapes(f"decoder.up.{i}.block.{j}", width, base * widths[i])
            width = base * widths[i]
        if i:
            factor = 4 if widths[i - 1] == 1 else 8
            found |= conv_shapes(f"decoder.up.{i}.upsample.conv1", width, width * factor, 3, True)
    found |= {f"decoder.norm_out.{p}": (base,) for p in ("weight", "bias")}
    return found | conv_shapes("decoder.conv_out", base, 3, 3, True)


class Official:
    """Open-MAGVIT2's computation over its own key names, in plain PyTorch."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv(self, name: str, x: Tensor, stride: tuple[int, ...] = (1, 1, 1)) -> Tensor:
        weight, bias = self.state[f"{name}.conv_1.weight"], self.state.get(f"{name}.conv_1.bias")
        k = weight.shape[-1]
        return F.conv3d(F.pad(x, (k // 2,) * 4 + (k - 1, 0)), weight, bias, stride)

    def norm(self, name: str, x: Tensor) -> Tensor:
        x = F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)
        return x * torch.sigmoid(x)

    def block(self, name: str, x: Tensor) -> Tensor:
        y = self.conv(
            f"{name}.conv2", self.norm(f"{name}.norm2", self.conv(f"{name}.conv1", self.norm(f"{name}.norm1", x)))
        )
        return y + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.conv_1.weight" in self.state else x)

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", x)
        for i in range(len(WIDTHS)):
            for j in range(BLOCKS):
                x = self.block(f"encoder.down.{i}.block.{j}", x)
            if i + 1 < len(WIDTHS):
                x = self.conv(f"encoder.down.{i}.downsample", x, (1 if WIDTHS[i] == 1 else 2, 2, 2))
        for j in range(BLOCKS):
            x = self.block(f"encoder.mid_block.{j}", x)
        return self.conv("encoder.conv_out", self.norm("encoder.norm_out", x))

    def adaptive(self, i: int, x: Tensor, z: Tensor) -> Tensor:
        flat = z.flatten(2)
        scale, shift = (flat.var(-1) + 1e-6).sqrt(), flat.mean(-1)
        scale, shift = (
            F.linear(v, self.state[f"decoder.adaptive.{i}.{p}.weight"], self.state[f"decoder.adaptive.{i}.{p}.bias"])
            for v, p in ((scale, "gamma"), (shift, "beta"))
        )
        return scale[..., None, None, None] * F.group_norm(x, 32, eps=1e-6) + shift[..., None, None, None]

    def decode(self, z: Tensor) -> Tensor:
        x = self.conv("decoder.conv_in", z)
        for j in range(BLOCKS):
            x = self.block(f"decoder.mid_block.{j}", x)
        for i in reversed(range(len(WIDTHS))):
            x = self.adaptive(i, x, z)
            for j in range(BLOCKS):
                x = self.block(f"decoder.up.{i}.block.{j}", x)
            if i:
                t = 1 if WIDTHS[i - 1] == 1 else 2
                x = self.conv(f"decoder.up.{i}.upsample.conv1", x)
                b, c, f, h, w = x.shape
                x = x.reshape(b, t, 2, 2, c // (4 * t), f, h, w).permute(0, 4, 5, 1, 6, 2, 7, 3)
                x = x.reshape(b, c // (4 * t), f * t, 2 * h, 2 * w)
                x = torch.cat([x[:, :, :1], x[:, :, 2:]], 2) if t == 2 else x
        return self.conv("decoder.conv_out", self.norm("decoder.norm_out", x))


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {
        key: 0.3 * torch.randn(shape)
        if len(shape) == 1
        else torch.randn(shape) / (torch.Size(shape).numel() / shape[0]) ** 0.5
        for key, shape in shapes.items()
    }


@pytest.fixture
def state() -> dict[str, Tensor]:
    return random_state(open_magvit2_shapes(BASE, WIDTHS, BLOCKS, BITS))


@torch.inference_mode()
def test_open_magvit2_computes_what_its_own_names_say(state: dict[str, Tensor]) -> None:
    model = MAGVIT2.from_open_magvit2({**state, "loss.x": torch.zeros(1)}, SMALL, averaged=False).eval()
    assert not model.config.streams
    video, wide = torch.randn(1, 3, 5, 16, 16), Official({key: value.double() for key, value in state.items()})
    features = model.features(video)
    assert_within_promise(features, Official(state).encode(video), wide.encode(video.double()), "features")
    codes, tokens = model.encode(video)
    assert torch.equal(codes, torch.where(features > 0, 1.0, -1.0))
    bits = (codes > 0).long() * 2 ** torch.arange(BITS).view(1, -1, 1, 1, 1)
    assert torch.equal(tokens, bits.sum(1))
    assert_within_promise(model.decode(codes), Official(state).decode(codes), wide.decode(codes.double()), "video")


def test_published_size_has_the_published_number_of_weights() -> None:
    shapes = open_magvit2_shapes(128, (1, 2, 2, 4), 4, 18)
    count = {
        s: sum(torch.Size(v).numel() for k, v in shapes.items() if k.startswith(s)) for s in ("encoder", "decoder")
    }
    assert round(count["encoder"] / 1e6, 1) == 144.9 and round(count["decoder"] / 1e6, 1) == 225.7
    from vidkernels.models.tokenizers._foreign import open_magvit2_layout

    with torch.device("meta"):
        expected = open_magvit2_layout(MAGVIT2(MAGVIT2Config(norm="group", dropped_frame=1)))[1]
    assert {key: tuple(value.shape) for key, value in expected.items()} == shapes


def test_averages_are_found_under_their_dotless_names(state: dict[str, Tensor], tmp_path: Path) -> None:
    averages = {f"model_ema.{key.replace('.', '')}": value + 1 for key, value in state.items()}
    torch.save({"state_dict": {**state, **averages}, "epoch": 3}, tmp_path / "video.ckpt")
    plain = MAGVIT2.from_open_magvit2(tmp_path / "video.ckpt", SMALL, averaged=False)
    averaged = MAGVIT2.from_open_magvit2(tmp_path / "video.ckpt", SMALL)
    torch.testing.assert_close(averaged.encoder.norm_out.weight, plain.encoder.norm_out.weight + 1, rtol=0, atol=1e-6)
    with pytest.raises(OptionError, match="averaged: expected False for a file without averages"):
        MAGVIT2.from_open_magvit2(state, SMALL)


def test_wrong_files_are_refused_by_name(state: dict[str, Tensor], tmp_path: Path) -> None:
    del state["encoder.conv_in.conv_1.weight"]
    state["encoder.extra"] = torch.zeros(1)
    text = (
        "1 missing, 1 unexpected, 0 of another shape: missing encoder.conv_in.conv_1.weight; unexpected encoder.extra"
    )
    with pytest.raises(ShapeError, match=text):
        MAGVIT2.from_open_magvit2(state, SMALL, averaged=False)
    with pytest.raises(OptionError, match="config: expected norm='group', dropped_frame=1"):
        MAGVIT2.from_open_magvit2(state, MAGVIT2Config())
    with pytest.raises(OptionError, match="path: expected an existing checkpoint file"):
        MAGVIT2.from_open_magvit2(tmp_path / "none.ckpt")
    (tmp_path / "code.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(OptionError, match="path: expected a file of tensors"):
        VQGAN.from_checkpoint(tmp_path / "code.ckpt")


FLAT = VQGANConfig(
    channels=32,
    channel_multipliers=(1, 2, 2),
    attention_resolutions=(),
    resolution=32,
    z_channels=8,
    embedding_channels=8,
    codes=20,
)
SOLID = MAGVITConfig(
    channels=32,
    channel_multipliers=(1, 2, 2),
    temporal_down=(True, False),
    residual_blocks=2,
    embedding_channels=8,
    codes=20,
    downsample="conv",
    bias=True,
)


def _touch(path: str) -> None:
    Path(path).touch()


class Touching:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return _touch, (self.path,)


def test_objects_of_a_trainer_are_passed_over_and_run_nothing(tmp_path: Path) -> None:
    """taming-transformers' files have callbacks under their classes, those of DiT and Latte the arguments of the command."""
    image, path = VQGAN(FLAT), tmp_path / "last.ckpt"
    extra = {"callbacks": {Touching: {"best": 1.0}}, "args": argparse.Namespace(out=tmp_path), "hook": None}
    for hook in (Touching(tmp_path / "ran"), {Path("/x"), 2}):
        torch.save(
            {"state_dict": {f"module.{k}": v for k, v in image.state_dict().items()}, **extra, "hook": hook}, path
        )
        loaded = VQGAN.from_checkpoint(path, FLAT)
        assert all(torch.equal(value, image.state_dict()[key]) for key, value in loaded.state_dict().items())
        assert not (tmp_path / "ran").exists()
    torch.save(image, path)
    with pytest.raises(
        OptionError, match=r"path: expected a file of named tensors, got .*Save a model's state_dict\(\)"
    ):
        VQGAN.from_checkpoint(path, FLAT)


def test_wrapped_names_and_shards(tmp_path: Path) -> None:
    image = VQGAN(FLAT)
    state = image.state_dict()
    halves = (list(state)[::2], list(state)[1::2])
    for index, names in enumerate(halves):
        save_file({f"module._orig_mod.{name}": state[name] for name in names}, tmp_path / f"{index}.safetensors")
    index = {"weight_map": {name: f"{i}.safetensors" for i, names in enumerate(halves) for name in names}}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    loaded = VQGAN.from_checkpoint(path, FLAT)
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    path.write_text("{}")
    with pytest.raises(OptionError, match="path: expected an index with a weight_map"):
        VQGAN.from_checkpoint(path, FLAT)


def test_vqgan_from_a_lightning_file(tmp_path: Path) -> None:
    image = VQGAN(FLAT)
    losses = {"loss.discriminator.main.0.weight": torch.zeros(1), "model_ema.decay": torch.zeros(())}
    torch.save({"state_dict": {**image.state_dict(), **losses}, "global_step": 1}, tmp_path / "last.ckpt")
    loaded = VQGAN.from_checkpoint(tmp_path / "last.ckpt", FLAT)
    assert all(torch.equal(value, image.state_dict()[key]) for key, value in loaded.state_dict().items())
    with pytest.raises(ShapeError, match="of another shape: .*last|missing encoder.down"):
        VQGAN.from_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("mode", ["central", "average", "last"])
def test_vqgan_inflates_into_magvit(mode: str) -> None:
    image = VQGAN(FLAT)
    model, rest = MAGVIT.from_vqgan(image.state_dict(), SOLID, mode)
    assert not [key for key in rest if key.startswith(("encoder.down", "encoder.mid", "decoder.mid", "decoder.up"))]
    assert sorted(rest) == sorted(
        [f"{s}.{p}" for s in ("decoder.conv_in", "encoder.conv_out") for p in ("bias", "weight")]
    )
    assert torch.equal(model.quantize.embedding.weight, image.quantize.embedding.weight)
    # A block on a still clip, away from its borders in time, is the 2-D block.
    x = torch.randn(1, 32, 1, 8, 8)
    flat = image.encoder.down[0].block[0](x)
    solid = model.encoder.down[0].block[0](x.expand(-1, -1, 9, -1, -1).contiguous(memory_format=torch.channels_last_3d))
    if mode == "central":
        torch.testing.assert_close(solid[:, :, 4:5], flat, rtol=1e-4, atol=1e-5)
    with pytest.raises(ShapeError, match="state_dict: expected the keys of VQGAN"):
        MAGVIT.from_vqgan({"a": torch.zeros(1)}, SOLID)


LAYERED = MAGVIT2LayersConfig(
    layers=(
        "residual",
        "compress_space",
        ("consecutive_residual", 2),
        "attend_space",
        ("compress_space", 12),
        "compress_time",
        "attend_time",
        "residual",
    ),
    channels=4,
    max_channels=16,
    codebook_size=64,
    heads=2,
    head_channels=8,
)


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Numbers of unit variance that belong to a key; kernels and matrices scaled by their fan-in."""
    made = {}
    for key, shape in shapes.items():
        numbers = (uniform(key, torch.Size(shape).numel()) - 0.5) * 12**0.5
        value = torch.from_numpy(numbers).float().reshape(shape)
        fan_in = torch.Size(shape[1:]).numel()
        made[key] = value if key == "video" else 0.3 * value if len(shape) == 1 else value / fan_in**0.5
    return made


@torch.inference_mode()
def test_magvit2_pytorch_equals_the_stored_outputs_of_its_code(tmp_path: Path) -> None:
    path = ROOT / "tests" / "golden" / "magvit2_pytorch" / "small.safetensors"
    golden = load_file(str(path))
    with safe_open(str(path), "pt") as file:
        shapes = {key: tuple(shape) for key, shape in json.loads(file.metadata()["shapes"]).items()}
    fresh = MAGVIT2Layers(LAYERED).state_dict()
    assert {key: tuple(value.shape) for key, value in fresh.items()} == shapes
    state = {**filled({k: s for k, s in shapes.items() if k != "quantizers.mask"})}
    state |= {"quantizers.mask": fresh["quantizers.mask"], "discr.blocks.0.conv_res.weight": torch.zeros(1)}
    torch.save({"model_state_dict": state, "version": "0.5.1", "config": b"pickled"}, tmp_path / "tokenizer.pt")
    model = MAGVIT2Layers.from_checkpoint(tmp_path / "tokenizer.pt", LAYERED).eval()
    video = filled({"video": (1, 3, 5, 16, 16)})["video"]
    torch.testing.assert_close(model.features(video), golden["features"], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.encode(video)[1], golden["tokens"])
    torch.testing.assert_close(model.decode_tokens(golden["tokens"]), golden["video"], rtol=1e-4, atol=1e-5)


def test_layered_tokenizer_is_causal_trains_and_refuses_what_it_has_not() -> None:
    model = MAGVIT2Layers(LAYERED)
    video = torch.randn(1, 3, 5, 16, 16)
    changed = video.clone()
    changed[:, :, 3:] += 1
    with torch.inference_mode():
        assert torch.equal(model.eval().features(video)[:, :, :2], model.features(changed)[:, :, :2])
        torch.testing.assert_close(
            model.features(video[:, :, :1]), model.features(video)[:, :, :1], rtol=1e-4, atol=1e-5
        )
    reconstruction, tokens, loss = model.train()(video)
    assert reconstruction.shape == video.shape and tokens.shape == (1, 3, 4, 4)
    (F.mse_loss(reconstruction, video) + loss).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    with pytest.raises(OptionError, match="layers: expected layers among .* got linear_attend_space"):
        MAGVIT2LayersConfig(layers=("linear_attend_space",))
    with pytest.raises(ShapeError, match=r"video: expected 1 \+ 2 k frames"):
        model.features(torch.randn(1, 3, 4, 16, 16))
    with pytest.raises(ShapeError, match="missing conv_in.conv.weight"):
        MAGVIT2Layers.from_checkpoint({"a": torch.zeros(1)}, LAYERED)
