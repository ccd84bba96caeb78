"""A sweep as a page that stands alone, in the manner of a run's report."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from markupsafe import Markup

from ..sweep import Row, Sweep
from ..text import printable
from ..units import common_unit, format_bytes
from .page import (
    Cell,
    category_key,
    contents,
    facts,
    figure,
    header,
    join,
    level,
    page,
    section,
    size,
    table,
    write_whole,
)
from .sweep_figures import knob_figure
from .sweep_text import cost_text, headline, mostly

Part = tuple[str, str, Markup]


def write_sweep(sweep: Sweep, path: str | os.PathLike[str]) -> Path:
    """Write the page, whole or not at all.

    Raises:
        OSError: it cannot be written.
        PlotlyMissingError: plotly is not installed.
    """
    return write_whole(render_sweep(sweep), path)


def render_sweep(sweep: Sweep) -> str:
    """The page as text."""
    parts = list(_parts(sweep))
    how = "measured" if sweep.measured else "dry runs"
    head = header(
        Markup("<b>MemTrace</b> Sweep \N{MIDDLE DOT} trl {}, {}").format(sweep.kind, how),
        headline(sweep),
        facts(_facts(sweep)),
        contents((anchor, heading) for anchor, heading, _ in parts),
    )
    return page(
        "Sweep: memory",
        head,
        (section(anchor, heading, part) for anchor, heading, part in parts),
        Markup("Made by trl-memtrace. Sizes are in binary units: 1 GiB is 1,073,741,824 bytes. {}").format(
            printable(" ".join(sweep.assumed))
        ),
    )


def _facts(sweep: Sweep) -> Iterator[tuple[Cell, Cell, Cell]]:
    ran = [row for row in sweep.rows if row.outcome.process_bytes is not None]
    if not ran:
        return
    highest = max(row.outcome.process_bytes or 0 for row in ran)
    for name, choose in (("Least", min), ("Most", max)):
        row = choose(ran, key=lambda row: row.outcome.process_bytes or 0)
        yield name, size(row.outcome.process_bytes, highest), _settings(sweep, row)
    if sweep.device is not None:
        known = f"{sweep.device}" if isinstance(sweep.device, str) else format_bytes(sweep.device)
        yield "Fit", f"{sum(bool(row.outcome.fits) for row in ran)} of {len(sweep.rows)}", printable(known)


def _settings(sweep: Sweep, row: Row) -> str:
    pairs = zip(sweep.grid.knobs, row.point.choices, strict=True)
    return printable(", ".join(f"{knob.name} {choice}" for knob, choice in pairs))


def _parts(sweep: Sweep) -> Iterator[Part]:
    costs = sweep.costs()
    if costs:
        rows = [(printable(cost.knob), printable(cost.what), cost_text(cost), mostly(cost)) for cost in costs]
        columns = ("knob", "for", "at the peak", "of which")
        yield "costs", "What each knob costs", table(columns, rows, text_columns=(1, 3))
    for place, knob in enumerate(sweep.grid.knobs):
        drawing = knob_figure(sweep, place)
        if drawing is not None:
            name = printable(knob.name)
            held = [row.outcome.categories for row in sweep.rows]
            caption = (
                "The peak of what is allocated, by category, with the other knobs at their first values; a line for"
                " each other setting of them."
            )
            yield f"knob-{place}", name, figure(drawing, label=name, caption=caption, more=category_key(held))
    yield "all", "Every configuration", _table(sweep)


def _table(sweep: Sweep) -> Markup:
    unit, scale = common_unit(max((row.outcome.process_bytes or 0 for row in sweep.rows), default=0))
    knobs, errors = [printable(knob.name) for knob in sweep.grid.knobs], sweep.errors
    columns = [*knobs, f"allocated, {unit}", "reserved", "nvidia-smi", "peak in", "fits"]
    rows = [[*_cells(row, scale, errors)] for row in sweep.rows]
    notes = (
        Markup('<p class="note">[{}] {}</p>').format(place, printable(why)) for place, why in enumerate(errors, 1)
    )
    return join([table(columns, rows, text_columns=(*range(len(knobs)), len(columns) - 2, len(columns) - 1)), *notes])


def _cells(row: Row, scale: int, errors: list[str]) -> Iterator[Cell]:
    outcome = row.outcome
    yield from map(printable, row.point.choices)
    for held in (outcome.allocated_bytes, outcome.reserved_bytes, outcome.process_bytes):
        yield level(held, scale)
    yield outcome.phase or "" if outcome.error is None else f"failed [{errors.index(outcome.error) + 1}]"
    yield "" if outcome.fits is None else "yes" if outcome.fits else "no"
