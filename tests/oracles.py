"""What the books must say, worked out slowly with lists and dictionaries, one event after the other.

Nothing here shares code with the ledger or the attribution. Instants do not occur: a block carries the numbers and the
times of the events that made and ended it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st

from trl_memtrace.attribution import Owner
from trl_memtrace.categories import Category, Phase

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

UNIT = 512


@dataclass(frozen=True)
class Program:
    """What an allocator did: baseline rows are (address, size), event rows (time_ns, address, size)."""

    baseline: list[tuple[int, int]]
    events: list[tuple[int, int, int]]

    @property
    def columns(self) -> tuple[list[int], list[int], list[int]]:
        return tuple([row[column] for row in self.events] for column in range(3))

    @property
    def baseline_columns(self) -> tuple[list[int], list[int]]:
        return tuple([row[column] for row in self.baseline] for column in range(2))


@dataclass
class NaiveBlock:
    """A block, with the numbers of its first and last event; None for what the recording did not see."""

    address: int
    size: int
    made_by: int | None
    ended_by: int | None = None

    def is_alive_after(self, events: int) -> bool:
        """Whether it is alive when so many events have happened."""
        made = self.made_by is None or self.made_by < events
        ended = self.ended_by is not None and self.ended_by < events
        return made and not ended

    def holds(self, address: int) -> bool:
        return self.address == address or self.address < address < self.address + self.size


@dataclass
class NaiveBooks:
    blocks: list[NaiveBlock]
    levels: list[int]
    strays: list[int]

    def holders(self, address: int, events: int) -> list[int]:
        """The numbers of all blocks that hold an address when so many events have happened."""
        return [
            number for number, block in enumerate(self.blocks) if block.is_alive_after(events) and block.holds(address)
        ]


def replay(program: Program) -> NaiveBooks:
    """Every event in turn, with a dictionary of what is held."""
    blocks = [NaiveBlock(address, size, None) for address, size in program.baseline]
    held = {block.address: block for block in blocks}
    levels = [sum(block.size for block in held.values())]
    strays = []
    for number, (_, address, size) in enumerate(program.events):
        old = held.pop(address, None)
        if old is not None:
            old.ended_by = number
        elif size < 0:
            strays.append(number)
        if size >= 0:
            held[address] = NaiveBlock(address, size, number)
            blocks.append(held[address])
        levels.append(sum(block.size for block in held.values()))
    return NaiveBooks(blocks, levels, strays)


@dataclass(frozen=True)
class Story:
    """What was going on while a program ran. Rows of (time_ns, ...), in time's order but for the claims."""

    phases: list[tuple[int, Phase]]
    modules: list[tuple[int, int]]
    module_names: list[str]
    activation_roles: list[str]
    claims: list[tuple[int, int, int, int]]
    owners: list[Owner]


@dataclass(frozen=True)
class Tag:
    category: Category
    role: str
    module: str


TRUST = {Category.WEIGHTS: 4, Category.GRADIENTS: 3, Category.OPTIMIZER_STATES: 2, Category.INPUTS: 1}


def tag(block: NaiveBlock, program: Program, story: Story) -> Tag:
    """What the rules in ``attribute``'s docstring say of one block."""
    made_at = None if block.made_by is None else program.events[block.made_by][0]
    ended_at = None if block.ended_by is None else program.events[block.ended_by][0]

    def is_alive_at(time_ns: int) -> bool:
        return (made_at is None or made_at < time_ns) and (ended_at is None or ended_at >= time_ns)

    best = None
    for time_ns, address, _, number in story.claims:
        owner = story.owners[number]
        about_it = is_alive_at(time_ns) and block.holds(address)
        if about_it and (best is None or TRUST.get(owner.category, 0) >= TRUST.get(best.category, 0)):
            best = owner
    if best is not None:
        return Tag(best.category, best.role, best.module)
    if made_at is None:
        return Tag(Category.UNATTRIBUTED, "unattributed/before_step", "")

    phase = Phase.IDLE
    for began, begun in with_clipping_in_optimizer(story.phases):
        if began <= made_at:
            phase = begun
    running = -1
    for changed, number in story.modules:
        if changed <= made_at:
            running = number
    module = story.module_names[running] if running >= 0 else ""

    if phase in (Phase.BACKWARD, Phase.ROLLOUT, Phase.EVALUATE) and running >= 0:
        ends = [changed for changed, number in story.modules if number < 0 and changed > made_at]
        if is_alive_at(ends[0]) if ends else ended_at is None:
            kind = story.activation_roles[running]
            detail = "recomputed" if phase is Phase.BACKWARD else "kv_cache" if kind == "attention" else kind
            return Tag(Category.ACTIVATIONS, f"activations/{detail}", module)
    if phase not in (Phase.BACKWARD, Phase.OPTIMIZER):
        later = [began for began, begun in story.phases if begun is Phase.BACKWARD and began > made_at]
        if later and is_alive_at(later[0]):
            outside = "logits" if phase is Phase.LOSS else "other"
            detail = story.activation_roles[running] if running >= 0 else outside
            return Tag(Category.ACTIVATIONS, f"activations/{detail}", module)
    if ended_at is not None:
        return Tag(Category.TEMPORARIES, f"temporaries/{phase.value}", module)
    return Tag(Category.UNATTRIBUTED, "unattributed/during_step", module)


def with_clipping_in_optimizer(phases: list[tuple[int, Phase]]) -> list[tuple[int, Phase]]:
    """The phases, with what is idle between a backward and the optimizer step given to the optimizer."""
    told = list(phases)
    for index in range(1, len(phases) - 1):
        around = phases[index - 1][1], phases[index][1], phases[index + 1][1]
        if around == (Phase.BACKWARD, Phase.IDLE, Phase.OPTIMIZER):
            told[index] = (phases[index][0], Phase.OPTIMIZER)
    return told


def rows(*choices: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Tuples of integers from 0 up to each of some bounds, drawn as one number, which is much faster."""

    def digits(number: int) -> tuple[int, ...]:
        row = []
        for choice in choices:
            number, digit = divmod(number, choice)
            row.append(digit)
        return tuple(row)

    return st.integers(0, math.prod(choices) - 1).map(digits)


def lists_of_any_length(elements: st.SearchStrategy, max_size: int) -> st.SearchStrategy[list]:
    """Lists as often long as short; hypothesis itself prefers short ones."""
    return st.one_of(*(st.lists(elements, min_size=least, max_size=max_size) for least in (0, max_size // 2)))


@st.composite
def wild_programs(draw: st.DrawFn, max_events: int = 40) -> Program:
    """Anything goes: frees of nothing, frees that were never seen, blocks that overlap, blocks of no bytes."""
    baseline = {place * UNIT: units * UNIT for place, units in draw(st.lists(rows(12, 5), max_size=5))}
    events, now = [], 0
    for gap, place, is_free, units in draw(lists_of_any_length(rows(3, 12, 2, 5), max_events)):
        now += gap
        events.append((now, place * UNIT, -max(units * UNIT, 1) if is_free else units * UNIT))
    return Program(list(baseline.items()), events)


@st.composite
def orderly_programs(draw: st.DrawFn, max_events: int = 40) -> Program:
    """What a well-behaved allocator does: first fit, no overlap, an address used again at once."""
    held: dict[int, int] = {}
    top = 0
    for units, gap in draw(st.lists(rows(4, 3), max_size=5)):
        held[top + gap * UNIT] = (1 + units) * UNIT
        top += (gap + 1 + units) * UNIT
    baseline = list(held.items())

    events, now = [], 0
    for gap, is_free, units, which in draw(lists_of_any_length(rows(3, 2, 4, 60), max_events)):
        now += gap
        if not is_free:
            address, size = 0, (1 + units) * UNIT
            for start, length in sorted(held.items()):
                if address + size <= start:
                    break
                address = start + length
            held[address] = size
            events.append((now, address, size))
        elif held:
            address = sorted(held)[which % len(held)]
            events.append((now, address, -held.pop(address)))
    return Program(baseline, events)


NAMES = ["", "embed", "layers.0.attn", "layers.0.mlp", "layers.1.attn.q"]
KINDS = ["other", "embedding", "attention", "mlp", "attention"]
OWNERS = [
    Owner(category, f"{category.value}/{detail}", module)
    for category in (
        Category.WEIGHTS,
        Category.GRADIENTS,
        Category.OPTIMIZER_STATES,
        Category.INPUTS,
        Category.COMMUNICATION,
    )
    for detail, module in (("one", "layers.0.attn"), ("two", "head"))
]

MICRO_BATCH = [Phase.FORWARD, Phase.LOSS, Phase.BACKWARD, Phase.IDLE]
TRAINING = [*MICRO_BATCH, *MICRO_BATCH, Phase.OPTIMIZER, Phase.IDLE, *MICRO_BATCH, Phase.OPTIMIZER]


@st.composite
def stories(draw: st.DrawFn, program: Program) -> Story:
    """Phases, modules and claims at any times, many of them at those of events and of each other."""
    last = program.events[-1][0] if program.events else 0
    times = st.integers(0, last + 2)
    some_times = lists_of_any_length(times, 12).map(sorted)
    anything = lists_of_any_length(st.sampled_from(Phase), 12)
    training = st.integers(0, len(TRAINING) - 1).map(lambda start: TRAINING[start:])
    phases = list(zip(draw(some_times), draw(anything | training), strict=False))
    modules = sorted(draw(lists_of_any_length(rows(last + 3, len(NAMES) + 1), 12)), key=lambda row: row[0])
    claims = draw(st.lists(rows(len(OWNERS), last + 3, 32), max_size=8))
    return Story(
        phases,
        [(when, number - 1) for when, number in modules],
        NAMES,
        KINDS,
        [(when, place * UNIT // 2, UNIT, owner) for owner, when, place in claims],
        OWNERS,
    )
