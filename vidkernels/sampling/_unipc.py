# SPDX-License-Identifier: Apache-2.0
"""UniPC (arXiv 2302.04867) on the noise levels of a rectified flow, by diffusers' `UniPCMultistepScheduler`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidkernels.errors import OptionError


class UniPC:
    """One sampling run: second-order predictor with corrector, one call of the model a step.

    diffusers keeps the levels in float32 and starts at 1 - 1e-6, where its log-SNR is finite.

    Args:
        levels: [steps + 1], from 1 to 0, as `RectifiedFlow.levels` gives them.
    """

    def __init__(self, levels: Tensor) -> None:
        try:
            from diffusers import UniPCMultistepScheduler
        except ImportError as error:
            expected = "'euler' or 'heun' where diffusers is not installed"
            raise OptionError("method", expected, "'unipc'", "pip install diffusers") from error
        scheduler: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        scheduler.set_timesteps(sigmas=levels[:-1].cpu().numpy())
        # Left alone, the scheduler finds its start by the truncated timestep; where that repeats (a shift of 7 and 200
        # steps: twice 999) it takes the second and skips a level.
        scheduler.set_begin_index(0)
        self._scheduler = scheduler

    def step(self, slope: Tensor, x: Tensor) -> Tensor:
        """x [B, C, ...] at the next level, given d x / d sigma at this one."""
        return self._scheduler.step(slope, None, x, return_dict=False)[0]
