"""What a knob does, as a figure for plotly: plain data, in the manner of ``figures``."""

from __future__ import annotations

from typing import Any

from ..categories import CATEGORIES
from ..sweep import Row, Sweep
from ..text import words
from ..units import common_unit
from .figures import Figure, base_layout, plain
from .palette import COLOURS, PATTERN_INK, PATTERNS

_MOST_LINES = 60
_LINE = "rgba(128,128,128,0.55)"


def knob_figure(sweep: Sweep, place: int) -> Figure | None:
    """The peak of what is allocated against a knob's values: bars by category with every other knob at the first value
    that could be run, and a thin line for each other setting of those.

    None where fewer than two values could be run.

    Args:
        sweep: the sweep.
        place: which of its knobs.
    """
    knob = sweep.grid.knobs[place]
    slices = _slices(sweep, place)
    whole = [rows for rows in slices.values() if len(rows) > 1]
    if not whole:
        return None
    first = max(whole, key=len)
    highest = max(row.outcome.allocated_bytes or 0 for rows in whole for row in rows)
    unit, scale = common_unit(highest)
    x = [plain(row.point.choices[place]) for row in first]
    bars = [
        {
            "type": "bar",
            "name": words(category.value),
            "x": x,
            "y": [round(row.outcome.categories.get(category.value, 0) / scale, 4) for row in first],
            "marker": {
                "color": COLOURS[category],
                "pattern": {
                    "shape": PATTERNS[category],
                    "fillmode": "overlay",
                    "fgcolor": PATTERN_INK,
                    "size": 7,
                    "solidity": 0.22,
                },
            },
            "hovertemplate": "%{y:.2f} " + unit,
        }
        for category in CATEGORIES
        if any(row.outcome.categories.get(category.value) for row in first)
    ]
    lines = [_line(sweep, place, rows, unit, scale) for rows in whole if rows is not first][:_MOST_LINES]
    layout = base_layout(plain(knob.name), unit, highest / scale)
    layout |= {"barmode": "stack", "bargap": 0.45, "showlegend": False, "hovermode": "closest"}
    layout["xaxis"] |= {"type": "category", "categoryorder": "array", "categoryarray": list(map(plain, knob.choices))}
    return {"data": [*bars, *lines], "layout": layout}


def _slices(sweep: Sweep, place: int) -> dict[tuple[str, ...], list[Row]]:
    """What could be run, by the settings of the other knobs, in the order of the knob's values."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in sweep.rows:
        if row.outcome.allocated_bytes is not None:
            choices = row.point.choices
            found.setdefault((*choices[:place], *choices[place + 1 :]), []).append(row)
    return found


def _line(sweep: Sweep, place: int, rows: list[Row], unit: str, scale: int) -> dict[str, Any]:
    others = [
        f"{knob.name} {choice}"
        for number, (knob, choice) in enumerate(zip(sweep.grid.knobs, rows[0].point.choices, strict=True))
        if number != place
    ]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plain(", ".join(others)),
        "x": [plain(row.point.choices[place]) for row in rows],
        "y": [round((row.outcome.allocated_bytes or 0) / scale, 4) for row in rows],
        "line": {"width": 1, "color": _LINE},
        "marker": {"size": 4, "color": _LINE},
        "hovertemplate": f"%{{y:.2f}} {unit}<br>%{{fullData.name}}<extra></extra>",
    }
