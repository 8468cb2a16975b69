# SPDX-License-Identifier: Apache-2.0
"""Backends of the convolutions that are written in Python, and what they share: geometry, plans, weights."""
