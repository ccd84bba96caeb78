"""A sweep on the terminal: every configuration, and what each knob costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..sweep import Cost, Row, Sweep
from ..text import printable, words
from ..trials import Outcome
from ..units import common_unit, format_bytes
from .terminal import print_plainly, quiet_table

_NAMED = 3
_Size = Callable[[Outcome], int | None]
_NOTHING = "\N{MIDDLE DOT}"


def print_sweep(sweep: Sweep, written: Iterable[Path] = (), console: Console | None = None) -> None:
    """Print a sweep.

    Args:
        sweep: what to show.
        written: the files that it left.
        console: where to print; standard output when not given.
    """
    print_plainly(Padding(Group(*_parts(sweep, written)), (1, 1, 1, 1)), console)


def headline(sweep: Sweep) -> str:
    """From what to what it takes, in a sentence."""
    sizes = [row.outcome.process_bytes for row in sweep.rows if row.outcome.process_bytes is not None]
    failed = sum(row.outcome.error is not None for row in sweep.rows)
    count = f"{len(sweep.rows)} configurations of trl {sweep.kind}"
    if not sizes:
        return f"{count}: none could be run."
    fitting = [row.outcome.fits for row in sweep.rows if row.outcome.fits is not None]
    fits = f"; {sum(fitting)} of them fit" if fitting else ""
    lost = f"; {failed} could not be run" if failed else ""
    return f"{count}: from {format_bytes(min(sizes))} to {format_bytes(max(sizes))}{fits}{lost}."


def cost_text(cost: Cost) -> str:
    """``"1.50 KiB"``, or from the least to the most where the other knobs make a difference."""
    spread = cost.spread
    least, median, most = (format_bytes(round(size)) for size in (spread.least, spread.median, spread.most))
    return median if least == most else f"{median} ({least} to {most})"


def mostly(cost: Cost) -> str:
    """The categories that most of a cost is, in words."""
    largest = sorted(cost.categories.items(), key=lambda item: -abs(item[1]))[:_NAMED]
    return ", ".join(f"{words(name)} {format_bytes(round(size))}" for name, size in largest)


def _parts(sweep: Sweep, written: Iterable[Path]) -> Iterator[RenderableType]:
    errors = sweep.errors
    yield Text(headline(sweep), style="bold")
    yield Padding(_rows(sweep, errors), (1, 0, 0, 0))
    costs = sweep.costs()
    if costs:
        yield Padding(_costs(costs), (1, 0, 0, 0))
    yield Text()
    for number, error in enumerate(errors, 1):
        yield Text(f"[{number}] {printable(error)}", style="red")
    for sentence in sweep.assumed:
        yield Text(printable(sentence), style="dim")
    for path in written:
        yield Text(printable(str(path)), style="dim")


def _rows(sweep: Sweep, errors: list[str]) -> Table:
    highest = max((row.outcome.process_bytes or 0 for row in sweep.rows), default=0)
    unit, scale = common_unit(highest)
    table = quiet_table(title=f"Sizes in {unit}", title_justify="left", title_style="dim")
    for knob in sweep.grid.knobs:
        table.add_column(words(printable(knob.name)), overflow="fold")
    columns: list[tuple[str, _Size]] = [("allocated", lambda outcome: outcome.allocated_bytes)]
    if any(row.outcome.reserved_bytes is not None for row in sweep.rows):
        columns.append(("reserved", lambda outcome: outcome.reserved_bytes))
    if any(row.outcome.process_bytes != row.outcome.reserved_bytes for row in sweep.rows) and len(columns) > 1:
        columns.append(("nvidia-smi", lambda outcome: outcome.process_bytes))  # the context is known
    for name, _ in columns:
        table.add_column(name, justify="right", min_width=len(name))
    table.add_column("peak in", overflow="fold")
    has_verdict = any(row.outcome.fits is not None for row in sweep.rows)
    if has_verdict:
        table.add_column("fits", min_width=4)
    for row in sweep.rows:
        choices = (Text(printable(choice)) for choice in row.point.choices)
        table.add_row(*choices, *_cells(row, scale, [of for _, of in columns], has_verdict, errors))
    return table


def _cells(row: Row, scale: int, sizes: Sequence[_Size], has_verdict: bool, errors: list[str]) -> Iterator[Text]:
    outcome = row.outcome
    if outcome.error is not None:
        yield from [Text(_NOTHING)] * len(sizes)
        yield Text(f"failed [{errors.index(outcome.error) + 1}]", style="red")
        return
    for size_of in sizes:
        size = size_of(outcome)
        yield Text(_NOTHING if size is None else f"{size / scale:,.2f}")
    yield Text(outcome.phase or "")
    if has_verdict:
        yield Text("yes", style="green") if outcome.fits else Text("no", style="bold red")


def _costs(costs: Iterable[Cost]) -> Table:
    table = quiet_table()
    for name in ("what a knob costs", "for", "at the peak", "of which"):
        table.add_column(name, overflow="fold")
    for cost in costs:
        names = (words(printable(cost.knob)), printable(cost.what))
        table.add_row(*map(Text, names), cost_text(cost), Text(mostly(cost), style="dim"))
    return table
