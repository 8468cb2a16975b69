# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilation of Triton kernels, and reports on machine code, without a GPU.

report = compile_kernel(_scale_kernel, {"x": "*bf16", "n": "i32"}, {"BLOCK": 1024}, "sm_90", num_warps=4)
assert report.spills == 0 and report.wide_loads > 0
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of a kernel.

    Attributes:
        name: of the kernel in the binary.
        registers: per thread; on AMD the vector registers.
        spills: bytes a thread keeps in local memory because registers ran out (its stack frame included).
        shared: bytes of shared memory a block, static and dynamic.
        instructions: machine instructions by full name, such as "LDG.E.128" or "HGMMA.64x128x16.F32.BF16".
    """

    name: str
    registers: int
    spills: int
    shared: int
    instructions: Counter[str]

    def count(self, *prefixes: str) -> int:
        """How many instructions begin with one of the prefixes, e.g. `count("HGMMA")`."""
        return sum(number for name, number in self.instructions.items() if name.startswith(prefixes))

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes a thread from global memory, plain, asynchronous or by the bulk copy engine."""
        wide = [
            n
            for n in self.instructions
            if re.match(r"(LDG|LDGSTS)\b.*\.128|UTMALDG|global_load_(dwordx4|b128)|buffer_load_(dwordx4|b128)", n)
        ]
        return sum(self.instructions[name] for name in wide)

    @property
    def wide_stores(self) -> int:
        """Stores of 16 bytes a thread to global memory, plain or by the bulk copy engine."""
        wide = [
            n
            for n in self.instructions
            if re.match(r"STG\b.*\.128|UTMASTG|global_store_(dwordx4|b128)|buffer_store_(dwordx4|b128)", n)
        ]
        return sum(self.instructions[name] for name in wide)


def missing() -> str | None:
    """None if Triton kernels can be compiled and read here, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 replaces the compiler"
    return None


def gpu_target(name: str) -> Any:
    """Triton's description of a GPU: "sm_80", "sm_90", "sm_100" or "gfx942"."""
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64)


def compile_kernel(
    fn: Any, signature: Mapping[str, str], constexprs: Mapping[str, Any], target: str = "sm_90", **options: Any
) -> Report:
    """Compile one `@triton.jit` function.

    Args:
        fn: the jitted function.
        signature: type of every argument that is not a constexpr: "*bf16", "*fp32", "i32", "i64", "fp32", .... A
            trailing ":16" says that the pointer or integer is divisible by 16, as whole tensors and even strides are.
        constexprs: values of the constexpr arguments (and of arguments specialised to a constant, such as 1 or None).
        target: "sm_80", "sm_90", "sm_100", "gfx942".
        options: num_warps, num_stages, ....
    """
    import triton

    types = {name: kind.partition(":")[0] for name, kind in signature.items()}
    types |= dict.fromkeys(constexprs, "constexpr")
    names = list(fn.arg_names)
    absent = [name for name in names if name not in types]
    if absent:
        raise ValueError(f"signature: no type for {', '.join(absent)}")
    divisible = [name for name, kind in signature.items() if kind.endswith(":16")]
    source = triton.compiler.ASTSource(
        fn=fn,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    compiled = triton.compile(source, target=gpu_target(target), options=options)
    if target.startswith("sm_"):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            (report,) = sass_report(cubin).values()
        # The cubin states static shared memory only; Triton asks for its own at launch.
        return dataclasses.replace(report, shared=compiled.metadata.shared)
    return _amd_report(compiled)


def _amd_report(compiled: Any) -> Report:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        match = re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE)
        return int(match.group(1)) if match else 0

    body = text.partition("s_endpgm")[0]
    found = Counter(re.findall(r"^\s+([a-z]+_[a-z0-9_]+)\s", body, re.MULTILINE))
    spills = 4 * (field("vgpr_spill_count") + field("sgpr_spill_count")) + field("private_segment_fixed_size")
    return Report(compiled.metadata.name, field("vgpr_count"), spills, compiled.metadata.shared, found)


def tool(name: str) -> str | None:
    """Path of cuobjdump or nvdisasm: on PATH, or the copy in Triton's package."""
    found = shutil.which(name)
    if found:
        return found
    spec = importlib.util.find_spec("triton")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        candidate = Path(root) / "backends/nvidia/bin" / name
        if candidate.exists():
            return str(candidate)
    return None


def _dump(path: Path, flag: str) -> str:
    program = tool("cuobjdump")
    if program is None:
        raise FileNotFoundError("cuobjdump: neither on PATH nor in Triton's package")
    return subprocess.run([program, flag, str(path)], capture_output=True, text=True, check=True).stdout


def sass_report(binary: Path, arch: str | None = None) -> dict[str, Report]:
    """Every kernel in a cubin, object file or shared library, by mangled name.

    Args:
        binary: what nvcc or Triton made.
        arch: keep only this architecture's code, such as "sm_90a"; a fat binary holds several under the same names.
    """
    usage = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
    reports: dict[str, Report] = {}
    code = {name: body for name, body in _functions(_dump(binary, "-sass"), arch)}
    for part, text in _by_arch(_dump(binary, "-res-usage")):
        if arch is not None and part is not None and part != arch:
            continue
        for name, registers, stack, shared, local in usage.findall(text):
            spills = int(stack) + int(local)
            reports[name] = Report(name, int(registers), spills, int(shared), _instructions(code.get(name, "")))
    return reports


def _by_arch(text: str) -> list[tuple[str | None, str]]:
    """Split cuobjdump's output at its "arch = sm_..." lines; one part without a name if there are none."""
    pieces = re.split(r"^arch = (\S+)$", text, flags=re.MULTILINE)
    if len(pieces) == 1:
        return [(None, text)]
    return list(zip(pieces[1::2], pieces[2::2], strict=True))


def _functions(text: str, arch: str | None) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for part, body in _by_arch(text):
        if arch is None or part is None or part == arch:
            pieces = re.split(r"^\s*Function : (\S+)$", body, flags=re.MULTILINE)
            found += zip(pieces[1::2], pieces[2::2], strict=True)
    return found


def _instructions(body: str) -> Counter[str]:
    # "/*0090*/  @!P0 LDG.E.128 R4, [R2.64] ;" -> LDG.E.128
    pattern = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)")
    return Counter(pattern.findall(body))
