"""What a model is made of: parameters and bytes by component, by layer, by dtype, and its structure.

A model given by name is built from its config on the meta device: nothing is downloaded but ``config.json``, and no
weight is allocated. ``describe`` turns any model into plain records, which reporters and ``loading`` work from without
touching torch.
"""

from __future__ import annotations

import enum
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import MemtraceError
from .owners import dense_parts, tensors_in
from .text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MODEL_DTYPES = ("float32", "float16", "bfloat16", "auto")
"""What ``load_meta`` builds in; ``auto`` is the dtype that the config names."""

ACCELERATE_DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")
"""What ``accelerate_estimate`` knows."""


_LONGEST_REASON = 240


class ModelError(MemtraceError):
    """A model that cannot be described: unknown, out of reach, or with a config that is broken."""


class Component(str, enum.Enum):
    """The part a weight plays in a model."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    MLP = "mlp"
    NORM = "norm"
    HEAD = "head"
    EXPERTS = "experts"
    ROUTER = "router"
    OTHER = "other"

    __str__ = str.__str__
    __hash__ = str.__hash__  # so that ``components["mlp"]`` finds what ``components[Component.MLP]`` does


@dataclass(frozen=True, slots=True)
class Amount:
    """How much: a number of parameters and the bytes that they take."""

    parameters: int = 0
    bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.parameters + other.parameters, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Amount:
        return Amount(self.parameters * times, self.bytes * times)


def total(amounts: Iterable[Amount]) -> Amount:
    """The sum of amounts."""
    return sum(amounts, Amount())


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter.

    Attributes:
        name: its full name, as ``named_parameters`` gives it.
        module: the class of the module that holds it.
        component: the part it plays.
        shape: its logical shape; of a packed 4-bit weight, the shape before packing.
        dtype: its dtype, or for packed 4-bit weights how they are coded: ``nf4`` or ``fp4``.
        parameters: how many numbers it stands for, the product of ``shape``.
        bytes: what its storage takes.
        trainable: whether it asks for a gradient.
        quant_state_bytes: what quantization keeps beside it (absmax, SCB, code books), not in ``bytes``.
        tied_to: the name under which it is counted, when it shares its storage with a weight met before.
    """

    name: str
    module: str
    component: Component
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    bytes: int
    trainable: bool
    quant_state_bytes: int = 0
    tied_to: str | None = None

    @property
    def amount(self) -> Amount:
        """What it adds to the model: nothing when it is tied."""
        return Amount() if self.tied_to is not None else Amount(self.parameters, self.bytes)


@dataclass(frozen=True, slots=True)
class Buffer:
    """One buffer: a tensor that belongs to a module and is no parameter. ``persistent`` ones are in checkpoints."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    persistent: bool


@dataclass(frozen=True, slots=True)
class Node:
    """One module of the structure tree, or several identical neighbours of a list.

    Attributes:
        name: the module's name in its parent; empty for the model itself.
        kind: its class.
        weights: its own parameters, of the first of the folded ones.
        children: its modules that hold parameters.
        indices: the places in the list of all that this node stands for; empty when it stands for itself alone.
        is_layer: whether it is one of the model's layers.
    """

    name: str
    kind: str
    weights: tuple[Weight, ...]
    children: tuple[Node, ...]
    indices: tuple[int, ...] = ()
    is_layer: bool = False

    @property
    def count(self) -> int:
        """How many modules this node stands for."""
        return len(self.indices) or 1

    @property
    def each(self) -> Amount:
        """What one of them holds, its children included."""
        own = total(weight.amount for weight in self.weights)
        return own + total(child.each * child.count for child in self.children)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Identical layers of one stack.

    Attributes:
        stack: the full name of the list that holds them.
        kind: their class.
        indices: their places in the list.
        each: what one of them holds.
    """

    stack: str
    kind: str
    indices: tuple[int, ...]
    each: Amount

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.indices)

    @property
    def all(self) -> Amount:
        """What they hold together."""
        return self.each * self.count


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a model is made of. Tied weights are counted once, under the first of their names.

    Attributes:
        name: what the user calls the model; empty for one in memory.
        architecture: the model's class.
        weights: every parameter, in the model's own order, tied names included.
        buffers: every buffer.
        tree: the structure, identical neighbours folded.
        layers: the layers, identical ones of a stack folded, in the model's order.
        outside: the parameters that belong to no layer, tied names included.
    """

    name: str
    architecture: str
    weights: tuple[Weight, ...]
    buffers: tuple[Buffer, ...]
    tree: Node
    layers: tuple[LayerGroup, ...]
    outside: tuple[Weight, ...]

    @property
    def total(self) -> Amount:
        """All parameters."""
        return total(weight.amount for weight in self.weights)

    @property
    def trainable(self) -> Amount:
        """Those that ask for a gradient."""
        return total(weight.amount for weight in self.weights if weight.trainable)

    @property
    def frozen(self) -> Amount:
        """Those that do not."""
        return total(weight.amount for weight in self.weights if not weight.trainable)

    @property
    def components(self) -> dict[Component, Amount]:
        """By component; all keys are there."""
        return {part: total(w.amount for w in self.weights if w.component is part) for part in Component}

    @property
    def dtypes(self) -> dict[str, Amount]:
        """By dtype, the largest first."""
        names = {weight.dtype for weight in self.weights if weight.tied_to is None}
        amounts = {name: total(w.amount for w in self.weights if w.dtype == name) for name in names}
        return dict(sorted(amounts.items(), key=lambda item: (-item[1].bytes, item[0])))

    @property
    def in_layers(self) -> Amount:
        """All layers together."""
        return total(group.all for group in self.layers)

    @property
    def outside_layers(self) -> Amount:
        """What belongs to no layer."""
        return total(weight.amount for weight in self.outside)

    @property
    def tied(self) -> dict[str, str]:
        """The names that are counted under another name, with that name."""
        return {weight.name: weight.tied_to for weight in self.weights if weight.tied_to is not None}

    @property
    def quant_state_bytes(self) -> int:
        """What quantization keeps beside the parameters."""
        return sum(weight.quant_state_bytes for weight in self.weights)

    def to_dict(self) -> dict[str, Any]:
        """The record that ``trl-memtrace model --json`` prints; bytes are those of parameters."""
        whole = self.total
        return {
            "parameters": whole.parameters,
            "trainable_parameters": self.trainable.parameters,
            "bytes": whole.bytes,
            "components": {
                part.value: {"parameters": amount.parameters, "bytes": amount.bytes}
                for part, amount in self.components.items()
            },
            "layers": [
                {"count": group.count, "parameters_each": group.each.parameters, "bytes_each": group.each.bytes}
                for group in self.layers
            ],
            "layer_parameters": self.in_layers.parameters,
            "non_layer_parameters": self.outside_layers.parameters,
        }


def describe(model: nn.Module, name: str = "") -> ModelDescription:
    """What ``model`` is made of.

    Any model in memory will do: on any device, meta included, wrapped by PEFT, quantized by bitsandbytes. It is only
    looked at.

    Layers are the modules of the outermost lists (``ModuleList``, ``Sequential``) whose members are more than a single
    operation. Components follow from the roles that a model declares (``get_input_embeddings``,
    ``get_output_embeddings``), from the class of a module and the place it has in its parent, never from the names of
    one architecture; what plays none of the known parts, such as a state-space mixer, is ``other``.

    Args:
        model: the model.
        name: what to call it.
    """
    survey = _Survey(model)
    tree = survey.node(model, _Place())
    layers: dict[tuple[Any, ...], LayerGroup] = {}
    outside: list[Weight] = []
    _split(tree, "", layers, outside)
    return ModelDescription(
        name=name,
        architecture=type(model).__name__,
        weights=tuple(_weights(tree)),
        buffers=tuple(_buffers(model)),
        tree=_fold(tree),
        layers=tuple(layers.values()),
        outside=tuple(outside),
    )


# --- the walk ------------------------------------------------------------------------------------------------------

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_MLP = re.compile(r"(?i:mlp|ffn|feed_?forward)|FF\b|\bff\b")
_EXPERTS = re.compile(r"expert", re.IGNORECASE)
_ROUTER = re.compile(r"(?i:router)|(\b|_)gate\b")
_EMBEDDING = re.compile(r"embed|_emb\b|\bw[tp]e\b", re.IGNORECASE)
_HEAD = re.compile(r"\b(\w*head|classifier|score|qa_outputs)\b|(Head|Classifier|Predictions)\b|\boutput_projection\b")
_NORM = re.compile(r"norm|\bln(_|\d|\b)", re.IGNORECASE)
_BESIDE = re.compile(r"(pre|post)_")  # post_attention_layernorm stands after attention, and is no part of it
_WHOLE_LAYER = re.compile(r"(Decoder|Encoder)Layer$")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a module stands: what the walk carries down."""

    path: str = ""
    attribute: str = ""
    component: Component = Component.OTHER
    beside_experts: bool = False
    layer: nn.Module | None = None
    parent_is_layer: bool = False

    def name(self, attribute: str) -> str:
        return f"{self.path}.{attribute}" if self.path else attribute

    def step_into(self, attribute: str, **changes: Any) -> _Place:
        return replace(self, path=self.name(attribute), attribute=attribute, **changes)


class _Survey:
    """One walk over a model: which of its modules play which part, and which storages were met before."""

    def __init__(self, model: nn.Module) -> None:
        self._embeddings = _declared(model, "get_input_embeddings")
        self._heads = _declared(model, "get_output_embeddings")
        self._embedding_storages = {
            _identity(weight) for module in self._embeddings.values() for weight in module.parameters(recurse=False)
        }
        self._layers: set[int] = set()
        self._skeleton: set[int] = set()  # what holds layers, and so plays no part itself
        self._find_layers(model)
        self._first_names: dict[Any, str] = {}

    def node(self, module: nn.Module, place: _Place) -> Node:
        """The structure below ``module``, not folded."""
        component = self._component(module, place)
        is_layer = id(module) in self._layers
        inside = replace(
            place,
            component=component,
            beside_experts=_holds_experts(module),
            layer=module if is_layer else place.layer,
            parent_is_layer=is_layer,
        )
        weights = tuple(
            self._weight(parameter, attribute, module, inside)
            for attribute, parameter in module._parameters.items()
            if parameter is not None
        )
        children = tuple(
            self.node(child, inside.step_into(attribute))
            for attribute, child in module._modules.items()
            if child is not None and _has_parameters(child)
        )
        return Node(place.attribute, type(module).__name__, weights, children, is_layer=is_layer)

    def _weight(self, parameter: nn.Parameter, attribute: str, module: nn.Module, place: _Place) -> Weight:
        name = place.name(attribute)
        identity = _identity(parameter)
        first = self._first_names.setdefault(identity, name)
        component = place.component
        if identity in self._embedding_storages:
            component = Component.EMBEDDING
        elif component is Component.OTHER:
            component = _part_named(attribute) or (
                Component.EMBEDDING if _EMBEDDING.search(attribute) else Component.OTHER
            )
        shape = _logical_shape(parameter)
        return Weight(
            name=name,
            module=type(module).__name__,
            component=component,
            shape=shape,
            dtype=_coding(parameter),
            parameters=math.prod(shape),
            bytes=sum(part.numel() * part.element_size() for part in dense_parts(parameter)),
            trainable=parameter.requires_grad,
            quant_state_bytes=_quant_state_bytes(parameter, module) if first == name else 0,
            tied_to=None if first == name else first,
        )

    def _component(self, module: nn.Module, place: _Place) -> Component:
        inherited = place.component
        kind = type(module).__name__
        label = f"{place.attribute} {kind}"
        if id(module) in self._embeddings:
            return Component.EMBEDDING
        if id(module) in self._heads:
            return Component.HEAD
        if _NORM.search(label) and all(weight.dim() <= 1 for weight in module.parameters()):
            return Component.NORM
        if inherited in (Component.EXPERTS, Component.ROUTER) or id(module) in self._skeleton:
            return inherited
        if inherited is not Component.ATTENTION:
            if place.beside_experts and _ROUTER.search(label):
                return Component.ROUTER
            if _EXPERTS.search(label):
                return Component.EXPERTS
        part = _part(place.attribute, module)
        if part is not None:
            return part
        if _holds_experts(module) and inherited is not Component.ATTENTION and id(module) not in self._layers:
            return Component.MLP
        if inherited is Component.OTHER:
            if place.layer is None and _HEAD.search(label):
                return Component.HEAD
            if isinstance(module, nn.Embedding) or _EMBEDDING.search(label):
                return Component.EMBEDDING
            if place.parent_is_layer and _is_feed_forward(module, place.layer):
                return Component.MLP
        return inherited

    def _find_layers(self, module: nn.Module) -> bool:
        found = False
        for child in module.children():
            if isinstance(module, (nn.ModuleList, nn.Sequential)) and _is_block(child):
                self._layers.add(id(child))
                found = True
            else:
                found |= self._find_layers(child)
        if found:
            self._skeleton.add(id(module))
        return found


def _declared(model: nn.Module, getter: str) -> dict[int, nn.Module]:
    """The modules that the model, or a model inside it, names as its input or output embeddings."""
    declared = {}
    for module in model.modules():
        get = getattr(module, getter, None)
        if callable(get):
            try:
                found = get()
            except (AttributeError, NotImplementedError, TypeError):
                continue
            if isinstance(found, nn.Module):
                declared[id(found)] = found
    return declared


def _identity(parameter: nn.Parameter) -> Any:
    """What two names of the same weight have in common: the same place in the same storage. Meta tensors have storages
    too, if no addresses."""
    if type(parameter) is nn.Parameter and parameter.layout is torch.strided:
        return parameter.untyped_storage()._cdata, parameter.storage_offset(), parameter.shape
    return id(parameter)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_block(module: nn.Module) -> bool:
    """Whether a member of a list is a layer: more than one operation, and neither a list itself nor the one operation
    that PEFT has wrapped."""
    is_operation = next(module.children(), None) is None or hasattr(module, "base_layer")
    return not is_operation and not isinstance(module, nn.ModuleList) and _has_parameters(module)


def _part_named(label: str) -> Component | None:
    """The part that a name or a class spells out, if it is attention or the feed-forward."""
    if _BESIDE.match(label):
        label = label.partition(" ")[2]
    if _ATTENTION.search(label):
        return Component.ATTENTION
    return Component.MLP if _MLP.search(label) else None


def _part(attribute: str, module: nn.Module) -> Component | None:
    kind = type(module).__name__
    return None if _WHOLE_LAYER.search(kind) else _part_named(f"{attribute} {kind}")


def _holds_experts(module: nn.Module) -> bool:
    return any(_EXPERTS.search(f"{name} {type(child).__name__}") for name, child in module.named_children())


def _is_feed_forward(module: nn.Module, layer: nn.Module | None) -> bool:
    """Whether a module is the feed-forward of a layer that has attention and spreads the rest over itself: OPT's
    ``fc1`` and ``fc2``, BERT's ``intermediate`` and ``output``."""
    assert layer is not None
    parts = {_part(name, child) for name, child in layer.named_children()}
    if Component.ATTENTION not in parts or Component.MLP in parts or _holds_experts(layer):
        return False
    is_dense = max(weight.dim() for weight in module.parameters()) == 2
    is_operation = hasattr(module, "weight") or hasattr(module, "base_layer")
    return is_dense and (is_operation or type(module).__name__.endswith(("Intermediate", "Output")))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _logical_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape before bitsandbytes packed it."""
    quant_state = getattr(tensor, "quant_state", None)
    return tuple(tensor.shape if quant_state is None else quant_state.shape)


def _coding(parameter: nn.Parameter) -> str:
    quant_state = getattr(parameter, "quant_state", None)
    return _dtype_name(parameter.dtype) if quant_state is None else str(quant_state.quant_type)


def _is_bitsandbytes(tensor: torch.Tensor) -> bool:
    return type(tensor).__module__.partition(".")[0] == "bitsandbytes"


def _quant_state_bytes(parameter: nn.Parameter, module: nn.Module) -> int:
    """What bitsandbytes keeps beside a weight: on the weight itself or, once an int8 layer has run, in the module's
    state."""
    if not _is_bitsandbytes(parameter):
        return 0
    kept = [*tensors_in(vars(parameter)), *tensors_in(getattr(module, "state", None))]
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    sizes.pop(parameter.untyped_storage()._cdata, None)
    return sum(sizes.values())


def _buffers(model: nn.Module) -> Iterator[Buffer]:
    met = set()
    for path, module in model.named_modules():
        for attribute, tensor in module._buffers.items():
            if tensor is not None and id(tensor) not in met:
                met.add(id(tensor))
                yield Buffer(
                    name=f"{path}.{attribute}" if path else attribute,
                    shape=tuple(tensor.shape),
                    dtype=_dtype_name(tensor.dtype),
                    bytes=tensor.numel() * tensor.element_size(),
                    persistent=attribute not in module._non_persistent_buffers_set,
                )


# --- the tree, as data ---------------------------------------------------------------------------------------------


def _weights(node: Node) -> Iterator[Weight]:
    yield from node.weights
    for child in node.children:
        yield from _weights(child)


def _signature(node: Node) -> tuple[Any, ...]:
    """What identical modules have in common: everything but their place."""
    weights = tuple(
        (w.name.rpartition(".")[2], w.component, w.shape, w.dtype, w.bytes, w.trainable, w.tied_to is None)
        for w in node.weights
    )
    return node.kind, weights, tuple((child.name, _signature(child)) for child in node.children)


def _split(node: Node, path: str, layers: dict[tuple[Any, ...], LayerGroup], outside: list[Weight]) -> None:
    """Sorts what is below ``node`` into layers and the rest."""
    outside.extend(node.weights)
    for position, child in enumerate(node.children):
        if child.is_layer:
            key = (path, _signature(child))
            place = int(child.name) if child.name.isdigit() else position
            known = layers.get(key)
            layers[key] = (
                LayerGroup(path, child.kind, (place,), child.each)
                if known is None
                else replace(known, indices=(*known.indices, place))
            )
        else:
            _split(child, f"{path}.{child.name}" if path else child.name, layers, outside)


def _fold(node: Node) -> Node:
    """The same structure, identical members of a list folded into the first of them."""
    folded: dict[Any, Node] = {}
    for child in node.children:
        if not child.name.isdigit():
            folded[child.name] = _fold(child)
            continue
        key = _signature(child)
        known = folded.get(key)
        place = int(child.name)
        folded[key] = (
            replace(_fold(child), indices=(place,))
            if known is None
            else replace(known, indices=(*known.indices, place))
        )
    return replace(node, children=tuple(folded.values()))


# --- accelerate's formula ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrainingStages:
    """What accelerate expects at each stage of a step with Adam and a batch of one, in bytes."""

    model_bytes: int
    gradients_bytes: int
    backward_bytes: int
    optimizer_step_bytes: int


@dataclass(frozen=True, slots=True)
class AccelerateEstimate:
    """A row of ``accelerate estimate-memory``, in bytes; training is None for the dtypes it gives no figure for."""

    dtype: str
    largest_layer_bytes: int
    total_bytes: int
    stages: TrainingStages | None

    @property
    def training_bytes(self) -> int | None:
        """Training with Adam: the largest of the stages."""
        stages = self.stages
        return None if stages is None else max(stages.backward_bytes, stages.optimizer_step_bytes)


def accelerate_estimate(model: nn.Module, dtype: str) -> AccelerateEstimate:
    """What ``accelerate estimate-memory`` says of ``model``, by its own formula.

    Its formula: sizes are those of the float32 model, buffers included, a bool counted as one bit; other dtypes are
    the half, the quarter or the eighth of it, as if everything were converted. The largest layer is the largest module
    without children, or of a class in ``_no_split_modules``. Training takes four times the model in float32; in 16 bit
    a float32 model, half of it again for gradients, and twice for Adam's states, the last being the largest.

    Source: ``calculate_maximum_sizes`` in accelerate's ``utils/modeling.py``, ``gather_data`` and
    ``estimate_training_usage`` in its ``commands/estimate.py``.

    Args:
        model: the model as loaded in float32; one in another dtype or quantized is counted as if it were.
        dtype: one of ``ACCELERATE_DTYPES``; bfloat16, which accelerate's command does not offer, is as float16.

    Raises:
        ValueError: ``dtype`` is none of ``ACCELERATE_DTYPES``.
    """
    if dtype not in ACCELERATE_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(ACCELERATE_DTYPES)}, not {dtype!r}")
    bits: Counter[str] = Counter()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        size = _float32_bits(tensor)
        parts = name.split(".")
        for depth in range(len(parts) + 1):
            bits[".".join(parts[:depth])] += size
    own = [name for name, _ in (*model.named_parameters(recurse=False), *model.named_buffers(recurse=False))]
    unsplit = frozenset(getattr(model, "_no_split_modules", None) or ())
    largest = max((bits[name] for name in (*own, *_accelerate_layers(model, unsplit))), default=0) // 8
    whole = bits[""] // 8
    divisor = {"float32": 1, "float16": 2, "bfloat16": 2, "int8": 4, "int4": 8}[dtype]
    if dtype == "float32":
        stages = TrainingStages(whole, whole, whole * 2, whole * 4)
    elif divisor == 2:
        stages = TrainingStages(whole, whole + whole // 2, whole * 2, whole * 2)
    else:
        stages = None
    return AccelerateEstimate(dtype, largest // divisor, whole // divisor, stages)


def _float32_bits(tensor: torch.Tensor) -> int:
    if tensor.is_floating_point() or _is_bitsandbytes(tensor):
        return math.prod(_logical_shape(tensor)) * 32
    return tensor.numel() * (1 if tensor.dtype is torch.bool else tensor.element_size() * 8)


def _accelerate_layers(module: nn.Module, unsplit: frozenset[str], path: str = "") -> Iterator[str]:
    for attribute, child in module.named_children():
        name = f"{path}.{attribute}" if path else attribute
        if type(child).__name__ in unsplit or next(child.children(), None) is None:
            yield name
        else:
            yield from _accelerate_layers(child, unsplit, name)


# --- a model by name -----------------------------------------------------------------------------------------------


def load_meta(model: str | os.PathLike[str], dtype: str = "float32") -> PreTrainedModel:
    """A transformers model on the meta device, from its config alone: seconds, and no weights.

    The class is the one that the config's ``architectures`` names, where transformers has it; else the sequence to
    sequence, image and text to text, causal or masked language model for such a config, the first that there is; else
    the bare model. Code that comes with a model is never run.

    Args:
        model: a folder that holds ``config.json``, that file itself, or an id on the Hugging Face Hub.
        dtype: one of ``MODEL_DTYPES``. float32 by default, as TRL loads a model given by name.

    Raises:
        ModelError: there is no such model, it is out of reach, its config is broken, or transformers does not know it.
        ValueError: ``dtype`` is none of ``MODEL_DTYPES``.
    """
    if dtype not in MODEL_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(MODEL_DTYPES)}, not {dtype!r}")
    path = find_config(os.fspath(model))
    config = read_config(path, str(model))
    return _build(config, dtype, str(model))


def find_config(model: str) -> Path:
    """The ``config.json`` of a model: in a folder, that file itself, or in the cache, for an id on the Hugging Face
    Hub.

    Raises:
        ModelError: there is none, or it is out of reach.
    """
    path = Path(model).expanduser()
    try:
        if model and path.is_dir():
            path /= "config.json"
            if not path.is_file():
                raise ModelError(f"{model}: the folder holds no config.json")
        if path.is_file():
            return path
    except OSError as reason:
        raise ModelError(f"{model}: cannot be read: {_reason(reason)}") from None
    if path.suffix == ".json" or path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"{model}: no such file or folder")
    return _hub_config(model)


def _hub_config(repo: str) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        # One request without retries, so that a missing network is told at once.
        get_hf_file_metadata(hf_hub_url(repo, "config.json"))
        return Path(hf_hub_download(repo, "config.json"))
    except HFValidationError:
        raise ModelError(f"{repo}: neither a folder, nor a config.json, nor a model id such as owner/name") from None
    except GatedRepoError:
        raise ModelError(
            f"{repo}: the model is gated; accept its terms on https://huggingface.co/{repo} and run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{repo}: no such model on the Hugging Face Hub, or a private one; if it is yours, run `hf auth login`"
        ) from None
    except EntryNotFoundError:
        raise ModelError(f"{repo}: the model has no config.json on the Hugging Face Hub") from None
    except Exception as reason:
        try:
            return Path(hf_hub_download(repo, "config.json", local_files_only=True))
        except EntryNotFoundError:
            raise ModelError(
                f"{repo}: no folder of that name, not in the local cache, and the Hugging Face Hub cannot be reached"
                f" ({_reason(reason)})"
            ) from None


def read_config(path: Path, model: str) -> PreTrainedConfig:
    """What a ``config.json`` says; ``model`` is what to call it.

    Raises:
        ModelError: it is broken, or transformers does not know it.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as reason:
        raise ModelError(f"{model}: {path.name} cannot be read: {_reason(reason)}") from None
    kind = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(kind, str):
        raise ModelError(f"{model}: {path.name} is no model's config: it has no model_type")

    import transformers

    if kind not in transformers.CONFIG_MAPPING:
        raise ModelError(f"{model}: transformers {transformers.__version__} knows no model_type {kind!r}")
    try:
        config: PreTrainedConfig = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as reason:
        raise ModelError(f"{model}: {path.name} is broken: {_reason(reason)}") from None
    return config


def _build(config: PreTrainedConfig, dtype: str, model: str) -> PreTrainedModel:
    try:
        chosen = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            # Attention has no weights of its own, and eager asks for no package that may be missing.
            architecture = architecture_of(config)
            built: PreTrainedModel = architecture._from_config(config, dtype=chosen, attn_implementation="eager")
    except Exception as reason:
        raise ModelError(f"{model}: no model can be built from this config: {_reason(reason)}") from None
    return built


def architecture_of(config: PreTrainedConfig) -> Any:
    """The class of a config's model.

    Raises:
        ModelError: transformers has none.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and getattr(named, "config_class", None) is type(config):
            return named
    for mapping in (
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
        modeling_auto.MODEL_MAPPING,
    ):
        if type(config) in mapping:
            return mapping[type(config)]
    raise ModelError(f"transformers has no model for {type(config).__name__}")


def _reason(error: BaseException) -> str:
    text = one_line(str(error)) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
