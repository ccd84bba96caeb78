"""What reaches W&B, TensorBoard and trackio, read back from what they themselves wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import wandb_file
from transformers import TrainerCallback

from trl_memtrace import MemTrace, MemtraceWarning
from trl_memtrace.sinks.metrics import step_metrics

GIB = 1024**3


@pytest.fixture
def offline_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    yield tmp_path
    wandb.finish()


def numbers_of(step) -> dict[str, float]:
    """Its metrics but one: the record rounds the time that tracing took."""
    return {key: value for key, value in step_metrics(step).items() if key != "memory/tracing_seconds"}


def train(folder: Path, *callbacks, **settings):
    trainer = tiny.trainer(folder, max_steps=5, **settings)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def test_wandb_rows_hold_our_metrics_beside_the_trainers_own(tmp_path, offline_wandb):
    callback = MemTrace()
    train(tmp_path, callback, report_to=["wandb"])
    rows, summary, config = wandb_file.read(offline_wandb)
    by_step = {row["train/global_step"]: row for row in rows if "train/loss" in row}
    for step in callback.run:
        row = by_step[step.step]
        assert ("memory/peak/total_gib" in row) == step.traced
        if step.traced:
            assert row["memory/peak/activations_gib"] == step.peak.categories["activations"] / GIB
            assert row["memory/forward/total_gib"] == step.phases["forward"].peak_bytes / GIB
            parts = [row[f"memory/peak/{name}_gib"] for name in step.peak.categories]
            assert sum(parts) == pytest.approx(row["memory/peak/total_gib"], rel=1e-12)
    assert summary["memory/run/peak/total_gib"] == callback.run.peak.bytes / GIB
    assert summary["memory/run/peak/phase"] == callback.run.peak.phase
    assert any("memory/modules" in key for row in rows for key in row)
    assert config["memtrace"]["first_steps"] == 3
    logged = {key: value for row in rows for key, value in row.items() if key.startswith("memory/")}
    assert logged["memory/timeline/_type"] == logged["memory/steps/_type"] == "plotly-file"
    (run,) = offline_wandb.glob("wandb/offline-run-*")
    drawn = json.loads((run / "files" / logged["memory/steps/path"]).read_text())
    bands = [trace for trace in drawn["data"] if "stackgroup" in trace]
    assert bands[0]["x"] == [step.step for step in callback.run if step.traced]
    highest = max(sum(heights) for heights in zip(*(band["y"] for band in bands), strict=True))
    assert highest == pytest.approx(callback.run.peak.bytes / 1024**2, abs=1e-3)


def test_the_runs_own_step_is_the_same_with_memtrace_and_without(tmp_path, offline_wandb, monkeypatch):
    class LogsWithStep(TrainerCallback):
        """A user's callback that passes ``step=``: W&B drops what comes with a step that is past."""

        def on_step_end(self, args, state, control, **kwargs):
            import wandb

            wandb.log({"mine": float(state.global_step)}, step=state.global_step)

    seen = {}
    for name, callbacks in {"without": [], "with": [MemTrace()]}.items():
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setenv("WANDB_DIR", str(folder))
        train(folder, *callbacks, LogsWithStep(), report_to=["wandb"])
        rows, _, _ = wandb_file.read(folder)
        seen[name] = [
            {key: row[key] for key in ("_step", "mine", "train/loss", "train/global_step") if key in row}
            for row in rows
        ]
    assert [row.get("mine") for row in seen["with"] if "mine" in row] == [1.0, 2.0, 3.0, 4.0, 5.0]
    trained = [[row for row in rows if "train/loss" in row or "mine" in row] for rows in seen.values()]
    assert trained[0] == trained[1]


def test_metrics_of_steps_that_are_not_logged_wait_for_the_next_log(tmp_path, offline_wandb):
    callback = MemTrace(first_steps=10)
    train(tmp_path, callback, report_to=["wandb"], logging_steps=4)
    rows, _, _ = wandb_file.read(offline_wandb)
    shown = [row for row in rows if "memory/peak/total_gib" in row]
    steps = callback.run.steps
    first = max(steps[:4], key=lambda step: step.peak.bytes)
    assert [row["train/global_step"] for row in shown] == [4, 5]
    assert shown[0]["memory/peak/total_gib"] == first.peak.bytes / GIB
    assert shown[1]["memory/peak/total_gib"] == steps[4].peak.bytes / GIB


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_a_disabled_run_or_another_run_already_active_costs_nothing(tmp_path, offline_wandb, monkeypatch, mode):
    import wandb

    monkeypatch.setenv("WANDB_MODE", mode)
    wandb.init(project="somebody-elses", mode=mode)
    trainer = train(tmp_path, MemTrace(), report_to=["wandb"])
    assert len(tiny.losses(trainer)) == 5


def test_tensorboard_shows_the_same_numbers(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    callback = MemTrace()
    train(tmp_path, callback, report_to=["tensorboard"])
    folders = {file.parent for file in (tmp_path / "events").rglob("events.out.tfevents.*")}
    scalars: dict[tuple[str, int], float] = {}
    for folder in folders:
        events = EventAccumulator(str(folder)).Reload()
        for tag in events.Tags()["scalars"]:
            scalars.update({(tag, event.step): event.value for event in events.Scalars(tag)})
    assert ("train/loss", 5) in scalars
    for step in callback.run:
        if step.traced:
            for key, value in numbers_of(step).items():
                assert scalars[key, step.step] == pytest.approx(value, rel=1e-6)


def test_trackio_shows_the_same_numbers(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    sent = []
    real = trackio.log

    def log(metrics, step=None):
        sent.append(metrics)
        return real(metrics, step)

    monkeypatch.setattr(trackio, "log", log)
    callback = MemTrace()
    train(tmp_path, callback, report_to=["trackio"], project="memtrace-test")
    ours = {row["train/global_step"]: row for row in sent if "memory/peak/total_gib" in row}
    for step in callback.run:
        if step.traced:
            assert numbers_of(step).items() <= ours[step.step].items()


def test_every_other_reporter_gets_them_through_its_own_callback(tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    class Reporter(TrainerCallback):
        seen: list = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", Reporter)
    callback = MemTrace()
    train(tmp_path, callback, report_to=["mlflow"])
    totals = [logs["memory/peak/total_gib"] for logs in Reporter.seen if "memory/peak/total_gib" in logs]
    assert totals == [step.peak.bytes / GIB for step in callback.run if step.traced]


def test_a_sink_that_fails_is_let_go_with_one_warning(tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    class Broken(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "memory/peak/total_gib" in logs:
                raise ConnectionError("no network")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", Broken)
    callback = MemTrace()
    with pytest.warns(MemtraceWarning, match="TrackerSink is switched off") as caught:
        trainer = train(tmp_path, callback, report_to=["mlflow"])
    assert sum(issubclass(warning.category, MemtraceWarning) for warning in caught) == 1
    assert len(tiny.losses(trainer)) == 5
    assert len(callback.run) == 5


@pytest.mark.parametrize(("report_to", "expected"), [("none", 0), ("trainer", 3), (["mlflow"], 3), (["wandb"], 0)])
def test_report_to_chooses(tmp_path, monkeypatch, report_to, expected):
    from transformers.integrations import integration_utils

    class Reporter(TrainerCallback):
        seen: list = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", Reporter)
    train(tmp_path, MemTrace(report_to=report_to, new_highs=False), report_to=["mlflow"])
    assert sum("memory/peak/total_gib" in logs for logs in Reporter.seen) == expected
