# SPDX-License-Identifier: Apache-2.0
"""The form of a block's result: which of its outputs continue which of its token streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vidkernels.errors import PatchError

Tokens = tuple[Tensor, ...]


@dataclass(frozen=True)
class Result:
    """How to make a block's result from its token streams.

    Attributes:
        sources: for each output the index of the stream that it continues, None where the output is None.
        is_tuple: whether the block returns a tuple.
    """

    sources: tuple[int | None, ...]
    is_tuple: bool

    @classmethod
    def of(cls, place: tuple[str, int], before: Tokens, output: Any) -> Result:
        """Pair outputs and streams: in order, or swapped where only that fits the shapes."""
        outputs = output if isinstance(output, tuple) else (output,)
        shapes = [None if value is None else value.shape for value in outputs]
        for order in (range(len(before)), reversed(range(len(before)))):
            free = list(order)
            found: list[int | None] = []
            for shape in shapes:
                if shape is None:
                    found.append(None)
                elif free and before[free[0]].shape == shape:
                    found.append(free.pop(0))
                else:
                    break
            if len(found) == len(shapes):
                return cls(tuple(found), isinstance(output, tuple))
        raise PatchError(
            f"{place[0]}.{place[1]} turns tokens {[tuple(x.shape) for x in before]} into {shapes}: its outputs do not continue its "
            "inputs, so its steps cannot be cached; name other lists with blocks=(...)"
        )

    def given(self, tokens: Tokens) -> Tokens:
        """The streams that have an output, in the order of the outputs."""
        return tuple(tokens[i] for i in self.sources if i is not None)

    def tokens(self, output: Any) -> Tokens:
        """The outputs that are token streams."""
        outputs = output if isinstance(output, tuple) else (output,)
        return tuple(value for value in outputs if value is not None)

    def filled(self, tokens: Tokens) -> Any:
        """A result of this form around token streams."""
        rest = iter(tokens)
        outputs = tuple(None if source is None else next(rest) for source in self.sources)
        return outputs if self.is_tuple else outputs[0]
