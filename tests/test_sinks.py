"""What reaches W&B, TensorBoard and trackio, read back from what they themselves wrote."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import wandb_file
from transformers import TrainerCallback

import trl_memtrace
from trl_memtrace import MemTrace, MemtraceWarning, RunTrace
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
    callback = MemTrace()
    trainer = train(tmp_path, callback, report_to=["wandb"])
    assert len(tiny.losses(trainer)) == 5
    assert_the_report_went_on(callback)


def assert_the_report_went_on(callback) -> None:
    assert len(callback.run) == 5
    assert callback.path.with_name("report.html").is_file()
    last = callback.path.read_text().splitlines()[-1]
    assert json.loads(last)["record"] == "summary"


def test_without_a_login_training_and_report_go_on(tmp_path, monkeypatch):
    """Nobody has logged in and no run is open: there is nowhere to send to, and nothing is asked of the user."""
    import wandb

    wandb.finish()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(wandb, "login", lambda *args, **kwargs: pytest.fail("a login was asked for"))
    monkeypatch.setattr(wandb, "init", lambda *args, **kwargs: pytest.fail("a run was opened"))
    callback = MemTrace(report_to=["wandb"])
    trainer = train(tmp_path, callback, report_to=[])
    assert len(tiny.losses(trainer)) == 5
    assert_the_report_went_on(callback)


def test_a_run_that_is_finished_under_way_costs_nothing(tmp_path, offline_wandb):
    import wandb

    class Finishes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                wandb.finish()

    wandb.init(project="somebody-elses", mode="offline")
    callback = MemTrace(report_to=["wandb"])
    trainer = train(tmp_path, Finishes(), callback, report_to=[])
    assert len(tiny.losses(trainer)) == 5
    assert_the_report_went_on(callback)


@pytest.mark.parametrize("fails", ["log", "config", "summary"])
def test_a_run_without_a_network_is_let_go_with_one_warning(tmp_path, monkeypatch, fails):
    """A W&B run whose every call ends as W&B's own does when its backend cannot be reached."""
    import wandb
    from wandb.errors import CommError

    class Unreachable:
        def log(self, *args, **kwargs):
            if fails == "log":
                raise CommError("network is unreachable")

        def __getattr__(self, name):
            if name == fails:
                raise CommError("network is unreachable")
            return SimpleNamespace(update=lambda *args, **kwargs: None)

    wandb.finish()
    monkeypatch.setattr(wandb, "run", Unreachable())
    callback = MemTrace(report_to=["wandb"])
    with pytest.warns(MemtraceWarning, match="WandbSink is switched off.*network is unreachable") as caught:
        trainer = train(tmp_path, callback, report_to=[])
    assert sum(issubclass(warning.category, MemtraceWarning) for warning in caught) == 1
    assert len(tiny.losses(trainer)) == 5
    assert_the_report_went_on(callback)


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
    """Read back from the database that trackio itself wrote, with nothing of trackio's."""
    pytest.importorskip("trackio")
    # trackio reads its folder when it is imported, so it is in a process of its own
    code = (
        "import sys, tiny\n"
        "from pathlib import Path\n"
        "from trl_memtrace import MemTrace\n"
        "trainer = tiny.trainer(Path(sys.argv[1]), max_steps=5, report_to=['trackio'], project='memtrace-test')\n"
        "trainer.add_callback(MemTrace())\n"
        "trainer.train()\n"
    )
    places = [str(Path(__file__).parent), str(Path(trl_memtrace.__file__).parent.parent)]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "store"), "PYTHONPATH": os.pathsep.join(places)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, capture_output=True)
    (database,) = (tmp_path / "store").glob("*.db")
    with contextlib.closing(sqlite3.connect(database)) as store:
        rows = [json.loads(row[0]) for row in store.execute("SELECT metrics FROM metrics ORDER BY step")]
    assert [row["train/global_step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5]
    ours = {row["train/global_step"]: row for row in rows if "memory/peak/total_gib" in row}
    traced = [step for step in RunTrace.load(tmp_path) if step.traced]
    assert len(traced) >= 3
    assert set(ours) == {step.step for step in traced}
    for step in traced:
        assert numbers_of(step).items() <= ours[step.step].items()
        assert ours[step.step]["memory/peak/weights_gib"] == step.peak.categories["weights"] / GIB


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
