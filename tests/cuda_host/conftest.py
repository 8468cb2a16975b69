# SPDX-License-Identifier: Apache-2.0
"""For the case files: every case runs once per order of threads, and must launch a kernel."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = os.environ.get("VIDKERNELS_HOST_KERNELS", "")
# Threads of a block run to their next barrier in this order; a result that changes with it is a race.
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}


@pytest.fixture(autouse=True, params=list(ORDERS) if KERNELS == "cuda" else ["threads"])
def order(request: pytest.FixtureRequest) -> Iterator[str]:
    """Set the order of threads and check afterwards that a CUDA kernel did run."""
    if KERNELS != "cuda":
        yield request.param
        return
    library = ctypes.CDLL(str(Path(os.environ["VIDKERNELS_LIBRARY_DIR"]) / "libvidkernels_cpu.so"))
    library.simt_launches.restype = ctypes.c_int64
    library.simt_set_order(ORDERS[request.param], 20240613)
    before = library.simt_launches()
    yield request.param
    assert library.simt_launches() > before or request.node.get_closest_marker("no_launch"), "no CUDA kernel ran"
