# SPDX-License-Identifier: Apache-2.0
"""Other libraries in the tables: finding them, and carrying them to a machine without a network.

python -m benchmarks peers list                      what is here
python -m benchmarks peers pack core --out core.tar.xz      where there is a network
python -m benchmarks peers unpack core.tar.xz               where there is none
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import machine
from vidkernels.errors import OptionError

# Where unpacked peers live; `python -m benchmarks device` puts it on the path of what it starts.
SITE = machine.ROOT / "build" / "peers"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
# module -> (distribution, what it competes in)
KNOWN = {
    "vector_quantize_pytorch": ("vector-quantize-pytorch", "fsq, lfq"),
    "liger_kernel": ("liger-kernel", "adaln_zero, channel_norm, qk_norm_rope"),
    "cudnn": ("nvidia-cudnn-frontend", "causal_conv3d, adaln_zero"),
    "flash_attn": ("flash-attn", "varlen_attention"),
    "flash_attn_interface": ("flash-attn-3", "varlen_attention"),
    "flash_attn.cute": ("flash-attn-4", "varlen_attention"),
    "xformers": ("xformers", "varlen_attention"),
    "flashinfer": ("flashinfer-python", "varlen_attention, qk_norm_rope"),
    "diffusers": ("diffusers", "whole models"),
}
# Installed without their dependencies: torch, triton, numpy and the like are on the machine and must stay as they are.
SETS: dict[str, tuple[str, ...]] = {
    "core": (
        "liger-kernel==0.8.5",
        "vector-quantize-pytorch==1.32.0",
        "einops",
        "einx==0.4.3",
        "frozendict",
        "loguru",
        "torch-einops-utils",
        "nvidia-cudnn-frontend==1.32.0",
        "diffusers==0.42.1",
        "importlib-metadata",
        "zipp",
        "xformers==0.0.35",
    ),
    # The newest combination whose binaries stay under 64 MiB when stripped and packed.
    "flash4": (
        "flash-attn-4==4.0.0b5",
        "nvidia-cutlass-dsl==4.4.2",
        "nvidia-cutlass-dsl-libs-base==4.4.2",
        "quack-kernels==0.3.7",
        "apache-tvm-ffi",
        "torch-c-dlpack-ext",
        "einops",
    ),
}

_absent: dict[str, str] = {}


def find(module: str) -> ModuleType | None:
    """Import a peer, or None with the reason kept for :func:`table`. For the ``peers=`` of a case."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever a foreign package raises while it is imported, the row is left out
        _absent[module] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return None


def table() -> list[tuple[str, str, str]]:
    """(module, version or why it is missing, what it competes in) of every known peer."""
    rows = []
    for module, (distribution, stems) in KNOWN.items():
        found = find(module)
        if found is None:
            rows.append((module, _absent[module], stems))
            continue
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            version = str(getattr(found, "__version__", "version unknown"))
        rows.append((module, version, stems))
    return rows


def pack(name: str, out: Path, python: str) -> float:
    """Install a set into a folder for another Python, strip its binaries and pack it. Returns MiB."""
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--target", str(site), "--python-version", python, "--implementation", "cp"]
        command += [word for platform in PLATFORMS for word in ("--platform", platform)]
        subprocess.run([*command, *SETS[name]], check=True)
        strip = shutil.which("strip")
        for binary in site.rglob("*.so*") if strip else ():
            subprocess.run([str(strip), "--strip-unneeded", str(binary)], check=False, capture_output=True)
        with lzma.open(out, "wb", preset=6) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(site, arcname=".", filter=_without_caches)
    return out.stat().st_size / 2**20


def _without_caches(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return None if "__pycache__" in member.name else member


def unpack(archive: Path, site: Path = SITE) -> None:
    """Unpack a set beside others; later sets overwrite equal files."""
    site.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive, "r:xz") as packed:
            packed.extractall(site, filter="data")
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise OptionError("archives", "files that `peers pack` wrote", f"{archive} ({error})") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m benchmarks peers``."""
    commands = parser.add_subparsers(dest="peers_command", required=True)
    commands.add_parser("list", help="known peers, their versions, or why they cannot be imported")
    one = commands.add_parser("pack", help="download a set for another machine (needs a network)")
    one.add_argument("set", choices=sorted(SETS))
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--python", default="3.12", help="Python version there")
    two = commands.add_parser("unpack", help=f"unpack a set into {SITE.relative_to(machine.ROOT)}")
    two.add_argument("archives", type=Path, nargs="+")
    parser.set_defaults(function=main)


def main(arguments: Any) -> int:
    """``python -m benchmarks peers``."""
    if arguments.peers_command == "pack":
        print(f"{arguments.out}: {pack(arguments.set, arguments.out, arguments.python):.1f} MiB")
    elif arguments.peers_command == "unpack":
        for archive in arguments.archives:
            unpack(archive)
        print(f"export PYTHONPATH={SITE}:$PYTHONPATH")
    else:
        for module, version, stems in table():
            print(f"{module:26} {stems:40} {version}")
    return 0
