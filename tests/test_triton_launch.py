# SPDX-License-Identifier: Apache-2.0
"""Launches that repeat an earlier one (`vidkernels/triton/_launch.py`, `csrc/common/kernel_launch.cpp`).

There is no GPU here: a driver that only notes what it is asked stands for it, and Triton's own launcher for the truth. On a
GPU, tests marked `gpu` of the ops that launch this way run each op more than once.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")


def compiled(source: Path, target: Path, *flags: str) -> Path:
    """A shared object of one source."""
    words = [
        "g++",
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        f"-I{ROOT / 'csrc'}",
        str(source),
        "-o",
        str(target),
        *flags,
    ]
    subprocess.run(words, check=True)
    return target


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled launch alone."""
    source = ROOT / "csrc" / "common" / "kernel_launch.cpp"
    return compiled(source, tmp_path_factory.mktemp("launch") / "liblaunch.so", "-ldl")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 that launches nothing."""
    folder = tmp_path_factory.mktemp("driver")
    compiled(ROOT / "tests" / "triton_launch" / "driver.cpp", folder / "libcuda.so.1", "-Wl,-soname,libcuda.so.1")
    (folder / "libcuda.so").symlink_to("libcuda.so.1")
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in for the driver would hide a GPU's")
def test_bytes_of_every_argument(library: Path, driver: Path) -> None:
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(driver),
        "TRITON_LIBCUDA_PATH": str(driver),
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("TRITON_INTERPRET", None)
    words = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "triton_launch" / "compare.py"), str(library)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = {name: int(count) for name, count in (word.split("=") for word in done.stdout.split())}
    expected = {"_conv_box_kernel", "_conv_pointer_kernel", "_wgrad_box_kernel", "_wgrad_pointer_kernel"}
    assert expected | {"pack_kernel", "gather_kernel"} == set(counts) and sum(counts.values()) >= 25, counts


def test_structs_are_those_of_the_library(tmp_path: Path) -> None:
    """ctypes and the C++ compiler lay the plan out alike."""
    from vidkernels.triton import _launch

    fields = {"VkLaunch": _launch._Plan, "VkTensorMap": _launch._TensorMap, "VkArgument": _launch._Argument}
    lines = [f'extern "C" long long size_{name}() {{ return sizeof({name}); }}' for name in fields]
    for name, struct in fields.items():
        for field in struct._fields_:
            lines.append(f'extern "C" long long {name}_{field[0]}() {{ return offsetof({name}, {field[0]}); }}')
    source = tmp_path / "layout.cpp"
    source.write_text('#include <cstddef>\n#include "common/kernel_launch.h"\n' + "\n".join(lines) + "\n")
    layout = ctypes.CDLL(str(compiled(source, tmp_path / "liblayout.so")))
    for name, struct in fields.items():
        assert getattr(layout, f"size_{name}")() == ctypes.sizeof(struct)
        for field in struct._fields_:
            assert getattr(layout, f"{name}_{field[0]}")() == getattr(struct, field[0]).offset, (name, field[0])


class _Kernel:
    """A kernel as Triton returns it from a launch, with two pointers and a number."""

    def __init__(self, **facts: Any) -> None:
        self.launches = 0
        self.result_ = SimpleNamespace(
            name="kernel",
            function=5,
            metadata=SimpleNamespace(**{"num_ctas": 1, "num_warps": 4, "shared": 96, "launch_pdl": False, **facts}),
            src=SimpleNamespace(
                signature={"x": "*bf16", "y": "*bf16", "n": "i32", "BLOCK": "constexpr"},
                fn=SimpleNamespace(arg_names=["x", "y", "n", "BLOCK"]),
            ),
        )

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            self.launches += 1
            return self.result_

        return launch


class _Library:
    """Notes the addresses of launches and answers with an error of one's choice."""

    def __init__(self, error: int = 0) -> None:
        self.error, self.addresses = error, []

    def vidkernels_launch(self, plan: int, stream: int, addresses: Any) -> int:
        self.addresses.append(list(addresses))
        return self.error

    def vidkernels_launch_error(self, error: int) -> bytes:
        return b"CUDA_ERROR_OUT_OF_LUCK"


@pytest.fixture
def launching(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`_launch` with a library that notes; nothing is remembered from before, or afterwards."""
    from vidkernels.triton import _launch

    noting = _Library()
    monkeypatch.setattr(_launch, "_driver", lambda: noting)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    _launch.forget()
    yield SimpleNamespace(module=_launch, library=noting)
    _launch.forget()


def call(launching: Any, kernel: _Kernel, x: torch.Tensor, y: torch.Tensor, n: int = 8) -> None:
    """As launchers call."""
    key = launching.module.signature(x, y), n
    if not launching.module.repeat(key, (x, y)):
        launching.module.launch(kernel, (3,), (x, y, n), {"BLOCK": 16}, key, (x, y))


def test_the_second_launch_is_repeated_with_its_own_addresses(launching: Any) -> None:
    kernel, x, y = _Kernel(), torch.zeros(8), torch.zeros(8)
    call(launching, kernel, x, y)
    assert kernel.launches == 1 and not launching.library.addresses
    other = torch.zeros(8)
    call(launching, kernel, other, y)
    assert kernel.launches == 1 and launching.library.addresses == [[other.data_ptr(), y.data_ptr()]]


def test_another_shape_stride_dtype_alignment_or_option_is_another_launch(launching: Any) -> None:
    kernel, y = _Kernel(), torch.zeros(64)
    base = torch.zeros(64)
    for x in (base[:8], base[:16], base[:16:2], base.double()[:8], base[1:9]):
        before = kernel.launches
        call(launching, kernel, x, y)
        call(launching, kernel, x, y)
        assert kernel.launches == before + 1
    call(launching, kernel, base[:8], y, n=9)
    assert kernel.launches == 6


def test_a_tensor_given_twice_is_another_launch(launching: Any) -> None:
    kernel, x, y = _Kernel(), torch.zeros(8), torch.zeros(8)
    call(launching, kernel, x, x)
    call(launching, kernel, x, y)
    assert kernel.launches == 2 and not launching.library.addresses
    for first, second in ((y, y), (y, x)):
        call(launching, kernel, first, second)
    assert kernel.launches == 2
    assert launching.library.addresses == [[y.data_ptr(), y.data_ptr()], [y.data_ptr(), x.data_ptr()]]


@pytest.mark.parametrize(
    "facts", [{"num_ctas": 2}, {"launch_pdl": True}, {"global_scratch_size": 8}, {"instrumentation_mode": "gsan"}]
)
def test_kernels_that_need_more_stay_tritons(launching: Any, facts: dict[str, Any]) -> None:
    kernel, x, y = _Kernel(**facts), torch.zeros(8), torch.zeros(8)
    for _ in range(3):
        call(launching, kernel, x, y)
    assert kernel.launches == 3 and not launching.library.addresses


def test_a_profilers_hook_sees_every_launch(launching: Any) -> None:
    from triton import knobs

    kernel, x, y = _Kernel(), torch.zeros(8), torch.zeros(8)
    call(launching, kernel, x, y)

    def hook(metadata: Any) -> None:
        """Of a profiler."""

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        call(launching, kernel, x, y)
        assert kernel.launches == 2 and not launching.library.addresses
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    call(launching, kernel, x, y)
    assert kernel.launches == 2 and len(launching.library.addresses) == 1


def test_a_thread_without_a_context_goes_through_triton(launching: Any) -> None:
    kernel, x, y = _Kernel(), torch.zeros(8), torch.zeros(8)
    call(launching, kernel, x, y)
    launching.library.error = 201
    call(launching, kernel, x, y)
    assert kernel.launches == 2
    launching.library.error = 0
    call(launching, kernel, x, y)
    assert kernel.launches == 2


def test_the_drivers_errors_are_raised_by_name(launching: Any) -> None:
    kernel, x, y = _Kernel(), torch.zeros(8), torch.zeros(8)
    call(launching, kernel, x, y)
    launching.library.error = 700
    with pytest.raises(RuntimeError, match=r"kernel: the CUDA driver answered CUDA_ERROR_OUT_OF_LUCK \(700\)"):
        call(launching, kernel, x, y)


def test_without_a_gpu_nothing_is_remembered() -> None:
    from vidkernels.triton import _launch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert _launch._driver() is None
    kernel, x = _Kernel(), torch.zeros(8)
    _launch.launch(kernel, (3,), (x, x, 8), {"BLOCK": 16}, (_launch.signature(x), 8), (x, x))
    assert kernel.launches == 1 and not _launch.repeat((_launch.signature(x), 8), (x, x))


def test_a_library_without_a_driver_says_so(library: Path) -> None:
    loaded: Any = ctypes.CDLL(str(library))
    loaded.vidkernels_launch_error.restype = ctypes.c_char_p
    assert loaded.vidkernels_launch_error(-1) == b"libcuda.so.1 was not found"
