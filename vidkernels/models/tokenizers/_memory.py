# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a network before anything is allocated: it runs on fake tensors, whose lifetimes are added up."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that exist at a time, and the most there were, but for those of `known` tensors and their views."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.untyped_storage() in self.seen:
                continue
            storage = tensor.untyped_storage()
            self.seen.add(storage)
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, size)
        return out

    def _drop(self, size: int) -> None:
        self.now -= size


def peak_bytes(network: nn.Module, shape: tuple[int, ...], training: bool) -> int:
    """Bytes beyond the weights and the input that `network(x)` needs at its worst moment, results included.

    Args:
        shape: of x, [B, C, T, H, W]; channels-last, in the dtype and on the device of the network's first parameter.
        training: with the backward pass, whose gradients are included.
    """
    first = next(network.parameters())
    mode = network.training
    network.train(training)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.set_grad_enabled(training):
            weights: dict[str, Tensor] = {key: fake.from_tensor(p) for key, p in network.named_parameters()}
            x = torch.empty(shape, dtype=first.dtype, device=first.device)
            x = x.contiguous(memory_format=torch.channels_last_3d)
            with _LiveBytes((*weights.values(), x)) as live:
                out = torch.func.functional_call(network, weights, (x,))
                if training:
                    out.float().square().mean().backward()
                del out
    finally:
        network.train(mode)
    return live.peak
