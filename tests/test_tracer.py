"""MemoryTracer in plain PyTorch loops, against oracles that share no code with it."""

from __future__ import annotations

import gc
import threading
import warnings

import pytest
import tiny
import torch
from torch import nn

from trl_memtrace import MemoryTracer, MemtraceWarning, TracePolicy


def train_step(model, optimizer, inputs) -> torch.Tensor:
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def bytes_of(tensors) -> int:
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def standing(model, optimizer, inputs) -> int:
    """Bytes alive between steps that belong to the training, by hand."""
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    plain = [value for module in model.modules() for value in vars(module).values() if torch.is_tensor(value)]
    return bytes_of([*model.parameters(), *model.buffers(), *plain, *states, *inputs.values()])


def profiled_rise(step) -> int:
    """How far a full torch.profiler sees memory rise above its start."""
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step()
    level, highest = 0, 0
    memory = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "moe"])
@pytest.mark.parametrize("foreach", [False, True])
def test_the_peak_is_that_of_a_full_profiler_to_the_byte(kind, foreach):
    model = tiny.model(kind)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
    inputs = tiny.batch()
    train_step(model, optimizer, inputs)
    expected = standing(model, optimizer, inputs) + profiled_rise(lambda: train_step(model, optimizer, inputs))
    tracer = MemoryTracer(model, optimizer)
    with tracer.step():
        train_step(model, optimizer, inputs)
    tracer.close()
    assert tracer.run.peak.bytes == tracer.run.peak.allocator_bytes == expected


def test_gradients_that_a_step_inherits_and_frees_are_counted_until_then():
    model = tiny.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = tiny.batch()
    total = bytes_of(model.parameters())
    train_step(model, optimizer, inputs)
    model(**inputs).loss.backward()  # outside every recording: the allocator will be silent when these are freed
    tracer = MemoryTracer(model, optimizer)
    with tracer.step():
        optimizer.zero_grad()
        loss = model(**inputs).loss
        assert all(parameter.grad is None for parameter in model.parameters())
        loss.backward()
        optimizer.step()
    tracer.close()
    step = tracer.run.steps[0]
    assert step.phases["idle"].at_peak["gradients"] == total
    assert step.phases["forward"].at_peak["gradients"] == 0
    assert step.phases["optimizer"].at_peak["gradients"] == total
    assert step.peak.categories["gradients"] <= total
    assert step.peak.categories["unattributed"] == 0


def test_addresses_that_a_gap_between_traced_steps_gave_away_do_not_confuse_the_books():
    model = tiny.model()
    optimizer = torch.optim.AdamW(model.parameters())
    tracer = MemoryTracer(model, optimizer, policy=TracePolicy(first_steps=1, every_n_steps=3, new_highs=False))
    kept = []
    peaks = []
    for number in range(9):
        with tracer.step():
            train_step(model, optimizer, tiny.batch(length=16 + 8 * (number % 3)))
            kept.append(torch.empty(1000 + number))
            if len(kept) > 2:
                kept.pop(0)
    tracer.close()
    for step in tracer.run:
        if step.traced:
            assert sum(step.peak.categories.values()) == step.peak.bytes
            assert step.peak.categories["weights"] >= bytes_of(model.parameters())
            assert step.peak.categories["unattributed"] <= 0.001 * step.peak.bytes
            peaks.append(step.peak.bytes)
    assert len(peaks) == 4


def test_tied_weights_count_once():
    model = tiny.model("qwen")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tracer = MemoryTracer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with tracer.step():
        model(**tiny.batch()).loss.backward()
    tracer.close()
    expected = bytes_of([*model.parameters()])
    assert tracer.run.peak.roles["weights/trainable"] == expected
    assert tracer.run.steps[0].phases["backward"].at_end["gradients"] == expected


def test_an_optimizer_inside_the_backward():
    """A gradient that its own hook uses up and frees never stands at the end of backward."""
    model = tiny.model()
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}

    def step_at_once(parameter):
        torch.empty(10_000_000)  # the peak is here, while the gradient is
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_at_once)
    tracer = MemoryTracer(model)
    with tracer.step():
        model(**tiny.batch()).loss.backward()
    tracer.close()
    step = tracer.run.steps[0]
    assert all(len(parameter._post_accumulate_grad_hooks) == 1 for parameter in model.parameters())
    assert sum(step.peak.categories.values()) == step.peak.bytes
    assert step.phases["backward"].at_end["gradients"] == 0
    sizes = [parameter.nbytes for parameter in model.parameters()]
    assert step.peak.categories["gradients"] in sizes


def test_losses_are_bit_for_bit_the_same():
    def losses(traced: bool) -> list[float]:
        model = tiny.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        tracer = MemoryTracer(model, optimizer) if traced else None
        found = []
        for _ in range(4):
            if tracer is None:
                found.append(train_step(model, optimizer, tiny.batch()).item())
            else:
                with tracer.step():
                    found.append(train_step(model, optimizer, tiny.batch()).item())
        if tracer is not None:
            tracer.close()
        return found

    assert losses(True) == losses(False)


def test_an_exception_passes_through_and_leaves_nothing():
    model = tiny.model()
    tracer = MemoryTracer(model)
    with pytest.raises(ZeroDivisionError), tracer.step():
        model(**tiny.batch())
        raise ZeroDivisionError
    assert not torch.autograd._profiler_enabled()
    assert not any(module._forward_hooks for module in model.modules())
    with tracer.step():
        model(**tiny.batch()).loss.backward()
    tracer.close()
    assert [step.traced for step in tracer.run] == [True]


def test_it_steps_aside_for_a_profiler_that_is_running_already():
    model = tiny.model()
    tracer = MemoryTracer(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(2):
                with tracer.step():
                    model(**tiny.batch()).loss.backward()
    assert [step.traced for step in tracer.run] == [False, False]
    assert sum(issubclass(warning.category, MemtraceWarning) for warning in caught) == 1
    assert any(event.key == "aten::mm" for event in profiler.key_averages())
    with tracer.step():
        model(**tiny.batch()).loss.backward()
    tracer.close()
    assert tracer.run.steps[-1].traced


def test_it_gives_way_to_a_profiler_that_starts_in_the_middle_of_a_step():
    model = tiny.model()
    tracer = MemoryTracer(model)
    with pytest.warns(MemtraceWarning, match="stands aside"), tracer.step():
        output = model(**tiny.batch())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            output.loss.backward()
    assert any("mm" in event.key for event in profiler.key_averages())
    with tracer.step():
        model(**tiny.batch()).loss.backward()
    tracer.close()
    assert [step.traced for step in tracer.run] == [False, True]


@pytest.mark.parametrize("started_before", [False, True])
def test_a_scheduled_profiler_is_never_broken(started_before):
    model = tiny.model()
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=2, repeat=2)
    finished = []
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        schedule=schedule,
        on_trace_ready=lambda done: finished.append(sum(event.count for event in done.key_averages())),
    )
    tracer = None if started_before else MemoryTracer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MemtraceWarning)
        with profiler:
            tracer = tracer or MemoryTracer(model)
            for _ in range(7):
                with tracer.step():
                    model(**tiny.batch()).loss.backward()
                profiler.step()
        with tracer.step():
            model(**tiny.batch()).loss.backward()
    tracer.close()
    assert len(finished) == 2
    assert all(count > 100 for count in finished)
    assert tracer.run.steps[-1].traced


def test_two_tracers_in_two_threads_see_their_own_steps():
    torch.manual_seed(0)
    tracers = {}

    def work(name: str, kind: str) -> None:
        model = tiny.model(kind)
        tracer = tracers[name] = MemoryTracer(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(3):
            with tracer.step():
                model(**tiny.batch()).loss.backward()
        tracer.close()

    threads = [threading.Thread(target=work, args=(kind, kind)) for kind in ("llama", "phi3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not hasattr(torch.autograd._engine_run_backward, "_memtrace")
    for kind, tracer in tracers.items():
        assert len(tracer.run) == 3
        for step in tracer.run:
            if step.traced:
                assert sum(step.peak.categories.values()) == step.peak.allocator_bytes
                assert step.peak.roles["weights/trainable"] == bytes_of(tiny.model(kind).parameters())


def test_a_model_without_parameters_and_a_step_without_work():
    tracer = MemoryTracer(nn.Identity())
    with tracer.step():
        pass
    tracer.close()
    step = tracer.run.steps[0]
    assert (step.traced, step.peak.bytes) == (True, 0)


def test_closing_twice_and_stepping_after_is_harmless():
    tracer = MemoryTracer(tiny.model())
    tracer.close()
    tracer.close()
    with tracer.step():
        pass
    assert len(tracer.run) == 0
