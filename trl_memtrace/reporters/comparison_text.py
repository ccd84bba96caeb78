"""Two records side by side, on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..comparison import Change, Comparison, Side, Tolerance
from ..text import printable
from ..units import format_bytes

_TOP = 8
_MANY_TIMES = 10
_NOTHING = "\N{MIDDLE DOT}"


def print_comparison(
    comparison: Comparison, tolerance: Tolerance | None = None, console: Console | None = None
) -> None:
    """Print what grew, the largest growth first.

    Args:
        comparison: what to show.
        tolerance: how much the peak may grow, where that was asked.
        console: where to print; standard output when not given.
    """
    (console or Console(highlight=False)).print(Padding(Group(*_parts(comparison, tolerance)), (1, 1, 1, 1)))


def verdict(comparison: Comparison, tolerance: Tolerance) -> str:
    """Whether the peak grew by more than it may, in a sentence."""
    allowed = printable(tolerance.text)
    if tolerance.allows(comparison.peak):
        return f"Within the {allowed} allowed."
    return f"Over: the peak grew by {_growth(comparison.peak).lstrip('+')}, more than the {allowed} allowed."


def _parts(comparison: Comparison, tolerance: Tolerance | None) -> Iterable[RenderableType]:
    yield _side("A", comparison.before)
    yield _side("B", comparison.after)
    yield Text.assemble(("\n", ""), (headline(comparison), "bold"))
    parts: list[tuple[str, Sequence[Change]]] = [
        ("category at the peak", [_in_words(change) for change in comparison.categories]),
        ("role", [_in_words(change) for change in comparison.roles]),
        ("phase, at its highest", comparison.phases),
        ("module", comparison.modules if any(change.name for change in comparison.modules) else ()),
        ("asked for by", comparison.sites),
    ]
    for title, changes in parts:
        table = _table(title, changes)
        if table is not None:
            yield Padding(table, (1, 0, 0, 0))
    if comparison.reserved is not None:
        before, after = map(format_bytes, (comparison.reserved.before_bytes, comparison.reserved.after_bytes))
        yield Text(f"\nReserved at most: {before} in A, {after} in B ({_growth(comparison.reserved)}).")
    if tolerance is not None:
        style = "green" if tolerance.allows(comparison.peak) else "bold red"
        yield Text(f"\n{verdict(comparison, tolerance)}", style=style)


def _side(letter: str, side: Side) -> Text:
    peak = side.peak
    where = f" in {peak.phase.value}" if peak.phase is not None else ""
    step = f" of step {peak.step}" if peak.step is not None and side.source != "snapshot" else ""
    line = Text.assemble((letter, "bold"), f"  {printable(side.name)}")
    line.append(f"  {side.source.replace('_', ' ')}, {format_bytes(peak.bytes)}{where}{step}", style="dim")
    return line


def headline(comparison: Comparison) -> str:
    """By how much the peak grew, and what most of that is, in a sentence."""
    peak = comparison.peak
    if not peak.growth_bytes:
        return f"The peak is the same: {format_bytes(peak.after_bytes)}."
    verb = "grew" if peak.growth_bytes > 0 else "shrank"
    changed = [change for change in comparison.categories if change.growth_bytes * peak.growth_bytes > 0]
    largest = max(changed, key=lambda change: abs(change.growth_bytes), default=peak)
    part = f": most of it {_in_words(largest).name}, {signed(largest.growth_bytes)}" if changed else ""
    return f"The peak {verb} by {_growth(peak).lstrip('+-')}{part}."


def _in_words(change: Change) -> Change:
    return replace(change, name=change.name.replace("_", " "))


def _table(title: str, changes: Sequence[Change]) -> Table | None:
    """The changes that are any, the largest first; those of least bytes in one line."""
    moved = [change for change in changes if change.growth_bytes]
    if not moved:
        return None
    shown = sorted(moved, key=lambda change: -abs(change.growth_bytes))[:_TOP]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(title, overflow="fold")
    for column in ("A", "B", "grew by", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for change in moved:
        if change in shown:
            style = "red" if change.growth_bytes > 0 else "green"
            table.add_row(
                Text(printable(change.name) or "(no module)"),
                _level(change.before_bytes),
                _level(change.after_bytes),
                Text(signed(change.growth_bytes), style=style),
                Text(percent(change), style="dim"),
            )
    left = [change for change in moved if change not in shown]
    if left:
        rest = sum(change.growth_bytes for change in left)
        table.add_row(Text(f"{len(left)} more", style="dim"), "", "", Text(signed(rest), style="dim"), "")
    return table


def _level(size: int | None) -> str:
    return format_bytes(size) if size else _NOTHING


def signed(size: int) -> str:
    """``"+1.50 KiB"``."""
    sign = "-" if size < 0 else "+" if size else ""
    return f"{sign}{format_bytes(abs(size))}"


def percent(change: Change) -> str:
    """``"+12.3%"``, ``"17x"`` where it grew many times over, ``"new"`` where there was nothing."""
    ratio = change.growth_ratio
    if ratio is None:
        return "new" if change.after_bytes else ""
    return f"{ratio:+.1%}" if ratio < _MANY_TIMES else f"{ratio + 1:,.0f}x"


def _growth(change: Change) -> str:
    share = percent(change)
    return signed(change.growth_bytes) + (f" ({share})" if share else "")
