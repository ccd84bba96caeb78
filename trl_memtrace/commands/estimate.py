"""``trl-memtrace estimate sft FLAGS``: what a ``trl`` command would take."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MemtraceError, UnwritableError
from ..process import quick_imports, quiet, uncompiled
from ..units import parse_bytes

if TYPE_CHECKING:
    from ..device import Device
    from ..dryrun import DryRun

app = typer.Typer(add_completion=False)


class Kind(str, Enum):
    """The trainers that can be run on fake tensors."""

    SFT = "sft"
    DPO = "dpo"
    KTO = "kto"
    REWARD = "reward"
    GRPO = "grpo"
    RLOO = "rloo"


KindName = Annotated[Kind, typer.Argument(metavar="sft|dpo|kto|reward|grpo|rloo", help="The command of trl.")]
DeviceName = Annotated[str | None, typer.Option("--device", help="The card, such as 'A100 80GB'; none has no limit.")]
Memory = Annotated[str | None, typer.Option("--memory", metavar="SIZE", help="Its memory instead, such as 24GiB.")]
Ranks = Annotated[
    int, typer.Option("--num_processes", min=1, metavar="N", help="How many ranks train together, a card each.")
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="How many optimizer steps to take.")]
Lengths = Annotated[
    Path | None, typer.Option("--lengths", metavar="FILE", help="Tokens of each example, one integer a line.")
]
Record = Annotated[
    Path | None, typer.Option("--record", metavar="FOLDER", help="Write the record there, for report and diff.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object and nothing else.")]


def device_of(name: str | None, memory: str | None) -> Device | None:
    """The device that ``--device`` or ``--memory`` means.

    Raises:
        typer.BadParameter: both are given, or the memory is no size.
        MemtraceError: no such device is known.
    """
    from ..device import custom_device, find_device

    if memory is None:
        return None if name is None else find_device(name)
    if name is not None:
        raise typer.BadParameter("--device and --memory are two devices; choose one")
    try:
        return custom_device(parse_bytes(memory))
    except ValueError as reason:
        raise typer.BadParameter(str(reason), param_hint="--memory") from None


def trial_device(name: str | None, memory: str | None) -> str | int | None:
    """The same, as a trial is told it.

    Raises:
        typer.BadParameter, MemtraceError: as ``device_of``.
    """
    card = device_of(name, memory)
    return card if card is None else card.total_bytes if memory is not None else card.name


def read_lengths(file: Path | None) -> list[int] | None:
    """What ``--lengths`` names.

    Raises:
        MemtraceError: it cannot be read, or is no list of lengths.
    """
    if file is None:
        return None
    try:
        lengths = [int(word) for word in file.read_text().split()]
    except OSError as problem:
        raise MemtraceError(f"cannot read {file}: {problem.strerror or problem}") from None
    except ValueError:
        raise MemtraceError(f"{file} is no list of lengths: it takes one integer a line") from None
    if not lengths or min(lengths) < 1:
        raise MemtraceError(f"{file} is no list of lengths: it takes integers of 1 or more, one at least")
    return lengths


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def estimate(
    context: typer.Context,
    kind: KindName,
    device: DeviceName = None,
    memory: Memory = None,
    steps: Steps = 2,
    lengths: Lengths = None,
    ranks: Ranks = 1,
    record: Record = None,
    as_json: AsJson = False,
) -> None:
    """What a trl command would take: every other flag is trl's own (trl sft --help), --config FILE too.

    A folder with a config.json is model enough. The longest batch comes first. Of several ranks it is what the first
    holds.
    """
    card = device_of(device, memory)
    found = read_lengths(lengths)
    with quick_imports(), quiet(), uncompiled():
        from ..estimating import estimate as run

        made = run(kind.value, context.args, device=card, steps=steps, lengths=found, ranks=ranks)
    keep(made.dry, record)
    show(made.summary(), made.dry.run.summary, made.assumed, as_json=as_json)


def keep(dry: DryRun, folder: Path | None) -> None:
    """Write a dry run's record, where that was asked for."""
    if folder is not None:
        try:
            dry.save(folder)
        except OSError as problem:
            raise UnwritableError(f"cannot write {folder}: {problem.strerror or problem}") from None


def show(data: dict[str, Any], summary: Any, assumed: list[str], *, as_json: bool) -> None:
    """Print what a dry run came to."""
    if as_json:
        print(json.dumps(data))
        return
    from ..reporters.dry_run_text import print_dry_run

    print_dry_run(data, summary, assumed)
