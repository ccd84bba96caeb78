"""The books: events of an allocator in, blocks with a birth and a death out. Pure numpy, no torch.

The ledger numbers instants by events: *instant* ``k`` is the moment after the first ``k`` events, so instant 0 is the
start of the recording and instant ``len(events)`` its end. A block is alive at ``k`` when ``born <= k < died``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

NEVER = np.iinfo(np.int64).max


def _column(values: ArrayLike) -> Int64Array:
    return np.asarray(values, dtype=np.int64).reshape(-1)


@dataclass(frozen=True, slots=True, eq=False)
class Events:
    """What one device's allocator did, in its own order. All columns have shape ``(N,)`` and dtype int64.

    Attributes:
        time_ns: When, on the recorder's clock; never decreasing.
        address: First byte of the block.
        size: Bytes allocated (positive) or freed (negative).
    """

    time_ns: Int64Array
    address: Int64Array
    size: Int64Array

    @classmethod
    def of(cls, time_ns: ArrayLike, address: ArrayLike, size: ArrayLike) -> Events:
        """Events from any three sequences of equal length.

        Raises:
            ValueError: the lengths differ.
        """
        columns = _column(time_ns), _column(address), _column(size)
        if len({len(column) for column in columns}) != 1:
            raise ValueError(f"columns of different lengths: {[len(column) for column in columns]}")
        return cls(*columns)

    def __len__(self) -> int:
        return len(self.address)


@dataclass(frozen=True, slots=True, eq=False)
class Ledger:
    """Blocks of memory with their lifetimes, in order of birth, and the level of the whole at every instant.

    Attributes:
        time_ns: ``(N,)`` times of the events.
        address: ``(B,)`` first byte of each block.
        size: ``(B,)`` bytes of each block.
        born: ``(B,)`` instant from which the block is alive; 0 for one that was there before the recording.
        died: ``(B,)`` instant from which it is gone; ``NEVER`` for one that outlives the recording.
        level: ``(N + 1,)`` bytes alive at each instant.
        strays: ``(S,)`` numbers of the events that free an address that held nothing.
    """

    time_ns: Int64Array
    address: Int64Array
    size: Int64Array
    born: Int64Array
    died: Int64Array
    level: Int64Array
    strays: Int64Array

    @classmethod
    def of(cls, events: Events, baseline_address: ArrayLike = (), baseline_size: ArrayLike = ()) -> Ledger:
        """Pair every allocation with its free.

        Args:
            events: the recording.
            baseline_address: blocks known to be alive before the first event, each address once.
            baseline_size: their bytes.

        An allocation at an address that is still held ends the old block there and then (its free was not seen).
        """
        base_address, base_size = _column(baseline_address), _column(baseline_size)
        held = len(base_address)
        address = np.concatenate([base_address, events.address])
        size = np.concatenate([base_size, events.size])
        is_alloc = size >= 0
        is_alloc[:held] = True
        # Rows of a baseline block come before every event; the stable sort keeps each address's rows in time's order.
        order = np.argsort(address, kind="stable")
        in_order = address[order]
        same_as_next = np.zeros(len(order), np.bool_)
        np.equal(in_order[:-1], in_order[1:], out=same_as_next[:-1])
        died = np.full(len(order), NEVER, np.int64)  # by row: the instant just after the next row at its address
        ends = np.flatnonzero(same_as_next)
        died[order[ends]] = order[ends + 1] - (held - 1)

        rows = np.flatnonzero(is_alloc)
        born = np.maximum(rows - (held - 1), 0)
        died, size = died[rows], size[rows]
        change = np.zeros(len(events) + 1, np.int64)
        change[0] = size[:held].sum()
        change[born[held:]] = size[held:]
        ended = died != NEVER
        change[died[ended]] -= size[ended]  # an event ends one block at most

        follows_alloc = np.zeros(len(order), np.bool_)
        follows_alloc[order[ends + 1]] = is_alloc[order[ends]]
        return cls(
            time_ns=events.time_ns,
            address=address[rows],
            size=size,
            born=born,
            died=died,
            level=np.cumsum(change),
            strays=np.flatnonzero(~is_alloc & ~follows_alloc) - held,
        )

    def alive(self, instant: int) -> BoolArray:
        """Which blocks are alive at an instant: ``(B,)``."""
        return (self.born <= instant) & (instant < self.died)

    def instants(self, time_ns: ArrayLike) -> Int64Array:
        """The instant that each time falls in: the number of events before it."""
        return np.searchsorted(self.time_ns, _column(time_ns), side="left").astype(np.int64)

    def find(self, address: ArrayLike, instant: ArrayLike) -> Int64Array:
        """The block that holds each address at each instant, ``-1`` where none does. An address may lie inside one."""
        wanted, when = _column(address), _column(instant)
        found = np.full(len(wanted), -1, np.int64)
        if not len(self.address) or not len(wanted):
            return found
        order = np.argsort(self.address, kind="stable")  # and by birth within an address, as the blocks are
        sorted_address, sorted_born = self.address[order], self.born[order]
        # Rank of an address, then births within it, as one key: the last block at an address born by then.
        is_first = np.ones(len(order), np.bool_)
        np.not_equal(sorted_address[1:], sorted_address[:-1], out=is_first[1:])
        first, rank = np.flatnonzero(is_first), np.cumsum(is_first) - 1
        distinct = sorted_address[first]
        span = len(self.level) + 1
        keys = rank * span + sorted_born
        wanted_rank = np.searchsorted(distinct, wanted, side="right") - 1
        place = np.searchsorted(keys, wanted_rank * span + when, side="right") - 1
        candidate = order[np.maximum(place, 0)]
        good = (place >= 0) & self._holds(candidate, wanted, when)
        found[good] = candidate[good]
        # Else it may lie inside a block that starts further below. Most that are not found were never in any: those
        # that no block starting at or below them ever reached.
        reach = distinct + np.maximum(np.maximum.reduceat(self.size[order], first), 1)
        reached = (wanted_rank >= 0) & (np.maximum.accumulate(reach)[wanted_rank] > wanted)
        for index in np.flatnonzero(~good & reached):
            around = np.flatnonzero(reach[: wanted_rank[index] + 1] > wanted[index])
            last = np.searchsorted(keys, around * span + when[index], side="right") - 1
            around = order[last[last >= 0]]
            holding = around[self._holds(around, wanted[index], when[index])]
            if len(holding):
                found[index] = holding.max()
        return found

    def _holds(self, block: Int64Array, address: Int64Array, instant: Int64Array) -> BoolArray:
        start = self.address[block]
        inside = (start <= address) & (address < start + np.maximum(self.size[block], 1))
        return np.asarray(inside & (self.born[block] <= instant) & (instant < self.died[block]))

    def totals(self, code: Int64Array, codes: int, instant: int) -> Int64Array:
        """Bytes alive at an instant, summed by each block's code: ``(codes,)``."""
        alive = self.alive(instant)
        totals = np.zeros(codes, np.int64)
        np.add.at(totals, code[alive], self.size[alive])
        return totals
