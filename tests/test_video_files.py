# SPDX-License-Identifier: Apache-2.0
"""Video files as they come: odd sizes, uneven times, cut or damaged ends, numbered images, colours, full disks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidkernels import _demo_clip, _safetensors, _video
from vidkernels.__main__ import main
from vidkernels.errors import OptionError
from vidkernels.models.tokenizers import VidTok, VidTokConfig
from vidkernels.training.clips import ClipConfig, Footage

av = pytest.importorskip("av")
pytest.importorskip("safetensors")


def images(count: int, height: int = 48, width: int = 64) -> Tensor:
    """uint8 [count, H, W, 3], each frame of its own grey, on noise so that every one takes bytes."""
    noise = torch.randint(0, 60, (count, height, width, 3), generator=torch.Generator().manual_seed(0))
    return (noise + torch.arange(count).view(-1, 1, 1, 1) * 180 // max(count, 2)).to(torch.uint8)


def write(path: Path, frames: Tensor, milliseconds: list[int] | None = None, **options: str) -> Path:
    """Frames at 25 a second, or at given times."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("gif" if path.suffix == ".gif" else "libx264", rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb8" if path.suffix == ".gif" else "yuv444p"
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_titles_in_any_encoding_do_not_hide_the_frames(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"old{suffix}"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "QQQQ"
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for image in images(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")))
        container.mux(stream.encode())
    assert path.read_bytes().count(b"QQQQ") == 1
    path.write_bytes(path.read_bytes().replace(b"QQQQ", "Türé".encode("latin-1")))
    assert _video.count_frames(path) == 3
    assert _demo_clip.read_clip(path, 3, 32).shape == (1, 3, 3, 32, 32)


def packets(path: Path) -> list[tuple[int, int]]:
    """(position, size) of the packets of a file in the order of its bytes."""
    with av.open(str(path)) as container:
        return sorted((p.pos, p.size) for p in container.demux(container.streams.video[0]) if p.size)


def cut(path: Path, end: int) -> Path:
    short = path.with_stem(f"cut_{path.stem}")
    short.write_bytes(path.read_bytes()[:end])
    return short


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".gif"])
def test_a_file_cut_between_two_frames_is_not_taken_for_a_shorter_one(suffix: str, tmp_path: Path) -> None:
    whole = write(tmp_path / f"x{suffix}", images(60), **({"movflags": "faststart"} if suffix == ".mp4" else {}))
    assert _video.timing(whole).frames == 60
    position, size = packets(whole)[45]
    short = cut(whole, position + size)
    with pytest.raises(_video.VideoError, match=r"cut_x\.\w+: cut off after frame 4\d \("):
        _video.count_frames(short)
    assert _video.timing(short, 40).frames == 40  # what is there can be asked for
    assert sum(chunk.shape[2] for chunk in _video.read_chunks(short, 16, limit=40)) == 40


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_uneven_times_keep_count_and_mean_rate(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    gaps = torch.randint(10, 120, (21,), generator=torch.Generator().manual_seed(1))
    times = [0, *gaps.cumsum(0).tolist()]
    path = write(tmp_path / f"x{suffix}", images(22), times)
    count, rate, even = _video.timing(path)
    assert count == 22 and not even
    assert abs(float(rate) * times[-1] / 1000 / 21 - 1) < 0.05
    steady = write(tmp_path / f"even{suffix}", images(22))
    assert _video.timing(steady) == (22, 25, True)
    torch.manual_seed(0)
    VidTok(small()).save_pretrained(tmp_path / "model")
    weights = ["--weights", str(tmp_path / "model")]
    tokens, out = tmp_path / "x.safetensors", tmp_path / "back.mp4"
    assert main(["tokenize", str(path), str(tokens), *weights]) == 0
    assert f"x{suffix}: frames come at uneven times" in capsys.readouterr().err
    assert main(["detokenize", str(tokens), str(out), *weights]) == 0
    assert _video.count_frames(out) == 22
    assert abs(float(_video.frame_rate(out) / rate) - 1) < 0.01


@pytest.mark.parametrize("suffix", sorted(_video.SUFFIXES))
def test_what_is_written_keeps_its_rate(suffix: str, tmp_path: Path) -> None:
    """Also in AVI, which stores no times of showing."""
    path, rate = tmp_path / f"x{suffix}", Fraction(30000, 1001)
    _video.write_video(path, [torch.zeros(1, 3, 9, 32, 32)], rate)
    count, found, even = _video.timing(path)
    assert count == 9 and even and abs(float(found / rate) - 1) < 1e-3


def small(name: str = "fsq_causal_488_4096") -> VidTokConfig:
    values = VidTokConfig.named(name).to_dict() | {"channels": 8, "residual_blocks": 1}
    return VidTokConfig.from_dict(values)


def test_training_reads_files_of_uneven_times_to_their_end(tmp_path: Path) -> None:
    times = [10 * i for i in range(20)] + [
        200 + 30 * i for i in range(20)
    ]  # faster than the 25 a second that the file states
    path = write(tmp_path / "x.mkv", images(40), times)
    footage = Footage(path, ClipConfig(4, (16, 16)))
    assert footage.length == 40
    for first in (0, 10, 30, 36):
        assert footage.read(first, 4).shape == (4, footage.height, footage.width, 3)
    assert torch.equal(footage.read(36, 4), footage.whole()[36:])
    with pytest.raises(_video.VideoError, match="ends after 3 of the 4 frames from frame 37 on"):
        footage.read(37, 4)


def test_training_reads_the_frames_that_it_names_where_a_file_has_no_times_of_showing(tmp_path: Path) -> None:
    path = tmp_path / "x.avi"
    shades = torch.linspace(-1, 1, 30).reshape(1, 1, 30, 1, 1).expand(1, 3, 30, 32, 32)
    _video.write_video(path, [shades], 25)
    footage = Footage(path, ClipConfig(frames=1, size=(32, 32)))
    for first in (0, 7, 8, 9, 10, 20):
        assert torch.equal(footage.read(first, 4), footage.whole()[first : first + 4]), first


def test_numbered_images_are_a_clip_and_a_folder_says_so(tmp_path: Path) -> None:
    for index, image in enumerate(images(5)):
        with av.open(str(tmp_path / f"{index:03d}.png"), "w", format="image2", options={"update": "1"}) as container:
            stream = container.add_stream("png", rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")))
            container.mux(stream.encode())
    video = torch.cat(list(_video.read_chunks(tmp_path / "%03d.png", 2)), 2)
    assert torch.equal(_video.to_bytes(video), images(5))
    for path, text in (
        (tmp_path, "is a folder; single images are named as one file"),
        (tmp_path / "%05d.png", "not a readable video file"),
        (tmp_path / "none.mp4", "no such file"),
    ):
        with pytest.raises(_video.VideoError, match=text):
            _video.count_frames(path)


def test_written_colours_are_tagged_and_read_back(tmp_path: Path) -> None:
    patches = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [0.2, -0.4, 0.7], [1, 1, 1]])
    video = patches.T.repeat_interleave(16, 1).view(1, 3, 1, 1, 96).expand(1, 3, 3, 32, 96)
    for suffix in (".mp4", ".webm"):
        path = tmp_path / f"x{suffix}"
        _video.write_video(path, [video], 8, crf=4)
        frame = next(_video._decode(path))
        assert int(frame.colorspace) == 1  # BT.709
        back = next(_video.read_chunks(path, 3))
        assert (back - video)[..., 4::16].abs().max() < 0.04  # 5 of 255 levels, inside the patches


def test_odd_sizes_are_written(tmp_path: Path) -> None:
    video = torch.linspace(-1, 1, 175).view(1, 1, 1, 1, 175).expand(1, 3, 2, 143, 175)
    for suffix in sorted(_video.SUFFIXES):
        assert _video.write_video(tmp_path / f"x{suffix}", [video], Fraction(1, 3600)) == 2
        assert _video.frame_size(tmp_path / f"x{suffix}") == (143, 175)
    with pytest.raises(OptionError, match="crf: expected a quality from 0"):
        _video.write_video(tmp_path / "y.mp4", [video], 8, crf=52)
    with pytest.raises(OptionError, match="fps: expected frames per second above 0"):
        _video.write_video(tmp_path / "y.mp4", [video], 0)
    assert not (tmp_path / "y.mp4").exists()


def test_the_demo_turns_a_clip_as_its_file_says(tmp_path: Path) -> None:
    frames = torch.zeros(3, 32, 48, 3, dtype=torch.uint8)
    frames[:, :, :24, 0] = 255  # red on the left
    path = tmp_path / "turned.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv444p"
        stream.set_display_rotation(-90)  # clockwise: what was left is above
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")))
        container.mux(stream.encode())
    clip = _demo_clip.read_clip(path, 3, 16)
    assert clip.shape == (1, 3, 3, 16, 16)
    assert clip[0, 0, :, :6].mean() > 0.8 and clip[0, 0, :, 10:].mean() < -0.8


def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import safetensors.torch

    target = tmp_path / "x.safetensors"
    _safetensors.write(target, {"a": torch.zeros(2)})

    def full(tensors: Any, name: str, metadata: Any) -> None:
        Path(name).write_bytes(b"half")
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        _safetensors.write(target, {"a": torch.ones(2)})
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert float(_safetensors.read(target)[0]["a"].sum()) == 0
    clip = write(tmp_path / "clip.mp4", images(5))
    arguments = ["--config", "fsq_causal_488_4096", "--random-weights", "0"]
    monkeypatch.setattr("vidkernels.models.tokenizers.VidTok.from_config", lambda config: VidTok(small()))
    assert main(["tokenize", str(clip), str(target), *arguments]) == 2
    assert capsys.readouterr().err == f"vidkernels tokenize: {target}: No space left on device\n"


def test_killed_in_the_middle_nothing_bears_the_final_name(tmp_path: Path) -> None:
    """The writer is killed with half of the frames encoded."""
    script = (
        "import sys, time, torch; from pathlib import Path; from vidkernels import _video\n"
        "def chunks():\n"
        "    yield torch.zeros(1, 3, 40, 32, 32)\n"
        "    print('half', flush=True)\n"
        "    time.sleep(60)\n"
        "_video.write_video(Path(sys.argv[1]), chunks(), 8)\n"
    )
    target = tmp_path / "x.mp4"
    child = subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "half\n"
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not target.exists()


def damaged(config: VidTokConfig) -> Iterator[tuple[dict[str, Tensor], dict[str, str], str]]:
    """(tensors, changed metadata, part of the message) of files of tokens that no clip can be made of."""
    import json

    tokens = torch.zeros(1, 2, 4, 4, dtype=torch.int32)
    yield {"tokens": tokens}, {"config": "{{"}, "source: expected a file with its tokenizer's configuration"
    yield {"tokens": tokens}, {"config": "[1]"}, "where config: expected a JSON object, got a list"
    yield {"tokens": tokens}, {"config": '{"name": "x"}'}, "config: expected a value for causal"
    wrong = json.dumps(config.to_dict() | {"channels": "8"})
    yield {"tokens": tokens}, {"config": wrong}, "channels: expected a whole number of at least 1, got '8'"
    other = json.dumps(config.to_dict() | {"version": "1.1"})
    yield {"tokens": tokens}, {"config": other}, "version '1.0', got '1.1' in the file"
    yield {"tokens": tokens}, {"format": "vidkernels-tokens-2"}, "format vidkernels-tokens-1, got vidkernels-tokens-2"
    yield {"tokens": tokens.repeat(2, 1, 1, 1)}, {}, "tokens [1, T, H, W] of one clip, got (2, 2, 4, 4)"
    yield {"tokens": tokens[0]}, {}, "tokens [1, T, H, W] of one clip, got (2, 4, 4)"
    yield {"tokens": tokens[..., :0]}, {}, "tokens [1, T, H, W] of one clip, got (1, 2, 4, 0)"
    for key, value in (("num_frames", "0"), ("num_frames", "-1"), ("fps", "0"), ("fps", "-5"), ("fps", "x")):
        yield {"tokens": tokens}, {key: value}, "source: expected a file with its clip's num_frames and fps"


def test_damaged_files_of_tokens_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import json

    config = small()
    VidTok(config).save_pretrained(tmp_path / "model")
    path, out = tmp_path / "x.safetensors", tmp_path / "x.mp4"
    facts = {"config": json.dumps(config.to_dict()), "num_frames": "5", "fps": "8", "format": "vidkernels-tokens-1"}
    weights = ["--weights", str(tmp_path / "model")]
    for tensors, changed, text in damaged(config):
        _safetensors.write(path, tensors, facts | changed)
        assert main(["detokenize", str(path), str(out), *weights]) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1, error
    assert not out.exists()


def test_latents_that_are_not_finite_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import json

    config = small("kl_causal_488_4chn")
    VidTok(config).save_pretrained(tmp_path / "model")
    facts = {"config": json.dumps(config.to_dict()), "num_frames": "5", "fps": "8"}
    latents = torch.zeros(1, 4, 2, 4, 4)
    latents[0, 1, 1, 2, 3] = float("nan")
    for stored, text in ((latents, "expected finite latents"), (latents[0], "latents [1, 4, T, H, W] of one clip")):
        _safetensors.write(tmp_path / "x.safetensors", {"latents": stored}, facts)
        arguments = [str(tmp_path / "x.safetensors"), str(tmp_path / "x.mp4"), "--weights", str(tmp_path / "model")]
        assert main(["detokenize", *arguments]) == 2
        assert text in capsys.readouterr().err


def test_folders_and_files_of_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder, file = tmp_path / "model", tmp_path / "x.ckpt"
    folder.mkdir()
    with pytest.raises(OptionError, match="folder: expected a folder with config.json"):
        VidTok.from_checkpoint(folder)
    for text, message in (
        ("{{", "config: expected a JSON file"),
        ("[1]", "config: expected a JSON object"),
        ('{"ch_mult": [1, 2]}', "AutoencoderVidTok, got one without ch"),
        ('{"name": "x"}', "config: expected a value for causal"),
    ):
        (folder / "config.json").write_text(text)
        for load in (VidTok.from_checkpoint, VidTok.from_pretrained):
            with pytest.raises(OptionError, match=message if load == VidTok.from_checkpoint else "config: expected"):
                load(folder)
    for stored in ({"state_dict": [1]}, {1: torch.zeros(2)}):
        torch.save(stored, file)
        with pytest.raises(OptionError, match="path: expected a file of named tensors"):
            VidTok.from_checkpoint(file, "fsq_causal_488_4096")


def test_weights_that_are_no_numbers_of_a_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    clip = write(tmp_path / "x.mp4", images(2))
    VidTok(small()).save_pretrained(tmp_path / "model")
    file, key = tmp_path / "model" / "model.safetensors", "decoder.conv_out.conv.weight"
    state, metadata = _safetensors.read(file)
    for change, message in (
        (torch.int32, f"{key}: expected numbers like torch.float32, got torch.int32"),
        (torch.complex64, f"{key}: expected numbers like torch.float32, got torch.complex64"),
        (float("nan"), f"--weights: expected finite weights, got NaN or infinity in {key}"),
    ):
        wrong = state[key] * change if isinstance(change, float) else state[key].to(change)
        _safetensors.write(file, {**state, key: wrong}, metadata)
        assert main(["tokenize", str(clip), str(tmp_path / "x.safetensors"), "--weights", str(file.parent)]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "name: expected text, got None"),
        ({"causal": "no"}, "causal: expected true or false, got 'no'"),
        ({"channels": 0}, "channels: expected a whole number of at least 1, got 0"),
        ({"z_channels": True}, "z_channels: expected a whole number"),
        ({"levels": (8, 8, 8, 2)}, "levels: expected a tuple of whole numbers of at least 3"),
        ({"channel_multipliers": (1, "2")}, "channel_multipliers: expected a tuple of whole numbers"),
        ({"spatial_down": (0, 1, 3)}, "spatial_down: expected different levels from 0 to 2"),
        ({"spatial_up": (1, 1, 2)}, "spatial_up: expected different levels from 1 to 3"),
        ({"spatial_up": (1, 2)}, "spatial_up: expected as many levels as the encoder halves, 3"),
        ({"temporal_up": (2,)}, "temporal_up: expected as many levels as the encoder halves, 2"),
    ],
)
def test_a_configuration_that_no_model_can_have_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        VidTokConfig.from_dict(VidTokConfig.named("fsq_causal_488_4096").to_dict() | change)
