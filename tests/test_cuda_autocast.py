"""CUDA's autocast lists, held against PyTorch's own header and its registry, and by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from trl_memtrace.cuda_autocast import FLOAT32, FLOAT32_OUT, has_kernel
from trl_memtrace.dryrun import dry_run

HEADER = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"


def _macro(name: str) -> set[str]:
    """The operators that a macro of the header lists, such as ``pow.Tensor_Scalar``."""
    body = re.search(rf"#define {name}\(_\)(.*?)\n\n", HEADER.read_text(), re.S)
    assert body is not None
    return {".".join(re.split(r",\s*", entry)) for entry in re.findall(r"_\((\w+(?:,\s*\w+)?)\)", body[1])}


def test_the_tables_are_pytorchs_own() -> None:
    """But for what the CPU's list has too, which needs no help."""
    for macro, table in (("AT_FORALL_FP32", FLOAT32), ("AT_FORALL_FP32_SET_OPT_DTYPE", FLOAT32_OUT)):
        listed = _macro(macro)
        assert len(listed) > 10
        assert {name for name in listed if not has_kernel(name, "AutocastCPU")} == set(table)


def test_what_cuda_casts_and_the_cpu_does_not_is_known() -> None:
    """Every operator that PyTorch's registry knows under CUDA's key alone is in a table, or is one that gets half
    precision or the widest dtype."""
    names = [name.removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names() if name[:6] == "aten::"]
    cuda = {name for name in names if has_kernel(name, "AutocastCUDA") and not has_kernel(name, "AutocastCPU")}
    others = {name.replace(".input", "") for name in _macro("AT_FORALL_LOWER_PRECISION_FP")}
    others |= _macro("AT_FORALL_PROMOTE") | {"norm.Scalar", "norm.ScalarOpt_dim"}
    others |= {"_convolution", "cudnn_convolution", "cudnn_convolution_transpose"}
    assert cuda - others == {*FLOAT32, *FLOAT32_OUT}


OPERATORS: dict[str, Any] = {
    "pow": lambda x: x.pow(3),
    "layer_norm": lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]),
    "softmax": lambda x: torch.nn.functional.softmax(x, dim=-1),
    "softplus": torch.nn.functional.softplus,
    "sum": lambda x: x.sum(-1),
    "cumsum": lambda x: x.cumsum(0),
    "exp": torch.exp,
    "rms_norm": lambda x: torch.nn.functional.rms_norm(x, x.shape[-1:], x[0]),
}
if not has_kernel("rms_norm", "AutocastCUDA"):
    del OPERATORS["rms_norm"]  # of an older PyTorch


@pytest.mark.parametrize("name", OPERATORS)
def test_it_is_done_in_float32_as_on_cuda(name: str) -> None:
    with dry_run():
        given = torch.empty(4, 8, dtype=torch.bfloat16)
        with torch.autocast("cuda", torch.bfloat16):
            assert OPERATORS[name](given).dtype is torch.float32
            assert OPERATORS[name](given.double()).dtype is torch.float64
        assert OPERATORS[name](given).dtype is torch.bfloat16
    with dry_run(semantics="cpu"), torch.autocast("cpu", torch.bfloat16):
        assert OPERATORS[name](torch.empty(4, 8, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_a_dtype_that_is_asked_for_is_given() -> None:
    with dry_run(), torch.autocast("cuda", torch.bfloat16):
        given = torch.empty(4, 8, dtype=torch.bfloat16)
        assert torch.softmax(given, -1, dtype=torch.bfloat16).dtype is torch.bfloat16
        assert given.sum(dtype=torch.float64).dtype is torch.float64
        assert torch.ones(3, dtype=torch.int64).sum().dtype is torch.int64


def test_the_copy_in_float32_is_kept_for_the_backward() -> None:
    count = 1 << 16
    for semantics, expected in (("cuda", 4 * count + 4 * count), ("cpu", 2 * count)):
        with dry_run(semantics=semantics) as dry:
            given = torch.empty(count, dtype=torch.bfloat16, requires_grad=True)
            before = dry.memory.level
            with torch.autocast("cuda", torch.bfloat16):
                result = given.pow(3)
            assert dry.memory.level - before == expected, semantics
            result.sum().backward()
            assert given.grad is not None
            assert given.grad.dtype is torch.bfloat16


def test_nothing_of_it_stays() -> None:
    with pytest.raises(ZeroDivisionError), dry_run():
        assert has_kernel("pow.Tensor_Scalar", "AutocastCPU")
        raise ZeroDivisionError
    assert not any(has_kernel(name, "AutocastCPU") for name in FLOAT32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.ones(3, dtype=torch.bfloat16).pow(3).dtype is torch.bfloat16
