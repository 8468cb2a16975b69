# SPDX-License-Identifier: Apache-2.0
"""The tokenize and detokenize commands on real video files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from vidkernels import _video
from vidkernels.__main__ import main
from vidkernels.models.tokenizers import VidTok, VidTokConfig

pytest.importorskip("av")
safetensors = pytest.importorskip("safetensors.torch")

NAME = "vidtok_fsq_causal_488_4096"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A written video of 11 frames: a moving gradient."""
    t = torch.arange(11).reshape(1, 1, -1, 1, 1) / 11
    x, y = torch.arange(48).reshape(1, 1, 1, 1, -1) / 48, torch.arange(32).reshape(1, 1, 1, -1, 1) / 32
    video = torch.cat(
        [torch.sin(6 * (x + t)) * torch.ones_like(y), (y * 2 - 1) * torch.ones_like(x + t), (x * y * 2 - 1) + 0 * t], 1
    )
    path = tmp_path / "clip.mp4"
    assert _video.write_video(path, video.split(4, 2), 12) == 11
    return path


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    torch.manual_seed(0)
    config = dataclasses.replace(VidTokConfig.named(request.param), channels=16)
    VidTok(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_written_video_reads_back(clip: Path) -> None:
    assert _video.count_frames(clip) == 11
    assert _video.frame_rate(clip) == 12
    frames = torch.cat(list(_video.read_chunks(clip, 4)), 2)
    assert frames.shape == (1, 3, 11, 32, 48)
    assert (frames[0, 1, 0, :, 0] - torch.linspace(-1, 1, 32)).abs().max() < 0.15
    assert next(_video.read_chunks(clip, 4, (16, 16))).shape == (1, 3, 4, 16, 16)


@pytest.mark.parametrize(
    "folder", ["fsq_causal_488_4096", "kl_causal_488_4chn_v1_1", "kl_noncausal_488_4chn"], indirect=True
)
def test_round_trip_keeps_the_length_and_equals_the_model(clip: Path, folder: Path, tmp_path: Path) -> None:
    tokens, out = tmp_path / "tokens.safetensors", tmp_path / "out.mp4"
    assert main(["tokenize", str(clip), str(tokens), "--weights", str(folder), "--chunk", "3"]) == 0
    stored = safetensors.load_file(str(tokens))
    model = VidTok.from_pretrained(folder).eval()
    with torch.inference_mode():
        whole = model.encode(torch.cat(list(_video.read_chunks(clip, 16)), 2), sample=False, return_log=True)
    if model.config.regularizer == "fsq":
        assert stored["tokens"].dtype == torch.int32
        assert (stored["tokens"] == whole[1]["indices"]).float().mean() > 0.99
    else:
        torch.testing.assert_close(stored["latents"], whole[0], rtol=0, atol=1e-4)
    assert main(["detokenize", str(tokens), str(out), "--weights", str(folder), "--chunk", "2"]) == 0
    assert _video.count_frames(out) == 11


@pytest.mark.parametrize("folder", ["fsq_causal_488_4096"], indirect=True)
def test_errors_are_one_clear_line_and_leave_nothing(
    clip: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:100])
    target, junk, lone = tmp_path / "tokens.safetensors", tmp_path / "junk.safetensors", tmp_path / "lone.pt"
    junk.write_text("not a header")
    torch.save(torch.zeros(1), lone)
    cases = [
        (["tokenize", str(tmp_path / "none.mp4"), str(target), "--weights", str(folder)], "no such file"),
        (["tokenize", str(broken), str(target), "--weights", str(folder)], "not a readable video file"),
        (["tokenize", str(clip), str(target), "--weights", str(folder), "--size", "30", "40"], "multiples of 8"),
        (["tokenize", str(clip), str(target)], "--weights: expected a VidTok checkpoint"),
        (["tokenize", str(clip), str(target), "--random-weights", "0"], "--config: expected a published VidTok name"),
        (
            ["detokenize", str(folder / "model.safetensors"), str(tmp_path / "x.mp4"), "--weights", str(folder)],
            "source: expected a file",
        ),
        (["tokenize", str(clip), str(tmp_path / "x.mp4"), "--weights", str(folder)], "target: expected a file ending"),
        (
            ["tokenize", str(clip), str(target), "--weights", str(junk), "--config", NAME],
            "--weights: expected a safetensors file",
        ),
        (
            ["tokenize", str(clip), str(target), "--weights", str(lone), "--config", NAME],
            "--weights: expected a file of named",
        ),
        (
            ["detokenize", str(junk), str(tmp_path / "x.mp4"), "--weights", str(folder)],
            "source: expected a safetensors",
        ),
        (
            ["detokenize", str(junk), str(tmp_path / "x.txt"), "--weights", str(folder)],
            "target: expected a file ending",
        ),
        (["detokenize", str(target), str(tmp_path / "x.mp4")], "source: expected an existing safetensors file"),
    ]
    for argv, text in cases:
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert text in error and "Traceback" not in error
    assert not target.exists()


def test_a_target_that_cannot_be_written_is_known_before_the_work(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    inside = tmp_path / "file" / "x.safetensors"
    inside.parent.write_text("")
    assert main(["tokenize", str(clip), str(inside), "--random-weights", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vidkernels tokenize: ") and error.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["tokenize", str(clip), str(inside), "--chunk", "0"])
    assert "argument --chunk: expected a whole number from 1 on, got '0'" in capsys.readouterr().err


def written(path: Path, turn: int, sizes: tuple[tuple[int, int], ...] = ((32, 48),)) -> None:
    """Three frames of each size, red above and blue below, with a display matrix that turns them counterclockwise."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg" if len(sizes) > 1 else "libx264", rate=10)
        stream.height, stream.width = sizes[0]
        stream.pix_fmt = "yuvj420p" if len(sizes) > 1 else "yuv420p"
        if turn:
            stream.set_display_rotation(turn)
        for height, width in sizes:
            image = torch.zeros(height, width, 3, dtype=torch.uint8)
            image[: height // 2, :, 0], image[height // 2 :, :, 2] = 255, 255
            for _ in range(3):
                for packet in stream.encode(av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")):
                    container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.mark.parametrize(("turn", "red"), [(0, "top"), (90, "left"), (180, "bottom"), (-90, "right")])
def test_frames_are_turned_as_the_file_says(turn: int, red: str, tmp_path: Path) -> None:
    path = tmp_path / "turned.mov"
    written(path, turn)
    size = (48, 32) if turn in (90, -90) else (32, 48)
    assert _video.frame_size(path) == size
    (chunk,) = _video.read_chunks(path, 4)
    assert chunk.shape == (1, 3, 3, *size)
    halves = {
        "top": chunk[..., : size[0] // 2, :],
        "bottom": chunk[..., size[0] // 2 :, :],
        "left": chunk[..., : size[1] // 2],
        "right": chunk[..., size[1] // 2 :],
    }
    assert max(halves, key=lambda side: float(halves[side][0, 0].mean())) == red
    assert float(halves[red][0, 0].mean()) > 0.8


@pytest.mark.parametrize("suffix", sorted(_video.SUFFIXES))
def test_every_ending_that_is_offered_can_be_written(suffix: str, tmp_path: Path) -> None:
    video = torch.linspace(-1, 1, 16).view(1, 1, 1, 1, 16).expand(1, 3, 5, 16, 16)
    assert _video.write_video(tmp_path / f"x{suffix}", video.split(2, 2), 8) == 5
    back = torch.cat(list(_video.read_chunks(tmp_path / f"x{suffix}", 2)), 2)
    assert back.shape == video.shape and (back - video).abs().mean() < 0.1
    assert [p.name for p in tmp_path.iterdir()] == [f"x{suffix}"]


@pytest.mark.parametrize("folder", ["fsq_causal_488_4096"], indirect=True)
def test_a_size_that_does_not_fit_is_answered_with_one_that_does(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, target = tmp_path / "odd.mov", tmp_path / "x.safetensors"
    written(path, 90, ((36, 70),))
    assert main(["tokenize", str(path), str(target), "--weights", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "--size: expected height and width multiples of 8, got 70 36, the size of odd.mov." in error
    assert "--size 64 32 resizes and crops." in error
    assert main(["tokenize", str(path), str(target), "--weights", str(folder), "--size", "64", "32"]) == 0
    assert safetensors.load_file(str(target))["tokens"].shape == (1, 2, 8, 4)


def test_files_without_a_picture_or_of_several_sizes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "audio.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(torch.zeros(1, 1024).numpy(), format="fltp", layout="mono")
        frame.sample_rate = 44100
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(_video.VideoError, match="audio.m4a: holds no video stream"):
        next(_video.read_chunks(tmp_path / "audio.m4a", 4))
    sizes = [torch.zeros(8, 8, 3, dtype=torch.uint8)] * 3 + [torch.zeros(8, 16, 3, dtype=torch.uint8)]
    monkeypatch.setattr(_video, "_decode", lambda path: iter(sizes))
    monkeypatch.setattr(_video, "upright", lambda frame: frame)
    with pytest.raises(_video.VideoError, match="frame 3 is 8 x 16, those before are 8 x 8: give a size"):
        list(_video.read_chunks(Path("x.mp4"), 3))
    assert next(_video.read_chunks(Path("x.mp4"), 4, (8, 8))).shape == (1, 3, 4, 8, 8)


@pytest.mark.parametrize("folder", ["fsq_causal_488_4096"], indirect=True)
def test_files_of_tokens_are_checked_before_they_are_decoded(
    clip: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, out = tmp_path / "x.safetensors", tmp_path / "x.mp4"
    assert main(["tokenize", str(clip), str(path), "--weights", str(folder)]) == 0
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        facts, tokens = file.metadata(), file.get_tensor("tokens")
    cases = [
        (tokens + 4096, facts, "source: expected tokens from 0 to 4095, got 4"),
        (tokens - 4096, facts, "source: expected tokens from 0 to 4095, got -"),
        (tokens, {**facts, "num_frames": "99"}, "num_frames: expected at most 13, what these latents hold, got 99"),
        (tokens, {key: facts[key] for key in ("config", "fps")}, "source: expected a file with its clip's num_frames"),
        (tokens, {**facts, "fps": "1/0"}, "source: expected a file with its clip's num_frames and fps"),
        (tokens.float(), facts, "indices: expected an integer dtype"),
    ]
    for stored, metadata, text in cases:
        safetensors.save_file({"tokens": stored.contiguous()}, str(path), metadata)
        capsys.readouterr()
        assert main(["detokenize", str(path), str(out), "--weights", str(folder)]) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1, error
    safetensors.save_file({"latents": torch.zeros(1, 4, 2, 4, 4)}, str(path), facts)
    assert main(["detokenize", str(path), str(out), "--weights", str(folder)]) == 2
    assert "source: expected tokens, as vidtok_fsq_causal_488_4096 makes them, got latents" in capsys.readouterr().err
    assert not [p for p in tmp_path.iterdir() if "mp4" in p.name and p != clip]
