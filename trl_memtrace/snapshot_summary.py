"""A snapshot file as a record: the same summary that a measured run has. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .attribution import Books
from .bookkeeping import step_record
from .categories import Phase
from .frames import CallSite, attribute_by_frames, call_sites
from .recorders.snapshot import DeviceHistory, Snapshot, devices_of, read_history
from .records import RunHeader, Summary


@dataclass(frozen=True, slots=True, eq=False)
class SnapshotAnalysis:
    """One device of a snapshot, analysed.

    Attributes:
        history: what happened.
        books: whose every block was.
        summary: the record.
        sites: the lines of code that hold most at the peak, the largest first.
        others: the file's other devices.
    """

    history: DeviceHistory
    books: Books
    summary: Summary
    sites: Sequence[CallSite]
    others: Sequence[int]


def analyse(snapshot: Snapshot, device: int | None = None, *, user_frames: bool = False) -> SnapshotAnalysis:
    """Attribute a snapshot.

    Args:
        snapshot: the file.
        device: which of its devices; the one with the longest history when not given.
        user_frames: name call sites outside installed libraries only.

    Raises:
        SnapshotError: there is no history of that device.
    """
    devices = devices_of(snapshot)
    if device is None:
        lengths = [len(trace) if isinstance(trace, list) else 0 for trace in snapshot.traces]
        device = max(range(len(lengths)), key=lengths.__getitem__, default=0)
    history = read_history(snapshot, device)
    books = attribute_by_frames(history, snapshot.data.get("external_annotations") or ())
    peak_reserved = int(history.reserved.max())
    record = replace(step_record(1, books, books.ledger.level, 0.0), reserved_bytes=peak_reserved)
    header = RunHeader(source="snapshot", device={"type": "cuda", "index": device, "name": None, "total_bytes": None})
    summary = Summary(header)
    summary.add(record)
    summary.steps = summary.traced_steps = sum(span.phase is Phase.OPTIMIZER for span in books.spans)
    summary.reserved_end_bytes = int(history.reserved[-1])
    sites = call_sites(history, books, books.peak(books.spans), user_only=user_frames)
    return SnapshotAnalysis(history, books, summary, sites, [other for other in devices if other != device])
