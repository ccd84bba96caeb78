"""TRL's activation offloading in a dry run: its own hooks, with a host that is not counted and streams that are none.

What it keeps on the card meanwhile is its own doing: tensors that were sent lately, tensors that were fetched lately.
"""

from __future__ import annotations

import functools
import sys
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from .patching import Put, put_until

if TYPE_CHECKING:
    from .dryrun import DryRun

_MODULE = "trl.models.activation_offloading"


class _Stream:
    """Does all at once."""

    def nothing(self, *args: Any, **kwargs: Any) -> None:
        """There is nothing to wait for."""

    wait_stream = wait_event = record_event = synchronize = nothing


class _OnHost:
    """A tensor that was sent to the host; it comes back as another one on the card."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A copy on the card."""
        return self._tensor.clone()


def offload_fakes(put: Put, dry: DryRun) -> None:
    """Have TRL offload fake tensors, where its module is loaded and CUDA is pretended."""
    module: Any = sys.modules.get(_MODULE)
    if module is None or not dry.is_cuda or hasattr(module.OffloadActivations.__init__, "__wrapped__"):
        return
    make, data_ptr = module.OffloadActivations.__init__, torch.UntypedStorage.data_ptr
    card = SimpleNamespace(
        Stream=_Stream,
        current_stream=_Stream,
        stream=lambda stream: nullcontext(),
        empty_cache=lambda: torch.cuda.empty_cache(),
    )

    @functools.wraps(make)
    def make_offloading(self: Any, *args: Any, **kwargs: Any) -> None:
        with ExitStack() as stack:
            cpu = torch.device("cpu")  # where fakes are
            put_until(stack, torch.accelerator, "current_accelerator", lambda *args: cpu)
            put_until(stack, torch, "get_device_module", lambda *args: card)
            make(self, *args, **kwargs)
        send = self.pack_hook

        def pack(activation: torch.Tensor) -> int:
            number: int = send(activation)
            kept, was_sent, *rest = self.tracker[number]
            if was_sent:
                self.tracker[number] = (_OnHost(kept), was_sent, *rest)
            return number

        self.pack_hook = pack

    def place(self: Any) -> int:
        """Storages of fakes are told apart as others are by their addresses."""
        return int(self._cdata if self.device.type == "meta" else data_ptr(self))

    put(module.OffloadActivations, "__init__", make_offloading)
    put(torch.UntypedStorage, "data_ptr", place)
    put(torch.Tensor, "record_stream", lambda tensor, stream: None)
