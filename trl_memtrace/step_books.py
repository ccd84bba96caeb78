"""One step's books in full, every block of them, on disk: what timelines and viewers are drawn from. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .attribution import Books, Span, Timeline
from .categories import PHASE_CODE, PHASES
from .errors import RecordError
from .ledger import Int64Array, Ledger

_VERSION = 1
_LEDGER = ("time_ns", "address", "size", "born", "died", "level", "strays")
_TAGS = ("category", "role", "module")


@dataclass(frozen=True, slots=True, eq=False)
class StepBooks:
    """The books of one traced step.

    Attributes:
        step: its number.
        books: every block with its lifetime, category, role and module.
        allocator: ``(N + 1,)`` bytes at each instant by the allocator's own count.
        timeline: phases and modules, as times on the clock of ``books.ledger.time_ns``.
    """

    step: int
    books: Books
    allocator: Int64Array
    timeline: Timeline

    @property
    def peak_bytes(self) -> int:
        """The most that was allocated."""
        return int(self.allocator[self.books.peak(self.books.spans)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as one compressed ``.npz``, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        books, timeline, target = self.books, self.timeline, Path(path)
        columns: dict[str, Any] = {
            "version": np.int64(_VERSION),
            "step": np.int64(self.step),
            "allocator": self.allocator,
            **{name: getattr(books.ledger, name) for name in _LEDGER},
            **{name: getattr(books, name) for name in _TAGS},
            "roles": _names(books.roles),
            "modules": _names(books.modules),
            "spans": np.array([(PHASE_CODE[span.phase], span.start, span.end) for span in books.spans], np.int64),
            "phase_ns": np.array(timeline.phase_ns, np.int64),
            "phase": np.array([PHASE_CODE[phase] for phase in timeline.phase], np.int64),
            "module_ns": np.array(timeline.module_ns, np.int64),
            "running_module": np.array(timeline.module, np.int64),
            "module_names": _names(timeline.module_names),
            "activation_roles": _names(timeline.activation_roles),
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        try:
            with part.open("wb") as file:
                np.savez_compressed(file, **columns)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StepBooks:
        """Read them back. Nothing in the file is executed.

        Raises:
            RecordError: there is no such file, it is damaged, or it is something else.
        """
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as columns:
                if int(columns["version"]) > _VERSION:
                    raise RecordError(
                        f"{path} is of a newer version than this trl_memtrace reads; upgrade trl_memtrace"
                    )
                return cls._of(columns)
        except RecordError:
            raise
        except OSError as problem:
            raise RecordError(f"cannot read {path}: {problem.strerror or problem}") from None
        except Exception as problem:  # a damaged archive can make the libraries that unpack it raise anything
            raise RecordError(f"{path} does not hold a step's books: {type(problem).__name__}") from None

    @classmethod
    def of_record(cls, record: str | os.PathLike[str]) -> StepBooks | None:
        """The books of the peak step that stand beside a record's file; None where there are none.

        Raises:
            RecordError: they are there and damaged.
        """
        path = peak_books_path(record)
        return cls.load(path) if path.is_file() else None

    @classmethod
    def _of(cls, columns: Any) -> StepBooks:
        ledger = Ledger(**{name: columns[name].astype(np.int64) for name in _LEDGER})
        spans = tuple(Span(PHASES[phase], int(start), int(end)) for phase, start, end in columns["spans"].tolist())
        tags = {name: columns[name].astype(np.int64) for name in _TAGS}
        roles, modules = tuple(columns["roles"].tolist()), tuple(columns["modules"].tolist())
        books = Books(ledger, spans, **tags, roles=roles, modules=modules)
        timeline = Timeline(
            phase_ns=columns["phase_ns"].tolist(),
            phase=[PHASES[code] for code in columns["phase"].tolist()],
            module_ns=columns["module_ns"].tolist(),
            module=columns["running_module"].tolist(),
            module_names=columns["module_names"].tolist(),
            activation_roles=columns["activation_roles"].tolist(),
        )
        made = cls(int(columns["step"]), books, columns["allocator"].astype(np.int64), timeline)
        made._check()
        return made

    def _check(self) -> None:
        books, blocks, instants = self.books, len(self.books.ledger.size), len(self.books.ledger.level)
        lengths = {len(column) for column in (books.category, books.role, books.module, books.ledger.born)}
        if lengths != {blocks} or len(self.allocator) != instants or not books.spans:
            raise ValueError("columns of different lengths")
        if any(not 0 <= span.start <= span.end < instants for span in books.spans):
            raise ValueError("a phase outside the step")
        for codes, names in ((books.role, books.roles), (books.module, books.modules)):
            if blocks and not 0 <= int(codes.min()) <= int(codes.max()) < len(names):
                raise ValueError("a name that is not there")


def peak_books_path(record: str | os.PathLike[str]) -> Path:
    """Where the books of the peak step stand: ``rank-00000.peak.npz`` beside ``rank-00000.jsonl``."""
    return Path(record).with_suffix(".peak.npz")


def _names(names: Any) -> Any:
    return np.array(list(names), dtype=np.str_)
