"""The spread between the ranks of a run, for a terminal."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from ..ranks import Ranks
from ..text import printable
from ..units import common_unit
from .terminal import print_plainly, quiet_table


def print_ranks(ranks: Ranks, console: Console | None = None) -> None:
    """Print how ranks differ, and which are missing; nothing where there was only one."""
    if ranks.world_size > 1:
        print_plainly(render_ranks(ranks), console)


def render_ranks(ranks: Ranks) -> RenderableType:
    """The table of the spread, and the lines about ranks whose record is not whole."""
    parts: list[RenderableType] = []
    spread = ranks.spread
    if spread:
        unit, scale = common_unit(spread[0].most)
        title = f"{ranks.world_size} ranks" + (f" ({printable(ranks.strategy)})" if ranks.strategy else "")
        table = quiet_table()
        table.add_column(f"{title}, in {unit}", no_wrap=True)
        for name in ("least", "rank", "most", "rank", "uneven"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in spread:
            table.add_row(
                Text(row.what.replace("_", " ")),
                f"{row.least / scale:.2f}",
                str(row.least_rank),
                f"{row.most / scale:.2f}",
                str(row.most_rank),
                f"{100 * row.uneven:.1f}%",
            )
        parts.append(table)
    parts += [Text(printable(note), style="bold red") for note in ranks.notes()]
    return Padding(Group(*parts), (0, 1, 1, 1))
