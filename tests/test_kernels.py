"""CUDA's kernels in a dry run: every way that the documents list has a case, and small ones are counted by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kernel_cases
import pytest
import torch

from trl_memtrace.dryrun import dry_run

DOCS = Path(__file__).parents[1] / "docs" / "dry-run.md"
CARDS = ("Tesla T4", "NVIDIA A100 80GB PCIe", "NVIDIA H100 80GB HBM3")
KIB = 1 << 10
MIB = 1 << 20
NAMES = [(way, name) for way, cases in kernel_cases.CASES.items() for name in cases]


def test_every_way_has_a_case_that_is_checked_on_a_card() -> None:
    table = DOCS.read_text().split("## CUDA's ways")[1].split("\n## ")[0]
    ways = re.findall(r"^\| (.+?) \|", table, re.M)[1:]
    assert [way for way in ways if way != "---"] == list(kernel_cases.CASES)


@pytest.mark.parametrize("device", CARDS)
@pytest.mark.parametrize(("way", "name"), NAMES)
def test_a_case_is_the_same_each_time(way: str, name: str, device: str) -> None:
    case = kernel_cases.CASES[way][name]
    peak, end = kernel_cases.predicted(case, device)
    assert peak > 0
    assert peak >= end >= 0
    assert kernel_cases.predicted(case, device) == (peak, end)


BY_HAND = {
    "softmax": (8 * MIB, 8 * MIB),  # 8 x 512 x 512 in float32, and no copy of the scores
    "softmax's backward": (24 * MIB, 8 * MIB),  # the result, its gradient, grad * output; the last gradient has gone
    "attention without a mask": (1280 * KIB + 2 * 8 * 640 * 4 + 512 * 2, 1280 * KIB),  # and a sum for each row
    "rms_norm": (4 * MIB + 4 * KIB, 2 * MIB),  # result, its gradient, x's and, of both, not the last; a root a row
    "AdamW": (4 * MIB, 0),  # as large as all parameters together
    "products": (1 * MIB, 512 * KIB),
    # int8 rows, their scales, the product in int32 and in float16; the last gradient has gone
    "8 bit": (64 * KIB + 4 * KIB + 160 * KIB * 6 - 128 * KIB, 320 * KIB),
}


@pytest.mark.parametrize(("way", "name"), [(way, name) for way, name in NAMES if name in BY_HAND])
def test_a_case_is_what_is_counted_by_hand(way: str, name: str) -> None:
    assert kernel_cases.predicted(kernel_cases.CASES[way][name], "NVIDIA A100 80GB PCIe") == BY_HAND[name]


def test_a_norm_in_one_kernel_keeps_its_input_and_a_root_for_each_row() -> None:
    for dtype, expected in ((torch.bfloat16, 1024 * 1024 * 2 + 1024 * 4), (torch.float32, 1024 * 1024 * 4 + 1024 * 4)):
        with dry_run() as dry:
            given = torch.empty(1024, 1024, dtype=dtype, requires_grad=True)
            weight = torch.empty(1024, dtype=dtype, requires_grad=True)
            before = dry.memory.level
            result = torch.nn.functional.rms_norm(given, (1024,), weight)
            assert dry.memory.level - before == expected
            result.sum().backward()
            assert given.grad is not None
            assert weight.grad is not None
            assert (given.grad.dtype, weight.grad.shape) == (dtype, weight.shape)


def test_functions_take_their_first_argument_by_name() -> None:
    function: Any = torch.nn.functional
    with dry_run():
        x = torch.empty(2, 2, 8, 4, dtype=torch.float16)
        assert function.softmax(input=x, dim=-1, dtype=torch.float32).dtype is torch.float32
        assert function.log_softmax(input=x, dim=-1, dtype=torch.float32).dtype is torch.float32
        assert function.dropout(input=x, p=0.1).shape == x.shape
        assert function.rms_norm(input=x, normalized_shape=(4,)).shape == x.shape
        assert function.scaled_dot_product_attention(query=x, key=x, value=x).shape == x.shape
        assert function.scaled_dot_product_attention(x, key=x, value=x).shape == x.shape


def test_a_norm_whose_weight_has_another_dtype_is_done_in_parts() -> None:
    with dry_run() as dry:
        given = torch.empty(1024, 1024, dtype=torch.bfloat16, requires_grad=True)
        before = dry.memory.level
        result = torch.nn.functional.rms_norm(given, (1024,), torch.empty(1024))
        assert dry.memory.level - before > 2 * result.numel() * result.itemsize
