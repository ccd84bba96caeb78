"""A run that is under way, as one frame for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from ..live import LiveRun
from ..text import printable
from ..units import format_bytes
from .terminal import category_table

_BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


def waiting(path: Path) -> Text:
    """What is shown before the record is there."""
    return Text(f"Waiting for the run to begin: there is no record at {printable(str(path))} yet. Ctrl-C ends this.")


def frame(run: LiveRun, path: Path, quiet_seconds: float | None = None, width: int = 80) -> RenderableType:
    """One frame.

    Args:
        run: what the record has said so far.
        path: where it is.
        quiet_seconds: how long nothing has been written; None to leave it out.
        width: the terminal's.
    """
    return Padding(Group(*_parts(run, path, quiet_seconds, width)), (0, 1))


def sparkline(values: Sequence[int], width: int) -> str:
    """The last values as bars from nothing to the highest."""
    shown = list(values)[-width:]
    highest = max(shown, default=0)
    return "".join(_BARS[min(7, 8 * max(value, 0) // highest)] if highest > 0 else _BARS[0] for value in shown)


def _parts(run: LiveRun, path: Path, quiet_seconds: float | None, width: int) -> Iterable[RenderableType]:
    summary = run.summary
    title = Text("MemTrace", style="bold")
    if summary.header.model.get("class"):
        title.append(f"  {printable(str(summary.header.model['class']))}", style="not bold")
    device = summary.header.device
    if device.get("name"):
        title.append(f" on {printable(str(device['name']))}", style="dim not bold")
    yield title
    yield _status(run, quiet_seconds)
    peak = summary.peak
    if peak.bytes is not None and summary.worst is not None:
        where = f" in {peak.phase.value}" if peak.phase is not None else ""
        line = Text.assemble((f"Peak so far {format_bytes(peak.bytes)}", "bold"), f"{where} of step {peak.step}")
        total = device.get("total_bytes")
        if isinstance(total, int) and device.get("type") == "cuda":
            line.append(f", {100 * peak.bytes / max(total, 1):.1f}% of the card's {format_bytes(total)}")
        yield line
        if summary.reserved_peak_bytes is not None:
            yield Text(f"Reserved at most {format_bytes(summary.reserved_peak_bytes)}")
        yield Padding(category_table(peak, summary.worst.phases, width - 2), (1, 0))
        yield Text.assemble(("peaks of the traced steps  ", "dim"), (sparkline(run.recent, width - 30), "green"))
    if run.failure is not None:
        yield Text(printable(run.failure.error), style="red")
    if run.damaged_lines:
        yield Text(f"{run.damaged_lines} damaged lines were passed over.", style="yellow")
    yield Text(f"Record: {printable(str(path))}", style="dim")


def _status(run: LiveRun, quiet_seconds: float | None) -> Text:
    summary = run.summary
    if run.failure is not None:
        what = "ran out of memory" if run.failure.out_of_memory else "ended in an exception"
        return Text(f"The run {what} in step {run.failure.step}.", style="bold red")
    if run.last is None:
        begun = "The run has begun; no step yet." if run.begun else "The run has not begun: its record is empty."
        text = Text("The run has ended before its first step." if run.finished else begun)
    else:
        pace = summary.seconds / summary.steps
        text = Text(f"step {run.last.step}, {summary.traced_steps} of {summary.steps} traced, {pace:.3g} s a step")
        if run.finished:
            text.append(". The run has ended.", style="green")
    if quiet_seconds is not None and not run.finished and quiet_seconds >= 1:
        text.append(f"; last line {quiet_seconds:.0f} s ago", style="dim")
    return text
