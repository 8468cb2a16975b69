# SPDX-License-Identifier: Apache-2.0
"""diffusers' VAEs over frames (AutoencoderKL and relatives) and its temporal decoder, patched against unpatched and float64."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import random
import warnings
from typing import Any

import pytest
import torch
import vae_cases as cases
from patching_suite import no_fallback  # noqa: F401

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning

diffusers = pytest.importorskip("diffusers", minversion="0.42")
LEVELS = {"kl": (16, 32), "temporal": (32, 64)}  # a temporal decoder has 32 groups always
KINDS = list(LEVELS)
FRAMES = 3
PARTS = [
    ("kl", "encoder.down_blocks.0.resnets.0"), ("kl", "encoder.down_blocks.0.downsamplers.0.conv"),
    ("kl", "encoder.mid_block.attentions.0"), ("kl", "encoder.mid_block.attentions.0.to_q"), ("kl", "encoder.conv_in"),
    ("kl", "decoder.up_blocks.0.upsamplers.0"), ("kl", "decoder.up_blocks.1.resnets.0.conv1"), ("kl", "decoder.mid_block"),
    ("kl", "decoder.conv_norm_out"), ("kl", "decoder.conv_out"), ("temporal", "decoder.mid_block.resnets.0"),
    ("temporal", "decoder.up_blocks.0.resnets.0.time_mixer"), ("temporal", "decoder.mid_block.attentions.0"),
    ("temporal", "decoder.up_blocks.1.resnets.0.temporal_res_block.conv2"), ("temporal", "decoder.time_conv_out"),
    ("temporal", "decoder.up_blocks.1.resnets.1.spatial_res_block"), ("temporal", "decoder.up_blocks.1"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def build(kind: str = "kl", **changes: Any) -> Any:
    widths = changes.pop("block_out_channels", LEVELS[kind])
    options: dict[str, Any] = {"block_out_channels": widths, "layers_per_block": 1, "latent_channels": 4}
    options["down_block_types"] = ("DownEncoderBlock2D",) * len(widths)
    if kind == "temporal":
        options["layers_per_block"] = 2  # with one there is no attention
        return cases.randomized(diffusers.AutoencoderKLTemporalDecoder(**{**options, **changes}).eval())
    options |= {"up_block_types": ("UpDecoderBlock2D",) * len(widths), "norm_num_groups": 4}
    return cases.randomized(diffusers.AutoencoderKL(**{**options, **changes}).eval())


def images(batch: int = FRAMES, height: int = 12, width: int = 16) -> torch.Tensor:
    return torch.randn(batch, 3, height, width)


def decode(model: Any, z: torch.Tensor) -> torch.Tensor:
    """Frames of latents; a temporal decoder takes clips of three, and its original returns them in changing formats."""
    is_temporal = hasattr(model.decoder, "time_conv_out")
    found: torch.Tensor = model.decode(z, **({"num_frames": FRAMES} if is_temporal else {})).sample
    return found.contiguous() if is_temporal else found


def check(model: Any, x: torch.Tensor) -> None:
    models = copy.deepcopy(model), model, cases.in_double(model)
    vidkernels.patch(model)
    with torch.no_grad():
        cases.check_call(cases.encode, models, x, "encoded")
        cases.check_call(decode, models, cases.latents(models[0], x), "decoded")


def counts(model: Any) -> dict[str, int]:
    """Patched modules by their rules' names."""
    found: dict[str, int] = {}
    for entry in vidkernels.patch(model).patched:
        name = entry.rule.removeprefix("diffusers.")
        found[name] = found.get(name, 0) + 1
    return found


def test_which_modules_are_patched() -> None:
    encoder = {"image_vae.encoder": 1, "image_vae.down_block": 2}
    both = {**encoder, "image_vae.decoder": 1, "image_vae.up_block": 2, "image_vae.mid_block": 2}
    assert counts(build()) == both
    assert counts(diffusers.VQModel(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
                                    up_block_types=("UpDecoderBlock2D",) * 2)) == both  # fmt: skip
    temporal = {
        f"temporal_decoder.{part}": count for part, count in (("decoder", 1), ("mid_block", 1), ("up_block", 2))
    }
    assert counts(build("temporal")) == {**encoder, "image_vae.mid_block": 1, **temporal}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    widths = {"down_block_out_channels": (32, 32), "up_block_out_channels": (32, 32)}
    asymmetric = counts(diffusers.AsymmetricAutoencoderKL(**blocks, **widths))  # its decoder takes a mask
    del both["image_vae.decoder"]
    assert asymmetric == both


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_random_configurations(seed: int, kind: str) -> None:
    draw = random.Random(seed)
    step = 4 if kind == "kl" else 32
    widths = tuple(step * draw.randint(1, 6 if kind == "kl" else 2) for _ in range(draw.randint(1, 3)))
    changes = {"layers_per_block": draw.randint(1, 2), "latent_channels": draw.randint(1, 5)}
    if kind == "kl":
        changes["mid_block_add_attention"] = draw.random() < 0.7
    model = build(kind, block_out_channels=widths, **changes)
    x = images(FRAMES * draw.randint(1, 2), draw.randint(9, 21), draw.randint(9, 21))
    check(model, x.to(memory_format=torch.channels_last) if draw.random() < 0.5 else x)
    assert vidkernels.status(model).patched == "all" and not vidkernels.status(model).fallbacks


@pytest.mark.parametrize("size", [(1, 9, 15), (1, 16, 16), (5, 8, 10)])
def test_sizes(size: tuple[int, int, int]) -> None:
    check(build(), images(*size))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind: str) -> None:
    model = build(kind).bfloat16()
    check(model, images().bfloat16())
    assert cases.encode(model, images().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    model = build(kind)
    original, double = copy.deepcopy(model), cases.in_double(model)
    vidkernels.patch(model)
    with torch.no_grad():
        for call, given in ((cases.encode, images()), (decode, cases.latents(original, images()))):
            with torch.autocast("cpu", torch.bfloat16):
                expected, actual = call(original, given), call(model, given)
            cases.assert_within_promise(actual, expected, call(double, given.double()), call.__name__)


def gradients(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = decode(model, cases.latents(model, x))
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y)
    named = {"x": x, **dict(model.named_parameters())}
    found = torch.autograd.grad((y * weight).sum(), list(named.values()), allow_unused=True)
    return {key: g for key, g in zip(named, found, strict=True) if g is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    model, x = build(kind), images(FRAMES, 8, 8)
    truth = gradients(cases.in_double(model), x.double())
    inputs = x, cases.nudged(x), cases.nudged(x)
    originals = [gradients(model, given) for given in inputs]
    vidkernels.patch(model, mode="training")
    cases.assert_gradients_agree(originals, [gradients(model, given) for given in inputs], truth)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind: str) -> None:
    model, x = build(kind), images(FRAMES, 8, 8)
    vidkernels.patch(model)
    plain = gradients(model, x)
    model.train()
    model.enable_gradient_checkpointing()
    again = gradients(model, x)
    assert plain.keys() == again.keys() and all(torch.equal(plain[key], again[key]) for key in plain)


@pytest.mark.parametrize(("kind", "part"), PARTS)
def test_hooks_inside_fire_and_see_what_stays(kind: str, part: str) -> None:
    model, x = build(kind), images()
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(module: Any, inputs: Any, options: dict[str, Any], output: torch.Tensor) -> None:
        given = (*inputs, *options.values(), output)
        kept.extend((t, t.clone()) for t in given if isinstance(t, torch.Tensor))

    with torch.no_grad():
        z = cases.latents(model, x)
        expected = cases.encode(model, x), decode(model, z)
        vidkernels.patch(model)
        model.get_submodule(part).register_forward_hook(keep, with_kwargs=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VidkernelsFallbackWarning)
            actual = cases.encode(model, x), decode(model, z)
    assert kept and all(torch.equal(*pair) for pair in kept)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
@pytest.mark.parametrize(
    ("kind", "layer"),
    [("kl", "mid_block.resnets.0.conv1"), ("kl", "conv_in"), ("temporal", "up_blocks.0.upsamplers.0.conv")],
)
def test_lora_on_one_convolution_is_honoured(kind: str, layer: str) -> None:
    import peft

    model = build(kind)
    vidkernels.patch(model)
    with torch.no_grad():
        z = cases.latents(model, images())
        before = decode(model, z)
        config = peft.LoraConfig(target_modules=[layer], init_lora_weights=False)
        peft.inject_adapter_in_model(config, model.decoder)
        with pytest.warns(VidkernelsFallbackWarning, match="peft"):
            after = decode(model, z)
        assert not torch.allclose(before, after)
        vidkernels.unpatch(model)
        torch.testing.assert_close(after, decode(model, z), atol=2e-5, rtol=1e-4)


def test_slices_and_tiles() -> None:
    model = build()
    model.enable_slicing()
    check(model, images(2))
    model = build()
    model.enable_tiling()
    model.tile_sample_min_size, model.tile_latent_min_size = 16, 8
    check(model, images(1, 28, 24))


@pytest.mark.parametrize("kind", KINDS)
def test_verify_state_copies_and_undo(kind: str) -> None:
    model, x = build(kind), images()
    classes, state = [type(m) for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        z = cases.latents(model, x)
        expected = cases.encode(model, x), decode(model, z)
        report = vidkernels.patch(model, verify=True)
        assert all(item.ok for item in report.numerics) and len(report.numerics) > 4
        actual = cases.encode(model, x), decode(model, z)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(cases.encode(other, x), actual[0]) and torch.equal(decode(other, z), actual[1])
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        report.undo()
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(cases.encode(model, x), expected[0]) and torch.equal(decode(model, z), expected[1])


@pytest.mark.parametrize("kind", ["kl", pytest.param("temporal", marks=pytest.mark.slow)])
def test_networks_compile_without_graph_break(kind: str) -> None:
    model = build(kind)
    vidkernels.patch(model)
    rest = (torch.zeros(1, FRAMES), FRAMES) if kind == "temporal" else ()
    with torch.no_grad():
        for network, given in ((model.encoder, (images(),)), (model.decoder, (torch.randn(FRAMES, 4, 6, 8), *rest))):
            expected = network(*given)
            torch._dynamo.reset()
            compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(*given), expected, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


STRATEGIES = [
    ("fixed", False),
    ("fixed", True),
    ("learned", False),
    ("learned_with_images", True),
    ("learned_with_images", False),
]


@pytest.mark.parametrize(("strategy", "switched"), STRATEGIES)
def test_blends(strategy: str, switched: bool) -> None:
    from diffusers.models.resnet import SpatioTemporalResBlock
    from diffusers.models.unets.unet_3d_blocks import UpBlockTemporalDecoder

    block = UpBlockTemporalDecoder(32, 64, num_layers=2)
    options: dict[str, Any] = {"temb_channels": None, "merge_factor": 0.3, "merge_strategy": strategy}
    block.resnets[1] = SpatioTemporalResBlock(64, **options, switch_spatial_to_temporal_mix=switched)
    cases.randomized(block.eval())
    models = copy.deepcopy(block), block, copy.deepcopy(block).double()
    indicator = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert vidkernels.patch(block)
    x = torch.randn(6, 32, 4, 6)
    wide = copy.deepcopy(models[2])
    for dtype in (torch.float32, torch.bfloat16):
        for candidate in models[:2]:
            candidate.to(dtype)
        wide.load_state_dict(models[0].state_dict())

        def call(module: Any, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = module(x, indicator.to(x.dtype))
            return found

        with torch.no_grad():
            cases.check_call(call, (models[0], block, wide), x.to(dtype), f"{dtype}")
    for candidate in models[:2]:
        candidate.float()
    weight = torch.linspace(-1, 1, 6 * 64 * 8 * 12, dtype=torch.float64).reshape(6, 64, 8, 12)
    found = []
    for candidate, dtype in ((models[0], torch.float32), (block, torch.float32), (wide, torch.float64)):
        total = (candidate(x.to(dtype), indicator.to(dtype)) * weight.to(dtype)).sum()
        names = [name for name, _ in candidate.named_parameters()]
        found.append(dict(zip(names, torch.autograd.grad(total, list(candidate.parameters())), strict=True)))
    cases.assert_gradients_agree([found[0]], [found[1]], found[2])


def test_other_processors_are_called() -> None:
    model, x = build(), images()
    original = copy.deepcopy(model)
    vidkernels.patch(model)
    for change in ("set_default_attn_processor", "fuse_qkv_projections"):
        for candidate in (model, original):
            getattr(candidate, change)()
        with torch.no_grad(), pytest.warns(VidkernelsFallbackWarning, match="an attention uses"):
            actual = cases.encode(model, x)
            torch.testing.assert_close(actual, cases.encode(original, x), atol=2e-5, rtol=1e-4)
        from vidkernels.patching import _guard

        _guard._WARNED.clear()


def test_what_is_not_served_is_left_out() -> None:
    """Refused when the model is patched, with the reason, so that no call falls back."""
    model = build(act_fn="relu")
    original, x = copy.deepcopy(model), images()
    report = vidkernels.patch(model)
    refused = {entry.cls for entry in report.entries if entry.reason == "its activation is ReLU, not SiLU"}
    assert refused == {"DownEncoderBlock2D", "UpDecoderBlock2D", "UNetMidBlock2D"} and report.patched
    with torch.no_grad():
        torch.testing.assert_close(cases.encode(model, x), cases.encode(original, x), atol=2e-4, rtol=1e-3)
    assert not vidkernels.status(model).fallbacks
    spatial = cases.randomized(
        diffusers.VQModel(
            block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), norm_type="spatial"
        ).eval()
    )
    with torch.no_grad():
        expected = spatial(x).sample
        report = vidkernels.patch(spatial)
        assert {"Decoder", "UpDecoderBlock2D"} <= {entry.cls for entry in report.entries if entry.reason}
        torch.testing.assert_close(spatial(x).sample, expected, atol=2e-4, rtol=1e-3)
    assert not vidkernels.status(spatial).fallbacks


def test_unets_are_left_alone() -> None:
    levels = {"block_out_channels": (32, 32), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    conditioned = diffusers.UNet2DConditionModel(
        **levels, **blocks, cross_attention_dim=16, attention_head_dim=8
    ).eval()
    temporal = diffusers.UNetSpatioTemporalConditionModel(
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), block_out_channels=(32, 64),
        layers_per_block=1, cross_attention_dim=16, num_attention_heads=(2, 4), projection_class_embeddings_input_dim=32,
        addition_time_embed_dim=8,
    ).eval()  # fmt: skip
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    plain = diffusers.UNet2DModel(**levels, **blocks).eval()
    for model in (conditioned, temporal, plain):
        report = vidkernels.explain(model)
        ours = [entry for entry in report.entries if ".image_vae." in entry.rule or ".temporal_decoder." in entry.rule]
        assert not [entry for entry in ours if not entry.reason], report
        assert not [entry for entry in report.entries if entry.cls in ("ResnetBlock2D", "SpatioTemporalResBlock")], (
            report
        )
        assert len(ours) == (1 if model is plain else 0)  # its middle block, of the class that VAEs have


def test_dropout_and_training_mode() -> None:
    from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D

    block = DownEncoderBlock2D(8, 16, dropout=0.5, num_layers=2, resnet_groups=4, downsample_padding=0)
    original, x = copy.deepcopy(block).eval(), images(2)[:, :1].expand(-1, 8, -1, -1)
    assert vidkernels.patch(block)
    block.train()
    assert not torch.equal(block(x), block(x))
    torch.testing.assert_close(block.eval()(x), original(x), atol=2e-5, rtol=1e-4)
