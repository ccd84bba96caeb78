"""A traced step as a Chrome trace, held to the trace event format by checks written from its description."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trl_memtrace import MemoryTracer
from trl_memtrace.categories import CATEGORIES
from trl_memtrace.reporters.perfetto import write_perfetto
from trl_memtrace.step_books import StepBooks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(40, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.inner(self.inner(x)))


@pytest.fixture(scope="module")
def tracer() -> MemoryTracer:
    model = nn.Sequential(nn.Linear(50, 40), Block(), nn.Linear(40, 1))
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    tracer = MemoryTracer(model, optimizer)
    for rows in (11, 23):
        batch = torch.randn(rows, 50)
        with tracer.step():
            model(batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    tracer.close()
    return tracer


@pytest.fixture(scope="module")
def step(tracer: MemoryTracer) -> StepBooks:
    assert tracer.peak_books is not None
    return tracer.peak_books


@pytest.fixture(scope="module")
def trace(step: StepBooks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("trace") / "step.json"
    write_perfetto(step, file, name="my run")
    return json.loads(file.read_text())


def events(trace: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == kind]


NEEDED = {
    "M": {"pid": int, "tid": int, "name": str, "args": dict},
    "X": {"pid": int, "tid": int, "name": str, "cat": str, "ts": float, "dur": float},
    "C": {"pid": int, "name": str, "ts": float, "args": dict},
    "i": {"pid": int, "tid": int, "name": str, "ts": float, "s": str},
}


def test_every_event_has_what_its_kind_needs(trace: dict[str, Any]) -> None:
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    assert {event["ph"] for event in trace["traceEvents"]} == set(NEEDED)
    for event in trace["traceEvents"]:
        for key, kind in NEEDED[event["ph"]].items():
            assert isinstance(event[key], kind), (event, key)
        assert event.get("ts", 0) >= 0
        assert event.get("dur", 0) >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())
        if event["ph"] == "i":
            assert event["s"] in ("g", "p", "t")
    named = {event["tid"] for event in events(trace, "M") if event["name"] == "thread_name"}
    assert {event["tid"] for event in events(trace, "X")} <= named
    (process,) = (event for event in events(trace, "M") if event["name"] == "process_name")
    assert process["args"]["name"] == "my run step 2"


def test_slices_of_a_thread_nest(trace: dict[str, Any]) -> None:
    for thread in {event["tid"] for event in events(trace, "X")}:
        slices = sorted(
            ((event["ts"], event["ts"] + event["dur"]) for event in events(trace, "X") if event["tid"] == thread),
            key=lambda row: (row[0], -row[1]),
        )
        stack: list[float] = []
        for start, end in slices:
            while stack and stack[-1] <= start + 1e-6:
                stack.pop()
            assert not stack or end <= stack[-1] + 1e-6
            stack.append(end)


def tracks(trace: dict[str, Any]) -> dict[str, list[tuple[float, int]]]:
    found: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for event in events(trace, "C"):
        found[event["name"]].append((event["ts"], event["args"]["bytes"]))
    return found


def test_the_tracks_add_up_to_the_whole_at_every_moment(trace: dict[str, Any]) -> None:
    found = tracks(trace)
    whole = found.pop("allocated")
    assert set(found) <= {category.value for category in CATEGORIES}
    assert {"weights", "gradients", "optimizer_states", "activations"} <= set(found)
    for track in (whole, *found.values()):
        assert [when for when, _ in track] == sorted(when for when, _ in track)
        assert all(one != two for (_, one), (_, two) in pairwise(track))

    def at(track: list[tuple[float, int]], when: float) -> int:
        return next((size for stamp, size in reversed(track) if stamp <= when), 0)

    moments = sorted({when for when, _ in whole})
    for when in moments:
        assert sum(at(track, when) for track in found.values()) == at(whole, when)


def test_the_highest_is_the_steps_peak_and_is_marked(trace: dict[str, Any], tracer: MemoryTracer) -> None:
    whole = tracks(trace)["allocated"]
    peak = tracer.run.peak
    assert max(size for _, size in whole) == peak.bytes
    (mark,) = events(trace, "i")
    assert mark["args"] == {"bytes": peak.bytes}
    assert (mark["ts"], peak.bytes) in whole
    inside = [
        event["name"]
        for event in events(trace, "X")
        if event["cat"] == "phase" and event["ts"] <= mark["ts"] <= event["ts"] + event["dur"]
    ]
    assert peak.phase in inside


def test_what_no_block_explains_is_unattributed(step: StepBooks, tmp_path: Path) -> None:
    write_perfetto(replace(step, allocator=step.allocator + 12345), tmp_path / "a.json")
    found = tracks(json.loads((tmp_path / "a.json").read_text()))
    assert {size for _, size in found["unattributed"]} == {12345}
    assert max(size for _, size in found["allocated"]) == step.peak_bytes + 12345


def test_phases_and_modules_are_the_steps_own(trace: dict[str, Any], step: StepBooks) -> None:
    slices = [event for event in events(trace, "X") if event["cat"] == "phase"]
    names = [event["name"] for event in slices]
    assert [name for name in names if name != "idle"] == ["forward", "loss", "backward", "optimizer", "optimizer"]
    for one, two in pairwise(slices):
        assert one["ts"] + one["dur"] == pytest.approx(two["ts"], abs=1e-3)
    modules = sorted((event for event in events(trace, "X") if event["cat"] == "module"), key=lambda row: row["ts"])
    assert [event["name"] for event in modules] == ["(model)", "0", "1", "1.inner", "1.inner", "2"]
    block, *inner = modules[2:5]
    for event in inner:
        assert block["ts"] < event["ts"] < event["ts"] + event["dur"] < block["ts"] + block["dur"]
    assert inner[0]["ts"] + inner[0]["dur"] <= inner[1]["ts"]
    forward = slices[0]
    assert forward["ts"] <= modules[0]["ts"]
    assert modules[-1]["ts"] + modules[-1]["dur"] <= forward["ts"] + forward["dur"]


def test_times_are_microseconds_and_a_clock_that_counts_can_be_stretched(step: StepBooks, tmp_path: Path) -> None:
    write_perfetto(step, tmp_path / "a.json")
    write_perfetto(step, tmp_path / "b.json", tick_ns=1000)
    ends = [
        max(event["ts"] for event in json.loads((tmp_path / name).read_text())["traceEvents"] if "ts" in event)
        for name in ("a.json", "b.json")
    ]
    first = min(int(step.books.ledger.time_ns[0]), step.timeline.phase_ns[0])
    assert ends[0] == pytest.approx((int(step.books.ledger.time_ns[-1]) - first) / 1000, rel=1e-9)
    assert ends[1] == pytest.approx(1000 * ends[0], rel=1e-9)


def test_names_are_json(step: StepBooks, tmp_path: Path) -> None:
    hostile = 'evil"\x1b[2J\u202e\ud800</script>'
    write_perfetto(step, tmp_path / "a.json", name=hostile)
    text = (tmp_path / "a.json").read_text()
    assert "\x1b" not in text
    assert json.loads(text)["traceEvents"][0]["args"]["name"] == f"{hostile} step 2"
