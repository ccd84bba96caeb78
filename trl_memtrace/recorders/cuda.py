"""CUDA memory, as the caching allocator itself remembers it.

The allocator keeps a ring of its latest allocations and frees (``torch.cuda.memory._record_memory_history``, here
without stacks).
It is always on, cleared as each step begins, and read only for the steps that matter: those that were chosen, and any
whose peak is a new high, which is known when the step has ended. One read gives the history and what the segments
hold; what was there before the step is found by undoing the one from the other, as for a snapshot file.
"""

from __future__ import annotations

import functools
import inspect
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from . import Recorder, WholeRecording
from .snapshot import Snapshot, read_history

_FIRST_ENTRIES = 100_000
_MOST_ENTRIES = 2_000_000
_RECORD_HISTORY = "_record_memory_history"


class Driver(Protocol):
    """The few calls into PyTorch that this recorder makes."""

    def history_enabled(self) -> bool:
        """Whether the allocator keeps a history now."""

    def record_history(self, **options: Any) -> None:
        """``torch.cuda.memory._record_memory_history``."""

    def snapshot(self) -> dict[str, Any]:
        """History and segments, as ``torch.cuda.memory._snapshot`` gives them."""

    def stats(self, device: int) -> dict[str, Any]:
        """``torch.cuda.memory_stats_as_nested_dict``."""

    def attach_refusal_observer(self, tell: Callable[[int, int, int, int], None]) -> bool:
        """Have ``tell`` called with device, bytes asked for, bytes the device has allocated and has free, before an
        allocation fails. Whether that can be done."""

    def on_foreign_history(self, tell: Callable[[], None]) -> Callable[[], None]:
        """Have ``tell`` called when somebody else switches the history on or off. Returns what undoes it."""


class TorchDriver(Driver):
    """The real one."""

    def __init__(self) -> None:
        import torch

        self._memory: Any = torch.cuda.memory
        self._c: Any = torch._C
        self._record: Callable[..., None] = getattr(self._memory, _RECORD_HISTORY)
        self._options = set(inspect.signature(self._record).parameters)

    def history_enabled(self) -> bool:
        enabled = getattr(self._c, "_cuda_isHistoryEnabled", None)
        return bool(enabled()) if enabled is not None else False

    def record_history(self, **options: Any) -> None:
        self._record(**{name: value for name, value in options.items() if name in self._options})

    def snapshot(self) -> dict[str, Any]:
        data: dict[str, Any] = self._c._cuda_memorySnapshot(None)
        return data

    def stats(self, device: int) -> dict[str, Any]:
        stats: dict[str, Any] = self._memory.memory_stats_as_nested_dict(device)
        return stats

    def attach_refusal_observer(self, tell: Callable[[int, int, int, int], None]) -> bool:
        attach = getattr(self._c, "_cuda_attach_out_of_memory_observer", None)
        if attach is None:
            return False
        attach(tell)
        return True

    def on_foreign_history(self, tell: Callable[[], None]) -> Callable[[], None]:
        original = getattr(self._memory, _RECORD_HISTORY)

        @functools.wraps(original)
        def record_memory_history(*args: Any, **kwargs: Any) -> None:
            tell()
            original(*args, **kwargs)

        def undo() -> None:
            if getattr(self._memory, _RECORD_HISTORY) is record_memory_history:
                setattr(self._memory, _RECORD_HISTORY, original)

        setattr(self._memory, _RECORD_HISTORY, record_memory_history)
        return undo


class _Refusals:
    """Tells recorders when an allocation is about to fail. An observer cannot be detached, so one is attached for the
    life of the process; it allocates nothing on the device."""

    def __init__(self) -> None:
        self._recorders: weakref.WeakSet[CudaRecorder] = weakref.WeakSet()
        self._attached = False

    def follow(self, recorder: CudaRecorder, driver: Driver) -> None:
        self._recorders.add(recorder)
        if not self._attached:
            self._attached = driver.attach_refusal_observer(self._refused)

    def _refused(self, device: int, size: int, allocated: int, free: int) -> None:
        for recorder in list(self._recorders):
            with suppress(Exception):  # it runs inside the allocator, and training's own error is on its way
                recorder.note_refusal(device, size)


_refusals = _Refusals()


class CudaRecorder(Recorder):
    """Records the allocations of one CUDA device, by all threads.

    A history that the user keeps himself is read and never cleared, whether it was on before or is switched on later.
    Peak counters are read and never reset.

    Args:
        device: its index.
        stacks: also keep the Python stack of every allocation.
        driver: how to reach PyTorch.
    """

    device_type = "cuda"
    sees_every_step = True

    def __init__(self, device: int = 0, *, stacks: bool = False, driver: Driver | None = None) -> None:
        self._device = device
        self._driver = driver or TorchDriver()
        self._stacks = stacks
        self._entries = _FIRST_ENTRIES
        self._theirs = self._driver.history_enabled()
        self._forget_foreign = self._driver.on_foreign_history(self._yield_history)
        self._switched_on = False
        self._refused: tuple[int, dict[str, Any]] | None = None
        self._began_us = 0
        self._highest = 0
        _refusals.follow(self, self._driver)

    def clock(self) -> int:
        return time.time_ns() // 1000 * 1000  # the history has microseconds

    def start(self) -> None:
        self._refused = None
        self._highest = max(self._highest, self._allocated("peak"))
        if not self._theirs:
            self._driver.record_history(
                enabled="all",
                context="alloc" if self._stacks else None,
                stacks="python",
                max_entries=self._entries,
                clear_history=True,
            )
            self._switched_on = True
        self._began_us = self.clock() // 1000

    def watch(self, storages: Iterable[Any]) -> None:
        pass  # the allocator's history tells when they end

    def is_new_high(self) -> bool:
        """Whether the step under way has held more than any before."""
        return self._allocated("peak") > self._highest

    def allocated_bytes(self) -> int:
        return self._allocated("current")

    def peak_bytes(self) -> int:
        return self._allocated("peak")

    def reserved_bytes(self) -> int:
        return int(self._driver.stats(self._device)["reserved_bytes"]["all"]["current"])

    def stop(self, failed: bool = False) -> WholeRecording | None:
        refused, data = self._refused if failed and self._refused is not None else (None, self._driver.snapshot())
        peak, end = self._allocated("peak"), self._allocated("current")
        traces = data.get("device_traces") or []
        trace = traces[self._device] if self._device < len(traces) else []
        if len(trace) >= self._entries and not self._theirs:
            self._entries = min(2 * self._entries, _MOST_ENTRIES)
        step = [entry for entry in trace if entry.get("time_us", self._began_us) >= self._began_us]
        if not step:
            return None
        traces = [*traces]
        traces[self._device] = step
        history = read_history(Snapshot(Path("memory"), {**data, "device_traces": traces}), self._device)
        new_high = peak if peak > self._highest else None
        self._highest = max(self._highest, peak)
        return WholeRecording(
            ledger=replace(history.ledger, time_ns=history.time_us * 1000),
            peak_bytes=new_high,
            end_bytes=end if refused is None else history.end_bytes,
            reserved_bytes=int(history.reserved.max()),
            refused_bytes=refused,
        )

    def abandon(self) -> None:
        pass  # the next start clears the ring

    def close(self) -> None:
        self._forget_foreign()
        if self._switched_on and not self._theirs:
            self._driver.record_history(enabled=None)
        self._switched_on = False

    def note_refusal(self, device: int, size: int) -> None:
        """Memory is being refused: keep what the allocator holds now, before the exception lets go of anything."""
        if device == self._device:
            self._refused = size, self._driver.snapshot()

    def _yield_history(self) -> None:
        """Somebody else has taken the history over: from now on it is his."""
        self._theirs = True

    def _allocated(self, which: str) -> int:
        return int(self._driver.stats(self._device).get("allocated_bytes", {}).get("all", {}).get(which, 0))
