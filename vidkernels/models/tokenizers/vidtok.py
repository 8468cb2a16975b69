# SPDX-License-Identifier: Apache-2.0
"""VidTok (arXiv 2412.13061): all published configurations, KL and FSQ, causal and not, versions 1.0 and 1.1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.errors import DeviceError, DTypeError, OptionError, ShapeError
from vidkernels.models.tokenizers import _checkpoint, _memory, _vidtok_streaming
from vidkernels.models.tokenizers._vidtok_networks import Decoder, Encoder
from vidkernels.models.tokenizers.vidtok_config import VidTokConfig
from vidkernels.ops._checks import (
    autocast_dtype,
    check_floating,
    check_integer,
    check_ndim,
    check_option,
    check_size,
    check_tensor,
    whole_number,
)

LOG_VARIANCE_RANGE = (-30.0, 20.0)


class VidTokOutput(NamedTuple):
    """What `forward` returns: latents [B, z, T', H', W'], reconstruction like the input, and the regulariser's log."""

    latents: Tensor
    reconstruction: Tensor
    log: dict[str, Tensor]


class MemoryEstimate(NamedTuple):
    """Bytes: of the weights, of the video, and what encoder and decoder need beyond both at their worst moments."""

    weights: int
    video: int
    encode: int
    decode: int
    training: bool

    @property
    def peak(self) -> int:
        """Of weights, video and a reconstruction: in training both networks' activations exist at once."""
        work = self.encode + self.decode if self.training else max(self.encode, self.decode)
        return self.weights + self.video + work


class VidTok(nn.Module):
    """VidTok video tokenizer; keys and shapes of its state_dict are those of the published checkpoints.

    Video is [B, 3, T, H, W], nominally in -1..1, height and width multiples of the spatial factor. Any dtype of the
    parameters; the FSQ runs in float32. Everything is computed in channels-last memory.
    """

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @classmethod
    def from_config(cls, config: str | VidTokConfig | dict[str, Any]) -> VidTok:
        """A freshly initialised model by a published name such as `"vidtok_fsq_causal_488_32768"`, or an own config."""
        if isinstance(config, str):
            config = VidTokConfig.named(config)
        return cls(config if isinstance(config, VidTokConfig) else VidTokConfig.from_dict(config))

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, config: str | VidTokConfig | None = None, *, version: str | None = None
    ) -> VidTok:
        """Load a Lightning `.ckpt`, a plain state dict, a `.safetensors` file or a diffusers folder.

        Args:
            path: the file or folder; tensors only are read, no code is run.
            config: configuration or its published name; default: the name of the file or of its folder.
            version: "1.0" or "1.1" where the name does not say it. Both have the same keys and compute different
                results, so a causal model without either is refused, never guessed.

        Raises:
            OptionError: no configuration or version is known. ShapeError: the file's keys or shapes differ; names them.
        """
        return _checkpoint.load(cls, Path(path), config, version)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` (with the version) and `model.safetensors`."""
        _checkpoint.save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VidTok:
        """Read what `save_pretrained` wrote."""
        return _checkpoint.load_pretrained(cls, Path(folder))

    @property
    def _takes_turns(self) -> bool:
        return self.config.causal  # `distributed.temporal_parallel` serves it

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute every residual block in the backward pass instead of keeping its activations."""
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = enabled

    def memory_estimate(self, shape: tuple[int, int, int, int], *, training: bool = False) -> MemoryEstimate:
        """Bytes that a clip will need, from a pass over fake tensors: nothing of its size is allocated.

        Between 12 % below and 25 % above measured peaks (`tests/test_vidtok_memory.py`). Scratch inside kernels and libraries
        is not seen: below 32 channels the backward pass of a convolution on the CPU takes up to 70 MB more.

        Args:
            shape: (batch, frames, height, width), in the dtype and on the device of the parameters.
            training: with the backward pass; gradient checkpointing counts as it is set.
        """
        if len(shape) != 4:
            raise ShapeError("shape", "(batch, frames, height, width)", shape)
        batch, frames, height, width = shape
        factor = self.config.spatial_factor
        if min(shape) < 1 or height % factor or width % factor:
            raise ShapeError("shape", f"positive sizes, height and width multiples of {factor}", shape)
        frames += sum(self.front_frames(frames))
        small = (frames // self.config.temporal_factor, height // factor, width // factor)
        encode = _memory.peak_bytes(self.encoder, (batch, 3, frames, height, width), training)
        decode = _memory.peak_bytes(self.decoder, (batch, self.config.z_channels, *small), training)
        size = next(self.parameters()).element_size()
        weights = sum(p.numel() * p.element_size() for p in self.parameters())
        return MemoryEstimate(weights, batch * 3 * frames * height * width * size, encode, decode, training)

    def moments(self, video: Tensor, *, length: str = "exact") -> Tensor:
        """Output of the encoder before the regulariser: [B, 2z or z, T', H', W'].

        Args:
            video: [B, 3, T, H, W].
            length: "exact" pads so that `forward` gives back T frames; "official" pads exactly as the official code,
                which loses frames for lengths that do not fit (v1.0: T = 1 + kf, non-causal: T = kf).
        """
        self._check_video(video)
        check_option("length", length, ("exact", "official"))
        return _vidtok_streaming.encoded(self, self._pad_frames(video, length))

    def encode(
        self,
        video: Tensor,
        *,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
        length: str = "exact",
        return_log: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Latents [B, z, T', H', W']: the Gaussian's mean or a sample of it (KL), or the codes (FSQ).

        Args:
            video: [B, 3, T, H, W].
            sample: KL: draw from the posterior. Default: in training mode, or when a generator is given. (The official
                code also samples in eval mode.)
            generator: random numbers of the sample, on the latents' device.
            length: as in `moments`.
            return_log: also return {"kl_loss"} or {"indices"}.
        """
        latents, log = self.regularize(self.moments(video, length=length), sample=sample, generator=generator)
        return (latents, log) if return_log else latents

    def regularize(
        self, moments: Tensor, *, sample: bool | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Encoder output to latents and log: `kl_loss`, the sum over everything divided by the batch, or `indices`."""
        if self.config.regularizer == "fsq":
            codes, indices = ops.fsq_quantize(moments, self.config.levels, dim=1)
            return codes, {"indices": indices}
        mean, log_variance = moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(*LOG_VARIANCE_RANGE)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / max(moments.shape[0], 1)
        if sample is None:
            sample = self.training or generator is not None
        latents = mean
        if sample:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            latents = mean + (0.5 * log_variance).exp() * noise
        return latents.to(moments.dtype), {"kl_loss": kl}

    def decode(self, latents: Tensor, *, num_frames: int | None = None) -> Tensor:
        """Video [B, 3, T, H, W] of latents [B, z, T', H', W'].

        Args:
            latents: what `encode` returned.
            num_frames: length of the clip that was encoded; default: all the frames that the official `decode` gives.
        """
        self._check_latents(latents)
        return self._crop_frames(_vidtok_streaming.decoded(self, latents), num_frames)

    def forward(
        self, video: Tensor, *, sample: bool | None = None, generator: torch.Generator | None = None
    ) -> VidTokOutput:
        """Encode and decode; the reconstruction has as many frames as the video."""
        moments = self.moments(video)
        latents, log = self.regularize(moments, sample=sample, generator=generator)
        return VidTokOutput(latents, self.decode(latents, num_frames=video.shape[2]), log)

    def indices(self, video: Tensor) -> Tensor:
        """FSQ tokens [B, T', H', W'], int32, channel 0 the least significant digit."""
        self._check_fsq()
        return self.regularize(self.moments(video))[1]["indices"]

    def decode_indices(self, indices: Tensor, *, num_frames: int | None = None) -> Tensor:
        """Video of FSQ tokens [B, T', H', W']."""
        self._check_fsq()
        check_integer("indices", indices)
        check_ndim("indices", indices, 4)
        dtype = self.decoder.conv_in.kernel.bias.dtype
        return self.decode(
            ops.fsq_indices_to_codes(indices, self.config.levels, dim=1, dtype=dtype), num_frames=num_frames
        )

    def stream_encode(
        self, frames: Iterable[Tensor], *, num_frames: int | None = None, **options: Any
    ) -> Iterator[Tensor]:
        """Latents, chunk by chunk, of a clip that never is in memory whole: equal to `encode` of the whole clip.

        Args:
            frames: chunks [B, 3, t, H, W] of any lengths, 0 included.
            num_frames: total length, needed for v1.1 where it is not 1 + kf, since the official padding is in front.
            options: `sample`, `generator` of `regularize`.

        Raises:
            OptionError: `num_frames` is not the number of frames that came, or was needed; ShapeError, DTypeError,
                DeviceError: a chunk is unlike the first.
        """
        return _vidtok_streaming.encode(self, frames, num_frames, options)

    def stream_decode(self, latents: Iterable[Tensor], *, num_frames: int | None = None) -> Iterator[Tensor]:
        """Video, chunk by chunk, of chunks of latents: equal to `decode` of all of them at once."""
        return _vidtok_streaming.decode(self, latents, num_frames)

    def front_frames(self, frames: int, length: str = "exact") -> tuple[int, int]:
        """Frames that encoding a clip of this length puts (in front, behind) it."""
        factor, excess = self.config.temporal_factor, frames % self.config.temporal_factor
        if self.config.causal and self.config.version == "1.1":
            return (factor - excess if excess else 0), 0
        if not self.config.causal:
            return 0, (-frames % factor if length == "exact" else 0)
        if length == "official":
            return (factor - 1 if excess else 0), 0
        return factor - 1, (1 - frames) % factor

    def _pad_frames(self, video: Tensor, length: str) -> Tensor:
        front, back = self.front_frames(video.shape[2], length)
        parts = [video[:, :, :1].expand(-1, -1, front, -1, -1), video, video[:, :, -1:].expand(-1, -1, back, -1, -1)]
        return video if front == back == 0 else torch.cat(parts, 2)

    def _crop_frames(self, video: Tensor, num_frames: int | None) -> Tensor:
        if self.config.causal and self.config.version == "1.0":
            video = video[:, :, self.config.temporal_factor - 1 :]
        if num_frames is None:
            return video
        if whole_number(num_frames, 1) is None or num_frames > video.shape[2]:
            raise OptionError("num_frames", f"1 to {video.shape[2]}, what these latents hold", num_frames)
        if self.config.causal and self.config.version == "1.1":
            return video[:, :, video.shape[2] - num_frames :]
        return video[:, :, :num_frames]

    def _check_video(self, video: Tensor) -> None:
        check_tensor("video", video)
        if video.dtype == torch.uint8:
            raise DTypeError("video", "values in -1..1", video.dtype, "Convert it: video.float() / 127.5 - 1.")
        check_floating("video", video)
        if video.ndim == 4:
            expected = "5 dimensions [B, 3, T, H, W]"
            raise ShapeError(
                "video", expected, tuple(video.shape), "Images are clips of one frame: images[:, :, None]."
            )
        check_ndim("video", video, 5)
        check_size("video", video, 1, 3)
        if 0 in video.shape[2:]:
            raise ShapeError("video", "at least one frame and one pixel", tuple(video.shape))
        factor, (height, width) = self.config.spatial_factor, video.shape[3:]
        if height % factor or width % factor:
            padding = f"F.pad(video, (0, {-width % factor}, 0, {-height % factor}))"
            expected = f"height and width multiples of {factor}"
            raise ShapeError("video", expected, tuple(video.shape), f"Resize, crop or pad the frames, e.g. {padding}.")
        self._check_like_weights("video", video)

    def _check_latents(self, latents: Tensor) -> None:
        check_floating("latents", latents)
        check_ndim("latents", latents, 5)
        check_size("latents", latents, 1, self.config.z_channels)
        self._check_like_weights("latents", latents)

    def _check_like_weights(self, name: str, x: Tensor) -> None:
        """Dtype and device are the model's. Autocast converts by itself, and so may whoever shards the weights."""
        weight = self.encoder.conv_in.kernel.weight
        if type(weight) is not nn.Parameter:
            return
        if x.device != weight.device:
            raise DeviceError(name, f"the model's {weight.device}", x.device, f"Move one: {name}.to({weight.device}).")
        if x.dtype != weight.dtype and autocast_dtype(x) is None:
            raise DTypeError(name, f"the model's {weight.dtype}", x.dtype, f"Convert one: model.to({name}.dtype).")

    def _check_fsq(self) -> None:
        if self.config.regularizer != "fsq":
            raise OptionError(
                "config", "an FSQ model", self.config.name, "KL models have latents, not tokens: use encode."
            )
