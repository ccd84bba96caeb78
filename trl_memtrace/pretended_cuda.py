"""What a script asks of ``torch.cuda``, answered by a dry run: the pretended card is there, and counted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .dryrun import DryRun


def pretend_cuda(put: Callable[[Any, str, Any], None], dry: DryRun) -> None:
    """Answer for ``torch.cuda``, and for autocast to it.

    ``torch.cuda.is_available`` stays False: what asks it would go on to call CUDA itself.
    """
    name = dry.device.name if dry.device is not None else "a pretended card"
    allocator = dry.memory.allocator

    def count(attribute: str) -> Callable[..., int]:
        return lambda *args, **kwargs: getattr(allocator, attribute) if allocator is not None else 0

    def forget_peaks(*args: Any, **kwargs: Any) -> None:
        """The dry run needs the peaks for itself."""

    def empty_cache() -> None:
        if allocator is not None:
            allocator.empty_cache()

    def memory_info(*args: Any, **kwargs: Any) -> tuple[int, int]:
        total = dry.device.total_bytes if dry.device is not None else 1 << 40
        return max(total - dry.context_bytes - count("reserved_bytes")(), 0), total

    answers: dict[str, Callable[..., Any]] = {
        "synchronize": forget_peaks,
        "set_device": forget_peaks,
        "ipc_collect": forget_peaks,
        "reset_peak_memory_stats": forget_peaks,
        "reset_max_memory_allocated": forget_peaks,
        "reset_max_memory_cached": forget_peaks,
        "empty_cache": empty_cache,
        "memory_allocated": count("allocated_bytes"),
        "max_memory_allocated": count("allocated_peak_bytes"),
        "memory_reserved": count("reserved_bytes"),
        "max_memory_reserved": count("reserved_peak_bytes"),
        "mem_get_info": memory_info,
        "current_device": lambda: 0,
        "get_device_name": lambda *args, **kwargs: name,
        "get_device_capability": lambda *args, **kwargs: dry.capability,
    }
    for function, answer in answers.items():
        put(torch.cuda, function, answer)
    put(torch.autocast, "__init__", _on_cpu(torch.autocast.__init__))


def _on_cpu(make: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(make)
    def make_autocast(self: Any, device_type: str, dtype: Any = None, *args: Any, **kwargs: Any) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.get_autocast_dtype("cuda")
        make(self, device_type, dtype, *args, **kwargs)

    return make_autocast


def on_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a function of PyTorch, with the CPU, where fake tensors are, for every CUDA device."""
    if any(map(_is_cuda, args)):
        args = tuple(_CPU if _is_cuda(value) else value for value in args)
    if _is_cuda(kwargs.get("device")):
        kwargs = {**kwargs, "device": _CPU}
    return args, kwargs


_CPU = torch.device("cpu")


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))
