"""All ranks of a run, read from files written by hand."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from trl_memtrace import RecordError
from trl_memtrace.ranks import SAME_START_SECONDS, Ranks, wait_for_ends
from trl_memtrace.reading import read
from trl_memtrace.reporters.ranks_text import print_ranks
from trl_memtrace.sinks.metrics import ranks_metrics

CATEGORIES = (
    "weights",
    "gradients",
    "optimizer_states",
    "activations",
    "inputs",
    "temporaries",
    "communication",
    "unattributed",
)
GIB = 2**30


def step(number: int, weights: int, activations: int) -> dict:
    held = {**dict.fromkeys(CATEGORIES, 0), "weights": weights, "activations": activations}
    total = weights + activations
    phase = {"peak_bytes": total, "end_bytes": total, "at_peak": held, "at_end": held}
    peak = {"phase": "backward", "bytes": total, "allocator_bytes": total, "categories": held}
    return {
        **{"record": "step", "step": number, "traced": True, "phases": {"backward": phase}},
        **{"peak": {**peak, "roles": {}, "modules": {}}, "reserved_bytes": None, "seconds": 1.0},
    }


def write(
    folder: Path, rank: int, world_size: int, *levels: tuple[int, int], ended: bool = True, started: float = 1000.0
) -> Path:
    trainer = {"world_size": world_size, "rank": rank, "strategy": "fsdp2", "started": started}
    rows: list[dict] = [{"record": "run", "schema": 1, "trainer": trainer}]
    rows += [step(number + 1, *held) for number, held in enumerate(levels)]
    rows += [{"record": "summary", "schema": 1}] if ended else []
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"rank-{rank:05d}.jsonl"
    file.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
    return file


def shown(ranks: Ranks) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    print_ranks(ranks, console)
    return console.export_text()


def test_the_spread_says_which_rank_holds_least_and_which_most(tmp_path):
    write(tmp_path, 0, 3, (10, 5), (10, 30))
    write(tmp_path, 1, 3, (10, 90), (10, 20))
    write(tmp_path, 2, 3, (20, 20))
    ranks = Ranks.load(tmp_path)
    rows = {row.what: (row.least, row.least_rank, row.most, row.most_rank) for row in ranks.spread}
    assert rows == {"peak": (40, 0, 100, 1), "weights": (10, 0, 20, 2), "activations": (20, 2, 90, 1)}
    assert ranks.spread[0].uneven == 0.6
    assert (ranks.missing, ranks.unfinished, ranks.notes()) == ((), (), [])
    assert "3 ranks (fsdp2)" in shown(ranks)
    assert "60.0%" in shown(ranks)


def test_a_rank_without_a_record_is_missing_and_one_without_an_end_unfinished(tmp_path):
    write(tmp_path / "memtrace", 0, 4, (10, 5))
    write(tmp_path / "memtrace", 1, 4, (10, 5), (10, 6), ended=False)
    torn = write(tmp_path / "memtrace", 2, 4, (10, 5), ended=False)
    torn.write_text(torn.read_text()[:-30])
    ranks = Ranks.load(tmp_path)
    assert ranks.missing == (3,)
    assert ranks.unfinished == (1, 2)
    notes = [
        "Rank 3 of 4 is missing: it left no record.",
        "Rank 1 of 4 did not finish: its record ends with step 2.",
        "Rank 2 of 4 did not finish: its record ends before the first step.",
    ]
    assert ranks.notes() == notes
    for note in notes:
        assert note in shown(ranks)
    assert set(notes) <= set(read(tmp_path).warnings)
    assert ranks.to_json()["missing"] == [3]
    assert ranks.to_json()["unfinished"] == [1, 2]


def test_rank_0_may_be_the_one_that_is_missing(tmp_path):
    write(tmp_path, 1, 2, (10, 5))
    assert Ranks.load(tmp_path).missing == (0,)
    with pytest.raises(RecordError, match="no record at"):
        Ranks.load(tmp_path / "nothing")


def test_what_an_earlier_run_left_is_not_this_ones(tmp_path):
    write(tmp_path, 0, 2, (10, 5), started=5000.0)
    write(tmp_path, 1, 2, (10, 99), started=5000.0 - SAME_START_SECONDS - 1)  # the same ranks, an hour ago
    write(tmp_path, 3, 4, (10, 99), started=5000.0)  # more ranks
    ranks = Ranks.load(tmp_path)
    assert (sorted(ranks.runs), ranks.missing, ranks.world_size) == ([0], (1,), 2)
    assert [run.rank for run in read(tmp_path).runs] == [0]
    write(tmp_path, 1, 2, (10, 99), started=5000.0 + 30)
    assert Ranks.load(tmp_path).missing == ()


def test_waiting_ends_with_the_records_and_never_lasts(tmp_path):
    write(tmp_path, 1, 3, (10, 5))
    began = time.monotonic()
    wait_for_ends(tmp_path, [1], 30.0)
    assert time.monotonic() - began < 5.0
    write(tmp_path, 2, 3, (10, 5), ended=False)
    began = time.monotonic()
    wait_for_ends(tmp_path, [1, 2, 3], 0.3)
    assert 0.3 <= time.monotonic() - began < 5.0
    began = time.monotonic()
    wait_for_ends(tmp_path, [2, 3], 0.0)
    assert time.monotonic() - began < 0.2


def test_a_single_rank_has_no_table(tmp_path):
    write(tmp_path, 0, 1, (10, 5))
    assert shown(Ranks.load(tmp_path)) == ""
    assert read(tmp_path).warnings == ()


def test_metrics_name_the_ranks(tmp_path):
    write(tmp_path, 0, 3, (GIB, 2 * GIB))
    write(tmp_path, 1, 3, (GIB, 5 * GIB), ended=False)
    metrics = ranks_metrics(Ranks.load(tmp_path))
    assert metrics["memory/ranks/peak/min_gib"] == 3.0
    assert metrics["memory/ranks/peak/max_gib"] == 6.0
    assert (metrics["memory/ranks/peak/min_rank"], metrics["memory/ranks/peak/max_rank"]) == (0, 1)
    assert metrics["memory/ranks/peak/uneven"] == 0.5
    assert metrics["memory/ranks/weights/uneven"] == 0.0
    assert (metrics["memory/ranks/missing"], metrics["memory/ranks/unfinished"]) == ("2", "1")
    assert metrics["memory/ranks/world_size"] == 3


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=6))
def test_the_spread_bounds_every_rank(tmp_path_factory, peaks):
    folder = tmp_path_factory.mktemp("ranks")
    for rank, peak in enumerate(peaks):
        write(folder, rank, len(peaks), (peak, 0))
    spread = [row for row in Ranks.load(folder).spread if row.what == "peak"]
    if not any(peaks):
        assert spread == []
        return
    (row,) = spread
    assert (row.least, row.most) == (min(peaks), max(peaks))
    assert (row.least_rank, row.most_rank) == (int(np.argmin(peaks)), int(np.argmax(peaks)))
    assert 0.0 <= row.uneven <= 1.0
