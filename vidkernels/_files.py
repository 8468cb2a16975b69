# SPDX-License-Identifier: Apache-2.0
"""Files that are complete or absent: what is interrupted or meets a full disk leaves what was there before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give the name to write to: a file beside `path`, with its ending, that takes its place when the block ends without an
    exception and is removed otherwise (not after SIGKILL). Links are followed; devices and pipes are written to
    as they are.

    Raises:
        OSError: of the machine. It names `path`, also where a write met a full disk and knew no name.
    """
    special = path.exists() and not path.is_file()
    target = path if special else Path(os.path.realpath(path))
    # Of this call alone: threads share a process number, and so do containers on one disk.
    own = os.urandom(6).hex()
    written = target if special else target.with_name(f".{target.name}.{own}.part{target.suffix}")
    try:
        yield written
        if not special:
            written.replace(target)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(written)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        if not special:
            written.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`path.write_text(text)`, complete or not at all."""
    with whole(path) as partial:
        partial.write_text(text)
