"""Two records side by side, as a page that stands alone, in the manner of a run's report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from ..categories import CATEGORIES, PHASES
from ..comparison import Change, Comparison, Side, Tolerance
from ..text import printable, words
from .comparison_text import headline, percent, signed, verdict
from .page import (
    Cell,
    bars,
    category_key,
    category_name,
    contents,
    facts,
    header,
    page,
    section,
    size,
    table,
    write_whole,
)

_SOURCES = {"run": "a run", "dry_run": "a dry run", "snapshot": "a snapshot"}
_MOST_ROWS = 60

Part = tuple[str, str, Markup]


def write_comparison(comparison: Comparison, path: str | os.PathLike[str], tolerance: Tolerance | None = None) -> Path:
    """Write the page, whole or not at all.

    Args:
        comparison: what to show.
        path: the file to write; its folder is made.
        tolerance: how much the peak may grow, where that was asked.

    Raises:
        OSError: it cannot be written.
    """
    return write_whole(render_comparison(comparison, tolerance), path)


def render_comparison(comparison: Comparison, tolerance: Tolerance | None = None) -> str:
    """The page as text."""
    parts = list(_parts(comparison))
    names = [printable(side.name) for side in (comparison.before, comparison.after)]
    head = header(
        Markup("<b>MemTrace</b> Comparison \N{MIDDLE DOT} A: {}, B: {}").format(*names),
        headline(comparison),
        facts(_facts(comparison)),
        contents((anchor, heading) for anchor, heading, _ in parts),
        lead="" if tolerance is None else verdict(comparison, tolerance),
    )
    return page(
        "Two records: memory",
        head,
        (section(anchor, heading, part) for anchor, heading, part in parts),
        Markup("Made by trl-memtrace. Sizes are in binary units: 1 GiB is 1,073,741,824 bytes."),
    )


def _facts(comparison: Comparison) -> Iterator[tuple[Cell, Cell, Cell]]:
    whole = max(comparison.peak.before_bytes or 0, comparison.peak.after_bytes or 0)
    for letter, side in (("A", comparison.before), ("B", comparison.after)):
        yield f"Peak of {letter}", size(side.peak.bytes, whole), _where(side)
    yield "Grew by", signed(comparison.peak.growth_bytes), percent(comparison.peak)
    if comparison.reserved is not None:
        yield "Reserved grew by", signed(comparison.reserved.growth_bytes), percent(comparison.reserved)


def _where(side: Side) -> str:
    where = f", in {side.peak.phase.value}" if side.peak.phase is not None else ""
    step = f" of step {side.peak.step:,}" if side.peak.step is not None and side.source != "snapshot" else ""
    return f"{_SOURCES.get(side.source, 'a run')}{where}{step}"


def _parts(comparison: Comparison) -> Iterator[Part]:
    sides = {"A": comparison.before, "B": comparison.after}
    held = {letter: _sizes(side.peak.categories) for letter, side in sides.items()}
    rows = [(letter, sizes, sides[letter].peak.bytes or 0) for letter, sizes in held.items()]
    found = [change for change in comparison.categories if change.before_bytes or change.after_bytes]
    yield (
        "categories",
        "At the peak",
        Markup("{}{}{}").format(
            _bars(rows),
            category_key(held.values()),
            _table("category", found, [category_name(change.name) for change in found]),
        ),
    )
    if comparison.phases:
        yield "phases", "Phases side by side", _phases(comparison)
    shown = {
        "roles": ("By role", "role", comparison.roles),
        "modules": ("By module", "module", comparison.modules),
        "sites": ("By the lines that asked for it", "asked for by", comparison.sites),
    }
    for anchor, (heading, column, changes) in shown.items():
        moved = [change for change in changes if change.growth_bytes]
        if moved:
            yield anchor, heading, _table(column, moved, [_name(anchor, change.name) for change in moved])


def _phases(comparison: Comparison) -> Markup:
    order = {phase.value: place for place, phase in enumerate(PHASES)}
    changes = sorted(comparison.phases, key=lambda change: order.get(change.name, len(order)))
    rows = [
        (
            f"{printable(change.name)} {letter}",
            _sizes(side.phases[change.name].at_peak),
            side.phases[change.name].peak_bytes,
        )
        for change in changes
        for letter, side in (("A", comparison.before), ("B", comparison.after))
        if change.name in side.phases
    ]
    return Markup("{}{}{}").format(
        _bars(rows),
        category_key(sizes for _, sizes, _ in rows),
        _table("phase", comparison.phases, [printable(change.name) for change in comparison.phases]),
    )


def _bars(rows: Sequence[tuple[str, Mapping[str, int], int]]) -> Markup:
    """Stacked bars, all to the scale of the highest."""
    highest = max((total for _, _, total in rows), default=0)
    return bars(((name, list(sizes.items()), size(total, highest)) for name, sizes, total in rows), highest)


def _table(heading: str, changes: Sequence[Change], names: Sequence[Cell]) -> Markup:
    """The changes, the largest growth first; where they are many, the least of them in one row."""
    by_size = sorted(range(len(changes)), key=lambda place: -abs(changes[place].growth_bytes))
    kept = sorted(by_size[:_MOST_ROWS])
    whole = max((max(row.before_bytes or 0, row.after_bytes or 0) for row in changes), default=0)
    rows: list[Sequence[Cell]] = [
        (
            names[place],
            size(changes[place].before_bytes, whole),
            size(changes[place].after_bytes, whole),
            signed(changes[place].growth_bytes),
            percent(changes[place]),
        )
        for place in kept
    ]
    left = by_size[_MOST_ROWS:]
    if left:
        rows.append((f"{len(left)} more", "", "", signed(sum(changes[place].growth_bytes for place in left)), ""))
    return table((heading, "A", "B", "grew by", ""), rows, optional=(4,))


def _name(kind: str, name: str) -> str:
    shown = printable(name)
    return words(shown) if kind == "roles" else shown or "(no module)"


def _sizes(categories: Mapping[str, int | None]) -> dict[str, int]:
    return {category.value: categories[category.value] or 0 for category in CATEGORIES}
