"""A traced step as a Chrome trace, for ui.perfetto.dev and chrome://tracing. No torch.

Counter tracks hold the bytes of every category and of the whole at every allocation and free; phases and modules are
slices; an instant marks the peak. The format is that of "Trace Event Format" (JSON object, times in microseconds).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..attribution import NO_MODULE, ROOT_MODULE, stretches_of
from ..categories import CATEGORIES, CATEGORY_CODE, Category
from ..ledger import NEVER, Int64Array
from ..step_books import StepBooks
from ..units import format_bytes

_PROCESS = 1
_PHASES, _MODULES = 1, 2


def write_perfetto(step: StepBooks, path: str | os.PathLike[str], *, name: str = "", tick_ns: int = 1) -> None:
    """Write a step as a Chrome trace, event by event.

    Args:
        step: what to write.
        path: where.
        name: what to call the run.
        tick_ns: nanoseconds in a tick of the step's clock; 1000 where it counts events.

    Raises:
        OSError: it cannot be written.
    """
    with Path(path).open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        separator = ""
        for event in trace_events(step, name, tick_ns):
            file.write(separator + json.dumps(event))
            separator = ",\n"
        file.write("\n]}\n")


def trace_events(step: StepBooks, name: str = "", tick_ns: int = 1) -> Iterator[dict[str, Any]]:
    """The events of a step's trace; times begin with its first."""
    ledger, timeline = step.books.ledger, step.timeline
    times = np.array(
        [*ledger.time_ns[:1], *ledger.time_ns[-1:], *timeline.phase_ns, *timeline.module_ns] or [0], np.int64
    )
    origin, end = int(times.min()), int(times.max())

    def microseconds(time_ns: int) -> float:
        return (time_ns - origin) * tick_ns / 1000

    titles = {0: f"{name} step {step.step}".strip(), _PHASES: "phases", _MODULES: "modules"}
    for thread, title in titles.items():
        kind = "thread_name" if thread else "process_name"
        yield {"ph": "M", "pid": _PROCESS, "tid": thread, "name": kind, "args": {"name": title}}
    phases = ((phase.value, "phase", start, until) for phase, start, until in stretches_of(timeline, end))
    for thread, slices in ((_PHASES, phases), (_MODULES, _module_slices(step, end))):
        for title, category, start, until in slices:
            yield {
                "ph": "X",
                "pid": _PROCESS,
                "tid": thread,
                "name": title,
                "cat": category,
                "ts": microseconds(start),
                "dur": microseconds(until) - microseconds(start),
            }
    clock = [microseconds(int(when)) for when in np.concatenate([[origin], ledger.time_ns])]
    yield from _counters(step, clock)
    peak = step.books.peak(step.books.spans)
    yield {
        "ph": "i",
        "s": "p",
        "pid": _PROCESS,
        "tid": _PHASES,
        "name": f"peak {format_bytes(step.peak_bytes)}",
        "cat": "peak",
        "ts": clock[peak],
        "args": {"bytes": step.peak_bytes},
    }


def levels_of(step: StepBooks) -> Int64Array:
    """Bytes of every category at every instant, ``(categories, N + 1)``; they add up to what the allocator counted,
    and what no block explains is unattributed."""
    books, ledger = step.books, step.books.ledger
    change = np.zeros((len(CATEGORIES), len(ledger.level)), np.int64)
    np.add.at(change, (books.category, ledger.born), ledger.size)
    ended = ledger.died != NEVER
    np.subtract.at(change, (books.category[ended], ledger.died[ended]), ledger.size[ended])
    levels = np.cumsum(change, axis=1)
    levels[CATEGORY_CODE[Category.UNATTRIBUTED]] += step.allocator - ledger.level
    return levels


def _counters(step: StepBooks, clock: list[float]) -> Iterator[dict[str, Any]]:
    """The level of everything, and of every category that ever holds anything, wherever it changes."""
    rows = zip((category.value for category in CATEGORIES), levels_of(step), strict=True)
    for name, level in (("allocated", step.allocator), *rows):
        if not level.any():
            continue
        changes = np.flatnonzero(np.diff(level)) + 1
        for instant in (0, *changes.tolist()):
            args = {"bytes": int(level[instant])}
            yield {"ph": "C", "pid": _PROCESS, "name": name, "ts": clock[instant], "args": args}


def _module_slices(step: StepBooks, end: int) -> Iterator[tuple[str, str, int, int]]:
    """Forwards of modules, nested as they were called. The timeline has the innermost one after each change: one that
    is already open has just been come back to."""
    open_slices: list[tuple[int, int]] = []
    names = step.timeline.module_names

    def close(until: int) -> tuple[str, str, int, int]:
        number, start = open_slices.pop()
        return names[number] if names[number] != ROOT_MODULE else "(model)", "module", start, until

    changes = [*zip(step.timeline.module_ns, step.timeline.module, strict=True), (end, NO_MODULE)]
    for when, number in changes:
        known = [place for place, (opened, _) in enumerate(open_slices) if opened == number]
        if number != NO_MODULE and not known:
            open_slices.append((number, int(when)))
            continue
        while len(open_slices) > (known[-1] + 1 if known else 0):
            yield close(int(when))
