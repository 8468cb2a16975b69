# SPDX-License-Identifier: Apache-2.0
"""What a run keeps of earlier ones, how it survives cases that hang or kill it, and models that are built at their first call."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from benchmark_toys import CPU, case, known_limits, settings, softplus  # noqa: F401

from benchmarks import __main__ as bench
from benchmarks import bench_models, compiling, phases, random_models, registry, report, runner, store
from benchmarks.registry import Case

COMMAND = ["run", "toy", "--quick", "--device", "cpu", "--resume"]


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> dict[str, Case]:
    """The cases of the stem `toy`, to be filled by the test."""
    found: dict[str, Case] = {}

    def cases(device: torch.device, quick: bool) -> Iterator[Case]:
        yield from found.values()

    monkeypatch.setattr(registry, "_FACTORIES", {"toy": [cases]})
    monkeypatch.setattr(registry, "load", lambda stems=(): [])
    monkeypatch.setattr(bench, "write_report", lambda *rest: None)  # pictures take a second
    return found


def add(toys: dict[str, Case], *names: str, **changes: object) -> None:
    toys.update({name: case(name=name, **changes) for name in names})


def read(folder: Path) -> dict:
    return json.loads((folder / "toy.json").read_text())


def names(folder: Path) -> list[str]:
    return [result["case"] for result in read(folder)["results"]]


def run(out: Path, *words: str) -> int:
    return bench.main([*COMMAND, "--out", str(out), *words])


def test_rows_of_an_earlier_commit_stay_until_their_turn(
    toys: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(toys, "a", "b", "gone")
    monkeypatch.setenv("VIDKERNELS_COMMIT", "c1")
    run(tmp_path)
    first = {result["case"]: result for result in read(tmp_path)["results"]}
    del toys["gone"]
    monkeypatch.setenv("VIDKERNELS_COMMIT", "c2")
    assert run(tmp_path, "--time-limit", "0") == bench.device.UNFINISHED
    found = {result["case"]: result for result in read(tmp_path)["results"]}
    assert list(found) == ["a", "b", "gone"] and "measured" not in found["a"]
    assert found["b"]["rows"] == first["b"]["rows"] and found["b"]["measured"]["commit"] == "c1"
    text = report.stem_markdown(read(tmp_path))
    assert "| b (c1) " in text and "| a  " in text
    assert "was last measured at that commit" in report.legend([read(tmp_path)])
    monkeypatch.setenv("VIDKERNELS_COMMIT", "c3")  # a row keeps the commit at which it was measured
    run(tmp_path, "--filter", "^a$")
    assert {r["case"]: r["measured"]["commit"] for r in read(tmp_path)["results"] if "measured" in r} == {
        "b": "c1",
        "gone": "c1",
    }
    assert run(tmp_path) == 0
    assert sorted(names(tmp_path)) == ["a", "b"] and "measured" not in json.dumps(read(tmp_path))
    assert read(tmp_path)["cases"] == 2


def test_a_case_that_a_run_did_not_survive_comes_last(toys: dict[str, Case], tmp_path: Path) -> None:
    def killed(inputs: dict) -> torch.Tensor:
        if armed:
            raise SystemExit(9)
        return softplus(inputs)

    armed = True
    add(toys, "kills", ours=killed)
    add(toys, "fine")
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert read(tmp_path)["begun"] == "kills" and names(tmp_path) == []
    armed = False
    run(tmp_path)
    assert names(tmp_path) == ["fine", "kills"] and "begun" not in read(tmp_path)


def test_a_case_is_given_up_after_its_limit(
    toys: dict[str, Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def endless(inputs: dict) -> torch.Tensor:
        for _ in range(600):
            time.sleep(0.1)
        raise AssertionError("one minute was up")

    add(toys, "hangs", ours=endless)
    add(toys, "fine")
    assert run(tmp_path, "--case-limit", "1") == 1
    hung, fine = read(tmp_path)["results"]
    assert hung["error"].startswith("stopped after 1 s (vidkernels ") and hung["rows"] == {}
    assert fine["rows"]["vidkernels"]["status"] == "ok"
    assert "hangs: failed: stopped after 1 s" in capsys.readouterr().out
    with runner.time_limit(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_torch_compile_comes_after_all_cases(toys: dict[str, Case], tmp_path: Path) -> None:
    calls: list[str] = []

    def named(name: str, function: Callable = softplus) -> Callable:
        def call(inputs: dict) -> torch.Tensor:
            if not calls or calls[-1] != name:
                calls.append(name)
            return function(inputs)

        return call

    add(toys, "a", ours=named("a"), compile=named("compiled a"))
    add(toys, "b", ours=named("b"), compile=named("compiled b", lambda inputs: 1 / 0))
    add(toys, "c", ours=named("c"), compile=False)
    run(tmp_path, "--compile-last")
    assert calls[:3] == ["a", "b", "c"] and "compiled a" in calls[3:] and "c" not in calls[3:]
    rows = {result["case"]: result["rows"] for result in read(tmp_path)["results"]}
    assert [rows[name].get("torch.compile", {}).get("status") for name in "abc"] == ["ok", "error", None]
    assert all(row["vidkernels"]["status"] == "ok" for row in rows.values())
    calls.clear()
    run(tmp_path, "--compile-last")
    assert calls == []


def test_a_limit_in_the_second_pass_leaves_the_first_ones_times(toys: dict[str, Case], tmp_path: Path) -> None:
    def slow(inputs: dict) -> torch.Tensor:
        for _ in range(600):
            time.sleep(0.1)
        return softplus(inputs)

    add(toys, "a", compile=slow)
    run(tmp_path, "--compile-last", "--case-limit", "2")
    (result,) = read(tmp_path)["results"]
    assert result["rows"]["vidkernels"]["ms"] > 0
    assert result["rows"]["torch.compile"]["detail"].startswith("stopped after 2 s")


def test_a_lost_context_ends_the_process(
    toys: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add(toys, "a", "b")
    monkeypatch.setattr(store, "_lost", lambda device: True)
    assert run(tmp_path) == bench.device.UNFINISHED
    assert names(tmp_path) == ["a"] and "the CUDA context is lost" in capsys.readouterr().out
    monkeypatch.undo()


def test_compile_only_does_not_trace_the_building_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """It did: "'WanTransformer3DModel' object has no attribute '_parameters'" on the first GPU."""
    built: list[torch.nn.Module] = []

    def reference(inputs: dict) -> torch.Tensor:
        if not built:
            built.append(random_models.build(lambda: torch.nn.Linear(65, 65), CPU, torch.float32))
        return built[0](inputs["x"])

    def compile(function: Callable, **options: object) -> Callable:
        def call(inputs: dict) -> torch.Tensor:
            assert built, "traced"
            return function(inputs)

        return call

    monkeypatch.setattr(torch, "compile", compile)
    one = case(reference=reference, compile=True)
    assert compiling.call_once(one, runner.Settings(CPU, quick=True)) == [] and built


def test_whole_models_compile_without_having_been_called(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers", minversion="0.42")
    compiled: list[str] = []

    def compile(module: torch.nn.Module, **options: object) -> None:
        compiled.append(type(module).__name__)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    latte = bench_models._Model(
        "LatteTransformer3DModel",
        bench_models.LATTE_XL
        | {"num_layers": 2, "sample_size": 8, "video_length": 2, "num_attention_heads": 2, "cross_attention_dim": 144}
        | {"caption_channels": 16},
        CPU,
        torch.float32,
    )
    step = bench_models._step(latte, "Latte", (1, 4, 2, 8, 8), (5, 16), bench_models._latte)
    assert compiling.call_once(step, runner.Settings(CPU, quick=True)) == []
    assert compiled == ["BasicTransformerBlock"] * 4  # each of the two pairs


def test_models_are_compared_on_a_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: eager's own error comes from a crop; a result further away than the promise allows is WRONG."""
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32)).requires_grad_(False)
    half = model.bfloat16()
    call = lambda network, inputs: network(inputs["x"])  # noqa: E731
    crop, x = {"x": torch.randn(16, 32).bfloat16()}, torch.randn(512, 32).bfloat16()
    own = random_models.own_error(half, call, crop, torch.float32)
    assert 1e-4 < own < 3e-2
    reference = half(x)
    exact = (model.float()(x.float())).bfloat16()
    assert random_models.near_reference((exact,), (reference,), (own[None],)) is None
    off = reference + 6 * own.to(torch.bfloat16) * reference.abs().max()
    assert "differs by" in str(random_models.near_reference((off,), (reference,), (own[None],)))


def test_gpu_rows_of_whole_models_begin_with_those_that_say_most() -> None:
    pytest.importorskip("diffusers", minversion="0.42")
    found = list(bench_models.large_cases(torch.device("cuda"), False))
    assert [one.name.split(" bfloat16")[0] for one in found[:5]] == [
        "AutoencoderVidTok encode 20x256x256",
        "AutoencoderVidTok decode 20x256x256",
        "Latte-XL/2 step 2x4x16x64x64",
        "Wan 1.3B step 1x16x21x60x104",
        "AutoencoderKLWan decode 81x480x832",
    ]
    assert all(one.check is random_models.near_reference for one in found)


@pytest.mark.slow
def test_crops_of_all_gpu_rows_fit_their_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta tensors: a crop that a model refuses would cost the row on a GPU."""
    pytest.importorskip("diffusers", minversion="0.42")
    models: list[bench_models._Model] = []
    original = bench_models._Model.__init__

    def init(self: bench_models._Model, *rest: object) -> None:
        original(self, *rest)
        models.append(self)

    monkeypatch.setattr(bench_models._Model, "__init__", init)
    gpu = torch.device("cuda")
    found = [*bench_models.large_cases(gpu, False), *bench_models.video_vaes(gpu, False)]
    for model in models:
        model.device = torch.device("meta")
    for one in found:
        assert one.truth is not None
        error = one.truth({})
        assert error.shape == () and error.dtype == torch.float64, one.name


def test_phases_count_inner_ones_once() -> None:
    phases.collect()
    with phases.phase("outer"):
        time.sleep(0.02)
        with phases.phase("inner"):
            time.sleep(0.15)
    found = phases.collect()
    assert found["inner"] >= 0.15 and 0.01 <= found["outer"] < 0.15
    assert phases.line(found).startswith("inner 0.") and "outer" not in phases.line({"inner": 0.2, "outer": 0.02})
    assert phases.collect() == {}


def test_phases_are_in_the_result() -> None:
    result = runner.run_case(case(), settings())
    assert {"eager", "truth", "vidkernels", "timing", "memory"} <= set(result["phases"])


def test_only_the_files_of_the_stems_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    monkeypatch.setattr(registry.importlib, "import_module", imported.append)
    registry.load(["fsq", "models"])
    assert imported == ["benchmarks.bench_fsq", "benchmarks.bench_models"]
    imported.clear()
    registry.load(["fsq", "nonsense"])  # whoever names it gets the whole list in the message
    assert len(imported) > 10
