# SPDX-License-Identifier: Apache-2.0
"""Step caching for diffusion transformers: AdaCache with motion regularisation, first-block and Taylor policies."""

from __future__ import annotations

from vidkernels._exports import lazy

_EXPORTS: dict[str, str] = {
    "AdaCachePolicy": "vidkernels.caching.policies",
    "CacheHandle": "vidkernels.caching.handle",
    "CacheReport": "vidkernels.caching.handle",
    "CODEBOOKS": "vidkernels.caching.policies",
    "Calibration": "vidkernels.caching._calibrate",
    "Comparison": "vidkernels.caching._compare",
    "FirstBlockPolicy": "vidkernels.caching.policies",
    "TaylorPolicy": "vidkernels.caching.policies",
    "adacache": "vidkernels.caching.handle",
    "calibrate": "vidkernels.caching._calibrate",
    "compare": "vidkernels.caching._compare",
    "default_policies": "vidkernels.caching._compare",
}

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy(__name__, _EXPORTS)
