# SPDX-License-Identifier: Apache-2.0
"""Video diffusion transformers: Latte, LatteT2V, STDiT3 (Open-Sora 1.2) and Goku."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vidkernels._exports import lazy

if TYPE_CHECKING:
    from vidkernels.models.transformers.goku import Goku as Goku
    from vidkernels.models.transformers.goku import GokuConfig as GokuConfig
    from vidkernels.models.transformers.latte import Latte as Latte
    from vidkernels.models.transformers.latte import LatteConfig as LatteConfig
    from vidkernels.models.transformers.latte_t2v import LatteT2V as LatteT2V
    from vidkernels.models.transformers.latte_t2v import LatteT2VConfig as LatteT2VConfig
    from vidkernels.models.transformers.stdit3 import STDiT3 as STDiT3
    from vidkernels.models.transformers.stdit3 import STDiT3Config as STDiT3Config

_EXPORTS: dict[str, str] = {
    "Goku": "vidkernels.models.transformers.goku",
    "GokuConfig": "vidkernels.models.transformers.goku",
    "Latte": "vidkernels.models.transformers.latte",
    "LatteConfig": "vidkernels.models.transformers.latte",
    "LatteT2V": "vidkernels.models.transformers.latte_t2v",
    "LatteT2VConfig": "vidkernels.models.transformers.latte_t2v",
    "STDiT3": "vidkernels.models.transformers.stdit3",
    "STDiT3Config": "vidkernels.models.transformers.stdit3",
}

__all__ = sorted(_EXPORTS)
if not TYPE_CHECKING:  # type checkers know the names above, and no others
    __getattr__, __dir__ = lazy(__name__, _EXPORTS)
