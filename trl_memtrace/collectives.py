"""Knows when DDP, FSDP or DeepSpeed moves parameters or gradients between ranks. What is installed here is removed
here.

What they allocate meanwhile is theirs: nothing but the function that is running tells it apart from an activation or
from scratch memory. So the few functions through which they do it are wrapped while anybody listens, where their
modules are loaded; nothing is sent, and nothing is waited for. DeepSpeed's backward and step are more than autograd's
and its inner optimizer's: what it does after the one and around the other belongs to them.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .categories import BUCKETS

GATHERED_WEIGHTS = "gathered_weights"
ALL_GATHER = "all_gather"
REDUCE_SCATTER = "reduce_scatter"
BROADCAST = "broadcast"

WHOLE_BACKWARD, WHOLE_STEP = "whole_backward", "whole_step"
"""No transfers, but phases: a backward with the reduction after it, a step with the gathering around it."""


class CollectiveListener(Protocol):
    """Is told where a transfer begins and ends.

    Args:
        begins: whether it begins, or has ended.
        detail: what it allocates: the role, without its category; or ``WHOLE_BACKWARD``, ``WHOLE_STEP``.
        subject: the function's first argument: a parameter group or a state of FSDP's, a DDP module, an optimizer of
            DeepSpeed's.
    """

    def __call__(self, begins: bool, detail: str, subject: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class _Place:
    module: str
    function: str  # "Class.method", or a function's name
    detail: str


_FSDP2 = "torch.distributed.fsdp._fully_shard._fsdp_param_group"
_ZERO_2, _ZERO_3 = "deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.zero.stage3"
_PLACES = (
    _Place("torch.nn.parallel.distributed", "DistributedDataParallel._pre_forward", BUCKETS),
    _Place("torch.nn.parallel.distributed", "DistributedDataParallel._sync_buffers", BROADCAST),
    _Place(_FSDP2, "FSDPParamGroup.unshard", ALL_GATHER),
    _Place(_FSDP2, "FSDPParamGroup.wait_for_unshard", GATHERED_WEIGHTS),
    _Place(_FSDP2, "FSDPParamGroup.post_backward", REDUCE_SCATTER),
    _Place("torch.distributed.fsdp._flat_param", "FlatParamHandle.pre_unshard", ALL_GATHER),
    _Place("torch.distributed.fsdp._flat_param", "FlatParamHandle.unshard", GATHERED_WEIGHTS),
    _Place("torch.distributed.fsdp._runtime_utils", "_reduce_grad", REDUCE_SCATTER),
    _Place("deepspeed.runtime.engine", "DeepSpeedEngine.backward", WHOLE_BACKWARD),
    _Place("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer.step", WHOLE_STEP),
    _Place(_ZERO_2, "DeepSpeedZeroOptimizer.step", WHOLE_STEP),
    _Place(_ZERO_3, "DeepSpeedZeroOptimizer_Stage3.step", WHOLE_STEP),
    _Place(_ZERO_2, "DeepSpeedZeroOptimizer.setup_buckets", BUCKETS),
    _Place(_ZERO_2, "DeepSpeedZeroOptimizer.average_tensor", REDUCE_SCATTER),
    _Place(_ZERO_2, "all_gather_dp_groups", ALL_GATHER),
    _Place(_ZERO_3, "DeepSpeedZeroOptimizer_Stage3._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads", REDUCE_SCATTER),
    _Place(
        _ZERO_3,
        "DeepSpeedZeroOptimizer_Stage3._DeepSpeedZeroOptimizer_Stage3__avg_scatter_contiguous_grads",
        REDUCE_SCATTER,
    ),
    _Place(
        "deepspeed.runtime.zero.partitioned_param_coordinator",
        "PartitionedParameterCoordinator.fetch_sub_module",
        GATHERED_WEIGHTS,
    ),
    _Place(
        "deepspeed.runtime.zero.partition_parameters",
        "AllGatherCoalescedHandle.wait",
        GATHERED_WEIGHTS,
    ),
)


class CollectiveWatch:
    """Tells listeners of transfers between ranks, on whatever thread they are started."""

    def __init__(self) -> None:
        self._listeners: tuple[CollectiveListener, ...] = ()
        self._originals: list[tuple[Any, str, Any]] = []
        self._lock = threading.Lock()

    def add(self, listener: CollectiveListener) -> None:
        """Tell a listener of every transfer from here on."""
        with self._lock:
            if not self._listeners:
                for place in _PLACES:
                    self._install(place)
            self._listeners = (*self._listeners, listener)

    def remove(self, listener: CollectiveListener) -> None:
        """Tell it no more; one that is not there is passed over."""
        with self._lock:
            self._listeners = tuple(other for other in self._listeners if other != listener)
            if not self._listeners:
                while self._originals:
                    owner, name, original = self._originals.pop()
                    if getattr(vars(owner)[name], "_memtrace", None) is self:
                        setattr(owner, name, original)

    def _install(self, place: _Place) -> None:
        owner: Any = sys.modules.get(place.module)
        *classes, name = place.function.split(".")
        for part in classes:
            owner = getattr(owner, part, None)
        original = vars(owner).get(name) if owner is not None else None
        if callable(original):
            self._originals.append((owner, name, original))
            setattr(owner, name, self._wrap(original, place.detail))

    def _wrap(self, original: Callable[..., Any], detail: str) -> Callable[..., Any]:
        @functools.wraps(original)
        def moving(*args: Any, **kwargs: Any) -> Any:
            listeners = self._listeners
            if not listeners or torch.compiler.is_compiling():
                return original(*args, **kwargs)
            subject = args[0] if args else None
            for listener in listeners:
                listener(True, detail, subject)
            try:
                return original(*args, **kwargs)
            finally:
                for listener in listeners:
                    listener(False, detail, subject)

        moving._memtrace = self  # type: ignore[attr-defined]
        return moving


collective_watch = CollectiveWatch()
