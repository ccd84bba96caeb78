"""Whoever wants to hear of every step recorded in this process, whichever tracer recorded it. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .records import FailureRecord, StepRecord

Listener = Callable[["StepRecord | FailureRecord"], None]

_listeners: list[Listener] = []


def tell(record: StepRecord | FailureRecord) -> None:
    """Hand a record to everybody who listens."""
    for listener in list(_listeners):
        listener(record)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have a listener called with every record that is made meanwhile."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
