"""What a person sees at the end of a run: one table, and what stands behind it in a line each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..categories import CATEGORIES, PHASES, Category
from ..device import Line
from ..records import FailureRecord, Peak, PhaseRecord, Summary
from ..text import printable
from ..units import common_unit, format_bytes

_COLOURS = {
    Category.WEIGHTS: "blue",
    Category.GRADIENTS: "magenta",
    Category.OPTIMIZER_STATES: "cyan",
    Category.ACTIVATIONS: "green",
    Category.INPUTS: "white",
    Category.TEMPORARIES: "yellow",
    Category.COMMUNICATION: "bright_blue",
    Category.UNATTRIBUTED: "red",
}
_SHOWN_PHASES = tuple(phase for phase in PHASES if phase.value not in ("idle", "load", "save"))
_TOP_MODULES = 5
_NARROW = 72
_COLUMNS_BEFORE_PHASES = 40
_PHASE_COLUMN = 10
_ASCII = {
    ord("\N{MIDDLE DOT}"): ".",
    **dict.fromkeys(range(9608, 9616), "#"),
    ord("\N{BOX DRAWINGS LIGHT HORIZONTAL}"): "-",
}
_PEFT_PREFIX = "base_model.model."
_BAR_WIDTH = 6


def print_summary(
    summary: Summary,
    path: Path | None = None,
    console: Console | None = None,
    beyond: Sequence[Line] = (),
    page: Path | None = None,
) -> None:
    """Print the end-of-run table.

    Args:
        summary: the run.
        path: where its record is.
        console: where to print; standard output when not given.
        beyond: the lines that add up to what the driver shows as used, at the end.
        page: where its HTML report is.
    """
    console = console or Console()
    print_plainly(render_summary(summary, path, console.width, page), console)
    if beyond:
        print_plainly(Padding(table_of_lines("the device at the end", beyond), (0, 1, 1, 1)), console)


def table_of_lines(title: str, lines: Sequence[Line]) -> Table:
    """Bytes line by line, with a reason each."""
    table = quiet_table()
    table.add_column(title, no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for line in lines:
        table.add_row(Text(printable(line.what)), format_bytes(line.bytes), Text(printable(line.why), style="dim"))
    return table


def render_summary(
    summary: Summary, path: Path | None = None, width: int = 80, page: Path | None = None
) -> RenderableType:
    """The end-of-run table and its notes, for a terminal of some width."""
    parts = summary_parts(summary, width)
    parts += [Text(note, style="dim") for note in _notes(summary, path, page)]
    return Padding(Group(*parts), (0, 1, 1, 1))


def summary_parts(summary: Summary, width: int = 80) -> list[RenderableType]:
    """The end-of-run table without its notes."""
    parts: list[RenderableType] = [Text(), _headline(summary)]
    if summary.worst is not None and summary.worst.traced:
        peak = summary.peak
        phases = {**summary.worst_phases, **summary.worst.phases}
        tables = category_table(peak, phases, width), _module_table(peak)
        parts += [Padding(table, (1, 0, 0, 0)) for table in tables] + [Text()]
    return parts


def print_failure(failure: FailureRecord, console: Console | None = None) -> None:
    """Print what held the memory when training failed, and what would have helped."""
    print_plainly(Padding(Group(*_failure_parts(failure)), (0, 1, 1, 1)), console)


def print_plainly(what: RenderableType, console: Console | None) -> None:
    """Print, on a terminal without Unicode with what ASCII has for it."""
    console = console or Console()
    if console.encoding.lower().startswith("utf"):
        console.print(what)
        return
    with console.capture() as captured:
        console.print(what)
    text = captured.get().translate(_ASCII)
    console.file.write(text.encode(console.encoding, "replace").decode(console.encoding))


def _failure_parts(failure: FailureRecord) -> Iterable[RenderableType]:
    title = Text()
    title.append("Out of memory" if failure.out_of_memory else "Training ended in an exception", style="bold red")
    title.append(f" in step {failure.step}")
    if failure.phase is not None:
        title.append(f", {failure.phase.value}")
    if failure.module:
        title.append(f", in {printable(failure.module.removeprefix(_PEFT_PREFIX))}")
    if failure.requested_bytes is not None:
        title.append(f": {format_bytes(failure.requested_bytes)} asked for")
    yield title
    yield Text(printable(failure.error), style="dim")
    peak = failure.peak
    if peak.bytes is None:
        return
    when = "Then" if failure.traced else f"In step {peak.step or 'before'}, the last that was traced,"
    held = sorted(((size or 0, name) for name, size in peak.categories.items()), reverse=True)
    parts = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for size, name in held if size)
    yield Text(f"{when} {format_bytes(peak.bytes)} was held: {parts}.")
    if failure.reserved_bytes is not None:
        yield Text(
            f"{format_bytes(failure.reserved_bytes)} was reserved, {format_bytes(failure.free_bytes)} of it free"
            " in pieces that did not fit."
        )
    if failure.suggestions:
        table = quiet_table()
        table.add_column("would free up to", justify="right", no_wrap=True)
        table.add_column("what to do", overflow="fold")
        table.add_column("", overflow="fold")
        for suggestion in failure.suggestions[:_TOP_MODULES]:
            why = Text(printable(suggestion.why), style="dim")
            table.add_row(format_bytes(suggestion.frees_bytes), Text(printable(suggestion.what)), why)
        yield Padding(table, (1, 0, 0, 0))


def _headline(summary: Summary) -> Text:
    model = summary.header.model
    line = Text()
    line.append("MemTrace", style="bold")
    if model.get("class"):
        line.append(f"  {printable(str(model['class']))}, {_count(model.get('parameters'))} parameters")
        line.append(f", {_count(model.get('trainable_parameters'))} trainable")
    line.append("\n")
    peak = summary.peak
    if peak.bytes is None or peak.phase is None:
        line.append(f"{summary.steps} steps counted, none traced")
        return line
    line.append(f"Peak {format_bytes(peak.bytes)}", style="bold")
    line.append(f" in {peak.phase.value} of step {peak.step}")
    largest = max(CATEGORIES, key=lambda category: peak.categories[category] or 0)
    line.append(f", {_share(peak.categories[largest], peak.bytes)} of it {largest.value.replace('_', ' ')}")
    return line


def category_table(peak: Peak, phases: Mapping[str, PhaseRecord], width: int = 80) -> Table:
    """What every category held at the peak and, where the terminal is wide enough, in each phase."""
    if width < _NARROW:
        phases = {}
    room = (width - _COLUMNS_BEFORE_PHASES) // _PHASE_COLUMN
    largest = sorted(phases, key=lambda name: phases[name].peak_bytes, reverse=True)
    known = [phase.value for phase in _SHOWN_PHASES if phase.value in phases]
    kept = [name for name in largest if name in known][:room]
    shown = [(name, phases[name]) for name in known if name in kept]
    unit, scale = common_unit(peak.bytes)

    def level(size: int | None) -> str:
        return _level(size, scale)

    table = quiet_table(show_footer=True)
    table.add_column(f"in {unit}", footer="total", no_wrap=True)
    table.add_column("peak", footer=level(peak.allocator_bytes), justify="right", no_wrap=True)
    table.add_column("share", footer=_share(peak.bytes, peak.bytes), justify="right", no_wrap=True)
    table.add_column("", width=_BAR_WIDTH if shown else 0, no_wrap=True)
    for name, phase in shown:
        style = "bold" if peak.phase is not None and name == peak.phase.value else ""
        table.add_column(name, footer=level(phase.peak_bytes), justify="right", style=style, no_wrap=True)
    for category in CATEGORIES:
        size = peak.categories[category]
        levels = [phase.at_peak[category] for _, phase in shown]
        if size or any(levels) or category is Category.UNATTRIBUTED:
            table.add_row(
                Text(category.value.replace("_", " "), style=_COLOURS[category]),
                level(size),
                _share(size, peak.bytes),
                Text(_bar(size, peak.bytes) if shown else "", style=_COLOURS[category]),
                *map(level, levels),
            )
    return table


def _module_table(peak: Peak) -> RenderableType:
    named = [(name, row) for name, row in peak.modules.items() if name]
    largest = sorted(named, key=lambda item: (-sum(item[1].values()), item[0]))[:_TOP_MODULES]
    if not largest:
        return Text()
    unit, scale = common_unit(peak.bytes)
    table = quiet_table()
    table.add_column("modules that hold most", overflow="fold")
    table.add_column(unit, justify="right", no_wrap=True)
    table.add_column("of which", overflow="fold")
    for name, row in largest:
        parts = sorted(row.items(), key=lambda item: -item[1])
        detail = ", ".join(f"{printable(kind).replace('_', ' ')} {_level(size, scale)}" for kind, size in parts)
        shown = printable(name.removeprefix(_PEFT_PREFIX))
        table.add_row(Text(shown), _level(sum(row.values()), scale), Text(detail, style="dim"))
    return table


def _notes(summary: Summary, path: Path | None, page: Path | None) -> Iterable[str]:
    if summary.peak.bytes is not None:
        left = summary.peak.categories[Category.UNATTRIBUTED] or 0
        yield (
            f"The categories add up to the total, to the byte; {format_bytes(left)} of it"
            f" ({_share(left, summary.peak.bytes)}) is unattributed."
        )
    if summary.growth is not None:
        yield f"Growth: {printable(str(summary.growth))}."
    yield (
        f"{summary.traced_steps} of {summary.steps} steps traced. Tracing took {summary.tracing_seconds:.2f} s"
        f" of {summary.seconds + summary.tracing_seconds:.2f} s of steps."
    )
    if path is not None:
        yield f"Record: {printable(str(path))}"
    if page is not None:
        yield f"Report: {printable(str(page))}"


def quiet_table(**options: Any) -> Table:
    """A table with one rule, under its head."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False, **options)


def _level(size: int | None, scale: int) -> str:
    return f"{size / scale:.2f}" if size else "\N{MIDDLE DOT}"


def _share(part: int | None, whole: int | None) -> str:
    return f"{100 * part / whole:.1f}%" if part is not None and whole else "-"


def _bar(part: int | None, whole: int | None) -> str:
    eighths = round(8 * _BAR_WIDTH * (part or 0) / whole) if whole else 0
    full, rest = divmod(max(eighths, 0), 8)
    return "\N{FULL BLOCK}" * full + (chr(0x2590 - rest) if rest else "")


def _count(number: Any) -> str:
    value = float(number) if isinstance(number, (int, float)) else 0.0
    for unit in ("", "k", "M", "B"):
        if value < 1000:
            return f"{value:.4g}{unit}"
        value /= 1000
    return f"{value:.4g}T"
