"""docs/matrix.md: tables that are written by the tests that made them.

Set MEMTRACE_WRITE_MATRIX=1 to write anew what a whole run of the tests has found.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "matrix.md"
WRITE = "MEMTRACE_WRITE_MATRIX"


class Section:
    """One table of the page.

    Args:
        title: the heading that it stands under.
        columns: its header; the first column names a row.
    """

    def __init__(self, title: str, *columns: str) -> None:
        self.title = title
        self.columns = columns
        self.rows: dict[str, tuple[str, ...]] = {}

    def add(self, name: str, *cells: str) -> None:
        assert len(cells) == len(self.columns) - 1
        self.rows[name] = cells

    def check(self, names: list[str]) -> None:
        """The committed table has all of these rows and no others, and says of those in this run what it gave, up to
        figures, which vary with versions and machines."""
        if os.environ.get(WRITE) and set(self.rows) == set(names):
            self._write()
        committed = {row[0]: row[1:] for row in self._committed()}
        assert list(committed) == sorted(names), f"run the tests with {WRITE}=1"
        for name, cells in self.rows.items():
            assert _without_figures(committed[name]) == _without_figures(cells), f"{name}: set {WRITE}=1"

    def _committed(self) -> list[tuple[str, ...]]:
        _, _, rest = PAGE.read_text().partition(f"## {self.title}\n")
        lines = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("|")]
        return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:]]

    def _write(self) -> None:
        before, heading, rest = PAGE.read_text().partition(f"## {self.title}\n")
        text, found, after = rest.partition("\n## ")
        prose = "\n".join(line for line in text.splitlines() if not line.startswith("|")).strip()
        table = [self.columns, tuple("---" for _ in self.columns)]
        table += [(name, *self.rows[name]) for name in sorted(self.rows)]
        lines = "\n".join("| " + " | ".join(row) + " |" for row in table)
        PAGE.write_text(f"{before}{heading}\n{prose}\n\n{lines}\n{found}{after}")


def _without_figures(cells: tuple[str, ...]) -> list[str]:
    return [re.sub(r"\d[\d.,]*", "#", cell) for cell in cells]
