# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of every stem: one registry, one runner. ``python -m benchmarks --help``; see docs/benchmarking.md."""

import os

# The profiler behind the memory column writes start and stop lines to stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# It also warns of every block freed that it did not see allocated, which is none of the call's memory.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
