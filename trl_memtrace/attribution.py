"""Blocks, owners and phases in; a category, a role and a module for every block out. Pure numpy, no torch.

The order of the rules is the order of trust: what an owner claims is his for the block's whole life; what nobody
claims is told by its lifetime against the phases; what neither tells is unattributed.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .categories import CATEGORIES, CATEGORY_CODE, PHASE_CODE, PHASES, Category, Phase, role
from .ledger import NEVER, Int64Array, Ledger

NO_MODULE = -1
"""The module number of an allocation made outside every module's forward."""

NOWHERE = -(1 << 60)
"""From here down are the addresses of storages that are known to be there, and how large, but not where."""

ROOT_MODULE = ""
"""The name under which stands what belongs to no module in particular."""

_PRECEDENCE = (Category.WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER_STATES, Category.INPUTS)


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a block is: what it is for, in the words of a record, and the module it belongs to."""

    category: Category
    role: str
    module: str = ROOT_MODULE


@dataclass(frozen=True, slots=True, eq=False)
class Claims:
    """Owners' words that an address held something of theirs at a time. Columns have shape ``(C,)`` and dtype int64.

    Attributes:
        time_ns: when it was seen, on the recorder's clock.
        address: first byte of the storage that was seen.
        size: its bytes.
        owner: index into ``owners``.
        owners: who they are.
    """

    time_ns: Int64Array
    address: Int64Array
    size: Int64Array
    owner: Int64Array
    owners: Sequence[Owner]

    @classmethod
    def of(cls, rows: Iterable[tuple[int, int, int, int]], owners: Sequence[Owner]) -> Claims:
        """Claims from rows of (time_ns, address, size, index into ``owners``)."""
        table = np.array(list(rows), np.int64).reshape(-1, 4)
        return cls(table[:, 0], table[:, 1], table[:, 2], table[:, 3], owners)

    def __len__(self) -> int:
        return len(self.address)

    def take(self, rows: Int64Array) -> Claims:
        """The claims in some rows."""
        return Claims(self.time_ns[rows], self.address[rows], self.size[rows], self.owner[rows], self.owners)

    def trust(self) -> Int64Array:
        """How much each claim weighs against another for the same block."""
        weight = {category: place for place, category in enumerate(reversed(_PRECEDENCE))}
        weights = np.array([weight.get(owner.category, -1) for owner in self.owners] or [0], np.int64)
        return weights[self.owner]


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """What was going on, and since when. Times are nanoseconds on the recorder's clock, in order.

    Attributes:
        phase_ns: ``(P,)`` when each phase began; before the first it is idle.
        phase: ``(P,)`` the phases.
        module_ns: ``(M,)`` when the innermost running module changed.
        module: ``(M,)`` its number in ``module_names``, or ``NO_MODULE``.
        module_names: the modules' names, as ``named_modules`` gives them.
        activation_roles: for each of ``module_names``, what its activations are (``attention``, ``mlp``, ...).
        transfer_ns: ``(T,)`` when the innermost running transfer between ranks changed.
        transfer: ``(T,)`` what it allocates (``gathered_weights``, ``reduce_scatter``, ...), None outside all.
    """

    phase_ns: Sequence[int]
    phase: Sequence[Phase]
    module_ns: Sequence[int] = ()
    module: Sequence[int] = ()
    module_names: Sequence[str] = ()
    activation_roles: Sequence[str] = ()
    transfer_ns: Sequence[int] = ()
    transfer: Sequence[str | None] = ()

    def followed_by(self, phase: Phase, time_ns: int) -> Timeline:
        """The timeline up to a time, and a phase from there on."""
        kept = sum(1 for when in self.phase_ns if when < time_ns)
        return replace(self, phase_ns=[*self.phase_ns[:kept], time_ns], phase=[*self.phase[:kept], phase])


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """A stretch of one phase, as instants of the ledger: the levels from ``start`` to ``end``, both included."""

    phase: Phase
    start: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Books:
    """A ledger with a tag on every block.

    Attributes:
        category: ``(B,)`` index into ``CATEGORIES``.
        role: ``(B,)`` index into ``roles``.
        module: ``(B,)`` index into ``modules``.
    """

    ledger: Ledger
    spans: tuple[Span, ...]
    category: Int64Array
    role: Int64Array
    module: Int64Array
    roles: tuple[str, ...]
    modules: tuple[str, ...]

    def categories_at(self, instant: int) -> dict[Category, int]:
        """Bytes of every category at an instant; they add up to ``ledger.level[instant]``."""
        totals = self.ledger.totals(self.category, len(CATEGORIES), instant)
        return dict(zip(CATEGORIES, totals.tolist(), strict=True))

    def roles_at(self, instant: int) -> dict[str, int]:
        """Bytes of every role that holds any at an instant; they add up to the level too."""
        totals = self.ledger.totals(self.role, len(self.roles), instant)
        return {name: total for name, total in zip(self.roles, totals.tolist(), strict=True) if total}

    def modules_at(self, instant: int) -> dict[str, dict[Category, int]]:
        """Bytes of every module by category at an instant; what belongs to none stands under ``""``."""
        codes = self.module * len(CATEGORIES) + self.category
        totals = self.ledger.totals(codes, len(self.modules) * len(CATEGORIES), instant)
        table: dict[str, dict[Category, int]] = {}
        codes = np.flatnonzero(totals)
        for code, total in zip(codes.tolist(), totals[codes].tolist(), strict=True):
            module, category = divmod(code, len(CATEGORIES))
            table.setdefault(self.modules[module], {})[CATEGORIES[category]] = total
        return table

    def peak(self, spans: Iterable[Span]) -> int:
        """The first instant at which memory was highest within some spans."""
        level = self.ledger.level
        return max(
            (span.start + int(np.argmax(level[span.start : span.end + 1])) for span in spans),
            key=lambda instant: int(level[instant]),
        )


class _Names(dict[str, int]):
    """Names numbered in the order of their first use."""

    def __missing__(self, name: str) -> int:
        return self.setdefault(name, len(self))


def phases_of(timeline: Timeline) -> list[Phase]:
    """What is idle before the timeline's first phase, and its phases. What is idle between a backward and the
    optimizer step is the optimizer's: it is there that gradients are unscaled and clipped."""
    phases = [Phase.IDLE, *timeline.phase]
    for index in range(1, len(phases) - 1):
        if phases[index - 1 : index + 2] == [Phase.BACKWARD, Phase.IDLE, Phase.OPTIMIZER]:
            phases[index] = Phase.OPTIMIZER
    return phases


def stretches_of(timeline: Timeline, end_ns: int) -> Iterator[tuple[Phase, int, int]]:
    """The timeline's phases with their first and last times; the last ends at ``end_ns``."""
    starts = list(timeline.phase_ns)
    ends = [*starts[1:], end_ns][: len(starts)]
    return zip(phases_of(timeline)[1:], starts, ends, strict=True)


def spans_of(ledger: Ledger, timeline: Timeline) -> tuple[Span, ...]:
    """The phases as stretches of the ledger, from its first instant to its last. An idle stretch without events is
    left out, unless it is the last, whose end is the step's."""
    last = len(ledger.level) - 1
    phases = phases_of(timeline)
    starts = [0, *ledger.instants(timeline.phase_ns).tolist()]
    ends = [*starts[1:], last]
    spans = [Span(*row) for row in zip(phases, starts, ends, strict=True)]
    kept = [span for span in spans[:-1] if span.phase is not Phase.IDLE or span.end > span.start]
    return (*kept, spans[-1])


def attribute(ledger: Ledger, claims: Claims, timeline: Timeline, *, cut_short: bool = False) -> Books:
    """Tag every block of a ledger.

    Rules, first match wins (a block's *birth phase* is the phase in which it was allocated):

    1. It was claimed at any time in its life: the claim's category, weights before gradients before optimizer states
       before inputs before all else; of equals the last.
    2. There before the recording: unattributed.
    3. Born in a transfer between ranks: communication.
    4. Born in the backward inside a module's forward (checkpointing runs it again) and outliving that forward:
       activations, with the role ``recomputed``.
    5. Born in a rollout or an evaluation inside a module's forward and outliving that forward: activations, with the
       role ``kv_cache`` where they are attention's.
    6. Born outside backward and optimizer, and alive when the next backward began: activations.
    7. Dead by the end of the recording, or the recording was cut short by an exception: temporaries of its birth
       phase.
    8. Else unattributed.
    """
    roles, modules = _Names(), _Names()
    modules[ROOT_MODULE]
    module_number = np.array([modules[ROOT_MODULE], *(modules[name] for name in timeline.module_names)], np.int64)
    spans = spans_of(ledger, timeline)

    blocks = len(ledger.size)
    category = np.full(blocks, CATEGORY_CODE[Category.UNATTRIBUTED], np.int64)
    role_code = np.full(blocks, roles[role(Category.UNATTRIBUTED, "during_step")], np.int64)
    before = ledger.born == 0
    role_code[before] = roles[role(Category.UNATTRIBUTED, "before_step")]

    born_phase, born_module, in_module_until = _births(ledger, spans, timeline)
    module = module_number[born_module + 1]
    free = ~before

    backward_starts = np.array([span.start for span in spans if span.phase is Phase.BACKWARD], np.int64)
    following = np.searchsorted(backward_starts, ledger.born, side="left")
    next_backward = np.append(backward_starts, NEVER)[following]
    outside = (born_phase != PHASE_CODE[Phase.BACKWARD]) & (born_phase != PHASE_CODE[Phase.OPTIMIZER])
    activation = free & outside & (next_backward != NEVER) & (ledger.died > next_backward)
    in_backward = born_phase == PHASE_CODE[Phase.BACKWARD]
    recomputed = free & in_backward & (born_module != NO_MODULE) & (ledger.died > in_module_until)
    generating = np.isin(born_phase, [PHASE_CODE[Phase.ROLLOUT], PHASE_CODE[Phase.EVALUATE]])
    answer = free & generating & (born_module != NO_MODULE) & (ledger.died > in_module_until)
    temporary = free & ~activation & ~recomputed & ~answer & ((ledger.died != NEVER) | cut_short)

    category[activation | recomputed | answer] = CATEGORY_CODE[Category.ACTIVATIONS]
    category[temporary] = CATEGORY_CODE[Category.TEMPORARIES]
    kinds = ["logits", *timeline.activation_roles]  # outside every module, what feeds the backward is the loss's own
    kind_code = np.array([roles[role(Category.ACTIVATIONS, kind)] for kind in kinds], np.int64)
    input_like = (born_phase != PHASE_CODE[Phase.LOSS]) & (born_module == NO_MODULE)
    role_code[activation] = kind_code[born_module[activation] + 1]
    role_code[activation & input_like] = roles[role(Category.ACTIVATIONS, "other")]
    cache_kinds = ["kv_cache" if kind == "attention" else kind for kind in kinds]
    cache_code = np.array([roles[role(Category.ACTIVATIONS, kind)] for kind in cache_kinds], np.int64)
    role_code[answer] = cache_code[born_module[answer] + 1]
    role_code[recomputed] = roles[role(Category.ACTIVATIONS, "recomputed")]
    phase_role = np.array([roles[role(Category.TEMPORARIES, phase.value)] for phase in PHASES], np.int64)
    role_code[temporary] = phase_role[born_phase[temporary]]
    _apply_transfers(ledger, timeline, category, role_code, roles)

    _apply_claims(ledger, claims, category, role_code, module, roles, modules)
    return Books(ledger, spans, category, role_code, module, tuple(roles), tuple(modules))


def _births(ledger: Ledger, spans: Sequence[Span], timeline: Timeline) -> tuple[Int64Array, Int64Array, Int64Array]:
    """For every block the phase and module it was born in, and the instant at which the outermost module then
    running had ended."""
    starts = np.array([span.start for span in spans], np.int64)
    codes = np.array([PHASE_CODE[span.phase] for span in spans], np.int64)
    # A block born at instant k came with the event between k-1 and k, which a phase starting at k-1 or before holds.
    born_phase = codes[np.maximum(np.searchsorted(starts, ledger.born, side="left") - 1, 0)]

    changes = ledger.instants(timeline.module_ns)
    running = np.append(np.asarray(timeline.module, np.int64), NO_MODULE)
    born_module = running[np.searchsorted(changes, ledger.born, side="left") - 1] if len(changes) else None
    if born_module is None:
        return born_phase, np.full(len(ledger.born), NO_MODULE, np.int64), np.full(len(ledger.born), NEVER, np.int64)
    outermost_ends = changes[running[:-1] == NO_MODULE]
    until = np.append(outermost_ends, len(ledger.level) - 1)[np.searchsorted(outermost_ends, ledger.born, side="left")]
    return born_phase, born_module, until


def in_transfer(ledger: Ledger, timeline: Timeline) -> Int64Array:
    """For every block the place in ``timeline.transfer`` of the transfer it was born in, ``-1`` where in none."""
    changes = ledger.instants(timeline.transfer_ns)
    place = np.searchsorted(changes, ledger.born, side="left") - 1
    outside = np.array([kind is None for kind in [*timeline.transfer, None]], np.bool_)
    return np.where(outside[place] | (ledger.born == 0), -1, place)


def _apply_transfers(
    ledger: Ledger, timeline: Timeline, category: Int64Array, role_code: Int64Array, roles: _Names
) -> None:
    """What was born in a transfer between ranks is communication."""
    place = in_transfer(ledger, timeline)
    moved = place >= 0
    category[moved] = CATEGORY_CODE[Category.COMMUNICATION]
    details = [roles[role(Category.COMMUNICATION, kind)] if kind else -1 for kind in timeline.transfer]
    role_code[moved] = np.array(details, np.int64)[place[moved]]


def _apply_claims(
    ledger: Ledger,
    claims: Claims,
    category: Int64Array,
    role_code: Int64Array,
    module: Int64Array,
    roles: _Names,
    modules: _Names,
) -> None:
    if not len(claims):
        return
    block = find_claimed(ledger, claims)
    order = np.argsort(claims.trust(), kind="stable")  # the most trusted write last
    order = order[block[order] >= 0]
    rows, owner = block[order], claims.owner[order]
    category[rows] = np.array([CATEGORY_CODE[who.category] for who in claims.owners], np.int64)[owner]
    role_code[rows] = np.array([roles[who.role] for who in claims.owners], np.int64)[owner]
    module[rows] = np.array([modules[who.module] for who in claims.owners], np.int64)[owner]


def find_claimed(ledger: Ledger, claims: Claims) -> Int64Array:
    """The block that each claim is about, ``-1`` where the ledger knows none: ``(C,)``."""
    return ledger.find(claims.address, ledger.instants(claims.time_ns))


def fold_modules(table: Mapping[str, Mapping[Category, int]], limit: int) -> dict[str, dict[Category, int]]:
    """At most ``limit`` named modules: the smallest are added to their parents, so that no byte is lost.

    A module is folded after all that it is made of. Its parent then holds the whole of it, and what is small by itself
    but large together, such as the adapters of a layer, stays as near to its place as ``limit`` allows.

    Args:
        table: bytes by module and category; ``""`` holds what belongs to no module and is not counted.
        limit: how many modules to keep, at least 1.
    """
    folded = {name: dict(row) for name, row in table.items()}
    named = len(folded) - (ROOT_MODULE in folded)
    if named <= limit:
        return folded
    parts = Counter(above for name in folded for above in _ancestors(name))
    heap = [(sum(row.values()), name) for name, row in folded.items() if name != ROOT_MODULE and not parts[name]]
    heapq.heapify(heap)
    while named > limit:
        _, name = heapq.heappop(heap)
        parent = name.rpartition(".")[0]
        parts[parent] -= 1
        if parent in folded or parent == ROOT_MODULE:
            named -= 1
            parts.subtract(_ancestors(parent))
        into = folded.setdefault(parent, {})
        for category, size in folded.pop(name).items():
            into[category] = into.get(category, 0) + size
        if parent != ROOT_MODULE and not parts[parent]:
            heapq.heappush(heap, (sum(into.values()), parent))
    return folded


def _ancestors(name: str) -> Iterator[str]:
    """``"a.b.c"`` -> ``"a.b"``, ``"a"``."""
    while name := name.rpartition(".")[0]:
        yield name
