# SPDX-License-Identifier: Apache-2.0
"""Every exception this package raises on purpose.

Argument errors name the argument, what was expected, what came, and what to do about it; they are raised before
anything is written, so the caller's tensors and modules are as they were.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailable",
    "DTypeError",
    "DeviceError",
    "OptionError",
    "PatchError",
    "ShapeError",
    "TrainingError",
    "VidkernelsError",
    "VidkernelsFallbackWarning",
]


class VidkernelsError(Exception):
    """Base class of all errors raised by vidkernels."""


def _shortened(text: str, longest: int = 400) -> str:
    """Begin and end of what came: a list of a million offsets is no message."""
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


class _ArgumentError(VidkernelsError):
    """An argument was refused: `argument: expected ..., got .... remedy`."""

    def __init__(self, argument: str, expected: str, got: object, remedy: str = "") -> None:
        self.argument, self.expected, self.got, self.remedy = argument, expected, got, remedy
        text = f"{argument}: expected {expected}, got {_shortened(str(got))}."
        super().__init__(f"{text} {remedy}".rstrip())

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str]]:
        return type(self), (self.argument, self.expected, str(self.got), self.remedy)


class ShapeError(_ArgumentError, ValueError):
    """A tensor has the wrong number of dimensions or a size that does not fit the others."""


class DTypeError(_ArgumentError, TypeError):
    """A tensor has a dtype that the operation is not defined for."""


class DeviceError(_ArgumentError, ValueError):
    """Tensors of one call live on different devices."""


class OptionError(_ArgumentError, ValueError):
    """A non-tensor argument has a value outside its allowed set."""


class BackendUnavailable(VidkernelsError, RuntimeError):
    """The requested backend cannot serve this call, or was not built; the text is the backend's own reason."""


class PatchError(VidkernelsError, RuntimeError):
    """A model could not be patched or restored; the model is unchanged."""


class TrainingError(VidkernelsError, RuntimeError):
    """A training run cannot start, go on or resume."""


class VidkernelsFallbackWarning(UserWarning):
    """A slower backend serves a call; issued once per (operation, reason)."""
