"""``trl-memtrace report RUN``: what a run was recorded to hold, as a page, a table or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import MemtraceError

app = typer.Typer(add_completion=False)


class UnwritableError(MemtraceError):
    """The report cannot be written where it should go."""


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder that MemTrace wrote, a record file, or a snapshot pickle.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write the page; beside the record by default.")
    ] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Print the table instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object instead.")] = False,
) -> None:
    """Show where the memory of a run went: one HTML file that opens offline.

    The page is also written with --terminal or --json when -o says where.
    """
    if terminal and as_json:
        raise typer.BadParameter("--json and --terminal are two formats; choose one")
    from ..reading import read

    reading = read(run)
    if as_json:
        print(json.dumps(reading.summary.to_json()))
    if terminal:
        from ..reporters.terminal import print_failure, print_summary

        print_summary(reading.summary)
        if reading.run.failure is not None:
            print_failure(reading.run.failure)
    if output is not None or not (terminal or as_json):
        from ..reporters.html import write_report

        target = output or (reading.folder / f"{run.stem}.html" if run.is_file() else reading.folder / "report.html")
        try:
            written = write_report(reading, target)
        except OSError as problem:
            raise UnwritableError(f"cannot write {target}: {problem.strerror or problem}") from None
        if not as_json:
            print(written)
