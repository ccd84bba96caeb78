"""Books from counters alone, where a device has no history: faked counters over the CPU's memory."""

from __future__ import annotations

import pytest
import tiny
import torch

from trl_memtrace import MemoryTracer, MemtraceWarning, TracePolicy
from trl_memtrace import tracer as tracer_module
from trl_memtrace.recorders.counters import AcceleratorCounters, CountersRecorder


class FakeCounters:
    """Counts parameters, gradients, optimizer states and a cache of its own; its peak is set by the test."""

    def __init__(self, model, optimizer) -> None:
        self.model, self.optimizer, self.extra, self.highest = model, optimizer, 1000, 0

    def owned(self) -> int:
        held = [*self.model.parameters(), *self.model.buffers()]
        held += [value for module in self.model.modules() for value in vars(module).values() if torch.is_tensor(value)]
        held += [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        held += [value for state in self.optimizer.state.values() for value in state.values()]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())

    def allocated(self) -> int:
        now = self.owned() + self.extra
        self.highest = max(self.highest, now)
        return now

    def peak(self) -> int:
        return self.highest

    def reserved(self) -> int:
        return 2 * self.highest


@pytest.fixture
def training(monkeypatch):
    model = tiny.model()
    optimizer = torch.optim.AdamW(model.parameters())
    counters = FakeCounters(model, optimizer)
    monkeypatch.setattr(tracer_module, "_recorder_for", lambda kind, index: CountersRecorder("cpu", counters))
    ids = torch.randint(2, tiny.VOCABULARY, (2, 16))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, counters, step


def test_what_owners_hold_is_theirs_and_the_rest_is_unattributed(training):
    model, optimizer, counters, step = training
    with pytest.warns(MemtraceWarning, match="books are kept from counters"):
        tracer = MemoryTracer(model, optimizer)
    step()
    with tracer.step():
        step()
    tracer.close()
    (record,) = tracer.run.steps
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert record.traced
    assert record.peak.bytes == record.peak.allocator_bytes
    assert sum(record.peak.categories.values()) == record.peak.bytes
    assert record.peak.roles["weights/trainable"] == weights
    optimizer_phase = record.phases["optimizer"]
    assert optimizer_phase.at_peak["gradients"] == weights
    assert optimizer_phase.at_peak["optimizer_states"] >= 2 * weights
    assert optimizer_phase.at_peak["unattributed"] <= 1000
    assert record.phases["idle"].end_bytes == counters.allocated()
    assert record.reserved_bytes is not None
    assert {"forward", "backward", "optimizer"} <= set(record.phases)
    assert record.phases["forward"].at_peak["temporaries"] == record.phases["forward"].at_peak["activations"] == 0


def test_a_peak_between_two_readings_is_the_counters_own(training):
    model, optimizer, counters, step = training
    with pytest.warns(MemtraceWarning):
        tracer = MemoryTracer(model, optimizer, policy=TracePolicy(first_steps=1, every_n_steps=None))
    for extra in (0, 10_000_000, 0):
        with tracer.step():
            step()
            counters.highest += extra
    tracer.close()
    assert [record.traced for record in tracer.run] == [True, True, False]
    high = tracer.run.steps[1]
    assert high.peak.bytes == counters.highest
    assert high.peak.categories["unattributed"] >= 10_000_000
    assert sum(high.peak.categories.values()) == high.peak.bytes


def test_the_real_counters_are_asked_in_torchs_own_words(monkeypatch):
    class Backend:
        @staticmethod
        def memory_allocated(device):
            raise RuntimeError("not this one")

        @staticmethod
        def current_allocated_memory():
            return 7

        @staticmethod
        def driver_allocated_memory():
            return 9

    monkeypatch.setattr(torch, "mps", Backend)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        monkeypatch.delattr(torch.accelerator, name, raising=False)
    counters = AcceleratorCounters("mps", 0)
    assert (counters.allocated(), counters.peak(), counters.reserved()) == (7, None, 9)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 11, raising=False)
    assert counters.peak() == 11
    monkeypatch.setattr(torch, "mps", object())
    with pytest.raises(NotImplementedError, match="counts no memory of mps devices"):
        AcceleratorCounters("mps", 0)
