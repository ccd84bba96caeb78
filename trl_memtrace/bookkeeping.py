"""From a recording to the record of a step: the books, balanced against the allocator's own count. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from .attribution import (
    NOWHERE,
    Books,
    Claims,
    Owner,
    Span,
    Timeline,
    attribute,
    find_claimed,
    fold_modules,
    in_transfer,
)
from .categories import BUCKETS, ROLE_SEPARATOR, Category, Phase, role
from .ledger import NEVER, Events, Int64Array, Ledger
from .recorders import AnyRecording, Recording, Samples
from .records import Peak, PhaseRecord, StepRecord, category_table

MAX_MODULES = 64
"""How many modules a step's record names; smaller ones are counted with their parents."""

MAX_NAMES = 8_000
"""How many characters their names may have together."""

_UNSPLIT = 1 << 20

MAX_ROLES = 40
"""How many roles a step's record names."""


def keep_books(
    recording: AnyRecording, claims: Claims, timeline: Timeline, *, cut_short: bool = False
) -> tuple[Books, Int64Array]:
    """The books of one recording, and the allocator's own level beside them.

    Args:
        recording: what a recorder saw.
        claims: what owners said meanwhile.
        timeline: what was going on.
        cut_short: whether an exception ended the recording.

    Returns:
        the books, and ``(N + 1,)`` bytes at each instant by the allocator's own count.
    """
    if isinstance(recording, Recording):
        ledger, allocator = _with_owners_baseline(_with_lost_ends(recording, claims, timeline), claims)
        return attribute(ledger, claims, timeline, cut_short=cut_short), allocator
    if isinstance(recording, Samples):
        ledger, claims = _between_samples(recording, claims)
        books, end = attribute(ledger, claims, timeline, cut_short=cut_short), int(recording.level[-1])
    else:
        ledger = recording.ledger
        claims = _with_buckets_found(ledger, claims)
        books, end = attribute(ledger, claims, timeline, cut_short=cut_short), recording.end_bytes
    allocator = ledger.level + (end - ledger.level[-1])
    if recording.peak_bytes is not None:
        allocator[books.peak(books.spans)] = recording.peak_bytes
    return books, allocator


def _between_samples(samples: Samples, claims: Claims) -> tuple[Ledger, Claims]:
    """What is known where a counter was only read now and then: an owner's storage is there from the first reading at
    which it was seen to the last, and the rest of every reading is a block of nobody's until the next."""
    times, count = samples.time_ns, len(samples.time_ns)
    seen = np.clip(np.searchsorted(times, claims.time_ns, side="left"), 0, count - 1)
    held: dict[int, tuple[int, int, int]] = {}
    for address, size, at in zip(claims.address.tolist(), claims.size.tolist(), seen.tolist(), strict=True):
        first, last, _ = held.get(address, (at, at, size))
        held[address] = min(first, at), max(last, at), size
    owned = np.zeros(count, np.int64)
    for first, last, size in held.values():
        owned[first : last + 1] += size
    rest = np.maximum(samples.level - owned, 0)
    rows: list[tuple[int, int, int]] = []
    for address, (first, last, size) in held.items():
        rows.append((first, address, size))
        if last + 1 < count:
            rows.append((last + 1, address, -size))
    for at, size in enumerate(rest.tolist()):  # addresses of nobody's
        if size:
            rows.append((at, -1 - at, size))
            if at + 1 < count:
                rows.append((at + 1, -1 - at, -size))
    rows.sort(key=lambda row: (row[0], row[2] > 0))  # what ends at a reading ends before what begins there
    places = [row[0] for row in rows]
    events = Events.of(times[places] - 1 if rows else [], [row[1] for row in rows], [row[2] for row in rows])
    nobody = [(int(times[at]), -1 - at, 1, len(claims.owners)) for at in np.flatnonzero(rest).tolist()]
    seen_claims = zip(
        times[seen].tolist(), claims.address.tolist(), claims.size.tolist(), claims.owner.tolist(), strict=True
    )
    owner = Owner(Category.UNATTRIBUTED, role(Category.UNATTRIBUTED, "between_readings"))
    return Ledger.of(events), Claims.of([*seen_claims, *nobody], [*claims.owners, owner])


def _with_lost_ends(recording: Recording, claims: Claims, timeline: Timeline) -> Recording:
    """What a process group allocates for itself in a transfer between ranks is freed by a thread of its own, unseen:
    it ends with the transfer, unless somebody claims it. Buckets stay; what ranks tell each other of them is over when
    the first is made."""
    if not len(timeline.transfer_ns):
        return recording
    events = recording.events
    ledger = Ledger.of(events)
    claimed = find_claimed(ledger, claims)
    born_in = in_transfer(ledger, timeline)
    makes_buckets = np.array([kind == BUCKETS for kind in [*timeline.transfer, None]], np.bool_)[born_in]
    buckets = _new_buckets(ledger, claims, np.flatnonzero(makes_buckets), claimed)
    lost = (born_in >= 0) & (~makes_buckets | (len(buckets) > 0))
    lost[claimed[claimed >= 0]] = lost[buckets] = False
    ended = np.flatnonzero(ledger.died != NEVER)
    lost[ended[events.size[ledger.died[ended] - 1] < 0]] = False  # else its address was given out again
    over = [when for when, kind in zip(timeline.transfer_ns, timeline.transfer, strict=True) if kind is None]
    ends = np.unique([*ledger.instants(over), *(ledger.born[buckets] - 1), len(events)])
    end = ends[np.searchsorted(ends, ledger.born, side="left")]
    rows = np.flatnonzero(lost & (end < ledger.died))
    rows = rows[np.argsort(end[rows], kind="stable")]
    place, size = end[rows], -ledger.size[rows]
    filled = Events.of(
        np.insert(events.time_ns, place, events.time_ns[place - 1]),
        np.insert(events.address, place, ledger.address[rows]),
        np.insert(events.size, place, size),
    )
    return Recording(filled, np.insert(recording.reported, place, size))


def _new_buckets(ledger: Ledger, claims: Claims, born: Int64Array, claimed: Int64Array) -> Int64Array:
    """Which of the blocks that were born as DDP made its buckets anew are these: as many bytes together as the old
    ones, or what gradients are views of; none where that cannot be told."""
    held = born[np.isin(born, claimed)]
    by_size = born[np.argsort(-ledger.size[born], kind="stable")]
    whole = np.flatnonzero(np.cumsum(ledger.size[by_size]) == claims.size[claims.address <= NOWHERE].sum())
    return np.union1d(held, by_size[: whole[0] + 1]) if len(whole) else held


def _with_buckets_found(ledger: Ledger, claims: Claims) -> Claims:
    """A storage of which only the size is known is the smallest block that it fits into, of those that were there
    before and are nobody's; the allocator leaves up to a mebibyte at a block's end."""
    nowhere = np.flatnonzero(claims.address <= NOWHERE)
    if not len(nowhere):
        return claims
    found = find_claimed(ledger, claims)
    free = ledger.born == 0
    free[found[found >= 0]] = False
    address = claims.address.copy()
    for row in nowhere[np.argsort(-claims.size[nowhere], kind="stable")]:
        fits = np.flatnonzero(free & (ledger.size >= claims.size[row]) & (ledger.size < claims.size[row] + _UNSPLIT))
        if len(fits):
            block = fits[np.argmin(ledger.size[fits])]
            free[block], address[row] = False, ledger.address[block]
    return replace(claims, address=address)


def _with_owners_baseline(recording: Recording, claims: Claims) -> tuple[Ledger, Int64Array]:
    """What owners hold and no event made was there before the recording: it is the baseline."""
    ledger = Ledger.of(recording.events)
    unknown = find_claimed(ledger, claims) < 0
    rows = np.flatnonzero(unknown)
    _, first = np.unique(claims.address[rows], return_index=True)
    baseline = claims.take(rows[first])
    ledger = Ledger.of(recording.events, baseline.address, baseline.size)
    reported = recording.reported.copy()
    reported[ledger.strays] = 0
    # The allocator never counted what is older than the recording: its end counts as the baseline's bytes. Nor did it
    # see the end of what another thread freed, where the address was given out again.
    ended = ledger.died <= len(reported)
    older = ended & (ledger.born == 0)
    size_then = recording.events.size[np.where(ended, ledger.died, 1) - 1] if len(reported) else ledger.size
    replaced = ended & (size_then >= 0)
    reported[ledger.died[older & ~replaced] - 1] = -ledger.size[older & ~replaced]
    reported[ledger.died[replaced] - 1] -= ledger.size[replaced]
    allocator = int(ledger.level[0]) + np.concatenate([[0], np.cumsum(reported)])
    return ledger, allocator


def step_record(
    number: int, books: Books, allocator: Int64Array, seconds: float, reserved_bytes: int | None = None
) -> StepRecord:
    """The record of a step.

    Args:
        number: the step's.
        books: of the step.
        allocator: ``(N + 1,)`` bytes at each instant by the allocator's own count.
        seconds: how long the step took.
        reserved_bytes: the most that the caching allocator had reserved.
    """
    peak = books.peak(books.spans)
    phase = next((span.phase for span in books.spans if span.start < peak <= span.end), books.spans[0].phase)
    return StepRecord(
        step=number,
        traced=True,
        phases={phase.value: _phase_record(books, allocator, spans) for phase, spans in _by_phase(books.spans)},
        peak=peak_at(books, allocator, peak, phase),
        reserved_bytes=reserved_bytes,
        seconds=seconds,
    )


def books_of_step(books: Books, start: int, end: int) -> Books:
    """The books of several steps, seen for one of them: between two instants."""
    spans = [Span(span.phase, max(span.start, start), min(span.end, end)) for span in books.spans]
    kept = [span for span in spans if span.end > span.start or (span.end == span.start == end)]
    return replace(books, spans=tuple(kept))


def peak_at(books: Books, allocator: Int64Array, instant: int, phase: Phase) -> Peak:
    """What was alive at an instant, in full."""
    modules = fold_modules(books.modules_at(instant), MAX_MODULES)
    kept = MAX_MODULES
    while sum(map(len, modules)) > MAX_NAMES and kept > 1:
        kept //= 2
        modules = fold_modules(modules, kept)
    return Peak(
        phase=phase,
        bytes=int(allocator[instant]),
        allocator_bytes=int(allocator[instant]),
        categories=_categories(books, allocator, instant),
        roles=_largest_roles(books.roles_at(instant)),
        modules={name: {kind.value: size for kind, size in row.items()} for name, row in sorted(modules.items())},
    )


def _largest_roles(roles: dict[str, int]) -> dict[str, int]:
    """The largest roles; the others are counted together, by category."""
    kept = dict(sorted(roles.items(), key=lambda row: -row[1])[:MAX_ROLES])
    for name, size in roles.items():
        if name not in kept:
            rest = f"{name.split(ROLE_SEPARATOR)[0]}{ROLE_SEPARATOR}rest"
            kept[rest] = kept.get(rest, 0) + size
    return kept


def last_allocation(ledger: Ledger, time_ns: int) -> int:
    """The instant just after the last allocation by a time: where an allocation failed, what came after are frees."""
    until = int(ledger.instants([time_ns])[0])
    earlier = ledger.born[ledger.born <= until]
    return int(earlier.max()) if len(earlier) else 0


def _by_phase(spans: Sequence[Span]) -> Iterator[tuple[Phase, list[Span]]]:
    """The spans of each phase, in the order in which phases ended: the last one's end is the step's."""
    for phase in reversed(dict.fromkeys(span.phase for span in reversed(spans))):
        yield phase, [span for span in spans if span.phase is phase]


def _phase_record(books: Books, allocator: Int64Array, spans: list[Span]) -> PhaseRecord:
    peak, end = books.peak(spans), spans[-1].end
    return PhaseRecord(
        int(allocator[peak]),
        int(allocator[end]),
        _categories(books, allocator, peak),
        _categories(books, allocator, end),
    )


def _categories(books: Books, allocator: Int64Array, instant: int) -> dict[str, int]:
    table = category_table(books.categories_at(instant))
    table[Category.UNATTRIBUTED] += int(allocator[instant] - books.ledger.level[instant])
    return table
