# SPDX-License-Identifier: Apache-2.0
"""Imported before torch by commands that use its profiler: torch reads these variables once, when it is loaded."""

import os

# Otherwise the profiler writes lines at its start and stop, and a warning for every block it did not see allocated.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
