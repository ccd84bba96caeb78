"""``trl-memtrace sweep sft FLAGS``: a grid of configurations, and what each knob costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UnwritableError
from .estimate import AsJson, DeviceName, KindName, Lengths, Memory, Ranks, Steps, read_lengths, trial_device

if TYPE_CHECKING:
    from ..sweep import Row, Sweep

app = typer.Typer(add_completion=False)

Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="How many processes work beside each other; one a core.")
]


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def sweep(
    context: typer.Context,
    kind: KindName,
    device: DeviceName = None,
    memory: Memory = None,
    steps: Steps = 2,
    lengths: Lengths = None,
    ranks: Ranks = 1,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run each for real, on the device that is here, one after the other.")
    ] = False,
    workers: Workers = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the table, the page and what is known go.")
    ] = Path("memtrace-sweep"),
    as_json: AsJson = False,
) -> None:
    """How batch size, rank, optimizer and the rest change what a trl command takes: every combination is tried.

    Flags are trl's own. One whose value has commas is tried with each part: --lora_r 8,16,64
    --lora_target_modules all-linear,"q_proj v_proj". The same command goes on where it was ended.
    """
    if measure and ranks > 1:
        raise typer.BadParameter("--measure runs one process; --num_processes is for dry runs")
    card = trial_device(device, memory)
    found = read_lengths(lengths)
    from ..sweep import OUTCOMES, PAGE, TABLE, Kept, run_sweep, write_table
    from ..versions import versions

    try:
        kept = Kept(output / OUTCOMES, versions())
        with progress() as on_row:
            made = run_sweep(
                kind.value,
                context.args,
                device=card,
                steps=steps,
                lengths=found,
                ranks=ranks,
                measured=measure,
                workers=workers,
                kept=kept,
                on_row=on_row,
            )
        from ..reporters.sweep_html import write_sweep

        written = [write_table(made, output / TABLE), write_sweep(made, output / PAGE)]
    except OSError as problem:
        raise UnwritableError(f"cannot write into {output}: {problem.strerror or problem}") from None
    if as_json:
        print(json.dumps(_as_json(made)))
    else:
        from ..reporters.sweep_text import print_sweep

        print_sweep(made, written)
    if all(row.outcome.error is not None for row in made.rows):
        raise typer.Exit(2)


@contextmanager
def progress() -> Iterator[Callable[[Row, int, int], None]]:
    """A bar on the terminal that is told of every row; nothing where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..text import printable

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("trying", total=None)

        def tell(row: Row, done: int, of: int) -> None:
            shown.update(task, description=printable(" ".join(row.point.choices)), completed=done, total=of)

        yield tell


def _as_json(sweep: Sweep) -> dict[str, Any]:
    knobs = [knob.name for knob in sweep.grid.knobs]
    return {
        "kind": sweep.kind,
        "device": sweep.device,
        "measured": sweep.measured,
        "knobs": {knob.name: list(knob.choices) for knob in sweep.grid.knobs},
        "rows": [
            {"knobs": dict(zip(knobs, row.point.choices, strict=True)), **row.outcome.to_json()} for row in sweep.rows
        ],
        "costs": [asdict(cost) for cost in sweep.costs()],
        "assumed": sweep.assumed,
    }
