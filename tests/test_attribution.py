"""The rules of attribution against a naive reading of them, block by block, and the sums that must always hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    Program,
    Story,
    Tag,
    orderly_programs,
    replay,
    stories,
    tag,
    wild_programs,
    with_clipping_in_optimizer,
)

from trl_memtrace.attribution import NO_MODULE, Books, Claims, Owner, Timeline, attribute, fold_modules, spans_of
from trl_memtrace.categories import CATEGORIES, Category, Phase
from trl_memtrace.ledger import Events, Ledger

MIB = 1024**2


def told(programs: st.SearchStrategy[Program]) -> st.SearchStrategy[tuple[Program, Story]]:
    return programs.flatmap(lambda program: st.tuples(st.just(program), stories(program)))


def books_of(program: Program, story: Story) -> Books:
    ledger = Ledger.of(Events.of(*program.columns), *program.baseline_columns)
    return attribute(ledger, Claims.of(story.claims, story.owners), timeline_of(story))


def timeline_of(story: Story) -> Timeline:
    return Timeline(
        phase_ns=[when for when, _ in story.phases],
        phase=[phase for _, phase in story.phases],
        module_ns=[when for when, _ in story.modules],
        module=[number for _, number in story.modules],
        module_names=story.module_names,
        activation_roles=story.activation_roles,
    )


@given(told(orderly_programs()))
def test_every_block_is_tagged_and_summed_as_the_rules_say(case: tuple[Program, Story]) -> None:
    program, story = case
    books, blocks = books_of(program, story), replay(program).blocks
    expected = [tag(block, program, story) for block in blocks]
    numbers = zip(books.category, books.role, books.module, strict=True)
    tags = [Tag(CATEGORIES[category], books.roles[role], books.modules[module]) for category, role, module in numbers]
    assert tags == expected

    for instant in range(len(program.events) + 1):
        categories, roles, modules = Counter(), Counter(), Counter()
        for block, its in zip(blocks, expected, strict=True):
            if block.is_alive_after(instant):
                categories[its.category] += block.size
                roles[its.role] += block.size
                modules[its.module, its.category] += block.size
        assert Counter(books.categories_at(instant)) == categories
        assert books.roles_at(instant) == dict(roles)
        flat = {(name, kind): size for name, row in books.modules_at(instant).items() for kind, size in row.items()}
        assert flat == dict(modules)


@given(told(st.one_of(orderly_programs(), wild_programs())))
def test_categories_roles_and_modules_add_up_to_the_level_at_every_instant(case: tuple[Program, Story]) -> None:
    books = books_of(*case)
    for instant, level in enumerate(replay(case[0]).levels):
        categories, roles, modules = (
            books.categories_at(instant),
            books.roles_at(instant),
            books.modules_at(instant),
        )
        assert sum(categories.values()) == level
        assert sum(roles.values()) == level
        assert sum(sum(row.values()) for row in modules.values()) == level
        assert list(categories) == list(CATEGORIES)
        by_category = Counter()
        for name, size in roles.items():
            by_category[name.partition("/")[0]] += size
        assert by_category == Counter({category.value: size for category, size in categories.items() if size})


@given(told(orderly_programs()))
def test_spans_follow_each_other_from_the_first_instant_to_the_last(case: tuple[Program, Story]) -> None:
    program, story = case
    spans = spans_of(Ledger.of(Events.of(*program.columns), *program.baseline_columns), timeline_of(story))
    assert [spans[0].start, *(span.end for span in spans)] == [*(span.start for span in spans), len(program.events)]
    assert spans[0].start == 0
    assert all(span.end > span.start for span in spans[:-1] if span.phase is Phase.IDLE)
    phases = [(-1, Phase.IDLE), *with_clipping_in_optimizer(story.phases)]
    for number, (when, _, _) in enumerate(program.events):
        of_event = [span.phase for span in spans if span.start <= number < span.end]
        assert of_event == [[phase for began, phase in phases if began <= when][-1]]


@given(told(st.one_of(orderly_programs(), wild_programs())))
def test_the_peak_is_the_first_instant_at_which_memory_was_highest(case: tuple[Program, Story]) -> None:
    books, levels = books_of(*case), replay(case[0]).levels
    assert books.peak(books.spans) == levels.index(max(levels))
    for phase in {span.phase for span in books.spans}:
        spans = [span for span in books.spans if span.phase is phase]
        instants = sorted({instant for span in spans for instant in range(span.start, span.end + 1)})
        assert books.peak(spans) == max(instants, key=lambda instant: (levels[instant], -instant))


class Recording:
    """A step written by hand: every call takes one nanosecond."""

    def __init__(self) -> None:
        self.now = 0
        self.rows: list[tuple[int, int, int]] = []
        self.phases: list[tuple[int, Phase]] = []
        self.modules: list[tuple[int, int]] = []
        self.claims: list[tuple[int, int, int, int]] = []
        self.owners: list[Owner] = []

    def tick(self) -> int:
        self.now += 1
        return self.now

    def alloc(self, address: int, size: int = MIB) -> None:
        self.rows.append((self.tick(), address, size))

    def free(self, address: int) -> None:
        self.rows.append((self.tick(), address, -1))

    def enter(self, phase: Phase) -> None:
        self.phases.append((self.tick(), phase))

    def module(self, number: int) -> None:
        self.modules.append((self.tick(), number))

    def claim(self, address: int, category: Category, detail: str = "batch") -> None:
        self.claims.append((self.tick(), address, MIB, len(self.owners)))
        self.owners.append(Owner(category, f"{category.value}/{detail}", "head"))

    def books(self) -> Books:
        story = Story(self.phases, self.modules, ["attn", "mlp"], ["attention", "mlp"], self.claims, self.owners)
        return books_of(Program([], self.rows), story)


def test_a_block_claimed_at_the_end_of_backward_was_a_gradient_at_the_peak_inside_it() -> None:
    step = Recording()
    step.enter(Phase.BACKWARD)
    step.alloc(100)
    step.alloc(200)
    step.free(200)
    step.claim(100, Category.GRADIENTS)
    books = step.books()
    assert books.peak(books.spans) == 2
    assert books.categories_at(2)[Category.GRADIENTS] == MIB


def test_a_claim_of_a_dead_block_does_not_stick_to_the_next_at_its_address() -> None:
    step = Recording()
    step.enter(Phase.OPTIMIZER)
    step.alloc(100)
    step.claim(100, Category.GRADIENTS)
    step.free(100)
    step.alloc(100)
    books = step.books()
    assert books.roles_at(1) == {"gradients/batch": MIB}
    assert books.roles_at(3) == {"unattributed/during_step": MIB}


def test_foreach_scratch_of_the_optimizer_is_temporary_and_its_state_is_not() -> None:
    step = Recording()
    step.enter(Phase.OPTIMIZER)
    step.alloc(100)
    step.alloc(200)
    step.claim(200, Category.OPTIMIZER_STATES, "exp_avg")
    step.free(100)
    assert step.books().roles_at(2) == {"temporaries/optimizer": MIB, "optimizer_states/exp_avg": MIB}


def test_what_clipping_allocates_between_backward_and_optimizer_is_the_optimizer_s() -> None:
    step = Recording()
    step.enter(Phase.BACKWARD)
    step.enter(Phase.IDLE)
    step.alloc(100)
    step.enter(Phase.OPTIMIZER)
    step.free(100)
    assert step.books().roles_at(1) == {"temporaries/optimizer": MIB}


def test_gradients_in_the_making_and_optimizer_scratch_are_no_activations_of_the_next_backward() -> None:
    for phase in (Phase.BACKWARD, Phase.OPTIMIZER):
        step = Recording()
        step.enter(phase)
        step.alloc(100)
        step.enter(Phase.BACKWARD)
        step.free(100)
        assert step.books().roles_at(1) == {f"temporaries/{phase}": MIB}


def test_what_is_born_in_backward_outside_every_module_is_not_recomputed() -> None:
    step = Recording()
    step.enter(Phase.BACKWARD)
    step.module(0)
    step.module(NO_MODULE)
    step.alloc(100)
    step.module(0)
    step.module(NO_MODULE)
    step.free(100)
    assert step.books().roles_at(1) == {"temporaries/backward": MIB}


def test_activations_recomputed_in_backward_outlive_their_module() -> None:
    step = Recording()
    step.enter(Phase.BACKWARD)
    step.module(0)
    step.alloc(100)
    step.alloc(200)
    step.free(200)
    step.module(NO_MODULE)
    step.free(100)
    assert step.books().modules_at(2) == {"attn": {Category.ACTIVATIONS: MIB, Category.TEMPORARIES: MIB}}
    assert step.books().roles_at(1) == {"activations/recomputed": MIB}


def test_activations_freed_in_a_module_s_forward_are_temporaries_of_forward() -> None:
    step = Recording()
    step.enter(Phase.FORWARD)
    step.module(1)
    step.alloc(100)
    step.alloc(200)
    step.free(200)
    step.module(NO_MODULE)
    step.enter(Phase.LOSS)
    step.alloc(300)
    step.enter(Phase.BACKWARD)
    step.free(100)
    step.free(300)
    assert step.books().roles_at(2) == {"activations/mlp": MIB, "temporaries/forward": MIB}
    assert step.books().roles_at(4) == {"activations/mlp": MIB, "activations/logits": MIB}


def test_activations_of_one_micro_batch_are_those_alive_at_its_own_backward() -> None:
    step = Recording()
    for _ in range(2):
        step.enter(Phase.FORWARD)
        step.alloc(100)
        step.enter(Phase.BACKWARD)
        step.free(100)
    step.enter(Phase.FORWARD)
    step.alloc(100)
    books = step.books()
    assert [books.roles_at(instant) for instant in (1, 3)] == [{"activations/other": MIB}] * 2
    assert books.roles_at(5) == {"unattributed/during_step": MIB}


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        (Category.WEIGHTS, Category.GRADIENTS, Category.WEIGHTS),
        (Category.OPTIMIZER_STATES, Category.GRADIENTS, Category.GRADIENTS),
        (Category.INPUTS, Category.OPTIMIZER_STATES, Category.OPTIMIZER_STATES),
        (Category.INPUTS, Category.COMMUNICATION, Category.INPUTS),
    ],
)
def test_of_two_claims_the_more_trusted_wins_in_either_order(
    first: Category, second: Category, winner: Category
) -> None:
    for order in ((first, second), (second, first)):
        step = Recording()
        step.alloc(100)
        for category in order:
            step.claim(100, category)
        assert step.books().categories_at(1)[winner] == MIB


def test_a_step_in_which_nothing_happened_is_one_idle_span() -> None:
    books = Recording().books()
    assert [astuple(span) for span in books.spans] == [(Phase.IDLE, 0, 0)]
    assert books.peak(books.spans) == 0


def test_the_last_span_ends_where_the_step_does_even_when_idle_and_empty() -> None:
    step = Recording()
    step.alloc(100)
    step.enter(Phase.FORWARD)
    step.alloc(200)
    step.enter(Phase.IDLE)
    assert astuple(step.books().spans[-1]) == (Phase.IDLE, 2, 2)


names = st.lists(st.sampled_from(["a", "b", "layers", "0", "1"]), min_size=1, max_size=4).map(".".join)
rows = st.dictionaries(st.sampled_from(Category), st.integers(0, 4), min_size=1)
tables = st.dictionaries(st.one_of(st.just(""), names), rows, max_size=12)


def naive_fold(table: dict, limit: int) -> dict:
    folded = {name: dict(row) for name, row in table.items()}
    while len(folded.keys() - {""}) > limit:
        whole = [name for name in folded if name and not any(other.startswith(name + ".") for other in folded)]
        smallest = min(whole, key=lambda name: (sum(folded[name].values()), name))
        parent = smallest[: smallest.rindex(".")] if "." in smallest else ""
        row = folded.pop(smallest)
        folded[parent] = dict(Counter(folded.get(parent, {})) + Counter(row))
    return folded


def without_zeros(table: dict) -> dict:
    return {name: {kind: size for kind, size in row.items() if size} for name, row in table.items()}


@given(tables, st.integers(1, 8))
def test_folding_loses_no_byte_and_keeps_at_most_the_limit(table: dict, limit: int) -> None:
    folded = fold_modules(table, limit)
    assert len(folded.keys() - {""}) <= limit
    for category in CATEGORIES:
        assert sum(row.get(category, 0) for row in folded.values()) == sum(
            row.get(category, 0) for row in table.values()
        )


@given(tables, st.integers(1, 8))
def test_folding_adds_the_smallest_without_parts_to_its_parent_one_after_the_other(table: dict, limit: int) -> None:
    assert without_zeros(fold_modules(table, limit)) == without_zeros(naive_fold(table, limit))


@given(tables)
def test_folding_leaves_a_small_table_as_it_is(table: dict) -> None:
    before = {name: dict(row) for name, row in table.items()}
    assert fold_modules(table, max(len(table), 1)) == before
    fold_modules(table, 1)
    assert table == before


def test_folding_keeps_the_small_parts_of_many_layers_in_their_layers() -> None:
    table = {
        f"model.layers.{layer}.attn.{part}.{adapter}": {Category.WEIGHTS: 1}
        for layer in range(32)
        for part in "qkvo"
        for adapter in ("lora_A", "lora_B")
    }
    assert fold_modules(table, 32) == {f"model.layers.{layer}.attn": {Category.WEIGHTS: 8} for layer in range(32)}
