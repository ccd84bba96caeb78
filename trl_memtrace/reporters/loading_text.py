"""What loading takes, and the stages of a step, as tables for a terminal. Names come from outside, and are escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..text import printable
from ..units import GIB, MIB

if TYPE_CHECKING:
    from ..loading import Footprint, LoadRow
    from ..model import AccelerateEstimate
    from ..records import PhaseRecord

_SHOWN = ("weights", "reserved", "process")
STAGES = ("model", "gradients", "backward", "optimizer step")


def render_load(name: str, rows: Sequence[LoadRow], device: str | None) -> RenderableType:
    """The table of all forms, and below it how each prediction is made up."""
    parts: list[RenderableType] = [_load_table(name, rows, device), ""]
    for row in rows:
        parts += [_lines(f"{row.dtype}, predicted", row.predicted), ""]
        if row.measured is not None and row.measured.lines:
            parts += [_lines(f"{row.dtype}, measured", row.measured), ""]
    if device is None:
        parts.append(Text("No card is given (--device), so its CUDA context is not counted.", "bright_black"))
    return Group(*parts)


def render_stages(
    name: str, estimates: Sequence[AccelerateEstimate], phases: Mapping[str, PhaseRecord] | None
) -> RenderableType:
    """The stages of a step with Adam by accelerate's formula, beside the peak of each phase of a record."""
    table = _table(f"{printable(name)}: GiB at each stage of a step with Adam, batch of one", "dtype", *STAGES)
    for estimate in estimates:
        table.add_row(estimate.dtype, *(_gib(size) for size in _stages(estimate)))
    if phases is not None:
        peaks = [phases[name].peak_bytes if name in phases else None for name in ("forward", "backward", "optimizer")]
        weights = [size for phase in phases.values() if (size := phase.at_end["weights"]) is not None]
        table.add_section()
        table.add_row("the run", *map(_gib, (max(weights, default=None), *peaks)))
    note = "By accelerate's formula: activations are not in it."
    if phases is not None:
        note += " Of the run: its weights, and the peaks of forward, backward and optimizer step."
    return Group(table, Text(note, "bright_black"))


def _stages(estimate: AccelerateEstimate) -> tuple[int | None, ...]:
    stages = estimate.stages
    if stages is None:
        return (None,) * len(STAGES)
    return stages.model_bytes, stages.gradients_bytes, stages.backward_bytes, stages.optimizer_step_bytes


def _load_table(name: str, rows: Sequence[LoadRow], device: str | None) -> Table:
    where = f" on {printable(device)}" if device else ""
    levels = [level for level in _SHOWN if any(_level(row.predicted, level) is not None for row in rows)]
    compared = any(row.errors is not None for row in rows)
    table = _table(f"Loading {printable(name)}{where}, MiB", "dtype", "accelerate")
    for column in (*(["off"] if compared else []), *levels, *(["off", "measured"] if compared else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        predicted = [_mib(_level(row.predicted, level)) for level in levels]
        total = _mib(row.accelerate.total_bytes)
        if not compared:
            table.add_row(row.dtype, total, *predicted)
            continue
        theirs, ours = ("-", "-") if row.errors is None else (f"{error:+.2%}" for error in row.errors)
        real = None if row.measured is None else row.measured.bytes
        table.add_row(row.dtype, total, theirs, *predicted, ours, _mib(real))
    return table


def _lines(title: str, footprint: Footprint) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False, header_style="bright_black")
    table.add_column(Text(title, "bold"), no_wrap=True)
    table.add_column("MiB", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for line in footprint.lines:
        table.add_row(printable(line.what), _mib(line.bytes), Text(printable(line.why), "bright_black"))
    table.add_section()
    table.add_row(Text("total", "bold"), Text(_mib(footprint.bytes), "bold"), "")
    return table


def _level(footprint: Footprint | None, level: str) -> int | None:
    size: int | None = None if footprint is None else getattr(footprint, f"{level}_bytes")
    return size


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        header_style="bright_black",
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _mib(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / MIB:,.1f}" if size >= MIB else f"{size / MIB:,.4f}"


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:,.2f}"
