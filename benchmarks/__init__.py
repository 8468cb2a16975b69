# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of every stem: one registry, one runner. ``python -m benchmarks --help``; see docs/benchmarking.md."""

import os

# The profiler behind the memory column writes start and stop lines to stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
