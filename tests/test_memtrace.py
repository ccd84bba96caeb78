"""MemTrace on a real trainer: what it writes, where it reports, what happens when things go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from transformers import TrainerCallback

from trl_memtrace import MemTrace, MemtraceWarning, RunTrace


def run(folder: Path, callback: MemTrace | None = None, **settings):
    trainer = tiny.trainer(folder, **settings)
    callback = callback or MemTrace()
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def assert_nothing_is_left(trainer) -> None:
    assert hooks_of(trainer.model) == 0
    assert not torch.autograd._profiler_enabled()
    assert not hasattr(torch.autograd._engine_run_backward, "_memtrace")
    assert not hasattr(torch.autograd.profiler._prepare_profiler, "_memtrace")
    assert "_run_epoch" not in vars(trainer)


def test_the_record_is_there_after_training(tmp_path):
    trainer, callback = run(tmp_path, max_steps=6)
    assert callback.path == tmp_path / "memtrace" / "rank-00000.jsonl"
    lines = [json.loads(line) for line in callback.path.read_text().splitlines()]
    assert [line["record"] for line in lines] == ["run"] + ["step"] * 6 + ["summary"]
    assert [line["step"] for line in lines[1:-1]] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["schema"] == 1
    assert lines[0]["model"]["parameters"] == sum(parameter.numel() for parameter in trainer.model.parameters())
    assert lines[0]["versions"]["torch"] == torch.__version__
    assert lines[0]["trainer"]["class"] == "SFTTrainer"
    assert lines[-1]["peak"]["bytes"] == max(line["peak"]["bytes"] or 0 for line in lines[1:-1])
    assert_nothing_is_left(trainer)


def test_first_steps_every_nth_and_new_highs_are_traced(tmp_path):
    policy = MemTrace(first_steps=1, every_n_steps=5, new_highs=False)
    _, callback = run(tmp_path, policy, max_steps=10)
    assert [step.step for step in callback.run if step.traced] == [1, 5, 10]

    counted = MemTrace(first_steps=0, every_n_steps=None, new_highs=True)
    seen = []

    class Sizes(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
            )

    trainer = tiny.trainer(tmp_path / "highs", max_steps=10)
    trainer.add_callback(Sizes())
    trainer.add_callback(counted)
    trainer.train()
    highs = [number for number, size in enumerate(seen, 1) if size > max(seen[: number - 1], default=0)]
    assert 1 <= len(highs) < 10
    assert [step.step for step in counted.run if step.traced] == highs


def test_gradients_still_being_built_are_gradients_at_a_peak_inside_backward(tmp_path):
    model = tiny.model("llama", tie_word_embeddings=False, num_hidden_layers=4)
    _, callback = run(tmp_path, of=model, per_device_train_batch_size=1, max_steps=2)
    backward = callback.run.steps[1].phases["backward"]
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert 0 < backward.at_peak["gradients"] <= total
    assert backward.at_end["gradients"] == total


def test_foreach_scratch_is_temporaries_and_not_optimizer_states(tmp_path):
    trainer, callback = run(tmp_path, optimizer="foreach", max_grad_norm=0.0)
    total = sum(parameter.numel() * parameter.element_size() for parameter in trainer.model.parameters())
    optimizer = callback.run.steps[1].phases["optimizer"]
    steps = sum(state["step"].nbytes for state in trainer.optimizer.state.values())
    assert optimizer.at_peak["optimizer_states"] == 2 * total + steps
    assert total <= optimizer.at_peak["temporaries"] < 1.1 * total


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_shows_recomputed_activations(tmp_path, reentrant):
    options = {"use_reentrant": reentrant}
    _, callback = run(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=options)
    step = callback.run.steps[1]
    assert step.peak.categories["unattributed"] <= 0.001 * step.peak.bytes
    whole = run(tmp_path / "whole")[1].run.steps[1]
    assert step.phases["loss"].at_end["activations"] < 0.5 * whole.phases["loss"].at_end["activations"]


@pytest.fixture
def offloading_on_cpu(monkeypatch):
    """TRL's activation offloading asks which accelerator there is and fails where there is none: it is told the CPU,
    so that its saved-tensor hooks run for real, and copy from memory to memory."""
    from trl.models import activation_offloading
    from trl.trainer import sft_trainer

    def made(model):
        with monkeypatch.context() as patch:
            patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
            return activation_offloading.get_act_offloading_ctx_manager(model, use_pin_memory=False, use_streams=False)

    monkeypatch.setattr(sft_trainer, "get_act_offloading_ctx_manager", made)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)


@pytest.mark.usefixtures("offloading_on_cpu")
def test_activation_offloading(tmp_path):
    plain = tiny.trainer(tmp_path / "plain", activation_offloading=True)
    plain.train()
    trainer, callback = run(tmp_path, activation_offloading=True)
    assert tiny.losses(trainer) == tiny.losses(plain)
    for step in callback.run:
        assert sum(step.peak.categories.values()) == step.peak.allocator_bytes
        assert step.peak.categories["unattributed"] <= 0.001 * step.peak.bytes


def test_evaluation_inside_training(tmp_path):
    trainer = tiny.trainer(tmp_path, eval_strategy="steps", eval_steps=1, eval_rows=4)
    callback = MemTrace()
    trainer.add_callback(callback)
    trainer.train()
    assert [step.traced for step in callback.run] == [True] * 3
    assert_nothing_is_left(trainer)


def test_resuming_goes_on_with_the_same_record(tmp_path):
    run(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer = tiny.trainer(tmp_path, max_steps=6, save_strategy="no")
    callback = MemTrace()
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    steps = callback.run.steps
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[4].traced
    assert steps[4].peak.categories["optimizer_states"] > 0


def test_a_compiled_model(tmp_path):
    plain = tiny.trainer(tmp_path / "plain", torch_compile=True, torch_compile_backend="aot_eager")
    plain.train()
    trainer, callback = run(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert tiny.losses(trainer) == tiny.losses(plain)
    for step in callback.run:
        assert step.traced
        assert sum(step.peak.categories.values()) == step.peak.allocator_bytes
        assert step.peak.categories["unattributed"] <= 0.001 * step.peak.bytes
        assert set(step.phases) >= {"forward", "backward", "optimizer"}


class FailsAt(TrainerCallback):
    def __init__(self, step: int, problem: BaseException, event: str) -> None:
        def fail(args, state, control, **kwargs):
            if state.global_step == step:
                raise problem

        setattr(self, event, fail)


@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_step_begin"])
@pytest.mark.parametrize("problem", [RuntimeError("theirs"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_an_exception_in_training_arrives_unchanged_and_nothing_is_left(tmp_path, event, problem):
    trainer = tiny.trainer(tmp_path)
    callback = MemTrace()
    trainer.add_callback(callback)
    trainer.add_callback(FailsAt(1, problem, event))
    with pytest.raises(type(problem)) as caught:
        trainer.train()
    assert caught.value is problem
    assert_nothing_is_left(trainer)
    assert callback.run.steps[0].traced


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_in_the_model_arrives_unchanged_and_nothing_is_left(tmp_path, where):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            if where == "forward":
                raise RuntimeError("theirs")
            return value.clone()

        @staticmethod
        def backward(context, gradient):
            raise RuntimeError("theirs")

    trainer = tiny.trainer(tmp_path)
    trainer.add_callback(MemTrace())
    norm = trainer.model.model.norm
    original = norm.forward
    norm.forward = lambda hidden: Broken.apply(original(hidden))
    with pytest.raises(RuntimeError, match="theirs"):
        trainer.train()
    assert_nothing_is_left(trainer)
    norm.forward = original
    trainer.train()
    assert RunTrace.load(tmp_path / "memtrace").steps[-1].step == 3


def test_a_second_memtrace_is_switched_off_with_a_warning(tmp_path):
    trainer = tiny.trainer(tmp_path)
    first, second = MemTrace(), MemTrace()
    trainer.add_callback(first)
    trainer.add_callback(second)
    with pytest.warns(MemtraceWarning, match="has a MemTrace already"):
        trainer.train()
    assert len(first.run) == 3
    assert second.path is None
    assert_nothing_is_left(trainer)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"first_steps": -1}, "first_steps"),
        ({"first_steps": "all"}, "first_steps"),
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"new_highs": 3}, "new_highs"),
        ({"report_to": "wandbb"}, "report_to"),
        ({"report_to": 7}, "report_to"),
        ({"print_table": "yes"}, "print_table"),
        ({"output_dir": "/proc/memtrace"}, "output_dir"),
        ({"output_dir": 5}, "output_dir"),
    ],
)
def test_a_bad_option_names_the_field_and_what_it_takes(options, field):
    with pytest.raises(ValueError, match=f"^{field} must be"):
        MemTrace(**options)


def test_a_folder_that_cannot_be_written_costs_the_record_and_not_the_run(tmp_path):
    (tmp_path / "memtrace").write_text("a file where the folder should be")
    trainer = tiny.trainer(tmp_path)
    trainer.add_callback(MemTrace())
    with pytest.warns(MemtraceWarning, match="JsonlSink is switched off"):
        trainer.train()
    assert len(tiny.losses(trainer)) == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_costs_the_record_and_not_the_run(tmp_path):
    (tmp_path / "memtrace").mkdir()
    (tmp_path / "memtrace" / "rank-00000.jsonl").symlink_to("/dev/full")
    trainer = tiny.trainer(tmp_path)
    trainer.add_callback(MemTrace())
    with pytest.warns(MemtraceWarning, match="JsonlSink is switched off"):
        trainer.train()
    assert len(tiny.losses(trainer)) == 3
    assert_nothing_is_left(trainer)


def test_memtraces_own_failure_switches_it_off_and_training_goes_on(tmp_path, monkeypatch):
    from trl_memtrace import bookkeeping

    def broken(*args, **kwargs):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(bookkeeping, "attribute", broken)
    trainer = tiny.trainer(tmp_path)
    trainer.add_callback(MemTrace())
    with pytest.warns(MemtraceWarning, match="switched itself off") as caught:
        trainer.train()
    assert sum("switched itself off" in str(warning.message) for warning in caught) == 1
    assert len(tiny.losses(trainer)) == 3
    assert_nothing_is_left(trainer)


def test_two_trainers_one_after_the_other_and_one_inside_the_other(tmp_path):
    inner_losses = []

    class TrainsAnother(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                inner, _ = run(tmp_path / "inner")
                inner_losses.extend(tiny.losses(inner))

    outer = tiny.trainer(tmp_path / "outer")
    callback = MemTrace()
    outer.add_callback(callback)
    outer.add_callback(TrainsAnother())
    outer.train()
    assert len(inner_losses) == 3
    assert [step.traced for step in callback.run] == [True] * 3
    assert len(RunTrace.load(tmp_path / "inner")) == 3
    assert_nothing_is_left(outer)


def test_the_model_can_be_collected_after_training(tmp_path):
    import gc
    import weakref

    trainer, callback = run(tmp_path)
    gone = weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert gone() is None
    assert callback.run.peak.bytes


def test_the_table_is_printed_unless_asked_not_to(tmp_path, capsys):
    run(tmp_path / "quiet")
    assert "MemTrace" not in capsys.readouterr().out
    _, callback = run(tmp_path / "loud", MemTrace(print_table=True))
    out = capsys.readouterr().out
    assert "Peak" in out
    assert "optimizer states" in out
    assert "modules that hold most" in out
    assert "Tracing took" in out
    assert str(callback.path) in out.replace("\n", "").replace(" ", "")


KILLED = """
import sys
sys.path[:0] = {paths!r}
import os, signal, pathlib
import tiny
from transformers import TrainerCallback
from trl_memtrace import MemTrace

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

trainer = tiny.trainer(pathlib.Path({folder!r}), max_steps=5)
trainer.add_callback(MemTrace())
trainer.add_callback(Kill())
trainer.train()
"""


def test_a_killed_run_leaves_a_record_that_loads(tmp_path):
    script = KILLED.format(paths=[str(Path(__file__).parent)], folder=str(tmp_path))
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    record = RunTrace.load(tmp_path)
    assert [step.step for step in record] == [1, 2, 3]
    with (tmp_path / "memtrace" / "rank-00000.jsonl").open("a") as file:
        file.write('{"record":"step","step":4,"tra')
    assert [step.step for step in RunTrace.load(tmp_path)] == [1, 2, 3]


def test_nothing_is_warned_about_in_a_plain_run(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemtraceWarning)
        run(tmp_path)


def test_a_page_for_people_stands_beside_the_record(tmp_path, capsys):
    _, callback = run(tmp_path, MemTrace(print_table=True))
    page = tmp_path / "memtrace" / "report.html"
    words = page.read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    assert f"in {callback.run.peak.phase.value} of step {callback.run.peak.step}:" in words
    assert f"Report: {page}" in "".join(capsys.readouterr().out.replace("\n", "").replace("  ", ""))


def test_a_page_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "memtrace" / "report.html").mkdir(parents=True)
    with pytest.warns(MemtraceWarning, match="the HTML report is not written, the record is: IsADirectoryError"):
        _, callback = run(tmp_path)
    assert len(callback.run) == 3


def test_no_page_where_none_is_wanted(tmp_path):
    run(tmp_path, MemTrace(report=False))
    assert not (tmp_path / "memtrace" / "report.html").exists()
    with pytest.raises(ValueError, match="report must be True or False, not 'no'"):
        MemTrace(report="no")
