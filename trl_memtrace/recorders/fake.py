"""Memory that is never allocated: the storages of fake tensors, seen to come and go by a dispatch mode.

Each new storage is a request to a simulated allocator; a weak reference tells of its end. The clock counts events,
since nothing here takes the time that it would take.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..allocator import CachingAllocator, SimulatedOutOfMemoryError
from ..ledger import Events, Ledger
from . import Recorder, WholeRecording

_ELSEWHERE = -1
"""The address of what is not on the device."""
_DEVICE_OF = torch.ops.prim.device.default
_LIFT = torch.ops.aten.lift_fresh.default
_CONVERT = torch.ops.aten._to_copy.default
_ADD = torch.ops.aten.add.Tensor
_OF_ENGINE = torch.autograd.graph._engine_run_backward.__code__


@dataclass(frozen=True, slots=True)
class _Live:
    size: int
    address: int
    watch: Any


class FakeMemory:
    """The memory of one pretended device.

    Args:
        allocator: the caching allocator that requests go through; None where there is none, as on the CPU.

    Attributes:
        level: bytes allocated now.
        refusal: the first request that did not fit, with what was held then; from there on room is unlimited.
    """

    def __init__(self, allocator: CachingAllocator | None) -> None:
        self.allocator = allocator
        self.level = 0
        self.refusal: SimulatedOutOfMemoryError | None = None
        self.ticks = 0
        self.on_refusal: Callable[[], None] | None = None
        self._live: dict[int, _Live] = {}
        self._events: list[tuple[int, int, int]] | None = None  # tick, address, signed size
        self._baseline: list[tuple[int, int]] = []
        self._next_internal = -1
        self._next_address = 1
        self._reserved_peak = 0

    def allocate(self, key: int, size: int, watch: Any = None) -> None:
        """A storage of ``size`` bytes is there, under a key that no other living one has."""
        if key in self._live:
            self.free(key)
        if self.allocator is not None:
            address = self._request(self.allocator, size)
            size = self.allocator.size_of(address)
            self._reserved_peak = max(self._reserved_peak, self.allocator.reserved_bytes)
        else:
            address, self._next_address = self._next_address, self._next_address + size
        self._live[key] = _Live(size, address, watch)
        self.level += size
        self._note(address, size)

    def free(self, key: int) -> None:
        """A storage has gone."""
        gone = self._live.pop(key, None)
        if gone is None:
            return
        if self.allocator is not None:
            self.allocator.free(gone.address)
        self.level -= gone.size
        self._note(gone.address, -gone.size)

    def holds(self, key: int) -> bool:
        """Whether a storage is there."""
        return key in self._live

    def address_of(self, key: int) -> int:
        """Where a storage is; -1 where it is not on the device."""
        live = self._live.get(key)
        return live.address if live is not None else _ELSEWHERE

    def take(self, sizes: Sequence[int]) -> list[int]:
        """Blocks for a kernel's own use; their keys."""
        keys = [self._next_internal - place for place in range(len(sizes))]
        self._next_internal -= len(sizes)
        for key, size in zip(keys, sizes, strict=True):
            self.allocate(key, size)
        return keys

    def give_back(self, keys: Sequence[int]) -> None:
        """A kernel's own blocks are free again."""
        for key in keys:
            self.free(key)

    def begin(self) -> None:
        """Remember events from here on."""
        self._baseline = [(live.address, live.size) for live in self._live.values()]
        self._events = []
        self._reserved_peak = self.allocator.reserved_bytes if self.allocator is not None else 0

    def end(self) -> WholeRecording:
        """The events since ``begin``."""
        events, self._events = self._events or [], None
        columns = Events.of(*zip(*events, strict=True)) if events else Events.of([], [], [])
        addresses, sizes = zip(*self._baseline, strict=True) if self._baseline else ((), ())
        ledger = Ledger.of(columns, addresses, sizes)
        self._baseline = []
        return WholeRecording(ledger, None, self.level, self._reserved_peak)

    def forget(self) -> None:
        """Remember nothing more."""
        self._events = None
        self._baseline = []

    @property
    def is_recording(self) -> bool:
        """Whether events are remembered."""
        return self._events is not None

    def _note(self, address: int, size: int) -> None:
        if self._events is not None:
            self._events.append((self.ticks, address, size))
            self.ticks += 1

    def _request(self, allocator: CachingAllocator, size: int) -> int:
        try:
            return allocator.allocate(size)
        except SimulatedOutOfMemoryError as refusal:
            self.refusal = self.refusal or refusal.with_traceback(None)  # whose frames hold tensors
            if self.on_refusal is not None:
                self.on_refusal()
            allocator.capacity_bytes = None
            return allocator.allocate(size)


class Kernels(Protocol):
    """What a device's kernels do with memory that is not seen from outside."""

    def prepare(self, func: Any, memory: FakeMemory) -> None:
        """Something is about to be run for which a library may take memory for good."""

    def needs(self, func: Any, args: Any, kwargs: Any) -> Sequence[int]:
        """Bytes of the blocks that an operator holds while it runs, beside its results."""

    def parts(self, func: Any) -> Callable[..., Any] | None:
        """What an operator is made of, if its parts are to be seen; None if it is to be seen as one."""


class StorageWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every new storage of fake tensors on the pretended device, and its end.

    Args:
        memory: is told.
        kernels: what the device's kernels do with memory.
        call: carries an operator out on fake tensors, given it, the types, the arguments and the keyword arguments.
    """

    def __init__(self, memory: FakeMemory, kernels: Kernels, call: Callable[..., Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory = memory
        self._kernels = kernels
        self._call = call
        self._host: dict[int, Any] = {}
        self._is_elsewhere = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No wrapper around every operator that tells the compiler to leave it alone: nothing is compiled here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF:  # asked twice for every operator there is
            return args[0].fake_device
        kwargs = kwargs or {}
        if func is _ADD and _adds_up_gradients(args):
            args[0].constant = None
            return args[0]
        parts = self._kernels.parts(func)
        if parts is not None:
            with self:
                return parts(*args, **kwargs)
        self._kernels.prepare(func, self.memory)
        pinned = kwargs.get("pin_memory")
        if pinned:
            kwargs = {**kwargs, "pin_memory": None}
        result = self._call(func, types, args, kwargs)
        stays = func is _CONVERT and self.is_on_host(args[0]) and kwargs.get("device") is None
        if pinned or stays or func is _LIFT:
            self.keep_on_host(result)
        elif isinstance(result, torch.Tensor):
            self.see(result)
        elif isinstance(result, (tuple, list)):
            for item in result:
                if isinstance(item, torch.Tensor):
                    self.see(item)
        held = self._kernels.needs(func, args, kwargs)
        if held:  # a kernel's results are there before what it holds beside them
            self.memory.give_back(self.memory.take(held))
        return result

    def see(self, tensor: torch.Tensor) -> None:
        """A tensor that is on the device: its storage counts from now on, if it did not before."""
        if self._is_elsewhere:
            self.keep_on_host(tensor)
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._host or not isinstance(tensor, FakeTensor) or tensor.fake_device.type == "meta":
            return
        if not self.memory.holds(key):
            self._allocate(storage)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is made meanwhile is not on the device."""
        before, self._is_elsewhere = self._is_elsewhere, True
        try:
            yield
        finally:
            self._is_elsewhere = before

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has another size: it is taken anew."""
        if storage.device.type == "meta" and storage._cdata not in self._host:
            self.memory.free(storage._cdata)
            self._allocate(storage)

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        key, size, memory = storage._cdata, storage.nbytes(), self.memory
        if size:
            memory.allocate(key, size, weakref.ref(storage, lambda _: memory.free(key)))

    def keep_on_host(self, tensor: torch.Tensor) -> None:
        """A tensor that is in the host's memory and is not counted."""
        storage = tensor.untyped_storage()
        key, host = storage._cdata, self._host
        if not self.memory.holds(key):
            host[key] = weakref.ref(storage, lambda _: host.pop(key, None))

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is in the host's memory."""
        return tensor.untyped_storage()._cdata in self._host


def _adds_up_gradients(args: Any) -> bool:
    """Whether autograd's engine adds a gradient to another that nobody else holds. It does so in place, but not with
    subclasses of tensors, which fake ones are: torch/csrc/autograd/input_buffer.cpp, accumulate."""
    if torch.is_grad_enabled() or sys._getframe(2).f_code is not _OF_ENGINE:
        return False
    one, other = args
    storage = one.untyped_storage()
    alone: bool = torch._C._storage_Use_Count(storage._cdata) == 2  # the gradient and the line above
    return (
        alone and one.shape == other.shape and one.dtype is other.dtype and is_non_overlapping_and_dense_or_false(one)
    )


class FakeRecorder(Recorder):
    """Hands over what one pretended device's memory did between start and stop."""

    device_type = "cpu"
    sees_every_step = False

    def __init__(self, memory: FakeMemory) -> None:
        self._memory = memory

    def address_of(self, storage: Any) -> int:
        return self._memory.address_of(storage._cdata)

    def clock(self) -> int:
        return self._memory.ticks

    def start(self) -> None:
        self._memory.begin()

    def watch(self, storages: Iterable[Any]) -> None:
        pass

    def is_new_high(self) -> bool:
        return False

    def allocated_bytes(self) -> int:
        return self._memory.level

    def peak_bytes(self) -> int | None:
        return None

    def reserved_bytes(self) -> int | None:
        allocator = self._memory.allocator
        return allocator.reserved_bytes if allocator is not None else None

    def stop(self, failed: bool = False) -> WholeRecording | None:
        return self._memory.end() if self._memory.is_recording else None

    def abandon(self) -> None:
        self._memory.forget()

    def close(self) -> None:
        self.abandon()
