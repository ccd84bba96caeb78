"""``trl-memtrace fit sft FLAGS --device NAME``: what fits a card, and what would help."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .estimate import AsJson, DeviceName, KindName, Lengths, Memory, Ranks, Steps, read_lengths, trial_device
from .sweep import Workers

if TYPE_CHECKING:
    from ..fitting import Fit

app = typer.Typer(add_completion=False)

_KNOB_HELP = "Size only this: per_device_train_batch_size, max_length or lora_r. May be given again."


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def fit(
    context: typer.Context,
    kind: KindName,
    device: DeviceName = None,
    memory: Memory = None,
    steps: Steps = 2,
    lengths: Lengths = None,
    ranks: Ranks = 1,
    knob: Annotated[list[str] | None, typer.Option("--knob", help=_KNOB_HELP)] = None,
    savers: Annotated[bool, typer.Option("--savers/--no-savers", help="Whether to try what saves memory.")] = True,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """The largest batch size, sequence length and LoRA rank that fit a card, and what every memory saver gives.

    Flags are trl's own. Each line of the answer is a dry run of its own.
    """
    card = trial_device(device, memory)
    if card is None:
        raise typer.BadParameter("fit what? Say --device NAME, such as 'A100 80GB', or --memory 24GiB")
    found = read_lengths(lengths)
    from ..fitting import fit as find_fit

    with _telling() as tell:
        try:
            made = find_fit(
                kind.value,
                context.args,
                card,
                knobs=knob,
                savers=savers,
                steps=steps,
                lengths=found,
                ranks=ranks,
                workers=workers or os.cpu_count() or 1,
                tell=tell,
            )
        except ValueError as problem:
            raise typer.BadParameter(str(problem), param_hint="--knob") from None
    if as_json:
        print(json.dumps(_as_json(made)))
        return
    from ..reporters.fit_text import print_fit

    print_fit(made)


@contextmanager
def _telling() -> Iterator[Callable[[str], None]]:
    """What is being tried stands on the terminal meanwhile."""
    from rich.console import Console
    from rich.text import Text

    from ..text import printable

    console = Console(stderr=True)
    with console.status(Text("trying")) as status:
        yield lambda what: status.update(Text(f"trying {printable(what)}"))


def _as_json(found: Fit) -> dict[str, Any]:
    return {
        **asdict(found),
        "savings": [
            {**asdict(saving), "flags": saving.saver.text, "command": found.command([saving.saver])}
            for saving in found.savings
        ],
        "together_command": found.command(found.together) if found.together else None,
    }
