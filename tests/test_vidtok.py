# SPDX-License-Identifier: Apache-2.0
"""VidTok against the official implementation's outputs, keys and lengths."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from golden_rules import VIDTOK, fill, golden, vidtok_clip, vidtok_manifest, vidtok_parameter

from vidkernels.errors import DeviceError, DTypeError, OptionError, ShapeError
from vidkernels.models.tokenizers import VidTok, VidTokConfig
from vidkernels.models.tokenizers._memory import peak_bytes
from vidkernels.models.tokenizers.vidtok_config import CONFIGS
from vidkernels.nn import _residual

# 10 times the official float32 code's own error against float64 (RULE.md section 6).
GOLDEN_TOLERANCE = 1e-4


def tiny(name: str, **changes: object) -> VidTok:
    """A narrow model of a published configuration's structure, with all paths active."""
    torch.manual_seed(0)
    config = dataclasses.replace(VidTokConfig.named(name), channels=16, **changes)
    model = VidTok(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05)
    return model.eval()


def clip(frames: int, size: int = 16) -> torch.Tensor:
    return torch.randn(1, 3, frames, size, size, generator=torch.Generator().manual_seed(1))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = GOLDEN_TOLERANCE) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error <= tolerance, f"largest difference {error:.2e}"


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_keys_and_shapes_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = VidTok.from_config(name)
    actual = {key: list(value.shape) for key, value in model.state_dict().items()}
    expected = vidtok_manifest()[name]
    assert actual == expected
    assert list(actual) == list(expected)


def test_parameters_and_clip_are_the_rules() -> None:
    for name, entry in json.loads((VIDTOK / "checksums.json").read_text()).items():
        value = vidtok_clip() if name == "input clip" else vidtok_parameter(name, tuple(entry["shape"]))
        assert hashlib.sha256(value.numpy().astype("<f4").tobytes()).hexdigest() == entry["sha256"], name


@torch.inference_mode()
def test_causal_model_equals_official() -> None:
    stored = golden("vidtok_kl_causal_488_4chn.npz")
    model = fill(VidTok.from_config("vidtok_kl_causal_488_4chn"))
    moments = model.moments(vidtok_clip()[:, :, :17])
    assert_near(moments, stored["moments"])
    latents, log = model.regularize(moments, sample=False)
    assert log["kl_loss"].item() == pytest.approx(stored["kl_loss"].item(), rel=1e-4)
    assert_near(model.decode(latents, num_frames=17), stored["rec"])


@pytest.mark.slow
@torch.inference_mode()
def test_noncausal_model_equals_official() -> None:
    stored = golden("vidtok_kl_noncausal_488_4chn.npz")
    model = fill(VidTok.from_config("vidtok_kl_noncausal_488_4chn"))
    moments = model.moments(vidtok_clip()[:, :, :16])
    assert_near(moments, stored["moments"])
    assert_near(model.decode(moments.chunk(2, 1)[0]), stored["rec"])


@pytest.mark.parametrize(
    ("case", "name", "frames"),
    [
        ("v10_kl_488_4chn_T1", "vidtok_kl_causal_488_4chn", 1),
        pytest.param("v10_kl_488_4chn_T5", "vidtok_kl_causal_488_4chn", 5, marks=pytest.mark.slow),
        ("v10_kl_488_4chn_T16", "vidtok_kl_causal_488_4chn", 16),
        pytest.param("v10_kl_444_4chn_T5", "vidtok_kl_causal_444_4chn", 5, marks=pytest.mark.slow),
        ("v11_kl_488_4chn_T1", "vidtok_kl_causal_488_4chn_v1_1", 1),
        ("v11_kl_488_4chn_T17", "vidtok_kl_causal_488_4chn_v1_1", 17),
    ],
)
@torch.inference_mode()
def test_edge_lengths_equal_official(case: str, name: str, frames: int) -> None:
    stored = golden("edge_cases.npz")
    model = fill(VidTok.from_config(name))
    moments = model.moments(vidtok_clip()[:, :, :frames, :32, :32], length="official")
    assert_near(moments, stored[f"{case}/enc"])
    video = model.decode(moments.chunk(2, 1)[0])
    assert_near(video[:, :, -stored[f"{case}/rec"].shape[2] :], stored[f"{case}/rec"])


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 8, 13])
@pytest.mark.parametrize(
    "name", ["fsq_causal_488_4096", "kl_causal_288_8chn_v1_1", "kl_noncausal_488_4chn", "fsq_causal_888_32768_v1_1"]
)
@torch.inference_mode()
def test_any_length_comes_back(name: str, frames: int) -> None:
    video = clip(frames)
    output = tiny(name)(video)
    assert output.reconstruction.shape == video.shape
    assert torch.isfinite(output.reconstruction).all()


@pytest.mark.parametrize(
    "name", ["kl_causal_488_4chn", "kl_causal_488_4chn_v1_1", "fsq_causal_888_32768_v1_1", "kl_causal_288_8chn"]
)
@pytest.mark.parametrize("pieces", [(1, 4, 8, 4), (3, 9, 5), pytest.param((1,) * 17, marks=pytest.mark.slow)], ids=str)
@torch.inference_mode()
def test_streaming_equals_the_whole_clip(name: str, pieces: tuple[int, ...]) -> None:
    model, video = tiny(name), clip(17)
    whole = model.encode(video)
    streamed = torch.cat(list(model.stream_encode(video.split(pieces, 2))), 2)
    assert_near(streamed, whole, 1e-5)
    decoded = torch.cat(list(model.stream_decode(whole.split(1, 2), num_frames=17)), 2)
    assert_near(decoded, model.decode(whole, num_frames=17), 1e-5)


@pytest.mark.parametrize("piece", [1 << 40, 1 << 9])
@torch.inference_mode()
def test_every_chunking_gives_the_same_bits(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_residual, "PIECE_CPU", piece)
    model, video = tiny("kl_causal_488_4chn_v1_1"), clip(17)
    runs = [torch.cat(list(model.stream_encode(video.split(p, 2))), 2) for p in ((17,), (1, 4, 4, 8), (5, 12))]
    latents = runs[0]
    runs += [torch.cat(list(model.stream_decode(latents.split(p, 2))), 2) for p in ((5,), (1, 4), (2, 1, 2))]
    for first, other in ((0, 1), (0, 2), (3, 4), (3, 5)):
        assert torch.equal(runs[first], runs[other])


@pytest.mark.parametrize("name", ["kl_causal_488_4chn", "kl_noncausal_488_4chn"])
def test_blocks_in_pieces_give_the_same_bits_from_less_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    frames = 17 if model.config.causal else 16
    video = torch.randn(2, 3, frames, 24, 40, generator=torch.Generator().manual_seed(1))
    runs = []
    for piece in (1 << 40, 1 << 13):
        monkeypatch.setattr(_residual, "PIECE_CPU", piece)
        with torch.no_grad():
            latents = model.encode(video)
            runs.append(
                (latents, model.decode(latents), peak_bytes(model.decoder, tuple(latents.shape), training=False))
            )
        assert peak_bytes(model.decoder, tuple(latents.shape), training=True) > 2 * runs[0][2]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert runs[1][2] < 0.8 * runs[0][2]


@torch.inference_mode()
def test_odd_length_streams_with_the_official_padding() -> None:
    model, video = tiny("kl_causal_488_4chn_v1_1"), clip(7)
    whole = model.encode(video)
    streamed = torch.cat(list(model.stream_encode(video.split(2, 2), num_frames=7)), 2)
    assert_near(streamed, whole, 1e-5)
    decoded = torch.cat(list(model.stream_decode(whole.split(1, 2), num_frames=7)), 2)
    assert_near(decoded, model.decode(whole, num_frames=7), 1e-5)


@torch.inference_mode()
def test_no_frame_sees_the_future() -> None:
    model, video = tiny("kl_causal_488_4chn"), clip(13)
    changed = video.clone()
    changed[:, :, 9:] = 7.0
    assert torch.equal(model.encode(video)[:, :, :3], model.encode(changed)[:, :, :3])
    assert not torch.equal(model.encode(video)[:, :, 3:], model.encode(changed)[:, :, 3:])


@torch.inference_mode()
def test_tokens_decode_like_codes() -> None:
    model, video = tiny("fsq_causal_488_262144"), clip(5)
    codes, log = model.encode(video, return_log=True)
    indices = model.indices(video)
    assert indices.dtype == torch.int32
    assert indices.shape == (1, 2, 2, 2)
    assert torch.equal(indices, log["indices"])
    assert torch.equal(model.decode_indices(indices, num_frames=5), model.decode(codes, num_frames=5))


@torch.inference_mode()
def test_sampling_takes_a_generator() -> None:
    model, video = tiny("kl_causal_488_4chn"), clip(5)
    draws = [model.encode(video, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(model.encode(video), model.encode(video, sample=False))


def test_gradients_reach_every_parameter_and_checkpointing_keeps_them() -> None:
    model, video = tiny("fsq_causal_488_4096").train(), clip(5)
    gradients = []
    for enabled in (False, True):
        model.enable_gradient_checkpointing(enabled)
        model.zero_grad()
        model(video).reconstruction.square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_saving_keeps_the_version(tmp_path: Path) -> None:
    model = tiny("kl_causal_488_4chn_v1_1")
    model.save_pretrained(tmp_path / "model")
    loaded = VidTok.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert VidTok.from_checkpoint(tmp_path / "model").config.version == "1.1"


def test_lightning_checkpoint_loads_and_its_version_is_never_guessed(tmp_path: Path) -> None:
    model = tiny("kl_causal_488_4chn")
    state = {**model.state_dict(), "loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    path = tmp_path / "last.ckpt"
    torch.save({"epoch": 1, "global_step": 5, "state_dict": state, "pytorch-lightning_version": "2.4"}, path)
    loaded = VidTok.from_checkpoint(path, config=model.config)
    assert torch.equal(
        loaded.state_dict()["decoder.conv_out.conv.weight"], model.state_dict()["decoder.conv_out.conv.weight"]
    )
    with pytest.raises(OptionError, match="config"):
        VidTok.from_checkpoint(path)
    named = tmp_path / "vidtok_kl_causal_488_4chn_v1_1.ckpt"
    torch.save(state, named)
    with pytest.raises(ShapeError, match=r"encoder\.conv_in\.conv\.weight is \(16, 3, 3, 3, 3\) instead of"):
        VidTok.from_checkpoint(named)


def test_wrong_file_is_refused_by_its_first_keys(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"encoder.unknown": torch.zeros(1)}}, path)
    with pytest.raises(ShapeError, match=r"missing encoder\.conv_in.*unexpected encoder\.unknown"):
        VidTok.from_checkpoint(path, config="kl_causal_488_4chn")


@pytest.mark.parametrize("fsq", [True, False], ids=["fsq", "kl"])
def test_diffusers_folder_needs_a_version_and_equals_diffusers(tmp_path: Path, fsq: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    size = (
        {"regularizer": "fsq", "z_channels": 4, "codebook_size": 4096, "double_z": False} if fsq else {"z_channels": 4}
    )
    theirs = diffusers.AutoencoderVidTok(ch=32, ch_mult=(1, 1, 2, 2), is_causal=True, **size).eval()
    theirs.save_pretrained(tmp_path / "port")
    with pytest.raises(OptionError, match="version"):
        VidTok.from_checkpoint(tmp_path / "port")
    ours = VidTok.from_checkpoint(tmp_path / "port", version="1.1")
    video = clip(5, 32)
    padded = torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], 2)
    with torch.inference_mode():
        expected = theirs.encoder(padded)
        assert_near(ours.moments(video), expected, 2e-5 * expected.abs().max().item() + 1e-5)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m: m.encode(clip(5, 20)), ShapeError, "video: expected .*multiples of 8"),
        (lambda m: m.encode(clip(5)[0]), ShapeError, "video: expected 5 dimensions"),
        (lambda m: m.encode(clip(5)[:, :, 0]), ShapeError, r"one frame: images\[:, :, None\]"),
        (lambda m: m.encode(clip(5)[:, :, :0]), ShapeError, "video: expected at least one frame"),
        (lambda m: m.encode(clip(5).byte()), DTypeError, r"video: expected values in -1..1, .*float\(\) / 127.5 - 1"),
        (lambda m: m.encode(clip(5).int()), DTypeError, "video: expected float32"),
        (lambda m: m.moments(clip(5), length="odd"), OptionError, "length: expected one of"),
        (lambda m: m.decode(torch.randn(1, 3, 2, 2, 2)), ShapeError, "latents: expected size 4"),
        (lambda m: m.decode(torch.randn(1, 4, 2, 2, 2), num_frames=99), OptionError, "num_frames: expected 1 to 5"),
        (lambda m: m.decode(torch.randn(1, 4, 2, 2, 2), num_frames="5"), OptionError, "num_frames: expected 1 to 5"),
        (lambda m: m.memory_estimate((1, 5, 16)), ShapeError, r"shape: expected \(batch, frames, height, width\)"),
        (lambda m: m.indices(clip(5)), OptionError, "an FSQ model"),
        (
            lambda m: VidTok.from_pretrained("/no/such/folder"),
            OptionError,
            "folder: expected a folder with config.json",
        ),
        (
            lambda m: VidTok.from_config("vidtok_kl_causal_488_5chn"),
            OptionError,
            "Nearest: .*vidtok_kl_causal_488_4chn",
        ),
    ],
)
def test_wrong_arguments_get_typed_errors(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call(tiny("kl_causal_488_4chn"))


def test_dtype_and_device_are_compared_with_the_models_but_under_autocast() -> None:
    model = tiny("kl_causal_488_4chn")
    with pytest.raises(DTypeError, match="video: expected the model's torch.float32, got torch.bfloat16"):
        model(clip(5).bfloat16())
    with pytest.raises(DTypeError, match=r"latents: .* Convert one: model.to\(latents.dtype\)"):
        model.decode(torch.randn(1, 4, 2, 2, 2).double())
    with pytest.raises(DeviceError, match="video: expected the model's cpu, got meta"):
        model(clip(5).to("meta"))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert model.encode(clip(5).bfloat16()).isfinite().all()


@pytest.mark.parametrize(
    ("pieces", "num_frames", "error", "match"),
    [
        ([(1, 3, 5, 16, 16), (1, 3, 4, 24, 16)], 9, ShapeError, "video: expected chunks like the first"),
        ([(1, 3, 5, 16, 16), (2, 3, 4, 16, 16)], 9, ShapeError, "video: expected chunks like the first"),
        ([(1, 3, 5, 16, 16)], 9, OptionError, "num_frames: expected 5, the frames that came, got 9"),
        ([(1, 3, 6, 16, 16)], None, OptionError, r"the clip's length, 6, since it is not 1 \+ 4 k, got None"),
    ],
)
def test_streams_end_with_an_error_where_they_would_not_be_the_whole_clip(pieces, num_frames, error, match) -> None:
    model = tiny("kl_causal_488_4chn_v1_1").eval()
    with pytest.raises(error, match=match), torch.inference_mode():
        list(model.stream_encode([torch.randn(p) for p in pieces], num_frames=num_frames))
    with pytest.raises(OptionError, match="num_frames: expected at most 5, what these latents hold, got 9"):
        list(tiny("kl_causal_488_4chn").eval().stream_decode([torch.randn(1, 4, 2, 2, 2)], num_frames=9))


@torch.inference_mode()
def test_streams_pass_over_chunks_without_frames() -> None:
    model, video = tiny("kl_causal_488_4chn_v1_1"), clip(5)
    chunks = [video[:, :, :0], video[:, :, :2], video[:, :, :0], video[:, :, 2:]]
    latents = torch.cat(list(model.stream_encode(chunks)), 2)
    assert_near(latents, model.encode(video), 1e-5)
    decoded = torch.cat(list(model.stream_decode([latents[:, :, :1], latents[:, :, :0], latents[:, :, 1:]])), 2)
    assert_near(decoded, model.decode(latents), 1e-5)
    assert list(model.stream_encode([])) == list(model.stream_decode([])) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsq_causal_488_4096", "kl_causal_488_4chn_v1_1"])
def test_one_graph_of_the_whole_model(name: str) -> None:
    model, video = tiny(name, residual_blocks=1), clip(5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert_near(compiled(video).reconstruction, model(video).reconstruction, 1e-5)
        exported = torch.export.export(model, (video,)).module()
        assert_near(exported(video).reconstruction, model(video).reconstruction, 1e-5)


QUICK = ("vidtok_fsq_causal_888_32768_v1_1", "vidtok_kl_causal_288_8chn", "vidtok_fsq_noncausal_41616_262144")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in sorted(CONFIGS)]
)
@torch.inference_mode()
def test_every_configuration_takes_any_length_batch_and_chunking(name: str) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIGS[name], channels=8, residual_blocks=1)
    model = VidTok(config).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    side = config.spatial_factor
    for frames in (1, 2, 17):
        video = torch.randn(2, 3, frames, side, 2 * side)
        out = model(video, sample=False)
        assert out.reconstruction.shape == video.shape and out.reconstruction.isfinite().all()
        assert_near(model(video[1:], sample=False).reconstruction, out.reconstruction[1:], 1e-4)
        if config.regularizer == "fsq":
            assert_near(model.decode_indices(model.indices(video), num_frames=frames), out.reconstruction, 1e-4)
        if config.causal:
            chunks = video.split(3, 2)
            latents = torch.cat(list(model.stream_encode(chunks, num_frames=frames, sample=False)), 2)
            assert_near(latents, out.latents, 1e-4)
            assert_near(
                torch.cat(list(model.stream_decode(latents.split(2, 2), num_frames=frames)), 2),
                out.reconstruction,
                1e-4,
            )
    half = model.to(torch.bfloat16)(video.bfloat16(), sample=False).reconstruction
    assert half.dtype == torch.bfloat16 and half.shape == video.shape and half.isfinite().all()
