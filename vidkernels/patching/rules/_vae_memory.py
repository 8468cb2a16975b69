# SPDX-License-Identifier: Apache-2.0
"""Residual blocks of video VAEs in inference: over their own inputs, some frames after the other.

A module cannot know whether its caller reads an input again; the network that calls its blocks does. It says so with
`overwriting` around them, after a look at all modules between: no hook may have kept a tensor, and what calls the blocks is
upstream's own code, by its digest. A block asks `may_write`. Then its last convolution adds to the residual stream where it
lies, and callers that still hold its input (every `module(x)` does) hold the result, not one tensor more.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor, nn

from vidkernels.nn._residual import may_overwrite
from vidkernels.patching._match import digest
from vidkernels.patching._mechanism import own_forward

# Elements of a temporary, and the frames that it has at least. By an H200's rates a norm of 2^24 elements takes 20 us and its
# convolution 100 or more, as long as the host needs for them; two frames need no copies for a causal convolution's cache. On
# a CPU 16 MiB of float32; oneDNN computes the frames that read a cache apart, so a chunk of Wan's, 4 frames, stays whole.
_PIECE_CPU, _LEAST_CPU = 1 << 22, 4
_PIECE_GPU, _LEAST_GPU = 1 << 24, 2
# Forwards of modules with blocks inside that do not read a block's input once the block was called.
_CONTAINERS = {
    "96036ed70b075465",  # WanMidBlock
    "59bbe7197d803db2",  # WanUpBlock
    "b52a83620975007e",  # WanResidualUpBlock: its shortcut reads a clone
    "5282dd8094bcfd18",  # WanResidualDownBlock
    "e00ce009f5c79333",  # QwenImageMidBlock
    "961c0d60037cfad7",  # QwenImageUpBlock
    "0b6c8cae9f7f0b83",  # MochiDownBlock3D
    "b83f27822c4a6bb3",  # MochiMidBlock3D
    "97a311e362b6eb42",  # ResnetBlock2D: it has no blocks inside
    "9138a876c8482c3e",  # TemporalResnetBlock: nor has it
    "5777d5700c978ef0",  # SpatioTemporalResBlock: of these two, which are fused in other blocks only
    "b339a04328f30f35",  # LTXVideoDownBlock3D
    "6135ab7242dde53a",  # LTXVideo095DownBlock3D
    "0fb8403c016b040f",  # LTXVideoMidBlock3d
    "00a00a23da282c76",  # LTXVideoUpBlock3d
    "1bf6259a029cd5b8",  # LTX2VideoDownBlock3D
    "f027c73b864e167b",  # LTX2VideoMidBlock3d
    "0e8befe2657c796d",  # LTX2VideoUpBlock3d
    "d2c9fb45cd160529",  # HunyuanVideoDownBlock3D
    "440ddab4d409024c",  # HunyuanVideoMidBlock3D
    "1851776a51a39272",  # HunyuanVideoUpBlock3D and HunyuanVideo15UpBlock3D
    "5f36aff0dbda0b2a",  # HunyuanVideo15DownBlock3D
    "79c2feb9fcc75c70",  # HunyuanVideo15MidBlock
    "f33e8388c9b2a465",  # CogVideoXDownBlock3D
    "6ff3d24ab6e5b1db",  # CogVideoXMidBlock3D
    "ccd8ca95a73177c2",  # CogVideoXUpBlock3D
    "46803e8acb0ba888",  # CosmosDownBlock3d
    "5ead40f75fa5c9ea",  # CosmosMidBlock3d
    "ee3b4363e3278b13",  # CosmosUpBlock3d
    "51f31ea84af15ce4",  # EasyAnimateDownBlock3D
    "bc1ac9e673398000",  # EasyAnimateMidBlock3d
    "fc8bbd1fb9c891b3",  # EasyAnimateUpBlock3d
}
_LEAVES = ("torch.nn.", "diffusers.")
# Open-Sora-Plan's `Conv2d`: torch's, called for the frames of a clip.
_FRAMEWISE = {"01d3247ca8afaa6a", "5afc8b1c764ee4f3", "77124a37b2362b10", "24eb2d97ab65b8e6"}
# Forwards in files of official repositories: of layers that hold no blocks, and of containers as above.
_LAYERS = {
    "6c83557b0cc12256",  # Wan's Upsample
    "093c658178239315",  # AvgDown3D
    "16820f8a345bea52",  # DupUp3D
    "61c1e43c2047cf8b",  # WF-VAE's LayerNorm
    "48da9830a3a27f1b",  # WF-VAE 2's WFDownBlock
    "b444edebcb2bc237",  # its WFUpBlock
    "aaa97ec5e4a21b38",  # Open-Sora 2.0's ChannelChunkConv3d
    "a52e1a8fedd69fe5",  # its DownsampleCausal3D
    "7bbff380081ad506",  # its DownEncoderBlockCausal3D
    "fec589a604f267bc",  # its UpDecoderBlockCausal3D
    "a47bb606d7d111bc",  # HunyuanVideo's own DownsampleCausal3D
    "7752bf8b34ced5b4",  # its DownEncoderBlockCausal3D
    "d06b997dfb86f010",  # its UpDecoderBlockCausal3D
    "a959f02c596bc5f6",  # Open-Sora 1.3's Downsample3D
    "50179e15c39d22de",  # CausalNormalize of NVIDIA's Cosmos tokenizers
    "aa3ba2be78f20164",  # their Patcher
    "4500396063358f88",  # their UnPatcher
    "9c927c6847e71807",  # their Upsample, for images
    "04e69c8dd289ea01",  # their Downsample
}


class _Permission(threading.local):
    network: nn.Module | None = None
    granted = False
    largest = 0


_permission = _Permission()


class _Overwriting:
    """See `overwriting`."""

    def __init__(self, network: nn.Module, x: Tensor, largest: int = 0) -> None:
        self.state = network, _permission.granted, _permission.largest
        if _permission.network is not network:
            self.state = network, _is_unseen(network, x), largest

    def __enter__(self) -> None:
        self.before = _permission.network, _permission.granted, _permission.largest
        _permission.network, _permission.granted, _permission.largest = self.state

    def __exit__(self, *_: object) -> None:
        _permission.network, _permission.granted, _permission.largest = self.before


def overwriting(network: nn.Module, x: Tensor, largest: int = 0) -> AbstractContextManager[None]:
    """Whether blocks may write over their inputs within the `with`, in the call `network(x)`.

    largest: elements of the largest tensor of a chunk, where x may be several chunks: pieces are half of it at most. Four
    chunks and a piece's temporaries are 5 such tensors then; upstream's peak, with one chunk a call, is 5 to 7 of them.
    """
    return nullcontext() if torch.compiler.is_compiling() else _Overwriting(network, x, largest)


def may_write(x: Tensor) -> bool:
    """Whether a block may write over its input x."""
    if torch.compiler.is_compiling() or not _permission.granted:
        return False
    return not x.is_inference() or torch.is_inference_mode_enabled()


def _is_unseen(network: nn.Module, x: Tensor) -> bool:
    return may_overwrite(network, x) and all(_forgets(module) for module in network.modules() if module is not network)


def _forgets(module: nn.Module) -> bool:
    """Whether a module reads none of its blocks' inputs again, nor keeps them: ours, or upstream's as we know it."""
    cls = type(module)
    forward = getattr(cls, "forward", None)  # there is none in the class of what torch.jit.script made
    known = forward is not None and (hasattr(forward, "_vidkernels_fused") or _class_forgets(cls))  # type: ignore[arg-type]
    return known and not own_forward(module)  # type: ignore[arg-type]


@lru_cache(maxsize=512)
def _class_forgets(cls: type[nn.Module]) -> bool:
    if not cls.__module__.startswith(_LEAVES):
        return digest(cls.forward) in (_FRAMEWISE if issubclass(cls, nn.Conv2d) else _LAYERS)
    is_container = any("Block" in base.__name__ for base in cls.__mro__)
    return not is_container or digest(cls.forward) in _CONTAINERS


def frame_pieces(x: Tensor, channels: int) -> list[tuple[int, int]]:
    """(first, behind the last) of the frames that go through a block at a time; `channels`: of its widest tensor."""
    batch, _, frames, height, width = x.shape
    limit, least = (_PIECE_CPU, _LEAST_CPU) if x.is_cpu else (_PIECE_GPU, _LEAST_GPU)
    limit = min(limit, _permission.largest // 2 or limit)
    most = max(least, limit // max(1, batch * channels * height * width))
    count = -(-frames // most)
    return [(frames * i // count, frames * (i + 1) // count) for i in range(count)]


def empty_clip(like: Tensor, channels: int) -> Tensor:
    """Uninitialised [B, channels, T, H, W] in channels-last memory."""
    size = like.shape[0], channels, *like.shape[2:]
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


class Frames:
    """The decoded parts of a clip; without gradients they go into one tensor as they come, not side by side first.

    clamped: to [-1, 1].
    """

    def __init__(self, latents: int, clamped: bool = True) -> None:
        self.latents, self.end, self.clamped = latents, 0, clamped
        self.parts: list[Tensor] = []
        self.clip: Tensor | None = None
        self.join = not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def add(self, part: Tensor, latents: int) -> None:
        """Frames of so many latents; the first one is a part of its own, and gives fewer frames than the others."""
        if self.join and self.clip is None and self.parts:
            first, each = self.parts.pop(), part.shape[2] // latents
            size = *part.shape[:2], first.shape[2] + each * (self.latents - 1), *part.shape[3:]
            self.clip = part.new_empty(size)
            self._write(first)
        if self.clip is None:
            self.parts.append(part)
        else:
            self._write(part)

    def _write(self, part: Tensor) -> None:
        assert self.clip is not None
        begin, self.end = self.end, self.end + part.shape[2]
        place = self.clip[:, :, begin : self.end]
        if self.clamped:
            torch.clamp(part, min=-1.0, max=1.0, out=place)
        else:
            place.copy_(part)

    def whole(self) -> Tensor:
        """All frames."""
        if self.clip is not None:
            return self.clip
        clip = torch.cat(self.parts, 2)
        return clip.clamp(min=-1.0, max=1.0) if self.clamped else clip
