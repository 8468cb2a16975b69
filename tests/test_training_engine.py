# SPDX-License-Identifier: Apache-2.0
"""The training engine on a toy: order of the data, resuming, averages, checkpoints, signals, errors."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from vidkernels.errors import OptionError, TrainingError
from vidkernels.training import (
    EMA,
    OptimizerConfig,
    Processes,
    ResumableOrder,
    Task,
    TrainConfig,
    Trainer,
    checkpoint,
    mixed_seed,
)
from vidkernels.training.data import loader
from vidkernels.training.metrics import MetricLog, read_lines


class Points:
    """y = 3 x0 - 2 x1 + 1 at points that the draw's own seed chooses."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, draw) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(2, generator=draw.generator())
        return x, 3 * x[:1] - 2 * x[1:] + 1


class Fit(Task):
    """A regression, and a second module that is trained in its own turn from the first one's output."""

    def __init__(self, poison_at: int | None = None, kill_at: int | None = None) -> None:
        torch.manual_seed(5)
        self.modules = {"model": nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)), "judge": nn.Linear(1, 1)}
        self.poison_at, self.kill_at = poison_at, kill_at

    def losses(self, name, modules, batch, context):
        x, y = batch
        if name == "judge":
            if context.step < 2:
                return None
            return (modules["judge"](context.memo["guess"]) - y).square().mean(), {}
        noise = torch.stack([torch.randn(1, generator=d.generator(purpose=9)) for d in context.draws])
        guess = modules["model"](x + 0.01 * noise * torch.rand(()))
        context.memo["guess"] = guess.detach()
        loss = (guess - y).square().mean() + 0.1 * modules["judge"](guess).square().mean()
        if self.kill_at == context.step:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.poison_at is not None and context.step >= self.poison_at:
            loss = loss * float("nan")
        return loss, {"half": 0.5 * loss}

    def validate(self, modules, context):
        assert not modules["model"].training
        return {"bias": float(modules["model"][2].bias.detach().sum())}


class FitToValidate(Fit):
    """One whose validation runs the model."""

    def validate(self, modules, context):
        x = torch.linspace(-1, 1, 8).view(4, 2)
        return {"error": float(modules["model"](x).square().mean())}


def config(**changes) -> TrainConfig:
    optimizer = OptimizerConfig(learning_rate=0.02, warmup=2, decay="cosine")
    values = {"steps": 12, "batch": 4, "seed": 3, "save_every": 4, "log_every": 1, "ema": 0.9, "validate_every": 6}
    return TrainConfig(**{**values, "optimizers": {"default": optimizer}, **changes})


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("model", "judge"):
        for averaged in (True, False):
            state = trainer.full_state_dict(name, averaged=averaged)
            found |= {f"{name}.{averaged}.{key}": value for key, value in state.items()}
    return found


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [key for key in a if not torch.equal(a[key], b[key])]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_number_of_processes_draws_the_same_samples(world: int, accumulate: int) -> None:
    settings = config(batch=8, accumulate=accumulate, steps=5)
    whole = [d for draws in ResumableOrder(7, config(batch=8, steps=5)) for d in draws]
    assert sorted(d.index for d in whole[:7]) == list(range(7)) and [d.position for d in whole] == list(range(40))
    ranks = [list(ResumableOrder(7, settings, 2, rank, world)) for rank in range(world)]
    assert all(len(r) == len(ResumableOrder(7, settings, 2, 0, world)) for r in ranks)
    together = sorted((d for r in ranks for draws in r for d in draws), key=lambda d: d.position)
    assert together == whole[16:]
    for step in range(3):
        part = [d for r in ranks for draws in r[step * accumulate : (step + 1) * accumulate] for d in draws]
        assert {d.position for d in part} == set(range(16 + 8 * step, 24 + 8 * step))


def test_seeds_of_near_numbers_are_unrelated() -> None:
    seeds = {mixed_seed(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) == 8000 and max(seeds) < 2**63
    bits = sum((seed >> k & 1) for seed in seeds for k in range(63)) / (8000 * 63)
    assert abs(bits - 0.5) < 0.005


@pytest.mark.filterwarnings("error:torch.distributed is disabled")  # which torch said at each checkpoint of one process
def test_loss_falls_and_a_resumed_run_repeats_the_bits(tmp_path: Path) -> None:
    straight = Trainer(Fit(), config(), Points(), tmp_path / "a")
    result = straight.run()
    lines = read_lines(tmp_path / "a" / "metrics.jsonl")
    assert result.step == 12 and not result.stopped and "bias" in result.metrics
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["model_loss"] < 0.5 * lines[0]["model_loss"]
    assert "judge_loss" not in lines[1] and "judge_loss" in lines[2]
    assert straight.checkpoints.steps() == [8, 12]
    first = Trainer(Fit(kill_at=6), config(), Points(), tmp_path / "b")
    assert first.run().stopped and first.checkpoints.steps() == [4, 7]
    again = Trainer(Fit(), config(), Points(), tmp_path / "b", resume=True)
    assert again.step == 7 and again.run().step == 12
    assert_equal(weights(straight), weights(again))
    strip = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(tmp_path / n / "metrics.jsonl")]
        for n in "ab"
    ]
    assert strip[0] == strip[1]


def test_lines_are_written_when_they_are_due(tmp_path: Path) -> None:
    Trainer(Fit(), config(steps=11, log_every=4, validate_every=3), Points(), tmp_path).run()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 3, 4, 6, 8, 9, 11]
    assert [line["step"] for line in lines if "bias" in line] == [3, 6, 9, 11]


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    one, two = (
        Trainer(Fit(), config(accumulate=n, steps=3), Points(), tmp_path / str(n)) for n in (1, 2)
    )  # the same random draw scales the noise of each micro-batch, hence the loose comparison
    one.run(), two.run()
    for key, value in weights(one).items():
        torch.testing.assert_close(value, weights(two)[key], rtol=0, atol=2e-2)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains_and_resumes(precision: str, tmp_path: Path) -> None:
    settings = config(precision=precision, steps=8, save_every=3)
    straight = Trainer(Fit(), settings, Points(), tmp_path / "a")
    straight.run()
    Trainer(Fit(kill_at=2), settings, Points(), tmp_path / "b").run()
    again = Trainer(Fit(), settings, Points(), tmp_path / "b", resume=True)
    # The first float16 losses overflow at the initial scale of 65536: the smaller one found must survive (bfloat16 has 1).
    assert again.step == 3 and again.scaler.get_scale() < 65536
    again.run()
    assert_equal(weights(straight), weights(again))


class TiedFit(Fit):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Linear(2, 1))
        model[2].weight = model[0].weight
        self.modules = {"model": model}

    def losses(self, name, modules, batch, context):
        return (modules["model"](batch[0]) - batch[1]).square().mean(), {}


def test_a_tied_weight_is_one_average(tmp_path: Path) -> None:
    trainer = Trainer(TiedFit(), config(steps=3, validate_every=0), Points(), tmp_path)
    trainer.run()
    averaged, raw = (trainer.full_state_dict("model", averaged=flag) for flag in (True, False))
    assert torch.equal(averaged["0.weight"], averaged["2.weight"]) and torch.equal(raw["0.weight"], raw["2.weight"])
    assert not torch.equal(averaged["0.weight"], raw["0.weight"])


def test_average_follows_its_formula() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    ema, expected = EMA({"p": p}, 0.5), torch.tensor([1.0, 2.0], dtype=torch.float64)
    for n in range(6):
        with torch.no_grad():
            p.add_(1)
        ema.update(n)
        d = min(0.5, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * p.detach().double()
    torch.testing.assert_close(ema.averages["p"].double(), expected, rtol=1e-6, atol=0)
    with ema.swapped():
        assert torch.equal(p.detach(), ema.averages["p"])
    assert torch.equal(p.detach(), torch.tensor([7.0, 8.0]))


class Handlers:
    """What SIGINT and SIGTERM do in the process that loads."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, draw) -> list[bool]:
        return [signal.getsignal(number) is signal.SIG_IGN for number in (signal.SIGINT, signal.SIGTERM)]


def test_loaders_outlive_the_signals_that_end_a_run() -> None:
    """Ctrl-C goes to every process of the terminal: a loader that died of it would end the run without a checkpoint."""
    batches = loader(Handlers(), config(batch=1, steps=1, workers=1), 0, 0, 1, list)
    assert [batch for batch, _ in batches] == [[[True, True]]]


def test_a_resumed_run_killed_at_its_start_keeps_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path, 0)
    for step in (1, 2):
        log.write(step, {"loss": 1.0})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        MetricLog(path, 2)
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    MetricLog(path, 1)
    assert [line["step"] for line in read_lines(path)] == [1]


def test_validation_runs_in_the_precision_of_training(tmp_path: Path) -> None:
    """FSDP2 gathers bfloat16 weights for it too; one process of a group is enough to have them."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        settings = config(precision="bfloat16", parallel="fsdp", steps=2, validate_every=1)
        trainer = Trainer(FitToValidate(), settings, Points(), tmp_path, processes=Processes.current("cpu"))
        assert trainer.run().metrics["error"] < 10
    finally:
        dist.destroy_process_group()


def test_learning_rate_is_a_function_of_the_step() -> None:
    settings = OptimizerConfig(learning_rate=2.0, warmup=4, decay="cosine", final_fraction=0.1)
    assert [settings.rate(s, 14) for s in (0, 3, 4, 14, 99)] == pytest.approx([0.5, 2.0, 2.0, 0.2, 0.2])
    assert settings.rate(9, 14) == pytest.approx(2.0 * 0.55)
    assert OptimizerConfig(learning_rate=2.0).rate(9, 10) == 2.0


@pytest.mark.parametrize(("precision", "first", "last"), [("float32", 3, 4), ("float16", 0, 17)])
def test_a_run_that_stays_not_finite_ends(precision: str, first: int, last: int, tmp_path: Path) -> None:
    """In float16 the loss scale may fall from 65536 to 1 first."""
    trainer = Trainer(Fit(poison_at=first), config(max_skipped=2, precision=precision, steps=99), Points(), tmp_path)
    text = f"step {last}: {last + 1 - first} steps in a row without a finite gradient"
    with pytest.raises(TrainingError, match=text):
        trainer.run()
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["model_loss"] == "nan"


def test_wrong_folders_and_settings_are_refused(tmp_path: Path) -> None:
    Trainer(Fit(), config(steps=4), Points(), tmp_path).run()
    with pytest.raises(TrainingError, match="holds a run at step 4; resume it"):
        Trainer(Fit(), config(), Points(), tmp_path)
    with pytest.raises(TrainingError, match=r"was begun with batch = 4, not 8 \(2 settings differ: batch, seed\)"):
        Trainer(Fit(), config(batch=8, seed=4), Points(), tmp_path, resume=True)
    other = Fit()
    other.modules["model"] = nn.Linear(2, 1)
    with pytest.raises(TrainingError, match="not a checkpoint of this model"):
        Trainer(other, config(), Points(), tmp_path, resume=True)
    with pytest.raises(OptionError, match="batch: expected a multiple of 1 processes x 3 micro-batches, got 4"):
        Trainer(Fit(), config(accumulate=3), Points(), tmp_path / "new")
    with pytest.raises(OptionError, match="clip: expected a positive number, or None"):
        OptimizerConfig(clip=0)
    with pytest.raises(OptionError, match="optimizers.model: expected keys among .*, got .'rate'"):
        TrainConfig.from_dict({"steps": 1, "optimizers": {"model": {"rate": 1}}})
    assert TrainConfig.from_dict(json.loads(json.dumps(config().to_dict()))) == config()


def test_half_written_checkpoints_are_removed_and_old_ones_pruned(tmp_path: Path) -> None:
    partial = tmp_path / "checkpoints" / "step-00000003.partial"
    partial.mkdir(parents=True)
    (partial / "junk").write_text("x")
    trainer = Trainer(Fit(), config(save_every=1, keep=3, steps=6), Points(), tmp_path, resume=True)
    assert not partial.exists() and trainer.step == 0
    trainer.run()
    assert trainer.checkpoints.steps() == [4, 5, 6]


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = torch.save

    def full(*arguments, **options) -> None:
        if trainer.step < 8:
            return write(*arguments, **options)
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598") from None  # as torch's own writer closes its file

    def full_at_the_end(folder: Path) -> None:
        if trainer.step == 8:
            raise OSError(errno.ENOSPC, "No space left on device")

    for place, name, replacement in ((torch, "save", full), (checkpoint, "_sync_folder", full_at_the_end)):
        trainer = Trainer(Fit(), config(), Points(), tmp_path, resume=True)
        with monkeypatch.context() as patch:
            patch.setattr(place, name, replacement)
            with pytest.raises(TrainingError, match="step-00000008: cannot be written: No space left on device"):
                trainer.run()
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    trainer = Trainer(Fit(), config(), Points(), tmp_path, resume=True)
    assert trainer.step == 4 and trainer.run().step == 12
