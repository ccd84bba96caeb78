"""``trl-memtrace snapshot FILE``: anybody's PyTorch memory snapshot, attributed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False)


@app.command()
def snapshot(
    file: Annotated[Path, typer.Argument(help="A pickle from torch.cuda.memory._dump_snapshot.")],
    device: Annotated[
        int | None, typer.Option(help="Which device; the one with the longest history by default.")
    ] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Replay it through the simulated allocator.")] = False,
    user_frames: Annotated[bool, typer.Option("--user-frames", help="Hide call sites inside libraries.")] = False,
    page: Annotated[Path | None, typer.Option("--html", help="Also write an HTML report to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Say what a snapshot file holds: categories at the peak and at the end, phases, call sites, reserved memory."""
    from ..process import quick_imports
    from ..recorders.snapshot import read_snapshot
    from ..snapshot_summary import analyse

    with quick_imports():
        read = read_snapshot(file)
        analysis = analyse(read, device, user_frames=user_frames)
        simulated: dict[str, Any] | None = None
        if simulate:
            from ..allocator import replay_snapshot

            simulated = replay_snapshot(read.data, analysis.history.device).summary()
        if page is not None:
            from ..reading import of_snapshot
            from .report import write_page

            write_page(of_snapshot(file, analysis), page)
        if as_json:
            summary = analysis.summary.to_json()
            print(json.dumps(summary if simulated is None else {**summary, "simulated": simulated}))
            return
        from ..reporters.snapshot_text import print_snapshot

        print_snapshot(analysis, file.name, simulated)
