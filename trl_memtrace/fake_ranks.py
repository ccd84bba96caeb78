"""A dry run as the first of several ranks: a process group that nobody else is in, and what accelerate, DDP and FSDP
would ask the others, or a card."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensor

from .errors import MemtraceError
from .fake_deepspeed import pretend_deepspeed
from .patching import Put

if TYPE_CHECKING:
    from .dryrun import DryRun

_RANKS_OF_A_NODE = 8


class RankError(MemtraceError):
    """This process is a rank already, or torch cannot pretend to be one."""


@contextmanager
def first_of(ranks: int, put: Put, dry: DryRun) -> Iterator[None]:
    """Be rank 0 of ``ranks``, as ``accelerate launch`` would have it. All of it is taken back.

    Raises:
        RankError: this process is one of several already, or torch was built without distributed training.
    """
    if not distributed.is_available():
        raise RankError("torch was built without torch.distributed: only one rank can be pretended")
    if distributed.is_initialized():
        raise RankError("this process is one of several ranks already: a dry run makes its own")
    with ExitStack() as stack:
        stack.enter_context(_environment(ranks))
        stack.enter_context(_accelerate_anew())
        _accelerate(put)
        stack.enter_context(_group(ranks))
        stack.enter_context(pretend_deepspeed(put, dry))
        _ddp(put)
        _fsdp(put, dry, ranks)
        yield


@contextmanager
def _environment(ranks: int) -> Iterator[None]:
    before = dict(os.environ)
    local = min(ranks, _RANKS_OF_A_NODE)
    os.environ.update(RANK="0", WORLD_SIZE=str(ranks), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(local))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500")
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # DDP is given no device's number
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _group(ranks: int) -> Iterator[None]:
    """A process group whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


# --- accelerate ------------------------------------------------------------------------------------------------------


@contextmanager
def _accelerate_anew() -> Iterator[None]:
    """accelerate finds out anew where it is, and knows afterwards what it knew before."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [kind._shared_state for kind in (AcceleratorState, GradientState, PartialState)]
    before = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        yield
    finally:
        for state, known in zip(states, before, strict=True):
            state.clear()
            state.update(known)


def _accelerate(put: Put) -> None:
    """The tensors are on the CPU, and are to be trained as on one card of several."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, dataclasses

    def choose(self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None) -> Any:
        return backend or "fake", DistributedType.MULTI_GPU

    def stay_on_cpu(self: Any) -> None:
        self.device = torch.device("cpu")

    put(PartialState, "_prepare_backend", choose)
    put(PartialState, "set_device", stay_on_cpu)
    put(dataclasses, "is_cuda_available", lambda: True)  # for FSDP1, which it asks where to put what rank 0 sends


# --- FSDP ------------------------------------------------------------------------------------------------------------


def _fsdp(put: Put, dry: DryRun, ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import _init_utils
    from torch.distributed.fsdp._fully_shard import _fsdp_init, _fsdp_param
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    mesh = init_device_mesh("cpu", (ranks,))  # made here, since it works with the values of tensors
    put(_fsdp_init, "init_device_mesh", lambda *args, **kwargs: mesh)
    move = _fsdp_init._move_states_to_device

    def to_device(params: Any, buffers: Any, device: Any) -> None:
        for tensor in (*params, *buffers):
            if dry.watch.is_on_host(tensor):
                tensor.data = tensor.clone()
        move(params, buffers, device)

    put(_fsdp_init, "_move_states_to_device", to_device)
    put(_init_utils, "_sync_module_params_and_buffers", lambda *args: None)  # FSDP1's; it would send values
    put(_fsdp_param, "_chunk_with_empty", _first_chunk)
    shape = ShardingPropagator._propagate_tensor_meta_non_cached

    def shape_elsewhere(self: Any, operator: Any) -> Any:
        """Of the whole tensor DTensor wants the shapes alone, and has fake tensors too for that."""
        with dry.watch.elsewhere():
            return shape(self, operator)

    put(ShardingPropagator, "_propagate_tensor_meta_non_cached", shape_elsewhere)
    resize = torch.UntypedStorage.resize_

    def resize_seen(self: Any, size: int) -> Any:
        """FSDP frees what it has gathered by making its storage small, and keeps the tensor."""
        resized = resize(self, size)
        dry.watch.resized(self)
        return resized

    put(torch.UntypedStorage, "resize_", resize_seen)
    # accelerate finds the parameters of its optimizer again by their addresses
    put(FakeTensor, "data_ptr", lambda self: self.untyped_storage()._cdata + self.storage_offset() * self.itemsize)


def _first_chunk(tensor: torch.Tensor, chunks: int, dim: int) -> list[torch.Tensor]:
    """As ``torch.chunk`` deals them out. FSDP asks for the first and for its own, and these are one here; to make a
    thousand for each parameter would take most of the time."""
    return [tensor.narrow(dim, 0, -(-tensor.size(dim) // chunks))] * chunks


# --- DDP -------------------------------------------------------------------------------------------------------------


def _ddp(put: Put) -> None:
    """What DDP asks the others before it begins, it is told here, where it would read values; and what the fake group
    gives back for a bucket is nothing, but the reducer wants the bucket."""
    from torch.nn.parallel import distributed as ddp

    put(ddp, "_verify_param_shape_across_processes", lambda *args: None)
    put(ddp, "_sync_module_states", lambda *args, **kwargs: None)
    make = ddp.DistributedDataParallel.__init__

    @functools.wraps(make)
    def make_with_hook(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.register_comm_hook(None, lambda state, bucket: _reduced(bucket))  # whose annotations DDP would check
        self.reducer = _Steady(self.reducer)

    put(ddp.DistributedDataParallel, "__init__", make_with_hook)


class _Steady:
    """A reducer that keeps the buckets that it begins with. After the first backward it would order them anew, in
    other blocks of as many bytes together, and asks the others whether they agree."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def _reduced(bucket: Any) -> torch.futures.Future[torch.Tensor]:
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
