# SPDX-License-Identifier: Apache-2.0
"""Outputs are complete or absent: `_files.whole`, and every command that writes when its disk is full or Ctrl-C or SIGTERM comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from vidkernels import _files, _safetensors, _video

LATTE = (
    "--model", "latte-s/2", "--random-weights", "0", "--num-classes", "2", "--label", "1", "--size", "16", "16",
    "--frames", "2",
)  # fmt: skip
# As on a full disk: files of more bytes than the first argument cannot be written.
LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from vidkernels.__main__ import main
sys.exit(main(sys.argv[2:]))
"""
# Ctrl-C when a file is about to take its name: everything is written then, and nothing is complete.
INTERRUPTED = """
import pathlib, sys
def interrupt(*_):
    raise KeyboardInterrupt
pathlib.Path.replace = interrupt
from vidkernels.__main__ import main
sys.exit(main(sys.argv[2:]))
"""
# A scheduler's SIGTERM at the same moment.
TERMINATED = """
import os, pathlib, signal, sys
def interrupt(*_):
    os.kill(os.getpid(), signal.SIGTERM)
pathlib.Path.replace = interrupt
from vidkernels.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


def test_an_interrupted_file_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("before")
    for error in (KeyboardInterrupt(), ValueError("y")):
        with pytest.raises(type(error)), _files.whole(path) as partial:
            partial.write_text("half")
            raise error
        assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    _files.write_text(path, "after")
    assert path.read_text() == "after" and [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_writers_at_one_time_share_no_file(tmp_path: Path) -> None:
    """Two threads of a process, or two containers, mixed what they wrote, or one found its file gone."""
    path = tmp_path / "out.json"
    with _files.whole(path) as first:
        with _files.whole(path) as second:
            first.write_text("first")
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert [*tmp_path.iterdir()] == [path]


def test_safetensors_files_have_the_rights_of_any_new_file(tmp_path: Path) -> None:
    """safetensors 0.8 makes files that nobody but their owner can read."""
    _files.write_text(tmp_path / "x.txt", "x")
    _safetensors.write(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "x.txt").stat().st_mode


def test_errors_of_the_machine_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    for raised in (OSError(28, "full"), OSError(13, "no", "PARTIAL")):
        with pytest.raises(OSError) as caught, _files.whole(tmp_path / "x.txt") as partial:
            raise OSError(*(str(partial) if part == "PARTIAL" else part for part in (*raised.args, raised.filename)))
        assert caught.value.filename == str(tmp_path / "x.txt") and caught.value.errno == raised.errno
    with pytest.raises(FileNotFoundError, match="other"), _files.whole(tmp_path / "x.txt"):
        (tmp_path / "other").read_text()


def test_links_are_followed_and_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    _files.write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "x"
    _files.write_text(Path(os.devnull), "x")
    assert Path(os.devnull).is_char_device()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("av")
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    _video.write_video(path, [torch.rand(1, 3, 5, 16, 16) * 2 - 1], 8)
    return path


@pytest.mark.parametrize(
    ("command", "script", "code"),
    [
        ("tokenize", LIMITED, 2),
        ("tokenize", INTERRUPTED, 130),
        ("tokenize", TERMINATED, 143),
        ("calibrate", LIMITED, 2),
        ("calibrate", INTERRUPTED, 130),
    ],
    ids=["full disk", "Ctrl-C", "SIGTERM", "calibrate, full disk", "calibrate, Ctrl-C"],
)
def test_a_command_that_cannot_finish_leaves_no_file(
    command: str, script: str, code: int, clip: Path, tmp_path: Path
) -> None:
    out = tmp_path / ("x.json" if command == "calibrate" else "x.safetensors")
    arguments = {
        "tokenize": [str(clip), str(out), "--random-weights", "0", "--config", "vidtok_fsq_causal_488_4096"],
        "calibrate": [*LATTE, "--steps", "2", "--runs", "1", "--samples", "1", "--psnr", "1", "--out", str(out)],
    }[command]
    words = [sys.executable, "-c", script, "20", command, *arguments]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode in (code, -signal.SIGINT if code == 130 else code), run.stderr
    reason = {2: f"{out}: File too large", 130: "interrupted", 143: "terminated"}[code]
    assert run.stderr.splitlines()[-1] == f"vidkernels {command}: {reason}"
    assert "Traceback" not in run.stderr and not list(tmp_path.iterdir())


def test_an_output_that_takes_nothing_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "vidkernels", "env"]
        run = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (run.returncode, run.stderr) == (2, "vidkernels env: standard output: No space left on device\n")
