# SPDX-License-Identifier: Apache-2.0
"""Triton kernels and their launchers: tensors in, tensors out. Nothing here chooses a backend."""
