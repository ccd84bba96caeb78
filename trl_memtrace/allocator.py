"""The CUDA caching allocator, simulated: what is allocated in, what is reserved out. Pure Python, no torch.

The rules are those of ``c10/cuda/CUDACachingAllocator.cpp`` and ``c10/core/AllocatorConfig.cpp`` in PyTorch.
Given the same requests in the same order, the simulation asks the driver for the same segments and hands out the same
addresses inside them. Where a segment begins is the driver's choice, which no rule foretells, so it comes from outside
(``CachingAllocator``'s ``place``); it matters, since equal free blocks are told apart by their addresses.
"""

from __future__ import annotations

import operator
import re
from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

from trl_memtrace.errors import MemtraceError
from trl_memtrace.units import MIB, format_bytes

MIN_BLOCK = 512
"""Every size is rounded up to a multiple of this."""
SMALL_REQUEST = MIB
"""The largest request that the small pool serves, and the remainder that a large block keeps unsplit."""
SMALL_SEGMENT = 2 * MIB
MIN_LARGE_REQUEST = 10 * MIB
"""A larger request gets a segment of its own size, rounded up to ``LARGE_ROUNDING``."""
LARGE_ROUNDING = 2 * MIB
LARGE_SEGMENT = 20 * MIB

PoolId = tuple[int, int]
DEFAULT_POOL: PoolId = (0, 0)

_DIVISION_INTERVALS = 16  # 1 MiB, 2 MiB, ... 32 GiB and more
_UNBOUNDED_RESERVE = 1 << 40  # address space of an expandable segment on a device of unknown size
_FIRST_ADDRESS = 1 << 60  # of those made up, above all that a driver gives

_IGNORED_OPTIONS = re.compile(
    r"pinned_\w+|release_lock_on_(cuda|hip)malloc|graph_capture_record_stream_reuse|throw_on_cudamalloc_oom"
    r"|expandable_segments_reserve(_by_class)?"
)


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class AllocatorConfig:
    """The settings of ``PYTORCH_CUDA_ALLOC_CONF`` (``PYTORCH_ALLOC_CONF``) that decide how memory is laid out.

    Attributes:
        max_split_bytes: blocks of this size and more are never split; ``None`` splits all.
        max_non_split_rounding_bytes: how much larger than the request an unsplit block may be; ``None`` takes
            ``large_segment_bytes``.
        large_segment_bytes: segment for requests between 1 and 10 MiB, and the page of a large expandable segment.
        garbage_collection_threshold: share of the allowed memory above which old cached segments are given back before
            new ones are asked for; 0 never. PyTorch heeds it only with a memory fraction below 1.
        roundup_power2_divisions: steps between two powers of two that sizes are rounded up to, one for each of the 16
            intervals from 1 MiB, 2 MiB, ... to 32 GiB and more; 0 and 1 round to 512 bytes.
        expandable_segments: grow one mapped range a stream instead of asking for separate segments.
        per_process_memory_fraction: share of the device's memory that may be reserved.

    Raises:
        ValueError: a value is out of range; names the field and what it takes.
    """

    max_split_bytes: int | None = None
    max_non_split_rounding_bytes: int | None = None
    large_segment_bytes: int = LARGE_SEGMENT
    garbage_collection_threshold: float = 0.0
    roundup_power2_divisions: tuple[int, ...] = (0,) * _DIVISION_INTERVALS
    expandable_segments: bool = False
    per_process_memory_fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.large_segment_bytes <= MIN_LARGE_REQUEST:
            raise ValueError(f"large_segment_bytes={self.large_segment_bytes}: takes more than {MIN_LARGE_REQUEST}")
        for name in ("max_split_bytes", "max_non_split_rounding_bytes"):
            value = getattr(self, name)
            if value is not None and value < self.large_segment_bytes:
                raise ValueError(f"{name}={value}: takes large_segment_bytes ({self.large_segment_bytes}) or more")
        if not 0 <= self.garbage_collection_threshold < 1:
            raise ValueError(
                f"garbage_collection_threshold={self.garbage_collection_threshold}: takes a number in [0, 1), 0 is off"
            )
        if not 0 <= self.per_process_memory_fraction <= 1:
            raise ValueError(
                f"per_process_memory_fraction={self.per_process_memory_fraction}: takes a number in [0, 1]"
            )
        divisions = self.roundup_power2_divisions
        if len(divisions) != _DIVISION_INTERVALS or any(value and not _is_power_of_two(value) for value in divisions):
            raise ValueError(
                f"roundup_power2_divisions={divisions}: takes {_DIVISION_INTERVALS} powers of two, or 0 for none"
            )

    @classmethod
    def parse(cls, text: str) -> AllocatorConfig:
        """The settings in an environment variable's text, ``"max_split_size_mb:512,expandable_segments:True"``.

        Options that concern pinned host memory or locks are accepted and have no effect on the layout.

        Raises:
            ValueError: an unknown option, a value that PyTorch refuses, or a backend other than ``native``.
        """
        options: dict[str, str] = {}
        for item in filter(None, re.split(r",(?![^\[]*\])", re.sub(r"\s", "", text))):
            option, colon, value = item.partition(":")
            if not colon or not value:
                raise ValueError(f"{item!r}: takes option:value, such as max_split_size_mb:512")
            options[option] = value

        settings: dict[str, Any] = {}
        for option, value in options.items():
            if option == "backend":
                if value != "native":
                    raise ValueError(f"backend: {value!r} is not the caching allocator; takes native")
            elif option in _OPTIONS:
                name, read = _OPTIONS[option]
                settings[name] = read(option, value)
            elif not _IGNORED_OPTIONS.fullmatch(option):
                raise ValueError(f"{option!r} is not an allocator option; takes backend, {', '.join(_OPTIONS)}")
        return cls(**settings)

    @classmethod
    def from_snapshot(cls, settings: Mapping[str, Any]) -> AllocatorConfig:
        """The settings that a memory snapshot carries as ``allocator_settings`` (PyTorch 2.3 and later).

        What is missing or not understood keeps its default.
        """
        text = next((value for key, value in settings.items() if str(key).endswith("ALLOC_CONF")), "")
        try:
            config = cls.parse(text) if isinstance(text, str) else cls()
        except ValueError:
            config = cls()
        found: dict[str, Any] = {}
        max_split = settings.get("max_split_size")
        if isinstance(max_split, int):
            found["max_split_bytes"] = max_split if 0 <= max_split < 1 << 62 else None
        for name, kind in (("garbage_collection_threshold", float), ("expandable_segments", bool)):
            if isinstance(settings.get(name), kind):
                found[name] = settings[name]
        divisions = settings.get("roundup_power2_divisions")
        if isinstance(divisions, Mapping) and len(divisions) == _DIVISION_INTERVALS:
            found["roundup_power2_divisions"] = tuple(divisions.values())
        for name, value in found.items():
            try:
                config = replace(config, **{name: value})
            except (TypeError, ValueError):
                continue
        return config

    def rounded(self, size: int) -> int:
        """Bytes that a request of ``size`` bytes is rounded up to."""
        interval = min(max(size.bit_length() - 21, 0), _DIVISION_INTERVALS - 1)
        divisions = self.roundup_power2_divisions[interval]
        if divisions > 1 and size > MIN_BLOCK * divisions:
            if _is_power_of_two(size):
                return size
            return _round_up(size, max(1, (1 << (size.bit_length() - 1)) // divisions))
        return max(MIN_BLOCK, _round_up(size, MIN_BLOCK))

    def segment_bytes(self, rounded: int) -> int:
        """Bytes of the segment asked of the driver when nothing cached fits a request of ``rounded`` bytes."""
        if rounded <= SMALL_REQUEST:
            return SMALL_SEGMENT
        if rounded < MIN_LARGE_REQUEST:
            return self.large_segment_bytes
        return _round_up(rounded, LARGE_ROUNDING)


def _read_mib(option: str, value: str) -> int:
    if not value.isdecimal():
        raise ValueError(f"{option}: {value!r} is not a whole number of MiB")
    return int(value) * MIB


def _read_fraction(option: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{option}: {value!r} is not a number between 0 and 1") from None


def _read_threshold(option: str, value: str) -> float:
    threshold = _read_fraction(option, value)
    if threshold == 0:  # PyTorch has it unset for that
        raise ValueError(f"{option}: {value!r} is not above 0")
    return threshold


def _read_switch(option: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise ValueError(f"{option}: {value!r} is neither True nor False")
    return value == "True"


def _read_divisions(option: str, value: str) -> tuple[int, ...]:
    """One number for all intervals, or ``[256:1,512:2,>:8]``: the first also holds below, ``>`` above the last."""
    takes = f"{option}: {value!r} takes a power of two, or a list such as [256:1,512:2,>:8] of sizes in MiB"
    if value.isdecimal() and _is_power_of_two(int(value)):
        return (int(value),) * _DIVISION_INTERVALS
    if not re.fullmatch(r"\[((\d+|>):\d+(,(?!\])|(?=\])))+\]", value):
        raise ValueError(takes)
    divisions = [0] * _DIVISION_INTERVALS
    last: int | None = None
    for size, step in re.findall(r"(\d+|>):(\d+)", value):
        if size == ">":
            start = 1 if last is None else last + 1
            divisions[start:] = [int(step)] * (_DIVISION_INTERVALS - start)
            continue
        if not _is_power_of_two(int(size)):
            raise ValueError(takes)
        interval = min(int(size).bit_length() - 1, _DIVISION_INTERVALS - 1)
        if last is None:
            divisions[:interval] = [int(step)] * interval
        divisions[interval] = int(step)
        last = interval
    if any(step and not _is_power_of_two(step) for step in divisions):
        raise ValueError(takes)
    return tuple(divisions)


_OPTIONS: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "max_split_size_mb": ("max_split_bytes", _read_mib),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _read_mib),
    "large_segment_size_mb": ("large_segment_bytes", _read_mib),
    "garbage_collection_threshold": ("garbage_collection_threshold", _read_threshold),
    "roundup_power2_divisions": ("roundup_power2_divisions", _read_divisions),
    "expandable_segments": ("expandable_segments", _read_switch),
    "per_process_memory_fraction": ("per_process_memory_fraction", _read_fraction),
}


class SimulatedOutOfMemoryError(MemtraceError):
    """The simulated device has no room, even after every cached segment was given back.

    Attributes:
        requested_bytes: what the caller asked for.
        segment_bytes: what was asked of the driver.
        allocated_bytes: held by live blocks at that moment.
        reserved_bytes: held by segments at that moment.
        capacity_bytes: what may be reserved at most.
        largest_free_bytes: the largest free block that was cached, too small or on another stream.
    """

    def __init__(self, requested: int, segment: int, allocated: int, reserved: int, capacity: int, free: int) -> None:
        self.requested_bytes = requested
        self.segment_bytes = segment
        self.allocated_bytes = allocated
        self.reserved_bytes = reserved
        self.capacity_bytes = capacity
        self.largest_free_bytes = free
        super().__init__(
            f"out of memory: {format_bytes(requested)} asked for, a segment of {format_bytes(segment)} needed; "
            f"{format_bytes(reserved)} of {format_bytes(capacity)} reserved, {format_bytes(allocated)} of it "
            f"allocated, the largest free block has {format_bytes(free)}"
        )


class SegmentEvent(NamedTuple):
    """Memory asked of the driver, or given back to it.

    Attributes:
        event: number of the operation that caused it.
        size: bytes of the segment, or of the pages mapped or unmapped.
        address: where it begins.
    """

    event: int
    size: int
    address: int


_LIVE, _FREE, _UNMAPPED = range(3)


class _Piece(NamedTuple):
    """A part of a segment: live (0), free (1), or, in an expandable segment, unmapped (2)."""

    address: int
    size: int
    state: int


class _Block:
    """A piece of a segment, linked to its neighbours there. An unmapped one is address space without memory."""

    __slots__ = ("address", "arena", "base", "born", "next", "prev", "size", "state")

    def __init__(self, address: int, size: int, state: int, arena: _Arena, base: int | None) -> None:
        self.address = address
        self.size = size
        self.state = state
        self.arena = arena
        self.base = base  # where the expandable segment begins, None in an ordinary segment
        self.prev: _Block | None = None
        self.next: _Block | None = None
        self.born = 0  # searches of the pool when the block became free


@dataclass(slots=True)
class _Pool:
    """The blocks of one size class, on all streams."""

    small: bool
    expandable: bool
    page: int
    searches: int = 0
    arenas: dict[int, _Arena] = field(default_factory=dict)

    def free_keys(self) -> list[tuple[_Arena, tuple[int, int]]]:
        """Every free block in the allocator's order: by stream, size and address."""
        return [(arena, key) for _, arena in sorted(self.arenas.items()) for key in arena.free]


@dataclass(slots=True, eq=False)
class _Arena:
    """The free blocks of one pool on one stream, ``(size, address)``, and the addresses of unmapped ranges; sorted."""

    pool: _Pool
    free: list[tuple[int, int]] = field(default_factory=list)
    unmapped: list[int] = field(default_factory=list)


class CachingAllocator:
    """One device's caching allocator.

    A block counts as allocated until ``free``: for memory that another stream still uses, call ``free`` where PyTorch
    says ``free_completed``. Blocks of private pools are reused only there, and ``empty_cache`` leaves them alone, as
    PyTorch does while a graph owns them.

    Args:
        config: the settings; PyTorch's defaults when left out.
        capacity_bytes: memory of the device less what others hold of it; ``None`` is unlimited.
        place: gives the address of a new segment of so many bytes; where it is left out or gives ``None``, one is made
            up.

    Attributes:
        config: the settings.
        capacity_bytes: the most that can be reserved.
        event: number of the operation under way, counted from 0; a caller with numbers of its own may set it.
        allocated_bytes: in live blocks, each with its rounding and the remainder that was too small to split off.
        reserved_bytes: in segments, or mapped.
        allocated_peak_bytes: the highest ``allocated_bytes``.
        reserved_peak_bytes: the highest ``reserved_bytes``.
        address_space_bytes: what an expandable segment reserves of it: 9/8 of the device's memory.
        retries: how often every cached segment was given back to make room.
        segment_requests: everything asked of the driver.
        segment_frees: everything given back to it.
    """

    def __init__(
        self,
        config: AllocatorConfig | None = None,
        capacity_bytes: int | None = None,
        place: Callable[[int], int | None] | None = None,
    ) -> None:
        self.config = config or AllocatorConfig()
        self.capacity_bytes = capacity_bytes
        self.event = 0
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.allocated_peak_bytes = 0
        self.reserved_peak_bytes = 0
        self.address_space_bytes = _UNBOUNDED_RESERVE if capacity_bytes is None else capacity_bytes * 9 // 8
        self.retries = 0
        self.segment_requests: list[SegmentEvent] = []
        self.segment_frees: list[SegmentEvent] = []
        self._driver = place
        self._next_address = _FIRST_ADDRESS
        self._blocks: dict[int, _Block] = {}
        self._pools: dict[tuple[PoolId, bool], _Pool] = {}
        self._arenas: dict[tuple[PoolId, bool, int], _Arena] = {}
        self._rounded: dict[int, int] = {}
        self._expandable: dict[PoolId, bool] = {}
        self._extents: dict[int, int] = {}  # where each segment begins -> where what it has had of memory ends
        self._starts: list[int] = []
        # Above max_split_bytes blocks stay whole; a size that no request reaches stands for "no limit".
        self._max_split = self.config.max_split_bytes or 1 << 63
        self._max_rounding = self.config.max_non_split_rounding_bytes or self.config.large_segment_bytes

    def allocate(self, size: int, stream: int = 0, pool: PoolId = DEFAULT_POOL) -> int:
        """Hand out a block.

        Args:
            size: bytes wanted.
            stream: blocks are reused on their own stream only.
            pool: id of a private pool.

        Returns:
            The block's address, which names it until it is freed.

        Raises:
            ValueError: ``size`` is not positive.
            SimulatedOutOfMemoryError: it does not fit; cached segments have been given back by then.
        """
        return self._allocate(size, stream, pool, search=True)

    def free(self, address: int) -> None:
        """Take a block back and merge it with its free neighbours.

        Raises:
            ValueError: no live block begins at ``address``.
        """
        block = self._blocks.get(address)
        if block is None or block.state != _LIVE:
            raise ValueError(f"address={address:#x}: takes one that allocate() returned and free() has not had")
        self.allocated_bytes -= block.size
        block.state = _FREE
        self._merge_neighbours(block)
        self._insert(block)
        self.event += 1

    def size_of(self, address: int) -> int:
        """Bytes of a live block, with its rounding and the remainder that was too small to split off."""
        return self._blocks[address].size

    def empty_cache(self, pool: PoolId = DEFAULT_POOL) -> None:
        """Give back every segment, and every mapped page, that holds nothing live."""
        self._release_cached(pool)
        self.event += 1

    def release_segment(self, address: int) -> bool:
        """Give back one ordinary segment, if it is cached as a whole; returns whether it was."""
        block = self._blocks.get(address)
        whole = block is not None and block.state == _FREE and block.prev is None and block.next is None
        if block is None or block.base is not None or not whole:
            return False
        self._release(block)
        return True

    def live_blocks(self) -> Iterator[tuple[int, int]]:
        """Address and size of each live block, in no order."""
        return ((block.address, block.size) for block in self._blocks.values() if block.state == _LIVE)

    def free_blocks(self) -> Iterator[tuple[int, int]]:
        """Address and size of each cached block, in no order."""
        return ((address, size) for arena in self._arenas.values() for size, address in arena.free)

    def set_expandable(self, expandable: bool, pool: PoolId = DEFAULT_POOL) -> None:
        """Switch ``expandable_segments`` for a pool, as a program may while it runs."""
        self._expandable[pool] = expandable
        for small in (False, True):
            if (pool, small) in self._pools:
                self._pools[pool, small].expandable = expandable

    # Finding a block

    def _allocate(self, size: int, stream: int, pool: PoolId, search: bool) -> int:
        rounded, arena = self._wanted(size, stream, pool)
        at = self._find(arena, rounded) if search else None
        if at is not None:
            block = self._blocks[arena.free.pop(at)[1]]
        elif (grown := self._grow(arena, rounded)) is not None:
            block = grown
        else:
            raise self._out_of_memory(size, rounded)
        remaining = block.size - rounded
        if remaining and self._splits(arena.pool, rounded, remaining):
            self._insert(self._split(block, rounded))
        block.state = _LIVE
        self.allocated_bytes += block.size
        if self.allocated_bytes > self.allocated_peak_bytes:
            self.allocated_peak_bytes = self.allocated_bytes
        self.event += 1
        return block.address

    def _has_cached(self, size: int, stream: int, pool: PoolId) -> bool:
        """Whether a cached block would serve a request, so that the driver need not be asked."""
        rounded, arena = self._wanted(size, stream, pool)
        return self._find(arena, rounded) is not None

    def _arena(self, pool: PoolId, small: bool, stream: int) -> _Arena:
        owner = self._pools.get((pool, small))
        if owner is None:
            page = SMALL_SEGMENT if small else self.config.large_segment_bytes
            expandable = self._expandable.get(pool, self.config.expandable_segments)
            owner = self._pools[pool, small] = _Pool(small, expandable, page)
        arena = owner.arenas.get(stream)
        if arena is None:
            arena = owner.arenas[stream] = self._arenas[pool, small, stream] = _Arena(owner)
        return arena

    def _splits(self, pool: _Pool, rounded: int, remaining: int) -> bool:
        if pool.small or pool.expandable:
            return remaining >= MIN_BLOCK
        return rounded < self._max_split and remaining > SMALL_REQUEST

    def _wanted(self, size: int, stream: int, pool: PoolId) -> tuple[int, _Arena]:
        rounded = self._rounded.get(size)
        if rounded is None:
            if size <= 0:
                raise ValueError(f"size={size}: takes a positive number of bytes")
            rounded = self._rounded[size] = self.config.rounded(size)
        small = rounded <= SMALL_REQUEST
        return rounded, self._arenas.get((pool, small, stream)) or self._arena(pool, small, stream)

    def _find(self, arena: _Arena, rounded: int) -> int | None:
        """Best fit: the smallest free block that is large enough, of equals the one at the lowest address."""
        arena.pool.searches += 1
        free = arena.free
        at = bisect_left(free, (rounded, 0))
        if at == len(free):
            return None
        if self._blocks[free[at][1]].base is not None:
            found = self._prefer_expandable(free, at) if arena.pool.expandable else self._skip_expandable(free, at)
            if found is None:
                return None
            at = found
        size = free[at][0]
        if size >= self._max_split and (rounded < self._max_split or size >= rounded + self._max_rounding):
            return None
        return at

    def _prefer_expandable(self, free: list[tuple[int, int]], at: int) -> int:
        """A block that can grow counts with the size it can grow to, so a larger one that cannot may fit better."""
        block = self._blocks[free[at][1]]
        while block.base is not None and at + 1 < len(free):
            following = self._blocks[free[at + 1][1]]
            if _size_when_grown(following) >= _size_when_grown(block):
                break
            at, block = at + 1, following
        return at

    def _skip_expandable(self, free: list[tuple[int, int]], at: int) -> int | None:
        """With the option switched off, blocks of expandable segments are passed over."""
        return next((i for i in range(at + 1, len(free)) if self._blocks[free[i][1]].base is None), None)

    def _grow(self, arena: _Arena, rounded: int) -> _Block | None:
        """Ask the driver; when it has no room give back cached segments, first a few, then all, and ask again."""
        if self._allowed_bytes is not None and self.config.garbage_collection_threshold:
            self._collect_garbage()
        block = self._new_segment(arena, rounded)
        if block is None and self._release_oversize(arena, rounded):
            block = self._new_segment(arena, rounded)
        if block is None:
            self._release_cached(DEFAULT_POOL)
            self.retries += 1
            block = self._new_segment(arena, rounded)
        return block

    @property
    def _allowed_bytes(self) -> int | None:
        """The limit that the allocator keeps by itself, apart from what the driver has."""
        if self.capacity_bytes is None or self.config.per_process_memory_fraction == 1:
            return None
        return int(self.config.per_process_memory_fraction * self.capacity_bytes)

    def _fits(self, size: int) -> bool:
        return self.capacity_bytes is None or self.reserved_bytes + size <= self.capacity_bytes

    def _new_segment(self, arena: _Arena, rounded: int) -> _Block | None:
        size = self.config.segment_bytes(rounded)
        allowed = self._allowed_bytes
        if allowed is not None and self.reserved_bytes + size > allowed:
            return None
        if arena.pool.expandable:
            return self._expand(arena, rounded)
        if not self._fits(size):
            return None
        block = self._add(_Block(self._place(size) or self._make_up(size), size, _FREE, arena, None))
        self._occupy(block.address, size)
        self._request(block.address, size)
        return block

    def _out_of_memory(self, size: int, rounded: int) -> SimulatedOutOfMemoryError:
        self.event += 1
        allowed = self._allowed_bytes
        return SimulatedOutOfMemoryError(
            size,
            self.config.segment_bytes(rounded),
            self.allocated_bytes,
            self.reserved_bytes,
            (self.capacity_bytes or 0) if allowed is None else allowed,
            max((size for _, size in self.free_blocks()), default=0),
        )

    # Expandable segments

    def _expand(self, arena: _Arena, rounded: int) -> _Block | None:
        """Map pages at the lowest address where free and unmapped ranges together have room."""
        block = self._expandable_candidate(arena, rounded)
        if block.state == _UNMAPPED and not self._map(block, min(block.size, rounded)):
            return None
        while block.size < rounded:
            hole = block.next
            if hole is None or not self._map(hole, min(hole.size, rounded - block.size)):
                return None
            block = hole
        self._withdraw(block)
        return block

    def _try_to_map(self, size: int, stream: int, pool: PoolId, available: int) -> None:
        """An allocation from an expandable segment for which the driver has only ``available`` bytes.

        The pages mapped before it ran out stay, free, as they do in PyTorch.
        """
        arena = self._arena(pool, self.config.rounded(size) <= SMALL_REQUEST, stream)
        capacity, self.capacity_bytes = self.capacity_bytes, self.reserved_bytes + available
        block = self._expand(arena, self.config.rounded(size))
        self.capacity_bytes = capacity
        if block is not None:
            self._insert(block)

    def _expandable_candidate(self, arena: _Arena, rounded: int) -> _Block:
        for address in arena.unmapped:
            hole = self._blocks[address]
            start = hole.prev if hole.prev is not None and hole.prev.state == _FREE else hole
            room = 0
            following: _Block | None = start
            while room < rounded and following is not None and following.state != _LIVE:
                room += following.size
                following = following.next
            if room >= rounded:
                return start
        page = arena.pool.page
        base = self._make_up(_round_up(self.address_space_bytes, page))
        block = self._add(_Block(base, _round_up(self.address_space_bytes, page), _UNMAPPED, arena, base))
        self._insert(block)
        return block

    def _room(self, base: int, size: int) -> int:
        """How much of ``size`` bytes there is from ``base`` to the next segment."""
        at = bisect_right(self._starts, base)
        return min(size, self._starts[at] - base) if at < len(self._starts) else size

    def _map(self, hole: _Block, size: int) -> bool:
        size = _round_up(size, hole.arena.pool.page)
        if not self._fits(size):
            return False
        if hole.prev is None and hole.next is None:
            self._withdraw(hole)
            del self._blocks[hole.address]
            hole.address = hole.base = self._place(size) or hole.address
            hole.size = self._room(hole.address, hole.size)
            self._insert(self._add(hole))
        assert hole.base is not None
        end = hole.address + size
        if size > hole.size or end + (size < hole.size) - hole.base > self._room(hole.base, 1 << 62):
            return False
        self._withdraw(hole)
        if size < hole.size:
            self._insert(self._split(hole, size))
        hole.state = _FREE
        self._occupy(hole.base, end - hole.base)
        self._request(hole.address, size)
        self._merge_neighbours(hole)
        self._insert(hole)
        return True

    def _unmap(self, block: _Block) -> None:
        """Give back the whole pages inside a free block; an expandable segment left without any goes altogether."""
        assert block.base is not None
        page = block.arena.pool.page
        begin = block.base + _round_up(block.address - block.base, page)
        end = block.base + (block.address + block.size - block.base) // page * page
        if begin >= end:
            return
        self._withdraw(block)
        if begin > block.address:
            inner = self._split(block, begin - block.address)
            self._insert(block)
            block = inner
        if end < block.address + block.size:
            self._insert(self._split(block, end - begin))
        self._give_back(begin, end - begin)
        block.state = _UNMAPPED
        self._merge_neighbours(block)
        if block.prev is None and block.next is None:
            del self._blocks[block.address]
            self._vacate(block.address)
        else:
            self._insert(block)

    # Before the first operation

    def _adopt(self, pieces: Sequence[_Piece], stream: int, small: bool, pool: PoolId, expandable: bool) -> None:
        """Take over a segment that is there before the first operation.

        Args:
            pieces: the segment from its first byte to its last; no two free ones next to each other. An expandable
                segment begins where its address space does, and its unmapped rest is added here.
            stream: whose blocks it serves.
            small: whether it serves requests of up to 1 MiB.
            pool: id of the private pool it belongs to.
            expandable: whether it is mapped page by page.

        Raises:
            ValueError: another segment is there.
        """
        arena = self._arena(pool, small, stream)
        begin, end = pieces[0].address, pieces[-1].address + pieces[-1].size
        if self._occupied(begin, end - begin):
            raise ValueError(f"pieces: takes an address range of its own, [{begin:#x}, {end:#x}) is another segment's")
        self._occupy(begin, end - begin)
        if expandable:
            rest = self._room(begin, _round_up(self.address_space_bytes, arena.pool.page)) - (end - begin)
            pieces = [*pieces, _Piece(end, rest, _UNMAPPED)] if rest > 0 else pieces
        last: _Block | None = None
        for address, size, state in pieces:
            block = self._add(_Block(address, size, state, arena, begin if expandable else None))
            block.prev = last
            if last is not None:
                last.next = block
            last = block
            if state == _LIVE:
                self.allocated_bytes += size
            else:
                self._insert(block)
            if state != _UNMAPPED:
                self.reserved_bytes += size
        self.allocated_peak_bytes = max(self.allocated_peak_bytes, self.allocated_bytes)
        self.reserved_peak_bytes = max(self.reserved_peak_bytes, self.reserved_bytes)

    # Giving memory back

    def _release_cached(self, pool: PoolId) -> None:
        for small in (False, True):
            owner = self._pools.get((pool, small))
            if owner is None:
                continue
            expandable = []
            for _, (_, address) in owner.free_keys():
                block = self._blocks[address]
                if block.base is not None:
                    expandable.append(block)
                elif block.prev is None and block.next is None:
                    self._release(block)
            for block in expandable:
                self._unmap(block)

    def _release(self, block: _Block) -> None:
        self._withdraw(block)
        del self._blocks[block.address]
        self._vacate(block.address)
        self._give_back(block.address, block.size)

    def _release_oversize(self, arena: _Arena, rounded: int) -> bool:
        """With ``max_split_bytes``: give back just enough oversize blocks of the stream for the request."""
        if self.config.max_split_bytes is None:
            return False
        wanted = max(rounded, self._max_split)
        at = bisect_left(arena.free, (wanted, 0))
        if at < len(arena.free):
            block = self._blocks[arena.free[at][1]]
            if block.base is None:
                self._release(block)
                return True
        released = 0
        for size, address in reversed(arena.free[:at]):
            if released >= wanted or size < self._max_split:
                break
            block = self._blocks[address]
            if block.base is None:
                released += size
                self._release(block)
        return released >= wanted

    def _collect_garbage(self) -> None:
        """Give back whole cached segments of at least average age until the reserve is below the threshold."""
        allowed = self._allowed_bytes
        pool = self._pools.get((DEFAULT_POOL, False))
        assert allowed is not None
        target = self.reserved_bytes - int(self.config.garbage_collection_threshold * allowed)
        if target <= 0 or pool is None:
            return
        whole = [self._blocks[address] for _, (_, address) in pool.free_keys()]
        whole = [block for block in whole if block.prev is None and block.next is None and block.base is None]
        reclaimed = 0
        while whole and reclaimed < target:
            ages = [pool.searches - block.born for block in whole]
            average = sum(ages) / len(whole)
            for block, age in zip(whole, ages, strict=True):
                if age >= average:
                    reclaimed += block.size
                    self._release(block)
            whole = [block for block, age in zip(whole, ages, strict=True) if age < average]

    # Books

    def _place(self, size: int) -> int | None:
        address = self._driver(size) if self._driver is not None else None
        return None if address is None or self._occupied(address, size) else address

    def _make_up(self, size: int) -> int:
        address = self._next_address
        self._next_address += _round_up(size, SMALL_SEGMENT)
        return address

    def _occupied(self, address: int, size: int) -> bool:
        """Whether a driver could not have placed a segment there."""
        if address in self._blocks or address + size > _FIRST_ADDRESS:
            return True
        at = bisect_left(self._starts, address + size) - 1
        return at >= 0 and self._extents[self._starts[at]] > address

    def _occupy(self, address: int, size: int) -> None:
        if address not in self._extents:
            insort(self._starts, address)
        self._extents[address] = max(address + size, self._extents.get(address, 0))

    def _vacate(self, address: int) -> None:
        del self._extents[address], self._starts[bisect_left(self._starts, address)]

    def _request(self, address: int, size: int) -> None:
        self.segment_requests.append(SegmentEvent(self.event, size, address))
        self.reserved_bytes += size
        self.reserved_peak_bytes = max(self.reserved_peak_bytes, self.reserved_bytes)

    def _give_back(self, address: int, size: int) -> None:
        self.segment_frees.append(SegmentEvent(self.event, size, address))
        self.reserved_bytes -= size

    def _add(self, block: _Block) -> _Block:
        self._blocks[block.address] = block
        return block

    def _insert(self, block: _Block) -> None:
        if block.state == _FREE:
            block.born = block.arena.pool.searches
            insort(block.arena.free, (block.size, block.address))
        else:
            insort(block.arena.unmapped, block.address)

    def _withdraw(self, block: _Block) -> None:
        if block.state == _FREE:
            free = block.arena.free
            del free[bisect_left(free, (block.size, block.address))]
        else:
            unmapped = block.arena.unmapped
            del unmapped[bisect_left(unmapped, block.address)]

    def _split(self, block: _Block, size: int) -> _Block:
        """Cut ``block`` down to ``size`` bytes; returns the rest, which is in no list yet."""
        rest = self._add(_Block(block.address + size, block.size - size, block.state, block.arena, block.base))
        block.size = size
        rest.prev, rest.next = block, block.next
        if rest.next is not None:
            rest.next.prev = rest
        block.next = rest
        return rest

    def _merge_neighbours(self, block: _Block) -> None:
        """Take in the neighbours that are in the same state; ``block`` itself is in no list."""
        before, after = block.prev, block.next
        if before is not None and before.state == block.state:
            self._withdraw(before)
            del self._blocks[block.address]
            block.address = before.address
            block.size += before.size
            block.prev = before.prev
            if block.prev is not None:
                block.prev.next = block
            self._blocks[block.address] = block
        if after is not None and after.state == block.state:
            self._withdraw(after)
            del self._blocks[after.address]
            block.size += after.size
            block.next = after.next
            if block.next is not None:
                block.next.prev = block


def _size_when_grown(block: _Block) -> int:
    return block.size + (block.next.size if block.next is not None and block.next.state == _UNMAPPED else 0)


# A snapshot's trace, replayed

_ASKS = ("segment_alloc", "segment_map")
_GIVES_BACK = ("segment_free", "segment_unmap")


class Mismatch(NamedTuple):
    """An operation for which the file and the simulation do not agree.

    Attributes:
        event: its number in the device's trace.
        recorded: sizes in bytes that the file says were asked of the driver.
        simulated: sizes in bytes that the simulation asked for.
    """

    event: int
    recorded: tuple[int, ...]
    simulated: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Replay:
    """A device's trace run through the simulation, beside what the file says the real allocator did.

    Attributes:
        device: number of the device.
        config: the settings of the simulated allocator.
        allocations: allocations in the trace.
        matching_allocations: those that were given the very address that the file has.
        segment_requests: requests to the driver in the trace.
        matching_segment_requests: those met at the same event with the same size.
        simulated_segment_requests: requests that the simulation made.
        segment_frees: segments and page ranges that the trace says were given back.
        matching_segment_frees: those given back at the same event with the same size.
        allocated_peak_bytes: simulated, from the start of the trace.
        allocated_end_bytes: simulated.
        reserved_peak_bytes: simulated, from the start of the trace.
        reserved_end_bytes: simulated.
        recorded_reserved_peak_bytes: by the file's own segments and events.
        recorded_reserved_end_bytes: by the file's own segments.
        out_of_memory: events whose allocation did not fit ``capacity_bytes``.
        strays: events that contradict the rest of the file: frees of what was not held, allocations over what was.
        mismatches: the operations whose requests differ.
    """

    device: int
    config: AllocatorConfig
    allocations: int
    matching_allocations: int
    segment_requests: int
    matching_segment_requests: int
    simulated_segment_requests: int
    segment_frees: int
    matching_segment_frees: int
    allocated_peak_bytes: int
    allocated_end_bytes: int
    reserved_peak_bytes: int
    reserved_end_bytes: int
    recorded_reserved_peak_bytes: int
    recorded_reserved_end_bytes: int
    out_of_memory: tuple[int, ...]
    strays: tuple[int, ...]
    mismatches: tuple[Mismatch, ...]

    def summary(self) -> dict[str, int]:
        """What ``simulated`` holds in a record's summary."""
        return {
            "reserved_peak_bytes": self.reserved_peak_bytes,
            "reserved_end_bytes": self.reserved_end_bytes,
            "segment_requests": self.segment_requests,
            "matching_segment_requests": self.matching_segment_requests,
        }


class _Entry(NamedTuple):
    event: int
    action: str  # alloc, free (completed), oom, segment_alloc, segment_map, segment_free, segment_unmap
    address: int
    size: int
    stream: int
    pool: PoolId
    deferred: bool  # a free that another stream delayed


class _Segment(NamedTuple):
    address: int
    size: int
    stream: int
    small: bool
    pool: PoolId
    expandable: bool


class _Held(NamedTuple):
    """A block that is live when the trace begins.

    Where a free in the trace tells of it (``freed``, the event), its size is the rounded one: a remainder too small to
    be split off is still to be found.
    """

    address: int
    size: int
    freed: int | None


_Owner = tuple[PoolId, bool, int]  # pool, small, stream


def replay_snapshot(
    snapshot: Mapping[str, Any],
    device: int = 0,
    config: AllocatorConfig | None = None,
    capacity_bytes: int | None = None,
) -> Replay:
    """Run a device's trace from a memory snapshot through the simulated allocator.

    The state before the trace is found by undoing the trace from the final segments; the allocations and completed
    frees are then repeated. The file also answers what no simulation can know: where the driver placed a segment, and
    when memory was given back for an outside reason (``torch.cuda.empty_cache()``, or a device that was full).

    Known limits: snapshots of PyTorch before 2.3 do not say their settings, so only ``expandable_segments`` is known
    for them; before 2.12 they do not say the private pool (of a CUDA graph) of a segment that is gone by the end; none
    says the device's size, which bounds the address space of an expandable segment.

    Args:
        snapshot: the decoded dictionary of ``torch.cuda.memory._dump_snapshot``.
        device: whose trace.
        config: settings to try instead of those that the file was made with.
        capacity_bytes: memory that the simulated device has; ``None`` is unlimited.

    Returns:
        What the simulation did beside what the file says. A trace that contradicts itself is replayed as far as it
        makes sense; see ``strays``.
    """
    segments, held = _read_segments(snapshot, device)
    traces = snapshot.get("device_traces") or []
    entries = _read_trace(traces[device] if device < len(traces) else [], segments)
    if entries and entries[0].action == "alloc":  # what it asked the driver for may have been lost at the ring's start
        del entries[0]
    replayer = _Replayer(config or _recorded_config(snapshot, segments), capacity_bytes, entries)
    if config is None:
        replayer.follow_switches(segments)
    replayer.restore(segments, held)
    return replayer.run(device)


def _recorded_config(snapshot: Mapping[str, Any], segments: Sequence[_Segment]) -> AllocatorConfig:
    settings = snapshot.get("allocator_settings")
    if isinstance(settings, Mapping):
        return AllocatorConfig.from_snapshot(settings)
    return AllocatorConfig(expandable_segments=any(segment.expandable for segment in segments))


def _read_pool(value: Any) -> PoolId | None:
    return (int(value[0]), int(value[1])) if isinstance(value, (tuple, list)) and len(value) == 2 else None


def _read_segments(snapshot: Mapping[str, Any], device: int) -> tuple[list[_Segment], dict[int, int]]:
    """The device's final segments by address, and the size of each block still held there."""
    segments: list[_Segment] = []
    held: dict[int, int] = {}
    for entry in snapshot.get("segments") or []:
        if entry.get("device", 0) != device:
            continue
        address, size = entry.get("address"), entry.get("total_size")
        if not isinstance(address, int) or not isinstance(size, int) or size <= 0:
            continue
        small = entry.get("segment_type") == "small"
        pool = _read_pool(entry.get("segment_pool_id")) or DEFAULT_POOL
        expandable = bool(entry.get("is_expandable"))
        stream = entry.get("stream")
        stream = stream if isinstance(stream, int) else 0
        segments.append(_Segment(address, size, stream, small, pool, expandable))
        for block in entry.get("blocks") or []:
            if block["state"] != "inactive":
                held[address] = block["size"]
            address += block["size"]
    return sorted(segments), held


def _read_trace(trace: Sequence[Mapping[str, Any]], segments: Sequence[_Segment]) -> list[_Entry]:
    """The entries that move memory.

    Before PyTorch 2.12 they carry no pool; the segment around a block tells it, if that still exists at the end.
    """
    private = [segment for segment in segments if segment.pool != DEFAULT_POOL]
    starts = [segment.address for segment in private]
    completed = any(entry.get("action") == "free_completed" for entry in trace)
    actions = {action: action for action in ("alloc", "oom", *_ASKS, *_GIVES_BACK)}
    actions["free_completed" if completed else "free_requested"] = "free"  # a program can leave actions out of a trace
    entries = []
    requested = None
    for event, entry in enumerate(trace):
        get = entry.get
        action, address, size, stream = get("action"), get("addr", 0), get("size"), get("stream", 0)
        deferred = action == "free_completed" and address != requested
        requested = address if action == "free_requested" else None
        known = actions.get(action) if isinstance(action, str) else None
        if known is None or not isinstance(address, int) or not isinstance(size, int) or size <= 0:
            continue
        pool = _read_pool(get("pool_id"))
        if pool is None:
            pool = DEFAULT_POOL
            at = bisect_right(starts, address) - 1
            if at >= 0 and address < private[at].address + private[at].size:
                pool = private[at].pool
        entries.append(_Entry(event, known, address, size, stream if isinstance(stream, int) else 0, pool, deferred))
    return entries


class _Replayer:
    """Undoes a trace, then repeats it."""

    def __init__(self, config: AllocatorConfig, capacity_bytes: int | None, entries: list[_Entry]) -> None:
        self.config = config
        self.entries = entries
        self.allocator = CachingAllocator(config, capacity_bytes, self._place)
        self.addresses: dict[int, int] = {}  # the file's -> the simulation's
        self.refused: set[int] = set()  # the file's addresses of what did not fit
        self.asked: list[_Entry] = []  # of the driver, by the file, for the allocation that comes next
        self.mismatches: list[Mismatch] = []
        self.out_of_memory: list[int] = []
        self.strays: list[int] = []
        self.allocations = self.matching_allocations = 0
        self.requests = self.matching_requests = 0
        self.frees = self.matching_frees = 0
        self.reserved_end = self.reserved_peak = 0
        self.searched: _Entry | None = None
        self.switches = False

    def _place(self, size: int) -> int | None:
        return next((entry.address for entry in self.asked if entry.size == size), None)

    # Before the trace

    def follow_switches(self, segments: Sequence[_Segment]) -> None:
        """``expandable_segments`` can change while a program runs; a request to the driver shows how it stood."""
        self.switches = True
        shown: dict[PoolId, bool] = {}
        for entry in self.entries:
            if entry.action in _ASKS:
                shown.setdefault(entry.pool, entry.action == "segment_map")
        for segment in segments:
            if segment.pool != DEFAULT_POOL:
                shown.setdefault(segment.pool, segment.expandable)
        for pool, expandable in shown.items():
            self.allocator.set_expandable(expandable, pool)

    def restore(self, segments: Sequence[_Segment], held: Mapping[int, int]) -> None:
        """Put the allocator in the state that it was in before the first entry, by undoing them all."""
        self.reserved_end = level = sum(segment.size for segment in segments)
        self.reserved_peak = level
        plain = {segment.address: segment for segment in segments if not segment.expandable}
        blocks = {address: _Held(address, size, None) for address, size in held.items()}
        for event, action, address, size, stream, pool, _ in reversed(self.entries):
            if action == "alloc":
                blocks.pop(address, None)
            elif action == "free":
                blocks[address] = _Held(address, self.config.rounded(size), event)
            elif action in _ASKS:
                level -= size
                plain.pop(address, None)
            elif action in _GIVES_BACK:
                level += size
                self.reserved_peak = max(self.reserved_peak, level)
                if action == "segment_free":
                    plain[address] = _Segment(address, size, stream, size <= SMALL_SEGMENT, pool, False)

        self.allocator.address_space_bytes = min(
            self.allocator.address_space_bytes,
            _largest_address_space(segments, self.entries, self.reserved_peak * 9 // 8),
        )
        filler = _Filler(blocks.values(), self.entries, self.config)
        found: list[tuple[list[_Piece], _Owner, bool]] = []
        for segment in plain.values():
            pieces = list(filler.fill(segment.address, segment.address + segment.size, not segment.small))
            found.append((pieces, (segment.pool, segment.small, segment.stream), False))
        for owner, ranges in _mapped_before(segments, self.entries, self.config).items():
            base = end = _lowest_mapped(owner, ranges, self.entries)
            page = SMALL_SEGMENT if owner[1] else self.config.large_segment_bytes
            reserve = _round_up(self.allocator.address_space_bytes, page)
            pieces = []
            for low, high in ranges:
                if high > base + reserve and pieces:
                    found.append((pieces, owner, True))
                    base, end, pieces = low, low, []
                if low > end:
                    pieces.append(_Piece(end, low - end, _UNMAPPED))
                pieces.extend(filler.fill(low, high, large=False))
                end = high
            found.append((pieces, owner, True))
        for pieces, (pool, small, stream), expandable in sorted(found, reverse=True):
            with suppress(ValueError):
                self.allocator._adopt(pieces, stream, small, pool, expandable)
        self.addresses = {address: address for address, _ in self.allocator.live_blocks()}

    # The trace

    def run(self, device: int) -> Replay:
        """Repeat the trace."""
        given_back: list[_Entry] = []
        for position, entry in enumerate(self.entries):
            action = entry.action
            if action in _GIVES_BACK:
                self._fail(position)
                if not given_back:
                    self._note_search(position)
                given_back.append(entry)
                continue
            if given_back:
                self._give_back(given_back)
                given_back = []
            if action == "alloc":
                self._allocate(entry)
            elif action == "free":
                self._fail(position)
                if entry.deferred and not (position and self.entries[position - 1].deferred):
                    self._note_search(position)
                self._free(entry)
            elif action == "oom":
                self._fail(position)
            elif action in _ASKS:
                self.asked.append(entry)
        self._fail(len(self.entries))
        if given_back:
            self._give_back(given_back)
        allocator = self.allocator
        return Replay(
            device=device,
            config=self.config,
            allocations=self.allocations,
            matching_allocations=self.matching_allocations,
            segment_requests=self.requests,
            matching_segment_requests=self.matching_requests,
            simulated_segment_requests=len(allocator.segment_requests),
            segment_frees=self.frees,
            matching_segment_frees=self.matching_frees,
            allocated_peak_bytes=allocator.allocated_peak_bytes,
            allocated_end_bytes=allocator.allocated_bytes,
            reserved_peak_bytes=allocator.reserved_peak_bytes,
            reserved_end_bytes=allocator.reserved_bytes,
            recorded_reserved_peak_bytes=self.reserved_peak,
            recorded_reserved_end_bytes=self.reserved_end,
            out_of_memory=tuple(self.out_of_memory),
            strays=tuple(self.strays),
            mismatches=tuple(self.mismatches),
        )

    def _allocate(self, entry: _Entry) -> None:
        if entry.address in self.addresses:  # its free is missing
            self.strays.append(entry.event)
            self.allocator.free(self.addresses.pop(entry.address))
        if self.asked and self.switches:
            self.allocator.set_expandable(self.asked[0].action == "segment_map", entry.pool)
        self.allocator.event = entry.event
        before = len(self.allocator.segment_requests)
        self.allocations += 1
        try:
            address = self.allocator._allocate(entry.size, entry.stream, entry.pool, entry is not self.searched)
        except SimulatedOutOfMemoryError:
            self.out_of_memory.append(entry.event)
            self.refused.add(entry.address)
        else:
            self.addresses[entry.address] = address
            self.matching_allocations += address == entry.address
        if self.asked or len(self.allocator.segment_requests) > before:
            self._compare(entry.event, before)

    def _free(self, entry: _Entry) -> None:
        address = self.addresses.pop(entry.address, None)
        if address is not None:
            self.allocator.event = entry.event
            self.allocator.free(address)
        elif entry.address in self.refused:
            self.refused.remove(entry.address)
        else:
            self.strays.append(entry.event)

    def _fail(self, position: int) -> None:
        """Requests that no allocation follows at once: pages were mapped for one before the device was full."""
        if not self.asked:
            return
        cause = self._next_allocation(position)
        before = len(self.allocator.segment_requests)
        if cause is not None and all(entry.action == "segment_map" for entry in self.asked):
            self.allocator.event = cause.event
            available = sum(entry.size for entry in self.asked)
            self.allocator._try_to_map(cause.size, cause.stream, cause.pool, available)
        self._compare(self.asked[-1].event if cause is None else cause.event, before)

    def _compare(self, event: int, before: int) -> None:
        recorded = tuple(entry.size for entry in self.asked)
        simulated = tuple(request.size for request in self.allocator.segment_requests[before:])
        self.requests += len(recorded)
        self.matching_requests += sum(map(operator.eq, recorded, simulated))
        if recorded != simulated:
            self.mismatches.append(Mismatch(event, recorded, simulated))
        self.asked.clear()

    def _from(self, position: int) -> Iterator[_Entry]:
        return (self.entries[index] for index in range(position, len(self.entries)))

    def _next_allocation(self, position: int) -> _Entry | None:
        return next((entry for entry in self._from(position) if entry.action in ("alloc", "oom")), None)

    def _note_search(self, position: int) -> None:
        """An allocation that found nothing cached, and the device full, does not search what is left of the cache.

        Pending frees are waited for first, then the cache is given back, then the driver is asked again.
        """
        frees = ("free", *_GIVES_BACK)
        following = next((entry.action for entry in self._from(position) if entry.action not in frees), None)
        cause = self._next_allocation(position) if following in _ASKS else None
        if cause is not None and not self.allocator._has_cached(cause.size, cause.stream, cause.pool):
            self.searched = cause

    def _give_back(self, entries: Sequence[_Entry]) -> None:
        """Repeat what the file shows was given back.

        The cache goes as a whole, but in parts with ``max_split_bytes`` or garbage collection.
        """
        self.allocator.event = entries[0].event
        before = len(self.allocator.segment_frees)
        in_parts = self.config.max_split_bytes is not None or self.config.garbage_collection_threshold > 0
        by_pool: dict[PoolId, list[_Entry]] = defaultdict(list)
        for entry in entries:
            by_pool[entry.pool].append(entry)
        for pool, some in by_pool.items():
            if in_parts and all(entry.action == "segment_free" for entry in some):
                for entry in some:
                    self.allocator.release_segment(entry.address)
            else:
                self.allocator.empty_cache(pool)
        simulated = Counter(given.size for given in self.allocator.segment_frees[before:])
        self.frees += len(entries)
        self.matching_frees += (Counter(entry.size for entry in entries) & simulated).total()


class _Filler:
    """Lays blocks that are live before a trace into their segments."""

    def __init__(self, blocks: Iterable[_Held], entries: Sequence[_Entry], config: AllocatorConfig) -> None:
        self.blocks = sorted(blocks)
        self.starts = [block.address for block in self.blocks]
        self.max_split = config.max_split_bytes
        self.first_use: dict[int, int] = {}
        for entry in entries:
            if entry.action == "alloc":
                self.first_use.setdefault(entry.address, entry.event)
        self.used = sorted(self.first_use)

    def fill(self, low: int, high: int, large: bool) -> Iterator[_Piece]:
        """The pieces of ``[low, high)``; a block that does not fit there is left out."""
        at = low
        for index in range(bisect_left(self.starts, low), bisect_left(self.starts, high)):
            block = self.blocks[index]
            if block.address < at or block.address + block.size > high:
                continue
            limit = min([high, *self.starts[index + 1 : index + 2]])
            size = self._whole_size(block, limit) if large and block.freed is not None else block.size
            if block.address > at:
                yield _Piece(at, block.address - at, _FREE)
            yield _Piece(block.address, size, _LIVE)
            at = block.address + size
        if at < high:
            yield _Piece(at, high - at, _FREE)

    def _whole_size(self, block: _Held, limit: int) -> int:
        """The size of a block of the large pool with the remainder that was not split off.

        No free block there is as small as 1 MiB, so a smaller gap belongs to the block before it. In a larger gap the
        first allocation after the block's end, while it lives, shows where the free block begins.
        """
        end = block.address + block.size
        if limit - end <= SMALL_REQUEST or (self.max_split is not None and block.size >= self.max_split):
            return max(limit - block.address, block.size)
        assert block.freed is not None
        for at in range(bisect_left(self.used, end), len(self.used)):
            start = self.used[at]
            if start > end + SMALL_REQUEST:
                break
            if self.first_use[start] < block.freed:
                return start - block.address
        return block.size


def _mapped_before(
    segments: Sequence[_Segment], entries: Sequence[_Entry], config: AllocatorConfig
) -> dict[_Owner, list[tuple[int, int]]]:
    """The ranges of expandable segments that were mapped before the trace, by owner and address.

    A byte was mapped then if it is now, plus the times it was unmapped, less the times it was mapped, in between.
    """
    moves = [entry for entry in entries if entry.action in ("segment_map", "segment_unmap")]
    if not moves and not any(segment.expandable for segment in segments):
        return {}
    sizes = {entry.address: entry.size for entry in entries if entry.action in ("alloc", "free")}
    used = sorted(sizes)
    changes: dict[int, int] = defaultdict(int)
    begins: dict[int, list[tuple[int, _Segment]]] = defaultdict(list)  # what was mapped there, the surest first
    for segment in segments:
        if segment.expandable:
            changes[segment.address] += 1
            changes[segment.address + segment.size] -= 1
            begins[segment.address].append((0, segment))
    for _, action, address, size, stream, pool, _ in moves:
        sign = 1 if action == "segment_unmap" else -1
        changes[address] += sign
        changes[address + size] -= sign
        if sign > 0:
            at = bisect_left(used, address)
            if at < len(used) and used[at] < address + size:
                small = config.rounded(sizes[used[at]]) <= SMALL_REQUEST
            else:
                small = size % config.large_segment_bytes != 0
            begins[address].append((1, _Segment(address, size, stream, small, pool, True)))

    owners: dict[_Owner, list[tuple[int, int]]] = defaultdict(list)
    edges = sorted(changes)
    level = 0
    around: list[tuple[int, _Segment]] = []
    for low, high in pairwise(edges):
        level += changes[low]
        around = [(rank, known) for rank, known in around if known.address + known.size > low] + begins[low]
        if level > 0 and around:
            _, known = min(around)
            ranges = owners[known.pool, known.small, known.stream]
            if ranges and ranges[-1][1] == low:
                ranges[-1] = ranges[-1][0], high
            else:
                ranges.append((low, high))
    return owners


def _largest_address_space(segments: Sequence[_Segment], entries: Sequence[_Entry], at_least: int) -> int:
    """How much address space an expandable segment can have reserved: it ends where the next segment begins.

    Addresses are used again, so two neighbours need not have been there together; less than ``at_least`` shows it.
    """
    places: list[tuple[int, _Owner | None]] = []
    for segment in segments:
        owner = (segment.pool, segment.small, segment.stream)
        places.append((segment.address, owner if segment.expandable else None))
    for entry in entries:
        if entry.action in _ASKS:
            owner = (entry.pool, entry.size <= SMALL_SEGMENT, entry.stream)
            places.append((entry.address, owner if entry.action == "segment_map" else None))
    largest = _UNBOUNDED_RESERVE
    base, last = 0, None
    for address, following in sorted(places, key=lambda place: place[0]):
        if following != last:
            if last is not None and address - base >= at_least:
                largest = min(largest, address - base)
            base, last = address, following
    return largest


def _lowest_mapped(owner: _Owner, ranges: Sequence[tuple[int, int]], entries: Sequence[_Entry]) -> int:
    """Where an expandable segment begins: lower than its first page if one before it is mapped later.

    Once all of it has been unmapped its successor may begin anywhere.
    """
    low, high = ranges[0][0], ranges[-1][1]
    mapped = sum(end - start for start, end in ranges)
    for entry in entries:
        if (entry.pool, entry.stream) != (owner[0], owner[2]):
            continue
        if entry.action == "segment_map" and (entry.size <= SMALL_SEGMENT) == owner[1]:
            mapped += entry.size
            low, high = min(low, entry.address), max(high, entry.address + entry.size)
        elif entry.action == "segment_unmap" and low <= entry.address < high:
            mapped -= entry.size
            if mapped <= 0:
                break
    return low
