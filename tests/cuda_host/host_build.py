# SPDX-License-Identifier: Apache-2.0
"""Builds what the host tests run: CUDA kernels on the CPU under the SIMT shim, and C++ kernels, both sanitized.

Either way the result is a `libvidkernels_cpu.so` that registers a stem's bare ops for CPU tensors, so that one file of
cases (`case_<stem>.py`) exercises `torch.ops.vidkernels.*` with whichever kernels the library holds.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
SANITIZE = (
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)
# -O1 keeps CUDA's headers affordable (3 s a file) and line numbers true.
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", *SANITIZE)


def native() -> ModuleType:
    """`csrc/build.py`, the one place that knows flags and torch's folders."""
    spec = importlib.util.spec_from_file_location("vidkernels_native_build", CSRC / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def cuda_include() -> Path | None:
    """A folder with cuda_bf16.h and cuda_runtime.h: the toolkit's, the runtime wheel's, or the copy inside Triton."""
    candidates = []
    toolchain = native().Toolchain.find()
    if toolchain.cuda_home is not None:
        candidates.append(Path(toolchain.cuda_home) / "include")
    for package, parts in (
        ("nvidia", ("cu13/include", "cuda_runtime/include")),
        ("triton", ("backends/nvidia/include",)),
    ):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            candidates += [Path(root) / part for part in parts]
    return next((c for c in candidates if (c / "cuda_bf16.h").exists() and (c / "cuda_runtime.h").exists()), None)


def missing() -> str | None:
    """None if the host tests can be built here, else the reason."""
    if shutil.which("g++") is None:
        return "g++ is not on PATH"
    probe = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    if not Path(probe.stdout.strip()).is_absolute():
        return "g++ has no address sanitizer (libasan.so)"
    if cuda_include() is None:
        return "no CUDA headers: neither a toolkit, nor the nvidia-cuda-runtime package, nor Triton's copy"
    return None


def shim_flags() -> list[str]:
    """Flags that make g++ compile a `.cu` file for the shim."""
    return [
        *FLAGS,
        "-DVK_SIMT_SHIM",
        "-DVK_SM90A",
        f"-I{HERE / 'override'}",
        f"-I{HERE}",
        f"-I{CSRC}",
        "-isystem",
        str(cuda_include()),
    ]


def run(command: Sequence[str | Path]) -> None:
    """Run a compiler; on failure raise with what it said."""
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{Path(str(command[-1])).name}: the compiler failed\n{result.stderr[:8000]}")


def compile_all(sources: Sequence[tuple[Path, Sequence[str]]], work: Path) -> list[Path]:
    """Compile (source, extra flags) pairs side by side and return the objects."""
    work.mkdir(parents=True, exist_ok=True)

    def one(job: tuple[int, tuple[Path, Sequence[str]]]) -> Path:
        index, (source, flags) = job
        target = work / f"{index}_{source.stem}.o"
        run(["g++", *flags, "-x", "c++", "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 8)) as pool:
        return list(pool.map(one, enumerate(sources)))


def _torch_flags() -> list[str]:
    include, _, _ = native().torch_paths()
    parts = (include, include / "torch/csrc/api/include")
    return [f for part in parts for f in ("-isystem", str(part))] + [f"-DTORCH_TARGET_VERSION={native().TORCH_TARGET}"]


def _link(objects: Sequence[Path], target: Path) -> Path:
    _, library, _ = native().torch_paths()
    run(["g++", "-shared", *SANITIZE, *objects, f"-L{library}", "-ltorch_cpu", "-lc10", "-o", target])
    return target.parent


def build_cuda(stems: Sequence[str], work: Path) -> Path:
    """CUDA kernels and their bindings, compiled for the CPU. Returns the folder for VIDKERNELS_LIBRARY_DIR."""
    flags = shim_flags()
    sources: list[tuple[Path, Sequence[str]]] = [(HERE / name, flags) for name in ("simt.cpp", "simt_warpgroup.cpp")]
    for stem in stems:
        sources += [(path, flags) for path in sorted((CSRC / stem).glob("*.cu"))]
        sources += [(path, [*flags, *_torch_flags()]) for path in sorted((CSRC / stem).glob("*_binding_cuda.cpp"))]
    return _link(compile_all(sources, work / "objects"), work / "libvidkernels_cpu.so")


def variants() -> list[str]:
    """Instruction sets of the C++ kernels that this processor runs, the widest last."""
    build = native()
    if not build._is_x86():
        return ["cpu_default"]
    import torch

    names = list(build.cpu_variants(("g++",)))
    widest = {"DEFAULT": 1, "AVX2": 2}.get(torch.backends.cpu.get_cpu_capability(), 3)
    return names[: widest + torch.cpu._is_avx512_bf16_supported() if widest == 3 else widest]


def build_cpp(stems: Sequence[str], work: Path, variant: str) -> Path:
    """The C++ kernels for one instruction set. Returns the folder for VIDKERNELS_LIBRARY_DIR."""
    build = native()
    flags = build.X86_VARIANTS[variant] if build._is_x86() else ()
    # Without VK_CPU_HAS_X86_VARIANTS there is one copy, under the default's name, for whatever the flags say.
    tiles = ["-DVK_CPU_HAS_AMX", "-DVK_EMULATE_TILES"] if variant == "cpu_avx512_bf16" else []
    common = [*FLAGS, f"-I{CSRC}", *build.KERNEL_FLAGS, *flags, *tiles]
    sources: list[tuple[Path, Sequence[str]]] = [
        (CSRC / "common" / name, [*common, *_torch_flags()]) for name in ("parallel.cpp", "cpu_capability.cpp")
    ]
    for stem in stems:
        for path in sorted((CSRC / stem).glob("*_cpu.cpp")):
            binding = path.name.endswith("_binding_cpu.cpp")
            sources.append((path, [*common, *_torch_flags()] if binding else common))
    return _link(compile_all(sources, work / "objects"), work / "libvidkernels_cpu.so")


def environment(library: Path, kernels: str) -> dict[str, str]:
    """Environment of a process that loads such a library: the sanitizer's runtime must come first in it."""

    def runtime(name: str) -> str:
        return subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()

    return {
        **os.environ,
        # libstdc++ too, or the sanitizer's hook for exceptions finds nothing to forward to.
        "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libstdc++.so')}",
        # Python and torch keep memory to the end of the process: leaks are not looked for.
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:verify_asan_link_order=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "VIDKERNELS_LIBRARY_DIR": str(library),
        "VIDKERNELS_HOST_KERNELS": kernels,
        # Where processors have no tiles, libraries for the widest instruction set emulate them.
        "VIDKERNELS_HOST_TILES": "1" if kernels == "cpp" else "",
        "OMP_NUM_THREADS": "2",
    }
