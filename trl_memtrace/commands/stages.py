"""``trl-memtrace stages``: what each stage of a training step is expected to take, and took."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Annotated

import typer

from ..process import quick_imports
from .load import Form, words

app = typer.Typer(add_completion=False)


@app.command()
def stages(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder or a config.json.")],
    dtype: Annotated[
        list[str] | None,
        typer.Option("--dtype", help="Some of float32, float16, bfloat16; all when left out."),
    ] = None,
    more_dtypes: Annotated[list[str] | None, typer.Argument(metavar="[DTYPE]...", hidden=True)] = None,
    record: Annotated[
        Path | None, typer.Option("--record", metavar="RUN", help="The record of a run, to stand beside it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Model, gradients, backward and optimizer step with Adam, by accelerate's formula, and what a run's record says.

    accelerate gives no figure for int8 and int4.
    """
    forms = words([*(dtype or ()), *(more_dtypes or ())], Form, "--dtype") or ["float32", "float16", "bfloat16"]
    phases = None
    if record is not None:
        from ..records import RunTrace

        phases = RunTrace.load(record).summary.worst_phases
    with quick_imports():
        import transformers

        from ..model import accelerate_estimate, load_meta

        transformers.logging.set_verbosity(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            meta = load_meta(model)
        estimates = [accelerate_estimate(meta, form) for form in forms]
    if as_json:
        rows = [
            {
                "dtype": estimate.dtype,
                "accelerate": None
                if estimate.stages is None
                else {
                    "model_bytes": estimate.stages.model_bytes,
                    "gradients_bytes": estimate.stages.gradients_bytes,
                    "backward_bytes": estimate.stages.backward_bytes,
                    "optimizer_step_bytes": estimate.stages.optimizer_step_bytes,
                },
            }
            for estimate in estimates
        ]
        found = None if phases is None else {name: phase.to_json() for name, phase in phases.items()}
        print(json.dumps({"rows": rows, "phases": found}, indent=2))
        return
    from rich.console import Console

    from ..reporters import loading_text

    Console(highlight=False).print(loading_text.render_stages(model, estimates, phases))
