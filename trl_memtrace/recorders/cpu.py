"""CPU memory, as PyTorch's own profiler sees it, with every operator left out.

With ``profile_memory`` on and only ``USER_SCOPE`` recorded, the profiler notes each allocation and free of the CPU
allocator and nothing else. It cannot say what was alive before it started, and is silent when that is freed; both come
from the owners: their storages are the baseline, and a weak reference tells when one of them goes.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._C._autograd import _disable_profiler, _enable_profiler, _prepare_profiler, _profiler_enabled
from torch._C._profiler import (
    ProfilerActivity,
    ProfilerConfig,
    ProfilerState,
    RecordScope,
    _ExperimentalConfig,
    _ExtraFields_Allocation,
)
from torch.autograd import profiler as _torch_profiler

from ..ledger import Events, Int64Array
from . import Recorder, RecorderBusyError, Recording

_KINETO_LOG_LEVEL = "KINETO_LOG_LEVEL"
_SILENT = "6"  # Kineto prints "USDT: profiler_start" and "profiler_stop" at level 5 for every recording
_CPP_WARNING, _CPP_ERROR = 1, 2
_CPU_DEVICE = torch.device("cpu")
_ALLOCATION_FIELDS = attrgetter("ptr"), attrgetter("alloc_size"), attrgetter("total_allocated")

_End = tuple[int, int, int]
"""When a storage ended, where it was, and by when it was there: an address may be given out again and again."""


_one_at_a_time = threading.Lock()
"""Held while a recorder records: the profiler is one for the whole process, and two threads in it crash."""

_PATIENCE_SECONDS = 10.0


class _ForeignProfilers:
    """Knows whether somebody else's ``torch.profiler`` is at work, and makes ours give way before theirs starts.

    Only one profiler can run on a thread, and one that is started while ours runs would fail. So while any recorder
    exists, the three functions by which ``torch.autograd.profiler`` drives the profiler are wrapped.
    """

    _NAMES = ("_prepare_profiler", "_enable_profiler", "_disable_profiler")

    def __init__(self) -> None:
        self._users: weakref.WeakSet[CpuRecorder] = weakref.WeakSet()
        self._originals: dict[str, Callable[..., Any]] = {}
        self._lock = threading.RLock()  # a recorder may be let go of in the middle of either
        self.active = False

    def add(self, recorder: CpuRecorder) -> None:
        with self._lock:
            if not self._originals and all(hasattr(_torch_profiler, name) for name in self._NAMES):
                self.active = _profiler_enabled() or _warming_up()
                for name in self._NAMES:
                    self._originals[name] = getattr(_torch_profiler, name)
                    setattr(_torch_profiler, name, self._wrap(name, self._originals[name]))
            self._users.add(recorder)

    def remove(self, recorder: CpuRecorder) -> None:
        with self._lock:
            self._users.discard(recorder)
            if not self._users:
                for name, original in self._originals.items():
                    if getattr(getattr(_torch_profiler, name), "_memtrace", None) is self:
                        setattr(_torch_profiler, name, original)
                self._originals.clear()

    def _wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "_disable_profiler":
                self.active = False
                return original(*args, **kwargs)
            for recorder in list(self._users):
                recorder.give_way()
            self.active = True  # so that no recording begins while we wait for one of another thread: two would crash
            if _one_at_a_time.acquire(timeout=_PATIENCE_SECONDS):
                _one_at_a_time.release()
            self.active = False
            result = original(*args, **kwargs)
            self.active = True
            return result

        call._memtrace = self  # type: ignore[attr-defined]
        return call


_foreign_profilers = _ForeignProfilers()


def _warming_up() -> bool:
    """Whether a scheduled torch.profiler has been prepared and not yet enabled; nothing but the object itself shows
    it."""
    from torch.profiler import ProfilerAction, profile

    return any(
        profiler.current_action is ProfilerAction.WARMUP and getattr(profiler, "profiler", None) is not None
        for profiler in gc.get_objects()
        if type(profiler) is profile
    )


@contextmanager
def _silent_kineto() -> Iterator[None]:
    """Kineto reads how much to print once, when it is first prepared; what the user has chosen stands."""
    chosen = os.environ.get(_KINETO_LOG_LEVEL)
    if chosen is None:
        os.environ[_KINETO_LOG_LEVEL] = _SILENT
    try:
        yield
    finally:
        if chosen is None:
            os.environ.pop(_KINETO_LOG_LEVEL, None)


@functools.cache
def _cpp_log_level() -> ctypes.c_int | None:
    """PyTorch's C++ log level, as the variable that it is; None where it cannot be had."""
    library = next(Path(torch.__file__).parent.glob("lib/*c10.[sd]*"), None)
    try:
        return ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level") if library else None
    except (OSError, ValueError):
        return None


def _activities() -> set[ProfilerActivity]:
    """Memory is noted whatever activity is asked for. With another than the CPU's, Kineto writes no trace of its own,
    which takes half of the time that stopping takes; it then warns that it has none, so only where warnings can be
    muted."""
    quiet = _cpp_log_level() is not None and hasattr(ProfilerActivity, "MTIA")
    return {ProfilerActivity.MTIA if quiet else ProfilerActivity.CPU}


class CpuRecorder(Recorder):
    """Records the calling thread's CPU allocations.

    Known limits: memory that a thread pool's worker allocates for itself is not seen; what was alive before the
    recording is known only as far as ``watch`` and the owners tell.
    """

    device_type = "cpu"
    sees_every_step = False

    def __init__(self) -> None:
        self._thread: int | None = None
        self._given_way = False
        self._muted = False
        self._watches: list[Any] = []
        self._ended: list[_End] = []
        _foreign_profilers.add(self)

    clock = staticmethod(time.time_ns)

    def close(self) -> None:
        """Let go of everything for good."""
        self.abandon()
        _foreign_profilers.remove(self)

    def start(self) -> None:
        if _foreign_profilers.active or _profiler_enabled():
            raise RecorderBusyError("another torch.profiler is running")
        if not _one_at_a_time.acquire(blocking=False):
            raise RecorderBusyError("another thread's steps are being traced")
        self._thread = threading.get_ident()
        self._given_way = False
        try:
            config = ProfilerConfig(ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig())
            activities = _activities()
            with _silent_kineto():
                _prepare_profiler(config, activities)
            self._mute()
            _enable_profiler(config, activities, {RecordScope.USER_SCOPE})  # type: ignore[call-arg]
        except BaseException:
            self.abandon()
            raise

    def watch(self, storages: Iterable[Any]) -> None:
        now = self.clock()
        for storage in storages:
            self._watches.append(weakref.ref(storage, functools.partial(self._note_end, storage.data_ptr(), now)))

    def note_ended(self, addresses: Iterable[int]) -> None:
        for address in addresses:
            self._note_end(address, 0, None)

    def is_new_high(self) -> bool:
        return False

    def allocated_bytes(self) -> int | None:
        return None

    def peak_bytes(self) -> int | None:
        return None

    def reserved_bytes(self) -> int | None:
        return None

    def stop(self, failed: bool = False) -> Recording | None:
        if not self._running() or not _profiler_enabled():
            self.abandon()
            return None
        try:
            result = _disable_profiler()
            rows = _allocations(result.experimental_event_tree(), mixed=torch.accelerator.is_available())
            ended = self._ended
        finally:
            self.abandon()
        return _recording(rows, ended)

    def abandon(self) -> None:
        if self._running():
            if _profiler_enabled():
                _disable_profiler()
            self._thread = None
            self._unmute()
            _one_at_a_time.release()
        self._watches, self._ended = [], []

    def give_way(self) -> None:
        """Stop at once, since somebody else's profiler is about to start on this thread."""
        if self._running():
            self.abandon()
            self._given_way = True

    def _mute(self) -> None:
        """While recording, the CPU allocator warns on stderr of a block that it meets for the first time as it is
        freed. We know these by their owners, so for as long as a recording lasts C++ warnings are left out."""
        level = _cpp_log_level()
        self._muted = level is not None and level.value == _CPP_WARNING
        if level is not None and self._muted:
            level.value = _CPP_ERROR

    def _unmute(self) -> None:
        level = _cpp_log_level()
        if level is not None and self._muted:
            level.value = _CPP_WARNING

    def _note_end(self, address: int, seen_ns: int, _: Any) -> None:
        self._ended.append((self.clock(), address, seen_ns))

    def _running(self) -> bool:
        return self._thread == threading.get_ident() and not self._given_way


def _allocations(tree: Iterable[Any], mixed: bool) -> Int64Array:
    """``(N, 4)`` rows of time_ns, address, signed size, allocator's total from the profiler's event tree; where it is
    mixed, that of the CPU. Each look at an event makes objects, so that no field is read twice."""
    times: list[int] = []
    found: list[Any] = []
    pending = [tree]
    while pending:
        for event in pending.pop():
            fields = event.extra_fields
            if type(fields) is not _ExtraFields_Allocation:
                pending.append(event.children)
            elif not (mixed and fields.device != _CPU_DEVICE):
                times.append(event.start_time_ns)
                found.append(fields)
    table = np.empty((len(found), 4), np.int64)
    table[:, 0] = times
    for column, field in enumerate(_ALLOCATION_FIELDS, start=1):
        table[:, column] = np.fromiter(map(field, found), np.int64, len(found))
    changes: Int64Array = table[table[:, 2] != 0]
    return changes


def _recording(table: Int64Array, ended: list[_End]) -> Recording:
    time_ns, address, size, total = table[np.argsort(table[:, 0], kind="stable")].T
    reported = size.copy()
    reported[1:] = np.diff(total)
    silent = _unreported(address, size, time_ns, ended)
    if not silent:
        return Recording(Events.of(time_ns, address, size), reported)
    place, when, where, counted = zip(*silent, strict=True)
    events = Events.of(
        np.insert(time_ns, place, when), np.insert(address, place, where), np.insert(size, place, [-1] * len(silent))
    )
    return Recording(events, np.insert(reported, place, counted))


def _unreported(
    address: Int64Array, size: Int64Array, time_ns: Int64Array, ended: list[_End]
) -> list[tuple[int, int, int, int]]:
    """The frees that the profiler kept quiet about, in order: where among the events, when, the address, and by how
    much its count is to fall. It never counted what is older than the recording; what another thread was the last to
    let go of it still counts."""
    if not ended:
        return []
    order = np.argsort(address, kind="stable")
    by_address = address[order]
    frees: dict[tuple[int, int], tuple[int, int, int, int]] = {}
    for when, where, seen in sorted(ended):
        events = order[np.searchsorted(by_address, where) : np.searchsorted(by_address, where, side="right")]
        known = int(np.searchsorted(time_ns[events], seen, side="right"))
        following = int(events[known]) if known < len(events) else len(address)
        if (where, known) in frees or (following < len(address) and size[following] < 0):
            continue
        place = min(int(np.searchsorted(time_ns, when)), following)
        over = min(when, int(time_ns[place])) if place < len(time_ns) else when
        counted = max(int(size[events[known - 1]]), 0) if known else 0
        frees[where, known] = place, over, where, -counted
    return sorted(frees.values())
