# SPDX-License-Identifier: Apache-2.0
"""Samplers: rectified flow in both orientations, and DDPM/DDIM with respacing and learned variance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vidkernels._exports import lazy

if TYPE_CHECKING:
    from vidkernels.sampling.diffusion import GaussianDiffusion as GaussianDiffusion
    from vidkernels.sampling.diffusion import respaced_steps as respaced_steps
    from vidkernels.sampling.rectified_flow import RectifiedFlow as RectifiedFlow
    from vidkernels.sampling.rectified_flow import guided as guided
    from vidkernels.sampling.rectified_flow import shift_time as shift_time

_EXPORTS: dict[str, str] = {
    "GaussianDiffusion": "vidkernels.sampling.diffusion",
    "RectifiedFlow": "vidkernels.sampling.rectified_flow",
    "guided": "vidkernels.sampling.rectified_flow",
    "respaced_steps": "vidkernels.sampling.diffusion",
    "shift_time": "vidkernels.sampling.rectified_flow",
}

__all__ = sorted(_EXPORTS)
if not TYPE_CHECKING:  # type checkers know the names above, and no others
    __getattr__, __dir__ = lazy(__name__, _EXPORTS)
