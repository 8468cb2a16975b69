# SPDX-License-Identifier: Apache-2.0
"""Whole clips through VAEs of Wan's kind: on a GPU the chunks of a small clip go through a network together.

The first chunk is one frame, as upstream; a stream does not depend on how the others are cut. What the last chunk would
leave in the caches is not kept, and frames that are ready are written into one clip as they come. Under
`distributed.temporal_parallel` each call is another rank's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.distributed.temporal import Turns, turns_of
from vidkernels.patching._guard import child_reason, note_fallback
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._vae_memory import Frames, overwriting
from vidkernels.patching.rules._wan_units import Family, cache_of, cache_of_turn

Piece = tuple[int, int]


def results(
    call: Callable[[int, int, list[Any]], Tensor], pieces: list[Piece], frames: list[Any], turns: Turns | None
) -> Iterator[Tensor]:
    """`call(first, behind the last, cache)` of all pieces in order, those of other ranks too; `frames`: the empty cache."""
    last = len(pieces) - 1
    if turns is None:
        for i, (start, end) in enumerate(pieces):
            yield call(start, end, cache_of(frames, i == last))
        return
    mine = [i for i in range(len(pieces)) if turns.is_mine(i)]
    parts = ((i, call(*pieces[i], cache_of_turn(turns, i, len(frames), i == last))) for i in mine)
    yield from turns.shared(parts, len(pieces))


def width_of(norm: Any) -> int:
    """Channels of a norm's input; of what somebody put in its place nothing is known, and chunks go one by one."""
    gamma = getattr(norm, "gamma", None)
    return gamma.numel() if isinstance(gamma, Tensor) else _WIDE


_WIDE = 1 << 20


class ChunkedCalls(Family):
    """Encoding and decoding chunk by chunk, for the methods of an autoencoder."""

    _clamped = True
    _takes_turns = True  # `distributed.temporal_parallel` serves it

    def _patched_size(self) -> int:
        """The side of the squares of pixels that are channels of the networks."""
        raise NotImplementedError

    def _first(self, first: bool) -> dict[str, Any]:
        """Options of the decoder for the first chunk and for others."""
        raise NotImplementedError

    def _served(self, network: nn.Module, name: str, x: Tensor) -> bool:
        """Whether the fused loop serves the call: a clip, and a network without hooks that want single chunks."""
        reason = units.video_reason(x) or child_reason(network, self._upstream(name))
        if reason is not None:
            note_fallback(self, reason)
        return reason is None

    def _pieces(self, frames: int, step: int, largest: int, x: Tensor, turns: Turns | None) -> list[Piece]:
        """(first, behind the last) of the frames of each call: one, then multiples of `step`, while whole. `largest`: elements
        of a chunk's largest tensor."""
        chunks = (frames - 1) // step
        calls = -(-chunks // units.chunks_per_call(x, largest))
        if turns is not None:
            calls = turns.calls(chunks, calls)
        pieces = [(0, 1)]
        for i in range(calls):  # of equal size, as far as they go
            pieces.append((1 + step * (chunks * i // calls), 1 + step * (chunks * (i + 1) // calls)))
        return pieces

    def _moments(self, x: Tensor, width: int) -> Tensor:
        """What the encoder makes of a clip [B, 3, T, H, W]; `width`: channels behind its first convolution."""
        patch, turns = self._patched_size(), turns_of(self, x, lead=1)
        largest = 4 * x.shape[0] * width * x.shape[-2] * x.shape[-1] // patch**2
        pieces = self._pieces(x.shape[2], 4, largest, x, turns)
        with overwriting(self.encoder, x, largest):  # asked once, not for each chunk
            parts = list(self._encoded(x, patch, pieces, turns))
        return torch.cat(parts, 2)

    def _encoded(self, x: Tensor, patch: int, pieces: list[Piece], turns: Turns | None) -> Iterator[Tensor]:
        def encoded(start: int, end: int, cache: list[Any]) -> Tensor:
            self._enc_conv_idx = [0]
            chunk = x[:, :, start:end]
            if patch > 1:
                chunk = self._vidkernels_home.patchify(chunk, patch_size=patch)
            moments: Tensor = self.encoder(chunk, feat_cache=cache, feat_idx=self._enc_conv_idx)
            return moments

        return results(encoded, pieces, self._enc_feat_map, turns)

    def _frames(self, x: Tensor, width: int, scale: int) -> Tensor:
        """What the decoder makes of latents [B, z, T, H, W]; `width`: channels before its last convolution, whose frames are
        `scale` times as high and wide as latents."""
        patch, clip, turns = self._patched_size(), Frames(x.shape[2], self._clamped), turns_of(self, x, lead=1)
        largest = 4 * x.shape[0] * width * x.shape[-2] * x.shape[-1] * scale**2
        pieces = self._pieces(x.shape[2], 1, largest, x, turns)
        with overwriting(self.decoder, x, largest):
            for part, (start, end) in zip(self._decoded(x, patch, pieces, turns), pieces, strict=True):
                clip.add(part, end - start)
                del part
        return clip.whole()

    def _decoded(self, x: Tensor, patch: int, pieces: list[Piece], turns: Turns | None) -> Iterator[Tensor]:
        def decoded(start: int, end: int, cache: list[Any]) -> Tensor:
            self._conv_idx = [0]
            options = {"feat_cache": cache, "feat_idx": self._conv_idx, **self._first(start == 0)}
            part: Tensor = self.decoder(x[:, :, start:end], **options)
            return part if patch == 1 else self._vidkernels_home.unpatchify(part, patch_size=patch)

        return results(decoded, pieces, self._feat_map, turns)


class AutoencoderCalls(ChunkedCalls):
    """`AutoencoderKLWan._encode` and `_decode`."""

    def _patched_size(self) -> int:
        return self.config.patch_size or 1

    def _first(self, first: bool) -> dict[str, Any]:
        return {"first_chunk": True} if first else {}

    def _whole(self, network: nn.Module, name: str, x: Tensor, scale: int) -> bool:
        """Whether the fused loop serves the call: no tiles either."""
        height, width = x.shape[-2] * scale, x.shape[-1] * scale
        tiled = self.use_tiling and (width > self.tile_sample_min_width or height > self.tile_sample_min_height)
        return self._served(network, name, x) and not tiled

    def _encode(self, x: Tensor) -> Tensor:
        width = getattr(self.encoder.conv_in, "out_channels", None)  # a wrapper may have none
        if width is None or not self._whole(self.encoder, "Encoder3d", x, 1):
            original: Tensor = super()._encode(x)  # type: ignore[misc]
            return original
        self.clear_cache()
        encoded: Tensor = self.quant_conv(self._moments(x, width))
        self.clear_cache()
        return encoded

    def _decode(self, z: Tensor, return_dict: bool = True) -> Any:
        scale = self.spatial_compression_ratio
        if not self._whole(self.decoder, "Decoder3d", z, scale):
            return super()._decode(z, return_dict)  # type: ignore[misc]
        self.clear_cache()
        out = self._frames(self.post_quant_conv(z), width_of(self.decoder.norm_out), scale // self._patched_size())
        self.clear_cache()
        return self._vidkernels_home.DecoderOutput(sample=out) if return_dict else (out,)
