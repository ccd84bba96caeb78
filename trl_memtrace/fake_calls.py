"""Operators carried out on fake tensors: what comes of them, and answers to questions about values not there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, NamedTuple, cast

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves

aten: Any = torch.ops.aten
_FAKE_KEY = torch._C._TorchDispatchModeKey.FAKE
_CPU = torch.device("cpu")
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout)


class Calls:
    """Calls operators on the tensors of one fake mode.

    What comes of an operator depends on shapes, strides and dtypes alone, and a training step asks for the same thing
    once a layer. So the answer is remembered, which spares most of the fake mode's work; it has a memory of its own,
    whose questions cost more than ours.
    """

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self._fake_mode: Any = fake_mode
        self._known: dict[Any, Any] = {}
        self._repeatable: dict[Any, bool] = {}
        self._attributes = dict(vars(FakeTensor(fake_mode, torch.empty(0, device="meta"), _CPU)))

    def __call__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator; what depends on values gets an answer all the same."""
        key = self._key(func, args, kwargs)
        known = self._known.get(key) if key is not None else None
        # Straight to the fake mode beneath, which is a third of the way that the dispatcher takes to it.
        fake_mode: Any = torch._C._unset_dispatch_mode(_FAKE_KEY)
        try:
            if fake_mode is None:
                return func(*args, **kwargs)
            if known is not None:
                return self._make(known, args)
            result = _carry_out(fake_mode, func, types, args, kwargs)
            # Where an argument has another shape than before, that is what the operator is for.
            if key is not None and key == self._key(func, args, kwargs):
                self._known[key] = _description(result, args, kwargs)
            return result
        except (DataDependentOutputException, DynamicOutputShapeException):
            with fake_mode:
                return _without_false_values(_stand_in(func, args, kwargs), args)
        finally:
            if fake_mode is not None:
                torch._C._set_dispatch_mode(fake_mode)

    def _key(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the result depends on; None where it is not to be remembered."""
        repeatable = self._repeatable.get(func)
        if repeatable is None:
            repeatable = self._repeatable[func] = _is_repeatable(func)
        if not repeatable:
            return None
        parts: list[Any] = [func, torch.get_default_dtype()]
        seen = 0
        for value in args:
            seen |= _add(parts, value)
        for name, value in kwargs.items():
            parts.append(name)
            seen |= _add(parts, value)
        # Of known values alone, known values come, and one that is written to may no longer be known.
        if seen & _OTHER or (seen & _KNOWN and (not seen & _UNKNOWN or func._schema.is_mutable)):
            return None
        return tuple(parts)

    def _make(self, known: Any, args: Any) -> Any:
        kind = type(known)
        if kind is _New:
            return self._fake(torch.empty_strided(known.shape, known.stride, dtype=known.dtype, device="meta"))
        if kind is _View:
            made = torch.empty(0, dtype=known.dtype, device="meta")
            return self._fake(made.set_(args[known.of].untyped_storage(), known.offset, known.shape, known.stride))
        if kind is _Same:
            return args[known.place]
        return kind(self._make(item, args) for item in known)

    def _fake(self, meta: torch.Tensor) -> FakeTensor:
        """``FakeTensor(fake_mode, meta, cpu)`` in a fourth of the time: but for its shape it is as any other."""
        made: Any = torch.Tensor._make_subclass(
            FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=_CPU
        )
        torch._C._set_warn_deprecated_on_mutable_data_ptr(made)
        vars(made).update(self._attributes)
        return cast(FakeTensor, made)


class _New(NamedTuple):
    """A tensor that an operator makes."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _View(NamedTuple):
    """A tensor on the storage of an argument."""

    of: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int


class _Same(NamedTuple):
    """An argument itself."""

    place: int


def _is_repeatable(func: Any) -> bool:
    """Whether an operator gives tensors, and changes nothing of its arguments but values, as far as it says."""
    returns = func._schema.returns
    return torch.Tag.inplace_view not in func.tags and all(str(part.type) in _TENSORS for part in returns)


_TENSORS = ("Tensor", "List[Tensor]")


_UNKNOWN, _KNOWN, _OTHER = 1, 2, 4
"""What is among an operator's arguments: tensors whose values are not known, or are, and what has no part in a key."""


def _add(parts: list[Any], value: Any) -> int:
    """Add what matters of an argument, and tell what it is."""
    if isinstance(value, FakeTensor):
        if value.layout is not torch.strided or value.fake_device != _CPU:
            return _OTHER
        parts.append((value.shape, value.stride(), value.dtype, value.storage_offset()))
        return _UNKNOWN if value.constant is None else _KNOWN
    if isinstance(value, (list, tuple)):
        parts.append(len(value))
        seen = 0
        for item in value:
            seen |= _add(parts, item)
        return seen
    parts.append((type(value), value))
    return 0 if isinstance(value, _PLAIN) else _OTHER


def _description(result: Any, args: Any, kwargs: Any) -> Any:
    """What a result is to be made from again; None where that cannot be said."""
    if isinstance(result, (list, tuple)):
        parts = [_description(item, args, kwargs) for item in result]
        return None if None in parts else parts if type(result) is list else tuple(parts)
    if type(result) is not FakeTensor or result.constant is not None or result.fake_device != _CPU:
        return None
    for place, value in enumerate(args):
        if value is result:
            return _Same(place)
    if result.is_complex() or result.is_neg():
        return None
    storage, offset = result.untyped_storage(), int(result.storage_offset())
    layout = result.shape, result.stride(), result.dtype
    for place, value in enumerate(args):
        if isinstance(value, FakeTensor) and value.untyped_storage()._cdata == storage._cdata:
            return _View(place, *layout, offset)
    given = (value for value in tree_leaves((args, kwargs)) if isinstance(value, FakeTensor))
    if offset or any(value.untyped_storage()._cdata == storage._cdata for value in given):
        return None
    made = _New(*layout)
    whole = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta").untyped_storage()
    return made if whole.nbytes() == storage.nbytes() else None


def _carry_out(fake_mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """What the fake mode makes of an operator, and what it cannot."""
    if func in _TOLD_BEFOREHAND:
        return _with_values(fake_mode, func, types, args, kwargs)
    if func._schema.is_mutable:
        _forget_written_lists(fake_mode, func, args, kwargs)
    if func is aten._grouped_mm.default:
        with fake_mode:
            return _grouped_mm(*args, **kwargs)
    result = _without_false_values(fake_mode.dispatch(func, types, args, kwargs), args)
    if func in _WITHOUT_VALUES and isinstance(result, FakeTensor):
        result.constant = None
    if func is aten._amp_foreach_non_finite_check_and_unscale_.default:  # nothing is
        args[1].constant = torch.zeros(args[1].shape, dtype=args[1].dtype)
        fake_mode.fake_tensor_converter.add_constant_storage_mapping(args[1])
    if func is aten.topk.default and type(result[1]) is FakeTensor and result[1].constant is None:
        return result[0], _taking_turns(fake_mode, result[1], args)
    return result


_TOLD_BEFOREHAND = {aten.ones.default: 1, aten.isinf.default: 0, aten.isnan.default: 0}
"""Masks are made of ones; what is infinite or no number is taken not to be there. The fake mode takes neither for
known. Zeros are left out: they are where sums begin."""

_WITHOUT_VALUES = {aten.new_empty.default, aten.empty_like.default, aten.new_empty_strided.default}
"""The fake mode takes for known what they find in memory, where it knows their argument."""


def _with_values(fake_mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """What comes of an operator whose result can be told beforehand, with its values where they are few enough."""
    made = fake_mode.dispatch(func, types, args, kwargs)
    if made.constant is None and made.fake_device == _CPU and made.numel() <= fake_tensor.CONSTANT_NUMEL_LIMIT:
        values = torch.empty_strided(made.shape, made.stride(), dtype=made.dtype)
        return known(fake_mode, values.fill_(_TOLD_BEFOREHAND[func]))
    return made


def _forget_written_lists(fake_mode: Any, func: Any, args: Any, kwargs: Any) -> None:
    """Values that were known are no longer so where they are written to by what is not; the fake mode looks at
    tensors, and not into lists of them."""
    given = {**dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)), **kwargs}
    written = (given.get(argument.name) for argument in func._schema.arguments if _is_written_to(argument))
    listed = tree_leaves([value for value in written if isinstance(value, (list, tuple))])
    overwritten = [tensor for tensor in listed if _has_values(tensor)]
    if overwritten and not all(_has_values(value) for value in tree_leaves(given) if isinstance(value, torch.Tensor)):
        for tensor in overwritten:
            fake_mode.fake_tensor_converter.invalidate_constant_aliases(tensor.constant)
            tensor.constant = None


def _is_written_to(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _has_values(tensor: Any) -> bool:
    return getattr(tensor, "constant", None) is not None


def _grouped_mm(a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> torch.Tensor:
    """As the kernels do it for every dtype; PyTorch's fake one refuses all but bfloat16.

    Rows are padded to 16 bytes: aten/src/ATen/native/GroupedMMUtils.h, create_grouped_gemm_output_tensor.
    """
    dtype = out_dtype or a.dtype
    columns = b.shape[-1]
    shape: tuple[int, ...]
    if a.dim() == 2 and b.dim() == 2:
        shape = (offs.shape[0], a.shape[0], columns)
    elif a.dim() == b.dim():
        shape = (a.shape[0], a.shape[1], columns)
    else:
        shape = (a.shape[-2], columns)
    aligned = 16 // dtype.itemsize
    row = -(-columns // aligned) * aligned
    stride = (row, 1) if len(shape) == 2 else (shape[1] * row, row, 1)
    return torch.empty_strided(shape, stride, dtype=dtype)


def _taking_turns(fake_mode: Any, chosen: FakeTensor, args: Any) -> FakeTensor:
    """Which values are the largest is not known. Every row's are taken to be others than the last row's, so that a
    router sends as many tokens to one expert as to another, each to as many as it does."""
    tensor, _, *rest = args
    values = torch.arange(chosen.numel()).remainder_(tensor.shape[-1]).reshape(chosen.shape)
    if (rest[0] if rest else -1) not in (-1, tensor.dim() - 1) or not fake_mode.may_turn_const(values):
        return chosen
    return known(fake_mode, values)


def known(fake_mode: Any, values: torch.Tensor) -> FakeTensor:
    """A fake tensor whose values are known."""
    made = fake_mode.fake_tensor_converter.from_real_tensor(fake_mode, values, make_constant=True)
    return cast(FakeTensor, made)


def _stand_in(func: Any, args: Any, kwargs: Any) -> Any:
    """An answer to a question about values: a flag is set, a number is one, a mask lets all through.

    What is made here comes from no tensor: of one whose values are known, the fake mode would make real memory that
    nobody has filled, and take it for values.
    """
    packet = getattr(func, "overloadpacket", None)
    if packet is aten._local_scalar_dense:
        kind = args[0].dtype
        return True if kind is torch.bool else 1.0 if kind.is_floating_point else 1
    if packet is aten.equal:
        return args[0].shape == args[1].shape
    if packet is aten.nonzero:
        tensor = args[0]
        return torch.empty((tensor.numel(), tensor.dim()), dtype=torch.int64)
    if packet is aten.masked_select:
        tensor, mask = args[0], args[1]
        return torch.empty(math.prod(max(pair) for pair in _aligned_sizes(tensor, mask)), dtype=tensor.dtype)
    if packet is aten.index:
        tensor, indices = args[0], args[1]
        return _index_all(tensor, indices)
    if packet in (aten.unique_consecutive, aten._unique2, aten.unique_dim):
        tensor = args[0]
        flat = tensor.reshape(-1)
        return (
            flat.new_empty(flat.shape),
            flat.new_empty(tensor.shape, dtype=torch.int64),
            flat.new_empty(flat.shape, dtype=torch.int64),
        )
    if packet is aten.repeat_interleave:
        repeats = args[0]
        return repeats.new_empty((kwargs.get("output_size") or repeats.numel(),))
    raise NotImplementedError(func)


def _aligned_sizes(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[int, int]]:
    return zip_longest(reversed(a.shape), reversed(b.shape), fillvalue=1)


def _index_all(tensor: torch.Tensor, indices: Any) -> Any:
    """``tensor[mask]`` where the mask lets all through."""
    places: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            places.extend(torch.zeros((index.numel(),), dtype=torch.int64) for _ in range(index.dim()))
        else:
            places.append(index)
    return aten.index.Tensor(tensor, places)


def _without_false_values(result: Any, args: Any) -> Any:
    """A result whose values are not known, where those of an argument are not: PyTorch makes results of some operators
    by ``new_empty`` of the first argument, and takes what it finds in that memory for known."""
    if isinstance(result, FakeTensor) and result.constant is not None:
        given = [value for value in tree_leaves(args) if isinstance(value, FakeTensor)]
        if any(value.constant is None for value in given):
            result.constant = None
    return result
