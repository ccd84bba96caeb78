"""``trl-memtrace watch RUN``: the record of a training that is running, live, from another shell."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RecordError

if TYPE_CHECKING:
    from ..live import LiveRun

app = typer.Typer(add_completion=False)


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="The folder that MemTrace writes (OUTPUT_DIR/memtrace), or a record.")],
    rank: Annotated[int, typer.Option(min=0, help="Which process's record, where a run has several.")] = 0,
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks at the record.")] = 0.5,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
) -> None:
    """Show the memory of a run while it trains. It ends when the run does, or with Ctrl-C.

    The record is only read: the training knows nothing of it. Where the run has not begun, this waits.
    """
    from ..records import find_record

    if once:
        file = find_record(run, rank)
        if file is None:
            raise RecordError(f"no record at {run} yet: the run has not begun, or writes elsewhere")
        _print_frame(file)
        return
    with contextlib.suppress(KeyboardInterrupt):
        _follow(run, rank, interval)


def _print_frame(file: Path) -> None:
    from rich.console import Console

    from ..live import LiveRun, Tail, read_on
    from ..reporters.live_text import frame
    from ..reporters.terminal import print_plainly

    console = Console(highlight=False)
    print_plainly(frame(read_on(Tail(file), LiveRun()), file, _quiet_seconds(file), console.width), console)


def _follow(path: Path, rank: int, interval: float) -> None:
    """Show frame after frame until the run has ended. Where there is no terminal to redraw, the last one only."""
    from rich.console import Console
    from rich.live import Live

    from ..reporters.live_text import frame, waiting
    from ..reporters.terminal import print_plainly

    console = Console(highlight=False)
    if console.is_terminal and console.encoding.lower().startswith("utf"):
        with Live(console=console, auto_refresh=False) as live:
            for seen in _looks(path, rank, interval):
                shown = waiting(path) if seen is None else frame(*seen, _quiet_seconds(seen[1]), console.width)
                live.update(shown, refresh=True)
        return
    last: tuple[LiveRun, Path] | None = None
    told = False
    try:
        for last in _looks(path, rank, interval):
            if last is None and not told:
                print_plainly(waiting(path), console)
                told = True
    finally:
        if last is not None and last[0].begun:
            print_plainly(frame(*last, None, console.width), console)


def _looks(path: Path, rank: int, interval: float) -> Iterator[tuple[LiveRun, Path] | None]:
    """What is there at one look after another, until the run has ended; None while it has not begun."""
    from ..live import LiveRun, Tail, read_on
    from ..records import find_record

    while (file := find_record(path, rank)) is None:
        yield None
        time.sleep(interval)
    tail, run = Tail(file), LiveRun()
    while True:
        run = read_on(tail, run)
        yield run, file
        if run.finished:
            return
        time.sleep(interval)


def _quiet_seconds(file: Path) -> float | None:
    """How long ago the file was written to."""
    try:
        return max(time.time() - file.stat().st_mtime, 0.0)
    except OSError:
        return None
