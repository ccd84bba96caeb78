"""What fits a card, on the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..fitting import Fit
from ..text import printable, words
from ..trials import Outcome
from ..units import format_bytes
from .terminal import print_plainly, quiet_table

_NOTHING = "\N{MIDDLE DOT}"


def print_fit(found: Fit, console: Console | None = None) -> None:
    """Print what was found.

    Args:
        found: what to show.
        console: where to print; standard output when not given.
    """
    print_plainly(Padding(Group(*_parts(found)), (1, 1, 1, 1)), console)


def _parts(found: Fit) -> Iterator[RenderableType]:
    yield _verdict(found)
    if found.largest:
        yield Padding(_largest(found), (1, 0, 0, 0))
    if found.savings:
        yield Padding(_savings(found), (1, 0, 0, 0))
    failed = [saving for saving in found.savings if saving.outcome.error is not None]
    if failed:
        yield Text()
    for saving in failed:
        yield Text(f"{printable(saving.saver.text)}: {printable(saving.outcome.error or '')}", style="dim")
    if found.together:
        assert found.together_outcome is not None
        yield Text(f"\nIt fits with these, at {format_bytes(found.together_outcome.process_bytes)}:", style="bold")
        yield Text(printable(found.command(found.together)))
    elif not found.outcome.fits and found.savings:
        yield Text("\nWith all that helps together it does not fit either.", style="bold red")
    yield Text()
    for sentence in found.outcome.assumed:
        yield Text(printable(sentence), style="dim")
    yield Text("Every line is a dry run of its own; sizes are what nvidia-smi would show.", style="dim")


def _verdict(found: Fit) -> Text:
    held = found.outcome.process_bytes or 0
    assert found.outcome.summary is not None
    device = found.outcome.summary["device"]
    total, name = device["total_bytes"], printable(str(device["name"]))
    if found.outcome.fits:
        left = format_bytes(max(total - held, 0))
        return Text(f"It fits {name}: it takes {format_bytes(held)}, and {left} are left.", style="bold green")
    return Text(f"It does not fit {name}: it takes {format_bytes(held)} of {format_bytes(total)}.", style="bold red")


def _largest(found: Fit) -> Table:
    table = quiet_table()
    table.add_column("how far it could go", overflow="fold")
    for name in ("now", "largest that fits", "it takes", "the next takes"):
        table.add_column(name, justify="right")
    for row in found.largest:
        beyond = "" if row.next_value is None else f"{row.next_value:,}: {_size(row.next_outcome)}"
        largest = "none" if row.value is None else f"{row.value:,}"
        table.add_row(Text(words(row.knob)), f"{row.now:,}", Text(largest, style="bold"), _size(row.outcome), beyond)
    return table


def _savings(found: Fit) -> Table:
    table = quiet_table()
    table.add_column("what would save memory", overflow="fold")
    table.add_column("saves", justify="right", no_wrap=True)
    table.add_column("it takes", justify="right", no_wrap=True)
    table.add_column("fits")
    table.add_column("flags", overflow="fold")
    fits = {True: Text("yes", style="green"), False: Text("no", style="red"), None: Text(_NOTHING)}
    for saving in found.savings:
        table.add_row(
            Text(saving.saver.name),
            _NOTHING if saving.saves_bytes is None else format_bytes(saving.saves_bytes),
            _size(saving.outcome),
            fits[saving.outcome.fits],
            Text(printable(saving.saver.text), style="dim"),
        )
    return table


def _size(outcome: Outcome | None) -> str:
    return _NOTHING if outcome is None or outcome.process_bytes is None else format_bytes(outcome.process_bytes)
