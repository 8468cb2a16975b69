# SPDX-License-Identifier: Apache-2.0
"""When to compute a denoising step and when to reuse: pure arithmetic on a few numbers per step.

A policy sees steps 1..N. `computes(step)` is asked once before a step; after a computed step `observe` is told how far the
measured residuals have moved. Policies own no tensors but the measured residuals' summary, so they are cheap to test.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vidkernels.errors import OptionError
from vidkernels.ops._checks import check_number, check_whole

Codebook = tuple[tuple[float, int], ...]

# (threshold, rate): the first threshold above the distance gives the steps to the next computation. AdaCache's own files.
CODEBOOKS: dict[str, Codebook] = {
    "100": ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.00, 3)),
    "30-fast": ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.00, 1)),
    "30-slow": ((0.08, 3), (0.16, 2), (0.24, 1), (0.32, 1), (0.40, 1), (1.00, 1)),
}


def checked_codebook(codebook: object) -> Codebook:
    """Pairs of a threshold and a whole rate from 1 on, thresholds ascending, as tuples."""
    try:
        pairs = [(float(threshold), rate) for threshold, rate in codebook]  # type: ignore[attr-defined]
        rates = [int(rate) for _, rate in pairs]
        fits = all(given == rate and rate >= 1 for (_, given), rate in zip(pairs, rates, strict=True))
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits or not pairs or any(not a <= b for (a, _), (b, _) in zip(pairs, pairs[1:], strict=False)):
        raise OptionError("codebook", "(threshold, rate >= 1) pairs in ascending order", codebook)
    return tuple((threshold, rate) for (threshold, _), rate in zip(pairs, rates, strict=True))


@dataclass(frozen=True)
class Observation:
    """One measured residual at a computed step.

    Attributes:
        block: index of the measured block.
        distance: ||previous - now||_1 / ||previous||_1 over the whole tensor; None at the first computed step.
        motion: relative L1 change between neighbouring frames, None without motion regularisation.
        group: name of the block's list: a spatial and a temporal block of one index are two blocks.
    """

    block: int
    distance: float | None
    motion: float | None = None
    group: str = ""


@dataclass(frozen=True)
class Decision:
    """What a policy made of an observation."""

    step: int
    block: int
    distance: float
    scaled: float
    rate: int


@dataclass
class AdaCachePolicy:
    """AdaCache (arXiv 2411.02397) as its released code computes it, with motion regularisation (MoReg).

    Step s computes iff s = last computed + rate, or s is 1, N-1 or N. The rate comes from a codebook of the distance that
    the measured residual has moved, divided by the rate in force.

    Attributes:
        steps: N, denoising steps of a sample.
        codebook: (threshold, rate) pairs, ascending; the last rate serves everything above.
        motion: multiply the distance by MoReg inside `motion_window`.
        motion_window: steps, both ends included; the official windows are (10, 90) of 100 and (4, 26) of 30.
    """

    steps: int
    codebook: Codebook = CODEBOOKS["100"]
    motion: bool = True
    motion_window: tuple[int, int] | None = None
    motion_scale: float = 0.385
    motion_power: float = 8.0
    gradient_scale: float = 10.0
    rate: int = field(default=1, init=False)
    last: int = field(default=0, init=False)
    decisions: list[Decision] = field(default_factory=list, init=False)
    computed: list[int] = field(default_factory=list, init=False)
    _previous_motion: dict[tuple[str, int], float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, 1)
        self.codebook = checked_codebook(self.codebook)
        if self.motion_window is None:
            self.motion_window = (round(0.1 * self.steps), round(0.9 * self.steps)) if self.steps != 30 else (4, 26)
        ends = self.motion_window
        if (
            not isinstance(ends, (tuple, list))
            or len(ends) != 2
            or not all(isinstance(end, (int, float)) for end in ends)
        ):
            raise OptionError("motion_window", "two steps, both ends included", ends)
        for name in ("motion_scale", "motion_power"):
            check_number(name, getattr(self, name))
            if getattr(self, name) <= 0:
                raise OptionError(name, "a positive number", getattr(self, name))

    def reset(self) -> None:
        """Forget everything but the settings: a new sample begins."""
        self.rate, self.last = 1, 0
        self.decisions.clear()
        self.computed.clear()
        self._previous_motion.clear()

    def computes(self, step: int) -> bool:
        """Whether step 1..N is computed."""
        return step == self.last + self.rate or step in (1, self.steps - 1, self.steps)

    def observe(self, step: int, observations: list[Observation]) -> None:
        """Close a computed step; the measured blocks come in the order of execution."""
        rate_in_force, mean, count = self.rate, 0.0, 0
        for observation in observations:
            if observation.distance is None:
                continue
            distance = observation.distance / rate_in_force
            mean, count = (distance + count * mean) / (count + 1), count + 1
            scaled = mean * self._motion_factor(step, observation, rate_in_force)
            self.rate = next(
                (rate for threshold, rate in self.codebook[:-1] if scaled < threshold), self.codebook[-1][1]
            )
            self.decisions.append(Decision(step, observation.block, mean, scaled, self.rate))
        self.last = step
        self.computed.append(step)

    def _motion_factor(self, step: int, observation: Observation, rate: int) -> float:
        if not self.motion or observation.motion is None or self.motion_window is None:
            return 1.0
        inside = self.motion_window[0] <= step <= self.motion_window[1]
        motion = (observation.motion / self.motion_scale) ** self.motion_power if inside else 1.0
        block = (observation.group, observation.block)
        gradient = self.gradient_scale * (motion - self._previous_motion.get(block, 1.0)) / rate
        self._previous_motion[block] = motion
        return motion + abs(gradient)


@dataclass
class FirstBlockPolicy:
    """Compute when the first block's residual has drifted by `threshold` since the last computation (TeaCache, arXiv
    2411.19108, and first-block caches measure alike). The first block runs at every step.

    Attributes:
        steps: N.
        threshold: accumulated relative L1 change that triggers a computation.
    """

    steps: int
    threshold: float = 0.1
    computed: list[int] = field(default_factory=list, init=False)
    decisions: list[Decision] = field(default_factory=list, init=False)
    drift: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, 1)
        check_number("threshold", self.threshold, 0.0)

    def reset(self) -> None:
        """A new sample begins."""
        self.computed.clear()
        self.decisions.clear()
        self.drift = 0.0

    def computes(self, step: int, distance: float | None) -> bool:
        """Whether step 1..N is computed, given the first block's change since the previous step."""
        self.drift += 0.0 if distance is None else distance
        compute = distance is None or step in (1, self.steps) or self.drift >= self.threshold
        self.decisions.append(Decision(step, 0, distance or 0.0, self.drift, 1))
        if compute:
            self.drift = 0.0
            self.computed.append(step)
        return compute


@dataclass
class TaylorPolicy:
    """Compute every `interval` steps and forecast between by a Taylor series of finite differences (TaylorSeer,
    arXiv 2503.06923).

    Attributes:
        steps: N.
        interval: distance of computed steps.
        order: highest difference used.
        warmup: first steps that are always computed.
    """

    steps: int
    interval: int = 3
    order: int = 1
    warmup: int = 2
    computed: list[int] = field(default_factory=list, init=False)
    decisions: list[Decision] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("interval", 1), ("order", 0), ("warmup", 1)):
            check_whole(name, getattr(self, name), least)

    def reset(self) -> None:
        """A new sample begins."""
        self.computed.clear()
        self.decisions.clear()

    def computes(self, step: int) -> bool:
        """Whether step 1..N is computed."""
        last = self.computed[-1] if self.computed else 0
        return step <= self.warmup or step == self.steps or step - last >= self.interval

    def observe(self, step: int, observations: list[Observation]) -> None:
        """Close a computed step."""
        self.computed.append(step)
