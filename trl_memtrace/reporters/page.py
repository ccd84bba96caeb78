"""A page that stands alone: the building blocks of every HTML report.

Text becomes markup in one way only, ``Markup.format``, which escapes whatever is not markup already; what goes into a
script is JSON without a single ``<``. A content security policy in the page's head lets nothing be fetched and no
script run but the page's own two, known by their hashes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from ..categories import CATEGORIES
from ..errors import MemtraceError
from ..text import words
from ..units import common_unit
from .palette import category_css

Figure = Mapping[str, Any]
"""What plotly draws: ``data`` and ``layout``."""

Cell = str | Markup
NOTHING = Markup("")

_ASSETS = Path(__file__).parent / "assets"
_SHELL = Markup(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="trl-memtrace">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
{header}
<main id="content">
{body}
</main>
<footer>{footer}</footer>
{scripts}
</body>
</html>
"""
)
_SCRIPTS = Markup('<script type="text/plain" id="plotly">{}</script>\n<script>{}</script>')


class PlotlyMissingError(MemtraceError):
    """plotly, which draws the figures, is not installed."""


# --- the whole -----------------------------------------------------------------------------------------------------


def page(title: str, header: Markup, sections: Iterable[Markup], footer: Markup = NOTHING) -> str:
    """A whole page, in one file.

    Args:
        title: what the browser's tab says.
        header: what stands above the sections, as from ``header``.
        sections: the rest.
        footer: what stands under them.

    Raises:
        PlotlyMissingError: there are figures and plotly is not installed.
    """
    body = join(sections)
    drawn = "data-figure" in body
    scripts = [plotly_js(), _asset("page.js")] if drawn else []
    # Evaluation is allowed for tools that drive a browser; none of the page's own scripts evaluates text.
    allowed = " ".join(["'unsafe-eval'", *(f"'sha256-{_digest(script)}'" for script in scripts)])
    whole = _SHELL.format(
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}",
        title=title,
        css=Markup(_asset("page.css") + category_css()),
        header=header,
        body=body,
        footer=footer,
        scripts=_SCRIPTS.format(*map(Markup, scripts)) if drawn else NOTHING,
    )
    return str(whole)


def header(kicker: Cell, answer: Cell, *parts: Markup, lead: Cell = "") -> Markup:
    """The head of a page: what it is about, the answer in a sentence, what else there is to say at once."""
    return Markup('<header><p class="kicker">{}</p><h1>{}</h1>{}{}</header>').format(
        kicker, answer, Markup('<p class="lead">{}</p>').format(lead) if lead else NOTHING, join(parts)
    )


def contents(entries: Iterable[tuple[str, str]]) -> Markup:
    """Links to sections, from (anchor, heading)."""
    links = join(Markup('<li><a href="#{}">{}</a></li>').format(anchor, heading) for anchor, heading in entries)
    return Markup('<nav aria-label="Contents"><ul>{}</ul></nav>').format(links)


def section(anchor: str, heading: str, *parts: Markup, intro: Cell = "") -> Markup:
    """A part of the page with a heading and a sentence on what it shows."""
    return Markup('<section id="{0}" aria-labelledby="{0}-h"><h2 id="{0}-h">{1}</h2>{2}{3}</section>').format(
        anchor, heading, Markup('<p class="intro">{}</p>').format(intro) if intro else NOTHING, join(parts)
    )


def join(parts: Iterable[Markup]) -> Markup:
    """Pieces of markup, one after the other."""
    return Markup("\n").join(parts)


# --- text and numbers ----------------------------------------------------------------------------------------------


def size(count: int | None, unit_of: int | None = None) -> Markup:
    """Bytes as a number and a quiet unit; in the unit that suits ``unit_of``, where columns should be alike."""
    if count is None:
        return Markup('<span class="zero">-</span>')
    unit, scale = common_unit(abs(count) if unit_of is None else unit_of)
    number = f"{count:,}" if unit == "B" else f"{count / scale:,.2f}"
    return Markup('{}&nbsp;<span class="unit">{}</span>').format(number, unit)


def level(count: int | None, scale: int) -> Markup:
    """Bytes in a column whose heading names the unit; nothing is a dot."""
    if not count:
        return Markup('<span class="zero">{}</span>').format("\N{MIDDLE DOT}" if count == 0 else "-")
    return escape(f"{count / scale:,.2f}" if scale > 1 else f"{count:,}")


def share(part: int | None, whole: int | None) -> str:
    """``"61.2%"``."""
    return f"{100 * part / whole:.1f}%" if part is not None and whole else "-"


def swatch(category: str) -> Markup:
    """A small square in a category's colour and pattern."""
    return Markup('<span class="swatch {}" aria-hidden="true"></span>').format(category)


def category_name(category: str) -> Markup:
    """A category's swatch and name."""
    return Markup('<span class="category">{}{}</span>').format(swatch(category), words(category))


# --- blocks --------------------------------------------------------------------------------------------------------


def table(
    columns: Sequence[Cell],
    rows: Iterable[Sequence[Cell]],
    *,
    caption: str = "",
    total: Sequence[Cell] = (),
    text_columns: Iterable[int] = (),
    marked: int | None = None,
    optional: Iterable[int] = (),
) -> Markup:
    """A table whose first column names its rows.

    Args:
        columns: the headings; where all are empty there is no head.
        rows: the cells.
        caption: what the table shows.
        total: a last row.
        text_columns: columns other than the first that hold text; the rest are numbers, aligned right.
        marked: a column to set off.
        optional: columns that a narrow screen leaves out.
    """
    texts, dropped = {0, *text_columns}, set(optional)

    def kind(index: int) -> str:
        names = ("" if index in texts else "number", "marked" if index == marked else "")
        return " ".join(name for name in (*names, "optional" if index in dropped else "") if name)

    def row(cells: Sequence[Cell]) -> Markup:
        first = Markup('<th scope="row">{}</th>').format(cells[0])
        rest = (Markup('<td class="{}">{}</td>').format(kind(i), cell) for i, cell in enumerate(cells) if i)
        return Markup("<tr>{}{}</tr>").format(first, Markup("").join(rest))

    heads = Markup("").join(
        Markup('<th scope="col" class="{}">{}</th>').format(kind(index), name) for index, name in enumerate(columns)
    )
    return Markup('<div class="wide"><table>{}{}<tbody>{}</tbody>{}</table></div>').format(
        Markup("<caption>{}</caption>").format(caption) if caption else NOTHING,
        Markup("<thead><tr>{}</tr></thead>").format(heads) if any(columns) else NOTHING,
        join(map(row, rows)),
        Markup("<tfoot>{}</tfoot>").format(row(total)) if total else NOTHING,
    )


def facts(rows: Iterable[tuple[Cell, Cell, Cell]]) -> Markup:
    """The few numbers that matter most: (what, how much, what to know about it)."""
    cells = (
        Markup('<div><dt>{}</dt><dd>{}</dd><dd class="why">{}</dd></div>').format(what, number, why)
        for what, number, why in rows
    )
    return Markup('<dl class="facts">{}</dl>').format(join(cells))


def bar(parts: Iterable[tuple[str, int]], whole: int, label: str) -> Markup:
    """A stacked bar, from (CSS class, bytes), as wide as ``whole`` when full."""
    pieces = Markup("").join(
        Markup('<span class="{}" style="width:{:.3f}%"></span>').format(kind, 100 * part / whole)
        for kind, part in parts
        if part > 0 and whole
    )
    return Markup('<div class="bar" role="img" aria-label="{}">{}</div>').format(label, pieces)


def bars(rows: Iterable[tuple[Cell, Sequence[tuple[str, int]], Cell]], whole: int) -> Markup:
    """Stacked bars under each other, from (name, parts, what stands at the end)."""
    cells = (
        Markup('<div class="row"><div class="label">{}</div>{}<div class="value">{}</div></div>').format(
            name, bar(parts, whole, Markup(escape(name)).striptags()), value
        )
        for name, parts, value in rows
    )
    return Markup('<div class="bars">{}</div>').format(join(cells))


def key(entries: Iterable[tuple[str, Cell]]) -> Markup:
    """What the colours of bars stand for, from (CSS class, name)."""
    items = (Markup("<li>{}{}</li>").format(swatch(kind), name) for kind, name in entries)
    return Markup('<ul class="key">{}</ul>').format(join(items))


def category_key(rows: Iterable[Mapping[str, int | None]]) -> Markup:
    """The key of the categories that hold anything in some rows."""
    tables = list(rows)
    return key((name.value, words(name.value)) for name in CATEGORIES if any(row.get(name.value) for row in tables))


def details(summary: Cell, *parts: Markup, opened: bool = False) -> Markup:
    """What is there for those who ask."""
    return Markup("<details{}><summary>{}</summary>{}</details>").format(
        Markup(" open") if opened else NOTHING, summary, join(parts)
    )


def figure(drawing: Figure, *, label: str, caption: Cell = "", tall: bool = False, more: Markup = NOTHING) -> Markup:
    """A figure that plotly draws. Beside one whose ``layout.meta`` says so stands a readout of its bands.

    Args:
        drawing: the figure. ``layout.meta``, where bands are to be read, has ``unit``, ``at`` (the index at which to
            begin), ``labels`` (what to call every index), ``others`` (further values, by index).
        label: what a screen reader calls it.
        caption: what stands under it.
        tall: whether it needs more height.
        more: what belongs to it, such as its numbers as a table.
    """
    meta = drawing["layout"].get("meta")
    keys = "Arrow keys move along it and from band to band, P returns to the peak." if meta else ""
    return Markup(
        '<figure data-figure><div class="drawing{}"><div class="plot{}" role="application" tabindex="0" '
        'aria-label="{}"></div>{}</div><figcaption>{} <span class="screen">{}</span></figcaption>{}'
        '<script type="application/json">{}</script></figure>'
    ).format(
        " read" if meta else "",
        " tall" if tall else "",
        f"{label}. {keys}",
        _readout(drawing, meta) if meta else NOTHING,
        caption,
        keys,
        more,
        embedded(drawing),
    )


def _readout(drawing: Figure, meta: Mapping[str, Any]) -> Markup:
    bands = [trace for trace in drawing["data"] if trace.get("stackgroup")]
    at, unit = meta["at"], meta["unit"]
    whole = sum(band["y"][at] for band in bands)
    row = Markup(
        '<tr data-band="{}"><th scope="row">{}{}</th><td class="number value">{:.2f}</td>'
        '<td class="number part">{:.1f}%</td></tr>'
    )
    rows = [
        row.format(
            place,
            Markup('<span class="swatch {}" style="background-color:{}" aria-hidden="true"></span>').format(
                band["meta"]["category"], band["fillcolor"]
            ),
            band["meta"]["name"],
            band["y"][at],
            100 * band["y"][at] / whole if whole else 0,
        )
        for place, band in reversed(list(enumerate(bands)))
    ]
    others = [
        Markup('<tr data-other="{}"><th scope="row">{}</th><td class="number value">{}</td><td></td></tr>').format(
            place, other["name"], "-" if other["y"][at] is None else f"{other['y'][at]:.2f}"
        )
        for place, other in enumerate(meta.get("others", ()))
    ]
    return Markup(
        '<div class="readout"><p class="when">{}</p><table><thead><tr><th scope="col"></th>'
        '<th scope="col" class="number">{}</th><th scope="col" class="number">share</th></tr></thead>'
        '<tbody>{}</tbody><tfoot><tr><th scope="row">total</th><td class="number" data-total>{:.2f}</td><td></td></tr>'
        '{}</tfoot></table><p class="said skip" aria-live="polite"></p></div>'
    ).format(meta["labels"][at] if not meta.get("home") else meta["home"], unit, join(rows), whole, join(others))


# --- on disk -------------------------------------------------------------------------------------------------------


def write_whole(text: str, path: str | os.PathLike[str]) -> Path:
    """Write a page, whole or not at all; its folder is made.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


# --- what the page carries -----------------------------------------------------------------------------------------


def embedded(data: Any) -> Markup:
    """Data as JSON that no HTML parser takes for anything else."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&\N{LINE SEPARATOR}\N{PARAGRAPH SEPARATOR}":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@functools.cache
def plotly_js() -> str:
    """plotly.js, from the plotly package, which is not imported.

    Raises:
        PlotlyMissingError: it is not installed.
    """
    spec = importlib.util.find_spec("plotly")
    file = Path(spec.origin).parent / "package_data" / "plotly.min.js" if spec and spec.origin else None
    if file is None or not file.is_file():
        raise PlotlyMissingError("the report's figures need plotly: pip install plotly")
    return file.read_text(encoding="utf-8").replace("</script", "<\\/script")


@functools.cache
def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
