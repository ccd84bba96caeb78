"""What there is to report on: a run of one process or several, a dry run, or a snapshot file, read alike. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .attribution import Timeline
from .errors import RecordError
from .frames import CallSite
from .ranks import Ranks, record_files
from .records import Peak, RunTrace, Summary, record_name
from .snapshot_summary import SnapshotAnalysis
from .step_books import StepBooks

_PICKLE = b"\x80"


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What was read.

    Attributes:
        name: what to call it.
        folder: where it is.
        runs: the record of every process, by rank; of a snapshot the one it amounts to.
        summaries: the same in one each.
        books: every block of the peak step of ``runs[main]``, where they were kept.
        sites: lines of code that hold most at the peak; a snapshot's only.
        warnings: what could not be read.
    """

    name: str
    folder: Path
    runs: Sequence[RunTrace]
    summaries: Sequence[Summary]
    books: StepBooks | None = None
    sites: Sequence[CallSite] = ()
    warnings: tuple[str, ...] = ()

    @property
    def main(self) -> int:
        """Which of the runs to tell of: the one that failed for want of memory, else the one that held most."""
        return max(
            range(len(self.runs)), key=lambda index: (*_weight(self.runs[index], self.summaries[index]), -index)
        )

    @property
    def run(self) -> RunTrace:
        """The run to tell of."""
        return self.runs[self.main]

    @property
    def summary(self) -> Summary:
        """The run to tell of, in one."""
        return self.summaries[self.main]

    @property
    def source(self) -> str:
        """``run``, ``dry_run`` or ``snapshot``."""
        return self.summary.header.source

    @property
    def held(self) -> Peak:
        """What to tell of: what was held when memory ran out, else at the peak."""
        failure = self.run.failure
        if failure is not None and failure.traced and failure.out_of_memory:
            held = failure.peak
            return Peak(
                failure.phase,
                held.bytes,
                held.allocator_bytes,
                held.categories,
                held.roles,
                held.modules,
                failure.step,
            )
        return self.summary.peak


def _weight(run: RunTrace, summary: Summary) -> tuple[bool, int]:
    return run.failure is not None and run.failure.out_of_memory, summary.peak.bytes or 0


def read(path: str | os.PathLike[str]) -> Reading:
    """Read whatever there is to report on.

    Args:
        path: the folder that MemTrace wrote (or its parent), one of the record files in it, or a PyTorch memory
            snapshot.

    Raises:
        RecordError: there is no record, it is damaged, of a newer schema or something else.
        SnapshotError: it is a pickle and no snapshot.
    """
    place = Path(path)
    if os.path.isfile(place) and _begins_with(place, _PICKLE):
        from .recorders.snapshot import read_snapshot
        from .snapshot_summary import analyse

        return of_snapshot(place, analyse(read_snapshot(place)))
    files = _record_files(place)
    ranks = None if os.path.isfile(place) else Ranks.load(place)
    if ranks is None:
        runs = [RunTrace.load(file) for file in files]
    else:  # without those that an earlier run has left behind
        runs = list(ranks.runs.values())
        files = [files[0].with_name(record_name(rank)) for rank in ranks.runs]
    summaries = [run.summary for run in runs]
    name = files[0].name if os.path.isfile(place) else _name_of(files[0].parent)
    reading = Reading(name, files[0].parent, runs, summaries)
    warnings = ranks.notes() if ranks is not None and ranks.world_size > 1 else []
    warnings += [
        f"{file.name}: damaged lines were passed over, {run.damaged_lines} of them"
        for file, run in zip(files, runs, strict=True)
        if run.damaged_lines
    ]
    try:
        books = StepBooks.of_record(files[reading.main])
    except RecordError as problem:
        books = None
        warnings.append(str(problem))
    return Reading(name, reading.folder, runs, summaries, books, warnings=tuple(warnings))


def of_snapshot(file: Path, analysis: SnapshotAnalysis) -> Reading:
    """A snapshot that was analysed, as something to report on."""
    record, books = analysis.summary.worst, analysis.books
    run = RunTrace(analysis.summary.header, [record] if record else [])
    times = analysis.history.ledger.time_ns
    inner = [span for span in books.spans if span.start < len(times)]
    timeline = Timeline([int(times[span.start]) for span in inner], [span.phase for span in inner])
    step = StepBooks(1, books, books.ledger.level, timeline)
    return Reading(
        file.name, file.parent, [run], [analysis.summary], step, analysis.sites, tuple(analysis.history.warnings)
    )


def _record_files(place: Path) -> list[Path]:
    if os.path.isfile(place):
        return [place]
    files = record_files(place)
    if files:
        return files
    raise RecordError(
        f"no record at {place}: give the folder that MemTrace wrote (OUTPUT_DIR/memtrace), one of its files, or a "
        "PyTorch memory snapshot"
    )


def _name_of(folder: Path) -> str:
    """A run goes by the name of its output folder."""
    whole = folder.resolve()
    return whole.parent.name if whole.name == "memtrace" and whole.parent.name else whole.name or str(whole)


def _begins_with(file: Path, wanted: bytes) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(wanted)) == wanted
    except OSError as problem:
        raise RecordError(f"cannot read {file}: {problem.strerror or problem}") from None
