# SPDX-License-Identifier: Apache-2.0
"""Build of vidkernels. What is compiled follows from what is found: nvcc and a C++ compiler -> CUDA and C++ kernels;
a C++ compiler -> C++ kernels; neither -> a pure-Python install whose Triton kernels still work on a GPU.
Flags and sources: `csrc/build.py`. Environment variables: `ENV.md`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _load(name: str, path: Path) -> ModuleType:
    """A file of the checkout as a module; the package itself must not be imported here, since it needs torch."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


native = _load("vidkernels_build", ROOT / "csrc" / "build.py")
env = _load("vidkernels_env", ROOT / "vidkernels" / "_env.py")
TOOLCHAIN = native.Toolchain.find()


def _say(text: str) -> None:
    print(f"vidkernels: {text}", file=sys.stderr)


def _wants_cpp() -> bool:
    """Whether anything is compiled; explains the smaller builds in one line each."""
    if env.flag("VIDKERNELS_SKIP_CPU_BUILD"):
        _say("VIDKERNELS_SKIP_CPU_BUILD=1: pure-Python install, no kernels are compiled.")
        return False
    if TOOLCHAIN.cxx is None:
        if env.flag("VIDKERNELS_FORCE_BUILD"):
            raise SystemExit(
                "vidkernels: VIDKERNELS_FORCE_BUILD=1, but no C++ compiler is on PATH (apt install g++, or set CXX)."
            )
        _say(
            "no C++ compiler on PATH: pure-Python install. Triton kernels still work on a GPU; references serve the rest."
        )
        return False
    return True


def _wants_cuda() -> bool:
    if env.flag("VIDKERNELS_SKIP_CUDA_BUILD"):
        _say("VIDKERNELS_SKIP_CUDA_BUILD=1: C++ kernels only.")
        return False
    if TOOLCHAIN.nvcc is None:
        if env.flag("VIDKERNELS_FORCE_BUILD"):
            raise SystemExit(
                "vidkernels: VIDKERNELS_FORCE_BUILD=1, but nvcc is not on PATH (install the CUDA toolkit, or set CUDA_HOME)."
            )
        _say(
            "nvcc is not on PATH: C++ kernels for the CPU are built, CUDA kernels are not (set CUDA_HOME to build them)."
        )
        return False
    return True


def _commit() -> str:
    """Short hash of the checkout; empty outside of one, and in sources that were unpacked inside another repository."""
    git = ["git", "-C", str(ROOT), "rev-parse"]
    try:
        top = subprocess.run([*git, "--show-toplevel"], capture_output=True, text=True, check=False).stdout.strip()
        if not top or Path(top).resolve() != ROOT:
            return ""
        return subprocess.run([*git, "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # git is not installed
        return ""


class BuildNative(build_ext):
    """Runs the ninja build of `csrc/build.py` into the package's folder."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        output = ROOT / "vidkernels" if in_place else Path(self.build_lib).resolve() / "vidkernels"
        try:
            include, lib, version = native.torch_paths()
            import pybind11
        except ModuleNotFoundError as error:
            raise SystemExit(
                f"vidkernels: the build needs the Python package {error.name or error}, which this environment lacks. Run "
                "`pip install torch pybind11 ninja 'setuptools>=77' wheel` first and then `pip install . --no-build-isolation`, "
                "or leave out --no-build-isolation."
            ) from None
        stems = tuple(name.strip() for name in env.text("VIDKERNELS_OPS").split(",") if name.strip()) or native.STEMS
        unknown = sorted(set(stems) - set(native.STEMS))
        if unknown:
            raise SystemExit(
                f"vidkernels: VIDKERNELS_OPS names {', '.join(unknown)}; known stems: {', '.join(native.STEMS)}."
            )
        plan = native.Plan(
            toolchain=TOOLCHAIN,
            output=output,
            work=Path(self.build_temp).resolve() / "vidkernels",
            stems=stems,
            arch_list=env.text("TORCH_CUDA_ARCH_LIST"),
            cuda=_wants_cuda(),
            torch_include=include,
            torch_lib=lib,
            torch_version=version,
            pybind11_include=pybind11.get_include(),
            commit=_commit(),
            extra_cxx_flags=native.split_words("CXXFLAGS", env.text("CXXFLAGS")),
            extra_link_flags=native.split_words("LDFLAGS", env.text("LDFLAGS")),
        )
        jobs = native.max_jobs(env.text("MAX_JOBS"))
        _say(
            f"building {', '.join(stems)} with {' '.join(TOOLCHAIN.cxx or ())}"
            + (f", nvcc for {plan.arch_list}" if plan.cuda else "")
            + f", {jobs} jobs"
        )
        native.build(plan, jobs, verbose=bool(self.verbose and self.verbose > 1))

    def get_outputs(self) -> list[str]:
        """What `install --record` lists."""
        folder = Path(self.build_lib) / "vidkernels"
        return [str(path) for pattern in ("*.so", "_build_info.json") for path in sorted(folder.glob(pattern))]


setup(
    packages=[*find_packages(include=["vidkernels", "vidkernels.*"]), "vidkernels._python_ref"],
    package_dir={"vidkernels._python_ref": "python_ref"},
    ext_modules=[Extension("vidkernels._C", ["csrc/bindings.cpp"])] if _wants_cpp() else [],
    cmdclass={"build_ext": BuildNative},
)
