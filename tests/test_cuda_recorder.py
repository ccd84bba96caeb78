"""The CUDA recorder against a faked driver: its memory is the CPU's, its words are the CUDA allocator's.

tests/gpu runs the same step against the real one.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from trl_memtrace import MemoryTracer, TracePolicy
from trl_memtrace import tracer as tracer_module
from trl_memtrace.recorders.cpu import CpuRecorder
from trl_memtrace.recorders.cuda import CudaRecorder, TorchDriver


def rounded(size: int) -> int:
    return -(-size // 512) * 512


class FakeDriver:
    """A CUDA caching allocator made of what the CPU's does: sizes in blocks of 512, a history, segments, counters."""

    def __init__(self, standing, enabled: bool = False) -> None:
        self.standing = standing
        self.enabled = self.theirs = enabled
        self.calls: list[dict[str, Any]] = []
        self.highest = 0
        self.now = 0
        self.cpu = CpuRecorder()
        self.recording = False
        self.snapshots = 0
        self.tell = None

    def history_enabled(self) -> bool:
        return self.enabled

    def attach_refusal_observer(self, tell) -> bool:
        self.refuse = tell
        return False  # so that the next recorder attaches its own driver's

    def on_foreign_history(self, tell):
        self.tell = tell
        return lambda: setattr(self, "tell", None)

    def record_history(self, **options: Any) -> None:
        self.calls.append(options)
        self.cpu.abandon()
        self.recording = options["enabled"] is not None
        if self.recording:
            self.begin()

    def begin(self) -> None:
        storages = {storage.data_ptr(): storage for storage in self.standing()}
        self.before = {address: storage.nbytes() for address, storage in storages.items()}
        self.cpu.start()
        self.cpu.watch(storages.values())
        self.recording = True

    def finish(self) -> None:
        """What a real allocator does all the time: follow the events to its counters."""
        if not self.recording:
            return
        self.recording = False
        events = self.cpu.stop().events
        live = {address: rounded(size) for address, size in self.before.items()}
        self.trace, self.now = [], sum(live.values())
        self.highest = max(self.highest, self.now)
        for when, address, size in zip(
            events.time_ns.tolist(), events.address.tolist(), events.size.tolist(), strict=True
        ):
            entry = {"addr": address, "size": abs(size), "stream": 0, "time_us": when // 1000, "frames": []}
            if size > 0:
                self.trace.append({"action": "alloc", **entry})
                live[address] = rounded(size)
            elif address in live:
                entry["size"] = live.pop(address)
                self.trace.append({"action": "free_requested", **entry})
                self.trace.append({"action": "free_completed", **entry})
            self.highest = max(self.highest, sum(live.values()))
        self.now = sum(live.values())
        blocks = [{"address": address, "size": size, "state": "active_allocated"} for address, size in live.items()]
        self.segments = [
            {"device": 0, "address": block["address"], "total_size": block["size"], "blocks": [block]}
            for block in blocks
        ]

    def snapshot(self) -> dict[str, Any]:
        self.finish()
        self.snapshots += 1
        return {"device_traces": [self.trace], "segments": self.segments}

    def stats(self, device: int) -> dict[str, Any]:
        if not self.theirs:  # to look is to stop, which a history of theirs must not be
            self.finish()
        return {
            "allocated_bytes": {"all": {"peak": self.highest, "current": self.now}},
            "reserved_bytes": {"all": {"current": self.now}},
        }


class FakeCuda(CudaRecorder):
    device_type = "cpu"


@pytest.fixture
def training(monkeypatch):
    model = tiny.model()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    ids = torch.randint(2, tiny.VOCABULARY, (16, 64))
    held = {"ids": ids}

    def standing():
        states = [value for state in optimizer.state.values() for value in state.values()]
        plain = [value for module in model.modules() for value in vars(module).values() if torch.is_tensor(value)]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        tensors = [*model.parameters(), *model.buffers(), *plain, *states, *gradients, held["ids"]]
        return [tensor.untyped_storage() for tensor in tensors]

    def step(rows: int = 1) -> None:
        ids = held["ids"][:rows]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    driver = FakeDriver(standing)
    monkeypatch.setattr(tracer_module, "_recorder_for", lambda kind, index: FakeCuda(driver=driver))
    return model, optimizer, step, driver


def test_books_balance_to_the_allocators_own_counters(training):
    model, optimizer, step, driver = training
    step()
    tracer = MemoryTracer(model, optimizer)
    with tracer.step():
        step()
    tracer.close()
    record = tracer.run.steps[0]
    weights = sum(rounded(parameter.nbytes) for parameter in model.parameters())
    assert record.traced
    assert record.peak.bytes == record.peak.allocator_bytes == driver.highest
    assert sum(record.peak.categories.values()) == record.peak.bytes
    assert record.peak.categories["unattributed"] <= 0.001 * record.peak.bytes
    assert record.peak.roles["weights/trainable"] == weights
    assert record.phases["optimizer"].at_peak["gradients"] == weights
    assert record.phases["optimizer"].at_peak["optimizer_states"] >= 2 * weights
    assert record.phases["optimizer"].at_peak["temporaries"] >= weights
    assert record.phases["idle"].end_bytes == driver.now
    assert record.peak.modules["model.layers.0.mlp.gate_proj"]["gradients"] == 64 * 160 * 4
    assert record.reserved_bytes > 0


def test_the_history_is_read_only_for_steps_that_matter(training):
    model, optimizer, step, driver = training
    tracer = MemoryTracer(model, optimizer, policy=TracePolicy(first_steps=1, every_n_steps=None))
    for rows in (1, 1, 1, 16, 16, 1):
        with tracer.step():
            step(rows)
    tracer.close()
    assert [record.traced for record in tracer.run] == [True, False, False, True, False, False]
    assert driver.snapshots == 2
    after = tracer.run.steps[3]
    assert after.peak.bytes == driver.highest
    assert after.peak.categories["unattributed"] <= 0.001 * after.peak.bytes
    assert after.peak.categories["weights"] > 0
    assert after.peak.phase is not None
    assert all(call.get("clear_history") for call in driver.calls[:-1])
    assert driver.calls[-1] == {"enabled": None}
    assert {call["context"] for call in driver.calls[:-1]} == {None}


def test_a_history_that_the_user_keeps_is_never_cleared_or_switched_off(training):
    model, optimizer, step, driver = training
    driver.enabled = driver.theirs = True
    driver.begin()
    tracer = MemoryTracer(model, optimizer)
    with tracer.step():
        step()
    tracer.close()
    assert driver.calls == []
    assert tracer.run.steps[0].traced


def test_a_history_that_the_user_takes_over_is_his_from_then_on(training):
    model, optimizer, step, driver = training
    tracer = MemoryTracer(model, optimizer)
    with tracer.step():
        step()
    calls = len(driver.calls)
    driver.tell()
    driver.theirs = True
    driver.begin()
    with tracer.step():
        step()
    tracer.close()
    assert len(driver.calls) == calls
    assert [record.traced for record in tracer.run] == [True, True]


def test_a_refusal_is_described_as_it_was_before_anything_was_let_go(training):
    model, optimizer, step, driver = training
    step()
    tracer = MemoryTracer(model, optimizer)
    ids = torch.ones(1, 8, dtype=torch.long)

    def refused(module, inputs):
        driver.refuse(0, 5 * 1024**3, 0, 0)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.00 GiB.")

    model.model.layers[1].mlp.register_forward_pre_hook(refused)
    with pytest.raises(torch.OutOfMemoryError), tracer.step():
        model(input_ids=ids, labels=ids)
    failure = tracer.run.failure
    assert failure.out_of_memory
    assert failure.traced
    assert (failure.phase, failure.module) == ("forward", "model.layers.1")
    assert failure.requested_bytes == 5 * 1024**3
    assert sum(failure.peak.categories.values()) == failure.peak.bytes
    assert failure.peak.categories["weights"] >= sum(rounded(parameter.nbytes) for parameter in model.parameters())
    assert failure.reserved_bytes > 0
    tracer.close()


def test_a_full_ring_is_made_larger(training):
    _model, _optimizer, step, driver = training
    recorder = FakeCuda(driver=driver)
    recorder._entries = 100
    recorder.start()
    step()
    assert recorder.stop() is not None
    recorder.start()
    assert driver.calls[-1]["max_entries"] == 200
    recorder.close()


def test_a_step_without_history_is_counted(training):
    _model, _optimizer, _, driver = training
    recorder = FakeCuda(driver=driver)
    recorder.start()
    assert recorder.stop() is None
    recorder.start()
    driver.snapshot = lambda: {}
    assert recorder.stop() is None
    recorder.close()


def test_stacks_are_an_option(training):
    driver = training[3]
    recorder = FakeCuda(driver=driver, stacks=True)
    recorder.start()
    assert driver.calls[-1]["context"] == "alloc"
    recorder.close()


def test_the_real_driver_speaks_to_the_installed_torch(monkeypatch):
    said = []
    monkeypatch.setattr(torch._C, "_cuda_record_memory_history", lambda *args: said.append(args), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: True, raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_memorySnapshot", lambda pool: {"segments": [], "device_traces": []}, raising=False
    )
    monkeypatch.setattr(torch.cuda.memory, "memory_stats_as_nested_dict", lambda device: {"device": device})
    original = torch.cuda.memory._record_memory_history
    driver = TorchDriver()
    told = []
    undo = driver.on_foreign_history(lambda: told.append(1))
    driver.record_history(enabled="all", context=None, stacks="python", max_entries=7, clear_history=True, unknown=1)
    assert said[0][:5] == ("all", None, "python", 7, True)
    assert told == []
    torch.cuda.memory._record_memory_history(max_entries=3)
    assert told == [1]
    assert said[1][3] == 3
    undo()
    undo()
    assert torch.cuda.memory._record_memory_history is original
    assert driver.history_enabled()
    assert driver.snapshot() == {"segments": [], "device_traces": []}
    assert driver.stats(1) == {"device": 1}
    assert not driver.attach_refusal_observer(print)
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", said.append, raising=False)
    assert driver.attach_refusal_observer(print)
    assert said[-1] is print
