"""The record of a run: what recorders make and reporters read. JSON lines, integers of bytes, no torch.

docs/record.md describes the schema. A record is read back whatever ended the run: a torn last line is passed over.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .categories import CATEGORIES, Category, Phase
from .errors import RecordError
from .units import format_bytes

if TYPE_CHECKING:
    import pandas

SCHEMA = 1
Categories = Mapping[str, "int | None"]
"""Bytes by category. Every category is always there; all are None where nothing was traced."""

UNTRACED: Categories = {category.value: None for category in CATEGORIES}


def category_table(sizes: Mapping[Category, int]) -> dict[str, int]:
    """Every category with its bytes, 0 where it holds nothing."""
    return {category.value: sizes.get(category, 0) for category in CATEGORIES}


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not an integer")
    if not -(2**63) <= value < 2**63:
        raise OverflowError("an integer of more than 64 bits is no number of bytes")
    return value


def _integer_or_none(value: Any) -> int | None:
    return None if value is None else _integer(value)


def _sizes(row: Mapping[str, Any]) -> dict[str, int]:
    return {name: _integer(size) for name, size in row.items()}


def _categories(row: Mapping[str, Any]) -> Categories:
    return {category.value: _integer_or_none(row[category.value]) for category in CATEGORIES}


@dataclass(frozen=True, slots=True)
class PhaseRecord:
    """One phase of a step: the highest level in it, the level at its end, and what was alive at both."""

    peak_bytes: int
    end_bytes: int
    at_peak: Categories
    at_end: Categories

    def to_json(self) -> dict[str, Any]:
        return {
            "peak_bytes": self.peak_bytes,
            "end_bytes": self.end_bytes,
            "at_peak": dict(self.at_peak),
            "at_end": dict(self.at_end),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PhaseRecord:
        return cls(
            peak_bytes=_integer(data["peak_bytes"]),
            end_bytes=_integer(data["end_bytes"]),
            at_peak=_categories(data["at_peak"]),
            at_end=_categories(data["at_end"]),
        )


@dataclass(frozen=True, slots=True)
class Peak:
    """The instant at which a step held most.

    Attributes:
        phase: where in the step it was; None in a step that was only counted.
        bytes: what the categories add up to; None where nothing was counted.
        allocator_bytes: what the allocator itself says.
        categories: bytes by category.
        roles: bytes by refined category, such as ``weights/frozen``; they add up to ``bytes`` too.
        modules: bytes by module and category, the smallest modules folded into their parents; ``""`` is what belongs
            to none.
        step: the step it was in, in a summary.
    """

    phase: Phase | None = None
    bytes: int | None = None
    allocator_bytes: int | None = None
    categories: Categories = field(default_factory=lambda: UNTRACED)
    roles: Mapping[str, int] = field(default_factory=dict)
    modules: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    step: int | None = None

    def to_json(self) -> dict[str, Any]:
        data = {
            "phase": self.phase.value if self.phase else None,
            "bytes": self.bytes,
            "allocator_bytes": self.allocator_bytes,
            "categories": dict(self.categories),
            "roles": dict(self.roles),
            "modules": {name: dict(row) for name, row in self.modules.items()},
        }
        return data if self.step is None else {**data, "step": self.step}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Peak:
        phase = data.get("phase")
        return cls(
            phase=Phase(phase) if phase else None,
            bytes=_integer_or_none(data["bytes"]),
            allocator_bytes=_integer_or_none(data["allocator_bytes"]),
            categories=_categories(data["categories"]),
            roles=_sizes(data.get("roles", {})),
            modules={name: _sizes(row) for name, row in data.get("modules", {}).items()},
            step=_integer_or_none(data.get("step")),
        )


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One training step.

    Attributes:
        step: its number, as the trainer counts (the first is 1).
        traced: whether its books were kept in full.
        phases: by phase name, in the order in which they ended; empty in a step that was only counted.
        peak: the instant at which it held most.
        reserved_bytes: what the caching allocator had reserved at most; None where there is none.
        seconds: how long the step took, tracing included.
        tracing_seconds: how much of that MemTrace spent outside the step's own work.
    """

    step: int
    traced: bool
    phases: Mapping[str, PhaseRecord]
    peak: Peak
    reserved_bytes: int | None
    seconds: float
    tracing_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "record": "step",
            "step": self.step,
            "traced": self.traced,
            "phases": {name: phase.to_json() for name, phase in self.phases.items()},
            "peak": self.peak.to_json(),
            "reserved_bytes": self.reserved_bytes,
            "seconds": round(self.seconds, 6),
            "tracing_seconds": round(self.tracing_seconds, 6),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StepRecord:
        return cls(
            step=_integer(data["step"]),
            traced=bool(data["traced"]),
            phases={name: PhaseRecord.from_json(phase) for name, phase in data["phases"].items()},
            peak=Peak.from_json(data["peak"]),
            reserved_bytes=_integer_or_none(data["reserved_bytes"]),
            seconds=float(data["seconds"]),
            tracing_seconds=float(data.get("tracing_seconds", 0.0)),
        )

    def followed_by(self, later: StepRecord) -> StepRecord:
        """The step with what was traced after it and before the next, such as an evaluation. Where the same phase was
        traced before, the one that held more stays."""
        phases = {name: phase for name, phase in self.phases.items() if name not in later.phases}
        for name, phase in later.phases.items():
            before = self.phases.get(name)
            phases[name] = before if before is not None and before.peak_bytes > phase.peak_bytes else phase
        return replace(
            self,
            traced=self.traced or later.traced,
            phases=phases,
            peak=later.peak if (later.peak.bytes or 0) > (self.peak.bytes or 0) else self.peak,
            reserved_bytes=_largest(self.reserved_bytes, later.reserved_bytes),
            tracing_seconds=self.tracing_seconds + later.tracing_seconds,
        )


@dataclass(frozen=True, slots=True)
class Growth:
    """Memory that rises from step to step.

    Attributes:
        category: what most of it is.
        module: to which module most of that belongs, ``""`` where to none.
        since_step: the step in which it began, as far as is known.
        bytes_per_step: by how much it rises.
    """

    category: str
    module: str
    since_step: int
    bytes_per_step: int

    def to_json(self) -> dict[str, Any]:
        return {
            "category": self.category,
            "module": self.module,
            "since_step": self.since_step,
            "bytes_per_step": self.bytes_per_step,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Growth:
        return cls(
            category=str(data["category"]),
            module=str(data["module"]),
            since_step=_integer(data["since_step"]),
            bytes_per_step=_integer(data["bytes_per_step"]),
        )

    def __str__(self) -> str:
        whose = f"{self.category.replace('_', ' ')} of {self.module}" if self.module else self.category
        return (
            f"memory rises by {format_bytes(self.bytes_per_step)} a step since step {self.since_step}: {whose};"
            f" {format_bytes(1000 * self.bytes_per_step)} in 1,000 steps"
        )


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Something that would have helped.

    Attributes:
        what: what to do, as a setting where there is one.
        why: what in the books it is about.
        frees_bytes: how much of what was held then it frees, by the books; at most that much.
    """

    what: str
    why: str
    frees_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "why": self.why, "frees_bytes": self.frees_bytes}


@dataclass(frozen=True, slots=True)
class FailureRecord:
    """What held the memory when training ended in an exception.

    Attributes:
        step: the step that was under way.
        out_of_memory: whether it was memory that could not be had.
        error: the exception's type and the first line of what it says.
        phase: the phase under way; None where the step was not watched.
        module: the innermost module whose forward was under way, ``""`` outside all.
        requested_bytes: what was asked for, where the exception says it.
        peak: what was alive at that moment; of the last traced step where this one was not traced.
        traced: whether ``peak`` is of that very moment.
        reserved_bytes: what the caching allocator had reserved, None where there is none.
        free_bytes: what of it was free, in pieces that were too small or of the wrong pool.
        suggestions: what would have helped, the most helpful first.
    """

    step: int
    out_of_memory: bool
    error: str
    phase: Phase | None
    module: str
    requested_bytes: int | None
    peak: Peak
    traced: bool
    reserved_bytes: int | None = None
    free_bytes: int | None = None
    suggestions: tuple[Suggestion, ...] = ()

    def to_json(self) -> dict[str, Any]:
        held = self.peak.to_json()
        return {
            "record": "oom" if self.out_of_memory else "failure",
            "step": self.step,
            "error": self.error,
            "phase": self.phase.value if self.phase else None,
            "module": self.module,
            "requested_bytes": self.requested_bytes,
            "traced": self.traced,
            **{key: held[key] for key in ("bytes", "allocator_bytes", "categories", "roles", "modules")},
            "reserved_bytes": self.reserved_bytes,
            "free_bytes": self.free_bytes,
            "suggestions": [suggestion.to_json() for suggestion in self.suggestions],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FailureRecord:
        phase = Phase(data["phase"]) if data["phase"] else None
        return cls(
            step=_integer(data["step"]),
            out_of_memory=data["record"] == "oom",
            error=str(data["error"]),
            phase=phase,
            module=str(data["module"]),
            requested_bytes=_integer_or_none(data["requested_bytes"]),
            peak=Peak.from_json({**data, "step": None}),
            traced=bool(data["traced"]),
            reserved_bytes=_integer_or_none(data["reserved_bytes"]),
            free_bytes=_integer_or_none(data["free_bytes"]),
            suggestions=tuple(
                Suggestion(str(row["what"]), str(row["why"]), _integer(row["frees_bytes"]))
                for row in data["suggestions"]
            ),
        )


@dataclass(frozen=True, slots=True)
class RunHeader:
    """What ran, on what, with which versions and settings."""

    source: str = "run"
    device: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    args: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "record": "run",
            "schema": SCHEMA,
            "source": self.source,
            "device": dict(self.device),
            "versions": dict(self.versions),
            "model": dict(self.model),
            "trainer": dict(self.trainer),
            "args": dict(self.args),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunHeader:
        keys = ("device", "versions", "model", "trainer", "args")
        return cls(data.get("source", "run"), *(dict(data.get(key, {})) for key in keys))


@dataclass(slots=True)
class Summary:
    """A whole run, built up step by step, in bounded memory.

    Attributes:
        header: what ran.
        steps: how many steps were seen.
        traced_steps: of how many the books were kept in full.
        worst: the step that held most, of those traced; of those counted when none was.
        worst_phases: of every phase its worst record.
        last: the last traced step.
        growth: memory that was found to rise from step to step.
    """

    header: RunHeader = field(default_factory=RunHeader)
    steps: int = 0
    traced_steps: int = 0
    seconds: float = 0.0
    tracing_seconds: float = 0.0
    worst: StepRecord | None = None
    worst_phases: dict[str, PhaseRecord] = field(default_factory=dict)
    last: StepRecord | None = None
    reserved_peak_bytes: int | None = None
    reserved_end_bytes: int | None = None
    allocated_peak_bytes: int | None = None
    context_bytes: int | None = None
    process_peak_bytes: int | None = None
    growth: Growth | None = None

    def add(self, record: StepRecord) -> None:
        """Take one more step into account."""
        self.steps += 1
        self.traced_steps += record.traced
        self.seconds += record.seconds
        self.tracing_seconds += record.tracing_seconds
        self._look_at(record)

    def amend(self, record: StepRecord, amended: StepRecord) -> None:
        """A step that was added has become another, with what was traced after it."""
        self.traced_steps += amended.traced - record.traced
        self.tracing_seconds += amended.tracing_seconds - record.tracing_seconds
        if self.worst is record:
            self.worst = amended
        self._look_at(amended)

    def _look_at(self, record: StepRecord) -> None:
        self.reserved_end_bytes = record.reserved_bytes
        self.reserved_peak_bytes = _largest(self.reserved_peak_bytes, record.reserved_bytes)
        self.allocated_peak_bytes = _largest(self.allocated_peak_bytes, record.peak.allocator_bytes)
        if self.worst is None or _rank(record) > _rank(self.worst):
            self.worst = record
        if record.traced:
            self.last = record
        for name, phase in record.phases.items():
            if name not in self.worst_phases or phase.peak_bytes > self.worst_phases[name].peak_bytes:
                self.worst_phases[name] = phase

    @property
    def peak(self) -> Peak:
        """The run's peak, with the step it was in."""
        if self.worst is None:
            return Peak()
        peak = self.worst.peak
        return Peak(
            peak.phase, peak.bytes, peak.allocator_bytes, peak.categories, peak.roles, peak.modules, self.worst.step
        )

    def to_json(self) -> dict[str, Any]:
        end = list(self.last.phases.values())[-1] if self.last and self.last.phases else None
        return {
            "record": "summary",
            "schema": SCHEMA,
            "source": self.header.source,
            "steps": self.steps,
            "traced_steps": self.traced_steps,
            "peak": {**self.peak.to_json(), "step": self.peak.step},
            "phases": {name: phase.to_json() for name, phase in self.worst_phases.items()},
            "end": {
                "bytes": end.end_bytes if end else None,
                "categories": dict(end.at_end if end else UNTRACED),
            },
            "allocated_peak_bytes": self.allocated_peak_bytes,
            "reserved_peak_bytes": self.reserved_peak_bytes,
            "reserved_end_bytes": self.reserved_end_bytes,
            "context_bytes": self.context_bytes,
            "process_peak_bytes": self.process_peak_bytes,
            "device": dict(self.header.device),
            "fits": None,
            "unattributed_bytes": self.peak.categories[Category.UNATTRIBUTED],
            "growth": self.growth.to_json() if self.growth is not None else None,
            "seconds": round(self.seconds, 6),
            "tracing_seconds": round(self.tracing_seconds, 6),
        }


def _largest(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else max(a, b)


def _rank(record: StepRecord) -> tuple[bool, int]:
    return record.traced, record.peak.bytes or 0


@dataclass(slots=True)
class RunTrace:
    """The record of one process of one run.

    Iterating gives the steps in order. ``RunTrace.load`` reads it back from a folder or a file.
    """

    header: RunHeader = field(default_factory=RunHeader)
    steps: list[StepRecord] = field(default_factory=list)
    rank: int = 0
    damaged_lines: int = 0
    failure: FailureRecord | None = None
    context_bytes: int | None = None
    process_peak_bytes: int | None = None
    finished: bool = False
    growth: Growth | None = None

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def peak(self) -> Peak:
        """The instant at which the run held most, of those traced."""
        return self.summary.peak

    @property
    def summary(self) -> Summary:
        """The whole run in one."""
        summary = Summary(
            self.header,
            context_bytes=self.context_bytes,
            process_peak_bytes=self.process_peak_bytes,
            growth=self.growth,
        )
        for step in self.steps:
            summary.add(step)
        return summary

    def to_pandas(self) -> pandas.DataFrame:
        """One row a step: ``step, traced, seconds, reserved_bytes, peak_bytes, peak_phase``, one column a category at
        the peak (``peak_weights``, ...) and one a phase (``forward_peak_bytes``, ...), in bytes.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame([_flat(step) for step in self.steps])

    @classmethod
    def load(cls, path: str | os.PathLike[str], rank: int = 0) -> RunTrace:
        """Read a record back.

        Args:
            path: a record file, or the folder that holds one per rank (``<output_dir>/memtrace``).
            rank: which process's, when ``path`` is a folder.

        Raises:
            RecordError: there is no record, it is of a newer schema, or it is something else altogether.
        """
        file = find_record(path, rank)
        if file is None:
            raise RecordError(
                f"no record at {path}: give the folder that MemTrace wrote (OUTPUT_DIR/memtrace) or one of its files"
            )
        try:
            with file.open(encoding="utf-8-sig", errors="replace") as lines:
                run = cls.from_lines(lines)
        except OSError as problem:
            raise RecordError(f"cannot read {file}: {problem.strerror or problem}") from problem
        except RecordError as problem:
            raise RecordError(f"{file}: {problem}") from None
        named = RECORD_NAME.fullmatch(file.name)
        run.rank = int(named[1]) if named else rank
        return run

    @classmethod
    def from_lines(cls, lines: Iterable[str]) -> RunTrace:
        """A record from its lines. Lines that are not whole are counted and passed over. A run that was resumed has
        several headers, of which the last counts; what came after the step that it went on from is dropped.

        Raises:
            RecordError: no run record is there, or it is of a newer schema.
        """
        run, seen_header, resumed = cls(), False, False
        steps: dict[int, StepRecord] = {}
        for line in lines:
            if not line.strip():
                continue
            try:
                data = json.loads(line)
                kind = data["record"]
                if kind == "run":
                    check_schema(data)
                    run.header, run.failure, run.finished = RunHeader.from_json(data), None, False
                    run.growth = None
                    seen_header, resumed = True, seen_header
                elif kind == "step":
                    step = StepRecord.from_json(data)
                    if resumed:
                        steps = {number: earlier for number, earlier in steps.items() if number < step.step}
                        resumed = False
                    steps[step.step] = step
                elif kind in ("oom", "failure"):
                    run.failure = FailureRecord.from_json(data)
                elif kind == "summary":  # steps tell all else
                    run.finished = True
                    run.context_bytes = _integer_or_none(data.get("context_bytes"))
                    run.process_peak_bytes = _integer_or_none(data.get("process_peak_bytes"))
                    run.growth = Growth.from_json(data["growth"]) if data.get("growth") else None
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
                run.damaged_lines += 1
        if not seen_header:
            raise RecordError("this is not a MemTrace record: it holds no line of a run")
        run.steps = [steps[number] for number in sorted(steps)]
        return run


def check_schema(data: Mapping[str, Any]) -> None:
    """Refuse what was written by a newer version.

    Raises:
        RecordError: it was, or there is no schema at all.
    """
    schema = data.get("schema")
    if not isinstance(schema, int):
        raise RecordError("its run line has no schema: this is not a MemTrace record")
    if schema > SCHEMA:
        raise RecordError(f"schema {schema!r} is newer than this trl_memtrace reads ({SCHEMA}); upgrade trl_memtrace")


def _flat(step: StepRecord) -> dict[str, Any]:
    row: dict[str, Any] = {
        "step": step.step,
        "traced": step.traced,
        "seconds": step.seconds,
        "reserved_bytes": step.reserved_bytes,
        "peak_bytes": step.peak.bytes,
        "peak_phase": step.peak.phase.value if step.peak.phase else None,
    }
    row.update({f"peak_{name}": size for name, size in step.peak.categories.items()})
    row.update({f"{name}_peak_bytes": phase.peak_bytes for name, phase in step.phases.items()})
    return row


RECORD_NAME = re.compile(r"rank-(\d+)\.jsonl")


def record_name(rank: int) -> str:
    """The file that a process writes: ``rank-00000.jsonl``."""
    return f"rank-{rank:05d}.jsonl"


def find_record(path: str | os.PathLike[str], rank: int = 0) -> Path | None:
    """The record's file where a path is that file, the folder that holds it, or that folder's parent; None where none
    is."""
    folder = Path(path)
    places = (folder, folder / record_name(rank), folder / "memtrace" / record_name(rank))
    return next((place for place in places if os.path.isfile(place)), None)


def dump_line(data: Mapping[str, Any]) -> str:
    """One record as one line."""
    return json.dumps(data, separators=(",", ":"), default=str) + "\n"
