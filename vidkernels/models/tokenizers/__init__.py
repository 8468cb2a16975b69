# SPDX-License-Identifier: Apache-2.0
"""Video tokenizers: VidTok, MAGVIT-v2, MAGVIT and VQGAN."""

from __future__ import annotations

from vidkernels._exports import lazy

_EXPORTS: dict[str, str] = {
    "VidTok": "vidkernels.models.tokenizers.vidtok",
    "VidTokConfig": "vidkernels.models.tokenizers.vidtok_config",
    "VidTokOutput": "vidkernels.models.tokenizers.vidtok",
}

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy(__name__, _EXPORTS)
