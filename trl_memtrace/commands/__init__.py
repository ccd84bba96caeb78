"""The command line: ``trl-memtrace COMMAND``.

Each command lives in a file of its own, as an ``app`` with one command in it. The file is imported when its command is
asked for or listed; what is heavy it imports when it runs, so ``trl-memtrace --help`` loads neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import MemtraceError
from ..text import one_line

COMMANDS = (
    *("model", "load", "stages", "estimate", "dry-run", "sweep", "fit"),
    *("snapshot", "report", "diff", "watch", "wandb-report"),
)
"""The commands, in the order in which help lists them; ``dry-run`` lives in ``dry_run.py``."""


class _Commands(TyperGroup):
    """Finds a command by its name, and loads only that one."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".{cmd_name.replace('-', '_')}", __name__)
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command


app = typer.Typer(
    name="trl-memtrace",
    cls=_Commands,
    help="Where the memory of fine-tuning goes, to the byte.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trl-memtrace {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script. What a user can act on is one line on stderr and an exit code, never a traceback."""
    try:
        app()
    except MemtraceError as error:
        print(f"trl-memtrace: {one_line(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
