"""``trl-memtrace dry-run script.py ARGS``: somebody's own script, without its GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..process import quick_imports, quiet, uncompiled
from .estimate import AsJson, DeviceName, Memory, Ranks, Record, Steps, device_of, keep, show

app = typer.Typer(add_completion=False)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}
)
def dry_run(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(metavar="SCRIPT [ARGS]...", help="The script, and its own arguments.")],
    device: DeviceName = None,
    memory: Memory = None,
    steps: Steps = 2,
    ranks: Ranks = 1,
    record: Record = None,
    as_json: AsJson = False,
) -> None:
    """What a training script would take: it runs unchanged, without weights and arithmetic, until it has trained.

    Options stand before the script; what comes after it is the script's own.
    """
    card = device_of(device, memory)
    with quick_imports(), quiet(), uncompiled():
        from ..dry_script import run_script

        with _stdout_elsewhere(as_json):
            dry = run_script(script, context.args, device=card, steps=steps, ranks=ranks)
    keep(dry, record)
    show(dry.summary(), dry.run.summary, [], as_json=as_json)


@contextmanager
def _stdout_elsewhere(wanted: bool) -> Iterator[None]:
    """What a script and its children print goes to stderr, if wanted."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    before = sys.stdout
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = before
        os.dup2(kept, 1)
        os.close(kept)
