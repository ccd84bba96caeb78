"""A dry run on the terminal: what held the memory, what the card would show, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.text import Text

from ..device import Line
from ..records import Summary
from ..text import printable
from ..units import format_bytes
from .terminal import print_plainly, summary_parts, table_of_lines


def print_dry_run(
    data: Mapping[str, Any], summary: Summary, assumed: Sequence[str] = (), console: Console | None = None
) -> None:
    """Print a dry run.

    Args:
        data: its summary, as ``--json`` prints it.
        summary: the same, as the record has it.
        assumed: sentences on what was not known.
        console: where to print; standard output when not given.
    """
    console = console or Console()
    notes = [*assumed, f"{data['steps']} steps, none of them computed."]
    parts = [
        *summary_parts(summary, console.width),
        Padding(table_of_lines("beyond what is allocated", _lines(data)), (0, 0, 1, 0)),
        _verdict(data),
        *(Text(printable(note), style="dim") for note in notes),
    ]
    print_plainly(Padding(Group(*parts), (0, 1, 1, 1)), console)


def _lines(data: Mapping[str, Any]) -> list[Line]:
    allocated, reserved, context = (
        data["allocated_peak_bytes"] or 0,
        data["reserved_peak_bytes"],
        data["context_bytes"] or 0,
    )
    lines = [Line("allocated at the peak", allocated, "the categories above")]
    if reserved is not None:
        why = "the peak of what the caching allocator takes from the card, free blocks included"
        lines.append(Line("reserved at its peak", reserved, why))
        known = "CUDA's own" if data["context_bytes"] else "not known for this card, and not in the sum"
        lines.append(Line("CUDA context", context, known))
        lines.append(Line("nvidia-smi would show", data["process_peak_bytes"] or 0, "reserved and context"))
    return lines


def _verdict(data: Mapping[str, Any]) -> Text:
    device, process = data["device"], data["process_peak_bytes"]
    total = device.get("total_bytes")
    if data["fits"] is None or total is None:
        return Text("Whether it fits depends on the card: --device NAME or --memory 24GiB.", style="bold")
    name = printable(str(device.get("name")))
    if data["fits"]:
        free = format_bytes(total - process)
        return Text(f"It fits {name}: {free} of {format_bytes(total)} would be left.", style="bold green")
    over = f", {format_bytes(process - total)} too much" if process > total else ""
    return Text(f"It does not fit {name}, which has {format_bytes(total)}{over}.", style="bold red")
