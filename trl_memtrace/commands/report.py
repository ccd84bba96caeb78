"""``trl-memtrace report RUN``: what a run was recorded to hold, as a page, a table or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import MemtraceError, UnwritableError
from ..text import printable

if TYPE_CHECKING:
    from ..reading import Reading

app = typer.Typer(add_completion=False)


class NoBooksError(MemtraceError):
    """Every block of a step was asked for, and the record has only sums."""


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder that MemTrace wrote, a record file, or a snapshot pickle.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write the page; beside the record by default.")
    ] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Print the table instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object instead.")] = False,
    perfetto: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the peak step as a Chrome trace instead, for ui.perfetto.dev."),
    ] = None,
    memory_viz: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write it as a snapshot pickle instead, for pytorch.org/memory_viz."),
    ] = None,
) -> None:
    """Show where the memory of a run went: one HTML file that opens offline.

    The page is also written with --terminal, --json, --perfetto or --memory-viz when -o says where.
    """
    if terminal and as_json:
        raise typer.BadParameter("--json and --terminal are two formats; choose one")
    from ..reading import read

    reading = read(run)
    if as_json:
        print(json.dumps(reading.summary.to_json()))
    if terminal:
        from ..ranks import Ranks
        from ..reporters.ranks_text import print_ranks
        from ..reporters.terminal import print_failure, print_summary

        print_summary(reading.summary)
        if reading.run.failure is not None:
            print_failure(reading.run.failure)
        if run.is_dir():
            print_ranks(Ranks.load(run))
    _write_step(reading, perfetto, memory_viz, quiet=as_json)
    if output is not None or not (terminal or as_json or perfetto or memory_viz):
        target = output or (reading.folder / f"{run.stem}.html" if run.is_file() else reading.folder / "report.html")
        written = write_page(reading, target)
        if not as_json:
            print(printable(str(written)))


def write_page(reading: Reading, path: Path) -> Path:
    """Write the HTML report, or say in one line why that cannot be.

    Raises:
        UnwritableError: the file cannot be written.
        PlotlyMissingError: plotly is not installed.
    """
    from ..reporters.html import write_report

    try:
        return write_report(reading, path)
    except OSError as problem:
        raise UnwritableError(f"cannot write {path}: {problem.strerror or problem}") from None


def _write_step(reading: Reading, perfetto: Path | None, memory_viz: Path | None, *, quiet: bool) -> None:
    """Write the peak step, block by block, where it was asked for."""
    if perfetto is None and memory_viz is None:
        return
    if reading.books is None:
        raise NoBooksError(
            f"{reading.name} has no books of its peak step (rank-00000.peak.npz beside the record, written when a run"
            " ends), and only those know every block"
        )
    from ..reporters.memory_viz import write_memory_viz
    from ..reporters.perfetto import write_perfetto

    counts_events = reading.source != "run"
    target = perfetto
    try:
        if perfetto is not None:
            write_perfetto(reading.books, perfetto, name=reading.name, tick_ns=1000 if counts_events else 1)
        if memory_viz is not None:
            target = memory_viz
            write_memory_viz(reading.books, memory_viz)
    except OSError as problem:
        raise UnwritableError(f"cannot write {target}: {problem.strerror or problem}") from None
    if not quiet:
        for written in filter(None, (perfetto, memory_viz)):
            print(printable(str(written)))
