# SPDX-License-Identifier: Apache-2.0
"""The native build: which sources, which flags, one ninja file. Used by `setup.py` and by the tests that compile kernels.

Outputs: `libvidkernels_cpu.so` and `libvidkernels_cuda.so` (ops on torch's stable ABI; they serve every torch >= 2.10
and every Python) and the pybind11 module `_C` (facts about the build). nvcc works against a CPU-only torch, since only
headers are used. Everything here needs the standard library alone, except where `torch` is looked up for its headers.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CSRC = Path(__file__).resolve().parent
STEMS = (
    "fsq", "lfq", "causal_conv3d", "alpha_blend", "channel_norm", "adaln_zero", "gated_activation", "qk_norm_rope",
    "varlen_attention",
)  # fmt: skip
CXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas")
# Vectorising loops with exp, sqrt or division needs the C library's errno and traps out of the way; results stay IEEE.
KERNEL_FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd")
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = (*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
BFLOAT16_FLAG = "-mavx512bf16"  # GCC 10 and Clang 9 are the first that know it
X86_VARIANTS = {
    "cpu_default": ("-O1",),  # processors of before 2013: half the time to compile
    "cpu_avx2": AVX2_FLAGS,
    "cpu_avx512": AVX512_FLAGS,
    "cpu_avx512_bf16": (*AVX512_FLAGS, BFLOAT16_FLAG),
}
NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
)
# Programs that stand before the compiler's own name in CXX. nvcc takes the compiler alone.
WRAPPERS = frozenset({"ccache", "sccache", "distcc", "icecc", "env"})
# 2.10 is the first torch whose stable ABI has everything the bindings use.
TORCH_TARGET = "0x020a000000000000"


@dataclass(frozen=True)
class Toolchain:
    """Compilers found on this machine; None where missing. The words of `cxx` are wrappers, the compiler and its flags."""

    cxx: tuple[str, ...] | None
    nvcc: str | None
    cuda_home: Path | None

    @classmethod
    def find(cls) -> Toolchain:
        """Look at CXX, CUDA_HOME and PATH."""
        named = os.environ.get("CXX", "").strip()
        words = (named,) if shutil.which(named) else split_words("CXX", named)  # a path may hold spaces
        candidates = (words, ("c++",), ("g++",), ("clang++",))
        cxx = next((found for candidate in candidates if (found := _resolved(candidate))), None)
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        nvcc = shutil.which(str(Path(home) / "bin" / "nvcc")) if home else shutil.which("nvcc")
        cuda_home = _cuda_home(nvcc) if nvcc else None
        return cls(cxx, nvcc if cxx and cuda_home else None, cuda_home)


def split_words(name: str, text: str) -> tuple[str, ...]:
    """Words of a variable such as CXXFLAGS, split and unquoted as a shell does."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise SystemExit(f"{name}: expected words as for a shell, got {text!r} ({error}).") from None


def _compiler_at(words: Sequence[str]) -> int:
    """Place of the compiler proper: behind wrappers, their options and assignments, as in `env A=1 ccache g++ -m64`."""
    others = (Path(word).name in WRAPPERS or word.startswith("-") or "=" in word for word in words)
    return next((place for place, other in enumerate(others) if not other), len(words))


def _resolved(words: Sequence[str]) -> tuple[str, ...] | None:
    """The words with the first one's full path; None where it or the compiler is not on PATH."""
    place = _compiler_at(words)
    first = shutil.which(words[0]) if words else None
    return (first, *words[1:]) if first and place < len(words) and shutil.which(words[place]) else None


def host_flags(cxx: Sequence[str]) -> list[str]:
    """nvcc's options for the host compiler: its path, and the flags that CXX has behind it."""
    place = _compiler_at(cxx)
    flags = [part for flag in cxx[place + 1 :] for part in ("-Xcompiler", flag)]
    return ["-ccbin", shutil.which(cxx[place]) or cxx[place], *flags]


def _cuda_home(nvcc: str) -> Path | None:
    """Toolkit folder of an nvcc, which may be a wrapper script: ask it where its headers are."""
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull], capture_output=True, text=True, check=False
    )
    for line in dry.stderr.splitlines():
        if "TOP=" in line:
            return Path(line.partition("TOP=")[2].strip()).resolve()
    return Path(nvcc).resolve().parent.parent


def cuda_version(nvcc: str) -> str:
    """`13.0` of `nvcc --version`."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return text.partition("release ")[2].partition(",")[0]


def gencode_flags(arch_list: str) -> list[str]:
    """nvcc's -gencode flags for a TORCH_CUDA_ARCH_LIST such as `8.0;9.0a;10.0a+PTX`."""
    flags = []
    for item in arch_list.replace(" ", ";").replace(",", ";").split(";"):
        name, _, ptx = item.strip().partition("+")
        number = name.replace(".", "")
        if not number:
            continue
        if not number.rstrip("af").isdigit():
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 10.0a+PTX, got {item!r}.")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def arch_defines(arch_list: str) -> str:
    """VK_SM90A where the list has 9.0a: kernels for it alone are then built, and their ops registered."""
    return "-DVK_SM90A" if any(flag.endswith("code=sm_90a") for flag in gencode_flags(arch_list)) else ""


def max_jobs(stated: str = "") -> int:
    """Parallel compilers: MAX_JOBS, else the cores this process may use, at most one per 2 GB of its memory limit."""
    if stated:
        return max(1, int(stated))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(memory_limit() / 2e9)))


def memory_limit() -> float:
    """Bytes this process may use: the container's limit or the machine's free memory, whichever is less."""
    limits = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(float(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    try:
        rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(float(rows["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        limits.append(8e9)
    return min(limits)


@dataclass(frozen=True)
class Plan:
    """What to build, where."""

    toolchain: Toolchain
    output: Path
    work: Path
    stems: tuple[str, ...]
    arch_list: str
    cuda: bool
    torch_include: Path
    torch_lib: Path
    torch_version: str
    pybind11_include: str
    commit: str = ""
    extra_cxx_flags: tuple[str, ...] = field(default=())
    extra_link_flags: tuple[str, ...] = field(default=())


def torch_paths() -> tuple[Path, Path, str]:
    """Include folder, library folder and version of the installed torch, without importing it (2 s and its libraries)."""
    from importlib import metadata, util

    spec = util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("torch")
    root = Path(spec.submodule_search_locations[0])
    return root / "include", root / "lib", metadata.version("torch")


def _is_x86() -> bool:
    return platform.machine().lower() in {"x86_64", "amd64"}


def knows_amx(cxx: Sequence[str]) -> bool:
    """Whether compiler and assembler know the tile instructions, which kernels for AVX512_BF16 spell out."""
    text = 'int main() { __asm__ volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); }'
    if not _is_x86() or "cpu_avx512_bf16" not in cpu_variants(cxx):
        return False
    with tempfile.TemporaryDirectory() as folder:
        probe = [*cxx, "-x", "c++", "-c", "-", "-o", str(Path(folder) / "probe.o")]
        return subprocess.run(probe, input=text.encode(), capture_output=True, check=False).returncode == 0


def cpu_variants(cxx: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The copies of each kernel file that this processor family has and this compiler can make, with their flags."""
    if not _is_x86():
        return {"cpu_default": ()}
    probe = [*cxx, BFLOAT16_FLAG, "-x", "c++", "-fsyntax-only", os.devnull]
    known = subprocess.run(probe, capture_output=True, check=False).returncode == 0
    return {name: flags for name, flags in X86_VARIANTS.items() if known or BFLOAT16_FLAG not in flags}


class _Ninja:
    """A ninja file under construction."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.5"]

    def rule(self, name: str, command: str, deps: bool) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", "  description = $out"]
        if deps:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, output: Path, rule: str, inputs: list[Path], **variables: str) -> Path:
        escaped = " ".join(_escape(path) for path in inputs)
        self.lines.append(f"build {_escape(output)}: {rule} {escaped}")
        self.lines += [f"  {name} = {value}" for name, value in variables.items()]
        return output


def _escape(path: Path) -> str:
    """A path in a line of `build` or `default`."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _words(items: Iterable[str]) -> str:
    """Words of a command, quoted for the shell that ninja starts and escaped for ninja."""
    return " ".join(shlex.quote(item).replace("$", "$$") for item in items)


def _object(plan: Plan, source: Path, tag: str) -> Path:
    return plan.work / f"{source.relative_to(CSRC).with_suffix('').as_posix().replace('/', '__')}.{tag}.o"


def _cpu_objects(ninja: _Ninja, plan: Plan, variants: dict[str, tuple[str, ...]]) -> list[Path]:
    """Objects in the order in which they are linked: each instruction set behind those that have less.

    Of an inline function that several objects hold, `std::vector<float>`'s for one, the linker keeps the first. One with
    AVX-512 in front would end processes on processors without it.
    """
    sources = [CSRC / "common" / name for name in ("parallel.cpp", "cpu_capability.cpp", "kernel_launch.cpp")]
    kernels = []
    for stem in plan.stems:
        bindings = sorted((CSRC / stem).glob("*_binding_cpu.cpp"))
        sources += bindings
        kernels += [source for source in sorted((CSRC / stem).glob("*_cpu.cpp")) if source not in bindings]
    objects = [ninja.build(_object(plan, source, "cpu"), "cxx", [source], flags="$torch") for source in sources]
    for variant, flags in variants.items():
        text = " ".join((*KERNEL_FLAGS, *flags, f"-DVK_CPU_CAPABILITY={variant}"))
        objects += [ninja.build(_object(plan, source, variant), "cxx", [source], flags=text) for source in kernels]
    return objects


def _cuda_objects(ninja: _Ninja, plan: Plan) -> list[Path]:
    source = CSRC / "common" / "stable_cuda.cpp"
    objects = [ninja.build(_object(plan, source, "cuda"), "cxx", [source], flags="$torch $cuda")]
    for stem in plan.stems:
        for source in sorted((CSRC / stem).glob("*_binding_cuda.cpp")):
            objects.append(ninja.build(_object(plan, source, "cuda"), "cxx", [source], flags="$torch $cuda"))
        for source in sorted((CSRC / stem).glob("*.cu")):
            objects.append(ninja.build(_object(plan, source, "cu"), "nvcc", [source]))
    return objects


def write_ninja(plan: Plan) -> Path:
    """Write `build.ninja` for a plan and return its path."""
    cxx, nvcc, home = plan.toolchain.cxx or (), plan.toolchain.nvcc or "", plan.toolchain.cuda_home
    variants = cpu_variants(cxx) if cxx else {}
    defines = ["-DVK_CPU_HAS_X86_VARIANTS"] if _is_x86() else []
    if "cpu_avx512_bf16" in variants:
        defines.append("-DVK_CPU_HAS_AVX512_BF16")
    if cxx and knows_amx(cxx):
        defines.append("-DVK_CPU_HAS_AMX")
    archs = arch_defines(plan.arch_list).split()
    ninja = _Ninja()
    headers = [str(plan.torch_include), str(plan.torch_include / "torch/csrc/api/include")]
    torch = ["-isystem", headers[0], "-isystem", headers[1], f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    cuda = ["-isystem", f"{home}/include", "-DUSE_CUDA", *archs] if plan.cuda else []
    ninja.lines += [f"torch = {_words(torch)}", f"cuda = {_words(cuda)}"]
    common = _words((*cxx, *CXX_FLAGS, *defines, f"-I{CSRC}"))
    flags, link_flags = (f"$flags {_words(own)}".rstrip() for own in (plan.extra_cxx_flags, plan.extra_link_flags))
    ninja.rule("cxx", f"{common} {flags} -MMD -MF $out.d -c $in -o $out", deps=True)
    ninja.rule("link", f"{_words(cxx)} -shared -o $out $in -Wl,--as-needed {link_flags}", deps=False)
    if plan.cuda:
        compiler = _words((nvcc, *NVCC_FLAGS, *gencode_flags(plan.arch_list), *archs, f"-I{CSRC}", *host_flags(cxx)))
        ninja.rule("nvcc", f"{compiler} -MMD -MF $out.d -c $in -o $out", deps=True)
    torch_link = _words([f"-L{plan.torch_lib}", "-ltorch_cpu", "-lc10"])
    outputs = [
        ninja.build(plan.output / "libvidkernels_cpu.so", "link", _cpu_objects(ninja, plan, variants), flags=torch_link)
    ]
    if plan.cuda:
        flags = f"{torch_link} {_words([f'-L{home}/lib64', '-lcudart_static', '-ldl', '-lrt', '-lpthread'])}"
        outputs.append(
            ninja.build(plan.output / "libvidkernels_cuda.so", "link", _cuda_objects(ninja, plan), flags=flags)
        )
    outputs.append(_facts_module(ninja, plan))
    ninja.lines.append("default " + " ".join(_escape(path) for path in outputs))
    path = plan.work / "build.ninja"
    plan.work.mkdir(parents=True, exist_ok=True)
    plan.output.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(ninja.lines) + "\n")
    return path


def _facts_module(ninja: _Ninja, plan: Plan) -> Path:
    facts = {
        "ARCHS": plan.arch_list if plan.cuda else "",
        "CUDA": cuda_version(plan.toolchain.nvcc) if plan.cuda and plan.toolchain.nvcc else "",
        "COMMIT": plan.commit,
        "STEMS": " ".join(plan.stems),
        "TORCH": plan.torch_version,
    }
    defines = _words(f'-DVK_BUILD_{name}="{value}"' for name, value in facts.items())
    includes = _words(["-isystem", plan.pybind11_include, "-isystem", sysconfig.get_path("include")])
    source = CSRC / "bindings.cpp"
    compiled = ninja.build(_object(plan, source, "py"), "cxx", [source], flags=f"{includes} {defines}")
    target = plan.output / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    return ninja.build(
        target, "link", [compiled], flags="-undefined dynamic_lookup" if sys.platform == "darwin" else ""
    )


def build(plan: Plan, jobs: int, verbose: bool = False) -> None:
    """Compile and link a plan with ninja; raises CalledProcessError with the compiler's own output on the terminal."""
    write_ninja(plan)
    ninja = shutil.which("ninja")
    command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
    subprocess.run([*command, "-C", str(plan.work), f"-j{jobs}", *(["-v"] if verbose else [])], check=True)
    facts = {
        "arch_list": plan.arch_list if plan.cuda else "",
        "cuda": plan.cuda,
        "stems": plan.stems,
        "torch": plan.torch_version,
    }
    (plan.output / "_build_info.json").write_text(json.dumps(facts, indent=1) + "\n")
