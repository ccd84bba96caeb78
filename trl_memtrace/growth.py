"""Memory that rises from step to step: found, named, and told apart from batches of varying length. Pure numpy.

Two kinds of evidence, for two kinds of devices:

- Where the allocator has a counter, every step has a level at its end. Its lows over blocks of steps are followed, the
  latest and, in ever larger blocks, those of the whole run; they have to rise one after the other, evenly, and by more
  than the levels inside a block differ.
- Where there is none (the CPU), a traced step tells only by how much it rose itself; what it leaves behind may be
  replaced in the next. So a step that leaves something behind has the next ones followed in one recording: what
  each of them left behind is still there at the end, or it is not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .attribution import Books
from .categories import CATEGORIES, CATEGORY_CODE, Category
from .ledger import BoolArray, Int64Array
from .records import Growth

FOLLOWED_STEPS = 8
"""How many steps are followed in one recording: batches of random length rise so often in a row by chance once in
forty thousand times."""

_BLOCK_STEPS = 4
_BLOCKS = 8
_EVENLY = 0.25
_NOTICEABLE = 1e-5
"""What a step has to add, as a part of the peak, to be worth a warning: a hundredth of it in a thousand steps."""

_CLEARED_BYTES = 1.5
_CLEARED_STEPS = 4
"""A step is suspected again that leaves so many times more behind than one that was cleared, or comes so many times
later."""

Table = Mapping[tuple[str, str], int]
"""Bytes by module and category."""


@dataclass(frozen=True, slots=True)
class _Block:
    first_step: int
    steps: int
    low: int
    high: int

    def joined(self, other: _Block) -> _Block:
        return _Block(self.first_step, self.steps + other.steps, min(self.low, other.low), max(self.high, other.high))


class _Levels:
    """The levels at the ends of all steps, as blocks: the latest of a few steps each, and those of the whole run."""

    def __init__(self) -> None:
        self._open: _Block | None = None
        self._latest: deque[_Block] = deque(maxlen=_BLOCKS)
        self._whole: list[_Block] = []
        self._whole_open: _Block | None = None
        self._whole_steps = _BLOCK_STEPS

    def add(self, step: int, level: int) -> bool:
        """One more. Returns whether a block is complete."""
        single = _Block(step, 1, level, level)
        self._open = single if self._open is None else self._open.joined(single)
        if self._open.steps < _BLOCK_STEPS:
            return False
        block, self._open = self._open, None
        self._latest.append(block)
        self._whole_open = block if self._whole_open is None else self._whole_open.joined(block)
        if self._whole_open.steps >= self._whole_steps:
            self._whole.append(self._whole_open)
            self._whole_open = None
        if len(self._whole) == 2 * _BLOCKS:
            pairs = zip(self._whole[::2], self._whole[1::2], strict=True)
            self._whole = [first.joined(second) for first, second in pairs]
            self._whole_steps *= 2
        return True

    def rising(self, noticeable: float) -> tuple[int, int] | None:
        """Since which step, and by how many bytes a step, the lows rise; None where they do not."""
        return _rising(list(self._latest), noticeable) or _rising(self._whole[-_BLOCKS:], noticeable)


def _rising(blocks: Sequence[_Block], noticeable: float) -> tuple[int, int] | None:
    if len(blocks) < _BLOCKS:
        return None
    lows = np.array([block.low for block in blocks], np.int64)
    steps = np.array([block.steps for block in blocks], np.int64)
    rise, per_step = int(lows[-1] - lows[0]), float(lows[-1] - lows[0]) / float(steps[:-1].sum())
    if per_step < noticeable or np.diff(lows).min() < _EVENLY * per_step * steps.min():
        return None
    spread = np.array([block.high - block.low for block in blocks]) - per_step * (steps - 1)
    return (blocks[0].first_step, round(per_step)) if rise > 2 * spread.max() else None


class GrowthWatch:
    """Finds memory that rises from step to step, in bounded memory and a bounded time a step."""

    def __init__(self) -> None:
        self.found: Growth | None = None
        self.wants_following = False
        """Whether the next steps should be followed in one recording."""
        self.wants_tracing = False
        """Whether the next step should be traced, to say what it is that rises."""
        self._levels = _Levels()
        self._rising: tuple[int, int] | None = None
        self._first_step: int | None = None
        self._clean_step: int | None = None
        self._peak = 0
        self._suspected_bytes = 0
        self._cleared_bytes = 0
        self._cleared_step = 0

    def step(self, step: int, level: int) -> None:
        """A step has ended.

        Args:
            step: its number.
            level: what the allocator's counter says, less the batch.
        """
        self._peak = max(self._peak, level)
        if self.found is None and self._rising is None and self._levels.add(step, level):
            self._rising = self._levels.rising(_NOTICEABLE * self._peak)
            self.wants_tracing = self._rising is not None

    def traced(self, step: int, peak: int, rise: Table, *, has_levels: bool) -> None:
        """A traced step has ended.

        Args:
            step: its number.
            peak: the most that it held.
            rise: by how much it left more than it began with.
            has_levels: whether ``step`` is called too.
        """
        if self.found is not None:
            return
        self._peak = max(self._peak, peak)
        left = _total(rise)
        if has_levels:
            if self._rising is not None:
                self._name(*self._rising, rise)
            return
        if self._first_step is None:
            self._first_step = step  # in which what lasts is made, such as the optimizer's states
        elif left < _NOTICEABLE * self._peak:
            self._clean_step = step
        elif left > _CLEARED_BYTES * self._cleared_bytes or step >= _CLEARED_STEPS * self._cleared_step:
            self.wants_following = True
            self._suspected_bytes = left

    def followed(self, steps: Sequence[int], survivors: Sequence[Table], levels: Sequence[int]) -> None:
        """Steps that were followed in one recording.

        Args:
            steps: their numbers.
            survivors: of each step what it left behind and was still there at the end of them all.
            levels: what was there at the end of each, less the batch.
        """
        self.wants_following = False
        if self.found is not None or len(steps) < FOLLOWED_STEPS:
            return
        least, since = _NOTICEABLE * self._peak, (self._clean_step or self._first_step or steps[0] - 1) + 1
        left = [
            sum(table.values()) for table in survivors[:-1]
        ]  # what the last one leaves may be replaced in the next
        rises = np.diff(np.array(levels, np.int64))
        replaced = rises - np.array([*left[1:], 0], np.int64)  # by how much more it was that the next one let go of
        if min(left) >= least:
            kept = merged(survivors[:-1])
            self._name(since, round(sum(left) / len(left)), kept)
        elif replaced.min() >= max(least, _EVENLY * float(replaced.mean())):
            self._name(since, round(float(rises.mean())), survivors[-1])
        else:
            self._clean_step = self._cleared_step = steps[-1]
            self._cleared_bytes = max(self._cleared_bytes, self._suspected_bytes, *map(_total, survivors))

    def _name(self, since: int, bytes_per_step: int, table: Table) -> None:
        by_category: dict[str, int] = {}
        for (_, category), size in table.items():
            by_category[category] = by_category.get(category, 0) + size
        category = max(by_category, key=lambda name: by_category[name], default=Category.UNATTRIBUTED.value)
        if by_category.get(category, 0) <= 0:
            category = Category.UNATTRIBUTED.value
        modules = {module: size for (module, kind), size in table.items() if kind == category and size > 0}
        module = max(modules, key=lambda name: modules[name], default="")
        self.wants_tracing = False
        self.found = Growth(category, module, since, bytes_per_step)


def _total(table: Table) -> int:
    return sum(table.values())


def merged(tables: Iterable[Table]) -> dict[tuple[str, str], int]:
    """The sum of some tables."""
    total: dict[tuple[str, str], int] = {}
    for table in tables:
        for key, size in table.items():
            total[key] = total.get(key, 0) + size
    return total


_PASSING = Category.INPUTS
"""What is larger where the batch is longer, and no growth."""


def rise_of(books: Books) -> dict[tuple[str, str], int]:
    """By how much more a recording ends with than it began with, by module and category; batches are left out."""
    at_end, at_begin = books.ledger.alive(len(books.ledger.level) - 1), books.ledger.alive(0)
    return _table(books, at_end.astype(np.int64) - at_begin)


def follow(books: Books, ends: Sequence[int]) -> tuple[list[dict[tuple[str, str], int]], list[int]]:
    """What ``GrowthWatch.followed`` takes.

    Args:
        books: of one recording of several steps.
        ends: the instants at which they ended.

    Returns:
        what each step left behind that is there at the last end, and the level at each end, batches left out.
    """
    ledger = books.ledger
    alive = ledger.alive(ends[-1])
    starts = [0, *ends[:-1]]
    survivors = [
        _table(books, alive & (ledger.born > start) & (ledger.born <= end))
        for start, end in zip(starts, ends, strict=True)
    ]
    levels = [sum(_table(books, ledger.alive(end)).values()) for end in ends]
    return survivors, levels


def _table(books: Books, times: BoolArray | Int64Array) -> dict[tuple[str, str], int]:
    """Bytes by module and category, where each block counts so many times; batches are left out."""
    kept = np.flatnonzero(times * (books.category != CATEGORY_CODE[_PASSING]))
    codes = books.module[kept] * len(CATEGORIES) + books.category[kept]
    totals = np.bincount(codes, times[kept] * books.ledger.size[kept], minlength=1)
    table = {}
    for code in np.flatnonzero(totals):
        module, category = divmod(int(code), len(CATEGORIES))
        table[books.modules[module], CATEGORIES[category].value] = int(totals[code])
    return table


__all__ = ["FOLLOWED_STEPS", "Growth", "GrowthWatch", "follow", "merged", "rise_of"]
