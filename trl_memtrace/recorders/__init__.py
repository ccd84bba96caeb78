"""Where events come from. Each recorder sees every allocation of one device while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from ..ledger import Events, Int64Array, Ledger


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


@dataclass(frozen=True, slots=True, eq=False)
class WholeRecording:
    """What a recorder saw whose allocator also lists what it holds, so that nothing is missing from the ledger.

    Attributes:
        ledger: the blocks, those from before the recording among them.
        peak_bytes: the allocator's own peak counter, where its peak was in this recording.
        end_bytes: what the allocator says is allocated at the end.
        reserved_bytes: the most that was reserved.
        refused_bytes: what the allocator could not give, where that is how the recording ended.
    """

    ledger: Ledger
    peak_bytes: int | None
    end_bytes: int
    reserved_bytes: int
    refused_bytes: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """What a recorder saw that can only read a counter now and then.

    Attributes:
        time_ns: ``(S,)`` when it was read.
        level: ``(S,)`` bytes allocated then.
        peak_bytes: the allocator's own peak counter, where its peak was in this recording.
    """

    time_ns: Int64Array
    level: Int64Array
    peak_bytes: int | None


AnyRecording = Recording | WholeRecording | Samples


class Recorder(Protocol):
    """Sees every allocation of one kind of device while it runs.

    Attributes:
        device_type: what the device is called.
        sees_every_step: whether it can say of every step, once it has ended, if it held more than any before; then it
            runs in every step, and is stopped only in those that matter.
    """

    device_type: str
    sees_every_step: bool

    def address_of(self, storage: Any) -> int:
        """The address by which the events name a storage."""
        address: int = storage.data_ptr()
        return address

    def clock(self) -> int:
        """Now, in nanoseconds, on the clock that the events carry."""

    def start(self) -> None:
        """Begin.

        Raises:
            RecorderBusyError: somebody else is recording.
        """

    def watch(self, storages: Iterable[Any]) -> None:
        """Look out for the end of storages that were there before the recording."""

    def note_ended(self, addresses: Iterable[int]) -> None:
        """What was there before the recording, and was claimed at these addresses, has just ended. A recorder that
        sees the end of everything need not be told."""
        return None

    def is_new_high(self) -> bool:
        """Whether the step under way has held more than any before, where ``sees_every_step``."""

    def allocated_bytes(self) -> int | None:
        """What the allocator's own counter says is allocated now; None where it has none."""

    def peak_bytes(self) -> int | None:
        """The most that was ever allocated, by the allocator's own counter; None where it has none."""

    def reserved_bytes(self) -> int | None:
        """What the caching allocator has reserved now; None where there is none."""

    def stop(self, failed: bool = False) -> AnyRecording | None:
        """End, and hand over what was seen; None where the recording was cut short by somebody else.

        Args:
            failed: an exception ended the step: what was seen when memory was refused is wanted, where it was.
        """

    def abandon(self) -> None:
        """End, whatever the state, and forget what was seen."""

    def close(self) -> None:
        """Let go of everything for good."""
