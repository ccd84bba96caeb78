"""Snapshot files: real ones by other people, made ones, and hostile ones."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_memtrace.errors import MemtraceError
from trl_memtrace.recorders.snapshot import SnapshotError, read_snapshot
from trl_memtrace.snapshot_summary import analyse

SHARED = Path(__file__).parents[2] / "shared" / "fixtures" / "cuda_snapshots"
REAL = SHARED / "transformer_fullstep.pickle"
GIB = 1024**3
real = pytest.mark.skipif(not REAL.is_file(), reason="the real snapshots are not here")

FORWARD = [{"name": "_call_impl", "filename": "/x/torch/nn/modules/module.py", "line": 1}]
ENGINE = [{"name": "torch::autograd::Engine::evaluate_function(...)", "filename": "??", "line": 0}]
OPTIMIZER = [
    {"name": "step", "filename": "/home/me/adam.py", "line": 7},
    {"name": "wrapper", "filename": "/x/torch/optim/optimizer.py", "line": 1},
]
MAIN = [{"name": "<module>", "filename": "/home/me/train.py", "line": 3}]


class Made:
    """A snapshot made event by event, beside a count of our own."""

    def __init__(self) -> None:
        self.trace: list[dict] = []
        self.live: dict[int, int] = {}
        self.next = 1 << 30
        self.clock = 1_000_000

    def there_before(self, size: int) -> int:
        address, self.next = self.next, self.next + size
        self.live[address] = size
        return address

    def alloc(self, size: int, frames: list) -> int:
        address = self.there_before(size)
        self._add("alloc", address, size, frames)
        return address

    def free(self, address: int, frames: list) -> None:
        size = self.live.pop(address)
        self._add("free_requested", address, size, frames)
        self._add("free_completed", address, size, frames)

    def _add(self, action: str, address: int, size: int, frames: list) -> None:
        self.clock += 10
        entry = {"action": action, "addr": address, "size": size, "stream": 0, "time_us": self.clock, "frames": frames}
        self.trace.append(entry)

    def data(self, device: int = 0, **more) -> dict:
        segments = [
            {
                "device": device,
                "address": address,
                "total_size": size,
                "blocks": [{"address": address, "size": size, "state": "active_allocated"}],
            }
            for address, size in self.live.items()
        ]
        return {"segments": segments, "device_traces": [[] for _ in range(device)] + [self.trace], **more}

    def save(self, file: Path, **more) -> Path:
        file.write_bytes(pickle.dumps(self.data(**more)))
        return file


def one_step(forward=FORWARD, backward=ENGINE, optimizer=OPTIMIZER) -> tuple[Made, dict[str, int]]:
    """Two layers, one step; sizes of every kind tell them apart."""
    made = Made()
    made.there_before(512 * 1000)  # weights
    batch = made.alloc(512 * 3, MAIN)
    activations = [made.alloc(512 * 100, forward) for _ in range(2)]
    scratch = made.alloc(512 * 7, forward)
    made.free(scratch, forward)
    grads = []
    for activation in activations:
        temporary = made.alloc(512 * 30, backward)
        grads.append(made.alloc(512 * 500, backward))
        made.free(temporary, backward)
        made.free(activation, backward)
    states = [made.alloc(512 * 1000, optimizer) for _ in range(2)]
    scratch = made.alloc(512 * 40, optimizer)
    made.free(scratch, optimizer)
    made.free(batch, MAIN)
    assert len(states) == len(grads) == 2
    return made, {
        "weights": 512 * 1000,
        "gradients": 512 * 1000,
        "optimizer_states": 512 * 2000,
        "temporaries": 512 * 40,
    }


@pytest.mark.parametrize("backward", [ENGINE, []], ids=["C++ frames", "Python frames only"])
def test_every_kind_of_block_is_told_apart(tmp_path, backward):
    made, expected = one_step(backward=backward)
    analysis = analyse(read_snapshot(made.save(tmp_path / "made.pickle")))
    peak = analysis.summary.peak
    assert peak.phase == "optimizer"
    assert {name: size for name, size in peak.categories.items() if size} == {**expected, "activations": 512 * 3}
    assert peak.bytes == sum(peak.categories.values())
    forward = analysis.summary.worst.phases["forward"]
    assert forward.at_peak["activations"] == 512 * 203
    assert forward.at_peak["temporaries"] == 512 * 7
    backward_phase = analysis.summary.worst.phases["backward"]
    assert backward_phase.at_peak["gradients"] == 512 * 1000
    assert analysis.summary.worst.phases["optimizer"].end_bytes == analysis.history.end_bytes + 512 * 3
    assert analysis.history.warnings == ()


def test_annotations_name_the_optimizer_where_there_are_no_stacks(tmp_path):
    made, expected = one_step(forward=[], backward=[], optimizer=[])
    for entry in made.trace:
        entry["frames"] = []
    step = [entry["time_us"] for entry in made.trace if entry["size"] in (512 * 1000, 512 * 40)]
    annotations = [
        {"stage": "START", "name": "Optimizer.step#Adam.step", "time_us": min(step) - 1, "device": 0},
        {"stage": "END", "name": "Optimizer.step#Adam.step", "time_us": max(step) + 1, "device": 0},
    ]
    file = made.save(tmp_path / "made.pickle", external_annotations=annotations)
    peak = analyse(read_snapshot(file)).summary.peak
    assert peak.categories["weights"] == expected["weights"]
    assert peak.categories["optimizer_states"] == expected["optimizer_states"]
    assert peak.categories["temporaries"] == expected["temporaries"] + 512 * 3  # and the batch


def test_weights_loaded_within_the_history_are_weights(tmp_path):
    made = Made()
    load = [{"name": "_apply", "filename": "/x/torch/nn/modules/module.py", "line": 2}, *MAIN]
    made.alloc(512 * 9, load)
    activation = made.alloc(512 * 4, FORWARD)
    made.alloc(512 * 9, ENGINE)
    made.free(activation, ENGINE)
    end = analyse(read_snapshot(made.save(tmp_path / "made.pickle"))).summary.to_json()["end"]
    assert (end["categories"]["weights"], end["categories"]["gradients"]) == (512 * 9, 512 * 9)


def test_what_was_there_before_is_told_by_who_let_it_go(tmp_path):
    made = Made()
    weights, state, gradient, activation, batch = (made.there_before(512 * size) for size in (1, 2, 4, 8, 16))
    zero = [{"name": "zero_grad", "filename": "/x/torch/optim/optimizer.py", "line": 1}, *MAIN]
    made.free(gradient, zero)
    made.free(activation, ENGINE)
    made.alloc(512 * 2, OPTIMIZER)
    made.free(state, OPTIMIZER)
    made.free(batch, MAIN)
    analysis = analyse(read_snapshot(made.save(tmp_path / "made.pickle")))
    start = {kind.value: size // 512 for kind, size in analysis.books.categories_at(0).items() if size}
    expected = {"weights": 1, "optimizer_states": 2, "gradients": 4, "activations": 8, "unattributed": 16}
    assert start == expected
    assert weights


def test_a_forward_that_no_backward_follows_holds_activations(tmp_path):
    made = Made()
    made.alloc(512 * 5, FORWARD)
    made.free(made.alloc(512 * 3, FORWARD), FORWARD)
    end = analyse(read_snapshot(made.save(tmp_path / "made.pickle"))).summary.to_json()["end"]["categories"]
    assert end["activations"] == 512 * 5


def test_the_longest_history_is_taken_unless_a_device_is_named(tmp_path):
    made, _ = one_step()
    data = made.data(device=1)
    short = Made()
    short.alloc(512, MAIN)
    data["device_traces"][0] = short.trace
    data["segments"] += short.data()["segments"]
    file = tmp_path / "two.pickle"
    file.write_bytes(pickle.dumps(data))
    assert analyse(read_snapshot(file)).history.device == 1
    assert analyse(read_snapshot(file)).others == [0]
    assert analyse(read_snapshot(file), 0).summary.peak.bytes == 512
    with pytest.raises(SnapshotError, match="no history of device 5"):
        analyse(read_snapshot(file), 5)


def test_a_wrapped_ring_begins_in_the_middle(tmp_path):
    made, _ = one_step()
    whole = analyse(read_snapshot(made.save(tmp_path / "whole.pickle")))
    made.trace = made.trace[7:]
    cut = analyse(read_snapshot(made.save(tmp_path / "cut.pickle")))
    assert cut.history.ledger.level[-1] == whole.history.ledger.level[-1] == cut.history.end_bytes
    assert cut.summary.peak.bytes == whole.summary.peak.bytes
    assert cut.history.warnings == ()


def test_a_history_that_contradicts_itself_is_read_with_a_warning(tmp_path):
    made, _ = one_step()
    first = made.trace[0]
    made.trace.insert(5, {**first, "action": "free_requested", "addr": 77})
    made.trace.insert(6, {**first, "action": "free_requested", "addr": 77})
    made.trace += [
        "nonsense",
        {"action": "alloc", "addr": "a", "size": None},
        {"action": "alloc", "addr": 9, "size": 512},
    ]
    analysis = analyse(read_snapshot(made.save(tmp_path / "made.pickle")))
    assert any("make no sense" in warning for warning in analysis.history.warnings)
    assert any("was not allocated at the time" in warning for warning in analysis.history.warnings)
    assert any("not in the segments" in warning for warning in analysis.history.warnings)
    assert analysis.summary.peak.categories["gradients"] == 512 * 1000


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/memtrace-was-here",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut short"),
        (b"not a pickle", "not a pickle"),
        (pickle.dumps({"segments": [], "device_traces": []})[:-9], "cut short|damaged"),
        (pickle.dumps([1, 2]), "not a memory snapshot"),
        (pickle.dumps({"segments": []}), "holds no history"),
        (pickle.dumps({"segments": [], "device_traces": [[]]}), "holds no history"),
        (pickle.dumps({"segments": [], "device_traces": Evil()}), "names .*system; a memory snapshot names no class"),
        (b"cos\nsystem\n(S'true'\ntR.", "names os.system"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged|cut short"),
        (b"P1\n.", "refers to objects outside"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "does not fit into memory"),
    ],
)
def test_what_is_no_snapshot_is_refused_in_one_line(tmp_path, content, message):
    file = tmp_path / "bad.pickle"
    file.write_bytes(content)
    with pytest.raises(SnapshotError, match=message):
        analyse(read_snapshot(file))
    ended = subprocess.run(
        [sys.executable, "-m", "trl_memtrace.commands", "snapshot", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("trl-memtrace: ")
    assert ended.stderr.count("\n") == 1
    assert not Path("/tmp/memtrace-was-here").exists()


MESSY = st.recursive(
    st.one_of(
        st.none(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.sampled_from(["alloc", "oom"])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "action": st.sampled_from(
            ["alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "oom", "x"]
        ),
        "addr": st.one_of(st.integers(0, 6).map(lambda n: n * 512), MESSY),
        "size": st.one_of(st.integers(1, 5).map(lambda n: n * 512), MESSY),
    },
    optional={"time_us": MESSY, "frames": st.one_of(st.sampled_from([FORWARD, ENGINE, OPTIMIZER, []]), MESSY)},
)
BLOCK = st.fixed_dictionaries(
    {
        "size": st.one_of(st.integers(1, 3).map(lambda n: n * 512), MESSY),
        "state": st.sampled_from(["active_allocated", "x"]),
    },
    optional={"address": st.one_of(st.integers(0, 6).map(lambda n: n * 512), MESSY)},
)
SEGMENT = st.fixed_dictionaries(
    {
        "device": st.one_of(st.just(0), MESSY),
        "address": st.one_of(st.integers(0, 6).map(lambda n: n * 512), MESSY),
        "total_size": st.one_of(st.just(4096), MESSY),
        "blocks": st.one_of(st.lists(BLOCK, max_size=3), MESSY),
    }
)


@settings(max_examples=300, deadline=None)
@given(
    segments=st.lists(st.one_of(SEGMENT, MESSY), max_size=4),
    trace=st.lists(st.one_of(ENTRY, MESSY), max_size=14),
    annotations=MESSY,
)
def test_nothing_in_a_file_ends_in_a_traceback(tmp_path_factory, segments, trace, annotations):
    file = tmp_path_factory.mktemp("fuzz") / "fuzz.pickle"
    data = {"segments": segments, "device_traces": [trace], "external_annotations": annotations}
    file.write_bytes(pickle.dumps(data))
    try:
        analysis = analyse(read_snapshot(file))
    except MemtraceError:
        return
    summary = json.loads(json.dumps(analysis.summary.to_json()))
    assert sum(summary["peak"]["categories"].values()) == summary["peak"]["bytes"]
    assert sum(summary["end"]["categories"].values()) == summary["end"]["bytes"]


@settings(max_examples=300, deadline=None)
@given(cut=st.integers(0, 4000), flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=6))
def test_a_damaged_file_is_refused_or_read(tmp_path_factory, cut, flips):
    content = bytearray(pickle.dumps(one_step()[0].data()))
    for place, value in flips:
        content[place % len(content)] = value
    if cut < len(content) - 1 and not flips:
        del content[cut:]
    file = tmp_path_factory.mktemp("fuzz") / "fuzz.pickle"
    file.write_bytes(bytes(content))
    with contextlib.suppress(MemtraceError):
        analyse(read_snapshot(file))


@real
def test_the_real_full_step(tmp_path):
    """12.950 GiB before the trace, 12.773 of gradients, 25.383 of optimizer states, as its makers' figures have it."""
    command = [sys.executable, "-m", "trl_memtrace.commands", "snapshot", str(REAL), "--json", "--simulate"]
    summary = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    end = summary["end"]["categories"]
    assert end["weights"] == pytest.approx(12.950 * GIB, rel=0.02)
    assert end["gradients"] == pytest.approx(12.773 * GIB, rel=0.02)
    assert end["optimizer_states"] == pytest.approx(25.383 * GIB, rel=0.02)
    assert summary["unattributed_bytes"] < 0.02 * summary["peak"]["bytes"]
    assert summary["end"]["bytes"] == 54873829888
    assert summary["peak"]["bytes"] == pytest.approx((12.950 + 38.346) * GIB, rel=0.001)
    assert summary["reserved_end_bytes"] == 58280 * 1024**2
    assert summary["simulated"]["reserved_end_bytes"] == 58280 * 1024**2
    assert summary["simulated"]["matching_segment_requests"] == summary["simulated"]["segment_requests"] == 783


@real
def test_the_real_toy_run():
    analysis = analyse(read_snapshot(SHARED / "toy.pickle"))
    assert analysis.history.end_bytes == analysis.history.ledger.level[-1]
    assert round(analysis.history.end_bytes / 1024**2, 2) == 30.25
    assert int(analysis.history.reserved[-1]) == 3606 * 1024**2


MILLION = """
import pickle, random, sys
random.seed(0)
frames = []
for n in range(200):
    frames += [[{"name": f"f{n}", "filename": f"/home/me/{n}.py", "line": n}, *extra] for extra in EXTRAS]
trace, live, free = [], [], [512 * n for n in range(1, 50001)]
for n in range(500000):
    stack = frames[n // 1000 % len(frames)]
    if live and (not free or random.random() < 0.5):
        address, size = live.pop(random.randrange(len(live)))
        free.append(address)
        for action in ("free_requested", "free_completed"):
            trace.append({"action": action, "addr": address, "size": size, "stream": 0, "time_us": n, "frames": stack})
    else:
        address, size = free.pop(), 512
        live.append((address, size))
        trace.append({"action": "alloc", "addr": address, "size": size, "stream": 0, "time_us": n, "frames": stack})
while len(trace) < 1000000:
    address = free.pop()
    live.append((address, 512))
    trace.append({"action": "alloc", "addr": address, "size": 512, "stream": 0, "time_us": n, "frames": stack})
    address, size = live.pop()
    free.append(address)
    for action in ("free_requested", "free_completed"):
        trace.append({"action": action, "addr": address, "size": size, "stream": 0, "time_us": n, "frames": stack})
blocks = [{"address": a, "size": s, "state": "active_allocated"} for a, s in live]
segments = [{"device": 0, "address": 0, "total_size": 512 * 50001, "blocks": blocks}]
pickle.dump({"segments": segments, "device_traces": [trace[:1000000]]}, open(sys.argv[1], "wb"))
"""


@pytest.mark.slow
def test_a_million_events_in_fifteen_seconds_and_three_gigabytes(tmp_path):
    import resource

    file = tmp_path / "million.pickle"
    extras = f"EXTRAS = {[FORWARD, ENGINE, OPTIMIZER]!r}"
    subprocess.run([sys.executable, "-c", extras + MILLION, str(file)], check=True)
    began = time.perf_counter()
    command = [sys.executable, "-m", "trl_memtrace.commands", "snapshot", str(file), "--json"]
    summary = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert sum(summary["peak"]["categories"].values()) == summary["peak"]["bytes"]
    assert seconds < 15
    assert peak < 3e9
    print(f"{seconds:.1f} s, {peak / 1e9:.2f} GB")
