"""What a record and a step's books look like: figures for plotly, as plain data. Neither torch nor plotly is needed.

A figure is a dictionary of ``data`` and ``layout``, which ``plotly.graph_objects.Figure(figure)`` and plotly.js take
as it is. Names from outside are escaped for plotly, which reads tags in text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..categories import CATEGORIES, ROLE_SEPARATOR, Category, Phase
from ..ledger import NEVER, Int64Array
from ..records import Peak, StepRecord
from ..step_books import StepBooks
from ..text import printable, words
from ..units import common_unit, format_bytes
from .palette import COLOURS, PATTERN_INK, PATTERNS, ink_on, lighter

Figure = dict[str, Any]

BUCKETS = 500
"""How many stretches a long axis is cut into; of each the highest and the lowest point are drawn."""

MOST_MARKS = 120
"""Up to how many traced steps are marked on the axis."""

_FINE = 300
_MAX_BANDS = 12
_MAX_LEAVES = 1500
_FEW_STEPS = 12
_SMALLEST_BAND = 0.015
_LABELLED = 0.09
_LEAST_BAND = 0.002
_REACH = 0.14
_HEADROOM = 1.14
_MOST_BOUNDARIES = 60
_ROLE_TINT = (0.0, 0.28, 0.5, 0.14, 0.4)
_GRID = "rgba(128,128,128,0.25)"
_CLEAR = "rgba(0,0,0,0)"
_BOUNDARY = "rgba(128,128,128,0.75)"
_INK = "#78808a"


def highest_and_lowest(values: Int64Array, place: Int64Array, buckets: int = BUCKETS) -> Int64Array:
    """Which points to draw of many: of every bucket the first highest and the first lowest, and both ends.

    Args:
        values: ``(N,)`` the levels.
        place: ``(N,)`` where they stand on the axis, in order.
        buckets: into how many stretches of equal length the axis is cut.

    Returns:
        indices in order, at most ``2 * buckets + 2`` of them; all where there are no more than that.
    """
    count = len(values)
    if count <= 2 * buckets + 2:
        return np.arange(count, dtype=np.int64)
    first, last = int(place[0]), int(place[-1])
    bucket = np.minimum((place - first) * np.float64(buckets) / max(last - first, 1), buckets - 1).astype(np.int64)
    order = np.arange(count, dtype=np.int64)
    by_height = np.lexsort((order, -values, bucket))
    by_depth = np.lexsort((order, values, bucket))
    firsts = np.flatnonzero(np.diff(bucket, prepend=-1))
    kept = np.concatenate([by_height[firsts], by_depth[firsts], [0, count - 1]])
    return np.unique(kept)


def plain(text: str) -> str:
    """Text from outside as plotly shows it unchanged."""
    return html.escape(printable(text), quote=False)


# --- memory over the steps -----------------------------------------------------------------------------------------


def steps_figure(steps: Sequence[StepRecord]) -> Figure | None:
    """The peak of every step by category, stacked, with the allocator's own peaks and what was reserved as lines.

    None where fewer than two steps were traced. Of many steps those are drawn that are highest and lowest.
    """
    traced = [step for step in steps if step.traced and step.peak.bytes is not None]
    if len(traced) < 2:
        return None
    number = np.array([step.step for step in traced], np.int64)
    height = np.array([step.peak.bytes for step in traced], np.int64)
    shown = [traced[index] for index in highest_and_lowest(height, number).tolist()]
    unit, scale = common_unit(int(height.max()))
    held = [category for category in CATEGORIES if any(step.peak.categories[category] for step in shown)]
    x = [step.step for step in shown]
    bands = [
        _band(
            category,
            words(category.value),
            x,
            [(step.peak.categories[category] or 0) for step in shown],
            scale,
        )
        for category in held
    ]
    highest = max(range(len(shown)), key=lambda index: (shown[index].peak.bytes or 0, -index))
    lines, others = [], []
    for name, dash, of in _LINES:
        line = _line(steps, name, dash, of, scale, unit)
        if line is not None:
            lines.append(line)
            others.append({"name": name, "y": [_scaled(of(step), scale) for step in shown]})
    peak = shown[highest]
    tallest = max([float(height.max()) / scale, *(max(line["y"]) for line in lines)])
    layout = base_layout("step", unit, tallest)
    layout["xaxis"] |= {
        "range": [steps[0].step, steps[-1].step],
        "tickformat": ",d",
        **({"dtick": 1} if x[-1] - x[0] <= _FEW_STEPS else {}),
    }
    layout["annotations"] = [
        _flag(peak.step, (peak.peak.bytes or 0) / scale, f"peak {format_bytes(peak.peak.bytes)}", (x[0], x[-1])),
        *(_line_name(line) for line in lines),
    ]
    layout["meta"] = {
        "unit": unit,
        "at": highest,
        "labels": [f"Step {step.step:,}, {step.peak.phase.value if step.peak.phase else ''}" for step in shown],
        "home": f"Step {peak.step:,}, the peak",
        "others": others,
    }
    rug = {
        "type": "scatter",
        "mode": "markers",
        "x": x,
        "y": [0] * len(x),
        "marker": {"symbol": "line-ns-open", "size": 7, "color": _INK},
        "hoverinfo": "skip",
        "name": "traced",
        "showlegend": False,
        "cliponaxis": False,
    }
    marks = [rug] if len(x) <= MOST_MARKS else []
    return {"data": [*bands, *lines, *marks, _names_on(bands, x)], "layout": layout}


def _allocated(step: StepRecord) -> int | None:
    return None if step.traced else step.peak.allocator_bytes


def _reserved(step: StepRecord) -> int | None:
    return step.reserved_bytes


_LINES: tuple[tuple[str, str, Callable[[StepRecord], int | None]], ...] = (
    ("counted only", "solid", _allocated),
    ("reserved", "dash", _reserved),
)


def _line(
    steps: Sequence[StepRecord],
    name: str,
    dash: str,
    of: Callable[[StepRecord], int | None],
    scale: int,
    unit: str,
) -> Figure | None:
    known = [(step.step, size) for step in steps if (size := of(step)) is not None]
    if len(known) < 2:
        return None
    number, height = np.array(known, np.int64).T
    kept = highest_and_lowest(height, number)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": number[kept].tolist(),
        "y": [_scaled(size, scale) for size in height[kept].tolist()],
        "line": {"color": _INK, "width": 1.5, "dash": dash},
        "hovertemplate": f"%{{y:.2f}} {unit}",
    }


def _line_name(line: Figure) -> dict[str, Any]:
    return {
        "x": line["x"][-1],
        "y": line["y"][-1],
        "text": line["name"],
        "showarrow": False,
        "xanchor": "right",
        "yanchor": "bottom",
        "font": {"size": 12},
    }


# --- the timeline of a step ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kind:
    """A band of the timeline: a category, or a role of it that is large enough to stand by itself."""

    category: Category
    name: str
    colour: str


def timeline_figure(step: StepBooks, *, counts_events: bool = False) -> Figure:
    """The traced step, from its first allocation to its end: what was alive by category and role, with its phases.

    However many blocks the step has, about a thousand instants are drawn; those of its peak, of every phase's ends and
    of every stretch's highest and lowest level are among them.

    Args:
        step: its books.
        counts_events: whether its clock counts events, as that of snapshots and dry runs does, and not nanoseconds.
    """
    books, ledger = step.books, step.books.ledger
    time = _times(ledger.time_ns, len(ledger.level))
    peak = books.peak(books.spans)
    ends = [instant for span in books.spans for instant in (span.start, span.end)]
    kept = np.unique(np.concatenate([highest_and_lowest(step.allocator, time), [peak], ends[:2000]]).astype(np.int64))
    kinds, code = _kinds(step, peak)
    kinds, levels = _without_slivers(kinds, _levels(step, code, len(kinds), kept))
    unit, scale = common_unit(int(step.allocator.max()))
    span_of = np.maximum(np.searchsorted([span.start for span in books.spans], kept, side="left") - 1, 0)
    phases = [books.spans[index].phase.value for index in span_of.tolist()]
    divisor, label, title = _clock(int(time[-1]), counts_events)
    x = [round(float(value), 4) for value in time[kept] / divisor]
    bands = [
        _band(kind.category, kind.name, x, levels[place].tolist(), scale, colour=kind.colour, shape="hv")
        for place, kind in enumerate(kinds)
    ]
    at = int(np.searchsorted(kept, peak))
    layout = base_layout(title, unit, step.peak_bytes / scale)
    layout["annotations"] = [
        _flag(x[at], step.peak_bytes / scale, f"peak {format_bytes(step.peak_bytes)}", (x[0], x[-1])),
        *_phase_names(step, time, divisor),
    ]
    layout["shapes"] = _phase_bounds(step, time, divisor)
    layout["margin"] = layout["margin"] | {"t": 44}
    layout["meta"] = {
        "unit": unit,
        "at": at,
        "labels": [label.format(value, phase) for value, phase in zip(x, phases, strict=True)],
        "home": f"At the peak, {phases[at]}",
    }
    return {"data": [*bands, _names_on(bands, x)], "layout": layout}


def _clock(duration: int, counts_events: bool) -> tuple[float, str, str]:
    """By what to divide a step's clock, how to write a moment and its phase, and what to call the axis."""
    if counts_events:
        return 1.0, "After event {:,.0f}, {}", "allocations and frees"
    if duration > 2_000_000_000:
        return 1e9, "{:,.3f} s, {}", "seconds since the step began"
    return 1e6, "{:,.2f} ms, {}", "milliseconds since the step began"


def _without_slivers(kinds: list[_Kind], levels: Int64Array) -> tuple[list[_Kind], Int64Array]:
    """The bands that are thick enough to be seen anywhere; the others are added up in one."""
    thin = levels.max(axis=1) < _LEAST_BAND * levels.sum(axis=0).max()
    if thin.sum() < 2:
        return kinds, levels
    rest = _Kind(Category.UNATTRIBUTED, "all that is smaller", lighter(COLOURS[Category.UNATTRIBUTED], 0.5))
    thick = [kind for kind, is_thin in zip(kinds, thin.tolist(), strict=True) if not is_thin]
    return [*thick, rest], np.vstack([levels[~thin], levels[thin].sum(axis=0)])


def _times(time_ns: Int64Array, instants: int) -> Int64Array:
    """When every instant begins, in nanoseconds since the first event; the first stands with the first event."""
    if instants == 1 or not len(time_ns):
        return np.zeros(instants, np.int64)
    since = time_ns - time_ns[0]
    return np.concatenate([since[:1], since]).astype(np.int64)


def _kinds(step: StepBooks, peak: int) -> tuple[list[_Kind], Int64Array]:
    """The bands, and which of them each block belongs to."""
    books = step.books
    highest = _highest_by_role(step)
    at_peak = books.roles_at(peak)
    least = _SMALLEST_BAND * max(step.peak_bytes, 1)
    by_category: dict[Category, list[str]] = {}
    large = sorted((role for role in highest if highest[role] >= least), key=lambda role: -highest[role])
    for role in large[:_MAX_BANDS]:
        by_category.setdefault(Category(role.split(ROLE_SEPARATOR)[0]), []).append(role)
    kinds: list[_Kind] = []
    band_of_role: dict[str, int] = {}
    used = {CATEGORIES[code] for code in np.unique(books.category).tolist()} | {Category.UNATTRIBUTED}
    for category in CATEGORIES:
        roles = sorted(by_category.get(category, ()), key=lambda role: (-at_peak.get(role, 0), -highest[role]))
        whole = [role for role in books.roles if role.split(ROLE_SEPARATOR)[0] == category.value]
        name = words(category.value)
        for place, role in enumerate(roles):
            detail = words(role.partition(ROLE_SEPARATOR)[2])
            shown = name if len(whole) == 1 else f"{name}, {detail}"
            band_of_role[role] = len(kinds)
            kinds.append(_Kind(category, shown, lighter(COLOURS[category], _ROLE_TINT[place % len(_ROLE_TINT)])))
        if set(whole) - set(roles) or not roles:
            if category not in used:
                continue
            for role in set(whole) - set(roles):
                band_of_role[role] = len(kinds)
            kinds.append(
                _Kind(
                    category, f"{name}, the rest" if roles else name, lighter(COLOURS[category], 0.6 if roles else 0)
                )
            )
    code = np.array([band_of_role.get(role, -1) for role in books.roles], np.int64)[books.role]
    return kinds, code


def _highest_by_role(step: StepBooks) -> dict[str, int]:
    """The most that each role holds at any instant."""
    books, ledger = step.books, step.books.ledger
    highest: dict[str, int] = {}
    for number, role in enumerate(books.roles):
        mine = books.role == number
        born, died, size = ledger.born[mine], ledger.died[mine], ledger.size[mine]
        gone = died != NEVER
        instants = np.concatenate([born, died[gone]])
        change = np.concatenate([size, -size[gone]])
        order = np.lexsort((change, instants))
        highest[role] = int(np.cumsum(change[order]).max(initial=0))
    return highest


def _levels(step: StepBooks, code: Int64Array, kinds: int, instants: Int64Array) -> Int64Array:
    """Bytes of every band at every instant, ``(kinds, K)``; they add up to the allocator's own count."""
    ledger = step.books.ledger
    change = np.zeros((kinds, len(instants) + 1), np.int64)
    np.add.at(change, (code, np.searchsorted(instants, ledger.born, side="left")), ledger.size)
    gone = ledger.died != NEVER
    np.subtract.at(change, (code[gone], np.searchsorted(instants, ledger.died[gone], side="left")), ledger.size[gone])
    levels = np.cumsum(change[:, :-1], axis=1)
    levels[-1] += step.allocator[instants] - ledger.level[instants]  # the last band is what is unattributed
    return np.asarray(levels)


def _stretches(step: StepBooks) -> list[tuple[Phase, int, int]]:
    """Phases with the instants from which to which they go; neighbours of the same phase made one."""
    found: list[tuple[Phase, int, int]] = []
    for span in step.books.spans:
        if found and found[-1][0] is span.phase:
            found[-1] = (span.phase, found[-1][1], span.end)
        else:
            found.append((span.phase, span.start, span.end))
    return found


def _phase_bounds(step: StepBooks, time: Int64Array, divisor: float) -> list[dict[str, Any]]:
    return [
        {
            "type": "line",
            "xref": "x",
            "yref": "paper",
            "x0": float(time[start]) / divisor,
            "x1": float(time[start]) / divisor,
            "y0": 0,
            "y1": 1,
            "line": {"width": 1, "dash": "dot", "color": _BOUNDARY},
        }
        for _, start, _ in _stretches(step)[1:_MOST_BOUNDARIES]
    ]


def _phase_names(step: StepBooks, time: Int64Array, divisor: float) -> list[dict[str, Any]]:
    whole = max(int(time[-1]), 1)
    return [
        {
            "x": float(time[start] + time[end]) / 2 / divisor,
            "y": 1,
            "yref": "paper",
            "yanchor": "bottom",
            "text": phase.value,
            "showarrow": False,
            "font": {"size": 12},
        }
        for phase, start, end in _stretches(step)
        if time[end] - time[start] >= _LABELLED * whole
    ]


# --- the peak, taken apart -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Branch:
    """A part of the peak and what it is made of; the parts add up to it.

    Attributes:
        name: what it is called.
        bytes: how large it is.
        category: whose colour it has; None for the whole.
        parts: what it is made of, the largest first.
    """

    name: str
    bytes: int
    category: Category | None = None
    parts: tuple[Branch, ...] = ()


def peak_tree(peak: Peak, step: StepBooks | None = None) -> Branch:
    """The peak by category, role, layer and module; where a step's books are not there, without the roles.

    Args:
        peak: of the record.
        step: the books of the same step.
    """
    if step is None:
        rows = [
            ((kind, "", name), size)
            for name, row in sorted(peak.modules.items())
            for kind, size in row.items()
            if size
        ]
    else:
        rows = [*_rows_of_books(step), *_beyond_books(step)]
    tree: dict[str, Any] = {}
    for place, ((category, role, module), size) in enumerate(sorted(rows, key=lambda row: -row[1])):
        layer, inside = _layer(module)
        if place >= _MAX_LEAVES:
            inside = "all that is smaller" if inside else ""
        leaves = tree.setdefault(category, {}).setdefault(role, {}).setdefault(layer, {})
        leaves[inside] = leaves.get(inside, 0) + size
    parts = [_branch(words(name), below, Category(name)) for name, below in tree.items()]
    return Branch("peak", sum(part.bytes for part in parts), None, _by_size(parts))


def _branch(name: str, below: Any, category: Category) -> Branch:
    """A branch with its parts; a single part that has no name is the branch itself."""
    while isinstance(below, dict) and list(below) == [""]:
        below = below[""]
    if isinstance(below, int):
        return Branch(name, below, category)
    parts = [_branch(inner or "no module", deeper, category) for inner, deeper in below.items()]
    return Branch(name, sum(part.bytes for part in parts), category, _by_size(parts))


def _by_size(parts: Sequence[Branch]) -> tuple[Branch, ...]:
    return tuple(sorted(parts, key=lambda part: (-part.bytes, part.name)))


_LAYER = re.compile(r"(.*?\.\d+)(?:\.(.*))?")


def _layer(module: str) -> tuple[str, str]:
    """A module's layer and its name inside: ``("model.layers.0", "mlp.up_proj")``; of one in no layer its own name."""
    found = _LAYER.fullmatch(module)
    return (found[1], found[2] or "") if found else (module, "")


def _rows_of_books(step: StepBooks) -> Iterator[tuple[tuple[str, str, str], int]]:
    books = step.books
    codes = (books.role * len(books.modules) + books.module) * len(CATEGORIES) + books.category
    wanted, inverse = np.unique(codes, return_inverse=True)
    totals = books.ledger.totals(inverse.astype(np.int64), len(wanted), books.peak(books.spans))
    for code, size in zip(wanted.tolist(), totals.tolist(), strict=True):
        rest, category = divmod(code, len(CATEGORIES))
        role, module = divmod(rest, len(books.modules))
        if size:
            detail = words(books.roles[role].partition(ROLE_SEPARATOR)[2])
            yield (CATEGORIES[category].value, detail, books.modules[module]), size


def _beyond_books(step: StepBooks) -> Iterator[tuple[tuple[str, str, str], int]]:
    """What the allocator counted at the peak beyond the blocks."""
    instant = step.books.peak(step.books.spans)
    rest = int(step.allocator[instant] - step.books.ledger.level[instant])
    if rest > 0:
        yield (Category.UNATTRIBUTED.value, "beyond the blocks", ""), rest


def peak_figure(tree: Branch) -> Figure:
    """The peak as a treemap: areas are bytes."""
    cells = list(_cells(tree, "", 0, max(tree.bytes, 1)))
    colours = [cell.colour for cell in cells]
    treemap = {
        "type": "treemap",
        "ids": [cell.path for cell in cells],
        "labels": [plain(short_module(cell.branch.name)) for cell in cells],
        "parents": [cell.parent for cell in cells],
        "values": [cell.branch.bytes for cell in cells],
        "customdata": [cell.text for cell in cells],
        "branchvalues": "total",
        "texttemplate": "%{label}<br>%{customdata}",
        "hovertemplate": "%{label}<br>%{customdata}<extra></extra>",
        "textfont": {"color": [ink_on(colour) if colour != _CLEAR else _INK for colour in colours], "size": 12},
        "marker": {"colors": colours, "line": {"width": 1, "color": "rgba(255,255,255,0.7)"}, "pad": _PAD},
        "tiling": {"pad": 1},
        "pathbar": {"thickness": 22, "textfont": {"size": 12}},
        "maxdepth": 4,
    }
    layout = {
        "margin": {"l": 0, "r": 0, "t": 24, "b": 0},
        "paper_bgcolor": _CLEAR,
        "uniformtext": {"minsize": 10, "mode": "hide"},
        "hoverlabel": {"align": "left"},
    }
    return {"data": [treemap], "layout": layout}


@dataclass(frozen=True, slots=True)
class _Cell:
    branch: Branch
    path: str
    parent: str
    colour: str
    text: str


def _cells(branch: Branch, parent: str, depth: int, whole: int) -> Iterator[_Cell]:
    path = f"{parent}/{branch.name}" if depth else branch.name
    colour = lighter(COLOURS[branch.category], _DEPTH_TINT[depth]) if branch.category else _CLEAR
    text = f"{format_bytes(branch.bytes)} \N{MIDDLE DOT} {100 * branch.bytes / whole:.1f}%"
    yield _Cell(branch, plain(path), plain(parent), colour, text)
    for part in branch.parts:
        yield from _cells(part, path, depth + 1, whole)


_DEPTH_TINT = (0.0, 0.0, 0.16, 0.32, 0.48)
_PAD = {"t": 20, "l": 3, "r": 3, "b": 3}
_PREFIXES = ("base_model.model.", "model.")


def short_module(name: str) -> str:
    """A module's name without what every module's begins with."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


# --- what figures share --------------------------------------------------------------------------------------------


def _scaled(size: int | None, scale: int) -> float | None:
    return None if size is None else round(size / scale, 4)


def _band(
    category: Category,
    name: str,
    x: Sequence[float],
    sizes: Sequence[int],
    scale: int,
    *,
    colour: str | None = None,
    shape: str = "linear",
) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "stackgroup": "memory",
        "name": plain(name),
        "meta": {"category": category.value, "name": name},
        "x": list(x),
        "y": [_scaled(size, scale) for size in sizes],
        "line": {"width": 0.5 if len(x) <= _FINE else 0, "color": "rgba(255,255,255,0.55)", "shape": shape},
        "fillcolor": colour or COLOURS[category],
        "fillpattern": {
            "shape": PATTERNS[category],
            "fillmode": "overlay",
            "fgcolor": PATTERN_INK,
            "size": 7,
            "solidity": 0.22,
        },
        "hovertemplate": "%{y:.2f}",
    }


def _names_on(bands: Sequence[Figure], x: Sequence[float]) -> Figure:
    """The names of the bands, where they are thick enough to hold them."""
    heights = np.array([band["y"] for band in bands], np.float64)
    tops = np.cumsum(heights, axis=0)
    ceiling = float(tops[-1].max()) or 1.0
    span = max(x[-1] - x[0], 1e-9)
    places, middles, names, inks = [], [], [], []
    for band, height, top in zip(bands, heights, tops, strict=True):
        index, room, middle = _roomiest(np.array(x), top - height, top, span)
        if room >= _LABELLED * ceiling:
            places.append(x[index])
            middles.append(round(middle, 4))
            names.append(band["name"])
            inks.append(ink_on(band["fillcolor"]))
    return {
        "type": "scatter",
        "mode": "text",
        "x": places,
        "y": middles,
        "text": names,
        "textfont": {"color": inks, "size": 12},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _roomiest(x: Any, bottom: Any, top: Any, span: float) -> tuple[int, float, float]:
    """Where a band has most room for its name: a point, the height that is free around it, and that height's
    middle."""
    best, room, middle = 0, 0.0, 0.0
    inner = np.flatnonzero((x - x[0] >= _REACH * span) & (x[-1] - x >= _REACH * span))
    for index in inner[:: max(1, len(x) // 60)].tolist():
        around = np.abs(x - x[index]) <= _REACH * span
        low, high = float(bottom[around].max()), float(top[around].min())
        if high - low > room:
            best, room, middle = index, high - low, (low + high) / 2
    return best, room, middle


def _flag(x: float, y: float, text: str, ends: tuple[float, float]) -> dict[str, Any]:
    place = (x - ends[0]) / max(ends[1] - ends[0], 1e-9)
    return {
        "xanchor": "left" if place < 0.15 else "right" if place > 0.85 else "center",
        "x": x,
        "y": y,
        "text": text,
        "showarrow": True,
        "arrowhead": 6,
        "arrowsize": 0.9,
        "arrowwidth": 1,
        "ax": 0,
        "ay": -18,
        "font": {"size": 12},
    }


def base_layout(x_title: str, unit: str, highest: float) -> Figure:
    axis = {"gridcolor": _GRID, "zeroline": False, "tickfont": {"size": 11, "color": _INK}}
    title_font = {"size": 12, "color": _INK}
    return {
        "margin": {"l": 46, "r": 10, "t": 30, "b": 42},
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "font": {"size": 12},
        "hovermode": "x unified",
        "showlegend": True,
        "xaxis": {**axis, "showgrid": False, "title": {"text": x_title, "font": title_font, "standoff": 8}},
        "yaxis": {
            **axis,
            "fixedrange": True,
            "range": [0, _HEADROOM * (highest or 1)],
            "nticks": 6,
            "title": {"text": unit, "font": title_font, "standoff": 6},
        },
    }
