# SPDX-License-Identifier: Apache-2.0
"""The build's commands: folders with spaces, compilers of several words, and flags of the environment."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import ROOT

NINJA = shutil.which("ninja")
HAS_CXX = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(not (NINJA and HAS_CXX), reason="needs ninja and a C++ compiler")
ODD = "a $HOME checkout"  # a space for the shell, a dollar for shell and ninja


def load(csrc: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("vidkernels_build_commands", csrc / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def plan_of(native: ModuleType, folder: Path, toolchain: object = None, **changes: object) -> object:
    """A plan without stems: three small files and the facts."""
    include, lib, version = native.torch_paths()
    values = {
        "toolchain": toolchain or native.Toolchain.find(), "output": folder / "out", "work": folder / "work", "stems": (),
        "arch_list": "8.0", "cuda": False, "torch_include": include, "torch_lib": lib, "torch_version": version,
        "pybind11_include": str(folder / "pybind11"), **changes,
    }  # fmt: skip
    return native.Plan(**values)


def commands(native: ModuleType, plan: object) -> dict[str, list[str]]:
    """Words of every command, as the shell would split them, by the source that they compile or what they link."""
    path = native.write_ninja(plan)
    run = subprocess.run([NINJA, "-f", str(path), "-t", "commands"], capture_output=True, text=True, check=True)
    lines = [shlex.split(line) for line in run.stdout.splitlines()]
    return {Path(words[words.index("-c" if "-c" in words else "-o") + 1]).name: words for words in lines}


def test_a_checkout_in_a_folder_with_a_space_builds(tmp_path: Path) -> None:
    folder = tmp_path / ODD
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    native = load(folder / "csrc")
    real = plan_of(native, folder)
    (folder / "torch").mkdir()
    for name, target in (("include", real.torch_include), ("lib", real.torch_lib)):
        (folder / "torch" / name).symlink_to(target)
    plan = plan_of(native, folder, torch_include=folder / "torch/include", torch_lib=folder / "torch/lib")
    native.write_ninja(plan)
    target = plan.output / "libvidkernels_cpu.so"
    run = subprocess.run([NINJA, "-C", str(plan.work), str(target)], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and target.is_file(), run.stdout[-3000:]
    again = subprocess.run([NINJA, "-C", str(plan.work), str(target)], capture_output=True, text=True, check=False)
    assert "no work to do" in again.stdout  # what was included has been understood, too


def test_kernels_are_linked_behind_those_of_lesser_instruction_sets(tmp_path: Path) -> None:
    """Of inline functions of the C++ library, the linker keeps the first: it must run on every processor that calls it."""
    native = load(ROOT / "csrc")
    found = commands(native, plan_of(native, tmp_path, stems=("fsq", "lfq")))["libvidkernels_cpu.so"]
    tags = [Path(word).name.split(".")[-2] for word in found if word.endswith(".o")]
    order = ["cpu", *native.cpu_variants(native.Toolchain.find().cxx)]
    assert tags == sorted(tags, key=order.index) and set(tags) == set(order)


def test_every_path_is_one_word_of_its_command(tmp_path: Path) -> None:
    folder = tmp_path / ODD
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    native = load(folder / "csrc")
    nvcc = executable(folder / "cuda/bin/nvcc", "echo 'release 13.0, V13.0.1'")
    compiler = executable(folder / "bin/g++", "exit 0")
    toolchain = native.Toolchain((str(compiler),), str(nvcc), folder / "cuda")
    headers = {"torch_include": folder / "torch", "torch_lib": folder / "lib", "commit": "it's"}
    found = commands(native, plan_of(native, folder, toolchain, stems=("fsq",), cuda=True, **headers))
    include = f"-I{folder}/csrc"
    kernel, binding, facts = (found[name] for name in ("fsq_fwd.cu", "fsq_binding_cuda.cpp", "bindings.cpp"))
    assert kernel[0] == str(nvcc) and binding[0] == facts[0] == str(compiler)
    assert include in kernel and include in binding and kernel[kernel.index("-ccbin") + 1] == str(compiler)
    paths = [binding[place + 1] for place, word in enumerate(binding) if word == "-isystem"]
    assert paths == [f"{folder}/torch", f"{folder}/torch/torch/csrc/api/include", f"{folder}/cuda/include"]
    assert f"{folder}/pybind11" in facts and '-DVK_BUILD_COMMIT="it\'s"' in facts
    linked = found["libvidkernels_cuda.so"]
    assert {f"-L{folder}/lib", f"-L{folder}/cuda/lib64"} <= set(linked)


@pytest.mark.parametrize(
    ("named", "words", "host"),
    [
        ("g++-9", ["BIN/g++-9"], ["-ccbin", "BIN/g++-9"]),
        ("ccache g++-9", ["BIN/ccache", "g++-9"], ["-ccbin", "BIN/g++-9"]),
        ("g++-9 -m64 '-DA=b c'", ["BIN/g++-9", "-m64", "-DA=b c"],
         ["-ccbin", "BIN/g++-9", "-Xcompiler", "-m64", "-Xcompiler", "-DA=b c"]),
        ("env -i A=1 ccache g++-9 -m64", ["BIN/env", "-i", "A=1", "ccache", "g++-9", "-m64"],
         ["-ccbin", "BIN/g++-9", "-Xcompiler", "-m64"]),
        ("BIN/g++-9", ["BIN/g++-9"], ["-ccbin", "BIN/g++-9"]),
        ("ccache", ["BIN/c++"], ["-ccbin", "BIN/c++"]),
        ("ccache missing++", ["BIN/c++"], ["-ccbin", "BIN/c++"]),
        ("", ["BIN/c++"], ["-ccbin", "BIN/c++"]),
    ],
)  # fmt: skip
def test_compilers_of_several_words(
    named: str, words: list[str], host: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path / "my tools")
    for name in ("g++-9", "ccache", "env", "c++"):
        executable(Path(folder) / name, "exit 0")
    monkeypatch.setenv("PATH", folder)
    monkeypatch.setenv("CXX", named.replace("BIN", folder))
    native = load(ROOT / "csrc")
    found = native.Toolchain.find().cxx
    assert list(found) == [word.replace("BIN", folder) for word in words]
    assert native.host_flags(found) == [word.replace("BIN", folder) for word in host]


def test_an_unclosed_quote_is_told_by_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ '-DA")
    with pytest.raises(SystemExit, match="CXX: expected words as for a shell"):
        load(ROOT / "csrc").Toolchain.find()


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("pybind11", "setuptools")), reason="needs pybind11, setuptools"
)
def test_flags_of_the_environment_reach_compiler_and_linker_behind_ours(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = f"""{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@" >> {log}
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done"""
    compiler = executable(tmp_path / "own++", script)
    env = {
        **os.environ, "CXX": f"{compiler} -m64", "CXXFLAGS": "-O0 '-DA=b c'", "LDFLAGS": "-Wl,-z,now",
        "VIDKERNELS_OPS": "fsq", "VIDKERNELS_SKIP_CUDA_BUILD": "1",
    }  # fmt: skip
    folders = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    calls = [
        words for words in map(json.loads, log.read_text().splitlines()) if "-" not in words and os.devnull not in words
    ]
    compiled, linked = ([words for words in calls if ("-c" in words) == kind] for kind in (True, False))
    assert len(linked) == 2 and len(compiled) > 5
    assert all(words[0] == "-m64" for words in calls)
    for words in compiled:
        assert words.index("-O0") > words.index("-O3") and "-DA=b c" in words
        assert not any(word.startswith("-mavx") for word in words[words.index("-O0") :])
    assert all("-Wl,-z,now" in words and "-O0" not in words for words in linked)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_only_the_package_s_own_repository_names_the_commit(tmp_path: Path) -> None:
    """Not one around unpacked sources, such as that of a project which carries them."""
    sources = tmp_path / "project" / "vendored"
    (sources / "vidkernels").mkdir(parents=True)
    for name in ("setup.py", "csrc/build.py", "vidkernels/_env.py"):
        (sources / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, sources / name)
    code = "import sys; sys.argv = ['setup.py', '--version']; import setup; print('<' + setup._commit() + '>')"

    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # as hooks set them

    def output(*command: str, folder: Path = sources, **env: str) -> str:
        options: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
        return subprocess.run(command, cwd=folder, env={**clean, **env}, **options).stdout.strip()

    def commit(**env: str) -> str:
        return output(sys.executable, "-c", code, **env).rpartition("\n")[2]

    def commit_in(folder: Path) -> str:
        person = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        output("git", "init", "-q", folder=folder)
        output("git", *person, "commit", "-q", "--allow-empty", "-m", "first", folder=folder)
        return output("git", "rev-parse", "--short", "HEAD", folder=folder)

    assert commit() == "<>"
    commit_in(tmp_path / "project")
    assert commit() == "<>"
    assert commit(PATH="") == "<>"  # without git
    own = commit_in(sources)
    assert own and commit() == f"<{own}>"


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools")
def test_everything_that_a_build_leaves_is_recorded(tmp_path: Path) -> None:
    folder = tmp_path / "lib" / "vidkernels"
    folder.mkdir(parents=True)
    for name in ("libvidkernels_cpu.so", "_C.cpython-311.so", "_build_info.json", "other.json"):
        (folder / name).touch()
    code = (
        "import sys; sys.argv = ['setup.py', '--version']; import setup; from setuptools.dist import Distribution\n"
        f"command = setup.BuildNative(Distribution()); command.build_lib = {str(folder.parent)!r}\n"
        "print(*command.get_outputs(), sep='\\n')"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {Path(line).name for line in run.stdout.splitlines()[-3:]}
    assert names == {"libvidkernels_cpu.so", "_C.cpython-311.so", "_build_info.json"}
