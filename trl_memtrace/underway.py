"""The dry run that is under way, for those who have to know of it and are there without one. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .dryrun import DryRun

_current: list[DryRun] = []


def current() -> DryRun | None:
    """The dry run under way; None where there is none."""
    return _current[-1] if _current else None


@contextmanager
def under_way(dry: DryRun) -> Iterator[None]:
    """While it lasts, this dry run is under way."""
    _current.append(dry)
    try:
        yield
    finally:
        _current.remove(dry)
