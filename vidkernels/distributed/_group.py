# SPDX-License-Identifier: Apache-2.0
"""Process groups as the public functions take them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from vidkernels.errors import OptionError

Group = Any  # a ProcessGroup, a one-dimensional DeviceMesh, or None for the default group


def resolve(group: Group) -> tuple[Any, int, int]:
    """Process group, its size and this process's rank in it; without torch.distributed one process alone."""
    if not dist.is_available() or not dist.is_initialized():
        if group is not None:
            raise OptionError(
                "group", "an initialised torch.distributed", repr(group), "Call init_process_group first."
            )
        return None, 1, 0
    if hasattr(group, "get_group"):
        if group.ndim != 1:
            raise OptionError(
                "group", "a one-dimensional DeviceMesh", f"{group.ndim} axes", "Index it: mesh['sequence']."
            )
        group = group.get_group()
    rank = dist.get_rank(group)
    if rank < 0:
        raise OptionError("group", "a group that holds this process", "one that does not", "Call it on its ranks only.")
    return group, dist.get_world_size(group), rank
