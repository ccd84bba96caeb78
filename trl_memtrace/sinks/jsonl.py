"""The record on disk: one JSON object a line, every line written out at once, so that a killed run leaves all but the
last."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from ..records import FailureRecord, RunHeader, StepRecord, Summary, dump_line
from . import Sink


class JsonlSink(Sink):
    """Writes a record file.

    Args:
        path: the file; its folder is made.
        resume: go on with what is there, when a run is resumed; else it is replaced.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path = path
        self._resume = resume
        self._file: TextIO | None = None

    def open(self, header: RunHeader) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self._resume and _ends_in_mid_line(self.path)
        self._file = self.path.open("a" if self._resume else "w", encoding="utf-8")
        self._write(("\n" if torn else "") + dump_line(header.to_json()))

    def step(self, record: StepRecord) -> None:
        self._write(dump_line(record.to_json()))

    def log(self, record: StepRecord, global_step: int) -> None:
        pass

    def fail(self, failure: FailureRecord) -> None:
        self._write(dump_line(failure.to_json()))

    def close(self, summary: Summary) -> None:
        try:
            self._write(dump_line(summary.to_json()))
        finally:
            file, self._file = self._file, None
            if file is not None:
                file.close()

    def _write(self, text: str) -> None:
        if self._file is not None:
            self._file.write(text)
            self._file.flush()


def _ends_in_mid_line(path: Path) -> bool:
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"
