# SPDX-License-Identifier: Apache-2.0
"""`LFQ`: vector-quantize-pytorch's module over `vidkernels.ops`, with an exact entropy loss."""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.errors import OptionError, ShapeError
from vidkernels.nn.fsq import channel_axis, flatten_tokens, keep_codebooks, linear, rotated
from vidkernels.ops import _checks

Return = namedtuple("Return", ["quantized", "indices", "entropy_aux_loss"])
LossBreakdown = namedtuple("LossBreakdown", ["per_sample_entropy", "batch_entropy", "commitment"])


class CosineSimLinear(nn.Module):
    """scale * cosine similarity of x with each column of the weight."""

    def __init__(self, dim_in: int, dim_out: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(dim_in, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        return (F.normalize(x, dim=-1) @ F.normalize(self.weight, dim=0)) * self.scale


class LFQ(nn.Module):
    """Lookup-free quantization, binary spherical with ``spherical``; the interface of `vector_quantize_pytorch.LFQ` 1.32.

    Differences from upstream: the entropy loss is exact and needs no table of tokens x codes (`vidkernels.ops.lfq_entropy`;
    ``entropy_log_floor=1e-5`` gives upstream's values); it is right across ranks and under a mask of single tokens; no
    codebook is stored, so 2^36 codes cost nothing; half-precision input works with float32 projections; wrong arguments
    raise typed errors.

    Args:
        dim, codebook_size: at least one of them; codebook_size is a power of two (default 2^dim), dim defaults to
            log2(codebook_size) * num_codebooks.
        entropy_loss_weight, commitment_loss_weight, diversity_gamma: aux = weight * (per_sample - gamma * batch) +
            commitment_loss_weight * mean((x - q)^2).
        straight_through_activation: applied to x in training, in act(x) + (q - act(x)).
        num_codebooks, keep_num_codebooks_dim, channel_first, has_projections, projection_has_bias: as upstream.
        codebook_scale: codes are +-scale; on the sphere +-scale / sqrt(bits).
        frac_per_sample_entropy: share of the tokens, drawn at random, that both entropies see.
        soft_clamp_input_value: x -> tanh(x / value) * value before quantization.
        cosine_sim_project_in, cosine_sim_project_in_scale: cosine similarities as input projection.
        experimental_softplus_entropy_loss, entropy_loss_offset: softplus(entropy + offset).
        spherical, force_quantization_f32, orthogonal_rotation: as upstream.
        entropy_estimator, entropy_group_size, entropy_log_floor, entropy_log_floor_mode: of `ops.lfq_entropy`.
        backend: backend of `ops.lfq_quantize`.

    Source: arXiv 2310.05737; sphere: arXiv 2406.07548.
    """

    mask: Tensor
    zero: Tensor
    orthogonal_rot: Tensor

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: nn.Module | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        frac_per_sample_entropy: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        cosine_sim_project_in: bool = False,
        cosine_sim_project_in_scale: float | None = None,
        channel_first: bool | None = None,
        experimental_softplus_entropy_loss: bool = False,
        entropy_loss_offset: float = 5.0,
        spherical: bool = False,
        force_quantization_f32: bool = True,
        orthogonal_rotation: bool = False,
        entropy_estimator: str = "exact",
        entropy_group_size: int = 9,
        entropy_log_floor: float = 0.0,
        entropy_log_floor_mode: str = "clamp",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _checks.check_sizes(num_codebooks=num_codebooks, **({} if dim is None else {"dim": dim}))
        _checks.check_flags(
            spherical=spherical,
            projection_has_bias=projection_has_bias,
            cosine_sim_project_in=cosine_sim_project_in,
            experimental_softplus_entropy_loss=experimental_softplus_entropy_loss,
            force_quantization_f32=force_quantization_f32,
            orthogonal_rotation=orthogonal_rotation,
        )
        for name, value in (
            ("entropy_loss_weight", entropy_loss_weight),
            ("commitment_loss_weight", commitment_loss_weight),
            ("diversity_gamma", diversity_gamma),
            ("entropy_loss_offset", entropy_loss_offset),
        ):
            _checks.check_number(name, value)
        self.codebook_size = _codebook_size(dim, codebook_size)
        self.codebook_dim = self.codebook_size.bit_length() - 1
        channels = self.codebook_dim * num_codebooks
        self.dim = channels if dim is None else dim
        self.num_codebooks = num_codebooks
        self.keep_num_codebooks_dim = keep_codebooks(keep_num_codebooks_dim, num_codebooks)
        _check_ranges(frac_per_sample_entropy, soft_clamp_input_value, codebook_scale)
        self.channel_first, self.spherical, self.codebook_scale = channel_first, spherical, codebook_scale
        self.has_projections = self.dim != channels if has_projections is None else has_projections
        cosine_scale = codebook_scale if cosine_sim_project_in_scale is None else cosine_sim_project_in_scale
        self._make_parameters(channels, projection_has_bias, cosine_scale if cosine_sim_project_in else None)
        self.activation = nn.Identity() if straight_through_activation is None else straight_through_activation
        self.orthogonal_rotation, self.force_quantization_f32 = orthogonal_rotation, force_quantization_f32
        self._make_buffers()
        self.frac_per_sample_entropy, self.diversity_gamma = frac_per_sample_entropy, diversity_gamma
        self.entropy_loss_weight, self.commitment_loss_weight = entropy_loss_weight, commitment_loss_weight
        self.soft_clamp_input_value, self.entropy_loss_offset = soft_clamp_input_value, entropy_loss_offset
        self.experimental_softplus_entropy_loss = experimental_softplus_entropy_loss
        self.entropy_options = dict(
            estimator=entropy_estimator, group_size=entropy_group_size, log_floor=entropy_log_floor,
            log_floor_mode=entropy_log_floor_mode,
        )  # fmt: skip
        self.backend = backend

    def _make_parameters(self, channels: int, bias: bool, cosine_scale: float | None) -> None:
        """Projections where there are any; the input's is by cosine similarity where it has a scale."""
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if not self.has_projections:
            return
        self.project_in = nn.Linear(self.dim, channels, bias=bias)
        if cosine_scale is not None:
            self.project_in = CosineSimLinear(self.dim, channels, cosine_scale)
        self.project_out = nn.Linear(channels, self.dim, bias=bias)

    def _make_buffers(self) -> None:
        """Rotation, the weight of each bit (with it upstream's only entries of the state dict but for projections), a zero."""
        if self.orthogonal_rotation:
            rotation = torch.empty(self.codebook_dim, self.codebook_dim)
            self.register_buffer("orthogonal_rot", nn.init.orthogonal_(rotation))
        self.register_buffer("mask", 2 ** torch.arange(self.codebook_dim - 1, -1, -1))
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    def extra_repr(self) -> str:
        return f"codebook_size=2^{self.codebook_dim}, dim={self.dim}, num_codebooks={self.num_codebooks}"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the codes that `indices_to_codes` gives."""
        return self.zero.dtype

    @property
    def codebook(self) -> Tensor:
        """All codes in the order of their indices, [K, bits]; not normalised on the sphere, as upstream."""
        every = torch.arange(self.codebook_size, device=self.mask.device)
        return ops.lfq_indices_to_codes(every, self.codebook_dim, scale=self.codebook_scale, dtype=self.dtype)

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """Codes of indices; channels first if ``channel_first`` says so, or for two and more token axes."""
        _checks.check_integer("indices", indices)
        tokens = indices.ndim - int(self.keep_num_codebooks_dim)
        channel_first = tokens >= 3 if self.channel_first is None else self.channel_first
        if self.keep_num_codebooks_dim and self.num_codebooks == 1:
            indices = indices.squeeze(-1)
        codes = ops.lfq_indices_to_codes(
            indices, self.codebook_dim, scale=self.codebook_scale, spherical=self.spherical,
            num_codebooks=self.num_codebooks, dtype=self.dtype,
        )  # fmt: skip
        if self.orthogonal_rotation:
            codes = rotated(self, codes, self.orthogonal_rot.t())
        if project_out:
            codes = linear(self.project_out, codes)
        return codes.movedim(-1, 1) if channel_first else codes

    def forward(
        self, x: Tensor, inv_temperature: float = 100.0, return_loss_breakdown: bool = False, mask: Tensor | None = None
    ) -> Any:
        """Quantize [B, N, dim] or [B, dim, ...] (``channel_first``, or two and more token axes).

        Args:
            inv_temperature: of the entropy's soft assignment.
            return_loss_breakdown: also return the three terms of the loss.
            mask: [B] or [B, N], which tokens count in the losses.

        Returns:
            `Return(quantized, indices, entropy_aux_loss)`, or a pair of it and `LossBreakdown(per_sample_entropy,
            batch_entropy, commitment)`. Losses are zero in evaluation. Indices are int64.
        """
        return quantize_lfq(self, x, inv_temperature, return_loss_breakdown, mask, self.backend, self.entropy_options)


def _codebook_size(dim: int | None, codebook_size: int | None) -> int:
    if codebook_size is None:
        if dim is None:
            raise OptionError("codebook_size", "codebook_size or dim", "neither")
        return int(2**dim)
    if not _checks.is_whole(codebook_size):
        raise OptionError("codebook_size", "a power of two, at least 2", repr(codebook_size))
    if codebook_size < 2 or codebook_size & (codebook_size - 1):
        suggestion = 2 ** max(1, math.ceil(math.log2(max(codebook_size, 2))))
        raise OptionError("codebook_size", "a power of two, at least 2", codebook_size, f"Use {suggestion}.")
    return codebook_size


def _check_ranges(share: float, soft_clamp: float | None, scale: float) -> None:
    _checks.check_positive("codebook_scale", scale)
    if not _checks.is_finite(share) or not 0 < share <= 1:
        raise OptionError("frac_per_sample_entropy", "a number above 0, at most 1", repr(share))
    if soft_clamp is not None and (not _checks.is_finite(soft_clamp) or soft_clamp < scale):
        raise OptionError("soft_clamp_input_value", f"at least codebook_scale={scale}", repr(soft_clamp))


def all_ranks() -> Any:
    """All ranks, where there are several: looked up at every call, for ranks may be set up after the module."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def _check_mask(x: Tensor, mask: Tensor) -> None:
    """The mask of rows x [B, N, C] is [B] or [B, N]."""
    _checks.check_tensor("mask", mask)
    _checks.check_same_device("mask", mask, "x", x)
    if not 1 <= mask.ndim <= 2 or mask.shape != x.shape[: mask.ndim]:
        raise ShapeError("mask", f"[B] or [B, N] of x, {tuple(x.shape[:2])}", tuple(mask.shape), "One entry per token.")


def _nothing(module: Any) -> Tensor:
    """A loss of 0; not the buffer itself, which no checkpoint has, and which holds anything after `to_empty`."""
    zero: Tensor = module.zero.new_zeros(())
    return zero


def _sample(x: Tensor, mask: Tensor | None, share: float) -> tuple[Tensor, Tensor | None]:
    """Tokens for the entropies: [B, N, C] and a mask, or the drawn share of those that the mask keeps."""
    if share == 1.0:
        return x, mask
    rows = x.flatten(0, 1) if mask is None else x[mask.bool()].flatten(0, -2)
    count = rows.shape[0]
    kept = max(1, int(count * share))  # upstream keeps none of few tokens, and its loss is NaN then
    chosen = torch.randn(count).argsort(dim=-1) < kept
    return rows, chosen.to(x.device)


def _on_sphere(module: Any, x: Tensor) -> Tensor:
    if not module.spherical:
        return x
    books = x.unflatten(-1, (module.num_codebooks, module.codebook_dim))
    return (F.normalize(books, dim=-1) * module.codebook_scale).flatten(-2)


def _commitment(x: Tensor, quantized: Tensor, mask: Tensor | None) -> Tensor:
    squared = F.mse_loss(x, quantized, reduction="none")
    if mask is None:
        return squared.mean()
    weight = (mask != 0).to(squared.dtype).reshape(*mask.shape, *[1] * (squared.ndim - mask.ndim)).expand_as(squared)
    return (squared * weight).sum() / weight.sum().clamp(min=1.0)


def _training_losses(
    module: Any, x: Tensor, mask: Tensor | None, inv_temperature: float, wanted: bool, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """(entropy term of the loss, per-sample entropy, batch entropy) of x [B, N, C]."""
    if not wanted:
        return _nothing(module), _nothing(module), _nothing(module)
    rows, kept = _sample(x, mask, module.frac_per_sample_entropy)
    per_sample, batch = ops.lfq_entropy(
        rows, inv_temperature=inv_temperature, scale=module.codebook_scale, spherical=module.spherical,
        num_codebooks=module.num_codebooks, mask=kept, process_group=all_ranks(), **options,
    )  # fmt: skip
    entropy = per_sample - module.diversity_gamma * batch
    if module.experimental_softplus_entropy_loss:
        entropy = F.softplus(entropy + module.entropy_loss_offset)
    return entropy, per_sample, batch


def quantize_lfq(
    module: Any,
    x: Tensor,
    inv_temperature: float,
    return_loss_breakdown: bool,
    mask: Tensor | None,
    backend: str,
    entropy_options: dict[str, Any],
    kinds: tuple[Any, Any] = (Return, LossBreakdown),
) -> Any:
    """`LFQ.forward` for any module with upstream's attributes: our `LFQ` and a patched one of vector-quantize-pytorch."""
    _checks.check_floating("x", x)
    axis = channel_axis("x", x, module.dim, x.ndim >= 4 if module.channel_first is None else module.channel_first)
    changed = module.has_projections or module.orthogonal_rotation or module.soft_clamp_input_value is not None
    flat = changed or module.training
    rows = x
    if flat:
        rows, tokens = flatten_tokens(x, axis)
        rows = linear(module.project_in, rows)
        if module.soft_clamp_input_value is not None:
            rows = (rows / module.soft_clamp_input_value).tanh() * module.soft_clamp_input_value
        if module.orthogonal_rotation:
            rows = rotated(module, rows, module.orthogonal_rot)
    # Half precision is quantized in float32 without a copy; the losses need one.
    copied = module.force_quantization_f32 and (module.training or rows.dtype == torch.float64)
    wide = rows.float() if copied else rows
    quantized, indices = ops.lfq_quantize(
        wide.detach(), scale=module.codebook_scale, spherical=module.spherical, dim=-1 if flat else axis,
        num_codebooks=module.num_codebooks, backend=backend,
    )  # fmt: skip
    entropy = per_sample = batch = commitment = _nothing(module)
    value = quantized
    if module.training:
        if mask is not None:
            _check_mask(wide, mask)
        unquantized = _on_sphere(module, wide)
        value = module.activation(unquantized)
        value = value + (quantized - value).detach()
        wanted = return_loss_breakdown or module.entropy_loss_weight != 0
        entropy, per_sample, batch = _training_losses(module, wide, mask, inv_temperature, wanted, entropy_options)
        if module.commitment_loss_weight > 0.0:
            commitment = _commitment(unquantized, quantized, mask)
    if module.keep_num_codebooks_dim and module.num_codebooks == 1:
        indices = indices.unsqueeze(-1)
    out = value.to(rows.dtype)
    if flat:
        if module.orthogonal_rotation:
            out = rotated(module, out, module.orthogonal_rot.t())
        out = linear(module.project_out, out).reshape(*tokens, module.dim).movedim(-1, axis)
        indices = indices.reshape(*tokens, *indices.shape[2:])
    aux = entropy * module.entropy_loss_weight + commitment * module.commitment_loss_weight
    result = kinds[0](out, indices, aux)
    return (result, kinds[1](per_sample, batch, commitment)) if return_loss_breakdown else result
