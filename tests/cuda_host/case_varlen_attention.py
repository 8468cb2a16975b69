# SPDX-License-Identifier: Apache-2.0
"""Packed attention's C++ kernels under sanitizers: both directions in all dtypes, and tiles of AMX, emulated, in bfloat16."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_varlen_attention import (
    test_cpp_in_float64,
    test_cpp_keeps_the_promise,
    test_only_wanted_gradients,
    test_threads_do_not_change_results,
)
from test_varlen_attention_tiles import (
    test_chunks_of_queries_equal_the_whole,
    test_every_length,
    test_gradients,
    test_infinities_of_both_signs,
    test_not_finite,
    test_promise,
    test_scales,
    test_stats,
    test_strides,
    test_threads_and_blocks_do_not_change_results,
)

__all__ = [
    "test_chunks_of_queries_equal_the_whole",
    "test_cpp_in_float64",
    "test_cpp_keeps_the_promise",
    "test_every_length",
    "test_gradients",
    "test_infinities_of_both_signs",
    "test_not_finite",
    "test_only_wanted_gradients",
    "test_promise",
    "test_scales",
    "test_stats",
    "test_strides",
    "test_threads_and_blocks_do_not_change_results",
    "test_threads_do_not_change_results",
]
