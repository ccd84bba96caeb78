"""Autocast as CUDA does it: more operators than on a CPU get float32.

Fake tensors are CPU tensors, so autocast to the CPU is what they go through. What CUDA's lists have beyond it is put
there, by PyTorch's own registry of kernels. The tables are those of aten/src/ATen/autocast_mode.h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map

_KEY = "AutocastCPU"
_THEIRS = "AutocastCUDA"

FLOAT32 = (
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt"),
    *("sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm"),
    *("native_layer_norm", "rms_norm", "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim"),
    *("cosine_similarity", "dist", "pdist", "renorm", "logsumexp"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d"),
    *("upsample_trilinear3d", "upsample_bicubic2d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d"),
    *("_upsample_nearest_exact3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)
"""AT_FORALL_FP32: arguments are made float32. Losses are not here, nor is anything that the CPU's list has too."""

FLOAT32_OUT = (
    *("softmax.int", "log_softmax.int", "cumprod", "cumsum", "sum", "sum.dim_IntList"),
    *("linalg_vector_norm", "linalg_matrix_norm", "linalg_matrix_norm.str_ord"),
)
"""AT_FORALL_FP32_SET_OPT_DTYPE: the result is made in float32 unless another dtype is asked for."""


@contextmanager
def casting_as_cuda() -> Iterator[None]:
    """While it lasts, autocast to the CPU does to every operator what autocast to CUDA does to it in this PyTorch."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for names, kernel in ((FLOAT32, _taking_float32), (FLOAT32_OUT, _giving_float32)):
            for name in names:
                if has_kernel(name, _THEIRS) and not has_kernel(name, _KEY):
                    library.impl(name, kernel(_operator(name)), _KEY)
        yield


def has_kernel(name: str, key: str) -> bool:
    """Whether an operator of ATen has a kernel of its own under a dispatch key."""
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key))
    except RuntimeError:  # this PyTorch has no such operator
        return False


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _without_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY)))


def _is_eligible(value: Any) -> bool:
    """``is_eligible`` of autocast_mode.h."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype is not torch.float64


def in_float32(value: Any) -> Any:
    """What an operator of that list gets in place of an argument."""
    return value.to(torch.float32) if _is_eligible(value) else value


def _taking_float32(operator: Any) -> Callable[..., Any]:
    """``CastPolicy::fp32``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            return operator(*tree_map(in_float32, args), **tree_map(in_float32, kwargs))

    return call


def _giving_float32(operator: Any) -> Callable[..., Any]:
    """``CastPolicy::fp32_set_opt_dtype``."""
    place = [argument.name for argument in operator._schema.arguments].index("dtype")

    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_eligible(args[0]) and kwargs.get("dtype") is None and (len(args) <= place or args[place] is None):
            args, kwargs = args[:place], {**kwargs, "dtype": torch.float32}
        with _without_autocast():
            return operator(*args, **kwargs)

    return call
