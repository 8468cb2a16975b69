# SPDX-License-Identifier: Apache-2.0
"""Video tokenizers: VidTok, MAGVIT-v2, MAGVIT and VQGAN."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vidkernels._exports import lazy

if TYPE_CHECKING:
    from vidkernels.models.tokenizers.magvit import MAGVIT as MAGVIT
    from vidkernels.models.tokenizers.magvit import MAGVITConfig as MAGVITConfig
    from vidkernels.models.tokenizers.magvit import inflate as inflate
    from vidkernels.models.tokenizers.magvit import inflate_kernel as inflate_kernel
    from vidkernels.models.tokenizers.magvit2 import MAGVIT2 as MAGVIT2
    from vidkernels.models.tokenizers.magvit2 import MAGVIT2Config as MAGVIT2Config
    from vidkernels.models.tokenizers.magvit2_layers import MAGVIT2Layers as MAGVIT2Layers
    from vidkernels.models.tokenizers.magvit2_layers import MAGVIT2LayersConfig as MAGVIT2LayersConfig
    from vidkernels.models.tokenizers.vidtok import VidTok as VidTok
    from vidkernels.models.tokenizers.vidtok import VidTokOutput as VidTokOutput
    from vidkernels.models.tokenizers.vidtok_config import VidTokConfig as VidTokConfig
    from vidkernels.models.tokenizers.vqgan import VQGAN as VQGAN
    from vidkernels.models.tokenizers.vqgan import VQGANConfig as VQGANConfig

_EXPORTS: dict[str, str] = {
    "MAGVIT": "vidkernels.models.tokenizers.magvit",
    "MAGVIT2": "vidkernels.models.tokenizers.magvit2",
    "MAGVIT2Config": "vidkernels.models.tokenizers.magvit2",
    "MAGVIT2Layers": "vidkernels.models.tokenizers.magvit2_layers",
    "MAGVIT2LayersConfig": "vidkernels.models.tokenizers.magvit2_layers",
    "MAGVITConfig": "vidkernels.models.tokenizers.magvit",
    "VQGAN": "vidkernels.models.tokenizers.vqgan",
    "VQGANConfig": "vidkernels.models.tokenizers.vqgan",
    "inflate": "vidkernels.models.tokenizers.magvit",
    "inflate_kernel": "vidkernels.models.tokenizers.magvit",
    "VidTok": "vidkernels.models.tokenizers.vidtok",
    "VidTokConfig": "vidkernels.models.tokenizers.vidtok_config",
    "VidTokOutput": "vidkernels.models.tokenizers.vidtok",
}

__all__ = sorted(_EXPORTS)
if not TYPE_CHECKING:  # type checkers know the names above, and no others
    __getattr__, __dir__ = lazy(__name__, _EXPORTS)
