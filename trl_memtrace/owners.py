"""Who owns which storage: the parameters and buffers of a model, their gradients, the state of its optimizer, its
batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .attribution import NOWHERE, ROOT_MODULE, Owner
from .categories import BUCKETS, Category, role
from .collectives import ALL_GATHER
from .sharding import Held, Shards, in_flight, local_tensor, module_name

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) | {"_is_hf_initialized", "config"}
_PLAIN_TYPES = (str, bytes, int, float, complex, bool, type(None), nn.Module, torch.dtype, torch.device)
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter)
_NO_OWNER = "deepspeed."
"""What DeepSpeed hangs on parameters are views of what its optimizer holds."""

_MAX_DEPTH = 4
_WRAPPED_BY_PEFT = ("base_layer", "original_module")
_REFERENCE_ADAPTER = ".ref"  # what TRL calls the frozen copy of an adapter that is trained further

_APART = 1 << 48

Row = tuple[int, int, int, int]
"""time_ns, address, size, owner: a row of ``attribution.Claims``."""

Found = tuple[Row, torch.UntypedStorage]
"""A claim, and the storage that it is about."""


def dense_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with storages of their own that a tensor is made of: itself, or the parts of a wrapper subclass
    (DTensor, torchao) or of a sparse tensor."""
    if type(tensor) in _PLAIN_TENSORS and tensor.layout is torch.strided:
        yield tensor
    elif is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            part = getattr(tensor, name)
            if isinstance(part, torch.Tensor):  # a DTensor names its mesh too
                yield from dense_parts(part)
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    else:
        yield tensor


def tensors_in(value: Any, depth: int = _MAX_DEPTH, *, any_object: bool = False) -> Iterator[torch.Tensor]:
    """Every tensor inside nested containers, dataclasses and bitsandbytes' state objects; in any object, where
    asked."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth == 0 or isinstance(value, (*_PLAIN_TYPES, type)):
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, depth - 1, any_object=any_object)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from tensors_in(item, depth - 1, any_object=any_object)
    elif any_object or dataclasses.is_dataclass(value) or type(value).__module__.partition(".")[0] == "bitsandbytes":
        for item in vars(value).values() if hasattr(value, "__dict__") else ():
            yield from tensors_in(item, depth - 1, any_object=any_object)


@functools.cache
def _type_of(device: torch.device) -> str:
    """``device.type``, for which PyTorch makes a new string each time."""
    return device.type


def inner_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside wrappers: accelerate's, and DeepSpeed's, which are none of torch's."""
    inner = getattr(optimizer, "optimizer", None)
    found = inner_optimizer(inner) if inner is not None else None
    return found if isinstance(found, torch.optim.Optimizer) else optimizer


class Owners:
    """Finds the storages of one model and its optimizer on one kind of device.

    It is made anew for every traced step, since a model may change between steps, and dropped at its end, since it
    holds references to parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        device_type: str,
        others: Mapping[str, nn.Module] | None = None,
        wrapper: nn.Module | None = None,
        address_of: Callable[[torch.UntypedStorage], int] = torch.UntypedStorage.data_ptr,
    ) -> None:
        self.owners: list[Owner] = []
        self._device_type = device_type
        self._address_of = address_of
        self._numbers: dict[tuple[Category, str, str], int] = {}
        self._optimizer = inner_optimizer(optimizer)
        self._shards = Shards(model, wrapper, optimizer)
        self._parameters: list[nn.Parameter] = []
        self._extras: list[tuple[torch.Tensor, int]] = []
        self._standing: set[int] = set()  # addresses of the parameters
        self._place: dict[int, tuple[str, str]] = {}  # by id of a parameter: its module's name, and what kind it is
        self._walk(model)
        for name, other in (others or {}).items():
            self._keep(name, other)

    def use(self, optimizer: Any) -> None:
        """Another optimizer is stepped from here on."""
        self._optimizer = inner_optimizer(optimizer)

    def weights(self, time_ns: int) -> Iterator[Found]:
        """Parameters, buffers, and what quantization keeps beside them."""
        for tensor, number in self._extras:  # first, since the last claim of equal trust stands
            yield from self._rows(time_ns, tensor, number)
        gathered = self._shared(time_ns)
        for parameter in self._parameters:
            for found in self._weight(time_ns, parameter):
                address = found[0][1]
                self._standing.add(address)
                if address not in gathered:
                    yield found
        yield from self._held(time_ns, Category.WEIGHTS)

    def moved_weights(self, time_ns: int) -> Iterator[Found]:
        """Trained parameters that have other storages than when ``weights`` was asked: some are given new ones in each
        forward."""
        known = self._standing.union(self._shared(time_ns))
        for parameter in self._parameters:
            if parameter.requires_grad:
                for found in self._weight(time_ns, parameter):
                    if found[0][1] not in known:
                        yield found

    def gradients(self, time_ns: int) -> Iterator[Found]:
        """The ``.grad`` of every parameter that has one."""
        buckets = self._shared(time_ns)
        for parameter in self._parameters:
            for found in self.gradient(time_ns, parameter):
                if found[0][1] not in buckets:
                    yield found
        yield from self._held(time_ns, Category.GRADIENTS)

    def used_up_in_backward(self) -> Iterator[nn.Parameter]:
        """Parameters whose gradient somebody's hook may take, and free, as soon as it is there."""
        for parameter in self._parameters:
            if getattr(parameter, "_post_accumulate_grad_hooks", None):
                yield parameter

    def gradient(self, time_ns: int, parameter: nn.Parameter) -> list[Found]:
        """The ``.grad`` of one parameter."""
        gradient = parameter.grad if parameter.is_leaf else None
        if gradient is None:
            return []
        return self._rows(time_ns, gradient, self._owner_of(Category.GRADIENTS, parameter))

    def optimizer_states(self, time_ns: int) -> Iterator[Found]:
        """What ``optimizer.state`` holds, by the name of each state, and tensors among the hyperparameters."""
        state = getattr(self._optimizer, "state", None)
        if isinstance(state, Mapping):
            for parameter, entries in state.items():
                module, _ = self._place.get(id(parameter), (ROOT_MODULE, ""))
                for name, value in entries.items() if isinstance(entries, Mapping) else (("state", entries),):
                    number = self._number(Category.OPTIMIZER_STATES, str(name), module)
                    plain = type(value) is torch.Tensor
                    for tensor in (value,) if plain else tensors_in(value, any_object=True):
                        yield from self._rows(time_ns, tensor, number)
        for group in getattr(self._optimizer, "param_groups", ()):
            number = self._number(Category.OPTIMIZER_STATES, "hyperparameters", ROOT_MODULE)
            for name, value in group.items():
                if name != "params":
                    for tensor in tensors_in(value):
                        yield from self._rows(time_ns, tensor, number)

        yield from self._held(time_ns, Category.OPTIMIZER_STATES)

    def communication(self, time_ns: int) -> Iterator[Found]:
        """Gathered parameters and buffers of collectives that are held now."""
        yield from self._held(time_ns, Category.COMMUNICATION)

    def buckets(self, time_ns: int) -> list[Row]:
        """DDP's buckets: how large they are is known, not where."""
        number = self._number(Category.COMMUNICATION, BUCKETS, ROOT_MODULE)
        return [
            (time_ns, NOWHERE - place * _APART, size, number)
            for place, size in enumerate(self._shards.bucket_bytes())
            if size
        ]

    @property
    def buckets_rebuilt(self) -> bool:
        """Whether DDP's buckets are no longer those that it began with."""
        return self._shards.has_rebuilt

    def about_to_be_reduced(self, time_ns: int, subject: Any) -> Iterator[Found]:
        """Gradients of whole parameters, just before FSDP reduces them to shards."""
        for held in self._shards.unsharded_gradients(subject):
            yield from self._found(time_ns, held)

    def in_flight(self, time_ns: int, subject: Any) -> Iterator[Found]:
        """The buffers that FSDP gathers a group's parameters into."""
        number = self._number(Category.COMMUNICATION, ALL_GATHER, ROOT_MODULE)
        for buffer in in_flight(subject):
            yield from self._rows(time_ns, buffer, number)

    def inputs(self, time_ns: int, batch: Any) -> Iterator[Found]:
        """The tensors of a batch, or of the arguments that the model is called with: what was computed beforehand is
        told apart by its name."""
        named = batch.items() if isinstance(batch, Mapping) else [("", batch)]
        for name, value in named:
            number = self._number(Category.INPUTS, input_role(str(name)), ROOT_MODULE)
            for tensor in tensors_in(value):
                yield from self._rows(time_ns, tensor, number)

    def _rows(self, time_ns: int, tensor: torch.Tensor, number: int) -> list[Found]:
        is_plain = type(tensor) in _PLAIN_TENSORS and tensor.layout is torch.strided
        found = []
        for part in (tensor,) if is_plain else dense_parts(tensor):
            if _type_of(part.device) == self._device_type:
                storage = part.untyped_storage()
                if size := storage.nbytes():
                    found.append(((time_ns, self._address_of(storage), size, number), storage))
        return found

    def _weight(self, time_ns: int, parameter: nn.Parameter) -> list[Found]:
        return self._rows(time_ns, local_tensor(parameter), self._owner_of(Category.WEIGHTS, parameter))

    def _shared(self, time_ns: int) -> set[int]:
        """The addresses of what is communication although parameters or gradients are views of it just now."""
        return {row[1] for row, _ in self._held(time_ns, Category.COMMUNICATION)}

    def _held(self, time_ns: int, category: Category) -> Iterator[Found]:
        for held in self._shards.held():
            if held.category is category:
                yield from self._found(time_ns, held)

    def _found(self, time_ns: int, held: Held) -> list[Found]:
        return self._rows(time_ns, held.tensor, self._number(held.category, held.detail, held.module))

    def _owner_of(self, category: Category, parameter: nn.Parameter) -> int:
        module, kind = self._place[id(parameter)]
        return self._number(category, kind, module)

    def _number(self, category: Category, detail: str, module: str) -> int:
        key = (category, detail, module)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.owners)
            self.owners.append(Owner(category, role(category, detail), module))
        return number

    def _walk(self, model: nn.Module) -> None:
        adapters: set[str] = set()
        sharded = self._shards.local_form()
        under_peft = False
        for wrapped_name, module in model.named_modules():
            name = module_name(wrapped_name)
            under_peft = under_peft or "peft_config" in vars(module)  # then what is trained is an adapter's
            parent = name.rpartition(".")[0]
            adapter = name in adapters or parent in adapters or name.split(".", 1)[0] == "prompt_encoder"
            if adapter:
                adapters.add(name)
            # PEFT's tuner layers say themselves which of their attributes are the adapter's; of their parts all but
            # what they wrap is.
            declared = getattr(type(module), "adapter_layer_names", None)
            if declared is not None:
                parts = set(module._modules).difference(_WRAPPED_BY_PEFT).union(declared)
                adapters.update(f"{name}.{part}" if name else part for part in parts)
            for present in module._parameters.values():
                parameter = sharded.get(id(present), present)
                if parameter is not None and id(parameter) not in self._place:
                    trained = "adapter" if under_peft else "trainable"
                    kind = "adapter" if adapter else trained if parameter.requires_grad else "frozen"
                    if adapter and not parameter.requires_grad and name.endswith(_REFERENCE_ADAPTER):
                        kind = "reference"
                    self._place[id(parameter)] = name, kind
                    self._parameters.append(parameter)
                    if type(parameter) not in _PLAIN_TENSORS:
                        self._add_extras(name, "quant_state", vars(parameter))
            self._add_extras(name, "buffer", module._buffers)
            own = {key: value for key, value in vars(module).items() if key not in _MODULE_ATTRIBUTES}
            if own:
                quantized = type(module).__module__.startswith("bitsandbytes")
                self._add_extras(name, "quant_state" if quantized else "buffer", own)

    def _keep(self, name: str, other: nn.Module) -> None:
        """A model that is only used: whatever it holds that the trained one does not is its own."""
        own = {id(parameter) for parameter in self._parameters}
        number = self._number(Category.WEIGHTS, other_model_role(name), name)
        for tensor in (*other.parameters(), *other.buffers()):
            if id(tensor) not in own:
                self._extras.append((tensor, number))

    def _add_extras(self, module: str, kind: str, values: Mapping[str, Any]) -> None:
        for value in values.values():
            if not isinstance(value, _PLAIN_TYPES) and not type(value).__module__.startswith(_NO_OWNER):
                for tensor in tensors_in(value):
                    if not tensor.requires_grad:
                        self._extras.append((tensor, self._number(Category.WEIGHTS, kind, module)))


def input_role(name: str) -> str:
    """What a tensor of a batch is, by its name: the log-probabilities of the reference model, those of the policy
    (``logps``), the ``logits`` of a teacher, computed beforehand; else ``batch``."""
    name = name.lower()
    if "logp" in name:
        return "reference_logps" if "ref" in name else "logps"
    return "logits" if "logit" in name else "batch"


def other_model_role(name: str) -> str:
    """What a model that is kept beside the trained one is for, by the name that its trainer has for it: ``reward``,
    ``teacher``, ``value``, else ``reference``."""
    return next((kind for kind in ("reward", "teacher", "value") if kind in name.lower()), "reference")


def activation_role(name: str, module: nn.Module, is_head: bool) -> str:
    """What the activations of a module are, by its class and its place: attention, mlp, norm, embedding, logits or
    other."""
    kind = type(module).__name__.lower()
    if is_head:
        return "logits"
    if "norm" in kind:
        return "norm"
    if "attention" in kind or "attn" in kind:
        return "attention"
    if "mlp" in kind or "feedforward" in kind or "expert" in kind or "moe" in kind or "router" in kind:
        return "mlp"
    if "embedding" in kind:
        return "embedding"
    return "other"


def activation_roles(model: nn.Module) -> dict[str, str]:
    """For every module of a model, by name, the role of its activations; a module says the same as the one it is part
    of, unless it is a norm or the head."""
    head = _output_head(model)
    roles: dict[str, str] = {}
    for wrapped_name, module in model.named_modules():
        name = module_name(wrapped_name)
        holds_head = head is not None and any(child is head for child in module.children())
        own = activation_role(name, module, is_head=module is head or holds_head)
        inherited = roles.get(name.rpartition(".")[0], "other") if name else "other"
        inherited = "other" if inherited == "logits" and module is not head else inherited
        roles[name] = inherited if inherited not in ("other", "logits") and own not in ("norm", "logits") else own
    return roles


def _output_head(model: nn.Module) -> nn.Module | None:
    for owner in (model, getattr(model, "base_model", None)):
        get = getattr(owner, "get_output_embeddings", None)
        if callable(get):
            try:
                head = get()
            except (AttributeError, NotImplementedError):
                continue
            if isinstance(head, nn.Module):
                return head
    return None
