# SPDX-License-Identifier: Apache-2.0
"""Step caching for diffusion transformers: AdaCache with motion regularisation, first-block and Taylor policies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vidkernels._exports import lazy

if TYPE_CHECKING:
    from vidkernels.caching._calibrate import Calibration as Calibration
    from vidkernels.caching._calibrate import calibrate as calibrate
    from vidkernels.caching._compare import Comparison as Comparison
    from vidkernels.caching._compare import compare as compare
    from vidkernels.caching._compare import default_policies as default_policies
    from vidkernels.caching.handle import CacheHandle as CacheHandle
    from vidkernels.caching.handle import CacheReport as CacheReport
    from vidkernels.caching.handle import adacache as adacache
    from vidkernels.caching.policies import CODEBOOKS as CODEBOOKS
    from vidkernels.caching.policies import AdaCachePolicy as AdaCachePolicy
    from vidkernels.caching.policies import FirstBlockPolicy as FirstBlockPolicy
    from vidkernels.caching.policies import TaylorPolicy as TaylorPolicy

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
if not TYPE_CHECKING:  # type checkers know the names above, and no others
    __getattr__, __dir__ = lazy(__name__, _EXPORTS)
