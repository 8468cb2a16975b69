# SPDX-License-Identifier: Apache-2.0
"""Safetensors files: a missing or damaged one is an error that names it, a new one is complete or absent."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vidkernels import _files
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
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise OptionError(argument, "a safetensors file", f"{path} ({error})") from error


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file under its name when it is complete.

    Raises:
        OSError: the disk is full or the folder cannot be written; names the file, and leaves what was there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with _files.whole(path) as partial:
        try:
            values = {name: tensor.contiguous() for name, tensor in tensors.items()}
            partial.touch()
            mode = partial.stat().st_mode  # by the umask; safetensors 0.8 lets nobody but the owner read its files
            save_file(values, str(partial), dict(metadata or {}))
            if partial.stat().st_mode != mode:
                partial.chmod(mode)
        except SafetensorError as error:  # it says the machine's reason in its text alone
            found = re.search(r"os error (\d+)", str(error))
            number = int(found[1]) if found else errno.EIO
            raise OSError(number, os.strerror(number), str(path)) from error
