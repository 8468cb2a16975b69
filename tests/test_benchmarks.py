# SPDX-License-Identifier: Apache-2.0
"""The benchmark system: wrong results get no time, ratios and limits are computed right, files are whole."""

from __future__ import annotations

import json
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from benchmark_toys import CPU, case, known_limits, settings, softplus, toy  # noqa: F401

from benchmarks import __main__ as bench
from benchmarks import check, device, limits, memory, peers, registry, report, runner, timing, verify
from benchmarks.registry import Case


def test_right_contestants_get_a_time() -> None:
    result = runner.run_case(case(bytes=2 * 64 * 65 * 4, flops=64 * 65), settings())
    for name in ("vidkernels", "eager"):
        row = result["rows"][name]
        assert row["status"] == "ok"
        assert 0 < row["p20_ms"] <= row["ms"] <= row["p80_ms"]
        assert row["gbps"] == pytest.approx(2 * 64 * 65 * 4 / row["ms"] / 1e6)
        assert row["peak_bytes"] >= 64 * 65 * 4
    assert result["bound"] == "copy"
    assert result["floor_ms"] == pytest.approx(2 * 64 * 65 * 4 / 100e9 * 1e3)


def test_wrong_result_gets_no_time() -> None:
    result = runner.run_case(case(ours=lambda i: softplus(i) * (1 + 1e-5)), settings())
    assert result["rows"]["vidkernels"]["status"] == "WRONG"
    assert "ms" not in result["rows"]["vidkernels"]
    assert "max error" in result["rows"]["vidkernels"]["detail"]
    assert report.cell(result["rows"]["vidkernels"]) == "**WRONG**"
    assert report.speedup(result) is None


def test_crash_is_a_row_that_says_why() -> None:
    result = runner.run_case(case(peers={"broken": lambda i: i["no such input"]}), settings())
    assert result["rows"]["broken"] == {"status": "error", "detail": "KeyError: 'no such input'"}
    assert result["rows"]["vidkernels"]["status"] == "ok"


def test_rival_slightly_outside_the_promise_is_timed_and_marked() -> None:
    def noisy(inputs: dict) -> torch.Tensor:
        return softplus(inputs) * (1 + 6e-7)

    result = runner.run_case(case(ours=noisy, peers={"rival": noisy}), settings())
    assert result["rows"]["vidkernels"]["status"] == "WRONG"
    assert result["rows"]["rival"]["status"] == "loose"
    assert report.cell(result["rows"]["rival"]).endswith("≉")


def test_wrong_gradient_is_seen() -> None:
    def detached(inputs: dict) -> torch.Tensor:
        return torch.nn.functional.softplus(inputs["x"]) * inputs["w"].detach()

    right = runner.run_case(case(backward=True), settings())
    assert right["rows"]["vidkernels"]["status"] == "ok"
    wrong = runner.run_case(case(backward=True, ours=detached), settings())
    assert wrong["rows"]["vidkernels"]["status"] == "WRONG"


def test_backward_alone_is_shorter_than_both() -> None:
    def deep(inputs: dict) -> torch.Tensor:
        with torch.no_grad():
            value = inputs["x"][0, :8]  # too small for threads, so that a busy machine does not slow it
            for _ in range(500):
                value = value.sin()
        return softplus({"x": inputs["x"] + 0 * value.sum(), "w": inputs["w"]})

    both = runner.run_case(case(ours=deep, reference=deep, backward=True), settings())
    alone = runner.run_case(case(ours=deep, reference=deep, backward="only"), settings())
    assert alone["rows"]["eager"]["ms"] < 0.5 * both["rows"]["eager"]["ms"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out[:-1], "shape"),
        (lambda out: torch.where(out > 3, torch.nan, out), "NaN or infinity"),
        (lambda out: (out, out), "2 outputs"),
    ],
    ids=["shape", "NaN", "count"],
)
def test_faults(change, message: str) -> None:
    wrong = case(ours=lambda i: change(softplus(i)))
    actual = verify.evaluate(wrong.ours, verify.make_inputs(wrong), False)
    assert message in str(verify.fault(wrong, actual, verify.expect(wrong)))


def test_integers_and_exact_checks() -> None:
    codes = case(ours=lambda i: (i["x"] > 0).int(), reference=lambda i: (i["x"] >= 0).int())
    expected = verify.expect(codes)
    assert verify.fault(codes, expected.reference, expected) is None
    flipped = (expected.reference[0].clone(),)
    flipped[0][0, 0] ^= 1
    assert verify.fault(codes, flipped, expected) == "tensor 0: 1 of 4160 elements differ"
    exact = case(check="exact")
    expected = verify.expect(exact)
    nudged = (torch.nextafter(expected.reference[0], torch.tensor(9.0)),)
    assert "4160 of 4160" in str(verify.fault(exact, nudged, expected))
    assert verify.fault(case(), nudged, expected) is None


def test_interleaved_timer_measures_sleep() -> None:
    calls = {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.006)}
    times = timing.interleave(calls, timing.CpuTimer(), timing.QUICK)
    assert 2.0 <= times["short"].median < times["long"].median
    assert times["long"].median >= 6.0


def test_calls_of_many_seconds_are_not_repeated_for_their_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now, made = [0.0], {"12 s": 0, "30 s": 0, "1 s": 0}
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def call(name: str) -> None:
        made[name] += 1
        now[0] += float(name.split()[0])

    times = timing.interleave({name: lambda n=name: call(n) for name in made}, timing.CpuTimer(), timing.FULL)
    assert {name: times[name].samples for name in made} == {"12 s": 2, "30 s": 1, "1 s": 5}
    assert made == {"12 s": 2, "30 s": 1, "1 s": 7}
    assert [times[name].median for name in made] == pytest.approx([12e3, 30e3, 1e3])


def test_a_function_can_stand_for_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def eager(inputs: dict) -> torch.Tensor:
        called.append(1)
        return softplus(inputs)

    called: list[int] = []
    monkeypatch.setattr(torch, "compile", None)
    assert runner.contestants(case(compile=softplus), settings())["torch.compile"] is softplus
    assert "torch.compile" not in runner.contestants(case(compile=softplus), runner.Settings(CPU, compile=False))
    one = case(reference=eager)
    verified = list(runner._verified(one, runner.Settings(CPU, compile=False), verify.expect(one)))
    assert [row[0] for row in verified] == ["vidkernels", "eager"] and verified[1][2] == "ok"
    assert len(called) == 2  # the reference and the truth


def test_peak_memory_counts_temporaries() -> None:
    def call() -> torch.Tensor:
        a = torch.ones(1000, 1000)
        b = a + 1
        del a
        return b.sum()

    assert 8_000_000 <= memory.peak_bytes(call, CPU) < 8_100_000


def test_floor_is_the_larger_limit() -> None:
    assert limits.floor(CPU, torch.float32, 10**9, 10**9).bound == "copy"
    assert limits.floor(CPU, torch.float32, 10**9, 10**9).ms == pytest.approx(10.0)
    assert limits.floor(CPU, torch.float32, 10**6, 10**12).bound == "matmul"
    assert limits.floor(CPU, torch.float32, 10**6, 10**12).ms == pytest.approx(1000.0)
    assert limits.floor(CPU, torch.float32, None, None) is None


def test_run_writes_json_tables_and_plots(toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert bench.main(["run", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1  # one case fails
    document = json.loads((tmp_path / "toy.json").read_text())
    assert [r["case"] for r in document["results"]] == ["softplus", "fails"]
    assert "ZeroDivisionError" in document["results"][1]["error"]
    assert document["limits"] == {"copy_gbps": 100.0}
    assert document["machine"]["torch"] == torch.__version__
    assert (tmp_path / "toy.png").stat().st_size > 1000
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| softplus" in text and "ZeroDivisionError" in text
    assert bench.main(["run", "nonsense", "--out", str(tmp_path)]) == 2
    assert "no benchmarks for nonsense; there are toy" in capsys.readouterr().err
    assert bench.main(["check", "nonsense"]) == 2
    assert "no benchmarks for nonsense; there are toy" in capsys.readouterr().err
    assert bench.main(["run", "--quick", "--filter", "zzz", "--out", str(tmp_path / "none")]) == 2
    assert "no case of any stem matches 'zzz'" in capsys.readouterr().err
    assert bench.main(["nonsense", "--quick"]) == 2  # `run` need not be said
    assert "no benchmarks for nonsense; there are toy; other commands: report, list" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--filter", "("])
    assert "expected a regular expression, got '('" in capsys.readouterr().err


def test_readme_table_is_replaced_between_the_marks(toy: None, tmp_path: Path) -> None:  # noqa: F811
    bench.main(["run", "--quick", "--device", "cpu", "--filter", "softplus", "--out", str(tmp_path)])
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.README_BEGIN}\nold\n{report.README_END}\nafter\n")
    assert bench.main(["report", str(tmp_path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "| toy" in text
    page = tmp_path / "docs" / "toy.md"
    page.parent.mkdir()
    page.write_text(readme.read_text())
    assert bench.main(["report", str(tmp_path), "--docs", str(page.parent)]) == 0
    text = page.read_text()
    assert (
        "| softplus" in text and "All rows. " in text and "(../benchmarks.md#toy)" in text and text.endswith("after\n")
    )
    page.write_text("of the same name, without marks")
    assert bench.main(["report", str(tmp_path), "--docs", str(page.parent)]) == 0
    assert page.read_text() == "of the same name, without marks"
    readme.write_text("no marks")
    assert bench.main(["report", str(tmp_path), "--readme", str(readme)]) == 2
    with pytest.raises(ValueError, match="lacks the lines"):
        report.update_readme(readme, [report.read(tmp_path)])
    assert bench.main(["report", str(tmp_path), "--docs", str(tmp_path / "no folder")]) == 2
    (tmp_path / "toy.json").write_text("{")
    assert bench.main(["report", str(tmp_path)]) == 2
    assert bench.main(["peers", "unpack", str(readme)]) == 2


def test_one_table_of_several_machines(toy: None, tmp_path: Path) -> None:  # noqa: F811
    folders = [tmp_path / "cpu", tmp_path / "gpu"]
    for folder in folders:
        assert bench.main(["run", "--quick", "--device", "cpu", "--filter", "softplus", "--out", str(folder)]) == 0
    path = folders[1] / "toy.json"
    document = json.loads(path.read_text())
    document["machine"] |= {"device": "NVIDIA H100 80GB HBM3", "device_type": "cuda"}
    document["stem"] = "other"
    path.write_text(json.dumps(document))
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.README_BEGIN}\n{report.README_END}")
    assert bench.main(["report", *map(str, folders), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert "| H100: vs eager | vs best |" in text and text.count("Measured on") == 2
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in text.splitlines()[1:5]}
    assert rows["toy"][3:] == ["-"] * 3 and rows["other"][:3] == ["-"] * 3 and "-" not in rows["toy"][0]


def test_columns_in_which_nothing_was_measured_are_left_out() -> None:
    def group(name: str, rivals: tuple[str, ...]) -> list[dict]:
        rows = {n: {"status": "ok", "ms": 1.0} for n in ("vidkernels", *rivals)}
        return [
            {
                "stem": "toy",
                "machine": {"device": name, "device_type": "cuda"},
                "results": [{"case": "a", "rows": rows}],
            }
        ]

    both = [group("NVIDIA H100", ("eager", "torch.compile")), group("NVIDIA H200", ("eager",))]
    header = report.summaries(both).splitlines()[0]
    assert header.count("vs eager") == 2 and header.count("vs compile") == 1 and header.count("won") == 2


def test_pages_show_rows_spread_over_the_list_and_the_worst_one() -> None:
    def result(name: str, ours: float) -> dict:
        times = {"vidkernels": ours, "eager": 2.0}
        return {"case": name, "rows": {k: {"status": "ok", "ms": v} for k, v in times.items()}}

    results = [result(f"case {i}", 3.0 if i == 5 else 1.0) for i in range(9)]
    assert [r["case"] for r in report._sample(results, 4)] == ["case 0", "case 2", "case 4", "case 5"]
    assert report._sample(results[:3], 4) == results[:3]


def test_case_names_are_unique(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_FACTORIES", {"toy": [lambda device, quick: iter([case(), case()])]})
    with pytest.raises(ValueError, match="appears twice"):
        list(registry.cases("toy", CPU, True))


def test_ratios() -> None:
    rows = {n: {"status": "ok", "ms": ms} for n, ms in (("vidkernels", 2.0), ("eager", 8.0), ("torch.compile", 3.0))}
    result = {"case": "x", "rows": rows, "bound": None}
    assert report.speedup(result, "eager") == 4.0
    assert report.speedup(result) == 1.5
    rows["ours, torch"] = {"status": "ok", "ms": 1.0}  # a backend of ours that was not chosen is no rival
    assert report.speedup(result) == 1.5
    assert report.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert report.milliseconds(0.01234) == "12.3 us" and report.milliseconds(1234.0) == "1.23 s"


def test_every_benchmark_file_registers_cases() -> None:
    """All `bench_*.py` import, and every case of every stem can build its inputs and its reference output."""
    assert registry.load() == []
    for stem in registry.stems():
        for found in registry.cases(stem, CPU, True):
            outputs = verify.evaluate(found.reference, verify.make_inputs(found), False)
            assert all(isinstance(x, torch.Tensor) for x in outputs), found.name


def test_check_traces_gpu_cases_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def cases(device: torch.device, quick: bool) -> Iterator[Case]:
        assert device.type == "cuda"  # what a stem that has other cases on a GPU asks

        def make_inputs() -> dict:
            return {
                "x": torch.randn(1 << 40, device=device),
                "w": torch.randn(1, device="cuda"),
            }  # 4 TiB if it were real

        yield case(name="good", make_inputs=make_inputs, backward=True)
        yield case(
            name="bad", make_inputs=make_inputs, ours=lambda i: softplus(i)[None], peers={"rival": lambda i: i["y"]}
        )

    monkeypatch.setattr(registry, "_FACTORIES", {"toy": [cases]})
    faults = check.check_stem("toy")
    assert faults["good"] == []
    assert (
        len(faults["bad"]) == 2
        and faults["bad"][0].startswith("ours: outputs [((1, ")
        and "KeyError" in faults["bad"][1]
    )


def test_resume_runs_only_what_is_missing(toy: None, tmp_path: Path) -> None:  # noqa: F811
    command = ["run", "--quick", "--device", "cpu", "--out", str(tmp_path), "--resume"]
    bench.main(command)
    first = json.loads((tmp_path / "toy.json").read_text())
    bench.main(command)
    again = json.loads((tmp_path / "toy.json").read_text())
    assert again["results"][0] == first["results"][0]  # kept, times and all
    assert [r["case"] for r in again["results"]] == ["softplus", "fails"]
    first["machine"]["commit"] = "another"
    (tmp_path / "toy.json").write_text(json.dumps(first))
    bench.main(command)
    assert json.loads((tmp_path / "toy.json").read_text())["results"][0]["rows"] != first["results"][0]["rows"]


def test_run_begins_no_case_after_its_time(toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    command = ["run", "--quick", "--device", "cpu", "--out", str(tmp_path), "--resume", "--time-limit", "0"]
    assert bench.main(command) == device.UNFINISHED
    assert [r["case"] for r in json.loads((tmp_path / "toy.json").read_text())["results"]] == ["softplus"]
    assert "the time was up" in capsys.readouterr().out


def test_peers_report_why_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "KNOWN", {"json": ("json", "a"), "no_such_module": ("no-such-module", "b")})
    rows = {module: version for module, version, _ in peers.table()}
    assert "ModuleNotFoundError" in rows["no_such_module"]
    assert peers.find("json") is json


def test_tokenizer_rows_tell_a_model_of_the_other_version() -> None:
    pytest.importorskip("diffusers", minversion="0.42")
    from benchmarks import bench_tokenizers as rows

    weights = rows._Weights(rows.KL, CPU, torch.float32, width=16)
    for task in ("encode", "decode"):
        one = weights.against_diffusers(task, "VidTok", (5, 16, 16), compiled=False)
        expected = verify.expect(one)
        for function in (one.ours, one.peers["ours, diffusers patched"]):
            right = verify.evaluate(function, verify.make_inputs(one), False)
            assert verify.fault(one, right, expected) is None
        off = (right[0] + 1e-4 * right[0].abs().max(),)
        assert "differs by" in str(verify.fault(one, off, expected))
    other = rows._Weights("vidtok_kl_causal_488_4chn", CPU, torch.float32, width=16)
    other.plain = weights.plain
    (wrong,) = verify.evaluate(
        lambda inputs: rows.TASKS["decode"][0](other.ours, inputs), verify.make_inputs(one), False
    )
    assert "differs by" in str(verify.fault(one, (wrong,), expected))
