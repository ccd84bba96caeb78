"""A traced step as a PyTorch memory snapshot, for pytorch.org/memory_viz and torch/cuda/_memory_viz.py. No torch.

Where a snapshot of PyTorch's has the stack of an allocation, this one has whose the block is: its category, the phase
it was made in, its module and its role. The viewer colours by category.

Known limits: addresses are not those of the run: blocks are laid out afresh, in one segment. What was there before the
step stands at the beginning of the history. What the allocator itself counts beyond its blocks is left out.
"""

from __future__ import annotations

import os
import pickle
from bisect import bisect_left, insort
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..attribution import ROOT_MODULE, Books, stretches_of
from ..categories import CATEGORIES
from ..ledger import NEVER, Int64Array, Ledger
from ..recorders.snapshot import EXACT_SIZES
from ..step_books import StepBooks

_PROTOCOL = 4  # the viewer's own unpickler knows 2 to 4
_START = 1 << 30
_UNKNOWN = "unknown"
_DEVICE, _STREAM = 0, 0


def write_memory_viz(step: StepBooks, path: str | os.PathLike[str]) -> None:
    """Write a step as a snapshot pickle of plain dicts, lists, strings and numbers.

    Raises:
        OSError: it cannot be written.
    """
    Path(path).write_bytes(pickle.dumps(snapshot_of(step), _PROTOCOL))


def snapshot_of(step: StepBooks) -> dict[str, Any]:
    """A step as the dict that ``torch.cuda.memory._snapshot()`` gives."""
    books = step.books
    ledger = books.ledger
    address, total = lay_out(ledger)
    clock = _clock_us(ledger)
    frames = _Frames(step)
    trace: list[dict[str, Any]] = []

    def entry(action: str, block: int, instant: int, **more: Any) -> dict[str, Any]:
        return {
            "action": action,
            "addr": int(address[block]),
            "size": int(ledger.size[block]),
            "stream": _STREAM,
            "time_us": int(clock[instant]),
            **more,
        }

    for block, instant, is_birth in _happenings(ledger):
        if is_birth:
            category = CATEGORIES[int(books.category[block])].value
            trace.append(entry("alloc", block, instant, frames=frames.of(block), category=category))
        else:
            trace.append(entry("free_requested", block, instant, frames=[]))
            trace.append(entry("free_completed", block, instant, frames=[]))
    # The viewer wants a category of this name (MemoryViz.js, annotate_snapshot), or it fails on those that are there.
    end = {"action": "snapshot", "addr": 0, "size": 0, "stream": _STREAM, "time_us": int(clock[-1])}
    trace.append({**end, "frames": [], "category": _UNKNOWN})
    return {
        "segments": [_segment(ledger, address, total, frames)] if total else [],
        "device_traces": [trace],
        "allocator_settings": {},
        "external_annotations": list(_annotations(step, clock)),
        EXACT_SIZES: True,
    }


def lay_out(ledger: Ledger) -> tuple[Int64Array, int]:
    """Addresses for all blocks, such that no two that are alive together overlap, and the bytes from the first to the
    last. Each goes into the smallest gap that it fits, as the caching allocator does it."""
    address = np.zeros(len(ledger.size), np.int64)
    gaps_by_size: list[tuple[int, int]] = []  # size, start
    gap_starts: list[int] = []
    gap_size: dict[int, int] = {}
    top = _START

    def add_gap(start: int, size: int) -> None:
        insort(gaps_by_size, (size, start))
        insort(gap_starts, start)
        gap_size[start] = size

    def take_gap(start: int) -> int:
        size = gap_size.pop(start)
        del gaps_by_size[bisect_left(gaps_by_size, (size, start))]
        del gap_starts[bisect_left(gap_starts, start)]
        return size

    for block, _, is_birth in _happenings(ledger):
        size = int(ledger.size[block])
        if is_birth:
            place = bisect_left(gaps_by_size, (size, 0))
            if place < len(gaps_by_size):
                start = gaps_by_size[place][1]
                left = take_gap(start) - size
                if left:
                    add_gap(start + size, left)
            else:
                start, top = top, top + size
            address[block] = start
            continue
        start, end = int(address[block]), int(address[block]) + size
        after = bisect_left(gap_starts, end)
        if after < len(gap_starts) and gap_starts[after] == end:
            end += take_gap(end)
        before = bisect_left(gap_starts, start) - 1
        if before >= 0 and gap_starts[before] + gap_size[gap_starts[before]] == start:
            start = gap_starts[before]
            take_gap(start)
        add_gap(start, end - start)
    return address, top - _START


def _happenings(ledger: Ledger) -> Iterator[tuple[int, int, bool]]:
    """Block, instant and whether it is a birth, of every birth and death in the order in which they come; at the same
    instant deaths come first. Blocks of no bytes are left out."""
    blocks = np.flatnonzero(ledger.size > 0)
    died = blocks[ledger.died[blocks] != NEVER]
    block = np.concatenate([died, blocks])
    instant = np.concatenate([ledger.died[died], ledger.born[blocks]])
    is_birth = np.concatenate([np.zeros(len(died), np.bool_), np.ones(len(blocks), np.bool_)])
    order = np.lexsort((block, is_birth, instant))
    return zip(block[order].tolist(), instant[order].tolist(), is_birth[order].tolist(), strict=True)


def _segment(ledger: Ledger, address: Int64Array, total: int, frames: _Frames) -> dict[str, Any]:
    """The one segment, with what is alive at the end and the gaps between."""
    alive = np.flatnonzero((ledger.died == NEVER) & (ledger.size > 0))
    blocks: list[dict[str, Any]] = []
    place = _START

    def gap_until(end: int) -> None:
        if end > place:
            gap = {"address": place, "size": end - place, "requested_size": 0, "state": "inactive", "frames": []}
            blocks.append(gap)

    for block in alive[np.argsort(address[alive])].tolist():
        start, size = int(address[block]), int(ledger.size[block])
        gap_until(start)
        row = {"address": start, "size": size, "requested_size": size, "state": "active_allocated"}
        blocks.append({**row, "frames": frames.of(block)})
        place = start + size
    gap_until(_START + total)
    held = int(ledger.size[alive].sum())
    return {
        "device": _DEVICE,
        "address": _START,
        "total_size": total,
        "allocated_size": held,
        "active_size": held,
        "requested_size": held,
        "stream": _STREAM,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
        "blocks": blocks,
    }


class _Frames:
    """What stands in the place of a block's stack, innermost first. Equal ones are the same object, so that the file
    holds each once."""

    def __init__(self, step: StepBooks) -> None:
        books = step.books
        starts = np.array([span.start for span in books.spans], np.int64)
        span = np.maximum(np.searchsorted(starts, books.ledger.born, side="left") - 1, 0)
        self._books = books
        self._span = np.where(books.ledger.born == 0, -1, span)
        self._made = cache(self._make)

    def of(self, block: int) -> list[dict[str, Any]]:
        books: Books = self._books
        codes = (books.category, books.role, books.module, self._span)
        return self._made(*(int(column[block]) for column in codes))

    def _make(self, category: int, role: int, module: int, span: int) -> list[dict[str, Any]]:
        books = self._books
        name = books.modules[module]
        made = f"made in {books.spans[span].phase.value}" if span >= 0 else "there before the step"
        return [
            {"filename": "(no module)" if name == ROOT_MODULE else name, "line": 0, "name": books.roles[role]},
            {"filename": "phase", "line": 0, "name": made},
            {"filename": "category", "line": 0, "name": CATEGORIES[category].value},
        ]


def _clock_us(ledger: Ledger) -> Int64Array:
    """When each instant was, in microseconds: ``(N + 1,)``."""
    first = ledger.time_ns[:1] if len(ledger.time_ns) else np.zeros(1, np.int64)
    return np.concatenate([first, ledger.time_ns]) // 1000


def _annotations(step: StepBooks, clock: Int64Array) -> Iterator[dict[str, Any]]:
    """The phases, as ranges that the user would have annotated."""
    last = max([int(clock[-1]) * 1000, *step.timeline.phase_ns])
    for phase, start, end in stretches_of(step.timeline, last):
        for stage, when in (("START", start), ("END", end)):
            yield {"stage": stage, "name": phase.value, "device": _DEVICE, "time_us": when // 1000}
