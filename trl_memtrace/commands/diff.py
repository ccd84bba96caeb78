"""``trl-memtrace diff A B``: what grew from one record to another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UnwritableError

app = typer.Typer(add_completion=False)


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(metavar="A", help="A run's record, or a snapshot file.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="What to compare with it.")],
    fail_over: Annotated[
        str | None,
        typer.Option(metavar="LIMIT", help="Exit with 1 if the peak grew by more: 2%, 100MiB."),
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="Which process's record, where a run has several.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as one JSON object.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write it as a page that opens offline.")
    ] = None,
) -> None:
    """What grew from A to B: by category, role, phase and module, the largest growth first.

    A and B may each be the record of a run, of a dry run, or a PyTorch memory snapshot.
    """
    from ..comparison import Tolerance, compare, read_side

    try:
        tolerance = None if fail_over is None else Tolerance.parse(fail_over)
    except ValueError as problem:
        raise typer.BadParameter(str(problem), param_hint="--fail-over") from None
    comparison = compare(read_side(before, rank), read_side(after, rank))
    over = tolerance is not None and not tolerance.allows(comparison.peak)
    if as_json:
        print(json.dumps({**comparison.to_json(), "fail_over": fail_over, "over": over}))
    else:
        from ..reporters.comparison_text import print_comparison

        print_comparison(comparison, tolerance)
    if html is not None:
        from ..reporters.comparison_html import write_comparison

        try:
            write_comparison(comparison, html, tolerance)
        except OSError as problem:
            raise UnwritableError(f"cannot write {html}: {problem.strerror or problem}") from None
    if over:
        raise typer.Exit(1)
