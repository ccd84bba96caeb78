"""A record that is still being written: read as it grows, kept in bounded memory. No torch."""

from __future__ import annotations

import json
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import RecordError
from .records import FailureRecord, RunHeader, StepRecord, Summary, check_schema

_SHOWN_STEPS = 240


class Tail:
    """The lines of a file that others write to, each once it is whole.

    Args:
        path: the file; it must be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = 0
        self._torn = b""
        self._identity: tuple[int, int] | None = None

    def read(self) -> tuple[bool, list[str]]:
        """What is new: whether the file is another one than before, from its beginning, and its new whole lines.

        Raises:
            OSError: it cannot be read.
        """
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            replaced = self._identity not in (None, identity) or status.st_size < self._place
            if replaced:
                self._place, self._torn = 0, b""
            self._identity = identity
            file.seek(self._place)
            content = file.read()
        self._place += len(content)
        *lines, self._torn = (self._torn + content).split(b"\n")
        return replaced, [line.decode("utf-8-sig", errors="replace") for line in lines]


@dataclass(slots=True)
class LiveRun:
    """What a record has said so far.

    Attributes:
        summary: of the steps so far; of those since it was resumed, where it was.
        recent: bytes at the peak of the last traced steps.
        last: the last step.
        failure: what held the memory when training failed, once it has.
        finished: whether the record has been closed.
        damaged_lines: lines that made no sense.
    """

    summary: Summary = field(default_factory=Summary)
    recent: deque[int] = field(default_factory=lambda: deque(maxlen=_SHOWN_STEPS))
    last: StepRecord | None = None
    failure: FailureRecord | None = None
    finished: bool = False
    damaged_lines: int = 0
    begun: bool = False

    def take(self, line: str) -> None:
        """Take one more line into account.

        Raises:
            RecordError: the record is of a newer schema, or the file is something else: its first line is no run's.
        """
        if not line.strip():
            return
        try:
            data = json.loads(line)
            kind = data["record"]
            if kind == "run":
                self._begin(data)
            elif not self.begun:
                raise KeyError(kind)
            elif kind == "step":
                self._step(StepRecord.from_json(data))
            elif kind in ("oom", "failure"):
                self.failure = FailureRecord.from_json(data)
            elif kind == "summary":
                self.finished = True
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            if not self.begun:
                raise RecordError("this is not a MemTrace record: it does not begin with the line of a run") from None
            self.damaged_lines += 1

    def _begin(self, data: dict[str, Any]) -> None:
        check_schema(data)
        self.summary = Summary(RunHeader.from_json(data))
        self.failure, self.finished, self.begun = None, False, True

    def _step(self, step: StepRecord) -> None:
        self.summary.add(step)
        self.last = step
        if step.peak.bytes is not None:
            self.recent.append(step.peak.bytes)


def read_on(tail: Tail, run: LiveRun) -> LiveRun:
    """The run with what its file has got since: another one where the file has been replaced.

    Raises:
        RecordError: the file cannot be read, or is no record.
    """
    try:
        replaced, lines = tail.read()
    except OSError as problem:
        raise RecordError(f"cannot read {tail.path}: {problem.strerror or problem}") from None
    run = LiveRun() if replaced else run
    try:
        for line in lines:
            run.take(line)
    except RecordError as problem:
        raise RecordError(f"{tail.path}: {problem}") from None
    return run
