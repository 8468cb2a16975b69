# SPDX-License-Identifier: Apache-2.0
"""adaLN-Zero as modules: the frame of a transformer block, the final layer, and the projections of many blocks at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels._hooks import is_globally_unhooked, is_plain_linear
from vidkernels._tracing import active_transform
from vidkernels.errors import DTypeError, ShapeError
from vidkernels.ops._autograd import first_order
from vidkernels.ops._checks import (
    check_callable,
    check_flag,
    check_option,
    check_projected,
    check_same_device,
    check_same_dtype,
    check_sizes,
)

NORMS = ("layer", "rms")
Branch = Callable[[Tensor], Tensor]


class Modulation(NamedTuple):
    """The six rows of a block, each `[..., C]`, in the order of the projection's output."""

    shift_attention: Tensor
    scale_attention: Tensor
    gate_attention: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


class AdaLNZero(nn.Module):
    """The frame of an adaLN-Zero block around any attention and any MLP.

    x = x + gate_a * attention(norm(x) * (1 + scale_a) + shift_a)
    x = x + gate_m * mlp(norm(x) * (1 + scale_m) + shift_m)

    with the six rows from `linear(silu(condition))`. Source: DiT (Peebles and Xie, arXiv:2212.09748). Three launches
    besides attention and MLP: `adaln_modulate`, `adaln_zero` between the two, `gate_residual`. The projection starts at
    zero, so the block starts as the identity.

    Args:
        dim: width C of the tokens.
        condition_dim: width of the condition; default `dim`.
        norm: "layer" or "rms".
        eps: of the norm.
        affine: whether each norm has its own weight (and bias, for "layer").
        backend: as for the ops.
    """

    weight_attention: nn.Parameter | None
    bias_attention: nn.Parameter | None
    weight_mlp: nn.Parameter | None
    bias_mlp: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        condition_dim: int | None = None,
        *,
        norm: str = "layer",
        eps: float = 1e-6,
        affine: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_option("norm", norm, NORMS)
        check_sizes(dim=dim, **({} if condition_dim is None else {"condition_dim": condition_dim}))
        check_flag("affine", affine)
        self.condition_dim = dim if condition_dim is None else condition_dim
        self.dim, self.norm, self.eps, self.backend = dim, norm, eps, backend
        self.linear = nn.Linear(self.condition_dim, 6 * dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        for name in ("attention", "mlp"):
            self.register_parameter(f"weight_{name}", nn.Parameter(torch.ones(dim)) if affine else None)
            bias = nn.Parameter(torch.zeros(dim)) if affine and norm == "layer" else None
            self.register_parameter(f"bias_{name}", bias)

    def modulation(self, condition: Tensor) -> Modulation:
        """The six rows for a condition `[B, D]`, `[B, groups, D]` or, packed, `[segments, D]`."""
        check_projected("condition", condition, self.condition_dim, self.linear)
        return Modulation(*self.linear(F.silu(condition)).chunk(6, dim=-1))

    def forward(
        self,
        x: Tensor,
        condition: Tensor | Modulation,
        attention: Branch,
        mlp: Branch,
        *,
        cu_seqlens: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The block's output, of x's shape.

        Args:
            x: `[B, ..., C]`, or packed `[total, C]`.
            condition: input of the projection, or rows that were projected before (`BatchedProjection`).
            attention, mlp: map modulated tokens to a branch of the same shape.
            cu_seqlens, rows: which row a token takes, as in `ops.adaln_modulate`.
        """
        check_callable("attention", attention, "a function of tokens")
        check_callable("mlp", mlp, "a function of tokens")
        m = condition if isinstance(condition, Modulation) else self.modulation(condition)
        options: dict[str, Any] = {
            "norm": self.norm, "eps": self.eps, "backend": self.backend, "cu_seqlens": cu_seqlens, "rows": rows,
        }  # fmt: skip
        first = ops.adaln_modulate(
            x, m.shift_attention, m.scale_attention, weight=self.weight_attention, bias=self.bias_attention, **options
        )
        x, second = ops.adaln_zero(
            *(x, attention(first), m.gate_attention, m.shift_mlp, m.scale_mlp),
            weight=self.weight_mlp,
            bias=self.bias_mlp,
            **options,
        )
        return ops.gate_residual(x, mlp(second), m.gate_mlp, cu_seqlens=cu_seqlens, rows=rows, backend=self.backend)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"{self.dim}, norm={self.norm!r}, eps={self.eps}"


class AdaLNFinal(nn.Module):
    """The last layer of a DiT: `linear(norm(x) * (1 + scale) + shift)`, rows from `modulation(silu(condition))`.

    Both projections start at zero, so the model starts by predicting zero.

    Args:
        dim: width C of the tokens.
        out_features: width of the output.
        condition_dim: width of the condition; default `dim`.
        norm, eps, backend: as for `AdaLNZero`.
    """

    def __init__(
        self,
        dim: int,
        out_features: int,
        condition_dim: int | None = None,
        *,
        norm: str = "layer",
        eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_option("norm", norm, NORMS)
        sizes = {} if condition_dim is None else {"condition_dim": condition_dim}
        check_sizes(dim=dim, out_features=out_features, **sizes)
        self.condition_dim = dim if condition_dim is None else condition_dim
        self.norm, self.eps, self.backend = norm, eps, backend
        self.modulation = nn.Linear(self.condition_dim, 2 * dim)
        self.linear = nn.Linear(dim, out_features)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, x: Tensor, condition: Tensor, *, cu_seqlens: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """`[..., out_features]` for x `[B, ..., C]` or packed `[total, C]`."""
        check_projected("condition", condition, self.condition_dim, self.modulation)
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=-1)
        modulated = ops.adaln_modulate(
            x, shift, scale, norm=self.norm, eps=self.eps, cu_seqlens=cu_seqlens, rows=rows, backend=self.backend
        )
        return self.linear(modulated)


class _Stacked(torch.autograd.Function):
    """One product with the stacked weights; gradients go to the weights they are stacked from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: _Stack, *parameters: Tensor) -> Tensor:
        count = len(parameters) // 2
        ctx.save_for_backward(x, stack.weight)
        ctx.rows = [weight.shape[0] for weight in parameters[:count]]
        ctx.weights = parameters[:count]
        ctx.versions = [weight._version for weight in ctx.weights]
        return F.linear(x, stack.weight, stack.bias)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # The stack has no version counter in common with the parameters that are its parts.
        if [part._version for part in ctx.weights] != ctx.versions:
            raise RuntimeError("a weight of a BatchedProjection was changed in place between its forward and backward")
        flat = dy.reshape(-1, dy.shape[-1])
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        need = ctx.needs_input_grad[2:]
        count = len(ctx.rows)
        dweight = (flat.t() @ x.reshape(-1, x.shape[-1])).split(ctx.rows) if any(need[:count]) else [None] * count
        dbias = flat.sum(0).split(ctx.rows) if any(need[count:]) else [None] * count
        grads = [grad if wanted else None for grad, wanted in zip((*dweight, *dbias), need, strict=True)]
        return dx, None, *grads


class _Stack(NamedTuple):
    weight: Tensor
    bias: Tensor


class BatchedProjection:
    """The modulation projections of many blocks in one product: `linear_i(silu(condition))` for all i.

    The weights move into one storage and every `linear.weight` becomes a view of its part: same parameters, same
    `state_dict`, no second copy, and optimizers, checkpoints and LoRA's own layers see what they saw before. If the weights
    have left that storage (`.to()`, `load_state_dict(assign=True)`, sharding, a deep copy), or if layers carry hooks or are
    not plain `nn.Linear`, a call runs each layer by itself. `packed` says which of the two it is; `pack()` stacks them again.

    It is not a module and owns no parameters: hold it in a plain container or a closure, not as an attribute of the model.

    Args:
        linears: layers of one input width, dtype and device, all with a bias.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        if not isinstance(linears, Iterable):
            raise DTypeError("linears", "a sequence of layers", type(linears).__name__, "Pass a list.")
        self.linears = tuple(linears)
        if not self.linears:
            raise ShapeError("linears", "at least one layer", 0, "Pass the projections of the model's blocks.")
        width = getattr(self.linears[0], "in_features", None)
        for i, linear in enumerate(self.linears):
            if not isinstance(linear, nn.Linear):
                raise DTypeError(f"linears[{i}]", "an nn.Linear", type(linear).__name__)
            check_same_dtype(f"linears[{i}].weight", linear.weight, "linears[0].weight", self.linears[0].weight)
            check_same_device(f"linears[{i}].weight", linear.weight, "linears[0].weight", self.linears[0].weight)
            if linear.in_features != width or linear.bias is None:
                got = f"{linear.in_features} inputs, bias={linear.bias is not None}"
                raise ShapeError(f"linears[{i}]", f"{width} inputs and a bias", got, "Batch layers of one kind.")
        self._stack: _Stack | None = None
        self.pack()

    @torch.no_grad()
    def pack(self) -> None:
        """Move the weights into one storage. Values, identities and names of the parameters stay."""
        weight = torch.cat([linear.weight for linear in self.linears])
        bias = torch.cat([linear.bias for linear in self.linears])
        rows = [linear.out_features for linear in self.linears]
        for linear, w, b in zip(self.linears, weight.split(rows), bias.split(rows), strict=True):
            linear.weight.data, linear.bias.data = w, b
        self._stack = _Stack(weight, bias)

    @property
    def packed(self) -> bool:
        """Whether the weights still lie in the common storage, in order."""
        if self._stack is None:
            return False
        for stacked, name in ((self._stack.weight, "weight"), (self._stack.bias, "bias")):
            address = stacked.data_ptr()
            for linear in self.linears:
                part = getattr(linear, name)
                same = type(part) is nn.Parameter and part.dtype == stacked.dtype and part.device == stacked.device
                if not same or part.data_ptr() != address or not part.is_contiguous():
                    return False
                address += part.numel() * part.element_size()
        return True

    def _plain(self) -> bool:
        """Whether no layer has to be called: nothing but the products would happen, and nobody looks into them."""
        return (
            active_transform() is None
            and is_globally_unhooked()
            and all(is_plain_linear(linear) for linear in self.linears)
        )

    def __call__(self, condition: Tensor) -> tuple[Tensor, ...]:
        """One `[..., out_features]` per layer."""
        check_projected("condition", condition, self.linears[0].in_features, self.linears[0])
        x = F.silu(condition)
        if not (self._plain() and self.packed) or torch.is_autocast_enabled(x.device.type):
            return tuple(linear(x) for linear in self.linears)
        assert self._stack is not None
        parameters = [linear.weight for linear in self.linears] + [linear.bias for linear in self.linears]
        y = _Stacked.apply(x, self._stack, *parameters)
        return y.split([linear.out_features for linear in self.linears], dim=-1)
