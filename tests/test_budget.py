"""A limit that a run is held to."""

from __future__ import annotations

import warnings

import pytest
import tiny

from trl_memtrace import MemTrace, MemtraceWarning, RunTrace
from trl_memtrace.budget import Budget
from trl_memtrace.categories import Phase
from trl_memtrace.records import UNTRACED, Peak

MIB = 1024**2


def train(folder, limit, **options):
    trainer = tiny.trainer(folder, max_steps=6, save_strategy="no")
    trainer.add_callback(MemTrace(limit=limit, new_highs=False, **options))
    trainer.train()
    return trainer


def test_a_run_within_its_limit_is_silent(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemtraceWarning)
        trainer = train(tmp_path, "1 TiB", on_limit="stop")
    assert trainer.state.global_step == 6
    highest = RunTrace.load(tmp_path).peak.bytes
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemtraceWarning)
        train(tmp_path / "exactly", highest, on_limit="stop")


@pytest.mark.parametrize(
    ("on_limit", "last", "saved"), [("warn", 6, False), ("stop", 1, False), ("save_and_stop", 1, True)]
)
def test_a_step_over_the_limit(tmp_path, on_limit, last, saved):
    with pytest.warns(MemtraceWarning, match="more than the limit of") as caught:
        trainer = train(tmp_path, "1MiB", on_limit=on_limit)
    (warning,) = [str(row.message) for row in caught if "limit" in str(row.message)]
    peak = RunTrace.load(tmp_path).steps[0].peak
    largest = max(peak.categories, key=lambda name: peak.categories[name] or 0)
    assert warning.startswith("step 1 held ")
    assert f"the limit of 1.00 MiB; {'training goes on' if on_limit == 'warn' else 'training'}" in warning
    assert f"What held it, in {peak.phase}: {largest.replace('_', ' ')} " in warning
    assert "\n" not in warning
    assert trainer.state.global_step == last
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file() == saved


def test_the_step_that_is_over_the_limit_is_the_one_that_ends_it(tmp_path):
    first = RunTrace.load(train(tmp_path / "free", None).args.output_dir).steps[0].peak.bytes
    with pytest.warns(MemtraceWarning, match="^step 2 held"):
        trainer = train(tmp_path / "held", first, on_limit="stop")  # the optimizer's states come in the first
    assert trainer.state.global_step == 2


def test_what_is_traced_after_a_step_counts_too(tmp_path):
    trainer = tiny.trainer(tmp_path / "free", max_steps=3, eval_strategy="steps", eval_steps=1, eval_rows=16)
    trainer.args.per_device_eval_batch_size = 16
    callback = MemTrace()
    trainer.add_callback(callback)
    trainer.train()
    (first, *_) = callback.run.steps
    step = max(phase.peak_bytes for name, phase in first.phases.items() if name != "evaluate")
    evaluation = first.phases["evaluate"].peak_bytes
    assert evaluation > step
    trainer = tiny.trainer(tmp_path / "held", max_steps=6, eval_strategy="steps", eval_steps=1, eval_rows=16)
    trainer.args.per_device_eval_batch_size = 16
    trainer.add_callback(MemTrace(limit=(evaluation + step) // 2, on_limit="stop"))
    with pytest.warns(MemtraceWarning, match="in evaluate"):
        trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("limit", ["40GB?", "", "-1GiB", 0, -5, True, 1.5, [1]])
def test_a_bad_limit_is_refused(limit):
    with pytest.raises(ValueError, match=r"^limit must be"):
        MemTrace(limit=limit)


def test_a_bad_action_is_refused():
    with pytest.raises(ValueError, match=r"^on_limit must be one of warn, stop, save_and_stop, not 'halt'"):
        MemTrace(limit="1GiB", on_limit="halt")


def test_what_is_said_in_one_line():
    budget = Budget.of("40 GiB", "save_and_stop")
    assert budget.limit_bytes == 40 * 1024**3
    peak = Peak(
        Phase.BACKWARD,
        50 * 1024**3,
        50 * 1024**3,
        {**dict.fromkeys(UNTRACED, 0), "activations": 40 * 1024**3, "weights": 10 * 1024**3},
        modules={"": {"weights": 10 * 1024**3}, "layers.3.mlp": {"activations": 30 * 1024**3}},
    )
    assert budget.exceeded(12, 50 * 1024**3, peak) == (
        "step 12 held 50.00 GiB, more than the limit of 40.00 GiB; training is saved and stops here."
        " What held it, in backward: activations 40.00 GiB, weights 10.00 GiB, most of it in layers.3.mlp (30.00 GiB)"
    )
    assert budget.exceeded(12, 40 * 1024**3, peak) is None
    assert budget.exceeded(12, 41 * 1024**3, Peak()).endswith("the step was not traced")
    assert Budget.of(None, "warn") is None


def test_a_counted_step_is_held_against_the_limit_by_the_allocator_s_counter(tmp_path, monkeypatch):
    from trl_memtrace.tracer import MemoryTracer

    counted = iter([None, None, 5 * MIB, 9 * MIB, 9 * MIB, 9 * MIB])
    monkeypatch.setattr(MemoryTracer, "counted_peak_bytes", property(lambda tracer: next(counted)))
    with pytest.warns(MemtraceWarning, match="^step 4 held 9.00 MiB, .* was not traced"):
        trainer = train(tmp_path, "8MiB", on_limit="stop", first_steps=0)
    assert trainer.state.global_step == 4
