"""A traced step as a snapshot pickle: read by PyTorch's own viewer, by our own reader, and held to what the JavaScript
viewer demands."""

from __future__ import annotations

import base64
import json
import pickle
import pickletools
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.cuda import _memory_viz
from typer.testing import CliRunner

from trl_memtrace import MemoryTracer, commands
from trl_memtrace.attribution import Books, Span, Timeline
from trl_memtrace.bookkeeping import step_record
from trl_memtrace.categories import Phase
from trl_memtrace.errors import MemtraceError
from trl_memtrace.ledger import Events, Ledger
from trl_memtrace.recorders.snapshot import read_history, read_snapshot
from trl_memtrace.records import RunHeader, dump_line
from trl_memtrace.reporters.memory_viz import lay_out, snapshot_of, write_memory_viz
from trl_memtrace.snapshot_summary import analyse
from trl_memtrace.step_books import StepBooks, peak_books_path

SHARED = Path(__file__).parents[2] / "shared" / "fixtures" / "cuda_snapshots" / "toy.pickle"

UNDERSTOOD = {
    *("PROTO", "APPEND", "APPENDS", "LIST", "TUPLE", "NEWFALSE", "NEWTRUE", "NONE", "BINGET", "BININT", "BININT1"),
    *("BININT2", "EMPTY_DICT", "EMPTY_LIST", "FRAME", "LONG1", "LONG_BINGET", "MARK", "MEMOIZE", "BINPUT"),
    *("LONG_BINPUT", "SETITEMS", "SETITEM", "DICT", "SHORT_BINUNICODE", "BINUNICODE", "STOP", "EMPTY_TUPLE"),
    *("TUPLE1", "TUPLE2", "TUPLE3", "BINFLOAT"),
}
"""The opcodes that the unpickler in torch/utils/viz/MemoryViz.js knows."""


def trained() -> tuple[StepBooks, MemoryTracer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 300), nn.ReLU(), nn.Linear(300, 7))
    optimizer = torch.optim.AdamW(model.parameters())
    tracer = MemoryTracer(model, optimizer)
    for rows in (13, 31):
        batch = torch.randn(rows, 100)
        with tracer.step():
            model(batch).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    tracer.close()
    assert tracer.peak_books is not None
    return tracer.peak_books, tracer


@pytest.fixture(scope="module")
def step() -> StepBooks:
    return trained()[0]


@pytest.fixture(scope="module")
def pickled(step: StepBooks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("viz") / "step.pickle"
    write_memory_viz(step, file)
    return file


@pytest.fixture(scope="module")
def data(pickled: Path) -> dict[str, Any]:
    return pickle.loads(pickled.read_bytes())


def replayed(data: dict[str, Any]) -> list[dict[int, tuple[int, str]]]:
    """What is alive after each entry of the history: size and category by address, asserted to never overlap."""
    alive: dict[int, tuple[int, str]] = {}
    moments = []
    for entry in data["device_traces"][0]:
        if entry["action"] == "alloc":
            start, end = entry["addr"], entry["addr"] + entry["size"]
            assert all(other + size <= start or end <= other for other, (size, _) in alive.items())
            alive[start] = entry["size"], entry["category"]
        elif entry["action"] == "free_completed":
            assert alive.pop(entry["addr"])[0] == entry["size"]
        moments.append(dict(alive))
    return moments


def held(moment: dict[int, tuple[int, str]]) -> int:
    return sum(size for size, _ in moment.values())


def test_the_history_reaches_the_steps_peak_with_its_categories() -> None:
    step, tracer = trained()
    moments = replayed(snapshot_of(step))
    peak = max(moments, key=held)
    record = tracer.run.peak
    assert held(peak) == record.bytes == step.peak_bytes
    categories: Counter[str] = Counter()
    for size, category in peak.values():
        categories[category] += size
    assert dict(categories) == {name: size for name, size in record.categories.items() if size}


def test_our_own_reader_finds_the_same_peak_to_the_byte(pickled: Path, step: StepBooks) -> None:
    history = read_history(read_snapshot(pickled), 0)
    assert int(history.ledger.level.max()) == step.peak_bytes
    assert history.warnings == ()
    assert history.end_bytes == int(step.books.ledger.level[-1])
    assert any(size % 512 for size in history.ledger.size.tolist())  # a size that rounding would have changed


def test_sizes_of_pytorchs_own_snapshots_are_rounded_as_before(data: dict[str, Any], tmp_path: Path) -> None:
    theirs = {key: value for key, value in data.items() if key != "trl_memtrace_exact_sizes"}
    file = tmp_path / "theirs.pickle"
    file.write_bytes(pickle.dumps(theirs))
    ledger = read_history(read_snapshot(file), 0).ledger
    assert all(size % 512 == 0 for size in ledger.size[ledger.died < 10**9].tolist())


def test_pytorchs_own_viewer_reads_it(data: dict[str, Any]) -> None:
    for page in (_memory_viz.trace_plot(data), _memory_viz.segment_plot(data)):
        (embedded,) = re.findall(r'"base64": "([^"]+)"', page)
        assert pickle.loads(base64.b64decode(embedded)) == data
    flames = _memory_viz.memory(data, format_flamegraph=lambda lines: lines).splitlines()
    active = [line.rsplit(" ", 1) for line in flames if ";active_allocated;" in line]
    total = sum(int(size) for _, size in active)
    assert total == data["segments"][0]["allocated_size"] > 0
    weights = sum(int(size) for stack, size in active if ";category:0:weights;" in stack)
    assert weights == 4 * (100 * 300 + 300 + 300 * 7 + 7)
    assert any("there before the step;2:0:weights/trainable" in stack for stack, _ in active)
    assert f"total_allocated: {_memory_viz.Bytes(total)!r}" in _memory_viz.segsum(data)
    assert _memory_viz.trace(data).startswith("Device 0 ----------------\n")
    filtered = _memory_viz.filter_alloc_free_pairs(pickle.loads(pickle.dumps(data)))
    assert sum(entry["size"] for entry in filtered["device_traces"][0] if entry["action"] == "alloc") == total


def test_the_pickle_names_no_class_and_keeps_to_the_opcodes_that_the_web_viewer_knows(pickled: Path) -> None:
    content = pickled.read_bytes()
    assert {opcode.name for opcode, _, _ in pickletools.genops(content)} <= UNDERSTOOD
    assert content[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04")


def test_the_web_viewer_finds_what_it_looks_for(data: dict[str, Any]) -> None:
    """What MemoryViz.js reads without asking whether it is there."""
    (segment,) = data["segments"]
    (trace,) = data["device_traces"]
    categories = {entry["category"] for entry in trace if "category" in entry}
    assert "unknown" in categories  # else annotate_snapshot fails
    place = segment["address"]
    for block in segment["blocks"]:  # addresses are counted up from the segment's
        assert block["address"] == place
        place += block["size"]
    assert place == segment["address"] + segment["total_size"]
    end = replayed(data)[-1]
    active = {block["address"]: block["size"] for block in segment["blocks"] if block["state"] == "active_allocated"}
    assert active == {address: size for address, (size, _) in end.items()}
    for entry in trace:
        assert all(set(frame) == {"filename", "line", "name"} for frame in entry["frames"])
        if entry["action"] != "snapshot":
            assert segment["address"] <= entry["addr"]
            assert entry["addr"] + entry["size"] <= place
    assert [entry["time_us"] for entry in trace] == sorted(entry["time_us"] for entry in trace)


def test_every_block_says_whose_it_is(data: dict[str, Any]) -> None:
    stacks = Counter(
        (*(frame["name"] for frame in entry["frames"]), entry["frames"][0]["filename"])
        for entry in data["device_traces"][0]
        if entry["action"] == "alloc"
    )
    assert stacks["weights/trainable", "there before the step", "weights", "0"] == 2
    assert stacks["optimizer_states/exp_avg", "there before the step", "optimizer_states", "2"] == 2
    assert stacks["gradients/trainable", "made in backward", "gradients", "0"] == 2
    assert any(made == "made in forward" for _, made, _, _ in stacks)
    for entry in data["device_traces"][0]:
        if entry["action"] == "alloc":
            assert entry["frames"][-1] == {"filename": "category", "line": 0, "name": entry["category"]}


def test_phases_are_annotated(data: dict[str, Any]) -> None:
    rows = data["external_annotations"]
    names = [row["name"] for row in rows if row["stage"] == "START"]
    assert [name for name in names if name != "idle"][:3] == ["forward", "loss", "backward"]
    open_name = None
    for row in rows:
        assert (open_name is None) == (row["stage"] == "START")
        open_name = row["name"] if row["stage"] == "START" else None


ledgers = st.builds(
    lambda events, before: ledger_of(events, before),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=60),
    st.dictionaries(st.integers(0, 6), st.integers(1, 9), max_size=4),
)


def ledger_of(events: list[tuple[int, int]], before: dict[int, int]) -> Ledger:
    """Whatever a ledger can hold: allocations at addresses that are held, frees of nothing, blocks of no bytes. A size
    of 0 is a free."""
    live = dict(before)
    signed = []
    for address, size in events:
        signed.append(size if size else -live.get(address, 0))
        live[address] = size
    columns = Events.of(range(len(events)), [address for address, _ in events], signed)
    return Ledger.of(columns, list(before), list(before.values()))


def step_of(ledger: Ledger) -> StepBooks:
    code = np.zeros(len(ledger.size), np.int64)
    books = Books(ledger, (Span(Phase.IDLE, 0, len(ledger.time_ns)),), code, code, code, ("weights/frozen",), ("",))
    return StepBooks(1, books, ledger.level, Timeline([], []))


@settings(deadline=None)
@given(ledgers)
def test_no_two_blocks_that_are_alive_together_overlap(ledger: Ledger) -> None:
    address, total = lay_out(ledger)
    for instant in range(len(ledger.level)):
        alive = np.flatnonzero(ledger.alive(instant) & (ledger.size > 0))
        spans = sorted((int(address[block]), int(ledger.size[block])) for block in alive)
        assert all(start + size <= following for (start, size), (following, _) in pairwise(spans))
        assert not spans or spans[-1][0] + spans[-1][1] <= (1 << 30) + total


@settings(deadline=None)
@given(ledgers)
def test_the_history_of_whatever_ledger_never_stands_higher_than_it(ledger: Ledger) -> None:
    moments = replayed(snapshot_of(step_of(ledger)))
    assert max(map(held, moments)) == int(ledger.level.max())
    assert held(moments[-1]) == int(ledger.level[-1])


@pytest.mark.parametrize(
    ("events", "places", "total"),
    [
        ([(1, 10), (2, 20), (1, -10), (3, 7), (4, 3)], [0, 10, 0, 7], 30),
        ([(1, 10), (2, 10), (3, 1), (1, -10), (2, -10), (4, 20)], [0, 10, 20, 0], 21),
        ([(1, 10), (2, 10), (3, 1), (2, -10), (1, -10), (4, 20)], [0, 10, 20, 0], 21),
        ([(1, 9), (2, 1), (3, 5), (4, 1), (1, -9), (3, -5), (5, 4)], [0, 9, 10, 15, 10], 16),
    ],
)
def test_gaps_are_joined_and_used_again_the_smallest_that_fits_first(events, places, total) -> None:
    addresses, sizes = zip(*events, strict=True)
    address, size = lay_out(Ledger.of(Events.of(range(len(events)), addresses, sizes)))
    assert ((address - (1 << 30)).tolist(), size) == (places, total)


@pytest.mark.skipif(not SHARED.is_file(), reason="the real snapshots are not here")
def test_a_snapshot_of_somebody_elses_comes_back_with_categories(tmp_path: Path) -> None:
    analysis = analyse(read_snapshot(SHARED))
    timeline = Timeline([0], [analysis.books.spans[0].phase])
    step = StepBooks(1, analysis.books, analysis.books.ledger.level, timeline)
    write_memory_viz(step, tmp_path / "again.pickle")
    data = pickle.loads((tmp_path / "again.pickle").read_bytes())
    assert max(map(held, replayed(data))) == analysis.summary.peak.bytes
    assert json.dumps(data)  # plain data through and through


def report(*arguments: object) -> Any:
    return CliRunner().invoke(commands.app, ["report", *map(str, arguments)])


@pytest.fixture(scope="module")
def recorded(step: StepBooks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "memtrace"
    record = folder / "rank-00000.jsonl"
    record.parent.mkdir()
    lines = [RunHeader().to_json(), step_record(2, step.books, step.allocator, 0.1).to_json()]
    record.write_text("".join(map(dump_line, lines)))
    step.save(peak_books_path(record))
    return folder


def test_the_report_command_writes_both_and_no_page(recorded: Path, tmp_path: Path, step: StepBooks) -> None:
    viz, trace = tmp_path / "a.pickle", tmp_path / "a\x1b[31m.json"
    result = report(recorded, "--memory-viz", viz, "--perfetto", trace)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert int(read_history(read_snapshot(viz), 0).ledger.level.max()) == step.peak_bytes
    counters = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "C"]
    assert max(event["args"]["bytes"] for event in counters) == step.peak_bytes
    assert sorted(path.name for path in recorded.iterdir()) == ["rank-00000.jsonl", "rank-00000.peak.npz"]
    summary = json.loads(report(recorded, "--memory-viz", viz, "--json").stdout)
    assert summary["peak"]["bytes"] == step.peak_bytes


def test_a_record_without_books_and_a_place_that_cannot_be_written_are_told(recorded: Path, tmp_path: Path) -> None:
    alone = tmp_path / "rank-00000.jsonl"
    alone.write_text((recorded / "rank-00000.jsonl").read_text())
    for option in ("--memory-viz", "--perfetto"):
        with pytest.raises(MemtraceError, match="no books of its peak step"):
            raise report(alone, option, tmp_path / "x").exception
        with pytest.raises(MemtraceError, match=r"cannot write .*/nowhere/x"):
            raise report(recorded, option, tmp_path / "nowhere" / "x").exception


@pytest.mark.skipif(not SHARED.is_file(), reason="the real snapshots are not here")
def test_a_snapshot_can_be_written_again_with_categories(tmp_path: Path) -> None:
    result = report(SHARED, "--memory-viz", tmp_path / "b.pickle", "--perfetto", tmp_path / "b.json")
    assert result.exit_code == 0, result.output
    data = pickle.loads((tmp_path / "b.pickle").read_bytes())
    assert {"activations", "gradients"} <= {entry.get("category") for entry in data["device_traces"][0]}
    slices = [event for event in json.loads((tmp_path / "b.json").read_text())["traceEvents"] if event["ph"] == "X"]
    assert {"forward", "backward"} & {event["name"] for event in slices}
