# SPDX-License-Identifier: Apache-2.0
"""The demo's parts on small things; the whole of it is `make bench`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

av = pytest.importorskip("av")
diffusers = pytest.importorskip("diffusers")

from helpers import run_python  # noqa: E402

from vidkernels import _demo_clip as demo_clip  # noqa: E402
from vidkernels.__main__ import main  # noqa: E402
from vidkernels._commands import demo_report, demo_run  # noqa: E402
from vidkernels.errors import OptionError  # noqa: E402

SMALL = {
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "spatial_ds": [0],
    "spatial_us": [1],
    "tempo_ds": [0],
    "tempo_us": [1],
}


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """Ten frames of 48 x 32, frame t filled with grey 20 t."""
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for t in range(10):
            frame = av.VideoFrame.from_ndarray(
                torch.full((32, 48, 3), 20 * t, dtype=torch.uint8).numpy(), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_clip_has_the_asked_frames(film: Path) -> None:
    clip = demo_clip.read_clip(film, 5, 16, start=2)
    assert clip.shape == (1, 3, 5, 16, 16)
    grey = (clip.mean(dim=(0, 1, 3, 4)) + 1) * 127.5
    assert torch.allclose(grey, torch.tensor([40.0, 60, 80, 100, 120]), atol=6)


def test_late_start_takes_the_last_frames(film: Path) -> None:
    grey = (demo_clip.read_clip(film, 2, 16, start=100).mean(dim=(0, 1, 3, 4)) + 1) * 127.5
    assert torch.allclose(grey, torch.tensor([160.0, 180.0]), atol=6)


@pytest.mark.parametrize("frames", [11], ids=["too short"])
def test_short_clip(film: Path, frames: int) -> None:
    with pytest.raises(OptionError, match="at least 11 frames, got 10"):
        demo_clip.read_clip(film, frames, 16)


def test_not_a_video(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"no video")
    with pytest.raises(OptionError, match="readable video"):
        demo_clip.read_clip(tmp_path / "x.mp4", 1, 16)
    with pytest.raises(OptionError, match="existing video file"):
        demo_clip.read_clip(tmp_path / "none.mp4", 1, 16)


def test_peak_memory_sees_a_temporary() -> None:
    code = "import torch; from vidkernels._commands import demo_run as r; print(r.peak_on_cpu(lambda: torch.ones(64 << 20)))"
    answer = run_python(code).split()[-1]  # 256 MiB, freed at once
    if answer == "None":
        pytest.skip("the high-water mark cannot be reset in this sandbox")
    assert 250 << 20 <= int(answer) < 320 << 20


def test_frames_must_fit_the_model() -> None:
    model = diffusers.AutoencoderVidTok(**SMALL)
    clip = torch.zeros(1, 3, 5, 16, 16)
    assert demo_run.prepare(model, clip).shape[2] == 6
    with pytest.raises(OptionError, match="multiple of 2 plus 1, got 4"):
        demo_run.prepare(model, clip[:, :, :4])


def test_promise_is_refused_to_a_wrong_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch that changes the result is reported as breaking the promise."""
    import contextlib

    model = diffusers.AutoencoderVidTok(**SMALL).eval()
    clip = torch.randn(1, 3, 5, 16, 16)

    @contextlib.contextmanager
    def wrong(patched, **_):
        hook = patched.decoder.register_forward_hook(lambda module, args, output: output * 1.0001)
        yield
        hook.remove()

    monkeypatch.setattr(demo_run.vidkernels, "patch", wrong)
    checks = {c.output: c for c in demo_run.check_promise(model, clip, "auto")}
    assert checks["moments"].kept
    assert not checks["decoded"].kept


def test_report_files(tmp_path: Path) -> None:
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    outputs = demo_run.Outputs(video, video)
    other = demo_run.Outputs(video, video + 1e-4)
    slow = demo_run.Variant([2.0, 2.0], [4.0, 4.0], 1 << 30)
    fast = demo_run.Variant([1.0, 1.0], [2.0, 2.0], 1 << 29)
    comparison = demo_run.Comparison("float32", (1, 3, 5, 16, 16), slow, fast, outputs, other, "patched 3 x A")
    checks = {"float32": [demo_run.Check("decoded", 1e-6, 3e-6, 2e-6)]}
    table = demo_report.rows([comparison])
    assert table[3][2:] == ["2.00x", "2.00x", "2.00x", "2.00x less"]
    assert "BROKEN" in demo_report.check_lines(checks)[0]
    demo_report.plot_bars(tmp_path / "bars.png", [comparison], "machine")
    demo_report.plot_frames(tmp_path / "frames.png", video, comparison, trained=False)
    demo_report.write_json(tmp_path / "report.json", demo_report.document([comparison], checks, {"clip": "x"}))
    demo_report.write_markdown(tmp_path / "report.md", [comparison], checks, "machine", ["a note"])
    assert json.loads((tmp_path / "report.json").read_text())["comparisons"][0]["speedup"] == 2.0
    assert "patched 3 x A" in (tmp_path / "report.md").read_text()
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("bars.png", "frames.png"))


def test_wrong_arguments_give_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["demo", "--clip", str(tmp_path / "none.mp4"), "--out", str(tmp_path)]) == 2
    assert "--clip: expected an existing video file" in capsys.readouterr().err
    for option, value, text in (
        ("--device", "gpu", "expected cpu, cuda or cuda:N, got 'gpu'"),
        ("--repeats", "0", "expected a whole number from 1 on, got '0'"),
        ("--size", "a", "expected a whole number from 1 on, got 'a'"),
    ):
        with pytest.raises(SystemExit):
            main(["demo", option, value])
        assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--size", "20"], "--size: expected a multiple of 8, got 20. Give 16."),
        (["--backend", "wat"], "--backend: expected one of auto"),
        (["--weights", "missing.pt"], "--weights: expected an existing checkpoint file, got missing.pt"),
        (["--weights", "other.pt"], "--weights: expected the keys of AutoencoderVidTok's default configuration"),
    ],
)
def test_what_the_model_refuses_is_one_line_before_anything_is_measured(
    options: list[str], text: str, film: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = diffusers.AutoencoderVidTok
    monkeypatch.setattr(diffusers, "AutoencoderVidTok", lambda: original(**{**SMALL, "spatial_ds": [0, 1, 2]}))
    monkeypatch.setattr(demo_run, "run", lambda *_: pytest.fail("the model has run"))
    monkeypatch.chdir(film.parent)
    torch.save({"encoder.x": torch.zeros(1)}, "other.pt")
    assert main(["demo", "--clip", str(film), "--frames", "5", "--out", "out", *options]) == 2
    assert text in capsys.readouterr().err
