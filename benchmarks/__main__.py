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

from benchmarks import check, compiling, device, limits, machine, peers, plots, registry, report, runner
from benchmarks.store import run_stem, write_json
from vidkernels import _files
from vidkernels._commands._options import add_device, at_least, output_folder, pattern, positive
from vidkernels._commands._options import run as run_command
from vidkernels.errors import OptionError

DEFAULT_OUT = Path("report")
OTHER_COMMANDS = ("report", "list", "check", "limits", "device", "peers")


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
        arguments.device,
        arguments.quick,
        not arguments.no_compile,
        arguments.max_autotune,
        arguments.filter,
        arguments.case_limit,
    )
    broken = registry.load(arguments.stems)
    if unknown(arguments.stems):
        return 2
    documents = []
    end = time.monotonic() + arguments.time_limit
    say = functools.partial(print, flush=True)
    if arguments.compile_only:
        return compile_only(arguments, settings, end, say)
    for stem in arguments.stems or registry.stems():
        say(stem)
        documents.append(run_stem(stem, settings, arguments.out, say, arguments.resume, end, arguments.compile_last))
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
    _files.write_text(out / "benchmarks.md", report.markdown(documents))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no plots: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return
    for document in documents:
        plots.plot_stem(document, out / f"{document['stem']}.png")


def report_command(arguments: argparse.Namespace) -> int:
    """``python -m benchmarks report``."""
    if arguments.docs is not None and not arguments.docs.is_dir():
        raise OptionError("--docs", "a folder of pages", str(arguments.docs))
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
    broken = registry.load(arguments.stems)
    if unknown(arguments.stems):
        return 2
    for stem in arguments.stems or registry.stems():
        for case in registry.cases(stem, arguments.device, arguments.quick):
            print(f"{stem}: {case.name} ({', '.join(['eager', *case.peers])})")
    for item in broken:
        print(f"{item.module} could not be imported: {item.error}", file=sys.stderr)
    return 1 if broken else 0


def check_command(arguments: argparse.Namespace) -> int:
    """``python -m benchmarks check``."""
    faulty = count = 0
    broken = registry.load(arguments.stems)
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


def _run_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("stems", nargs="*", metavar="STEM", help="such as fsq or models; default: all (`list` shows them)")
    add_device(one)
    what = one.add_argument_group("which cases")
    what.add_argument("--quick", action="store_true", help="the small set: each stem takes seconds on a CPU")
    what.add_argument("--filter", type=pattern, default="", metavar="REGEX", help="only cases whose name matches")
    what.add_argument("--no-compile", action="store_true", help="leave torch.compile out (most of the waiting)")
    what.add_argument("--compile-last", action="store_true", help="torch.compile's rows after all others")
    what.add_argument("--max-autotune", action="store_true", help="add torch.compile(mode=max-autotune)")
    files = one.add_argument_group("files and time")
    files.add_argument(
        "--out",
        type=output_folder,
        default=DEFAULT_OUT,
        metavar="FOLDER",
        help="of JSON, tables, plots (default: report)",
    )
    files.add_argument(
        "--resume",
        action="store_true",
        help="go on where a run of this commit and device stopped; rows of earlier commits stay, marked, until their turn",
    )
    files.add_argument(
        "--time-limit",
        type=float,
        default=math.inf,
        metavar="S",
        help="begin no case after S seconds; exit code 75 then",
    )
    files.add_argument(
        "--case-limit",
        type=positive,
        default=math.inf,
        metavar="S",
        help="give a case up after S seconds (default: never)",
    )
    caches = one.add_argument_group("compilers beforehand")
    caches.add_argument(
        "--compile-only",
        action="store_true",
        help="call every contestant once, so that Triton and torch.compile fill their caches on disk; no times, no files",
    )
    caches.add_argument("--workers", type=at_least(1), default=8, metavar="N", help="its processes (default 8)")
    one.set_defaults(function=run)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Every case is verified, then timed against eager, torch.compile and other libraries.",
        epilog="`run` need not be said: `python -m benchmarks fsq --quick`. How a row is made: docs/benchmarking.md.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _run_arguments(commands.add_parser("run", help="verify and time the stems (all by default)"))
    two = commands.add_parser("report", help="draw tables and plots from JSON files")
    two.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help=f"default: {DEFAULT_OUT}; one a machine")
    two.add_argument("--readme", type=Path, metavar="FILE", help="replace the results table of this file")
    two.add_argument("--docs", type=Path, metavar="FOLDER", help="replace the rows of the stems' pages in this folder")
    two.set_defaults(function=report_command)
    three = commands.add_parser("list", help="list the cases that `run` would run here")
    three.add_argument("stems", nargs="*", metavar="STEM", help="default: all")
    three.add_argument("--quick", action="store_true", help="those of `run --quick`")
    add_device(three)
    three.set_defaults(function=list_command)
    four = commands.add_parser("check", help="trace every GPU case with fake tensors, without a GPU")
    four.add_argument("stems", nargs="*", metavar="STEM", help="default: all")
    four.set_defaults(function=check_command)
    five = commands.add_parser("limits", help="measure copy bandwidth, matmul rates and the cost of a launch")
    add_device(five)
    five.add_argument("--out", type=output_folder, default=DEFAULT_OUT, metavar="FOLDER", help="gets limits.json")
    five.set_defaults(function=limits_command)
    device.add_arguments(
        commands.add_parser(
            "device",
            help="everything worth a GPU's minutes, in resumable parts",
            description="Tests, whole models, every stem, sanitizers: each part is a process with a time limit that writes its"
            " results at once, so that a call can end anywhere and the next one goes on.",
        )
    )
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
