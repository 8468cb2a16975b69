# SPDX-License-Identifier: Apache-2.0
"""Patched video VAEs peak below upstream's, on the policies of a CPU and of a GPU, and write only over what nobody reads."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
import vae_cases as cases
from torch._subclasses.fake_tensor import FakeTensorMode

import vidkernels
from vidkernels.models.tokenizers._memory import _LiveBytes
from vidkernels.nn import _residual
from vidkernels.patching.rules import _vae_memory, _vae_units, _vidtok_units

diffusers = pytest.importorskip("diffusers", minversion="0.42")
# Wan's chunks go together on a GPU: four of them at 17 frames. Its pieces are bounded by a chunk then, whatever the size.
LENGTHS = {"wan2.1": 17, "wan2.2": 17, "qwenimage": 17}
# VAEs whose blocks write over their inputs, and the class of those blocks.
OVERWRITING = {
    "wan2.1": "WanResidualBlock", "wan2.2": "WanResidualBlock", "mochi": "MochiResnetBlock3D",
    "ltx": "LTXVideoResnetBlock3d", "ltx2": "LTX2VideoResnetBlock3d", "hunyuan": "HunyuanVideoResnetBlockCausal3D",
    "hunyuan1.5": "HunyuanVideo15ResnetBlock", "cogvideox": "CogVideoXResnetBlock3D", "cosmos": "CosmosResnetBlock3d",
    "magvit": "EasyAnimateResidualBlock3D",
}  # fmt: skip


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and pieces as a GPU gets them. Fake tensors of one need torch with CUDA."""
    monkeypatch.setattr(_vae_units, "_BUDGET", {})
    monkeypatch.setattr(_vae_units, "reads_mostly_weights", lambda *call: False)
    monkeypatch.setattr(_residual, "PIECE_CPU", _residual.PIECE_GPU)
    monkeypatch.setattr(_vidtok_units, "_RAISED_CPU", _vidtok_units._RAISED_GPU)
    for name in ("_PIECE", "_LEAST"):
        monkeypatch.setattr(_vae_memory, f"{name}_CPU", getattr(_vae_memory, f"{name}_GPU"))


def peak(model: Any, call: Any, given: torch.Tensor) -> int:
    with _LiveBytes((*model.parameters(), *model.buffers(), given)) as live:
        call(model, given)
    return live.peak


def decoded(model: Any, z: torch.Tensor) -> torch.Tensor:
    return model.decode(z) if isinstance(model, diffusers.AutoencoderVidTok) else cases.decode(model, z)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("name", [*cases.VAES, "vidtok"])
def test_no_peak_is_above_upstreams(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors: lifetimes without values, hence without the processor's own ways."""
    if device == "gpu":
        as_on_a_gpu(monkeypatch)
    if name != "vidtok":
        # imported before the mode: Cosmos's file makes tensors, which would be fake ones
        getattr(diffusers, cases.VAES[name].model)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = diffusers.AutoencoderVidTok(ch=32).eval() if name == "vidtok" else cases.build(name)
        frames = LENGTHS.get(name) or (8 if name == "vidtok" else cases.VAES[name].frames[1])
        x = torch.empty(1, 3, frames, 64, 64)
        z = model.encode(x).latent_dist.mode()
        calls = ((cases.encode, x), (decoded, z))
        before = [peak(model, *call) for call in calls]
        assert vidkernels.patch(model)
        after = [peak(model, *call) for call in calls]
    # 1 KB: a scaled timestep may live on
    assert all(ours <= theirs + 1024 for ours, theirs in zip(after, before, strict=True)), (after, before)


@pytest.mark.parametrize("name", OVERWRITING)
def test_pieces_and_places_do_not_change_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over their inputs, two frames at a time, or as training runs them: on one kernel the same bits."""
    model = cases.build(name)
    vidkernels.patch(model)
    x = cases.clip(name, 13 if 13 in cases.VAES[name].frames else 9, cases.VAES[name].batch)
    monkeypatch.setattr(_vae_units, "_BUDGET", {})
    results = []
    with torch.no_grad():
        for allowed, least in ((False, 4), (True, 4), (True, 2), (True, 1)):
            monkeypatch.setattr(_vae_memory, "_is_unseen", lambda *call, allowed=allowed: allowed)
            monkeypatch.setattr(_vae_memory, "_PIECE_CPU", 1)
            monkeypatch.setattr(_vae_memory, "_LEAST_CPU", least)
            z = cases.latents(model, x)
            results.append((z, cases.decode(model, z)))
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", OVERWRITING)
def test_what_somebody_may_still_read_is_not_overwritten(name: str) -> None:
    """A hook's tensors, a block's own input, gradients' inputs, and those of a container that is not upstream's."""
    model = cases.build(name)
    vidkernels.patch(model)
    case = cases.VAES[name]
    with torch.no_grad():
        z = torch.randn_like(cases.latents(model, cases.clip(name, case.frames[1])))
    block = next(m for m in model.decoder.modules() if type(m).__name__ == OVERWRITING[name])
    with torch.no_grad():
        assert _vae_memory._is_unseen(model.decoder, z)
        x = torch.randn(1, next(block.parameters()).shape[0], 3, 4, 4).to(memory_format=torch.channels_last_3d)
        kept = x.clone()
        block(x, **({"zq": torch.randn(1, z.shape[1], 2, 4, 4)} if name == "cogvideox" else {}))
        assert torch.equal(x, kept)
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        handle = block.register_forward_hook(
            lambda module, args, output: seen.extend((t, t.clone()) for t in (args[0], output[0]))
        )
        cases.decode(model, z)
        assert seen and all(torch.equal(*pair) for pair in seen)
        handle.remove()
        assert _vae_memory._is_unseen(model.decoder, z)
        for change in (_with_own_forward, _with_own_class):
            changed = copy.deepcopy(model)
            change(changed.decoder)
            assert not _vae_memory._is_unseen(changed.decoder, z)
    assert not _vae_memory._is_unseen(model.decoder, z)  # gradients are on


def _with_own_forward(decoder: Any) -> None:
    block = getattr(decoder, "mid_block", None) or decoder.block_in
    block.forward = lambda x, **options: type(block).forward(block, x, **options)


def _with_own_class(decoder: Any) -> None:
    block = getattr(decoder, "mid_block", None) or decoder.block_in
    forward = type(block).forward
    members = {"__module__": "mine", "forward": lambda self, x, **options: forward(self, x, **options)}
    block.__class__ = type("OwnBlock", (type(block),), members)


@torch.no_grad()
def test_wan_shortcuts_of_any_box() -> None:
    """Means and repetitions against upstream's for every way in which a box's axes are divided, an odd number of frames, the
    first chunk."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AvgDown3D, DupUp3D

    from vidkernels.patching.rules import _wan_shortcuts

    for time, side in ((1, 1), (1, 2), (2, 1), (2, 2)):
        values = {1, side, side * side, time * side * side}
        for count in values:
            out = 4 * time * side * side // count
            x = torch.randn(2, 4, 5, 4, 6).to(memory_format=torch.channels_last_3d)
            down = AvgDown3D(4, out, time, side)
            torch.testing.assert_close(_wan_shortcuts.averaged(down, x), down(x))
            if 4 * count % (time * side * side):
                continue
            up = DupUp3D(4, 4 * count // (time * side * side), time, side)
            for first in (False, True):
                expected = up(x, first_chunk=first)
                y = torch.randn_like(expected).to(memory_format=torch.channels_last_3d)
                total = y + expected
                torch.testing.assert_close(_wan_shortcuts.add_repeated(up, x, y, first), total)


@pytest.mark.parametrize("options", [{}, {"is_causal": False}, {"tempo_us": [1]}], ids=["causal", "noncausal", "space"])
def test_vidtok_upsamples_and_convolves_in_pieces(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of the whole for pieces of a frame and of several; blocks and upsamplers of a level are called once a piece."""
    model = diffusers.AutoencoderVidTok(ch=32, num_res_blocks=1, **options).eval()
    vidkernels.patch(model)
    z = torch.randn(2, 4, 4, 4, 4)
    results, pieces = [], []
    frames = _vidtok_units._frames
    monkeypatch.setattr(_vidtok_units, "_frames", lambda *call: pieces.append(1) or frames(*call))
    with torch.no_grad():
        for limit in (1 << 40, 1 << 18, 1):
            monkeypatch.setattr(_vidtok_units, "_RAISED_CPU", limit)
            pieces.clear()
            results.append((model.decode(z), len(pieces)))  # the decoder alone would keep frames for a next chunk
    assert all(torch.equal(result, results[0][0]) for result, _ in results)
    counts = [count for _, count in results]
    assert counts[0] <= counts[1] <= counts[2] > counts[0], counts


def test_vidtok_holds_nothing_in_front_of_an_upsampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the block behind it runs: that tensor was a fifth of a decoder's peak."""
    model = diffusers.AutoencoderVidTok(ch=32, num_res_blocks=1).eval()
    vidkernels.patch(model)
    raised, frames = _vidtok_units.raised_block, _vidtok_units._frames
    given: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def upsample(upsampling: Any, block: Any, x: torch.Tensor, *rest: Any) -> Any:
        given.append(weakref.ref(x))
        return raised(upsampling, block, x, *rest)

    def convolve(*call: Any) -> torch.Tensor:
        alive.extend(x() is not None for x in given)
        return frames(*call)

    monkeypatch.setattr(_vidtok_units, "_RAISED_CPU", 1 << 40)  # one after the other
    monkeypatch.setattr(_vidtok_units, "raised_block", upsample)
    monkeypatch.setattr(_vidtok_units, "_frames", convolve)
    with torch.no_grad():
        model.decode(torch.randn(1, 4, 2, 4, 4))
    assert len(given) > 1 and alive and not any(alive)
