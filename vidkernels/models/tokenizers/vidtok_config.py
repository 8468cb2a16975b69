# SPDX-License-Identifier: Apache-2.0
"""The 23 published VidTok configurations, by the names of their checkpoints (arXiv 2412.13061)."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from typing import Any

from vidkernels.errors import OptionError
from vidkernels.ops._checks import check_whole, is_whole

_RESAMPLING = ("spatial_down", "spatial_up", "temporal_down", "temporal_up")


@dataclass(frozen=True)
class VidTokConfig:
    """Architecture and version of a VidTok.

    Attributes:
        name: the published checkpoint's name, or any label for an own configuration.
        causal: convolutions in time look only backwards.
        version: "1.0" puts zero frames in front of each causal convolution and repeats frames to upsample in time;
            "1.1" repeats the layer's own first frame and interpolates linearly. Keys and shapes are equal, results not.
            Non-causal models are the same in both and say "1.0".
        regularizer: "kl" (diagonal Gaussian) or "fsq".
        z_channels: latent channels; FSQ has one level count per channel.
        levels: FSQ levels, empty for KL.
        channels: base width.
        channel_multipliers: width of level i is `channels * channel_multipliers[i]`.
        residual_blocks: residual pairs per encoder level; the decoder has one more.
        spatial_down, spatial_up, temporal_down, temporal_up: levels that resample.
    """

    name: str
    causal: bool
    version: str
    regularizer: str
    z_channels: int
    levels: tuple[int, ...] = ()
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    residual_blocks: int = 2
    spatial_down: tuple[int, ...] = (0, 1, 2)
    spatial_up: tuple[int, ...] = (1, 2, 3)
    temporal_down: tuple[int, ...] = (1, 2)
    temporal_up: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        for key, kind, wanted in (("name", str, "text"), ("causal", bool, "true or false")):
            if not isinstance(getattr(self, key), kind):
                raise OptionError(key, wanted, repr(getattr(self, key)))
        if self.version not in ("1.0", "1.1"):
            raise OptionError(
                "version", "'1.0' or '1.1'", repr(self.version), "Published names ending in _v1_1 are 1.1."
            )
        if self.regularizer not in ("kl", "fsq"):
            raise OptionError("regularizer", "'kl' or 'fsq'", repr(self.regularizer))
        for key in ("z_channels", "channels", "residual_blocks"):
            check_whole(key, getattr(self, key))
        for key, least in (("levels", 3), ("channel_multipliers", 1), *((key, 0) for key in _RESAMPLING)):
            values = getattr(self, key)
            if not isinstance(values, tuple) or not all(is_whole(value, least) for value in values):
                raise OptionError(key, f"a tuple of whole numbers of at least {least}", repr(values))
        if self.regularizer == "fsq" and len(self.levels) != self.z_channels:
            raise OptionError("levels", f"{self.z_channels} level counts, one per latent channel", self.levels)
        self._check_resampling()

    def _check_resampling(self) -> None:
        """The decoder undoes what the encoder does; levels that do not exist would be passed over without a word."""
        last = len(self.channel_multipliers) - 1
        for key, first, end in zip(_RESAMPLING, (0, 1, 0, 0), (last - 1, last, last, last), strict=True):
            wrong = [level for level in getattr(self, key) if not first <= level <= end]
            if wrong or len(set(getattr(self, key))) != len(getattr(self, key)):
                raise OptionError(key, f"different levels from {first} to {end}", getattr(self, key))
        down, up = (len(set(time) & set(space)) for time, space in (
            (self.temporal_down, self.spatial_down), (self.temporal_up, self.spatial_up)
        ))  # fmt: skip
        for key, found, wanted in (
            ("spatial_up", len(self.spatial_up), len(self.spatial_down)),
            ("temporal_up", up, down),
        ):
            if found != wanted:
                raise OptionError(key, f"as many levels as the encoder halves, {wanted}", getattr(self, key))

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame."""
        return 2 ** len(set(self.temporal_down) & set(self.spatial_down))

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along height and width."""
        return 2 ** len(self.spatial_down)

    @property
    def time_padding(self) -> str:
        """What lies before the first frame of a convolution's input."""
        if not self.causal:
            return "symmetric"
        return "zeros" if self.version == "1.0" else "replicate"

    @property
    def encoder_channels(self) -> int:
        """Channels of the encoder's output: mean and log-variance for KL."""
        return 2 * self.z_channels if self.regularizer == "kl" else self.z_channels

    def width(self, level: int) -> int:
        """Channels at a level."""
        return self.channels * self.channel_multipliers[level]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VidTokConfig:
        """Inverse of `to_dict`; unknown and missing keys are refused."""
        if not isinstance(values, dict):
            raise OptionError("config", "a JSON object", f"a {type(values).__name__}")
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise OptionError(
                "config", f"keys among {sorted(cls.__dataclass_fields__)}", unknown, "Remove the unknown keys."
            )
        missing = [key for key in ("name", "causal", "version", "regularizer", "z_channels") if key not in values]
        if missing:
            raise OptionError("config", f"a value for {missing[0]}", "none")
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fields)

    @classmethod
    def named(cls, name: str) -> VidTokConfig:
        """A published configuration. Accepts `vidtok_` left out and a checkpoint's file ending."""
        stem = name.removesuffix(".ckpt").removesuffix(".safetensors")
        stem = stem if stem.startswith("vidtok_") else f"vidtok_{stem}"
        if stem not in CONFIGS:
            close = difflib.get_close_matches(stem, CONFIGS, 3)
            raise OptionError(
                "name",
                "a published VidTok configuration",
                repr(name),
                f"Nearest: {', '.join(close)}." if close else f"There are {', '.join(sorted(CONFIGS))}.",
            )
        return CONFIGS[stem]


_FIVE_LEVELS: dict[str, Any] = {
    "channel_multipliers": (1, 2, 4, 4, 4),
    "spatial_down": (0, 1, 2, 3),
    "spatial_up": (1, 2, 3, 4),
    "temporal_down": (2, 3),
    "temporal_up": (1, 2),
}
_GRIDS: dict[str, dict[str, Any]] = {
    "488": {},
    "41616": _FIVE_LEVELS,
    "288": {"temporal_down": (1,), "temporal_up": (2,)},
    "444": {"spatial_down": (1, 2), "spatial_up": (1, 2)},
    "888": {"temporal_down": (0, 1, 2), "temporal_up": (1, 2, 3)},
}
# (regularizer, causal, grid, channels or codebook size, versions that exist)
_PUBLISHED = (
    ("kl", True, "488", "4chn", ("1.0", "1.1")),
    ("kl", True, "488", "8chn", ("1.0",)),
    ("kl", True, "488", "16chn", ("1.0", "1.1")),
    ("kl", True, "288", "8chn", ("1.0", "1.1")),
    ("kl", True, "444", "4chn", ("1.0",)),
    ("kl", True, "41616", "4chn", ("1.0",)),
    ("kl", True, "41616", "16chn", ("1.1",)),
    ("fsq", True, "488", "4096", ("1.0",)),
    ("fsq", True, "488", "32768", ("1.0", "1.1")),
    ("fsq", True, "488", "262144", ("1.0",)),
    ("fsq", True, "41616", "262144", ("1.0", "1.1")),
    ("fsq", True, "888", "32768", ("1.1",)),
    ("kl", False, "488", "4chn", ("1.0",)),
    ("kl", False, "488", "16chn", ("1.0",)),
    ("kl", False, "41616", "4chn", ("1.0",)),
    ("kl", False, "41616", "16chn", ("1.0",)),
    ("fsq", False, "488", "262144", ("1.0",)),
    ("fsq", False, "41616", "262144", ("1.0",)),
)
# Every published codebook is 8 levels on each of log8(size) channels.
_FSQ_CHANNELS = {"4096": 4, "32768": 5, "262144": 6}


def _published() -> dict[str, VidTokConfig]:
    configs = {}
    for regularizer, causal, grid, size, versions in _PUBLISHED:
        channels = _FSQ_CHANNELS[size] if regularizer == "fsq" else int(size.removesuffix("chn"))
        levels = (8,) * channels if regularizer == "fsq" else ()
        for version in versions:
            suffix = "_v1_1" if version == "1.1" else ""
            name = f"vidtok_{regularizer}_{'causal' if causal else 'noncausal'}_{grid}_{size}{suffix}"
            configs[name] = VidTokConfig(name, causal, version, regularizer, channels, levels, **_GRIDS[grid])
    return configs


CONFIGS: dict[str, VidTokConfig] = _published()
