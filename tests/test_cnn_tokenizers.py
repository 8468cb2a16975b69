# SPDX-License-Identifier: Apache-2.0
"""VQGAN, MAGVIT and MAGVIT-v2: against diffusers' VQModel, naive quantization, causality, inflation, lengths, gradients."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.tokenizers import (
    MAGVIT,
    MAGVIT2,
    VQGAN,
    MAGVIT2Config,
    MAGVIT2Layers,
    MAGVIT2LayersConfig,
    MAGVITConfig,
    VQGANConfig,
    inflate,
    inflate_kernel,
)
from vidkernels.models.tokenizers._cnn_layers import depth_to_space
from vidkernels.models.tokenizers._quantizer import VectorQuantizer

SMALL_VQGAN = VQGANConfig(
    channels=32,
    channel_multipliers=(1, 2, 2),
    attention_resolutions=(),
    resolution=32,
    z_channels=8,
    embedding_channels=8,
    codes=50,
)
SMALL_MAGVIT = {
    "channels": 32,
    "channel_multipliers": (1, 2, 2),
    "temporal_down": (True, False),
    "residual_blocks": 1,
    "embedding_channels": 8,
    "codes": 20,
}
SMALL_MAGVIT2 = {
    "channels": 32,
    "channel_multipliers": (1, 2, 2),
    "temporal_down": (False, True),
    "residual_blocks": 1,
    "bits": 6,
}
SMALL_LAYERS = MAGVIT2LayersConfig(
    layers=("residual", "compress_space", ("consecutive_residual", 2), "compress_time", "attend_space", "attend_time"),
    channels=8,
    heads=2,
    head_channels=8,
    codebook_size=64,
)


def shake(model: nn.Module) -> nn.Module:
    """Make every path of a fresh model active."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any() or parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def taming_key(key: str) -> str:
    """Key of diffusers' VQModel with 3 levels in taming-transformers' naming."""
    key = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", key)
    key = re.sub(r"decoder\.up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"decoder.up.{2 - int(m[1])}.block.{m[2]}", key)
    key = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", key)
    key = re.sub(r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.up.{2 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = key.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm").replace(
        "mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"
    )
    key = re.sub(r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1", key)
    return key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


@torch.inference_mode()
def test_vqgan_equals_diffusers_vq_model() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    theirs = shake(
        diffusers.VQModel(
            block_out_channels=(32, 64, 64),
            layers_per_block=2,
            latent_channels=8,
            num_vq_embeddings=50,
            vq_embed_dim=8,
            sample_size=32,
            **blocks,
        )
    )
    state = {taming_key(key): value for key, value in theirs.state_dict().items()}
    state = {
        key: value[..., None, None] if "attn_1" in key and value.ndim == 2 else value for key, value in state.items()
    }
    ours = VQGAN.from_checkpoint({**state, "loss.logvar": torch.zeros(())}, SMALL_VQGAN).eval()
    images = torch.randn(2, 3, 32, 32)
    latents = theirs.encode(images).latents
    codes, indices, _ = ours.encode(images)
    expected, _, (_, _, expected_indices) = theirs.quantize(latents)
    assert (indices.flatten() == expected_indices).float().mean() > 0.98
    torch.testing.assert_close(ours.decode(expected), theirs.decode(latents).sample, rtol=1e-4, atol=1e-4)
    assert codes.shape == expected.shape


@torch.inference_mode()
def test_vqgan_keys_clips_and_tokens() -> None:
    with torch.device("meta"):
        keys = set(VQGAN().state_dict())
    assert {"encoder.down.4.attn.1.q.weight", "decoder.up.4.attn.2.proj_out.bias", "quantize.embedding.weight"} <= keys
    assert "encoder.down.3.attn.0.q.weight" not in keys and "decoder.up.0.upsample.conv.weight" not in keys
    model = shake(VQGAN(SMALL_VQGAN))
    clip = torch.randn(1, 3, 3, 16, 16)
    codes, tokens, _ = model.encode(clip)
    assert tokens.shape == (1, 3, 4, 4)
    torch.testing.assert_close(model.encode(clip[:, :, 1])[0], codes[:, :, 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.decode_tokens(tokens), model.decode(codes), rtol=1e-4, atol=1e-5)
    with pytest.raises(ShapeError, match="images: expected at least one frame, height and width multiples of 4"):
        model.encode(torch.randn(1, 3, 18, 16))
    with pytest.raises(ShapeError, match="state_dict: expected the keys of VQGAN"):
        VQGAN.from_checkpoint({"encoder.nothing": torch.zeros(1)}, SMALL_VQGAN)


@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 5, 2, 3, 4), (0, 5, 3)], ids=str)
def test_vector_quantizer_is_the_naive_one(shape: tuple[int, ...]) -> None:
    quantizer = VectorQuantizer(9, 5, legacy=False)
    z = torch.randn(shape, requires_grad=True)
    codes, indices, loss = quantizer(z)
    rows = z.detach().movedim(1, -1).reshape(-1, 5)
    expected = torch.cdist(rows.double(), quantizer.embedding.weight.detach().double()).argmin(1)
    assert torch.equal(indices.flatten(), expected)
    torch.testing.assert_close(codes.detach(), quantizer.decode(indices).detach(), atol=1e-6, rtol=0)
    if z.numel():
        (codes * 2).sum().backward(retain_graph=True)
        assert torch.equal(z.grad, torch.full_like(z, 2.0))
        loss.backward()
        assert quantizer.embedding.weight.grad.any()


def test_moving_average_codebook_finds_the_clusters() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, -4.0]])
    quantizer = VectorQuantizer(3, 2, ema=0.8).train()
    with torch.no_grad():
        quantizer.embedding.weight.copy_(centres * 0.3)
        quantizer.ema_sum.copy_(quantizer.embedding.weight)
    for _ in range(60):
        z = centres[torch.randint(3, (256,))] + 0.1 * torch.randn(256, 2)
        quantizer(z.unsqueeze(-1))
    assert (quantizer.embedding.weight - centres).abs().max() < 0.15


@pytest.mark.parametrize("changes", [{}, {"padding": "reflect"}, {"downsample": "conv"}, {"ema": 0.9}], ids=str)
def test_magvit_shapes_and_gradients(changes: dict) -> None:
    torch.manual_seed(0)
    model = shake(MAGVIT(MAGVITConfig(**SMALL_MAGVIT, **changes))).train()
    video = torch.randn(1, 3, 4, 16, 16)
    reconstruction, tokens, loss = model(video)
    assert reconstruction.shape == video.shape and tokens.shape == (1, 2, 4, 4)
    (F.mse_loss(reconstruction, video) + loss).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    with pytest.raises(ShapeError, match="video: expected frames a multiple of 2"):
        model.encode(torch.randn(1, 3, 3, 16, 16))


def test_inflated_kernels_act_like_the_2d_one_on_a_still_clip() -> None:
    kernel, image = torch.randn(4, 3, 3, 3), torch.randn(1, 3, 8, 8)
    clip = image.unsqueeze(2).expand(-1, -1, 5, -1, -1)
    expected = F.conv2d(image, kernel)
    for mode in ("central", "average"):
        result = F.conv3d(clip, inflate_kernel(kernel, 3, mode))
        torch.testing.assert_close(result, expected.unsqueeze(2).expand_as(result))
    causal = F.conv3d(F.pad(image.unsqueeze(2), (0, 0, 0, 0, 2, 0)), inflate_kernel(kernel, 3, "last"))
    torch.testing.assert_close(causal[:, :, 0], expected)
    with pytest.raises(OptionError, match="mode: expected one of"):
        inflate_kernel(kernel, 3, "first")


def test_inflation_takes_what_fits_and_refuses_what_does_not() -> None:
    torch.manual_seed(0)
    image = VQGAN(
        VQGANConfig(
            channels=32,
            channel_multipliers=(1, 2, 2),
            residual_blocks=1,
            attention_resolutions=(),
            z_channels=8,
            embedding_channels=8,
            codes=20,
        )
    )
    model = MAGVIT(MAGVITConfig(**SMALL_MAGVIT, downsample="conv"))
    state = {
        key: value
        for key, value in image.state_dict().items()
        if not key.startswith(("encoder.mid", "decoder.mid", "decoder.up", "encoder.conv_out"))
    }
    rest = inflate(model, state, "central")
    assert not [key for key in rest if key.startswith("encoder.down")]
    kernel = image.encoder.down[1].block[0].conv1.weight
    assert torch.equal(model.encoder.down[1].block[0].conv1.weight[:, :, 1], kernel)
    assert torch.equal(model.quantize.embedding.weight, image.quantize.embedding.weight)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ShapeError, match="a kernel that inflates"):
        inflate(model, {**state, "encoder.conv_in.weight": torch.zeros(5, 3, 3, 3)})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.inference_mode()
def test_magvit2_is_causal_and_an_image_is_its_first_frame() -> None:
    torch.manual_seed(0)
    model = shake(MAGVIT2(MAGVIT2Config(**SMALL_MAGVIT2)))
    video = torch.randn(1, 3, 9, 16, 16)
    changed = video.clone()
    changed[:, :, 5:] += 3
    features = model.features(video)
    assert features.shape == (1, 6, 5, 4, 4)
    assert torch.equal(model.features(changed)[:, :, :3], features[:, :, :3])
    torch.testing.assert_close(model.features(video[:, :, :1]), features[:, :, :1], rtol=1e-4, atol=1e-5)
    codes, tokens = model.encode(video)
    full = model.decode(codes)
    assert full.shape == video.shape
    torch.testing.assert_close(model.decode(codes[:, :, :3]), full[:, :, :5], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.decode_tokens(tokens), full, rtol=1e-4, atol=1e-4)
    leaky = shake(MAGVIT2(MAGVIT2Config(**SMALL_MAGVIT2, norm="group")))
    assert not leaky.config.streams
    assert not torch.equal(leaky.features(changed)[:, :, :3], leaky.features(video)[:, :, :3])


@pytest.mark.parametrize("frames", [1, 2, 4, 7])
def test_magvit2_keeps_lengths_and_trains(frames: int) -> None:
    torch.manual_seed(0)
    model = shake(MAGVIT2(MAGVIT2Config(**SMALL_MAGVIT2))).train()
    video = torch.randn(1, 3, frames, 8, 8)
    reconstruction, tokens, losses = model(video)
    assert reconstruction.shape == video.shape and tokens.dtype == torch.int64
    (F.mse_loss(reconstruction, video) + losses["commitment"]).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("order", ["block_first", "channel_first"])
def test_depth_to_space_orders(order: str) -> None:
    x = torch.arange(2 * 2 * 2 * 3 * 2.0).reshape(1, 24, 2, 1, 1)
    y = depth_to_space(x, (2, 2, 2), order)
    assert y.shape == (1, 3, 4, 2, 2)
    for t, i, j, c in ((0, 0, 0, 0), (1, 1, 0, 2), (3, 0, 1, 1)):
        block = (t % 2) * 4 + i * 2 + j
        channel = block * 3 + c if order == "block_first" else c * 8 + block
        assert y[0, c, t, i, j] == x[0, channel, t // 2, 0, 0]
    flat = x[:, :12].reshape(1, 12, 2, 1)
    if order == "channel_first":
        assert torch.equal(depth_to_space(flat.unsqueeze(2), (1, 2, 2), order).squeeze(2), F.pixel_shuffle(flat, 2))
    assert torch.equal(depth_to_space(x, (2, 2, 2), order, drop=0), y[:, :, 1:])
    assert torch.equal(depth_to_space(x, (2, 2, 2), order, drop=1), y[:, :, [0, 2, 3]])


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: MAGVIT(MAGVITConfig(**SMALL_MAGVIT)), (1, 3, 4, 16, 16)),
        (lambda: MAGVIT2(MAGVIT2Config(**SMALL_MAGVIT2)), (1, 3, 5, 16, 16)),
        (lambda: VQGAN(SMALL_VQGAN), (1, 3, 16, 16)),
        (lambda: MAGVIT2Layers(SMALL_LAYERS), (1, 3, 5, 16, 16)),
    ],
    ids=["magvit", "magvit2", "vqgan", "magvit2-layers"],
)
def test_checkpointed_blocks_run_twice_and_keep_the_gradients(make, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = shake(make()).train()
    inputs = torch.randn(shape)
    calls: list[nn.Module] = []
    gradients = []
    for enabled in (False, True):
        model.enable_gradient_checkpointing(enabled)
        blocks = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        inner = [getattr(b, "conv1", None) or b.fn for b in blocks]
        hooks = [m.register_forward_pre_hook(lambda module, args: calls.append(module)) for m in inner]
        model.zero_grad()
        F.mse_loss(model(inputs)[0], inputs).backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
        assert len(calls) == len(blocks) * (2 if enabled else 1)
        calls.clear()
        for hook in hooks:
            hook.remove()
    assert all(torch.equal(value, gradients[1][key]) for key, value in gradients[0].items())
    model.eval()(inputs)
    assert not calls


def test_checkpointed_layers_need_less_memory() -> None:
    from benchmarks.memory import peak_bytes

    torch.manual_seed(0)
    model = MAGVIT2Layers(
        dataclasses.replace(SMALL_LAYERS, layers=(("consecutive_residual", 4), "attend_time"))
    ).train()
    video = torch.randn(1, 3, 5, 32, 32)

    def step() -> None:
        F.mse_loss(model(video)[0], video).backward()
        model.zero_grad()

    peaks = []
    for enabled in (False, True):
        model.enable_gradient_checkpointing(enabled)
        step()  # packed kernels are cached by the first
        peaks.append(peak_bytes(step, torch.device("cpu")))
    # measured: 6.5 of 20.0 MiB
    assert peaks[1] < 0.5 * peaks[0], peaks


def test_bfloat16_models_on_a_cpu() -> None:
    torch.manual_seed(0)
    for make, shape in (
        (lambda: MAGVIT(MAGVITConfig(**SMALL_MAGVIT)), (2, 3, 4, 16, 16)),
        (lambda: VQGAN(SMALL_VQGAN), (2, 3, 16, 16)),
    ):
        model = shake(make())
        video = torch.randn(shape).to(torch.bfloat16)
        half = copy.deepcopy(model).to(torch.bfloat16)
        assert half(video)[0].dtype == torch.bfloat16 and half(video)[0].shape == shape
        ours, exact = half.encoder(as_video(video)), copy.deepcopy(half).double().encoder(as_video(video).double())
        # 8 bits of mantissa through some twenty layers
        assert (ours.double() - exact).abs().max() < 0.05 * exact.abs().max()


def as_video(x: torch.Tensor) -> torch.Tensor:
    return (x.unsqueeze(2) if x.ndim == 4 else x).contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("index", [50, -1])
def test_tokens_outside_of_the_codebook_are_refused(index: int) -> None:
    with pytest.raises(OptionError, match="indices: expected codes from 0 to 49"):
        VQGAN(SMALL_VQGAN).decode_tokens(torch.tensor([[[0, index]]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MAGVIT2Config(channels=0), "channels: expected a whole number of at least 1, got 0"),
        (lambda: MAGVIT2Config(bits=0), "bits: expected a whole number"),
        (lambda: MAGVIT2Config(bit_order="x"), "bit_order: expected one of"),
        (lambda: MAGVIT2Config(channels=33), "channels: expected widths of at most 32, or multiples of it, got 33"),
        (lambda: MAGVITConfig(codes=0), "codes: expected a whole number"),
        (
            lambda: MAGVITConfig(channel_multipliers=(0, 1, 1, 1)),
            "channel_multipliers: expected whole numbers of at least 1",
        ),
        (lambda: VQGANConfig(channel_multipliers=()), "channel_multipliers: expected whole numbers"),
        (lambda: VQGANConfig(residual_blocks=True), "residual_blocks: expected a whole number"),
        (lambda: MAGVIT2LayersConfig(heads=0), "heads: expected a whole number"),
    ],
)
def test_numbers_that_no_model_can_have_are_refused(make, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_magvit2_never_gives_fewer_frames_than_asked_for_and_takes_empty_batches() -> None:
    config = MAGVIT2Config(channels=32, channel_multipliers=(1, 1), temporal_down=(True,), residual_blocks=1, bits=4)
    model = MAGVIT2(config).eval()
    codes = torch.ones(1, 4, 3, 4, 4)
    for frames in (0, 6):
        with pytest.raises(OptionError, match=f"num_frames: expected 1 to 5, what these codes hold, got {frames}"):
            model.decode(codes, num_frames=frames)
    assert model.decode(codes, num_frames=4).shape == (1, 3, 4, 8, 8)
    assert model.decode(codes[:0]).shape == (0, 3, 5, 8, 8)


def test_magvit_in_half_precision_on_a_cpu() -> None:
    torch.manual_seed(0)
    config = MAGVITConfig(
        channels=32,
        channel_multipliers=(1, 1),
        temporal_down=(True,),
        residual_blocks=1,
        embedding_channels=8,
        codes=16,
    )
    model, video = MAGVIT(config).eval(), torch.randn(1, 3, 4, 8, 8)
    with torch.no_grad():
        exact = copy.deepcopy(model).double().encoder(video.double())
        for dtype, error in ((torch.float16, 2**-8), (torch.bfloat16, 2**-5)):
            half = copy.deepcopy(model).to(dtype).encoder(video.to(dtype))
            assert half.dtype == dtype and (half - exact).abs().max() < error * exact.abs().max()
