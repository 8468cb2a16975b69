# SPDX-License-Identifier: Apache-2.0
"""`FSQ`: vector-quantize-pytorch's module over `vidkernels.ops`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels._reference import fsq as reference
from vidkernels.errors import OptionError, ShapeError
from vidkernels.ops import _checks
from vidkernels.ops._checks import autocast_dtype
from vidkernels.ops.fsq import check_levels


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A projection in the dtype of its weight, returned in the dtype of x (autocast decides where it is active)."""
    weight = getattr(layer, "weight", None)
    if weight is None or autocast_dtype(x) is not None:
        return layer(x)
    return layer(x.to(weight.dtype)).to(x.dtype)


def flatten_tokens(x: Tensor, dim: int) -> tuple[Tensor, tuple[int, ...]]:
    """x as [B, N, C], and the shape of its tokens."""
    last = x.movedim(dim, -1)
    tokens = tuple(last.shape[:-1])
    return last.reshape(tokens[0], math.prod(tokens[1:]), last.shape[-1]), tokens


def rotated(module: Any, x: Tensor, rotation: Tensor) -> Tensor:
    """Every codebook of x [..., codebooks * d] times ``rotation`` [d, d]."""
    books = x.unflatten(-1, (module.num_codebooks, module.codebook_dim))
    return (books @ rotation.to(x.dtype)).flatten(-2)


class FSQ(nn.Module):
    """Finite scalar quantization; the interface of `vector_quantize_pytorch.FSQ` 1.32.

    Every channel is bounded and rounded to one of its levels; the formula is that of `vidkernels.ops.fsq_quantize`.

    Differences from upstream: half-precision input works with float32 projections; indices are exact beyond 2^24 codes;
    `codes_to_indices` undoes an orthogonal rotation; `implicit_codebook` is computed when asked for; wrong arguments
    raise typed errors.

    Args:
        levels: levels per channel, at least 3 (2 with ``preserve_symmetry``).
        dim: channels of the input; projections are created if it is not num_codebooks * len(levels).
        num_codebooks: groups of channels, each with its own index.
        keep_num_codebooks_dim: indices keep a last axis of codebooks (default: if there are several).
        scale: stored, not used (as upstream).
        allowed_dtypes: dtypes quantized as they are; others go through float32.
        channel_first: [B, C, N] input; inputs of 4 and more axes are channel first in any case.
        projection_has_bias, return_indices, force_quantization_f32: as upstream.
        preserve_symmetry: the symmetric grid (arXiv 2411.19842).
        noise_dropout: share of codes that get uniform noise in training; needs ``preserve_symmetry``.
        bound_hard_clamp: clamp in place of tanh.
        orthogonal_rotation: a fixed random rotation before, its inverse after.
        backend: backend of `vidkernels.ops.fsq_quantize`.

    Source: arXiv 2309.15505.
    """

    _levels: Tensor
    _basis: Tensor
    orthogonal_rot: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        scale: float | None = None,
        allowed_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        force_quantization_f32: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        orthogonal_rotation: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _checks.check_flags(
            channel_first=channel_first,
            projection_has_bias=projection_has_bias,
            return_indices=return_indices,
            force_quantization_f32=force_quantization_f32,
            preserve_symmetry=preserve_symmetry,
            bound_hard_clamp=bound_hard_clamp,
            orthogonal_rotation=orthogonal_rotation,
        )
        counts = list(levels) if isinstance(levels, Iterable) else levels
        self.levels = list(check_levels(counts, "symmetric" if preserve_symmetry else "atanh"))
        _checks.check_sizes(num_codebooks=num_codebooks, **({} if dim is None else {"dim": dim}))
        _checks.check_number("noise_dropout", noise_dropout, 0)
        if noise_dropout > 0 and not preserve_symmetry:
            raise OptionError("noise_dropout", "0 without preserve_symmetry", noise_dropout)
        self.codebook_dim, self.num_codebooks = len(self.levels), num_codebooks
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.keep_num_codebooks_dim = keep_codebooks(keep_num_codebooks_dim, num_codebooks)
        self.dim = self.effective_codebook_dim if dim is None else dim
        self.scale, self.allowed_dtypes, self.channel_first = scale, allowed_dtypes, channel_first
        self.return_indices, self.force_quantization_f32 = return_indices, force_quantization_f32
        self.preserve_symmetry, self.noise_dropout = preserve_symmetry, noise_dropout
        self.bound_hard_clamp, self.orthogonal_rotation = bound_hard_clamp, orthogonal_rotation
        self.backend = backend
        basis = reference.basis(self.levels)
        self.codebook_size = basis[-1] * self.levels[-1]
        self.register_buffer("_levels", torch.tensor(self.levels, dtype=torch.int32), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis, dtype=torch.int64), persistent=False)
        self.has_projections = self.dim != self.effective_codebook_dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(self.dim, self.effective_codebook_dim, bias=projection_has_bias)
            self.project_out = nn.Linear(self.effective_codebook_dim, self.dim, bias=projection_has_bias)
        if orthogonal_rotation:
            rotation = torch.empty(self.codebook_dim, self.codebook_dim)
            self.register_buffer("orthogonal_rot", nn.init.orthogonal_(rotation))

    def extra_repr(self) -> str:
        return f"levels={self.levels}, dim={self.dim}, num_codebooks={self.num_codebooks}, bound={self._bound!r}"

    @property
    def _bound(self) -> str:
        return "symmetric" if self.preserve_symmetry else "atanh"

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes in the order of their indices, [K, d] float32."""
        return ops.fsq_indices_to_codes(
            torch.arange(self.codebook_size, device=self._levels.device), self.levels, bound=self._bound
        )

    def quantize(self, z: Tensor) -> Tensor:
        """Codes of z [..., d], without projections, rotation and noise."""
        codes, _ = ops.fsq_quantize(
            z,
            self.levels,
            bound=self._bound,
            hard_clamp=self.bound_hard_clamp,
            return_indices=False,
            backend=self.backend,
        )
        assert codes is not None
        return codes

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """Level of each channel, [..., d] with 0 <= level < L_i: what a model with factorised embeddings reads."""
        _checks.check_integer("indices", indices)
        # Not from the buffers, which hold anything after `to_empty`: no checkpoint has them.
        weights = zip(reference.basis(self.levels), self.levels, strict=True)
        return torch.stack([torch.div(indices.long(), w, rounding_mode="floor") % n for w, n in weights], -1)

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Indices (int32) of codes [..., d] as `forward` and `indices_to_codes` give them for one codebook."""
        _checks.check_floating("zhat", zhat)
        if self.orthogonal_rotation:
            zhat = zhat @ self.orthogonal_rot.to(zhat.dtype)
        return ops.fsq_codes_to_indices(zhat, self.levels, bound=self._bound)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Codes of indices, projected out; channels first where `forward` would take them so."""
        _checks.check_integer("indices", indices)
        last = indices.ndim - int(self.keep_num_codebooks_dim)
        channel_first = last >= 3 or self.channel_first
        if self.keep_num_codebooks_dim and self.num_codebooks == 1:
            indices = indices.squeeze(-1)
        plain = not (self.has_projections or self.orthogonal_rotation)
        codes = ops.fsq_indices_to_codes(
            indices,
            self.levels,
            bound=self._bound,
            dim=1 if plain and channel_first else -1,
            num_codebooks=self.num_codebooks,
        )
        if plain:
            return codes
        if self.orthogonal_rotation:
            codes = rotated(self, codes, self.orthogonal_rot.t())
        codes = linear(self.project_out, codes)
        return codes.movedim(-1, 1) if channel_first else codes

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantize [B, N, dim], [B, dim, N] (``channel_first``) or [B, dim, ...] with at least two token axes.

        Returns:
            (quantized, indices): the input's shape and dtype; int32 [B, tokens...], with a last axis of codebooks if
            `keep_num_codebooks_dim`, or None if not ``return_indices``.
        """
        return quantize_fsq(self, z, self.levels, self.backend)


def keep_codebooks(keep: bool | None, num_codebooks: int) -> bool:
    """Whether indices keep an axis of codebooks: asked for, or because there are several."""
    if keep is not None:
        _checks.check_flag("keep_num_codebooks_dim", keep)
    if num_codebooks > 1 and keep is False:
        raise OptionError("keep_num_codebooks_dim", "True for several codebooks", keep)
    return num_codebooks > 1 if keep is None else keep


def channel_axis(name: str, x: Tensor, channels: int, channel_first: bool) -> int:
    """The axis that holds `channels` channels.

    Raises:
        ShapeError: x has fewer than two axes, or another number of channels there.
    """
    _checks.check_tensor(name, x)
    if x.ndim < 3 and not (channel_first and x.ndim == 2):
        raise ShapeError(name, "at least 3 axes", f"shape {tuple(x.shape)}", "Add a batch axis: x.unsqueeze(0).")
    axis = 1 if channel_first else x.ndim - 1
    if x.shape[axis] != channels:
        remedy = ""
        if channel_first and x.shape[-1] == channels:
            remedy = f"Inputs of 4 and more axes are channel first: {name}.movedim(-1, 1)."
        elif not channel_first and x.shape[1] == channels:
            remedy = "Make the module with channel_first=True."
        got = f"{x.shape[axis]} (shape {tuple(x.shape)})"
        raise ShapeError(name, f"{channels} channels at axis {axis}", got, remedy)
    return axis


def _apply_noise(codes: Tensor, share: float) -> Tensor:
    # The order of the draws, and of the values in memory that they fill, is upstream's: one seed gives one result.
    chosen = torch.full_like(codes, share).bernoulli_().bool()
    offset = torch.rand_like(codes) - 0.5
    return torch.where(chosen, codes + offset, codes).clamp(-1.0, 1.0)


def quantize_fsq(module: Any, z: Tensor, levels: Sequence[int], backend: str) -> tuple[Tensor, Tensor | None]:
    """`FSQ.forward` for any module with upstream's attributes: our `FSQ` and a patched one of vector-quantize-pytorch."""
    _checks.check_floating("z", z)
    axis = channel_axis("z", z, module.dim, module.channel_first or z.ndim >= 4)
    noisy = module.training and module.noise_dropout > 0
    plain = not (module.has_projections or module.orthogonal_rotation or noisy)
    x = z
    if not plain:
        x, tokens = flatten_tokens(z, axis)
        x = linear(module.project_in, x)
        if module.orthogonal_rotation:
            x = rotated(module, x, module.orthogonal_rot)
    wide = x
    if module.force_quantization_f32 and x.dtype not in module.allowed_dtypes and (noisy or x.dtype == torch.float64):
        wide = x.float()  # half precision needs no copy: the kernels quantize it in float32
    codes, indices = ops.fsq_quantize(
        wide,
        levels,
        bound="symmetric" if module.preserve_symmetry else "atanh",
        dim=axis if plain else -1,
        num_codebooks=module.num_codebooks,
        hard_clamp=module.bound_hard_clamp,
        return_indices=module.return_indices,
        backend=backend,
    )
    if indices is not None and module.keep_num_codebooks_dim and module.num_codebooks == 1:
        indices = indices.unsqueeze(-1)
    if plain:
        return codes.to(z.dtype), indices
    if noisy:
        # Upstream packs channels-first input into new memory and leaves the rest as it lies.
        codes = codes if axis == z.ndim - 1 else codes.contiguous()
        codes = _apply_noise(codes, module.noise_dropout)
    if module.orthogonal_rotation:
        codes = rotated(module, codes, module.orthogonal_rot.t())
    out = linear(module.project_out, codes.to(x.dtype))
    out = out.reshape(*tokens, module.dim).movedim(-1, axis)
    return out, None if indices is None else indices.reshape(*tokens, *indices.shape[2:])
