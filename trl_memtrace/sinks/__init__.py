"""Where records go while a run is under way."""

from __future__ import annotations

from typing import Protocol

from ..ranks import Ranks
from ..records import FailureRecord, RunHeader, StepRecord, Summary


class Sink(Protocol):
    """Takes what a run produces. Whatever it raises is its own affair: it is warned about once and the sink is let
    go."""

    def open(self, header: RunHeader) -> None:
        """A run begins."""

    def step(self, record: StepRecord) -> None:
        """A step has ended."""

    def log(self, record: StepRecord, global_step: int) -> None:
        """The trainer is about to log; ``record`` is the traced step that held most since it last did."""

    def fail(self, failure: FailureRecord) -> None:
        """Training has ended in an exception."""

    def close(self, summary: Summary) -> None:
        """The run has ended."""

    def compare(self, ranks: Ranks) -> None:
        """What all ranks have recorded, told to the sinks of rank 0 once the run has ended, where there were several;
        most have nothing to do with it."""
        return None
