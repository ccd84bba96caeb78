"""Operators on fake tensors: what is remembered of them is what PyTorch gives real tensors, each time it is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trl_memtrace.dryrun import dry_run

Operator = Callable[[torch.Tensor], Any]

OPERATORS: dict[str, Operator] = {
    "new": lambda x: x * 2,
    "new, of an integer and a fraction": lambda x: x.long() * 0.5,
    "new, strided": lambda x: torch.empty_like(x.t()),
    "factory": lambda x: torch.zeros(3, dtype=torch.float16),
    "view": lambda x: x.view(2, -1),
    "view of a part": lambda x: x[1:, 2:],
    "view of a view": lambda x: x[1:].t()[2:],
    "views of two places": lambda x: (x[:2].t(), x[2:].t()),
    "view of parts": lambda x: x.split(2),
    "view of all parts": lambda x: x.unbind(),
    "expanded": lambda x: x[None].expand(3, -1, -1),
    "unsafe view": lambda x: torch.ops.aten._unsafe_view(x, (24,)),
    "detached": lambda x: x.detach(),
    "in place": lambda x: x.add_(1),
    "in place, of a view": lambda x: x[1].zero_(),
    "in place, another shape": lambda x: x.unsqueeze_(0),
    "in place, another storage": lambda x: (new := torch.empty(4, 6), x.set_(new))[:1],
    "into a result": lambda x: torch.mul(x, 2, out=torch.empty(4, 6)),
    "several": lambda x: x.topk(2),
    "in parts": lambda x: torch._foreach_mul([x, x[1:]], 2),
    "complex": lambda x: torch.view_as_complex(x.view(4, 3, 2)).conj().imag,
}


def _tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _is_on(result: torch.Tensor, argument: torch.Tensor) -> bool:
    """Whether two tensors share a storage."""
    return result.untyped_storage()._cdata == argument.untyped_storage()._cdata


def _seen(operator: Operator) -> list[Any]:
    argument = torch.empty(4, 6)
    results = _tensors(operator(argument))
    return [
        (
            result.shape,
            result.stride(),
            result.storage_offset(),
            result.dtype,
            result is argument,
            _is_on(result, argument),
            result.is_conj() or result.is_neg(),
        )
        for result in [*results, argument]
    ]


@pytest.mark.parametrize("name", OPERATORS)
def test_an_answer_is_right_each_time(name: str) -> None:
    expected = _seen(OPERATORS[name])
    with dry_run(semantics="cpu"):
        assert [_seen(OPERATORS[name]) for _ in range(3)] == [expected] * 3


def test_what_is_remembered_depends_on_the_default_dtype() -> None:
    def half() -> torch.dtype:
        return (torch.ones(3, dtype=torch.int64) * 0.5).dtype

    with dry_run(semantics="cpu"):
        assert half() is torch.float32
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert half() is torch.bfloat16
        finally:
            torch.set_default_dtype(torch.float32)
        assert half() is torch.float32


def test_values_that_are_known_stay_so() -> None:
    """An answer remembered of a tensor whose values are not known is not given for one whose values are."""
    with dry_run(semantics="cpu") as dry:
        for _ in range(2):
            assert bool((torch.empty(3) > 2).all())  # a flag is set
        known = dry.to_device(torch.tensor([1.0, 2.0, 3.0]))
        assert not bool((known > 2).all())
        known.mul_(torch.empty(3))
        assert bool((known > 2).all())


def test_a_gradient_that_another_is_added_to_is_not_known() -> None:
    class Ones(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return torch.tensor([1.0, 1.0, 1.0])

    with dry_run():
        given: Any = torch.empty(3).requires_grad_()
        between = given * 1.0
        ((between * torch.empty(3)).sum() + Ones.apply(between)).backward()  # type: ignore[no-untyped-call]
        assert given.grad.constant is None
