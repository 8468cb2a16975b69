# SPDX-License-Identifier: Apache-2.0
"""Attention engines of other libraries behind `varlen_attention`: one predicate and one call each, and their order.

They bring their own autograd. Each is imported once, with this module, and only where torch sees a CUDA device; an
engine that is installed but cannot be imported says why in `explain`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vidkernels import _measured, dispatch
from vidkernels.triton._device import capability

HALF = (torch.bfloat16, torch.float16)
# Per compute capability (major) and head dimension (up to): engines from fast to slow on long segments. Not yet
# measured on a device: published rates (forward, bf16, H100) are FA3 640-710 TFLOP/s at D = 128, FA3
# about 500 at D = 64, torch's built-in FA2 about 230; FA3 runs D = 72 as 96, FA4 as 80 and the Triton kernel as 80.
# cuDNN (633-702 at D = 128) is served by name alone until its graphs have run on a device.
_ORDER: dict[int, Sequence[tuple[int, tuple[str, ...]]]] = {
    9: (
        (64, ("flash3", "flash4", "triton", "flash2", "torch")),
        (80, ("flash4", "triton", "flash3", "flash2", "torch")),
        (256, ("flash3", "flash4", "triton", "flash2", "torch")),
    ),
    10: ((256, ("flash4", "triton", "flash2", "torch")),),
}
_ORDER_ELSEWHERE = ("flash2", "triton", "torch")
# Up to this length engines with tiles of 128 queries compute most scores for nothing; the Triton kernel takes tiles of 64,
# and up to 32 or 16 tokens ("triton-short" says which) several segments share one.
SHORT = 128


# Lengths that `tune` measures apart: a call is filed under the first that its longest segment does not exceed.
_LENGTHS = ((512, "512"), (4096, "4096"))


def size_key(head_dim: int, longest: int, dtype: torch.dtype) -> str:
    """E.g. "head 128, to 4096 tokens, bfloat16"; "long" beyond."""
    length = next((name for limit, name in _LENGTHS if longest <= limit), "long")
    return f"head {head_dim}, to {length} tokens, {str(dtype).removeprefix('torch.')}"


def rank(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, max_q: int, max_k: int, *rest: Any) -> tuple[str, ...]:
    """Backends from fast to slow for this call: as measured on this device (`tune`), else by `_ORDER`."""
    if q.device.type != "cuda":
        return ("cpp", "triton", "triton-short", "reference")
    short = max_q <= SHORT and max_k <= SHORT
    if not short:
        measured = _measured.order("varlen_attention", q.device, size_key(operator.index(q.shape[2]), max_q, q.dtype))
        if measured is not None:
            return measured
    major = capability(q.device)[0] if torch.version.hip is None else 0
    order = next((names for limit, names in _ORDER.get(major, ()) if q.shape[2] <= limit), _ORDER_ELSEWHERE)
    return ("triton-short", "triton", *order, "reference") if short else (*order, "triton", "triton-short", "reference")


_DISTRIBUTIONS = {"cudnn": "nvidia-cudnn-frontend"}


def _load(module: str, function: str) -> tuple[Callable[..., Any] | None, str | None]:
    """The engine's function, or why there is none."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None, "no CUDA device"
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return None, f"the {_DISTRIBUTIONS.get(package, package)} package is not installed"
    try:
        return getattr(importlib.import_module(module), function), None
    except Exception as error:  # builds for another torch or another GPU raise all kinds
        return None, f"{module} cannot be imported: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


_FUNCTIONS = {
    "flash4": _load("flash_attn.cute", "flash_attn_varlen_func"),
    "flash3": _load("flash_attn_interface", "flash_attn_varlen_func"),
    "flash2": _load("flash_attn", "flash_attn_varlen_func"),
    "cudnn": _load("cudnn", "pygraph"),
    "torch": _load("torch.nn.attention.varlen", "varlen_attn"),
}
_PARAMETERS = {
    name: frozenset() if f is None or inspect.isclass(f) else frozenset(inspect.signature(f).parameters)
    for name, (f, _) in _FUNCTIONS.items()
}


def _common(name: str, q: torch.Tensor, k: torch.Tensor) -> str | None:
    """Refusals that all engines share."""
    if q.device.type != "cuda":
        return f"it runs on cuda tensors, got {q.device.type}"
    reason = _FUNCTIONS[name][1]
    if reason is not None:
        return reason
    if q.dtype not in HALF:
        return f"dtype {str(q.dtype).removeprefix('torch.')} is not one of bfloat16, float16"
    if q.shape[2] > 256 or q.shape[2] % 8:
        return f"head_dim {q.shape[2]} is not a multiple of 8 up to 256"
    if q.shape[0] == 0 or k.shape[0] == 0:
        return "there are no tokens"
    return None


def _flash4(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, max_q: int, max_k: int, causal: bool, deterministic: bool, own: bool
) -> str | None:  # fmt: skip
    reason = _common("flash4", q, k)
    if reason is None and capability(q.device)[0] < 9:
        return "it needs sm_90 or newer"
    if reason is None and capability(q.device)[0] != 9 and q.shape[2] > 128:
        return "beyond sm_90 its heads end at 128"  # some versions have 256, too, and it raises in between
    if reason is None and torch.compiler.is_compiling():
        return "torch.compile cannot trace it"
    if reason is None and deterministic and "deterministic" not in _PARAMETERS["flash4"]:
        return "this version has no deterministic backward"
    return reason


def _flash3(q: torch.Tensor, k: torch.Tensor, *facts: Any) -> str | None:
    reason = _common("flash3", q, k)
    if reason is None and capability(q.device)[0] != 9:
        return "it needs sm_90"
    if reason is None and torch.compiler.is_compiling():
        return "torch.compile cannot trace it"
    return reason


def _flash2(q: torch.Tensor, k: torch.Tensor, *facts: Any) -> str | None:
    reason = _common("flash2", q, k)
    if reason is None and capability(q.device)[0] < 8:
        return "it needs sm_80 or newer"
    return reason


def _cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, max_q: int, max_k: int, causal: bool, deterministic: bool, own: bool
) -> str | None:  # fmt: skip
    reason = _common("cudnn", q, k)
    if reason is None and capability(q.device)[0] < 8:
        return "it needs sm_80 or newer"
    if reason is None and torch.compiler.is_compiling():
        return "torch.compile cannot trace it"
    if reason is None and any(x.stride(axis) % 8 for x in (q, k, v) for axis in (0, 1)):
        return "token or head strides are not multiples of 8"
    return reason


def _torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, max_q: int, max_k: int, causal: bool, deterministic: bool, own: bool
) -> str | None:  # fmt: skip
    reason = _common("torch", q, k)
    if reason is None and capability(q.device)[0] < 8:
        return "it needs sm_80 or newer"
    if reason is None and deterministic and not torch.are_deterministic_algorithms_enabled():
        return "its backward is deterministic only under torch.use_deterministic_algorithms(True)"
    if reason is None and "scale" not in _PARAMETERS["torch"]:
        return "varlen_attn of this torch takes no scale"
    if reason is None and q.shape[1] != k.shape[1] and "enable_gqa" not in _PARAMETERS["torch"]:
        return "varlen_attn of this torch takes no grouped heads"
    return reason


def _call_flash(name: str) -> Callable[..., torch.Tensor]:
    def call(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        max_q: int,
        max_k: int,
        causal: bool,
        deterministic: bool,
        own: bool,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        wanted = {
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k,
            "max_seqlen_q": max_q,
            "max_seqlen_k": max_k,
            "softmax_scale": scale,
            "causal": causal,
            "deterministic": deterministic,
        }
        function, parameters = _FUNCTIONS[name][0], _PARAMETERS[name]
        assert function is not None
        # Versions differ: early FA4 takes no lengths, and FA3 and FA4 return (out, lse) or out.
        result = function(q, k, v, **{key: value for key, value in wanted.items() if key in parameters})
        return result[0] if isinstance(result, tuple) else result

    return call


def _call_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    deterministic: bool,
    own: bool,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    options: dict[str, Any] = {"scale": scale}
    # torch 2.10 has is_causal; later versions express it as a window.
    if causal:
        options.update({"is_causal": True} if "is_causal" in _PARAMETERS["torch"] else {"window_size": (-1, 0)})
    if "enable_gqa" in _PARAMETERS["torch"]:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    function = _FUNCTIONS["torch"][0]
    assert function is not None
    return function(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, **options)


def _call_cudnn(*call: Any) -> torch.Tensor:
    from vidkernels.ops import _attention_cudnn

    return _attention_cudnn.attend(*call)


PREDICATES: dict[str, dispatch.Predicate] = {
    "flash4": _flash4,
    "flash3": _flash3,
    "flash2": _flash2,
    "cudnn": _cudnn,
    "torch": _torch,
}
CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "flash4": _call_flash("flash4"),
    "flash3": _call_flash("flash3"),
    "flash2": _call_flash("flash2"),
    "cudnn": _call_cudnn,
    "torch": _call_torch,
}
