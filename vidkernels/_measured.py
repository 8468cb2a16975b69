# SPDX-License-Identifier: Apache-2.0
"""Orders of backends that were measured, by op, device and shape: `configs/<op>.json` of the package, over which those of
this machine take precedence, written by `python -m vidkernels tune` into `VIDKERNELS_CACHE_DIR`."""

from __future__ import annotations

import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from vidkernels import _env, _files, _signature
from vidkernels._tracing import constant_while_tracing
from vidkernels.errors import OptionError

PACKAGED = Path(__file__).resolve().parent / "configs"


def cache_folder() -> Path:
    """Where this machine's own orders are kept."""
    try:
        return Path(_env.text("VIDKERNELS_CACHE_DIR")).expanduser() / "configs"
    except RuntimeError:  # a user without a home, as containers have
        return Path(tempfile.gettempdir()) / "vidkernels" / "configs"


@lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    """The name that orders are filed under: a GPU's own, or a CPU's instruction set as torch sees it."""
    if device.type == "cuda":  # a fake tensor may say so where there is none
        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "cuda"
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def read(path: Path) -> dict[str, dict[str, list[str]]]:
    """Device -> key -> backends from fast to slow; nothing where there is no such file, or none that this user may read.

    Raises:
        OptionError: the file holds something else.
    """
    try:
        text = path.read_text()
    except OSError:
        return {}
    try:
        devices: dict[str, dict[str, list[str]]] = json.loads(text)["devices"]
        return {device: dict(orders) for device, orders in devices.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "Remove it, or run `python -m vidkernels tune` after that."
        raise OptionError(
            str(path), 'JSON as {"devices": {...}}', f"{type(error).__name__}: {error}", remedy
        ) from error


def write(path: Path, op: str, device: str, orders: dict[str, list[str]]) -> None:
    """Add a device's orders to a file; those of other devices and keys stay."""
    devices = read(path)
    devices[device] = {**devices.get(device, {}), **orders}
    document: dict[str, Any] = {
        "about": f"Backends of {op} from fast to slow, by device and shape.",
        "devices": devices,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    _files.write_text(path, json.dumps(document, indent=1, sort_keys=True) + "\n")


@lru_cache(maxsize=64)
def _orders(op: str, device: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for folder in (PACKAGED, cache_folder()):
        found.update({key: tuple(order) for key, order in read(folder / f"{op}.json").get(device, {}).items()})
    return found


@constant_while_tracing
def order(op: str, device: torch.device, key: str) -> tuple[str, ...] | None:
    """Backends of an op from fast to slow for a key of the op's own making, or None where nobody measured."""
    return _orders(op, device_name(device)).get(key)


def forget() -> None:
    """Read the files again at the next call."""
    _orders.cache_clear()
    _signature.forget()
