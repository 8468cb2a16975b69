# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.smoke``: seconds that tell whether the compiled libraries load and their kernels run on this device."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from vidkernels import _library, ops

LEVELS = (8, 8, 8, 5, 5, 5)


def faults(device: torch.device) -> list[str]:
    """What is wrong, one line each: a library that is missing, or a kernel whose result is not the reference's."""
    missing = _library.cuda_missing if device.type == "cuda" else _library.cpu_missing
    if missing is not None:
        return [f"the compiled library: {missing}"]
    backend = "cuda" if device.type == "cuda" else "cpp"
    torch.manual_seed(0)
    z = torch.randn(1, 6, 4, 32, 32, device=device)
    x, row = torch.randn(2, 512, 1152, device=device), torch.randn(2, 1152, device=device)
    found = []
    codes, expected = (ops.fsq_quantize(z, LEVELS, dim=1, backend=b) for b in (backend, "reference"))
    if not torch.equal(codes[1], expected[1]):
        found.append(f"fsq_quantize on {backend}: {int((codes[1] != expected[1]).sum())} indices differ")
    ours, reference = (ops.adaln_modulate(x, row, row, backend=b) for b in (backend, "reference"))
    error = (ours - reference).abs().max().item()
    if not error < 1e-4:
        found.append(f"adaln_modulate on {backend}: differs by {error:.3g}")
    return found


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="default: cuda")
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    found = faults(arguments.device)
    for fault in found:
        print(fault)
    print(f"torch {torch.__version__}: {'broken' if found else 'fine'} in {time.monotonic() - start:.1f} s")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
