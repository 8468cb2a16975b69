# SPDX-License-Identifier: Apache-2.0
"""The command line: one module a command, with a `main(argv)` that returns the exit code."""
