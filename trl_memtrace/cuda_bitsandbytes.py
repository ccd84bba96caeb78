"""bitsandbytes' int8 operators as its CUDA backend carries them out: of which tensors, in which order.

Sources: bitsandbytes/backends/cuda/ops.py and, where CUDA has nothing of its own, backends/default/ops.py. How many
columns hold outliers follows from values; there are few where there are any, and here there are none.
"""

from __future__ import annotations

from typing import Any

import torch


def int8_vectorwise_quant(
    a: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rows in int8 and a scale for each; outliers are looked for in a copy."""
    scales = torch.empty(a.numel() // a.shape[-1], dtype=torch.float32, device=a.device)
    rows = torch.empty(a.shape, dtype=torch.int8, device=a.device)
    if threshold == 0.0:
        return rows, scales, None
    outliers = a.abs() >= threshold
    outliers.any(dim=0)
    return rows, scales, torch.empty(0, dtype=torch.int64, device=a.device)


def int8_mixed_scaled_mm(
    a: torch.Tensor, ca: Any, cb: Any, sca: Any, scb: Any, outlier_cols: Any = None, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product, and what was taken out of it in ``a``'s own dtype: nothing."""
    outliers = torch.empty(0, dtype=a.dtype, device=a.device)
    return int8_scaled_mm(ca, cb, sca, scb, bias, a.dtype), outliers


def int8_scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    row_stats: Any,
    col_stats: Any,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A product in int32, and that scaled to float16."""
    product = torch.empty((*a.shape[:-1], b.shape[0]), dtype=torch.int32, device=a.device)
    return int8_mm_dequant(product, row_stats, col_stats, dtype, bias)


def int8_mm_dequant(
    a: torch.Tensor,
    row_stats: Any,
    col_stats: Any,
    dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel gives float16; other dtypes are a copy."""
    return torch.empty_like(a, dtype=torch.float16).to(dtype or torch.float16)


OPERATORS = {
    function.__name__: function
    for function in (int8_vectorwise_quant, int8_mixed_scaled_mm, int8_scaled_mm, int8_mm_dequant)
}
