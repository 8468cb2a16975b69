# SPDX-License-Identifier: Apache-2.0
"""What the demo measures: one model, unpatched and patched, on one clip."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vidkernels
from vidkernels._demo_clip import read_clip
from vidkernels.errors import OptionError
from vidkernels.models.tokenizers._checkpoint import check_keys, read_state_dict

SEED = 0


def build_model(weights: Path | None, device: torch.device) -> Any:
    """AutoencoderVidTok in float32, eval mode: default configuration with seeded random weights, or a checkpoint."""
    from diffusers import AutoencoderVidTok
    from diffusers.utils import logging

    logging.set_verbosity_error()
    model: Any
    if weights is not None and weights.is_dir():
        try:
            model = AutoencoderVidTok.from_pretrained(weights, torch_dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as error:
            first = str(error).partition("\n")[0]
            raise OptionError("--weights", "a folder that diffusers wrote", str(weights), first) from error
    else:
        torch.manual_seed(SEED)
        model = AutoencoderVidTok()
        if weights is not None:
            state = read_state_dict(weights)
            check_keys(model.state_dict(), state, "--weights", "AutoencoderVidTok's default configuration")
            model.load_state_dict(state)
    return model.to(device).eval().requires_grad_(False)


def prepare(model: Any, clip: torch.Tensor) -> torch.Tensor:
    """The clip as `AutoencoderVidTok.forward` hands it to `encode`: a causal model wants its first frame repeated."""
    ratio = model.temporal_compression_ratio
    frames, size = clip.shape[2], clip.shape[-1]
    levels = model.config.spatial_ds
    spatial = 2 ** (len(model.config.ch_mult) - 1 if levels is None else len(levels))
    if size % spatial:
        raise OptionError("--size", f"a multiple of {spatial}", size, f"Give {max(1, size // spatial) * spatial}.")
    if not model.is_causal:
        if frames % model.num_sample_frames_batch_size:
            raise OptionError("--frames", f"a multiple of {model.num_sample_frames_batch_size}", frames, "Change it.")
        return clip
    if frames % ratio != 1:
        raise OptionError("--frames", f"a multiple of {ratio} plus 1", frames, f"Give {frames // ratio * ratio + 1}.")
    return torch.cat([clip[:, :, :1].expand(-1, -1, ratio - 1, -1, -1), clip], dim=2)


@dataclasses.dataclass
class Outputs:
    """What one pass over the clip gives."""

    moments: torch.Tensor  # [1, 2 z, t, h, w], mean and log variance; with FSQ the codes [1, z, t, h, w]
    decoded: torch.Tensor  # [1, 3, T, H, W]


def encode(model: Any, clip: torch.Tensor) -> torch.Tensor:
    """The distribution's parameters, which unlike a sample are deterministic; with FSQ the codes."""
    with torch.no_grad():
        encoded = model.encode(clip)
    return encoded[0] if model.regularizer == "fsq" else encoded.latent_dist.parameters


def decode(model: Any, latents: torch.Tensor) -> torch.Tensor:
    """Frames of the given latents."""
    with torch.no_grad():
        return model.decode(latents)


def latents_of(model: Any, moments: torch.Tensor) -> torch.Tensor:
    """The mean, half of the channels; with FSQ the codes themselves."""
    return moments if model.regularizer == "fsq" else moments.chunk(2, dim=1)[0]


def run(model: Any, clip: torch.Tensor, latents: torch.Tensor | None = None) -> Outputs:
    """Encode the clip; decode the given latents, or those just found."""
    moments = encode(model, clip)
    return Outputs(moments, decode(model, latents_of(model, moments) if latents is None else latents))


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_on_cuda(work: Callable[[], object], device: torch.device) -> int:
    """Bytes of torch's allocator at the worst moment of `work`, beyond those in use before it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_on_cpu(work: Callable[[], object]) -> int | None:
    """Growth of the resident set at the worst moment of `work`; None where Linux's counters cannot be reset.

    Only the first such number of a process is worth anything: what `work` leaves behind in the heap hides from the
    next (measured: 1.19 GiB for the first pass of a model, 0.46 GiB for the third). Hence `peak_in_a_process`.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError):
        return None
    work()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


@dataclasses.dataclass(frozen=True)
class PeakQuestion:
    """Which pass a process is to measure."""

    clip: str
    frames: int
    size: int
    weights: Path | None
    patched: bool
    backend: str


def peak_in_a_process(question: PeakQuestion) -> int | None:
    """Peak memory of one pass in a fresh process, beyond the model and the libraries; None if it cannot be had."""
    asked = json.dumps({**dataclasses.asdict(question), "weights": question.weights and str(question.weights)})
    code = "import sys; from vidkernels._commands.demo_run import answer_peak; answer_peak(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", code, asked], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"the process that measures memory failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def answer_peak(asked: str) -> None:
    """The other end of `peak_in_a_process`: prints the bytes."""
    words = json.loads(asked)
    question = PeakQuestion(**{**words, "weights": words["weights"] and Path(words["weights"])})
    model = build_model(question.weights, torch.device("cpu"))
    clip = prepare(model, read_clip(Path(question.clip), question.frames, question.size))
    if question.patched:
        vidkernels.patch(model, backend=question.backend)
    print(json.dumps(peak_on_cpu(lambda: run(model, clip))))


@dataclasses.dataclass
class Variant:
    """Measurements of the unpatched or the patched model."""

    encode_s: list[float] = dataclasses.field(default_factory=list)
    decode_s: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def total_s(self) -> float:
        return statistics.median(e + d for e, d in zip(self.encode_s, self.decode_s, strict=True))

    def to_dict(self) -> dict[str, Any]:
        return {
            "encode_s": statistics.median(self.encode_s),
            "decode_s": statistics.median(self.decode_s),
            "total_s": self.total_s,
            "runs": [round(e + d, 4) for e, d in zip(self.encode_s, self.decode_s, strict=True)],
            "peak_bytes": self.peak_bytes,
        }


@dataclasses.dataclass
class Comparison:
    """One model, one clip, one dtype."""

    dtype: str
    shape: tuple[int, ...]
    unpatched: Variant
    patched: Variant
    before: Outputs
    after: Outputs
    patch_report: str

    @property
    def speedup(self) -> float:
        return self.unpatched.total_s / self.patched.total_s


def _timed(model: Any, clip: torch.Tensor, latents: torch.Tensor, variant: Variant) -> None:
    device = clip.device
    for work, into in (
        (lambda: encode(model, clip), variant.encode_s),
        (lambda: decode(model, latents), variant.decode_s),
    ):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        into.append(time.perf_counter() - start)


def compare(model: Any, clip: torch.Tensor, repeats: int, backend: str, say: Callable[[str], None]) -> Comparison:
    """Run and time the model unpatched and patched, in turns. The model is unpatched afterwards.

    The first run of each warms up (libraries choose kernels, pages are mapped) and gives the outputs; the times come
    from the runs after it, and on CUDA peak memory too.
    """
    dtype = str(clip.dtype).removeprefix("torch.")
    name = f"{dtype} {'x'.join(map(str, clip.shape[2:]))}"
    prepared = prepare(model, clip)
    variants = (Variant(), Variant())
    say(f"{name}: unpatched, first run")
    before = run(model, prepared)
    latents = latents_of(model, before.moments)
    report = vidkernels.patch(model, backend=backend)
    try:
        say(f"{name}: patched, first run")
        after = run(model, prepared, latents)
        for index in range(repeats):
            for patched, variant in enumerate(variants):
                say(f"{name}: {'patched' if patched else 'unpatched'}, timed run {index + 1} of {repeats}")
                if patched:
                    vidkernels.patch(model, backend=backend)
                else:
                    vidkernels.unpatch(model)
                if clip.is_cuda and index == 0:
                    variant.peak_bytes = peak_on_cuda(lambda: run(model, prepared), clip.device)
                _timed(model, prepared, latents, variant)
    finally:
        vidkernels.unpatch(model)
    return Comparison(dtype, tuple(clip.shape), *variants, before, after, str(report))


@dataclasses.dataclass(frozen=True)
class Check:
    """One output against float64: the promise is error <= 2 x the unpatched model's own + one rounding."""

    output: str
    error_unpatched: float
    error_patched: float
    allowed: float

    @property
    def kept(self) -> bool:
        return self.error_patched <= self.allowed


def check_promise(model: Any, clip: torch.Tensor, backend: str) -> list[Check]:
    """Errors of the unpatched and the patched model against the same weights in float64, on a clip of any dtype."""
    clip = prepare(model, clip)
    before = run(model, clip)
    latents = latents_of(model, before.moments)
    with vidkernels.patch(model, backend=backend):
        after = run(model, clip, latents)
    double = copy.deepcopy(model).double()
    truth = Outputs(encode(double, clip.double()), decode(double, latents.double()))
    del double
    checks = []
    for output in ("moments", "decoded"):
        exact = getattr(truth, output)
        errors = [(getattr(o, output).double() - exact).abs().max().item() for o in (before, after)]
        rounding = torch.finfo(clip.dtype).eps / 2 * exact.abs().max().item()
        checks.append(Check(output, errors[0], errors[1], 2 * errors[0] + rounding))
    return checks
