"""Where DDP, FSDP and DeepSpeed's ZeRO keep what is theirs: local shards, gathered parameters, buckets.

Each rank counts what it holds itself. None of the three says so through a public name; every attribute that is read
here is one that the code of torch 2.8 to 2.13 and of DeepSpeed 0.16 to 0.19 fills, and one that is missing is passed
over.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from .attribution import ROOT_MODULE
from .categories import BUCKETS, Category
from .collectives import ALL_GATHER, GATHERED_WEIGHTS

_DDP = "torch.nn.parallel.distributed"
_FSDP1 = "torch.distributed.fsdp._flat_param"
_FSDP2 = "torch.distributed.fsdp._fully_shard._fsdp_state"
_DEEPSPEED_ENGINE = "deepspeed.runtime.engine"

UNSHARDED, PARTITION, MASTER_WEIGHTS = "unsharded", "partition", "master_weights"

_WRAPPER_PARTS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_ZERO_PARTS = (
    ("bit16_groups_flat", Category.WEIGHTS, "trainable"),
    ("bf16_groups_flat", Category.WEIGHTS, "trainable"),
    ("fp16_partitioned_groups_flat", Category.WEIGHTS, "trainable"),
    ("single_partition_of_fp32_groups", Category.OPTIMIZER_STATES, MASTER_WEIGHTS),
    ("fp32_partitioned_groups_flat", Category.OPTIMIZER_STATES, MASTER_WEIGHTS),
    ("fp32_groups_flat_partition", Category.OPTIMIZER_STATES, MASTER_WEIGHTS),
    ("averaged_gradients", Category.GRADIENTS, PARTITION),
    ("all_grad_tensors", Category.GRADIENTS, PARTITION),
    ("grads_in_partition", Category.GRADIENTS, PARTITION),
    ("grad_partitions_flat_buffer", Category.GRADIENTS, PARTITION),
    ("fp32_groups_gradients_flat", Category.GRADIENTS, PARTITION),
)


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A tensor that is kept for sharding's sake, whose it is in the words of a record, and its module."""

    category: Category
    detail: str
    tensor: torch.Tensor
    module: str = ROOT_MODULE


def module_name(name: str) -> str:
    """A module's name without those of the wrappers that FSDP1 and activation checkpointing put around modules."""
    if not any(part in name for part in _WRAPPER_PARTS):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP or a DeepSpeed engine; any other is itself."""
    while isinstance(model, (*_types(_DDP, "DistributedDataParallel"), *_types(_DEEPSPEED_ENGINE, "DeepSpeedEngine"))):
        model = cast(nn.Module, model.module)
    return model


def strategy(model: nn.Module, wrapper: nn.Module | None = None, optimizer: Any = None) -> str | None:
    """How a run is distributed: ``ddp``, ``fsdp1``, ``fsdp2``, ``zero1``, ``zero2``, ``zero3``; None where it is not.

    Args:
        model: what is trained.
        wrapper: what it is called through.
        optimizer: its optimizer.
    """
    engine = next(
        (part for part in (wrapper, model) if isinstance(part, _types(_DEEPSPEED_ENGINE, "DeepSpeedEngine"))), None
    )
    if engine is not None:
        return f"zero{cast(Any, engine).zero_optimization_stage()}"
    if any(True for _ in _fsdp2_groups(model)):
        return "fsdp2"
    if any(True for _ in _flat_parameters(model)):
        return "fsdp1"
    return (
        "ddp" if any(isinstance(part, _types(_DDP, "DistributedDataParallel")) for part in (wrapper, model)) else None
    )


def class_name(model: nn.Module) -> str:
    """The name of a model's class, as its author wrote it: FSDP2 makes a class of its own, FSDP1 puts one around."""
    kind = type(getattr(model, _WRAPPER_PARTS[0], model))
    made = issubclass(kind, _types("torch.distributed.fsdp._fully_shard._fully_shard", "FSDPModule"))
    return kind.__bases__[-1].__name__ if made else kind.__name__


def whole_parameters(model: nn.Module) -> Iterator[tuple[int, int, bool]]:
    """Elements, bytes an element and whether it is trained, of every parameter as it is before it is sharded."""
    flat = list(_flat_parameters(model))
    inside = {id(parameter) for tensor, _ in flat for parameter in getattr(tensor, "_params", None) or ()}
    for tensor, _ in flat:
        numels, trained = tensor._numels, getattr(tensor, "_requires_grad", None)
        sizes = [size for size, padded in zip(numels, tensor._is_padding_mask, strict=False) if not padded]
        for place, size in enumerate(sizes):
            yield size, tensor.element_size(), trained[place] if trained else tensor.requires_grad
    for parameter in model.parameters():
        if id(parameter) not in inside and not hasattr(parameter, "_numels"):
            yield getattr(parameter, "ds_numel", parameter.numel()), parameter.element_size(), parameter.requires_grad


class Shards:
    """What shards one model: found once, since it stays; what it holds changes from moment to moment.

    Args:
        model: what is trained.
        wrapper: what it is called through: the model itself, DDP or a DeepSpeed engine.
        optimizer: its optimizer, however wrapped.
    """

    def __init__(self, model: nn.Module, wrapper: nn.Module | None = None, optimizer: Any = None) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._groups = list(_fsdp2_groups(model)) if distributed else []
        self._flat = list(_flat_parameters(model)) if distributed else []
        sharded = bool(self._groups or self._flat)
        self._names = {id(part): module_name(name) for name, part in model.named_modules()} if sharded else {}
        self._zero = _zero_optimizer(optimizer)
        self._partitioned = [part for part in model.parameters() if hasattr(part, "ds_tensor")] if self._zero else []
        self._ddp = wrapper if isinstance(wrapper, _types(_DDP, "DistributedDataParallel")) else None

    def local_form(self) -> dict[int, nn.Parameter]:
        """For every parameter that FSDP2 has gathered just now, by ``id``, the shard that stands in the books."""
        gathered = (
            (getattr(part, "_unsharded_param", None), part) for group in self._groups for part in group.fsdp_params
        )
        return {id(parameter): part.sharded_param for parameter, part in gathered if parameter is not None}

    def held(self) -> Iterator[Held]:
        """What is held now beside the parameters, their gradients and the optimizer's states."""
        for group in self._groups:
            for part in group.fsdp_params:
                module = self._names.get(id(part._module_info.module), ROOT_MODULE)
                for tensor in (*part.all_gather_outputs, *part._unsharded_inner_tensors):
                    yield Held(Category.COMMUNICATION, GATHERED_WEIGHTS, tensor, module)
            for tensor in in_flight(group):
                yield Held(Category.COMMUNICATION, ALL_GATHER, tensor)
            yield from self.unsharded_gradients(group)
        for tensor, owner in self._flat:
            yield from _held_by_flat(tensor, self._names.get(id(owner), ROOT_MODULE))
        if self._zero is not None:
            yield from _held_by_zero(vars(self._zero))
        for parameter in self._partitioned:
            yield Held(Category.COMMUNICATION, GATHERED_WEIGHTS, parameter.data)

    def unsharded_gradients(self, subject: Any) -> Iterator[Held]:
        """The gradients of whole parameters that FSDP is about to reduce, or accumulates.

        Args:
            subject: a parameter group of FSDP2's or a state of FSDP1's; anything else has none.
        """
        for part in getattr(subject, "fsdp_params", ()):
            module = self._names.get(id(part._module_info.module), ROOT_MODULE)
            gathered = getattr(part, "_unsharded_param", None)
            for gradient in (getattr(gathered, "grad", None), part.unsharded_accumulated_grad):
                if gradient is not None:
                    yield Held(Category.GRADIENTS, UNSHARDED, gradient, module)
        handle = getattr(subject, "_handle", None)
        gradient = getattr(getattr(handle, "flat_param", None), "grad", None)
        if isinstance(gradient, torch.Tensor):
            yield Held(Category.GRADIENTS, UNSHARDED, gradient)

    @property
    def has_rebuilt(self) -> bool:
        """Whether DDP has made its buckets anew, as it does once, after the first backward."""
        return bool(getattr(self._ddp, "_has_rebuilt_buckets", False))

    def bucket_bytes(self) -> list[int]:
        """The sizes of the buckets that DDP reduces gradients in. The reducer is the only one that knows them, and
        says how large they are, not where; none where gradients are views of buckets, and so are counted already."""
        if self._ddp is None or self._ddp.gradient_as_bucket_view:
            return []
        said = cast(Any, self._ddp)._get_ddp_logging_data()
        sizes = said.get("rebuilt_bucket_sizes") if said.get("has_rebuilt_buckets") else said.get("bucket_sizes")
        return [int(size) for size in str(sizes or "").replace(",", " ").split()]


def _held_by_flat(tensor: Any, module: str) -> Iterator[Held]:
    for attribute, category, detail in (
        ("_local_shard", Category.WEIGHTS, "trainable" if tensor.requires_grad else "frozen"),
        ("_saved_grad_shard", Category.GRADIENTS, PARTITION),
        ("_cpu_grad", Category.GRADIENTS, PARTITION),
        ("_full_param_padded", Category.COMMUNICATION, GATHERED_WEIGHTS),
        ("_full_prec_full_param_padded", Category.COMMUNICATION, GATHERED_WEIGHTS),
        ("_mp_shard", Category.COMMUNICATION, ALL_GATHER),
    ):
        value = getattr(tensor, attribute, None)
        if isinstance(value, torch.Tensor):
            yield Held(category, detail, value, module)
    if tensor.grad is not None:
        yield Held(Category.GRADIENTS, PARTITION, tensor.grad, module)


def _held_by_zero(zero: Mapping[str, Any]) -> Iterator[Held]:
    """Partitions, their gradients, the masters in fp32 and the reduce buckets of an optimizer of DeepSpeed's."""
    for attribute, category, detail in _ZERO_PARTS:
        for tensor in _flatten(zero.get(attribute)):
            yield Held(category, detail, tensor)
            if detail == MASTER_WEIGHTS and tensor.grad is not None:
                yield Held(Category.GRADIENTS, PARTITION, tensor.grad)
    for bucket in (zero.get("ipg_buckets") or {}).values():
        for tensor in _flatten(getattr(bucket, "buffer", None)):
            yield Held(Category.COMMUNICATION, BUCKETS, tensor)


def in_flight(subject: Any) -> Iterator[torch.Tensor]:
    """The buffers that a parameter group of FSDP2's gathers into, or reduces from, just now."""
    context = getattr(subject, "comm_ctx", None)
    results = (
        getattr(subject, "_all_gather_result", None),
        getattr(getattr(context, "all_gather_state", None), "all_gather_result", None),
    )
    for result in results:
        if result is not None and isinstance(result.all_gather_output, torch.Tensor):
            yield result.all_gather_output
    for state in getattr(context, "reduce_scatter_states", ()):
        yield state.reduce_scatter_input


def local_tensor(parameter: nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter: the partition, where ZeRO-3 has made one."""
    partition = getattr(parameter, "ds_tensor", None)
    return partition if isinstance(partition, torch.Tensor) else parameter


def _zero_optimizer(optimizer: Any) -> Any:
    while optimizer is not None:
        if type(optimizer).__module__.startswith("deepspeed.runtime"):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def _flatten(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in lists and dictionaries, and in the group of buffers that ZeRO keeps gradients in."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _flatten(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _flatten(item)
        yield from _flatten(getattr(value, "flat_partition", None))


def _fsdp2_groups(model: nn.Module) -> Iterator[Any]:
    """The parameter groups of FSDP2, each once."""
    get_state = getattr(sys.modules.get(_FSDP2), "_get_module_fsdp_state", None)
    if get_state is None:
        return
    seen: set[int] = set()
    for module in model.modules():
        state = get_state(module)
        if state is not None and id(state) not in seen:
            seen.add(id(state))
            groups = getattr(state, "_fsdp_param_groups", None)  # one, before torch 2.11
            yield from groups if groups is not None else filter(None, [state._fsdp_param_group])


def _flat_parameters(model: nn.Module) -> Iterator[tuple[Any, nn.Module]]:
    """The flat parameters of FSDP1, and the module that each was made of."""
    if _FSDP1 in sys.modules:
        for module in model.modules():
            handle = vars(module).get("_handle")
            if handle is not None and isinstance(handle, _types(_FSDP1, "FlatParamHandle")):
                yield handle.flat_param, handle._fully_sharded_module


def _types(module: str, name: str) -> tuple[type[Any], ...]:
    """A class, where its module is loaded."""
    found = getattr(sys.modules.get(module), name, None)
    return (found,) if isinstance(found, type) else ()
