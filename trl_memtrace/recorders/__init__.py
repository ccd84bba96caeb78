"""Where events come from. Each recorder sees every allocation of one device while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from ..ledger import Events, Int64Array


class RecorderBusyError(RuntimeError):
    """The means of recording is in somebody else's hands just now."""


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """What a recorder saw between start and stop.

    Attributes:
        events: the allocations and frees.
        reported: ``(N,)`` how the allocator's own running total changed with each event, by its own word; 0 for an
            event that the allocator did not report and the recorder added.
    """

    events: Events
    reported: Int64Array


class Recorder(Protocol):
    """Sees every allocation of one kind of device, on the calling thread, while it runs."""

    device_type: str

    def clock(self) -> int:
        """Now, in nanoseconds, on the clock that the events carry."""

    def start(self) -> None:
        """Begin.

        Raises:
            RecorderBusyError: somebody else is recording.
        """

    def watch(self, storages: Iterable[Any]) -> None:
        """Look out for the end of storages that were there before the recording."""

    def stop(self) -> Recording | None:
        """End, and hand over what was seen; None where the recording was cut short by somebody else."""

    def abandon(self) -> None:
        """End, whatever the state, and forget what was seen."""

    def close(self) -> None:
        """Let go of everything for good."""
