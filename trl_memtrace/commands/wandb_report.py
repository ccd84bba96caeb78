"""``trl-memtrace wandb-report RUN``: a report, or a workspace, in W&B for what a run has sent there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from ..text import printable

app = typer.Typer(add_completion=False)

_TRAINERS_PROJECT = "huggingface"  # where transformers' own callback sends runs unless told


@app.command()
def wandb_report(
    run: Annotated[Path, typer.Argument(help="The folder that MemTrace wrote, or a record file.")],
    project: Annotated[
        str | None, typer.Option(help="The W&B project that the run went to; WANDB_PROJECT, or huggingface.")
    ] = None,
    entity: Annotated[str | None, typer.Option(help="Its user or team; W&B's own default when left out.")] = None,
    title: Annotated[str | None, typer.Option(help="What to call it.")] = None,
    workspace: Annotated[bool, typer.Option("--workspace", help="Make a saved workspace view instead.")] = False,
    dry: Annotated[
        bool, typer.Option("--dry", help="Print as JSON what would be sent; needs no network and no login.")
    ] = False,
) -> None:
    """Make a W&B report with the panels that this run has metrics for, and print its address."""
    from .. import wandb_report as making
    from ..records import RunTrace, find_record
    from ..step_books import peak_books_path

    trace = RunTrace.load(run)
    file = find_record(run)
    make = making.workspace_of if workspace else making.report_of
    made = make(
        trace,
        project=project or os.environ.get("WANDB_PROJECT") or _TRAINERS_PROJECT,
        entity=entity or os.environ.get("WANDB_ENTITY") or ("" if dry else making.default_entity()),
        title=title or "Where the memory went",
        timeline=file is not None and peak_books_path(file).is_file(),
    )
    print(json.dumps(making.spec_of(made), indent=2) if dry else printable(making.save(made)))
