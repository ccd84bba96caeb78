"""A guest in somebody's run: copies of the model, compilation, interrupts, other models, callbacks that come and
go."""

from __future__ import annotations

import copy
import gc
import io
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from test_memtrace import assert_nothing_is_left, hooks_of
from transformers import TrainerCallback

from trl_memtrace import MemoryTracer, MemTrace, MemtraceWarning, RunTrace, TracePolicy
from trl_memtrace.recorders import cpu


def peak_of(work, model, optimizer, policy=None, steps=((),)):
    tracer = MemoryTracer(model, optimizer, policy=policy)
    for arguments in steps:
        with tracer.step():
            work(*arguments)
    tracer.close()
    return tracer.run.steps


@pytest.mark.parametrize("event", ["on_train_begin", "on_pre_optimizer_step", "on_step_end"])
def test_the_model_can_be_copied_and_pickled_while_it_is_watched(tmp_path, event):
    copies = []

    class Copies(TrainerCallback):
        pass

    def copies_model(self, args, state, control, model=None, **kwargs):
        torch.save(model, io.BytesIO())
        copies.append(copy.deepcopy(model))

    setattr(Copies, event, copies_model)
    trainer = tiny.trainer(tmp_path)
    trainer.add_callback(MemTrace(first_steps=1))
    trainer.add_callback(Copies())
    trainer.train()
    assert len(tiny.losses(trainer)) == 3
    copies[-1](**tiny.batch(8)).loss.backward()
    assert_nothing_is_left(trainer)


@pytest.mark.parametrize("compile_it", ["in place", "forward", "returned"])
def test_compiled_models_are_not_compiled_again_because_of_us(compile_it):
    from torch._dynamo.testing import CompileCounterWithBackend

    counted = {}
    for traced in (False, True):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model = called = tiny.model()
        if compile_it == "in place":
            model.compile(backend=counter, fullgraph=True)
        elif compile_it == "forward":
            model.forward = torch.compile(model.forward, backend=counter)
        else:
            called = torch.compile(model, backend=counter)
        tracer = MemoryTracer(called) if traced else None
        inputs = tiny.batch(16)
        for _ in range(4):
            if tracer is None:
                called(**inputs).loss.backward()
            else:
                with tracer.step():
                    called(**inputs).loss.backward()
        counted[traced] = counter.frame_count
        if tracer is not None:
            tracer.close()
            for step in tracer.run:
                assert step.traced
                assert sum(step.peak.categories.values()) == step.peak.bytes
                assert step.peak.categories["activations"] > 0
                assert set(step.phases) >= {"forward", "backward"}
    assert counted[True] == counted[False]


def test_warnings_made_errors_end_no_run(tmp_path):
    (tmp_path / "memtrace").write_text("a file where the folder should be")
    trainer = tiny.trainer(tmp_path)
    trainer.add_callback(MemTrace())
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemtraceWarning)
        trainer.train()
    assert len(tiny.losses(trainer)) == 3
    assert_nothing_is_left(trainer)


def test_a_reference_model_is_weights_with_a_role_of_its_own(tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = {"prompt": ["say"] * 8, "chosen": [" yes please"] * 8, "rejected": [" no"] * 8}
    args = DPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    model, reference = tiny.model(), tiny.model(seed=1)
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tiny.tokenizer(),
    )
    callback = MemTrace()
    trainer.add_callback(callback)
    trainer.train()
    expected = sum(parameter.nbytes for parameter in model.parameters())
    for step in callback.run:
        assert step.peak.roles["weights/trainable"] == expected
        assert step.peak.roles["weights/reference"] >= expected
        assert step.peak.categories["unattributed"] <= 0.001 * step.peak.bytes


def test_a_new_high_has_the_phases_and_the_inputs_of_a_planned_step(tmp_path):
    def steps(folder, callback):
        trainer = tiny.trainer(folder, per_device_train_batch_size=1)
        trainer.add_callback(callback)
        trainer.train()
        return callback.run.steps

    planned = steps(tmp_path / "planned", MemTrace(first_steps=100))
    seen = steps(tmp_path / "seen", MemTrace(first_steps=0, every_n_steps=None))
    assert seen[0].traced
    for high, whole in zip(seen, planned, strict=True):
        if high.traced:
            assert high.peak.bytes == pytest.approx(whole.peak.bytes, rel=0.001)
            assert high.peak.phase == whole.peak.phase
            for name in ("forward", "loss", "backward", "optimizer"):
                assert high.phases[name].peak_bytes == pytest.approx(whole.phases[name].peak_bytes, rel=0.001)
            assert high.peak.categories["inputs"] == whole.peak.categories["inputs"] > 0


def test_a_larger_second_forward_is_traced_whole_in_the_next_step():
    model = tiny.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(first: int, second: int) -> None:
        (model(**tiny.batch(first)).loss + model(**tiny.batch(second)).loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    sizes = ((60, 60), (60, 64), (60, 64))
    whole = peak_of(step, model, optimizer, steps=sizes)
    seen = peak_of(step, model, optimizer, TracePolicy(1, None, True), steps=sizes)
    assert [step.traced for step in seen] == [True, False, True]
    assert seen[2].peak.bytes == pytest.approx(whole[2].peak.bytes, rel=0.001)


def test_a_closure_that_runs_backward_inside_the_optimizer():
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    inputs = torch.randn(8, 64)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().sum()
        loss.backward()
        return loss

    (step,) = peak_of(lambda: optimizer.step(closure), model, optimizer)
    assert sum(step.peak.categories.values()) == step.peak.bytes
    assert set(step.phases) >= {"optimizer", "backward"}
    assert step.peak.phase != "idle"


def test_optimizer_state_inside_any_object_is_found():
    class Projector:
        def __init__(self) -> None:
            self.basis = torch.randn(1000)

    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["projector"] = Projector()
    (step,) = peak_of(lambda: model(torch.randn(2, 8)).sum().backward(), model, optimizer)
    assert step.peak.roles["optimizer_states/projector"] == 4000


@pytest.mark.parametrize("name", ["_prepare_profiler", "_enable_profiler", "_disable_profiler", "_allocations"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_ctrl_c_inside_the_recorder_leaves_nothing(monkeypatch, name, after):
    real = getattr(cpu, name)
    pressed = []

    def interrupted(*args, **kwargs):
        if pressed:
            return real(*args, **kwargs)
        pressed.append(True)
        if after:
            real(*args, **kwargs)
        raise KeyboardInterrupt

    model = tiny.model()
    tracer = MemoryTracer(model)
    monkeypatch.setattr(cpu, name, interrupted)
    with pytest.raises(KeyboardInterrupt), tracer.step():
        model(**tiny.batch(8)).loss.backward()
    monkeypatch.undo()
    assert not torch.autograd._profiler_enabled()
    assert not any(module._forward_hooks for module in model.modules())
    assert not cpu._one_at_a_time.locked()
    assert gc.isenabled()
    assert cpu._cpp_log_level() is None or cpu._cpp_log_level().value == 1
    with tracer.step():
        model(**tiny.batch(8)).loss.backward()
    tracer.close()
    assert tracer.run.steps[-1].traced


@pytest.mark.parametrize("collecting", [True, False])
def test_no_garbage_is_collected_while_training_waits(collecting):
    model = tiny.model()
    tracer = MemoryTracer(model)
    inputs = tiny.batch(8)
    collections = []

    def collects(phase, info):
        collections.append(phase)

    thresholds = gc.get_threshold()
    gc.callbacks.append(collects)
    gc.set_threshold(10)
    if not collecting:
        gc.disable()
    try:
        waited = []
        for _ in range(2):
            before = len(collections)
            tracer.begin_step()
            waited.append(len(collections) - before)
            model(**inputs).loss.backward()
            before = len(collections)
            tracer.end_step()
            waited.append(len(collections) - before)
            assert gc.isenabled() == collecting
    finally:
        gc.enable()
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(collects)
    tracer.close()
    assert bool(collections) == collecting
    assert max(waited) <= 4  # what is outside: a start and a stop of one collection at either end


@pytest.mark.parametrize("event", ["on_train_begin", "on_epoch_begin"])
def test_a_callback_that_fails_before_the_first_step_leaves_nothing_in_the_way(tmp_path, event):
    class Fails(TrainerCallback):
        pass

    def fail(self, args, state, control, **kwargs):
        raise ZeroDivisionError

    setattr(Fails, event, fail)
    trainer = tiny.trainer(tmp_path)
    trainer.add_callback(MemTrace())
    trainer.add_callback(Fails())
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert hooks_of(trainer.model) == 0
    assert not hasattr(torch.autograd.profiler._prepare_profiler, "_memtrace")
    again = tiny.trainer(tmp_path, of=trainer.model)
    callback = MemTrace()
    again.add_callback(callback)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemtraceWarning)
        again.train()
    assert len(callback.run) == 3
    assert_nothing_is_left(again)


def test_a_callback_taken_off_in_mid_run_leaves_nothing(tmp_path):
    callback = MemTrace()

    class TakesOff(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.remove_callback(callback)

    trainer = tiny.trainer(tmp_path)
    trainer.add_callback(callback)
    trainer.add_callback(TakesOff())
    trainer.train()
    assert len(tiny.losses(trainer)) == 3
    assert_nothing_is_left(trainer)
    assert len(RunTrace.load(tmp_path)) == 1


def test_a_resumed_run_drops_what_the_abandoned_one_did_after_its_checkpoint(tmp_path):
    first = tiny.trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    first.add_callback(MemTrace())
    first.train()
    again = tiny.trainer(tmp_path, max_steps=3, save_strategy="no")
    callback = MemTrace()
    again.add_callback(callback)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [step.step for step in callback.run] == [1, 2, 3]


def test_asked_for_by_name_wandb_gets_rows_of_our_own(tmp_path, monkeypatch):
    import wandb
    import wandb_file

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.init()
    trainer = tiny.trainer(tmp_path, report_to=[])
    trainer.add_callback(MemTrace(report_to="wandb"))
    trainer.train()
    rows, _, _ = wandb_file.read(tmp_path)
    assert [row["memory/step"] for row in rows if "memory/step" in row] == [1, 2, 3]


def test_a_profiler_in_another_thread_waits_for_our_step(tmp_path: Path):
    import threading

    model = tiny.model()
    tracer = MemoryTracer(model)
    counted = []

    def profile():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            torch.ones(8) @ torch.ones(8)
        counted.append(sum(event.count for event in profiler.key_averages()))

    thread = threading.Thread(target=profile)
    with tracer.step():
        model(**tiny.batch(8)).loss.backward()
        thread.start()
        thread.join(0.5)
        model(**tiny.batch(8)).loss.backward()
    thread.join()
    tracer.close()
    assert counted[0] > 0
    assert tracer.run.steps[0].traced
