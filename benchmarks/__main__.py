# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks run | report | list | check | limits | device | peers``; ``run`` where none of them is named."""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import check, compiling, device, limits, machine, peers, plots, registry, report, runner
from vidkernels._commands._options import add_device, pattern
from vidkernels._commands._options import run as run_command

DEFAULT_OUT = Path("report")
OTHER_COMMANDS = ("report", "list", "check", "limits", "device", "peers")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write at once and whole: a run that is stopped leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def measured_limits(device: torch.device, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The ceilings the results were compared with."""
    found: dict[str, Any] = {}
    if any(r.get("bytes") for r in results):
        found["copy_gbps"] = limits.copy_gbps(device)
    dtypes = sorted({r["dtype"] for r in results if r.get("bound") == "matmul"})
    if dtypes:
        found["matmul_tflops"] = {d: limits.matmul_tflops(device, getattr(torch, d)) for d in dtypes}
    return found


def _earlier(path: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Good results of an earlier run of the same commit on the same kind of device."""
    if not path.exists():
        return []
    document = json.loads(path.read_text())
    same = all(document["machine"].get(name) == facts[name] for name in ("device", "commit", "torch"))
    ours = runner.OURS
    return [r for r in document["results"] if same and r["rows"].get(ours, {}).get("status") == "ok"]


def run_stem(
    stem: str,
    settings: runner.Settings,
    out: Path,
    say: Callable[[str], None],
    resume: bool = False,
    end: float = math.inf,
) -> dict[str, Any]:
    """Run a stem's cases, writing the JSON after each; with ``resume`` only those not in the JSON yet.

    Args:
        end: time.monotonic() from which on no case is begun; the document then says `"unfinished": True` (not in the JSON).
    """
    facts = machine.facts(settings.device)
    results = _earlier(out / f"{stem}.json", facts) if resume else []
    document = {"stem": stem, "quick": settings.quick, "machine": facts, "results": results}
    for result in runner.run_stem(stem, settings, skip={r["case"] for r in results}):
        results.append(result)
        document["limits"] = measured_limits(settings.device, results)
        write_json(out / f"{stem}.json", document)
        times = ", ".join(f"{name} {report.cell(row)}" for name, row in result["rows"].items())
        say(f"  {result['case']}: {times or 'failed: ' + result['error']}")
        for name, row in result["rows"].items():
            if row["status"] != "ok":
                say(f"    {name}: {row['status']}, {row['detail']}")
        if time.monotonic() >= end:
            return {**document, "unfinished": True}
    return document


def unknown(stems: Sequence[str]) -> bool:
    """Whether one of these is no stem, which is then said. Call `registry.load` first."""
    wrong = sorted(set(stems) - set(registry.stems()))
    if wrong:
        known = f"there are {', '.join(registry.stems())}; other commands: {', '.join(OTHER_COMMANDS)}"
        print(f"no benchmarks for {', '.join(wrong)}; {known}", file=sys.stderr)
    return bool(wrong)


def run(arguments: argparse.Namespace) -> int:
    """``python -m benchmarks run``."""
    settings = runner.Settings(
        arguments.device, arguments.quick, not arguments.no_compile, arguments.max_autotune, arguments.filter
    )
    broken = registry.load()
    if unknown(arguments.stems):
        return 2
    documents = []
    end = time.monotonic() + arguments.time_limit
    say = functools.partial(print, flush=True)
    if arguments.compile_only:
        return compile_only(arguments, settings, end, say)
    for stem in arguments.stems or registry.stems():
        say(stem)
        documents.append(run_stem(stem, settings, arguments.out, say, arguments.resume, end))
    for item in broken:
        print(f"{item.module} could not be imported: {item.error}", file=sys.stderr)
    documents = [d for d in documents if d["results"]]
    if not documents and not broken:
        print(f"no case of {', '.join(arguments.stems) or 'any stem'} matches {arguments.filter!r}", file=sys.stderr)
        return 2
    if documents:
        print("\n" + report.summary(documents))
        write_report(documents, arguments.out)
    failed = broken or any(
        "error" in r or r["rows"].get(runner.OURS, {}).get("status") != "ok" for d in documents for r in d["results"]
    )
    if any(d.get("unfinished") for d in documents):
        print("the time was up: --resume goes on with the next case")
        return device.UNFINISHED
    return 1 if failed else 0


def compile_only(
    arguments: argparse.Namespace, settings: runner.Settings, end: float, say: Callable[[str], None]
) -> int:
    """``python -m benchmarks run --compile-only``: nothing is timed or written."""
    start = time.monotonic()
    done, faulty = compiling.run(arguments.stems or registry.stems(), settings, arguments.workers, end, say)
    say(f"{done} cases called once by {arguments.workers} workers in {time.monotonic() - start:.0f} s, {faulty} failed")
    return int(faulty > 0 or done == 0)


def write_report(documents: list[dict[str, Any]], out: Path) -> None:
    """Markdown and pictures beside the JSON. Without matplotlib there are no pictures."""
    (out / "benchmarks.md").write_text(report.markdown(documents))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no plots: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return
    for document in documents:
        plots.plot_stem(document, out / f"{document['stem']}.png")


def report_command(arguments: argparse.Namespace) -> int:
    """``python -m benchmarks report``."""
    groups = {folder: report.read(folder) for folder in arguments.folders or [DEFAULT_OUT]}
    for folder, documents in groups.items():
        if not documents:
            print(f"no results in {folder}: python -m benchmarks run writes them with --out", file=sys.stderr)
            return 2
        write_report(documents, folder)
    try:
        if arguments.readme:
            report.update_readme(arguments.readme, list(groups.values()))
        if arguments.docs:
            report.update_docs(arguments.docs, groups)
    except ValueError as error:  # no marks in that file
        print(error, file=sys.stderr)
        return 2
    print("\n".join(map(report.markdown, groups.values())))
    return 0


def list_command(arguments: argparse.Namespace) -> int:
    """``python -m benchmarks list``."""
    broken = registry.load()
    for stem in registry.stems():
        for case in registry.cases(stem, arguments.device, arguments.quick):
            print(f"{stem}: {case.name} ({', '.join(['eager', *case.peers])})")
    for item in broken:
        print(f"{item.module} could not be imported: {item.error}", file=sys.stderr)
    return 1 if broken else 0


def check_command(arguments: argparse.Namespace) -> int:
    """``python -m benchmarks check``."""
    faulty = count = 0
    broken = registry.load()
    if unknown(arguments.stems):
        return 2
    for stem in arguments.stems or registry.stems():
        try:
            found = check.check_stem(stem)
        except Exception as error:  # a stem whose list of cases cannot be made must not hide the others
            found = {"the list of cases": [f"{type(error).__name__}: {error}"]}
        count += len(found)
        for name, faults in found.items():
            faulty += bool(faults)
            for fault in faults:
                print(f"{stem}: {name}: {fault}")
    for item in broken:
        print(f"{item.module} could not be imported: {item.error}")
    print(f"{count} cases, {faulty + len(broken)} faulty")
    return int(faulty + len(broken) > 0)


def limits_command(arguments: argparse.Namespace) -> int:
    """``python -m benchmarks limits``."""
    found = {"machine": machine.facts(arguments.device), "limits": limits.everything(arguments.device)}
    write_json(arguments.out / "limits.json", found)
    print(machine.line(found["machine"]))
    print(json.dumps(found["limits"], indent=1))
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="Verify, then time, every stem.")
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="verify and time the stems (all by default)")
    one.add_argument("stems", nargs="*")
    one.add_argument("--quick", action="store_true", help="small shapes, a quarter second a contestant")
    add_device(one)
    one.add_argument("--filter", type=pattern, default="", metavar="REGEX", help="only cases whose name matches")
    one.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    one.add_argument("--max-autotune", action="store_true", help="add torch.compile(mode=max-autotune)")
    one.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for JSON, tables and plots")
    one.add_argument("--resume", action="store_true", help="keep good results of this commit and device in --out")
    one.add_argument("--time-limit", type=float, default=math.inf, metavar="S", help="begin no case after S seconds")
    one.add_argument(
        "--compile-only",
        action="store_true",
        help="call every contestant once so that compilers fill their caches on disk; no times, no files",
    )
    one.add_argument(
        "--workers", type=_positive, default=8, metavar="N", help="processes of --compile-only (default 8)"
    )
    one.set_defaults(function=run)
    two = commands.add_parser("report", help="draw tables and plots from JSON files")
    two.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help=f"default: {DEFAULT_OUT}; one a machine")
    two.add_argument("--readme", type=Path, help="replace the results table of this file")
    two.add_argument("--docs", type=Path, help="replace the rows of the stems' pages in this folder")
    two.set_defaults(function=report_command)
    three = commands.add_parser("list", help="list the cases")
    three.add_argument("--quick", action="store_true")
    add_device(three)
    three.set_defaults(function=list_command)
    four = commands.add_parser("check", help="trace every GPU case with fake tensors, without a GPU")
    four.add_argument("stems", nargs="*")
    four.set_defaults(function=check_command)
    five = commands.add_parser("limits", help="measure copy bandwidth, matmul rates and the cost of a launch")
    add_device(five)
    five.add_argument("--out", type=Path, default=DEFAULT_OUT)
    five.set_defaults(function=limits_command)
    device.add_arguments(commands.add_parser("device", help="everything worth a GPU's minutes, in resumable parts"))
    peers.add_arguments(commands.add_parser("peers", help="other libraries: list, pack, unpack"))
    return top


def main(argv: list[str] | None = None) -> int:
    """Entry point. What begins with a stem or an option of ``run`` is a run: ``python -m vidkernels bench fsq --quick``."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in {"run", *OTHER_COMMANDS, "-h", "--help"}:
        words.insert(0, "run")
    arguments = parser().parse_args(words)
    return run_command("python -m benchmarks", lambda: int(arguments.function(arguments)))


if __name__ == "__main__":
    sys.exit(main())
