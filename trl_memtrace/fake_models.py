"""Models loaded without their weights: transformers' own loader, with fake tensors where it would read files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

Inside = Callable[[], Any]
"""Gives a context in which tensors are fake and counted."""


def fill(model: nn.Module, load_config: Any, inside: Inside, warm_up: Callable[[int], Any]) -> None:
    """Give every tensor of a model on the meta device a fake storage, in the dtype and the coding that the loader
    gives it.

    Args:
        model: as transformers builds it before it reads weights.
        load_config: transformers' ``LoadStateDictConfig``: dtypes, and how weights are quantized.
        inside: the context of the dry run.
        warm_up: is told how many bytes the loader asks for in one block before anything else.
    """
    from transformers.core_model_loading import build_glob_alternation, dot_natural_key

    plan = load_config.dtype_plan or {}
    wide = build_glob_alternation(list(plan))[0] if plan else None
    quantized = _quantized_modules(model)
    saved = set(model.state_dict())
    places = sorted(_places(model), key=lambda place: (place.path not in saved, dot_natural_key(place.path)))
    tensors = {id(place.tensor): place.tensor for place in places if place.path in saved}
    if load_config.device_map is not None or load_config.hf_quantizer is not None:
        with inside():
            warm_up(sum(_loaded_bytes(tensor, quantized) for tensor in tensors.values()))

    def load(place: _Place) -> torch.Tensor:
        """A tensor as it comes from its file."""
        old = place.tensor
        dtype = torch.float32 if wide is not None and wide.search(place.path) else old.dtype
        if id(old) not in quantized:
            return _fake_like(old, dtype)
        linear: Any = place.module
        shape = linear.out_features, linear.in_features
        return torch.empty(shape, dtype=dtype if dtype.is_floating_point else torch.float16, device="cpu")

    # Of tied tensors the last name by order is taken for the one that is in the file.
    distinct = list({id(place.tensor): place for place in reversed(places)}.values())[::-1]
    unread = iter(distinct)
    loaded: dict[int, torch.Tensor] = {}
    made: dict[int, torch.Tensor] = {}
    with inside():
        for place in distinct:
            for ahead in islice(unread, 1 + _READ_AHEAD - len(loaded)):
                loaded[id(ahead.tensor)] = load(ahead)
            key = id(place.tensor)
            code = quantized.get(key)
            made[key] = code(place.module, loaded.pop(key)) if code else loaded.pop(key)
    for place in places:
        place.names[place.name] = made[id(place.tensor)]


_READ_AHEAD = 4
"""How many tensors are read, by as many threads, while one is coded: ``GLOBAL_WORKERS`` of transformers'
core_model_loading.py where there are as many cores. It decides into which holes coded weights go."""


class _Place(NamedTuple):
    """Where a tensor stands in a model."""

    path: str
    module: nn.Module
    names: dict[str, Any]
    name: str
    tensor: torch.Tensor


def _places(model: nn.Module) -> Iterator[_Place]:
    for prefix, module in model.named_modules():
        for names in (module._parameters, module._buffers):
            for name, tensor in names.items():
                if tensor is not None:
                    yield _Place(f"{prefix}.{name}" if prefix else name, module, names, name, tensor)


def _fake_like(old: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    new = torch.empty(tuple(old.shape), dtype=dtype, device="cpu")
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _loaded_bytes(tensor: torch.Tensor, quantized: dict[int, Any]) -> int:
    """What transformers' ``caching_allocator_warmup`` reckons with."""
    size = tensor.numel() * tensor.itemsize
    if id(tensor) not in quantized:
        return size
    return tensor.numel() // (2 if type(tensor).__name__ == "Params4bit" else 1)


def _quantized_modules(model: nn.Module) -> dict[int, Callable[[Any, torch.Tensor], Any]]:
    """How the weights that bitsandbytes codes are made, by the identity of each."""
    found: dict[int, Callable[[Any, torch.Tensor], Any]] = {}
    for module in model.modules():
        kind = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("bitsandbytes")}
        if "Linear4bit" in kind:
            found[id(module.weight)] = _four_bit
        elif "Linear8bitLt" in kind:
            found[id(module.weight)] = _eight_bit
    return found


def _four_bit(module: Any, weight: torch.Tensor) -> Any:
    """As ``Params4bit._quantize``, which cannot be made of a fake tensor."""
    import bitsandbytes.functional as functional

    old = module.weight
    packed, state = functional.quantize_4bit(
        weight,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
    )
    made: Any = nn.Parameter(packed, requires_grad=False)
    for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage"):
        setattr(made, name, getattr(old, name))
    made.quant_state, made.bnb_quantized, made.module = state, True, module
    module.quant_state = state
    return made


def _eight_bit(module: Any, weight: torch.Tensor) -> Any:
    """As ``Int8Params._quantize``."""
    import bitsandbytes.functional as functional

    rows, scale, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    made: Any = nn.Parameter(rows, requires_grad=False)
    made.CB, made.SCB, made.has_fp16_weights = rows, scale, False
    return made


@contextmanager
def loading_fakes(
    inside: Inside, outside: Inside, on_host: Inside, warm_up: Callable[[int], Any], dtype: torch.dtype | None = None
) -> Iterator[None]:
    """While it lasts, ``from_pretrained`` reads a config and no weights.

    Args:
        inside: the context of the dry run.
        outside: a context in which tensors are real.
        on_host: where a model goes whose loading names no device.
        warm_up: see ``fill``.
        dtype: of models whose loading names none; the config's when not given.
    """
    from transformers import modeling_utils

    base = modeling_utils.PreTrainedModel
    originals = {
        name: base.__dict__[name] for name in ("from_pretrained", "_load_pretrained_model", "_finalize_model_loading")
    }
    resolve = modeling_utils._get_resolved_checkpoint_files

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None and kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = dtype
        with outside():
            return originals["from_pretrained"].__func__(cls, *args, **kwargs)

    def load(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *rest: Any) -> Any:
        fill(model, load_config, inside if load_config.device_map is not None else on_host, warm_up)
        with inside():
            model.tie_weights()
        return None, None

    base.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign, assignment]
    base._load_pretrained_model = staticmethod(load)  # type: ignore[method-assign, assignment]
    base._finalize_model_loading = staticmethod(lambda *args: args[-1])  # type: ignore[method-assign, assignment]
    # Where a config names no dtype, the weights would decide: they are taken for float32.
    unread = None, {"dtype": torch.float32}
    modeling_utils._get_resolved_checkpoint_files = lambda *args, **kwargs: unread
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(base, name, original)
        modeling_utils._get_resolved_checkpoint_files = resolve
