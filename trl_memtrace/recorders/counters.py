"""Devices whose allocator has counters and no history (XPU, MPS, or CUDA where an API is missing): books at
boundaries.

The allocator's counter is read wherever a phase or a module begins or ends, and the peak counter at the end. What
owners hold is known; the rest of each reading is unattributed, and so is what the peak counter has beyond the highest
reading.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from . import Recorder, Samples


class Counters(Protocol):
    """The counters of one device, in bytes."""

    def allocated(self) -> int:
        """What is allocated now."""

    def peak(self) -> int | None:
        """The most that was, since whenever it was last reset; None where nothing counts that."""

    def reserved(self) -> int | None:
        """What the caching allocator has reserved now; None where nothing counts that."""


class AcceleratorCounters(Counters):
    """Those of ``torch.accelerator``, and of the device's own module where it lacks them."""

    def __init__(self, device_type: str, index: int) -> None:
        import torch

        self._device = torch.device(device_type, index)
        self._modules = getattr(torch, "accelerator", None), getattr(torch, device_type, None)
        if self._ask("memory_allocated", "current_allocated_memory") is None:
            raise NotImplementedError(f"torch counts no memory of {device_type} devices")

    def allocated(self) -> int:
        return self._ask("memory_allocated", "current_allocated_memory") or 0

    def peak(self) -> int | None:
        return self._ask("max_memory_allocated")

    def reserved(self) -> int | None:
        return self._ask("memory_reserved", "driver_allocated_memory")

    def _ask(self, *names: str) -> int | None:
        for module in self._modules:
            for name in names:
                counter = getattr(module, name, None)
                if counter is not None:
                    try:
                        return int(counter() if name.endswith("allocated_memory") else counter(self._device))
                    except (RuntimeError, NotImplementedError, ValueError, AssertionError):
                        continue
        return None


class CountersRecorder(Recorder):
    """Reads a device's counters at every boundary. Peak counters are read and never reset.

    Args:
        device_type: what the device is called.
        counters: its counters.
    """

    sees_every_step = True

    def __init__(self, device_type: str, counters: Counters) -> None:
        self.device_type = device_type
        self._counters = counters
        self._highest = 0
        self._times: list[int] = []
        self._levels: list[int] = []

    def clock(self) -> int:
        now = time.time_ns()
        self._times.append(now)
        self._levels.append(self._counters.allocated())
        return now

    def start(self) -> None:
        self._highest = max(self._highest, self._counters.peak() or 0)
        self._times, self._levels = [], []

    def watch(self, storages: Iterable[Any]) -> None:
        pass  # owners are asked again at every boundary

    def is_new_high(self) -> bool:
        return (self._counters.peak() or max(self._levels, default=0)) > self._highest

    def allocated_bytes(self) -> int:
        return self._counters.allocated()

    def peak_bytes(self) -> int | None:
        return self._counters.peak()

    def reserved_bytes(self) -> int | None:
        return self._counters.reserved()

    def stop(self, failed: bool = False) -> Samples | None:
        self.clock()
        peak = self._counters.peak()
        new_high = peak if peak is not None and peak > self._highest else None
        self._highest = max(self._highest, peak or max(self._levels))
        times, levels = np.array(self._times, np.int64), np.array(self._levels, np.int64)
        self.abandon()
        return Samples(times, levels, new_high)

    def abandon(self) -> None:
        self._times, self._levels = [], []

    def close(self) -> None:
        self.abandon()
