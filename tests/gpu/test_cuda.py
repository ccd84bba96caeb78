"""The CUDA recorder on a real card: the same claims as tests/test_cuda_recorder.py makes of the faked one.

    make test-gpu

prints what was measured, card, driver and versions first; docs/gpu-results.md keeps it.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time

import pytest
import tiny
import torch

from trl_memtrace import MemoryTracer, MemTrace, TracePolicy


def training(kind: str = "llama", foreach: bool | None = None, **config):
    gc.collect()
    torch.cuda.empty_cache()
    model = tiny.model(kind, **config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)

    def step(rows: int = 4, length: int = 128) -> None:
        ids = torch.randint(2, tiny.VOCABULARY, (rows, length), device="cuda")
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def rounded(tensors) -> int:
    return sum(-(-tensor.untyped_storage().nbytes() // 512) * 512 for tensor in tensors)


@pytest.mark.parametrize("foreach", [False, True])
def test_books_balance_to_the_allocators_own_peak(foreach, record_property):
    model, optimizer, step = training(foreach=foreach)
    for _ in range(2):
        step()
    torch.cuda.reset_peak_memory_stats()
    tracer = MemoryTracer(model, optimizer)
    with tracer.step():
        step()
    tracer.close()
    record = tracer.run.steps[0]
    print(json.dumps(record.peak.to_json() | {"modules": {}}))
    assert record.traced
    assert record.peak.bytes == torch.cuda.max_memory_allocated()
    assert sum(record.peak.categories.values()) == record.peak.bytes
    assert record.peak.categories["unattributed"] <= 0.01 * record.peak.bytes
    assert record.peak.roles["weights/trainable"] == rounded(model.parameters())
    assert record.phases["optimizer"].at_peak["gradients"] == rounded(model.parameters())
    assert record.phases["optimizer"].at_peak["optimizer_states"] >= 2 * rounded(model.parameters())
    assert set(record.phases) >= {"forward", "loss", "backward", "optimizer"}
    if foreach:
        assert record.phases["optimizer"].at_peak["temporaries"] >= rounded(model.parameters())
    assert not torch._C._cuda_isHistoryEnabled()


def test_a_new_high_is_seen_after_the_fact():
    model, optimizer, step = training()
    tracer = MemoryTracer(model, optimizer, policy=TracePolicy(first_steps=1, every_n_steps=None))
    for rows in (1, 1, 16, 1):
        with tracer.step():
            step(rows)
    tracer.close()
    assert [record.traced for record in tracer.run][2:] == [True, False]
    high = tracer.run.steps[2]
    assert high.peak.phase in ("forward", "loss", "backward")
    assert high.peak.categories["activations"] > 0
    assert high.peak.categories["unattributed"] <= 0.01 * high.peak.bytes


def test_a_history_of_the_users_is_left_alone():
    model, optimizer, step = training()
    torch.cuda.memory._record_memory_history(max_entries=50_000)
    try:
        mark = torch.empty(12_345_678, device="cuda")
        tracer = MemoryTracer(model, optimizer)
        with tracer.step():
            step()
        tracer.close()
        assert tracer.run.steps[0].traced
        assert torch._C._cuda_isHistoryEnabled()
        trace = torch.cuda.memory._snapshot()["device_traces"][0]
        assert any(entry["action"] == "alloc" and entry["addr"] == mark.data_ptr() for entry in trace)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def test_losses_are_the_same_and_the_trainer_is_traced(tmp_path):
    def run(folder, callback=None):
        trainer = tiny.trainer(folder, use_cpu=False, max_steps=4)
        if callback is not None:
            trainer.add_callback(callback)
        trainer.train()
        return tiny.losses(trainer)

    callback = MemTrace()
    assert run(tmp_path / "with", callback) == run(tmp_path / "without")
    for step in callback.run:
        if step.traced:
            assert sum(step.peak.categories.values()) == step.peak.allocator_bytes


def test_out_of_memory_is_described_before_anything_is_let_go():
    model, optimizer, step = training()
    step()
    tracer = MemoryTracer(model, optimizer)

    def greedy(module, inputs):
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    model.model.layers[1].mlp.register_forward_pre_hook(greedy)
    with pytest.raises(torch.OutOfMemoryError), tracer.step():
        step()
    failure = tracer.run.failure
    print(json.dumps(failure.to_json() | {"modules": {}}))
    assert failure.out_of_memory
    assert failure.requested_bytes == 1 << 50
    assert failure.phase == "forward"
    assert failure.peak.categories["activations"] > 0
    tracer.close()


def test_what_it_costs():
    model, optimizer, step = training(hidden_size=512, intermediate_size=1536, num_hidden_layers=8)
    times = {}
    for name, policy in {
        "plain": None,
        "default": TracePolicy(),
        "every step": TracePolicy(first_steps=0, every_n_steps=1),
    }.items():
        tracer = MemoryTracer(model, optimizer, policy=policy) if policy else None
        taken = []
        for _ in range(30):
            torch.cuda.synchronize()
            began = time.perf_counter()
            if tracer is None:
                step()
            else:
                with tracer.step():
                    step()
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
        if tracer is not None:
            tracer.close()
        times[name] = sorted(taken)[len(taken) // 2] * 1e3
    print({name: f"{value:.2f} ms" for name, value in times.items()})
    assert times["default"] < 1.2 * times["plain"]


def test_the_card_and_versions():
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    print(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    assert torch.cuda.get_device_name()
