"""Operators on fake tensors: what is remembered of them is what PyTorch gives real tensors, each time it is asked."""

from __future__ import annotations

import copy
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


def test_a_mask_of_ones_is_known() -> None:
    """As PEFT makes it for virtual tokens, beside one with a hole."""
    with dry_run(semantics="cpu") as dry:
        padded = dry.to_device(torch.tensor([[1, 1, 1], [1, 1, 0]]))
        assert not bool(torch.cat((torch.ones(2, 4), padded), dim=1).bool().all())
        assert torch.ones(2, dtype=torch.int64).sum().item() == 2
        assert torch.ones(2, dtype=torch.int64).neg().min().item() == -1
        assert torch.ones(1 << 23, dtype=torch.int64).sum().item() == 1  # too many to be known: a number is one


def _changed(values: torch.Tensor) -> bool:
    """Whether a dry run knows no more that these are ones."""
    return getattr(values, "constant", None) is None


def test_what_is_written_to_is_not_known() -> None:
    with dry_run(semantics="cpu"):
        made, several = torch.ones(3), [torch.ones(3), torch.ones(3)]
        assert not _changed(made)
        made.add_(torch.empty(3))
        torch._foreach_add_(several, [torch.empty(3), torch.empty(3)])
        parts = [torch.ones(2), torch.ones(2)]
        torch.split_copy(torch.empty(4), 2, out=parts)
        assert all(map(_changed, [made, *several, *parts]))


def test_what_is_overwritten_by_real_values_is_not_known() -> None:
    real = torch.full((3,), 7.0)
    with dry_run(semantics="cpu"):
        several = [torch.ones(3)]
        torch._foreach_copy_(several, [real])
        assert _changed(several[0])


def test_a_batch_that_is_written_to_is_not_known() -> None:
    with dry_run() as dry:
        batch: Any = dry.to_device(torch.tensor([[1, 1, 0]]))
        assert batch.sum().item() == 2
        batch[:, 1:].copy_(torch.empty(1, 2))
        assert _changed(batch)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_what_is_trained_is_not_known(optimizer: Any) -> None:
    with dry_run():
        weight = torch.nn.Parameter(torch.ones(3))
        stepper = optimizer([weight], lr=0.1)
        (weight * torch.empty(3)).sum().backward()
        stepper.step()
        assert _changed(weight)


def test_steps_that_are_counted_stay_known() -> None:
    with dry_run():
        steps = [torch.tensor(0.0), torch.tensor(0.0)]
        torch._foreach_add_(steps, 1)
        torch._foreach_add_(steps, 1)
        assert [step.item() for step in steps] == [2.0, 2.0]


def test_a_gradient_that_is_added_to_is_not_known() -> None:
    class Ones(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.shape = x.shape
            return x.sum()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return torch.ones(ctx.shape)

    with dry_run():
        given = torch.empty(3).requires_grad_()
        between = given * 1.0
        total: Any = (between * torch.empty(3)).sum() + Ones.apply(between)  # type: ignore[no-untyped-call]
        total.backward()
        assert given.grad is not None
        assert _changed(given.grad)


def test_new_data_is_not_known() -> None:
    with dry_run():
        linear = torch.nn.Linear(2, 2)
        linear.bias = torch.nn.Parameter(torch.ones(2))
        linear.bfloat16()
        assert torch.zeros_like(linear.bias).dtype is torch.bfloat16
        linear.bias.data = torch.ones(2)
        assert _changed(linear.bias)


def test_what_is_known_can_be_copied() -> None:
    with dry_run():
        for made in (torch.ones(3), torch.nn.Parameter(torch.ones(3)), torch.tensor([0, 1]), torch.arange(4)):
            copied = copy.deepcopy(made)
            assert (copied.shape, copied.dtype, type(copied)) == (made.shape, made.dtype, type(made))
            assert copied.requires_grad is made.requires_grad
            assert isinstance(made, torch.nn.Parameter) is isinstance(copied, torch.nn.Parameter)


def test_a_fake_tensor_is_an_array_of_what_is_known_or_of_ones() -> None:
    with dry_run():
        assert torch.tensor([2, 3]).numpy().tolist() == [2, 3]
        assert torch.empty(2, dtype=torch.float16).numpy().tolist() == [1.0, 1.0]


def test_no_gradient_overflows() -> None:
    """As ``GradScaler`` asks in a loop of one's own."""
    with dry_run(semantics="cpu"):
        weight = torch.nn.Parameter(torch.empty(3))
        optimizer = torch.optim.AdamW([weight])
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
        assert len(optimizer.state) == 1


def test_a_copy_shares_the_mode_that_it_is_made_in() -> None:
    """PyTorch would copy that too, with weak references to storages, of which each is then freed twice."""
    with dry_run() as dry:
        linear = torch.nn.Linear(2, 2)
        assert getattr(copy.deepcopy(linear).weight, "fake_mode", None) is dry.fake_mode
    assert getattr(copy.deepcopy(linear).weight, "fake_mode", None) is dry.fake_mode


def test_no_value_is_infinite_or_none_unless_it_is_known_to_be() -> None:
    with dry_run(semantics="cpu") as dry:
        for _ in range(2):
            unknown = torch.empty(3)
            assert not bool(unknown.isinf().any() | unknown.isnan().any())
            assert bool(unknown.isfinite().all())
        known = dry.to_device(torch.tensor([1.0, float("inf"), float("nan")]))
        assert known.isinf().sum().item() == known.isnan().sum().item() == 1
