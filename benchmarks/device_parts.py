# SPDX-License-Identifier: Apache-2.0
"""The parts of ``python -m benchmarks device``: what each runs, how long it will take, and which come first."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_tests, registry

PYTHON = sys.executable
# By value: whole models, then the convolutions on which decoders hang, then stems without a row from a GPU, then the others.
STEM_ORDER = (
    "models",
    "causal_conv3d",
    "upsample_conv3d",
    "gated_activation",
    "group_norm",
    "entropy",
    "axial_attention",
    "channel_norm",
    "adaln_zero",
    "fsq",
    "lfq",
    "qk_norm_rope",
    "varlen_attention",
    "alpha_blend",
)
LAST_STEMS = ("transformers", "tokenizers")
# They are whole models too: several processes compile them one each, so that a GPU's memory is enough.
MODEL_STEMS = ("models", *LAST_STEMS)
# Seconds of a benchmark in the first round, and how long its last case may run on before it is stopped.
SLICE_S, GRACE_S = 35.0, 45.0
LONG_SLICES_S = {"models": 200.0, "causal_conv3d": 60.0, "adaln_zero": 60.0, "transformers": 60.0, "tokenizers": 60.0}
# One case of one stem: more is a fault, or a compiler that is better left out.
CASE_S, MODEL_CASE_S = 60.0, 75.0
COMPILE_S, COMPILE_MODELS_S = 240.0, 60.0
# Importing, and measuring the ceilings; a case that was never measured.
PROCESS_S, NEW_CASE_S, NEW_MODEL_S, NEW_CASES = 8.0, 5.0, 14.0, 12
# Tests may take this part of a call in the first round.
TESTS_SHARE = 0.3


@dataclasses.dataclass(frozen=True)
class Part:
    """One step: a command, the seconds it may take at most, and what stands for it in a dry run (None: nothing)."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    dry: tuple[str, ...] | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needs: str | None = None  # a program on PATH without which the part is left out
    slice_s: float = math.inf  # at most this in the first round
    sliced: bool = False  # whether it takes --time-limit and stops by itself
    timed: bool = False  # whether nothing may run beside it
    beside: bool = False  # runs beside the parts after it, up to the first that is timed
    vital: bool = False  # where it fails, nothing after it is worth its minutes
    expected_s: float | None = None  # None: as long as it may take
    share: float | None = None  # of the call's time, in place of slice_s

    def expected(self) -> float:
        """Seconds in the first round."""
        return min(self.slice_s, self.limit_s, self.limit_s if self.expected_s is None else self.expected_s)


def _module(*words: str) -> tuple[str, ...]:
    return (PYTHON, "-m", *words)


def _arch() -> str:
    if not torch.cuda.is_available():
        return "9.0a"
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + ("a" if major >= 9 else "")


def stem_rows(out: Path, stem: str, commit: str | None) -> tuple[int, int, float]:
    """(Rows of this commit, rows of others, seconds that what is left will take) by the stem's JSON."""
    path = out / f"{stem}.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"results": []}
    same = document.get("machine", {}).get("commit") == commit
    good = [r for r in document["results"] if r["rows"]]
    fresh = [r for r in good if same and "measured" not in r]
    old = [r for r in good if not same or "measured" in r]
    missing = max(0, document.get("cases", NEW_CASES) - len(fresh) - len(old))
    new_s = NEW_MODEL_S if stem in MODEL_STEMS else NEW_CASE_S
    return len(fresh), len(old), sum(r.get("seconds", new_s) for r in old) + missing * new_s


def _tests(out: Path, commit: str | None) -> list[Part]:
    run = _module("benchmarks.gpu_tests", "--out", str(out))
    collect = _module("pytest", "-q", "--collect-only", "-m", "gpu", "--no-header")
    expected = gpu_tests.expected_s(out, commit or "unknown")
    return [
        Part("tests", run, 420, collect, sliced=True, expected_s=expected, share=TESTS_SHARE),
        Part("tests large", (*run, "--marks", "gpu and large", "--large", "--workers", "1"), 300, sliced=True),
        Part("tests slow", (*run, "--slow"), 540, sliced=True),
    ]


def _benchmarks(out: Path, stem: str, commit: str | None, flags: tuple[str, ...]) -> Part:
    whole = stem in MODEL_STEMS
    limit = f"{MODEL_CASE_S if whole else CASE_S:.0f}"
    run = _module("benchmarks", "run", stem, "--resume", "--case-limit", limit, "--out", str(out), *flags)
    dry = _module("benchmarks", "check", stem)
    if whole:  # the same way through, at a size that a CPU does in a second
        run = (*run, "--compile-last")
        rehearsal = ("--quick", "--device", "cpu", "--case-limit", limit, "--compile-last", "--out", str(out))
        dry = _module("benchmarks", "run", stem, *rehearsal)
    seconds = LONG_SLICES_S.get(stem, SLICE_S)
    expected = PROCESS_S + stem_rows(out, stem, commit)[2]
    return Part(f"bench {stem}", run, 540, dry, slice_s=seconds, sliced=True, timed=True, expected_s=expected)


def _compile(stems: list[str], flags: tuple[str, ...]) -> list[Part]:
    """Compilers are paid for beside the tests, by the other half of the cores, and not one case after the other later."""
    run = _module("benchmarks", "run", "--compile-only", "--workers", "8")
    dry = _module("benchmarks", "run", "alpha_blend", "--quick", "--no-compile", "--compile-only", "--workers", "1")
    # only ours: 25 kernels of a VAE take Triton 15 to 25 s of a core
    models = _module("benchmarks", "run", "--compile-only", "--workers", "5", "--no-compile", "--filter", MAIN_MODELS)
    small = [stem for stem in stems if stem not in MODEL_STEMS]
    return [
        Part("compile models", (*models, "models"), COMPILE_MODELS_S, dry, beside=True, expected_s=35),
        Part(
            "compile",
            (*run, *flags, *small),
            COMPILE_S,
            dry,
            beside=True,
            sliced=True,
            expected_s=90,
            share=TESTS_SHARE,
        ),
    ]


MAIN_MODELS = "^AutoencoderVidTok |^Latte-XL/2 step|^Wan 1.3B|^AutoencoderKLWan decode 81"


def _tools(out: Path) -> list[Part]:
    # CUDA C++ first, by each tool: half a minute; Triton's kernels are compiled before the tool looks on
    sanitizers = [
        Part(
            f"sanitizer {tool}" + ("" if backend == "cuda" else f" {backend}"),
            _module("benchmarks.sanitize", tool, "--backend", backend),
            300,
            _module("benchmarks.sanitize", "--plain", "--backend", "cpp", "--device", "cpu")
            if tool == "memcheck"
            else None,
            needs="compute-sanitizer",
            expected_s=expected,
        )
        for tool, backend, expected in (
            ("memcheck", "cuda", 35),
            ("racecheck", "cuda", 35),
            ("synccheck", "cuda", 35),
            ("memcheck", "triton", 120),
        )
    ]
    # Clocks stay as they are: by default ncu fixes them.
    profile = ("ncu", "--clock-control", "none", "--target-processes", "all", "--csv", "--page", "raw")
    counters = ("--section", "SpeedOfLight", "--section", "Occupancy", "--section", "SchedulerStats")
    kernels = ("--kernel-name-base", "demangled", "--kernel-name", "regex:vidkernels|_kernel", "--launch-count", "60")
    once = _module("benchmarks", "run", "fsq", "channel_norm", "qk_norm_rope", "--compile-only", "--no-compile")
    log = ("--log-file", str(out / "ncu.csv"))
    ncu = Part("ncu", (*profile, *counters, *kernels, *log, *once, "--workers", "1"), 120, needs="ncu", expected_s=60)
    return [*sanitizers, ncu]


def parts(out: Path, flags: tuple[str, ...] = (), commit: str | None = None) -> list[Part]:
    """The whole list in order of value. ``flags`` go to every ``benchmarks run``."""
    registry.load()
    known = registry.stems()
    order = [s for s in STEM_ORDER if s in known]
    order += [s for s in known if s not in STEM_ORDER and s not in LAST_STEMS]
    tests, large, slow = _tests(out, commit)
    build = Part(
        "build",
        (PYTHON, "setup.py", "build_ext", "--inplace"),
        540,
        (PYTHON, "setup.py", "--version"),
        {"TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", _arch()), "VIDKERNELS_FORCE_BUILD": "1"},
        expected_s=170,
        vital=True,
    )
    doctor = _module("vidkernels", "doctor")
    limits = _module("benchmarks", "limits", "--out", str(out))
    demo = _module("vidkernels", "demo", "--no-micro", "--out", str(out / "demo"))
    smoke = _module("benchmarks.smoke")
    found = [
        build,
        Part("smoke", smoke, 60, (*smoke, "--device", "cpu"), expected_s=10, vital=True),
        *_compile(order, flags),
        tests,
    ]
    # behind the first ones, stems that were never measured here come first
    order[6:] = sorted(order[6:], key=lambda stem: (out / f"{stem}.json").exists())
    benchmarks = [_benchmarks(out, s, commit, flags) for s in order]
    found += [*benchmarks[:6], Part("limits", limits, 120, limits, timed=True, expected_s=12), *benchmarks[6:]]
    found += [large, *_tools(out), Part("doctor", (*doctor, "--device", "cuda"), 180, doctor, expected_s=90)]
    found += [_benchmarks(out, s, commit, flags) for s in LAST_STEMS if s in known]
    found += [Part("demo", demo, 300, expected_s=60), slow]
    return [*found, Part("tune", _module("vidkernels", "tune", "--out", str(out / "configs")), 540)]
