"""Two records side by side: what grew, by category, role, module and phase. No torch.

A record is a run's, a dry run's, or what a snapshot file was found to hold; any two can be compared. At the peak
the growths add up to that of the whole, to the byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from .errors import MemtraceError
from .records import SCHEMA, Categories, Peak, PhaseRecord, RunTrace, Summary
from .units import parse_bytes

_PICKLE = b"\x80"
_PEFT_PREFIX = "base_model.model."
_PEFT_ROOTS = ("base_model", "base_model.model")

Table = Mapping[str, Mapping[str, int]]
"""Bytes by name and category."""


class NothingTracedError(MemtraceError):
    """A record without a single traced step: there is no peak to compare."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two: what it is called, and what of it is compared.

    Attributes:
        name: what to call it; as the user wrote it.
        source: ``run``, ``dry_run`` or ``snapshot``.
        peak: the instant at which it held most; that of the failure which ended it, where that was higher.
        phases: of every phase its worst record.
        reserved_peak_bytes: what the caching allocator had reserved at most; None where there is none.
        sites: bytes at the peak by the line of code that asked for them; a snapshot's only.
    """

    name: str
    source: str
    peak: Peak
    phases: Mapping[str, PhaseRecord]
    reserved_peak_bytes: int | None = None
    sites: Table = field(default_factory=dict)

    @classmethod
    def of_run(cls, name: str, run: RunTrace) -> Side:
        """A run's or dry run's record as a side.

        Raises:
            NothingTracedError: no step of it was traced.
        """
        side = cls.of_summary(name, run.summary)
        failure = run.failure
        if failure is not None and failure.traced and (failure.peak.bytes or 0) > (side.peak.bytes or 0):
            peak = Peak.from_json({**failure.peak.to_json(), "phase": failure.phase, "step": failure.step})
            side = cls(name, side.source, peak, side.phases, failure.reserved_bytes or side.reserved_peak_bytes)
        if side.peak.bytes is None:
            raise NothingTracedError(f"{name}: no step of it was traced, so there is nothing to compare")
        return side

    @classmethod
    def of_summary(cls, name: str, summary: Summary, sites: Table | None = None) -> Side:
        """A summary as a side."""
        return cls(
            name, summary.header.source, summary.peak, summary.worst_phases, summary.reserved_peak_bytes, sites or {}
        )


@dataclass(frozen=True, slots=True)
class Change:
    """Something that both sides have, or one of them.

    Attributes:
        name: what it is.
        before_bytes: its bytes in the first; None where the first has no such thing.
        after_bytes: its bytes in the second.
        categories: the same by category, where it has any.
    """

    name: str
    before_bytes: int | None
    after_bytes: int | None
    categories: tuple[Change, ...] = ()

    @property
    def growth_bytes(self) -> int:
        """How much it grew; negative where it shrank."""
        return (self.after_bytes or 0) - (self.before_bytes or 0)

    @property
    def growth_ratio(self) -> float | None:
        """How much of what it was it grew by; None where it was nothing."""
        return self.growth_bytes / self.before_bytes if self.before_bytes else None

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "name": self.name,
            "before_bytes": self.before_bytes,
            "after_bytes": self.after_bytes,
            "growth_bytes": self.growth_bytes,
        }
        if self.categories:
            data["categories"] = [change.to_json() for change in self.categories]
        return data


@dataclass(frozen=True, slots=True)
class Comparison:
    """What changed from one side to the other. Every tuple is sorted by growth, the largest first.

    Attributes:
        before, after: the sides.
        peak: of the whole; its categories are those at the two peaks.
        roles: bytes by refined category at the peak.
        modules: bytes by module at the peak, under names that both sides use.
        phases: the highest level in every phase, with the categories there.
        reserved: what the caching allocator had reserved at most; None where one side has none.
        sites: bytes at the peak by line of code, where both are snapshots.
    """

    before: Side
    after: Side
    peak: Change
    roles: tuple[Change, ...]
    modules: tuple[Change, ...]
    phases: tuple[Change, ...]
    reserved: Change | None
    sites: tuple[Change, ...]

    @property
    def categories(self) -> tuple[Change, ...]:
        """Bytes by category at the peak."""
        return self.peak.categories

    def to_json(self) -> dict[str, Any]:
        """What ``diff --json`` prints."""
        return {
            "record": "diff",
            "schema": SCHEMA,
            "before": _side_json(self.before),
            "after": _side_json(self.after),
            "peak": {key: value for key, value in self.peak.to_json().items() if key not in ("name", "categories")},
            "reserved": None if self.reserved is None else self.reserved.to_json(),
            "categories": [change.to_json() for change in self.categories],
            "roles": [change.to_json() for change in self.roles],
            "modules": [change.to_json() for change in self.modules],
            "phases": [change.to_json() for change in self.phases],
            "sites": [change.to_json() for change in self.sites],
        }


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How much the peak may grow.

    Attributes:
        text: as the user wrote it.
        bytes: an amount, or None where it is a share.
        share: of the peak before.
    """

    text: str
    bytes: int | None = None
    share: Fraction | None = None

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """``2%`` or ``100MiB``.

        Raises:
            ValueError: it is neither.
        """
        percent = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*%\s*", text)
        if percent is not None:
            return cls(text.strip(), share=Fraction(percent[1]) / 100)
        try:
            return cls(text.strip(), bytes=parse_bytes(text))
        except ValueError:
            raise ValueError(f"{text!r} is neither a share, such as 2%, nor a size, such as 100MiB") from None

    def allows(self, change: Change) -> bool:
        """Whether something grew by no more than this."""
        limit = self.bytes if self.share is None else self.share * (change.before_bytes or 0)
        return change.growth_bytes <= (limit or 0)


def read_side(path: str | Path, rank: int = 0) -> Side:
    """What is at a path: the record of a run or dry run (a folder or a file), or a PyTorch memory snapshot.

    Args:
        path: where.
        rank: which process's, where a folder holds one record for each.

    Raises:
        RecordError: there is no record there, or none that can be read.
        SnapshotError: it is a pickle, but not a snapshot, or a damaged one.
        NothingTracedError: no step of it was traced.
    """
    name = str(path)
    if not _is_pickle(Path(path)):
        return Side.of_run(name, RunTrace.load(path, rank))
    from .recorders.snapshot import read_snapshot
    from .snapshot_summary import analyse

    analysis = analyse(read_snapshot(path))
    sites: dict[str, dict[str, int]] = {}
    for site in analysis.sites:
        row = sites.setdefault(f"{site.where} {site.function}".rstrip(), {})
        row[site.category.value] = row.get(site.category.value, 0) + site.bytes
    return Side.of_summary(name, analysis.summary, sites)


def compare(before: Side, after: Side) -> Comparison:
    """Lay two sides beside each other."""
    reserved = before.reserved_peak_bytes, after.reserved_peak_bytes
    both_snapshots = bool(before.sites and after.sites)
    return Comparison(
        before=before,
        after=after,
        peak=Change(
            "peak",
            before.peak.bytes,
            after.peak.bytes,
            _changes(_held(before.peak.categories), _held(after.peak.categories)),
        ),
        roles=_changes(before.peak.roles, after.peak.roles),
        modules=_table_changes(*same_names(before.peak.modules, after.peak.modules)),
        phases=_sorted(
            _phase_change(name, before.phases.get(name), after.phases.get(name))
            for name in {**before.phases, **after.phases}
        ),
        reserved=None if None in reserved else Change("reserved", *reserved),
        sites=_table_changes(before.sites, after.sites) if both_snapshots else (),
    )


def same_names(before: Table, after: Table) -> tuple[Table, Table]:
    """Two tables of modules under the same names: what PEFT puts around a name is left out, and a module that one side
    alone names is counted with the innermost around it that the other names too, as a record counts small modules
    with their parents. No byte is lost."""
    first, second = _renamed(before, _without_peft), _renamed(after, _without_peft)
    first = _renamed(first, lambda name: _nearest(name, second))
    second = _renamed(second, lambda name: _nearest(name, first))
    return _renamed(first, lambda name: _nearest(name, second)), second


def _nearest(name: str, known: Collection[str]) -> str:
    """The innermost of a module and those around it that is known; itself where none is."""
    above = name
    while above and above not in known:
        above = above.rpartition(".")[0]
    return above or name


def _without_peft(name: str) -> str:
    return "" if name in _PEFT_ROOTS else name.removeprefix(_PEFT_PREFIX)


def _renamed(table: Table, rename: Callable[[str], str]) -> dict[str, dict[str, int]]:
    renamed: dict[str, dict[str, int]] = {}
    for name, row in table.items():
        into = renamed.setdefault(rename(name), {})
        for category, size in row.items():
            into[category] = into.get(category, 0) + size
    return renamed


def _phase_change(name: str, before: PhaseRecord | None, after: PhaseRecord | None) -> Change:
    return Change(
        name,
        None if before is None else before.peak_bytes,
        None if after is None else after.peak_bytes,
        _changes({} if before is None else _held(before.at_peak), {} if after is None else _held(after.at_peak)),
    )


def _table_changes(before: Table, after: Table) -> tuple[Change, ...]:
    return _sorted(_row_change(name, before.get(name), after.get(name)) for name in {**before, **after})


def _row_change(name: str, before: Mapping[str, int] | None, after: Mapping[str, int] | None) -> Change:
    return Change(
        name,
        None if before is None else sum(before.values()),
        None if after is None else sum(after.values()),
        _changes(before or {}, after or {}),
    )


def _changes(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[Change, ...]:
    return _sorted(Change(name, before.get(name), after.get(name)) for name in {**before, **after})


def _sorted(changes: Iterable[Change]) -> tuple[Change, ...]:
    return tuple(sorted(changes, key=lambda change: (-change.growth_bytes, change.name)))


def _held(categories: Categories) -> dict[str, int]:
    return {name: size or 0 for name, size in categories.items()}


def _side_json(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "source": side.source,
        "phase": side.peak.phase.value if side.peak.phase else None,
        "step": side.peak.step,
        "bytes": side.peak.bytes,
        "reserved_peak_bytes": side.reserved_peak_bytes,
    }


def _is_pickle(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(1) == _PICKLE
    except (OSError, ValueError):
        return False
