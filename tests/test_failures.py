"""Out of memory for real, under a limit on address space, and every other way in which training ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from trl_memtrace import MemoryTracer, MemTrace, RunTrace
from trl_memtrace.advice import suggest
from trl_memtrace.failures import error_line, is_out_of_memory, requested_bytes
from trl_memtrace.records import Peak, category_table

LIMITED = """
import sys
sys.path[:0] = {paths!r}
import pathlib, resource
import tiny, torch
from trl_memtrace import MemTrace

model = tiny.model("llama")
trainer = tiny.trainer(pathlib.Path({folder!r}), of=model, max_steps=3, gradient_checkpointing=False, **{settings!r})
callback = MemTrace(print_table=True)
trainer.add_callback(callback)

class Greedy(torch.autograd.Function):
    @staticmethod
    def forward(context, hidden):
        if {where!r} == "forward":
            torch.empty(64, 1024, 1024, 1024)
        return hidden.clone()

    @staticmethod
    def backward(context, gradient):
        torch.empty(64, 1024, 1024, 1024)
        return gradient

mlp = model.model.layers[1].mlp
plain = mlp.forward
mlp.forward = lambda hidden: Greedy.apply(plain(hidden))
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2 * 1024**3,) * 2)
trainer.train()
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_under_an_address_space_limit(tmp_path, where):
    settings = {"per_device_train_batch_size": 4}
    script = LIMITED.format(paths=[str(Path(__file__).parent)], folder=str(tmp_path), where=where, settings=settings)
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert "DefaultCPUAllocator: can't allocate memory" in ended.stderr
    assert "RuntimeError" in ended.stderr, last

    run = RunTrace.load(tmp_path)
    failure = run.failure
    assert failure.out_of_memory
    assert failure.step == 1
    assert failure.phase == where
    assert failure.module == ("model.layers.1.mlp" if where == "forward" else "")
    assert failure.requested_bytes == 64 * 1024**3 * 4
    assert failure.traced
    assert sum(failure.peak.categories.values()) == failure.peak.bytes > 0
    weights = sum(parameter.nbytes for parameter in tiny.model("llama").parameters())
    assert failure.peak.roles["weights/trainable"] == weights
    assert failure.peak.categories["activations"] > 0
    assert failure.peak.categories["unattributed"] <= 0.001 * failure.peak.bytes
    assert failure.suggestions
    assert all(suggestion.frees_bytes <= failure.peak.bytes for suggestion in failure.suggestions)

    printed = ended.stdout.replace("\n", " ")
    assert f"Out of memory in step 1, {where}" in printed
    assert "256.00 GiB asked for" in printed
    lines = [json.loads(line) for line in (tmp_path / "memtrace" / "rank-00000.jsonl").read_text().splitlines()]
    assert [line["record"] for line in lines] == ["run", "oom", "summary"]


@pytest.mark.parametrize(
    "problem", [RuntimeError("shape mismatch\nmore"), KeyboardInterrupt()], ids=["error", "ctrl-c"]
)
def test_any_other_exception_leaves_the_same_report(tmp_path, problem):
    trainer = tiny.trainer(tmp_path)
    callback = MemTrace()
    trainer.add_callback(callback)

    def broken(module, inputs):
        raise problem

    trainer.model.lm_head.register_forward_pre_hook(broken)
    trainer.model.model.norm.register_forward_pre_hook(broken)
    with pytest.raises(type(problem)) as caught:
        trainer.train()
    assert caught.value is problem
    failure = callback.run.failure
    assert not failure.out_of_memory
    assert failure.error.startswith(type(problem).__name__)
    assert "more" not in failure.error
    assert failure.phase == "forward"
    assert failure.peak.categories["weights"] > 0


def test_a_step_that_was_not_traced_is_described_by_the_last_that_was(tmp_path):
    model = tiny.model()
    ids = torch.ones(1, 8, dtype=torch.long)
    from trl_memtrace import TracePolicy

    tracer = MemoryTracer(model, policy=TracePolicy(first_steps=1, every_n_steps=None, new_highs=False))
    with tracer.step():
        model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(ZeroDivisionError), tracer.step():
        raise ZeroDivisionError
    failure = tracer.run.failure
    assert (failure.step, failure.traced, failure.phase) == (2, False, None)
    assert failure.peak.bytes == tracer.run.steps[0].peak.bytes
    tracer.close()


def test_a_failure_holds_nothing_alive():
    import gc
    import weakref

    model = tiny.model()
    tracer = MemoryTracer(model)
    gone = []

    def leaks():
        tensor = torch.ones(1000)
        gone.append(weakref.ref(tensor))
        raise RuntimeError(tensor.sum())

    with pytest.raises(RuntimeError), tracer.step():
        leaks()
    gc.collect()
    assert gone[0]() is None


@pytest.mark.parametrize(
    ("problem", "expected", "size"),
    [
        (MemoryError(), True, None),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8192 bytes."), True, 8192),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), True, 5 * 1024**3 // 2),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB). Tried to allocate 512 bytes on"), True, 512),
        (RuntimeError("size mismatch"), False, None),
        (ValueError("out of memory"), False, None),
    ],
)  # fmt: skip
def test_what_an_exception_says_about_memory(problem, expected, size):
    assert is_out_of_memory(problem) == expected
    assert requested_bytes(problem) == size
    assert error_line(problem).startswith(type(problem).__name__)


def test_advice_counts_what_the_books_say():
    from trl_memtrace.categories import Category

    roles = {
        "weights/frozen": 1000,
        "activations/attention": 300,
        "activations/logits": 500,
        "optimizer_states/exp_avg": 400,
        "optimizer_states/exp_avg_sq": 400,
        "temporaries/optimizer": 90,
        "gradients/trainable": 200,
        "inputs/batch": 2,
    }
    sums: dict[str, int] = {}
    for name, size in roles.items():
        sums[name.split("/")[0]] = sums.get(name.split("/")[0], 0) + size
    categories = category_table({Category(name): size for name, size in sums.items()})
    held = Peak(bytes=sum(roles.values()), categories=categories, roles=roles)
    settings = {"per_device_train_batch_size": 4, "optim": "adamw_torch"}
    freed = {row.what.split("=")[0]: row.frees_bytes for row in suggest(held, settings)}
    assert freed["gradient_checkpointing"] == 300
    assert freed["use_liger_kernel"] == 500
    assert freed["LoRA (use_peft)"] == 1000
    assert freed["load_in_4bit"] == 750
    assert freed["per_device_train_batch_size"] == (800 + 2) // 2
    on = {**settings, "gradient_checkpointing": True, "use_liger_kernel": True, "optim": "adamw_bnb_8bit"}
    assert not {row.what for row in suggest(held, on)} & {"gradient_checkpointing=True", "use_liger_kernel=True"}
    order = [row.frees_bytes for row in suggest(held, settings)]
    assert order == sorted(order, reverse=True)
