# SPDX-License-Identifier: Apache-2.0
"""Several processes for one sequence of tokens, or for one clip, on `torch.distributed`.

`sequence`: attention over a packed sequence whose tokens are spread over ranks. `temporal`: a causal VAE whose ranks encode and
decode the chunks of a clip together.
"""

from vidkernels.distributed.sequence import (
    allowed_degrees,
    gather_sequence,
    local_offsets,
    local_text_offsets,
    shard_sequence,
    ulysses_attention,
)
from vidkernels.distributed.temporal import TemporalParallel, temporal_parallel

__all__ = [
    "TemporalParallel",
    "allowed_degrees",
    "gather_sequence",
    "local_offsets",
    "local_text_offsets",
    "shard_sequence",
    "temporal_parallel",
    "ulysses_attention",
]
