"""What is born while shards move between ranks: in books made by hand, and in the functions that are watched."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from trl_memtrace import collectives
from trl_memtrace.attribution import NOWHERE, Claims, Owner, Timeline
from trl_memtrace.bookkeeping import keep_books
from trl_memtrace.categories import Category, Phase
from trl_memtrace.collectives import CollectiveWatch
from trl_memtrace.ledger import Events, Ledger
from trl_memtrace.owners import inner_optimizer
from trl_memtrace.recorders import Recording, WholeRecording
from trl_memtrace.sharding import module_name

GRADIENT, BUCKET = Owner(Category.GRADIENTS, "gradients/trainable"), Owner(Category.COMMUNICATION, "communication/x")


def recording(rows: list[tuple[int, int, int]]) -> Recording:
    """Events of (time, address, signed bytes), with the total that a profiler reports beside them."""
    return Recording(Events.of(*zip(*rows, strict=True)), np.array([row[2] for row in rows]))


def timeline(*transfers: tuple[int, str | None]) -> Timeline:
    times, kinds = zip(*transfers, strict=True)
    return Timeline([0, 100], [Phase.FORWARD, Phase.BACKWARD], transfer_ns=times, transfer=kinds)


def at(books: Any, allocator: Any, events: int) -> dict[str, int]:
    assert sum(books.categories_at(events).values()) == allocator[events]
    return books.roles_at(events)


def test_what_is_born_in_a_transfer_is_communication_and_what_an_owner_claims_is_his():
    rows = [(1, 0xA0, 10), (5, 0xB0, 20), (6, 0xC0, 40), (7, 0xB0, -20), (9, 0xD0, 80), (110, 0xA0, -10)]
    claims = Claims.of([(8, 0xC0, 40, 0)], [GRADIENT])
    times = timeline((4, "all_gather"), (8, None))
    books, allocator = keep_books(recording(rows), claims, times)
    assert at(books, allocator, 3) == {
        "activations/other": 10,
        "communication/all_gather": 20,
        "gradients/trainable": 40,
    }
    assert at(books, allocator, 6) == {"activations/other": 80, "gradients/trainable": 40}


def test_the_innermost_transfer_names_it():
    rows = [(5, 0xA0, 1), (15, 0xB0, 2), (25, 0xC0, 4), (35, 0xA0, -1), (36, 0xB0, -2), (37, 0xC0, -4)]
    times = timeline((1, "reduce_scatter"), (10, "all_gather"), (20, "reduce_scatter"), (30, None))
    books, allocator = keep_books(recording(rows), Claims.of([], []), times)
    assert at(books, allocator, 3) == {"communication/reduce_scatter": 5, "communication/all_gather": 2}


def test_scratch_whose_end_no_one_saw_ends_with_its_transfer():
    rows = [(5, 0xA0, 100), (6, 0xB0, 7), (20, 0xC0, 1), (30, 0xB0, -7)]
    times = timeline((4, "reduce_scatter"), (10, None))
    books, allocator = keep_books(recording(rows), Claims.of([], []), times)
    assert at(books, allocator, 2) == {"communication/reduce_scatter": 107}
    assert int(allocator[3]) == 7  # an event more than were recorded: the end that was filled in
    assert int(allocator[-1]) == books.ledger.level[-1] == 1


def test_scratch_whose_address_is_given_out_again_is_not_counted_twice():
    rows = [(5, 0xA0, 100), (20, 0xA0, 60), (30, 0xA0, -60)]
    books, allocator = keep_books(recording(rows), Claims.of([], []), timeline((4, "all_gather"), (10, None)))
    assert allocator.tolist() == books.ledger.level.tolist() == [0, 100, 0, 60, 0]


def test_what_another_thread_freed_ends_where_its_address_is_given_out_again():
    rows = [(5, 0xA0, 100), (20, 0xA0, 60), (30, 0xA0, -60)]
    books, allocator = keep_books(recording(rows), Claims.of([], []), Timeline([0], [Phase.FORWARD]))
    assert allocator.tolist() == books.ledger.level.tolist() == [0, 100, 60, 0]


@pytest.mark.parametrize(("kind", "claimed"), [("buckets", False), ("all_gather", True)])
def test_buckets_stay_and_so_does_what_somebody_claims(kind, claimed):
    claims = Claims.of([(50, 0xA0, 100, 0)] if claimed else [], [BUCKET])
    books, allocator = keep_books(recording([(5, 0xA0, 100)]), claims, timeline((4, kind), (10, None)))
    assert allocator.tolist() == [0, 100]
    assert books.categories_at(1)[Category.COMMUNICATION] == 100


@pytest.mark.parametrize("sizes", [(900, 600), (1500,), (700, 500, 300)])
def test_what_ranks_tell_each_other_of_new_buckets_is_over_when_the_first_is_made(sizes):
    rows = [(5, 0xA0, 8), *((6 + place, 0xB0 + place, size) for place, size in enumerate(sizes)), (30, 0xF0, 1)]
    claims = Claims.of([(1, NOWHERE, 1000, 0), (1, NOWHERE - 1, 500, 0)], [BUCKET])
    books, allocator = keep_books(recording(rows), claims, timeline((4, "buckets"), (20, None)))
    told = [level - 1500 for level in allocator.tolist()]  # less the old ones
    assert told == [0, 8, 0, *np.cumsum(sizes).tolist(), 1501]
    assert allocator.tolist() == books.ledger.level.tolist()


def test_buckets_whose_bytes_are_not_those_of_the_old_ones_stay_with_all_beside_them():
    claims = Claims.of([(1, NOWHERE, 1000, 0)], [BUCKET])
    _, allocator = keep_books(recording([(5, 0xA0, 8), (6, 0xB0, 900)]), claims, timeline((4, "buckets"), (20, None)))
    assert allocator.tolist() == [1000, 1008, 1908]


def test_without_transfers_what_is_never_freed_is_there_at_the_end():
    books, allocator = keep_books(recording([(5, 0xA0, 100)]), Claims.of([], []), Timeline([0], [Phase.FORWARD]))
    assert allocator.tolist() == [0, 100]
    assert books.categories_at(1)[Category.UNATTRIBUTED] == 100


def test_a_bucket_of_which_only_the_size_is_known_is_baseline_on_the_cpu():
    claims = Claims.of([(0, NOWHERE, 300, 0), (0, NOWHERE - 2**48, 50, 0)], [BUCKET])
    books, allocator = keep_books(recording([(5, 0xA0, 10), (6, 0xA0, -10)]), claims, Timeline([0], [Phase.FORWARD]))
    assert allocator.tolist() == [350, 360, 350]
    assert books.categories_at(0)[Category.COMMUNICATION] == 350


def test_where_the_allocator_lists_its_blocks_a_bucket_is_the_smallest_that_fits_and_is_nobodys():
    mib = 2**20
    held = {0x1000000: 25 * mib, 0x4000000: 25 * mib + 512, 0x8000000: 26 * mib + 512, 0xC000000: 3 * mib}
    held[0x10000000] = 25 * mib + 1024
    ledger = Ledger.of(Events.of([5], [0xF000000], [8]), list(held), list(held.values()))
    rows = [(1, 0x1000000, 25 * mib, 0), (1, NOWHERE, 25 * mib, 1), (1, NOWHERE - 2**48, 5 * mib, 1)]
    whole = WholeRecording(ledger, None, sum(held.values()) + 8, 0)
    books, _ = keep_books(whole, Claims.of(rows, [GRADIENT, BUCKET]), Timeline([0], [Phase.FORWARD]))
    assert books.categories_at(0)[Category.GRADIENTS] == 25 * mib
    assert books.categories_at(0)[Category.COMMUNICATION] == 25 * mib + 512
    assert books.categories_at(0)[Category.UNATTRIBUTED] == 54 * mib + 1536


@pytest.fixture
def watched(monkeypatch):
    """A module with something to watch, and a watch of it alone."""
    module: Any = types.ModuleType("something_sharded")

    class Group:
        def unshard(self, size: int) -> int:
            if size < 0:
                raise ValueError(size)
            return 2 * size

    module.Group, module.reduce = Group, lambda state: state
    monkeypatch.setitem(sys.modules, "something_sharded", module)
    places = [
        collectives._Place("something_sharded", "Group.unshard", "all_gather"),
        collectives._Place("something_sharded", "reduce", "reduce_scatter"),
        collectives._Place("something_sharded", "Group.gone_in_the_next_version", "all_gather"),
        collectives._Place("never_imported", "Group.unshard", "all_gather"),
    ]
    monkeypatch.setattr(collectives, "_PLACES", places)
    return module, CollectiveWatch()


def test_a_watch_tells_of_both_ends_and_leaves_nothing_behind(watched):
    module, watch = watched
    originals = module.Group.unshard, module.reduce
    heard: list[tuple] = []

    def listener(begins: bool, detail: str, subject: Any) -> None:
        heard.append((begins, detail, subject))

    watch.add(listener)
    group = module.Group()
    assert group.unshard(21) == 42
    assert module.reduce("state") == "state"
    with pytest.raises(ValueError, match="-1"):
        group.unshard(-1)
    watch.remove(listener)
    watch.remove(listener)
    assert (module.Group.unshard, module.reduce) == originals
    group.unshard(1)
    both = [(True, "all_gather", group), (False, "all_gather", group)]
    assert heard == [*both, (True, "reduce_scatter", "state"), (False, "reduce_scatter", "state"), *both]


def test_what_somebody_else_has_wrapped_meanwhile_is_left_to_him(watched):
    module, watch = watched
    heard: list[bool] = []

    def listener(begins: bool, detail: str, subject: Any) -> None:
        heard.append(begins)

    watch.add(listener)
    ours = module.reduce
    module.reduce = theirs = lambda state: ours(state)
    watch.remove(listener)
    assert module.reduce is theirs
    assert module.reduce(3) == 3
    assert heard == []


def test_every_watched_place_exists_in_the_installed_versions():
    from torch.distributed.fsdp import _flat_param, _runtime_utils  # noqa: F401

    for place in collectives._PLACES:
        if place.module.startswith("deepspeed"):
            continue
        owner: Any = sys.modules[place.module]
        for part in place.function.split("."):
            owner = getattr(owner, part)
        assert callable(owner), place


def test_the_torch_optimizer_is_found_inside_deepspeeds_and_accelerates():
    class Zero:  # DeepSpeed's optimizers are none of torch's
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    class Accelerated(torch.optim.SGD):
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    inner = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    assert inner_optimizer(Accelerated(Zero(inner))) is inner
    assert inner_optimizer(Accelerated(inner)) is inner
    assert inner_optimizer(inner) is inner
    assert inner_optimizer(None) is None
    foreign = Zero(None)
    assert inner_optimizer(foreign) is foreign


def test_the_wrappers_of_fsdp_1_are_no_part_of_a_name():
    assert module_name("_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp") == "model.layers.0.mlp"
    assert module_name("model.layers.0._checkpoint_wrapped_module.mlp") == "model.layers.0.mlp"
    assert module_name("_fsdp_wrapped_module") == ""
    assert module_name("model.fsdp_wrapped_modules") == "model.fsdp_wrapped_modules"
