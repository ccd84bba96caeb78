"""The ledger against a naive replay of random programs of allocations and frees."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import UNIT, Program, orderly_programs, replay, wild_programs

from trl_memtrace.ledger import NEVER, Events, Ledger

programs = st.one_of(wild_programs(), orderly_programs())


def ledger_of(program: Program) -> Ledger:
    return Ledger.of(Events.of(*program.columns), *program.baseline_columns)


@given(programs)
def test_blocks_levels_and_strays_are_those_of_the_replay(program: Program) -> None:
    ledger, naive = ledger_of(program), replay(program)
    expected = [
        (
            block.address,
            block.size,
            0 if block.made_by is None else block.made_by + 1,
            NEVER if block.ended_by is None else block.ended_by + 1,
        )
        for block in naive.blocks
    ]
    columns = (ledger.address, ledger.size, ledger.born, ledger.died)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    assert ledger.level.tolist() == naive.levels
    assert ledger.strays.tolist() == naive.strays


@given(programs, st.integers(1, 4), st.randoms(use_true_random=False))
def test_totals_sum_the_living_by_code_and_add_up_to_the_level(program: Program, codes: int, random: Random) -> None:
    ledger, naive = ledger_of(program), replay(program)
    code = [random.randrange(codes) for _ in naive.blocks]
    for instant in range(len(program.events) + 1):
        assert ledger.alive(instant).tolist() == [block.is_alive_after(instant) for block in naive.blocks]
        expected = [0] * codes
        for number, block in zip(code, naive.blocks, strict=True):
            expected[number] += block.size if block.is_alive_after(instant) else 0
        totals = ledger.totals(np.array(code, np.int64), codes, instant).tolist()
        assert totals == expected
        assert sum(totals) == naive.levels[instant]


def every_question(program: Program) -> list[tuple[int, int]]:
    """Addresses at, inside, just before and just after every block, at every instant."""
    starts = {address for address, _ in program.baseline} | {address for _, address, _ in program.events}
    addresses = {start + shift for start in starts for shift in (-1, 0, 1, UNIT - 1, UNIT, 3 * UNIT + 7)}
    return [(address, instant) for address in sorted(addresses) for instant in range(len(program.events) + 1)]


@given(orderly_programs(max_events=15))
def test_find_gives_the_block_that_holds_an_address_even_inside_it(program: Program) -> None:
    questions, naive = every_question(program), replay(program)
    found = ledger_of(program).find(*zip(*questions, strict=True)).tolist() if questions else []
    holders = [naive.holders(*question) for question in questions]
    assert found == [held[0] if held else -1 for held in holders]
    assert all(len(held) <= 1 for held in holders)


@given(wild_programs(max_events=15))
def test_find_gives_one_of_the_blocks_that_hold_an_address_where_lost_frees_made_them_overlap(
    program: Program,
) -> None:
    questions, naive = every_question(program), replay(program)
    found = ledger_of(program).find(*zip(*questions, strict=True)).tolist() if questions else []
    for question, block in zip(questions, found, strict=True):
        assert block in (naive.holders(*question) or [-1])


@given(orderly_programs(), st.lists(st.integers(-1, 90)))
def test_the_instant_of_a_time_is_the_number_of_events_before_it(program: Program, times: list[int]) -> None:
    expected = [sum(when < time for when, _, _ in program.events) for time in times]
    assert ledger_of(program).instants(times).tolist() == expected


def test_an_empty_recording_has_one_instant_and_no_block() -> None:
    ledger = Ledger.of(Events.of([], [], []))
    assert ledger.level.tolist() == [0]
    assert ledger.alive(0).tolist() == []
    assert ledger.find([1], [0]).tolist() == [-1]
    assert ledger.totals(np.array([], np.int64), 2, 0).tolist() == [0, 0]


def test_an_address_used_again_is_another_block() -> None:
    ledger = Ledger.of(Events.of([1, 2, 3], [64, 64, 64], [10, -10, 30]))
    assert ledger.find([64, 64, 64, 64], [0, 1, 2, 3]).tolist() == [-1, 0, -1, 1]


def test_an_allocation_at_an_address_still_held_ends_the_old_block() -> None:
    ledger = Ledger.of(Events.of([1, 2], [64, 64], [10, 30]))
    assert ledger.level.tolist() == [0, 10, 30]
    assert ledger.died.tolist() == [2, NEVER]


def test_a_block_counts_the_bytes_of_its_allocation_whatever_its_free_says() -> None:
    assert Ledger.of(Events.of([1, 2], [64, 64], [10, -7])).level.tolist() == [0, 10, 0]


def test_events_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"different lengths.*\[2, 1, 1\]"):
        Events.of([1, 2], [64], [10])
