# SPDX-License-Identifier: Apache-2.0
"""The law: what each op computes, in plain PyTorch, importing nothing but torch.

Signatures equal those of `vidkernels.ops` without `backend=`. Every function runs in float64 and is differentiable.
"""
