# SPDX-License-Identifier: Apache-2.0
"""Reading of safetensors files, where a missing or damaged one is an error that names it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from vidkernels.errors import OptionError


def read(path: Path, argument: str = "path") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file.

    Raises:
        OptionError: there is no such file, or it is not of this format.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise OptionError(argument, "an existing safetensors file", str(path))
    try:
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise OptionError(argument, "a safetensors file", f"{path} ({error})") from error
