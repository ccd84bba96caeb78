"""A limit that a run is to keep to, and what is said where it does not. No torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from .records import Peak
from .units import format_bytes, parse_bytes

_NAMED_CATEGORIES = 3


class OnLimit(str, enum.Enum):
    """What is done where a step has held more than the limit."""

    WARN = "warn"
    STOP = "stop"
    SAVE_AND_STOP = "save_and_stop"

    __str__ = str.__str__


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that a step may hold.

    Attributes:
        limit_bytes: how much that is.
        on_limit: what is done about more.
    """

    limit_bytes: int
    on_limit: OnLimit

    @classmethod
    def of(cls, limit: int | str | None, on_limit: str) -> Budget | None:
        """A budget from what a user gives; None where there is no limit.

        Raises:
            ValueError: an argument has a value that it cannot take.
        """
        if on_limit not in tuple(OnLimit):
            raise ValueError(f"on_limit must be one of {', '.join(OnLimit)}, not {on_limit!r}")
        if limit is None:
            return None
        try:
            size = parse_bytes(limit) if isinstance(limit, str) else limit
        except ValueError as problem:
            raise ValueError(f"limit must be a size: {problem}") from None
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"limit must be a size, such as '40GiB', or a number of bytes of 1 or more, not {limit!r}"
            )
        return cls(size, OnLimit(on_limit))

    def exceeded(self, step: int, held_bytes: int, peak: Peak) -> str | None:
        """What to say of a step, in one line; None where it has kept to the limit.

        Args:
            step: its number.
            held_bytes: the most that it held.
            peak: what that was, as far as is known.
        """
        if held_bytes <= self.limit_bytes:
            return None
        then = {
            OnLimit.WARN: "training goes on",
            OnLimit.STOP: "training stops here",
            OnLimit.SAVE_AND_STOP: "training is saved and stops here",
        }
        return (
            f"step {step} held {format_bytes(held_bytes)}, more than the limit of {format_bytes(self.limit_bytes)};"
            f" {then[self.on_limit]}. {_what(peak)}"
        )


def _what(peak: Peak) -> str:
    if peak.bytes is None or peak.phase is None:
        return "What held it is not known: the step was not traced"
    held = sorted(((size or 0, name) for name, size in peak.categories.items()), reverse=True)
    parts = [f"{name.replace('_', ' ')} {format_bytes(size)}" for size, name in held[:_NAMED_CATEGORIES] if size]
    named = {name: sum(row.values()) for name, row in peak.modules.items() if name}
    most = max(named, key=lambda name: named[name], default="")
    where = f", most of it in {most} ({format_bytes(named[most])})" if most else ""
    return f"What held it, in {peak.phase}: {', '.join(parts)}{where}"
