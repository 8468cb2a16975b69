# SPDX-License-Identifier: Apache-2.0
"""What the numbers were measured on. Names no host, user or path."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from vidkernels import _env
from vidkernels._conv.aten import tiles_on_cpu

ROOT = Path(__file__).resolve().parent.parent


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout: VIDKERNELS_COMMIT where it is set (a copy without .git), else git's answer."""
    if told := _env.text("VIDKERNELS_COMMIT"):
        return told

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "--short=10", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def _driver() -> str | None:
    # a second where no process keeps the driver loaded, and every stem asks
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def device_name(device: torch.device) -> str:
    """The name of the chip, such as "NVIDIA H200"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def slug(device: torch.device) -> str:
    """The device's folder under benchmarks/results, such as "nvidia-h200"."""
    name = re.sub(r"\(r\)|\(tm\)|@.*", " ", device_name(device).lower())
    short = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return short if device.type == "cuda" else f"cpu-{short}"


def facts(device: torch.device) -> dict[str, Any]:
    """The machine line as a dict, for the JSON."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "device_type": device.type,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "vidkernels": _version("vidkernels"),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30),
            "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20),
        }
    else:
        found["cpu_capability"] = torch.backends.cpu.get_cpu_capability() + " AMX" * tiles_on_cpu()
    return found


def short(found: dict[str, Any]) -> str:
    """The machine in a word or two, for the head of a column: H100, or the CPU's instructions."""
    if found["device_type"] == "cpu":
        return f"CPU {found.get('cpu_capability', '')}".strip()
    return next((word for word in str(found["device"]).split() if any(c.isdigit() for c in word)), found["device"])


def line(found: dict[str, Any]) -> str:
    """The machine in one line, for tables and plots."""
    first = found["device"]
    if found["device_type"] == "cpu":
        first += f" ({found['cores']} cores, {found['threads']} threads, {found.get('cpu_capability', '?')})"
    parts = [first, f"torch {found['torch']}"]
    parts += [f"{name} {found[name]}" for name in ("triton", "cuda", "cudnn", "driver") if found.get(name)]
    return ", ".join([*parts, f"commit {found['commit']}", found["date"]])
