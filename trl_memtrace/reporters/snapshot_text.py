"""A snapshot on the terminal: the peak by category and phase, a timeline, the call sites, what is reserved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..attribution import Books
from ..categories import CATEGORIES
from ..snapshot_summary import SnapshotAnalysis
from ..text import printable
from ..units import common_unit, format_bytes
from .terminal import category_table

_TOP_SITES = 8
_WIDTH = 72
_BARS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


def print_snapshot(
    analysis: SnapshotAnalysis, name: str, simulated: Mapping[str, int] | None = None, console: Console | None = None
) -> None:
    """Print the analysis of a snapshot.

    Args:
        analysis: what to show.
        name: what to call the file.
        simulated: what the simulated allocator made of it, as in the summary, where it was asked.
        console: where to print; standard output when not given.
    """
    (console or Console()).print(Padding(Group(*_parts(analysis, name, simulated)), (0, 1, 1, 1)))


def _parts(analysis: SnapshotAnalysis, name: str, simulated: Mapping[str, int] | None) -> Iterable[RenderableType]:
    peak, history = analysis.summary.peak, analysis.history
    events = len(history.ledger.time_ns)
    line = Text("\n")
    line.append(printable(name), style="bold")
    line.append(f"  device {history.device}, {events:,} allocations and frees\n")
    line.append(f"Peak {format_bytes(peak.bytes)}", style="bold")
    if peak.phase is not None and peak.bytes:
        largest = max(CATEGORIES, key=lambda category: peak.categories[category] or 0)
        share = 100 * (peak.categories[largest] or 0) / peak.bytes
        line.append(f" in {peak.phase.value}, {share:.1f}% of it {largest.value.replace('_', ' ')}")
    yield line
    record = analysis.summary.worst
    if record is not None:
        yield Padding(category_table(peak, record.phases), (1, 0))
    yield _timeline(analysis.books)
    if analysis.sites:
        yield Padding(_sites(analysis), (1, 0))
    end = history.end_bytes
    reserved = int(history.reserved[-1])
    yield Text(
        f"At the end {format_bytes(reserved)} reserved, {format_bytes(end)} of it allocated: "
        f"{format_bytes(reserved - end)} is free inside segments."
    )
    if simulated is not None:
        yield Text(
            f"Simulated: {format_bytes(simulated['reserved_end_bytes'])} reserved at the end;"
            f" {simulated['matching_segment_requests']} of {simulated['segment_requests']} segment requests"
            " at the same event and of the same size."
        )
    for warning in history.warnings:
        yield Text(f"Warning: {printable(warning)}", style="yellow")
    if analysis.others:
        yield Text(f"Other devices in the file: {', '.join(map(str, analysis.others))} (--device)", style="dim")


def _timeline(books: Books) -> Text:
    """The level over the history, and the phases under it."""
    level = books.ledger.level
    width = min(_WIDTH, len(level))
    edges = np.linspace(0, len(level), width + 1).astype(int)
    highest = max(int(level.max()), 1)
    heights = [int(level[start : max(end, start + 1)].max()) for start, end in pairwise(edges)]
    starts = np.array([span.start for span in books.spans])
    named = [
        books.spans[max(int(np.searchsorted(starts, edge, side="right")) - 1, 0)].phase.value for edge in edges[:-1]
    ]
    text = Text()
    text.append("".join(_BARS[round(8 * max(height, 0) / highest)] for height in heights) + "\n", style="green")
    place = 0
    while place < width:
        until = place
        while until < width and named[until] == named[place]:
            until += 1
        text.append(named[place][: until - place].ljust(until - place), style="dim")
        place = until
    return text


def _sites(analysis: SnapshotAnalysis) -> Table:
    unit, scale = common_unit(analysis.summary.peak.bytes)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(unit, justify="right", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("asked for at the peak by", overflow="fold")
    for site in analysis.sites[:_TOP_SITES]:
        where = f"{printable(site.where)} {printable(site.function)}".rstrip()
        table.add_row(f"{site.bytes / scale:.2f}", site.category.value.replace("_", " "), Text(where))
    return table
