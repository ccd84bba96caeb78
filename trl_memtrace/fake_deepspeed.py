"""DeepSpeed's own engine and its ZeRO optimizers on fake tensors: what they would ask a card, the other ranks or a
value for."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from .patching import Put

if TYPE_CHECKING:
    from .dryrun import DryRun

_REMEMBERING = ("comm.comm", "utils.groups", "accelerator.real_accelerator")
"""Its modules that keep what they have found out of a process: groups, backends, the accelerator."""

_OPTIMIZERS = (
    ("runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer"),
    ("runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3"),
    ("runtime.bf16_optimizer", "BF16_Optimizer"),
)


@contextmanager
def pretend_deepspeed(put: Put, dry: DryRun) -> Iterator[None]:
    """Where DeepSpeed is installed, let it run on the pretended card. Afterwards it knows what it knew before."""
    if find_spec("deepspeed") is None:
        yield
        return
    modules = _imported()
    with ExitStack() as stack:
        for name in _REMEMBERING:
            stack.callback(_restore, modules[name], dict(vars(modules[name])))
        real_accelerator = modules["accelerator.real_accelerator"]
        real_accelerator.ds_accelerator = _accelerator(dry)
        modules["comm.comm"].cdb = None
        put(torch.nn.functional, "linear", torch.nn.functional.linear)  # ZeRO-3 puts its own there, and leaves it
        put(modules["comm.torch"], "build_shm_op", lambda: None)  # for CPUs, and compiled first
        for name, optimizer in _OPTIMIZERS:
            _let_all_gradients_be_finite(put, modules[name], getattr(modules[name], optimizer))
        # A model is loaded whole in the host's memory, and parted when the engine is made.
        import transformers.modeling_utils

        put(transformers.modeling_utils, "is_deepspeed_zero3_enabled", lambda: False)
        yield


def _imported() -> dict[str, Any]:
    from importlib import import_module

    names = (*_REMEMBERING, "comm.torch", "runtime.zero.muon.muon_optimizer", *(name for name, _ in _OPTIMIZERS))
    import_module("deepspeed")
    return {name: import_module(f"deepspeed.{name}") for name in names}


def _restore(module: Any, known: dict[str, Any]) -> None:
    vars(module).update(known)


def _accelerator(dry: DryRun) -> Any:
    """The accelerator for CPUs, where the tensors are, with the memory of the pretended card."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class PretendedCard(CPU_Accelerator):  # type: ignore[misc]
        def available_memory(self, device_index: Any = None) -> int:
            free: int = torch.cuda.mem_get_info()[0]
            return free

        def total_memory(self, device_index: Any = None) -> int:
            total: int = torch.cuda.mem_get_info()[1]
            return total

        def empty_cache(self) -> None:
            torch.cuda.empty_cache()

        def on_accelerator(self, tensor: torch.Tensor) -> bool:
            return not dry.watch.is_on_host(tensor)

        def is_fp16_supported(self) -> bool:
            return True

    return PretendedCard()


def _let_all_gradients_be_finite(put: Put, module: Any, optimizer: Any) -> None:
    """A question about values is answered yes, and here that would be an overflow: the step would be left out."""
    if hasattr(module, "is_invalid_grad_norm"):
        put(module, "is_invalid_grad_norm", lambda norm: False)
    look = vars(optimizer).get("has_overflow")
    if look is not None:

        @functools.wraps(look)
        def look_in_vain(self: Any, *args: Any, **kwargs: Any) -> bool:
            look(self, *args, **kwargs)
            return False

        put(optimizer, "has_overflow", look_in_vain)
