"""Many configurations of a ``trl`` command, each tried in a process beside this one. No torch here.

A worker imports torch and transformers once and takes one trial after the other. It is told a trial and tells the
outcome, a line of JSON each. One that dies, as where the system is out of memory, costs its trial and no more.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from .text import one_line

_LAST_WORDS = 2000


@dataclass(frozen=True, slots=True)
class Trial:
    """A configuration to try.

    Attributes:
        kind: the command of ``trl``: ``sft`` and so on.
        flags: its flags.
        device: a name from the table of devices, a number of bytes, or None for a card without limits.
        steps: how many optimizer steps to take.
        lengths: tokens of each example; None where that is to be found out.
        measured: whether it is run for real, on the device that is here.
        ranks: how many processes train together; what is tried is the first of them.
    """

    kind: str
    flags: tuple[str, ...]
    device: str | int | None = None
    steps: int = 2
    lengths: tuple[int, ...] | None = None
    measured: bool = False
    ranks: int = 1

    def to_json(self) -> dict[str, Any]:
        """As a worker is told it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """As a worker takes it."""
        lengths = data["lengths"]
        return cls(
            **{**data, "flags": tuple(data["flags"]), "lengths": None if lengths is None else tuple(lengths)},
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a trial: a summary, or an error.

    Attributes:
        summary: the record's summary; None where the trial failed.
        settings: the trainer's arguments that decide memory, as in a record's header, and ``lora_r``.
        longest: tokens of the longest example; None where that is not known.
        positions: how many the model has; None where its config does not say.
        assumed: what had to be assumed, a sentence each.
        error: why there is no summary, in one line.
        seconds: how long it took.
    """

    summary: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    longest: int | None = None
    positions: int | None = None
    assumed: tuple[str, ...] = ()
    error: str | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As a worker tells it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """As it is heard."""
        return cls(**{**data, "assumed": tuple(data["assumed"])})

    @property
    def allocated_bytes(self) -> int | None:
        """The peak of what is allocated."""
        return self._of("allocated_peak_bytes")

    @property
    def reserved_bytes(self) -> int | None:
        """The peak of what the caching allocator takes from the card; None where there is no such allocator."""
        return self._of("reserved_peak_bytes")

    @property
    def process_bytes(self) -> int | None:
        """What the card would show: reserved and context, else what is allocated."""
        return self._of("process_peak_bytes") or self.reserved_bytes or self.allocated_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the device is large enough; None where that was not asked, or not found out."""
        return None if self.summary is None else self.summary.get("fits")

    @property
    def phase(self) -> str | None:
        """The phase of the peak."""
        return None if self.summary is None else self.summary["peak"]["phase"]

    @property
    def categories(self) -> Mapping[str, int]:
        """What was held at the peak of what is allocated."""
        return {} if self.summary is None else {name: size or 0 for name, size in self._peak("categories").items()}

    @property
    def roles(self) -> Mapping[str, int]:
        """The same by role."""
        return {} if self.summary is None else self._peak("roles")

    def _peak(self, name: str) -> Mapping[str, int]:
        assert self.summary is not None
        found: Mapping[str, int] = self.summary["peak"][name]
        return found

    def _of(self, name: str) -> int | None:
        return None if self.summary is None else self.summary.get(name)


class TrialPool:
    """Workers, and trials for them. Leaving it ends the workers, whatever they are at.

    Args:
        workers: how many there are at most, 1 or more.
    """

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._working: set[_Worker] = set()
        self._closed = False

    def __enter__(self) -> TrialPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, where: TracebackType | None
    ) -> None:
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in tuple(self._working):
            worker.close()
        self._threads.shutdown(wait=True)
        while not self._idle.empty():
            self._idle.get().close()

    def submit(self, trial: Trial) -> Future[Outcome]:
        """Have a trial made, as soon as a worker is free."""
        return self._threads.submit(self._run, trial)

    def _run(self, trial: Trial) -> Outcome:
        if self._closed:
            return Outcome(error="stopped")
        worker = self._free_worker()
        self._working.add(worker)
        if self._closed:  # whoever left the pool meanwhile has not seen it
            worker.close()
        try:
            outcome = worker.run(trial)
        finally:
            self._working.discard(worker)
        if worker.has_ended or trial.measured:  # what a real run leaves in its process would be in the next one's
            worker.close()
        else:
            self._idle.put(worker)
        return outcome

    def _free_worker(self) -> _Worker:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return _Worker()


class _Worker:
    COMMAND = (sys.executable, "-m", "trl_memtrace.trial_worker")

    def __init__(self) -> None:
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._folder = tempfile.TemporaryDirectory(prefix="memtrace-", ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            self.COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "TMPDIR": self._folder.name},
            start_new_session=True,  # Ctrl-C is for whoever started the trials
        )

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def run(self, trial: Trial) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(trial.to_json()) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except (OSError, ValueError):  # it is dead, or was closed
            answer = ""
        return Outcome.from_json(json.loads(answer)) if answer else Outcome(error=self._why())

    def close(self) -> None:
        """End it and whatever it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            with suppress(OSError):  # what was still to be written
                stream.close()  # type: ignore[union-attr]
        self._folder.cleanup()

    def _why(self) -> str:
        code = self._process.wait()
        if code < 0:
            hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
            return f"its process was ended by {signal.Signals(-code).name}{hint}"
        self._said.seek(0, os.SEEK_END)
        self._said.seek(max(self._said.tell() - _LAST_WORDS, 0))
        lines = self._said.read().decode(errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f"its process ended with {code}: {one_line(last)}"
