"""All ranks of one run, from the files that each has written: the spread between them, and who is missing. No torch,
and no word between processes: what is in the folder is all there is to read."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .categories import CATEGORIES
from .errors import RecordError
from .records import RECORD_NAME, RunTrace, record_name

SAME_START_SECONDS = 60.0
"""Ranks of one run begin together. A file that was begun so much earlier is an earlier run's."""

_POLL_SECONDS = 0.05
_TAIL_BYTES = 1 << 20
_END = b'{"record":"summary"'


@dataclass(frozen=True, slots=True)
class Spread:
    """How one figure differs between ranks.

    Attributes:
        what: ``peak``, a category, or ``reserved``.
        least: the smallest value, in bytes, and ``least_rank`` whose it is; the lowest of equals.
        most: the largest value, in bytes, and ``most_rank`` whose it is.
    """

    what: str
    least: int
    least_rank: int
    most: int
    most_rank: int

    @property
    def uneven(self) -> float:
        """By which part of the largest the smallest falls short: 0 where all are equal, 1 where one has none."""
        return (self.most - self.least) / self.most if self.most else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "min_bytes": self.least,
            "min_rank": self.least_rank,
            "max_bytes": self.most,
            "max_rank": self.most_rank,
            "uneven": round(self.uneven, 6),
        }


@dataclass(frozen=True, slots=True)
class Ranks:
    """The records of one run's processes.

    Attributes:
        world_size: how many there were.
        runs: by rank, those that can be read.
        missing: ranks that left no record.
        unfinished: ranks whose record has no end, neither a summary nor a failure: killed, or not done yet.
    """

    world_size: int
    runs: Mapping[int, RunTrace]

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(rank for rank in range(self.world_size) if rank not in self.runs)

    @property
    def unfinished(self) -> tuple[int, ...]:
        return tuple(rank for rank, run in self.runs.items() if not run.finished and run.failure is None)

    @property
    def strategy(self) -> str | None:
        """How the run was distributed: ``ddp``, ``fsdp2``, ``zero2``, ..."""
        return next((run.header.trainer.get("strategy") for run in self.runs.values()), None)

    @property
    def spread(self) -> tuple[Spread, ...]:
        """The peak, each category at each rank's own peak, and what was reserved; nothing where no rank has any."""
        summaries = {rank: run.summary for rank, run in self.runs.items()}
        peaks = {rank: summary.peak for rank, summary in summaries.items()}
        rows: list[tuple[str, dict[int, int | None]]] = [
            ("peak", {rank: peak.bytes for rank, peak in peaks.items()}),
            *(
                (category.value, {rank: peak.categories[category.value] for rank, peak in peaks.items()})
                for category in CATEGORIES
            ),
            ("reserved", {rank: summary.reserved_peak_bytes for rank, summary in summaries.items()}),
        ]
        found = (_spread(what, values) for what, values in rows)
        return tuple(spread for spread in found if spread is not None and spread.most)

    def notes(self) -> list[str]:
        """What has to be said of ranks whose record is not whole, a line each."""
        lines = [f"Rank {rank} of {self.world_size} is missing: it left no record." for rank in self.missing]
        for rank in self.unfinished:
            steps = self.runs[rank].steps
            where = f"with step {steps[-1].step}" if steps else "before the first step"
            lines.append(f"Rank {rank} of {self.world_size} did not finish: its record ends {where}.")
        for rank, run in self.runs.items():
            if run.failure is not None:
                lines.append(
                    f"Rank {rank} of {self.world_size} failed in step {run.failure.step}: {run.failure.error}"
                )
        return lines

    def to_json(self) -> dict[str, Any]:
        return {
            "world_size": self.world_size,
            "strategy": self.strategy,
            "missing": list(self.missing),
            "unfinished": list(self.unfinished),
            "failed": [rank for rank, run in self.runs.items() if run.failure is not None],
            "spread": [spread.to_json() for spread in self.spread],
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ranks:
        """Read the records of all ranks.

        Args:
            path: the folder that holds them: ``<output_dir>/memtrace``, or ``output_dir``.

        Raises:
            RecordError: there is no record that can be read.
        """
        found: dict[int, RunTrace] = {}
        problem = RecordError(f"no record at {path}: give the folder that MemTrace wrote (OUTPUT_DIR/memtrace)")
        for file in record_files(path):
            try:
                run = RunTrace.load(file)
            except RecordError as unreadable:
                problem = unreadable
            else:
                found[run.rank] = run
        if not found:
            raise problem
        first = found[min(found)]
        size = first.header.trainer.get("world_size")
        runs = {rank: run for rank, run in found.items() if _same_run(run, first)}
        return cls(max(size if isinstance(size, int) else 1, max(runs) + 1), runs)


def record_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files of all ranks in a folder, or in the ``memtrace`` inside it, in order."""
    for folder in (Path(path), Path(path) / "memtrace"):
        if os.path.isdir(folder):
            files = sorted(file for file in folder.iterdir() if RECORD_NAME.fullmatch(file.name) and file.is_file())
            if files:
                return files
    return []


def wait_for_ends(folder: Path, ranks: Iterable[int], patience_seconds: float) -> None:
    """Wait until the records of some ranks have their last line, no longer than is said. Only files are looked at: a
    rank that has died costs the patience, never more."""
    deadline = time.monotonic() + patience_seconds
    waiting = [folder / record_name(rank) for rank in ranks]
    while True:
        waiting = [file for file in waiting if not _has_ended(file)]
        if not waiting or time.monotonic() >= deadline:
            return
        time.sleep(_POLL_SECONDS)


def _has_ended(file: Path) -> bool:
    try:
        with file.open("rb") as lines:
            lines.seek(max(file.stat().st_size - _TAIL_BYTES, 0))
            tail = lines.read()
    except OSError:
        return False
    return tail.endswith(b"\n") and tail.rstrip(b"\n").rpartition(b"\n")[2].startswith(_END)


def _same_run(run: RunTrace, first: RunTrace) -> bool:
    """Whether a record is of the run that another is of, and no earlier one's that was left in the folder."""
    mine, theirs = run.header.trainer, first.header.trainer
    sizes = {size for size in (mine.get("world_size"), theirs.get("world_size")) if isinstance(size, int)}
    if len(sizes) > 1:
        return False
    began, reference = mine.get("started"), theirs.get("started")
    if not isinstance(began, (int, float)) or not isinstance(reference, (int, float)):
        return True
    return began > reference - SAME_START_SECONDS


def _spread(what: str, values: Mapping[int, int | None]) -> Spread | None:
    known = {rank: value for rank, value in values.items() if value is not None}
    if not known:
        return None
    least = min(known, key=lambda rank: (known[rank], rank))
    most = max(known, key=lambda rank: (known[rank], -rank))
    return Spread(what, known[least], least, known[most], most)
