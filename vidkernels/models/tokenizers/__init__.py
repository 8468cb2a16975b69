# SPDX-License-Identifier: Apache-2.0
"""Video tokenizers: VidTok, MAGVIT-v2, MAGVIT and VQGAN."""

from __future__ import annotations

from vidkernels._exports import lazy

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
__getattr__, __dir__ = lazy(__name__, _EXPORTS)
