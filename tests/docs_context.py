# SPDX-License-Identifier: Apache-2.0
"""What stands around the fragments in docs: by page and number of the Python block, a function that makes the names the block
takes for granted, and one that looks at what came out (or None)."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vidkernels
from vidkernels import ops

Names = dict[str, Any]
Make = Callable[[pytest.MonkeyPatch, Path], Names]
CONTEXTS: dict[str, tuple[Make, Callable[[Names], None] | None]] = {}
NOT_RUN = {
    "docs/testing.md 2": "compiles a kernel for a GPU; tests/test_aot.py is full of such calls",
    "docs/testing.md 3": "compiles a kernel for a GPU; tests/test_triton_launches.py is full of such calls",
}
SMALL_VIDTOK = {
    "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "spatial_ds": [0], "spatial_us": [1], "tempo_ds": [0], "tempo_us": [1],
}  # fmt: skip


def context(where: str, check: Callable[[Names], None] | None = None) -> Callable[[Make], Make]:
    """Register the names for a block, and what must hold after it."""

    def add(make: Make) -> Make:
        CONTEXTS[where] = (make, check)
        return make

    return add


def _small_autoencoder(patch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    original = diffusers.AutoencoderVidTok
    patch.setattr(diffusers, "AutoencoderVidTok", lambda: original(**SMALL_VIDTOK))


def _patched_report(names: Names) -> None:
    assert names["report"].patched


@context("README.md 1", _patched_report)
def _readme(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    _small_autoencoder(patch)
    return {}


@context("docs/patching.md 1", lambda names: None)
def _patching(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    return {"model": pytest.importorskip("diffusers").AutoencoderVidTok(**SMALL_VIDTOK).eval()}


@context("docs/patching.md 2", lambda names: _patched_block(names))
def _own_rule(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    from vidkernels.patching import _rule

    (folder / "mymodel").mkdir()
    (folder / "mymodel" / "__init__.py").touch()
    (folder / "mymodel" / "blocks.py").write_text(
        "from torch import nn\n\n\n"
        "class Block(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.norm = nn.LayerNorm(64, eps=1e-6)\n\n"
        "    def forward(self, x):\n"
        "        return self.norm(x.movedim(1, -1)).movedim(-1, 1)\n"
    )
    patch.syspath_prepend(str(folder))
    patch.setattr(_rule, "_USER", [])
    import mymodel.blocks  # type: ignore[import-not-found]

    model = nn.Sequential(mymodel.blocks.Block()).eval()
    return {"mymodel": mymodel, "model": model, "ops": ops, "torch": torch, "vidkernels": vidkernels}


def _patched_block(names: Names) -> None:
    assert type(names["model"][0]) is not names["mymodel"].blocks.Block


@context("docs/adaln_zero.md 1", lambda names: _finite(names["x"], (2, 24, 16)))
def _adaln(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    linear, mlp = nn.Linear(16, 6 * 16), nn.Linear(16, 16)
    tensors = {"x": torch.randn(2, 24, 16), "t": torch.randn(2, 16)}
    return {**tensors, "linear": linear, "silu": nn.functional.silu, "attention": nn.Identity(), "mlp": mlp, "ops": ops}


def _finite(value: torch.Tensor, shape: tuple[int, ...]) -> None:
    assert value.shape == shape
    assert value.isfinite().all()


@context("docs/benchmarking.md 1", lambda names: _benchmark(names))
def _case(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    from benchmarks import registry

    patch.setattr(registry, "_FACTORIES", {})
    names: Names = {"register": registry.register, "Case": registry.Case, "ops": ops, "torch": torch}
    return {**names, "Iterator": Iterator, "Any": Any, "LEVELS": [8, 8, 8, 5, 5, 5]}


def _benchmark(names: Names) -> None:
    from benchmarks import registry

    (case,) = registry.cases("fsq", torch.device("cpu"), True)
    inputs = case.make_inputs()
    for ours, reference in zip(case.ours(inputs), case.reference(inputs), strict=True):
        assert torch.equal(ours, reference)


def _latte_and_sampler() -> Names:
    from vidkernels.models.transformers import Latte
    from vidkernels.sampling import RectifiedFlow

    size = {"depth": 2, "hidden_size": 32, "num_heads": 2, "input_size": 8, "num_frames": 4}
    model, flow = Latte.from_config(size).eval(), RectifiedFlow("sigma")
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)

    def sampler(seed: int) -> torch.Tensor:
        noise = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            return flow.sample(lambda x, t: model(x, t)[:, :, :4], noise, 50)

    return {"transformer": model, "sampler": sampler, "vidkernels": vidkernels}


@context("docs/caching.md 1")
def _cache(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    return _latte_and_sampler()


@context("docs/caching.md 2", lambda names: _saved(names))
def _calibrate(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    from vidkernels import caching

    patch.setattr(caching, "calibrate", functools.partial(caching.calibrate, runs=2, seeds=(0,)))  # 2 s instead of 10
    return _latte_and_sampler()


def _saved(names: Names) -> None:
    assert Path("codebook.json").exists()


@context("docs/causal_conv3d.md 1", lambda names: _streamed(names))
def _stream(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    return {"vidkernels": vidkernels, "clip": torch.randn(1, 64, 9, 8, 8)}


def _streamed(names: Names) -> None:
    assert torch.equal(torch.cat(names["parts"], 2), names["layer"](names["clip"]))


@context("docs/models.md 1", lambda names: _finite(names["reconstruction"], (1, 3, 5, 16, 16)))
def _vidtok(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    from vidkernels.models.tokenizers import VidTok
    from vidkernels.models.tokenizers.vidtok_config import CONFIGS

    name = "vidtok_fsq_causal_488_32768"
    patch.setitem(CONFIGS, name, dataclasses.replace(CONFIGS[name], channels=16))
    torch.save(VidTok.from_config(name).state_dict(), folder / f"{name}.ckpt")
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    return {"video": video, "chunks": video.split([1, 4], dim=2)}


@context("docs/packing.md 1", lambda names: _finite(names["latents"][0], (4, 2, 4, 4)))
def _pack(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    latents = [torch.randn(4, 2, 4, 4), torch.randn(4, 1, 8, 4)]

    def model(tokens: torch.Tensor, *_: Any) -> torch.Tensor:
        return 2 * tokens

    tensors: Names = {"latents": latents, "prompts": [torch.randn(3, 8), torch.randn(5, 8)], "target": 0.5}
    return {**tensors, "costs": [8.0, 8.0], "budget": 16.0, "model": model}


@context("docs/varlen_attention.md 1", lambda names: _finite(names["out"], (16, 2, 8)))
def _attention(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    from vidkernels import packing

    text = packing.pack_text([torch.randn(3, 8), torch.randn(5, 8)])
    q, k, v = torch.randn(16, 2, 8), *torch.randn(2, 8, 2, 8)
    tensors = {"latents": [torch.randn(4, 2, 4, 4), torch.randn(4, 1, 8, 4)], "text": text, "q": q, "k": k, "v": v}
    return {**tensors, "projection": nn.LazyLinear(3 * 2 * 8), "heads": 2, "dim": 8}


@context(
    "docs/varlen_attention.md 2",
    lambda names: _finite(names["prefix"], (5, 2, 8)) or _finite(names["output"], (7, 2, 8)),
)
def _prefix_attention(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    offsets = {"prefix_offsets": [0, 2, 5], "output_offsets": [0, 4, 7], "offsets": [0, 6, 12]}
    rows = {"q_prefix": 5, "k_prefix": 5, "v_prefix": 5, "q_output": 7, "k": 12, "v": 12}
    tensors = {name: torch.randn(count, 2, 8) for name, count in rows.items()}
    counts = {name: torch.tensor(value, dtype=torch.int32) for name, value in offsets.items()}
    return {"ops": ops, **tensors, **counts}


@context("docs/testing.md 1", lambda names: names["test_indices_to_codes"]())
def _host_case(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    from vidkernels import _library

    if _library.cpu_missing is not None:
        pytest.skip(_library.cpu_missing)
    indices = torch.randint(0, 240, (2, 4, 4), dtype=torch.int32)
    return {"indices": indices, "ops": ops, "torch": torch, "LEVELS": [8, 6, 5]}


@context("docs/parallel.md 1", lambda names: _finite(names["frames"], (1, 3, 5, 16, 24)))
def _parallel(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1, z_dim=4).eval()
    return {"pipe": types.SimpleNamespace(vae=vae), "latents": torch.randn(1, 4, 2, 2, 3)}


def _tiny_wan_vae() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1, z_dim=4).eval()


@context("docs/start.md 1", _patched_report)
def _start(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    vae = _tiny_wan_vae()
    patch.setattr(type(vae), "from_pretrained", lambda *arguments, **options: vae)
    return {}


@context("docs/start.md 2")
def _start_timer(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    vae = _tiny_wan_vae()
    vidkernels.patch(vae)
    return {"torch": torch, "vidkernels": vidkernels, "vae": vae, "clip": torch.randn(1, 3, 5, 16, 16)}


def _tiny_wan() -> Names:
    diffusers = pytest.importorskip("diffusers")
    options = {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    model = diffusers.WanTransformer3DModel(**options, freq_dim=16, ffn_dim=32, num_layers=1)
    batch = {"hidden_states": torch.randn(1, 4, 2, 4, 4), "encoder_hidden_states": torch.randn(1, 5, 16)}
    batch["timestep"] = torch.tensor([7])
    return {"transformer": model, "batch": batch, "target": torch.randn(1, 4, 2, 4, 4), "torch": torch}


def _trained(names: Names) -> None:
    assert vidkernels.status(names["transformer"]).patched == "all"
    assert all(parameter.grad is not None for parameter in names["transformer"].blocks.parameters())


@context("docs/start.md 3", _trained)
def _start_training(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    return {**_tiny_wan(), "vidkernels": vidkernels}


@context("docs/start.md 4", lambda names: _compiled(names))
def _start_wrapped(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    peft = pytest.importorskip("peft")
    return {**_tiny_wan(), "vidkernels": vidkernels, "lora": peft.LoraConfig(r=2, target_modules=["to_q"])}


def _compiled(names: Names) -> None:
    assert vidkernels.status(names["transformer"]).patched == "all"
    assert all(block._compiled_call_impl is not None for block in names["transformer"].blocks)


def _unpatched(names: Names) -> None:
    assert vidkernels.status(names["transformer"]).patched == "none"


@context("docs/start.md 5", _unpatched)
def _start_undo(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    names = {**_tiny_wan(), "vidkernels": vidkernels}
    vidkernels.patch(names["transformer"])
    return names


@context("docs/start.md 6", lambda names: _finite(names["y"], (1, 32, 5, 16, 16)))
def _start_block(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    return {}
