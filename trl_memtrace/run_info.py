"""What a record says about its run: the device, the versions, the model, the trainer and the settings that decide
memory."""

from __future__ import annotations

import logging
import os
import platform
import time
from typing import TYPE_CHECKING, Any

from .records import RunHeader, Summary
from .sharding import class_name, strategy, whole_parameters
from .tracer import device_of
from .versions import versions

if TYPE_CHECKING:
    from .device import Line

logger = logging.getLogger(__name__)

_SETTINGS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "activation_offloading",
    "optim",
    "optim_args",
    "learning_rate",
    "max_grad_norm",
    "bf16",
    "fp16",
    "tf32",
    "torch_compile",
    "max_length",
    "max_completion_length",
    "num_generations",
    "packing",
    "padding_free",
    "loss_type",
    "use_liger_kernel",
    "torch_empty_cache_steps",
    "fsdp",
    "deepspeed",
    "max_steps",
    "num_train_epochs",
    "seed",
)


def describe_run(args: Any, model: Any, trainer: Any = None, policy: dict[str, Any] | None = None) -> RunHeader:
    """The head of a record.

    Args:
        args: the trainer's ``TrainingArguments``.
        model: what is trained.
        trainer: the trainer, where it is known.
        policy: which steps are traced.
    """
    settings = args.to_dict()
    return RunHeader(
        device=describe_device(*device_of(model)),
        versions=versions(),
        model=describe_model(model),
        trainer={
            "class": type(trainer).__name__ if trainer is not None else None,
            "world_size": args.world_size,
            "rank": args.process_index,
            "strategy": strategy(model, getattr(trainer, "model_wrapped", None)),
            "started": round(time.time(), 3),
            "policy": policy or {},
        },
        args={name: settings[name] for name in _SETTINGS if name in settings},
    )


def describe_device(device_type: str, index: int) -> dict[str, Any]:
    """Name and bytes of the device that the model is on."""
    if device_type == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(index)
        return {"type": device_type, "index": index, "name": properties.name, "total_bytes": properties.total_memory}
    if device_type == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
        return {"type": device_type, "name": platform.processor() or platform.machine(), "total_bytes": total}
    return {"type": device_type, "name": device_type, "total_bytes": None}


def look_beyond(summary: Summary) -> tuple[Line, ...]:
    """What of a CUDA device's memory lies beyond the allocator, now; the summary is told the context and the process's
    peak.

    Returns:
        the lines that add up to what ``nvidia-smi`` shows; none for another kind of device.
    """
    device = summary.header.device
    if device.get("type") != "cuda":
        return ()
    import torch

    from .device import balance, read_usage

    index = int(device.get("index") or 0)
    usage = read_usage(index)
    reserved = torch.cuda.memory_reserved(index)
    if usage.process_bytes is not None:
        summary.context_bytes = max(usage.process_bytes - reserved, 0)
        if summary.reserved_peak_bytes is not None:
            summary.process_peak_bytes = summary.reserved_peak_bytes + summary.context_bytes
    return balance(usage, torch.cuda.memory_allocated(index), reserved)


def describe_model(model: Any) -> dict[str, Any]:
    """Class, name, parameters and bytes of the whole model, whatever part of it this rank holds, a shared parameter
    counted once, a quantized one by the elements that it stores; and what it is made of, as ``trl-memtrace model
    --json`` says it."""
    parameters = list(whole_parameters(model))
    config = getattr(model, "config", None)
    return {
        "class": class_name(model),
        "name_or_path": getattr(config, "_name_or_path", None) or None,
        "model_type": getattr(config, "model_type", None),
        "parameters": sum(elements for elements, _, _ in parameters),
        "trainable_parameters": sum(elements for elements, _, trained in parameters if trained),
        "bytes": sum(elements * size for elements, size, _ in parameters),
        **_made_of(model, sum(elements for elements, _, _ in parameters)),
    }


def _made_of(model: Any, parameters: int) -> dict[str, Any]:
    """Components and layers of a model; nothing where it cannot be told, or only a part of the model is here."""
    from .model import describe

    try:
        described = describe(model).to_dict()
    except Exception as problem:  # whatever somebody's model does when it is looked at
        logger.debug("the model is not described", exc_info=problem)
        return {}
    if described["parameters"] != parameters:
        return {}
    return {name: described[name] for name in ("components", "layers", "layer_parameters", "non_layer_parameters")}
