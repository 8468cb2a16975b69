# SPDX-License-Identifier: Apache-2.0
"""What the benchmark system does for a GPU whose minutes are few: budgets, CUDA graphs, kept memory, compilers beforehand."""

from __future__ import annotations

import concurrent.futures
import types
from pathlib import Path

import pytest
import torch
from benchmark_toys import CPU, case, known_limits, settings, softplus, toy  # noqa: F401

from benchmarks import __main__ as bench
from benchmarks import compiling, report, runner, timing, verify


def test_a_gpu_case_takes_half_a_second_a_contestant(monkeypatch: pytest.MonkeyPatch) -> None:
    now, made = [0.0], {0.001: 0, 0.009: 0, 0.3: 0, 0.6: 0, 2.0: 0}
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def call(seconds: float) -> None:
        made[seconds] += 1
        now[0] += seconds

    budget = timing.budget(torch.device("cuda"), quick=False)
    calls = {str(seconds): lambda s=seconds: call(s) for seconds in made}
    samples = {name: t.samples for name, t in timing.interleave(calls, timing.CpuTimer(), budget).items()}
    assert samples["0.001"] >= 300 and samples["0.009"] >= 20
    assert (samples["0.3"], samples["0.6"], samples["2.0"]) == (5, 3, 1)
    assert made[2.0] == 1 and made[0.009] * 0.009 < 0.6


def test_graphs_are_for_short_cases_and_rebuild_what_autograd_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []

    def graph_ms(prepare, device, repeats, replays):
        captured.append((prepare()(), repeats, replays))
        return 0.1

    monkeypatch.setattr(timing, "graph_ms", graph_ms)
    one = case(backward="only")
    sets = [verify.make_inputs(one, i) for i in range(2)]
    expected = runner.one_call(softplus, sets[0], "only")()  # hangs an accumulator on each leaf
    functions = dict.fromkeys(("vidkernels", "eager", "slow"), softplus)
    rows = {"vidkernels": {"ms": 0.4}, "eager": {"ms": 2.0}, "slow": {"ms": 9.0}}
    runner._add_graph_times(rows, functions, sets, "only", CPU)
    assert [row.get("graph_ms") for row in rows.values()] == [0.1, 0.1, None]
    assert [c[1:] for c in captured] == [(8, 20), (8, 6)]
    runner._rotating(softplus, [verify.fresh_leaves(i) for i in sets], "only")()
    fresh = verify.fresh_leaves(sets[0])
    assert fresh["x"].data_ptr() == sets[0]["x"].data_ptr() and fresh["x"] is not sets[0]["x"]
    assert all(map(torch.equal, runner.one_call(softplus, fresh, "only")(), expected))
    rows = {"vidkernels": {"ms": 0.6}}
    runner._add_graph_times(rows, {"vidkernels": softplus}, sets, "only", CPU)
    assert "graph_ms" not in rows["vidkernels"] and len(captured) == 2


def test_whole_models_are_replayed_once_and_compared_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []

    def graph_ms(prepare, device, repeats, replays):
        captured.append((prepare()(), repeats, replays))
        return 10.0

    monkeypatch.setattr(timing, "graph_ms", graph_ms)
    inputs = verify.make_inputs(case())
    rows = {"vidkernels": {"status": "ok", "ms": 40.0}, "eager": {"status": "ok", "ms": 80.0}, "peer": {"ms": 90.0}}
    functions = dict.fromkeys(rows, softplus)
    runner._add_whole_graph_times(rows, functions, inputs, CPU)
    assert [row.get("whole_graph_ms") for row in rows.values()] == [10.0, 10.0, None]
    assert [c[1:] for c in captured] == [(1, 3), (1, 3)] and torch.equal(captured[0][0], softplus(inputs))
    runner._add_whole_graph_times({"eager": {"ms": 900.0}}, {"eager": softplus}, inputs, CPU)
    assert len(captured) == 2  # too long: a capture takes as long as a call
    rows = {"vidkernels": {"status": "ok", "ms": 40.0, "whole_graph_ms": 10.0}, "eager": {"status": "ok", "ms": 80.0}}
    rows["eager"]["whole_graph_ms"] = 30.0
    result = {"case": "x", "rows": rows, "bound": None}
    assert report.speedup(result) == pytest.approx(2.0) and report.cell(rows["eager"]) == "80 ms (ᴳ 30 ms)"
    assert report._table_row(result, list(rows))[3] == "2.00x"


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True, "only"])
def test_gpu_cases_have_times_by_graph(backward: bool | str) -> None:
    gpu = torch.device("cuda")

    def make_inputs() -> dict:
        return {"x": torch.randn(64, 65, device=gpu), "w": torch.randn(65, device=gpu)}

    result = runner.run_case(case(make_inputs=make_inputs, backward=backward), runner.Settings(gpu, quick=True))
    for name in ("vidkernels", "eager"):
        row = result["rows"][name]
        assert row["status"] == "ok" and 0 < row["graph_ms"] < 2 * row["ms"]


def test_cached_blocks_are_kept_while_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, held, emptied = torch.device("cuda"), [10], []
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held[0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=100))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(held[0]))
    runner.free_memory(gpu)
    held[0] = 51
    runner.free_memory(gpu)
    held[0] = 10
    runner.free_memory(gpu, always=True)
    assert emptied == [51, 10]


def test_compile_only_calls_all_but_eager_once(
    toy: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[str] = []

    def named(name: str):
        def run(inputs: dict) -> torch.Tensor:
            calls.append(name)
            return softplus(inputs)

        return run

    one = case(ours=named("ours"), reference=named("eager"), compile=named("compiled"), backward="only")
    assert compiling.call_once(one, settings()) == [] and calls == ["ours", "compiled"]
    broken = case(peers={"rival": lambda i: i["y"]})
    assert compiling.call_once(broken, settings()) == ["rival: KeyError: 'y'"]
    # threads for processes: those would not know the toy
    monkeypatch.setattr(
        concurrent.futures, "ProcessPoolExecutor", lambda n, *rest: concurrent.futures.ThreadPoolExecutor(n)
    )
    command = ["run", "--quick", "--device", "cpu", "--no-compile", "--compile-only", "--out", str(tmp_path / "no")]
    assert bench.main([*command, "--workers", "2"]) == 1
    said = capsys.readouterr().out
    assert "  softplus: " in said and "\n    vidkernels: ZeroDivisionError" in said
    assert "2 cases called once by 2 workers" in said and "1 failed" in said
    assert bench.main([*command, "--filter", "softplus"]) == 0
    assert not (tmp_path / "no").exists()
    with pytest.raises(SystemExit):
        bench.main([*command, "--workers", "0"])


@pytest.mark.slow
def test_compile_only_in_processes(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "lfq", "--quick", "--device", "cpu", "--no-compile", "--compile-only", "--workers", "1"]
    assert bench.main(command) == 0
    assert "cases called once by 1 workers" in capsys.readouterr().out


def test_graph_times_are_shown_and_compared_where_both_have_one() -> None:
    rows = {
        "vidkernels": {"status": "ok", "ms": 0.14, "graph_ms": 0.02, "gbps": 400.0, "percent_of_limit": 12.0},
        "eager": {"status": "ok", "ms": 0.15, "graph_ms": 0.06},
        "torch.compile": {"status": "ok", "ms": 0.7, "graph_ms": None},
    }
    result = {"case": "x", "rows": rows, "bound": "copy"}
    assert report.speedup(result, "eager") == pytest.approx(3.0)
    assert report.speedup(result, "torch.compile") == pytest.approx(5.0)  # by events, as the other has no graph
    assert report.cell(rows["vidkernels"]) == "140 us (ᴳ 20 us)" and report.cell(rows["torch.compile"]) == "700 us"
    row = report._table_row(result, list(rows))
    assert row[4:7] == ["3.00x ᴳ", "2.8e+03 GB/s", "84 % of copy"]
    machine = {"device": "GPU", "device_type": "cuda", "torch": "2", "commit": "c", "date": "d"}
    assert "replayed from a CUDA graph" in report.legend([{"machine": machine, "results": [result]}])
    del rows["vidkernels"]["graph_ms"]
    assert report._table_row(result, list(rows))[4:7] == ["1.07x", "400 GB/s", "12 % of copy"]
    assert "replayed" in report.legend([{"machine": machine, "results": [result]}])  # eager still has one
