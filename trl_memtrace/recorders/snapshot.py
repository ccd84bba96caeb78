"""PyTorch memory snapshots: anybody's pickle from ``torch.cuda.memory._dump_snapshot``, read without trusting it.

A snapshot holds, for each device, the history of its allocator (``device_traces``), what its segments held at the end,
and annotations
with times. It never says what the first event of its history found: that is told by undoing the history from its end.
"""

from __future__ import annotations

import gc
import io
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..errors import MemtraceError
from ..ledger import BoolArray, Events, Int64Array, Ledger

_ROUNDING = 512  # kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp: what every size is rounded up to
EXACT_SIZES = "trl_memtrace_exact_sizes"
"""Set in a snapshot of our own making: its sizes are those that were allocated, not those that were asked for."""
_SEGMENT_ACTIONS = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
_SPARE_BYTES = 512 * 1024**2
_BYTES_PER_BYTE = 64  # what unpickled dicts and numbers take up, for each byte of the file, at the very most
_WITHOUT_ADDRESS = ("oom", "snapshot", "user_defined")


class SnapshotError(MemtraceError):
    """A file that is not a PyTorch memory snapshot, or holds nothing to analyse."""


class _Unpickler(pickle.Unpickler):
    """A snapshot is dicts, lists, strings and numbers: whoever names a class or a function is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise SnapshotError(f"the file names {module}.{name}; a memory snapshot names no class, and none is loaded")

    def persistent_load(self, identifier: Any) -> NoReturn:
        raise SnapshotError("the file refers to objects outside itself; a memory snapshot does not")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot file as it was read: plain data, nothing checked yet but its outer shape."""

    path: Path
    data: Mapping[str, Any]

    @property
    def traces(self) -> Sequence[Any]:
        """The history of every device."""
        traces = self.data.get("device_traces")
        return traces if isinstance(traces, list) else []

    @property
    def segments(self) -> Sequence[Any]:
        """The segments of all devices at the end."""
        segments = self.data.get("segments")
        return segments if isinstance(segments, list) else []


def read_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """Read a snapshot file. Nothing in it is run or imported.

    Raises:
        SnapshotError: it cannot be read, is no pickle, is cut short, names a class, or is no snapshot.
    """
    file = Path(path)
    try:
        content = file.read_bytes()
    except (OSError, ValueError) as problem:
        raise SnapshotError(f"cannot read {file}: {getattr(problem, 'strerror', None) or problem}") from None
    collecting = gc.isenabled()
    gc.disable()  # a million dicts that all stay would be walked again and again
    try:
        with _bounded_memory(_SPARE_BYTES + _BYTES_PER_BYTE * len(content)):
            data = _Unpickler(io.BytesIO(content)).load()
    except SnapshotError as problem:
        raise SnapshotError(f"{file}: {problem}") from None
    except (MemoryError, RecursionError):
        raise SnapshotError(f"{file} is not a memory snapshot: it does not fit into memory") from None
    except Exception as problem:  # a damaged pickle fails in any way at all
        cut = (
            "cut short" if isinstance(problem, EOFError) or "truncated" in str(problem) else "not a pickle, or damaged"
        )
        raise SnapshotError(f"{file} is {cut}: {type(problem).__name__}: {problem}") from None
    finally:
        if collecting:
            gc.enable()
    if not isinstance(data, dict) or not isinstance(data.get("segments"), list):
        raise SnapshotError(f"{file} is a pickle, but not a memory snapshot: it has no list of segments")
    return Snapshot(file, data)


@contextmanager
def _bounded_memory(more_bytes: int) -> Iterator[None]:
    """Let the process grow by so much and no more: a few bytes of a pickle can ask for a table of gigabytes."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):  # not Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = now + more_bytes
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@dataclass(frozen=True, slots=True, eq=False)
class DeviceHistory:
    """The history of one device, as events of the ledger.

    Attributes:
        device: its index.
        ledger: blocks with their lifetimes; sizes rounded as the allocator rounds them, and those of blocks alive at
            the end as they stand in the segments.
        entries: ``(N,)`` for each event of the ledger its number in the file's own history.
        time_us: ``(N,)`` when, 0 where the file has no times.
        reserved: ``(N + 1,)`` bytes in segments at each instant.
        frames: for each event its stack, innermost first, as the file has it.
        end_bytes: what the segments say is allocated at the end.
        alive_at_end: ``(B,)`` whether the segments hold the block at the end.
        warnings: what is wrong with the history, in words.
    """

    device: int
    ledger: Ledger
    entries: Int64Array
    time_us: Int64Array
    reserved: Int64Array
    frames: Sequence[Sequence[Any]]
    end_bytes: int
    alive_at_end: BoolArray
    warnings: tuple[str, ...]


def devices_of(snapshot: Snapshot) -> list[int]:
    """The devices that a snapshot has a history or segments of."""
    traced = [index for index, trace in enumerate(snapshot.traces) if isinstance(trace, list) and trace]
    held = {int(segment["device"]) for segment in snapshot.segments if _is_int(segment, "device")}
    return sorted({*traced, *held})


def read_history(snapshot: Snapshot, device: int) -> DeviceHistory:
    """One device's history.

    Raises:
        SnapshotError: there is no history of that device in the file.
    """
    trace = snapshot.traces[device] if device < len(snapshot.traces) else None
    if not isinstance(trace, list) or not trace:
        raise SnapshotError(
            f"{snapshot.path} holds no history of device {device}: it was written without"
            " torch.cuda.memory._record_memory_history()"
        )
    columns = _read_trace(trace)
    held, total, allocated = _read_segments(snapshot.segments, device)
    rounding = 1 if snapshot.data.get(EXACT_SIZES) is True else _ROUNDING
    rounded = _round_up(np.abs(columns.size), rounding) * np.sign(columns.size)
    events = Events.of(np.arange(len(rounded)), columns.address, rounded)

    first = Ledger.of(events)
    survivors = first.address[first.died > len(events)]
    known = set(survivors.tolist())
    baseline = {address: size for address, size in held.items() if address not in known}
    orphans = first.strays  # freed, and no allocation seen: they were there before
    for place in orphans.tolist():
        baseline.setdefault(int(columns.address[place]), int(-rounded[place]))
    ledger = Ledger.of(events, list(baseline), list(baseline.values()))
    ledger, alive = _with_real_sizes(ledger, held)

    warnings = list(columns.warnings)
    if len(ledger.strays):
        warnings.append(f"{len(ledger.strays)} frees of memory that was not allocated at the time were left out")
    lost = int(((ledger.died > len(events)) & ~alive).sum())
    if lost:
        warnings.append(f"{lost} blocks are still allocated by the history, but not in the segments")
    return DeviceHistory(
        device=device,
        ledger=ledger,
        entries=columns.entry,
        time_us=columns.time_us,
        reserved=_reserved(total, columns),
        frames=columns.frames,
        end_bytes=allocated,
        alive_at_end=alive,
        warnings=tuple(warnings),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    entry: Int64Array
    address: Int64Array
    size: Int64Array
    time_us: Int64Array
    frames: list[Sequence[Any]]
    segment_change: Int64Array  # with each event, since the last
    tail_change: int  # after the last event
    warnings: list[str]


def _read_trace(trace: Sequence[Any]) -> _Columns:
    """The allocations and frees of a history, each free once: at its request, or at its completion where that is all
    there is."""
    entries: list[int] = []
    addresses: list[int] = []
    sizes: list[int] = []
    times: list[int] = []
    frames: list[Sequence[Any]] = []
    changes: list[int] = []
    requested: set[int] = set()
    change = bad = 0
    for index, entry in enumerate(trace):
        try:
            action, address, size = entry["action"], entry["addr"], entry["size"]
        except (KeyError, TypeError, IndexError):
            bad += not (isinstance(entry, dict) and entry.get("action") in _WITHOUT_ADDRESS)
            continue
        if type(address) is not int or type(size) is not int or not (0 <= address < 2**63 and 0 < size < 2**48):
            bad += action not in _WITHOUT_ADDRESS
            continue
        if action == "alloc":
            signed = size
        elif action == "free_requested":
            requested.add(address)
            signed = -size
        elif action in ("free_completed", "free"):
            if address in requested:
                requested.discard(address)
                continue
            signed = -size
        else:
            change += _SEGMENT_ACTIONS.get(action, 0) * size if isinstance(action, str) else 0
            continue
        entries.append(index)
        addresses.append(address)
        sizes.append(signed)
        when = entry.get("time_us", 0)
        times.append(when if type(when) is int and 0 <= when < 2**63 else 0)
        stack = entry.get("frames", ())
        frames.append(stack if isinstance(stack, (list, tuple)) else ())
        changes.append(change)
        change = 0
    warnings = [f"{bad} entries of the history make no sense and were left out"] if bad else []
    arrays = (np.array(column, np.int64) for column in (entries, addresses, sizes, times, changes))
    entry_column, address_column, size_column, time_column, change_column = arrays
    return _Columns(entry_column, address_column, size_column, time_column, frames, change_column, change, warnings)


def _read_segments(segments: Sequence[Any], device: int) -> tuple[dict[int, int], int, int]:
    """What a device holds at the end: bytes by address of every allocated block, bytes in segments, bytes
    allocated."""
    held: dict[int, int] = {}
    total = allocated = 0
    for segment in segments:
        if not _is_int(segment, "address", "total_size") or segment.get("device", 0) != device:
            continue
        total += segment["total_size"]
        address = segment["address"]
        blocks = segment.get("blocks")
        for block in blocks if isinstance(blocks, list) else ():
            if not _is_int(block, "size"):
                break
            start = block["address"] if _is_int(block, "address") else address
            if block.get("state") == "active_allocated" and 0 < block["size"] < 2**48 and 0 <= start < 2**63:
                held[start] = block["size"]
                allocated += block["size"]
            address = start + block["size"]
    return held, total, allocated


def _with_real_sizes(ledger: Ledger, held: Mapping[int, int]) -> tuple[Ledger, BoolArray]:
    """The ledger with the blocks that are alive at the end as large as the segments say, and which these are."""
    last = ledger.died > len(ledger.time_ns)
    size = ledger.size.copy()
    alive = np.zeros(len(size), np.bool_)
    for place in np.flatnonzero(last).tolist():
        real = held.get(int(ledger.address[place]))
        if real is not None:
            alive[place] = True
            size[place] = real
    change = np.zeros(len(ledger.level), np.int64)
    np.add.at(change, ledger.born, size)
    np.subtract.at(change, ledger.died[~last], size[~last])
    level = np.cumsum(change)
    return Ledger(ledger.time_ns, ledger.address, size, ledger.born, ledger.died, level, ledger.strays), alive


def _reserved(total: int, columns: _Columns) -> Int64Array:
    changes = np.append(columns.segment_change, columns.tail_change)
    after = np.cumsum(changes[::-1])[::-1]  # what happened from each event on
    start = total - int(after[0])
    return start + np.concatenate([[0], np.cumsum(columns.segment_change)]).astype(np.int64)


def _round_up(size: Int64Array, to: int) -> Int64Array:
    return (size + to - 1) // to * to


def _is_int(row: Any, *keys: str) -> bool:
    return isinstance(row, dict) and all(type(row.get(key)) is int for key in keys)
