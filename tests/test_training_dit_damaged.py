# SPDX-License-Identifier: Apache-2.0
"""`train dit` with recipes, files and runs that are wrong or damaged: one clear line, or the run goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_material import command, main, make
from safetensors.torch import save_file

from vidkernels.errors import OptionError, TrainingError
from vidkernels.training.data import Draw
from vidkernels.training.dit import read_recipe, read_texts
from vidkernels.training.dit_data import LatentDataset, Sample, read_latents
from vidkernels.training.metrics import read_lines


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dit"))


def test_wrong_recipes(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cases = [
        (("--override", "model.depht=3"), "model: expected keys among"),
        (("--override", "colour=1"), "config: expected model, latents, train"),
        (("--override", "flow.shift=0"), "shift: expected 'auto' or a positive number"),
        (("--override", "latents.7=1"), "--override: expected PATH=JSON"),
        (("--override", "sequence=2"), "sequence: expected a divisor of 1 processes"),
        (("--override", "model.text_channels=8"), "--text: expected a folder of text states"),
        (("--override", "train.batch=0"), "batch: expected at least 1"),
        (("--override", "latents=[]"), "latents: expected a list with an object for each size"),
        (("--override", "latents=[5]"), "latents: expected a list with an object for each size"),
        (("--override", "latents.0.count=1.5"), "latents.count: expected a whole number"),
        (("--override", "latents.0.size=[32]"), "latents.size: expected tuple[int, int], got [32]"),
        (("--override", 'latents.0.frames="5"'), "latents.frames: expected int, got '5'"),
        (("--override", "model=5"), "model: expected an object with keys of GokuConfig"),
        (("--override", 'model.depth="2"'), "model.depth: expected int"),
        (("--override", "model.image_condition=true"), "model.image_condition: expected false"),
        (("--override", "flow=5"), "flow: expected an object with keys"),
        (("--override", 'flow.mean="a"'), "flow.mean: expected float"),
        (("--override", "flow.mean=NaN"), "mean: expected a finite number"),
        (("--override", "flow.std=0"), "std: expected a positive number"),
        (("--override", 'flow.density="normal"'), "density: expected one of"),
        (("--override", "train=5"), "train: expected an object"),
        (("--override", "train.steps=2.5"), "train.steps: expected int, got 2.5"),
        (("--override", "train.keep=-1"), "keep: expected a number from 0"),
        (("--override", f"train.seed={2**70}"), "seed: expected a number from -9223372036854775808 to"),
        (("--override", "train.optimizers=5"), "train.optimizers: expected an object"),
        (("--override", 'train.optimizers={"modle": {}}'), "train.optimizers: expected settings of model or default"),
        (("--override", "train.optimizers.model.betas=[2, 2]"), "betas: expected two numbers"),
        (("--override", "sequence=null"), "sequence: expected a divisor of 1 processes, got None"),
    ]
    for more, message in cases:
        assert main(command(material, tmp_path / "wrong", *more)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "wrong" / "latents.safetensors").exists()  # told before hours of encoding
    assert len(read_recipe("dit_tiny")["latents"]) == 5


def test_damaged_files_are_one_clear_line(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, text = tmp_path / "run", tmp_path / "text"
    assert main(command(material, out, "--override", "train.steps=1")) == 0
    (out / "latents.safetensors").write_bytes((out / "latents.safetensors").read_bytes()[:-7])
    text.mkdir()
    for name in ("slow", "fast", "null"):
        save_file({"text": torch.zeros(3, 8)}, text / f"{name}.safetensors")
    with_text = ("--text", str(text), "--override", "model.text_channels=8", "--override", "train.steps=1")

    def refused(folder: Path, *more: str) -> str:
        capsys.readouterr()
        assert main(command(material, folder, *more)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Traceback" not in error, error
        return error

    assert "latents.safetensors: is damaged; remove it" in refused(out, "--resume")
    (text / "null.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0nonsense")
    assert "--text: expected a safetensors file, got" in refused(tmp_path / "null", *with_text)
    save_file({"states": torch.zeros(3, 8)}, text / "null.safetensors")
    assert "--text: expected files with `text` [L, D], got" in refused(tmp_path / "null", *with_text)
    save_file({"text": torch.zeros(3, 8)}, text / "null.safetensors")
    (text / "slow.safetensors").write_bytes(b"")
    assert "slow.safetensors" in refused(tmp_path / "null", *with_text)
    (text / "slow.safetensors").unlink()
    assert "--text: expected an existing safetensors file, got" in refused(tmp_path / "null", *with_text)
    save_file({"text": torch.zeros(3, 7)}, text / "slow.safetensors")
    assert "--text: expected states of the model's 8 channels, got 7 in" in refused(tmp_path / "null", *with_text)
    assert not (tmp_path / "null").exists()  # told before hours of encoding
    with pytest.raises(OptionError, match="--clips: expected files of different names"):
        read_texts(text, [Path("a/slow.mp4"), Path("b/slow.mp4")], 8)


def test_damaged_runs_are_one_clear_line_or_go_on(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    steps = ("--override", "train.save_every=1", "--override", "train.steps=2")
    assert main(command(material, whole, *steps)) == 0
    newest = "checkpoints/step-00000002"

    def refused(name: str, content: bytes | None) -> str:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        (out / name).unlink()
        if content is not None:
            (out / name).write_bytes(content)
        capsys.readouterr()
        assert main(command(material, out, "--resume")) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Traceback" not in error, error
        return error

    for name in ("trainer.json", ".metadata"):
        for content in (None, b"", b"{}"):
            assert "step-00000002: is damaged; remove it, and the run resumes" in refused(f"{newest}/{name}", content)
    for content in (None, b"", (whole / newest / "__0_0.distcp").read_bytes()[:-900]):
        assert "step-00000002: not a checkpoint of this model" in refused(f"{newest}/__0_0.distcp", content)
    shutil.rmtree(out / newest)  # as the message says; other remains do not matter
    (out / newest).write_text("a file")
    (out / "checkpoints" / "x.partial").write_text("a file")
    (out / "metrics.jsonl").write_bytes((out / "metrics.jsonl").read_bytes() + b"\xff\xfe{")
    assert main(command(material, out, "--resume", "--override", "train.steps=3")) == 0
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == [1, 2, 3]
    capsys.readouterr()
    assert main(command(material, tmp_path / "other", "--device", "cuda:77")) == 2
    assert "--device: expected a device of this machine, got cuda:77" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: ({**tensors, "train.x": torch.zeros(2)}, None), "is damaged; remove it"),
        (lambda tensors: ({key: x[0] for key, x in tensors.items()}, None), "is damaged; remove it"),
        (lambda tensors: (tensors, {"facts": "{"}), "is damaged; remove it"),
        (lambda tensors: ({key: x * float("nan") for key, x in tensors.items()}, None), "not finite of these clips"),
    ],
    ids=["names", "shapes", "facts", "not finite"],
)
def test_damaged_latents(change: Any, message: str, tmp_path: Path) -> None:
    facts = {"seed": 1}
    tensors, metadata = change({f"{part}.0.0.0": torch.randn(4, 1, 2, 2) for part in ("train", "validation")})
    save_file(tensors, tmp_path / "latents.safetensors", metadata or {"facts": json.dumps(facts)})
    with pytest.raises(TrainingError, match=message):
        read_latents(tmp_path / "latents.safetensors", facts, [Path("clip.mp4")], None)


def test_one_latent_position_alone_has_no_spread() -> None:
    dataset = LatentDataset([Sample(torch.full((4, 1, 1, 1), 3.0))], [], ["clip"])
    assert torch.equal(dataset[Draw(0, 0, 0)].latents, torch.zeros(4, 1, 1, 1))
