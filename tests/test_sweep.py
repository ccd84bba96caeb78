"""Grids of real dry runs of a small model, and what their knobs cost by hand."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import tiny
from browser import Opened, chromium
from typer.testing import CliRunner

from trl_memtrace import commands, trials
from trl_memtrace.grid import Grid
from trl_memtrace.reporters.sweep_html import render_sweep
from trl_memtrace.reporters.sweep_text import print_sweep
from trl_memtrace.sweep import OUTCOMES, PAGE, TABLE, Kept, Row, Sweep, run_sweep
from trl_memtrace.trials import Outcome, Trial, TrialPool

FLOAT, ADAM = 4, 2
LINEAR = {
    "q": (64, 64),
    "k": (64, 32),
    "v": (64, 32),
    "o": (64, 64),
    "gate": (64, 160),
    "up": (64, 160),
    "down": (160, 64),
}
LAYERS, LENGTH = 2, 64
RANKS, BATCHES = (4, 8), (1, 2, 3)
TARGETS = {"all-linear": tuple(LINEAR), "q_proj v_proj": ("q", "v")}


def adapter_elements_a_rank(targets: str) -> int:
    """LoRA adds to a layer of ``inside`` by ``outside`` as many as these together, for each rank."""
    return LAYERS * sum(sum(LINEAR[name]) for name in TARGETS[targets])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.model().config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flags(model) -> list[str]:
    return [
        *("--model_name_or_path", str(model), "--max_length", str(LENGTH), "--use_peft", "--optim", "adamw_torch"),
        *("--lora_r", ",".join(map(str, RANKS)), "--lora_target_modules", ",".join(TARGETS)),
        *("--per_device_train_batch_size", ",".join(map(str, BATCHES))),
    ]


def table_of(folder: Path) -> list[dict[str, str]]:
    with (folder / TABLE).open() as file:
        return list(csv.DictReader(file))


def call(*words: str):
    return CliRunner().invoke(commands.app, ["sweep", "sft", *words])


@pytest.fixture(scope="module")
def folder(flags, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "deep"
    ended = call(*flags, "--memory", "1GiB", "-o", str(folder), "--json")
    assert ended.exit_code == 0, ended.output
    (folder / "said.json").write_text(ended.stdout)
    return folder


def test_every_configuration_is_there(folder):
    rows = table_of(folder)
    assert len(rows) == len(RANKS) * len(TARGETS) * len(BATCHES)
    for row in rows:
        whole = sum(int(size) for name, size in row.items() if name.endswith("_bytes") and "peak" not in name and size)
        assert whole == int(row["allocated_peak_bytes"]) <= int(row["reserved_peak_bytes"])
        elements = adapter_elements_a_rank(row["lora_target_modules"]) * int(row["lora_r"])
        assert int(row["optimizer_states_bytes"]) >= ADAM * FLOAT * elements
        assert row["fits"] == "True"
        assert row["error"] == ""


def test_what_a_rank_and_a_token_cost(folder):
    costs = {(cost["knob"], cost["what"]): cost for cost in json.loads((folder / "said.json").read_text())["costs"]}
    rank = costs["lora_r", "a rank"]
    by_target = sorted(FLOAT * adapter_elements_a_rank(targets) for targets in TARGETS)
    assert rank["categories"]["weights"] == sum(by_target) / 2  # the median of two
    assert rank["categories"]["optimizer_states"] == ADAM * sum(by_target) / 2
    assert (rank["spread"]["least"], rank["spread"]["most"]) == tuple((1 + ADAM) * size for size in by_target)
    sequence, token = (costs["per_device_train_batch_size", what] for what in ("a sequence", "a token"))
    assert token["spread"]["median"] == sequence["spread"]["median"] / LENGTH
    targets = costs["lora_target_modules", "q_proj v_proj, not all-linear"]
    fewer = adapter_elements_a_rank("all-linear") - adapter_elements_a_rank("q_proj v_proj")
    assert targets["categories"]["weights"] == -FLOAT * fewer * sum(RANKS) / 2


def test_a_dry_run_of_its_own_gives_the_same(folder, model):
    from trl_memtrace.estimating import estimate

    row = next(
        row
        for row in json.loads((folder / "said.json").read_text())["rows"]
        if row["knobs"] == {"lora_r": "8", "lora_target_modules": "q_proj v_proj", "per_device_train_batch_size": "2"}
    )
    alone = estimate(
        "sft",
        [
            *("--model_name_or_path", str(model), "--max_length", "64", "--use_peft", "--optim", "adamw_torch"),
            *("--lora_r", "8", "--lora_target_modules", "q_proj", "v_proj", "--per_device_train_batch_size", "2"),
        ],
        device=1 << 30,
    )
    assert row["summary"]["peak"] == json.loads(json.dumps(alone.summary()["peak"]))
    assert row["summary"]["reserved_peak_bytes"] == alone.summary()["reserved_peak_bytes"]
    assert row["longest"] == LENGTH


def test_it_goes_on_where_it_was_ended(folder, flags, monkeypatch, tmp_path):
    lines = (folder / OUTCOMES).read_text().splitlines(keepends=True)
    (tmp_path / OUTCOMES).write_text("".join(lines[:-1]) + lines[-1][:50])
    made: list[Trial] = []
    submit = TrialPool.submit
    monkeypatch.setattr(TrialPool, "submit", lambda self, trial: made.append(trial) or submit(self, trial))
    ended = call(*flags, "--memory", "1GiB", "-o", str(tmp_path), "--json")
    assert ended.exit_code == 0, ended.output
    assert len(made) == 1  # the one whose line was cut short
    assert (tmp_path / TABLE).read_text() == (folder / TABLE).read_text()
    made.clear()
    assert call(*flags, "--memory", "1GiB", "-o", str(tmp_path)).exit_code == 0
    assert made == []
    told = [Row(row.point, row.outcome) for row in run_sweep("sft", flags, device=1 << 30, kept=kept(tmp_path)).rows]
    assert [row.outcome.allocated_bytes for row in told] == [
        int(row["allocated_peak_bytes"]) for row in table_of(folder)
    ]


def kept(folder: Path) -> Kept:
    from trl_memtrace.versions import versions

    return Kept(folder / OUTCOMES, versions())


def test_another_model_other_versions_and_what_failed_are_tried_again(tmp_path):
    config = tmp_path / "config.json"
    config.write_text("{}")
    trial = Trial("sft", ("--model_name_or_path", str(tmp_path)))
    for outcome in (Outcome(error="no"), Outcome(summary={"allocated_peak_bytes": 1})):
        Kept(tmp_path / OUTCOMES, {"torch": "1"}).keep(trial, outcome)
        found = Kept(tmp_path / OUTCOMES, {"torch": "1"}).find(trial)
        assert found == (None if outcome.error else outcome)
    assert Kept(tmp_path / OUTCOMES, {"torch": "2"}).find(trial) is None
    config.write_text('{"a": 1}')
    assert Kept(tmp_path / OUTCOMES, {"torch": "1"}).find(trial) is None


def test_a_configuration_that_cannot_be_run_costs_itself_only(model, tmp_path):
    words = ["--model_name_or_path", str(model), "--max_length", "8,16", "--optim", "adamw_torch,none\x1b[2J"]
    ended = call(*words, "-o", str(tmp_path), "--workers", "1")
    assert ended.exit_code == 0, ended.output
    assert "2 could not be run" in " ".join(ended.stdout.split())
    assert "\x1b[2J" not in ended.output
    rows = table_of(tmp_path)
    assert [bool(row["error"]) for row in rows] == [False, True, False, True]
    assert "none" in rows[1]["error"]
    assert call("--model_name_or_path", str(model / "missing"), "--lora_r", "1,2", "-o", str(tmp_path)).exit_code == 2


@pytest.mark.parametrize(
    ("words", "problem"),
    [(["--lora_r", "8"], "nothing to sweep"), (["--lora_r", "8,16", "--device", "H900"], "no known device")],
)
def test_wrong_use_is_one_line(words, problem, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trl-memtrace", "sweep", "sft", *words, "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert problem in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(flags, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["trl-memtrace", "sweep", "sft", *flags, "-o", str(tmp_path / "file" / "x")])
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert end.value.code == 2
    assert "cannot write into" in capsys.readouterr().err


# --- workers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (
            "import os; input(); os.kill(os.getpid(), 9)",
            "its process was ended by SIGKILL, perhaps for want of memory",
        ),
        ("input(); raise RuntimeError('no\\x1b way')", "its process ended with 1: RuntimeError: no\\x1b way"),
    ],
)
def test_a_worker_that_dies_costs_its_trial(monkeypatch, code, error):
    monkeypatch.setattr(trials._Worker, "COMMAND", (sys.executable, "-c", code))
    with TrialPool(2) as pool:
        ended = [pool.submit(Trial("sft", ())) for _ in range(3)]
        assert {future.result().error for future in ended} == {error}


def test_leaving_ends_the_workers(monkeypatch, tmp_path):
    """And leaves nothing of what they have written for a while."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import tempfile, time; tempfile.mkdtemp(); time.sleep(600)"
    monkeypatch.setattr(trials._Worker, "COMMAND", (sys.executable, "-c", code))
    with pytest.raises(KeyboardInterrupt), TrialPool(1) as pool:
        future = pool.submit(Trial("sft", ()))
        while not pool._working:
            pass
        (worker,) = pool._working
        while not any(tmp_path.glob("memtrace-*/*")):
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert worker.has_ended
    assert not any(tmp_path.iterdir())
    assert future.result(timeout=5).error is not None


def test_a_worker_ends_with_whoever_started_it(monkeypatch, tmp_path):
    """In the middle of a trial, too."""
    code = (
        "import time; from trl_memtrace import trial_worker\n"
        f"def endless(trial): open({str(tmp_path / 'begun')!r}, 'w').close(); time.sleep(600)\n"
        "trial_worker.try_out = endless; trial_worker.main()"
    )
    monkeypatch.setattr(trials._Worker, "COMMAND", (sys.executable, "-c", code))
    worker = trials._Worker()
    process = worker._process
    try:
        process.stdin.write(json.dumps(Trial("sft", ()).to_json()) + "\n")
        process.stdin.flush()
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.stdin.close()  # as the system does for a process that is killed
        assert process.wait(timeout=10) == 0
    finally:
        worker.close()


def test_nothing_of_torch_is_needed_to_ask_for_trials():
    modules = ("fitting", "sweep", "commands.sweep", "commands.fit")
    code = f"import sys, {', '.join(f'trl_memtrace.{name}' for name in modules)}; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


# --- real runs -------------------------------------------------------------------------------------------------------


def test_measured_is_a_real_run_and_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model_name_or_path", str(model), "--max_length", "16", "--use_cpu", "--bf16", "false"]
    words += ["--per_device_train_batch_size", "1,2", "--optim", "adamw_torch"]
    found = run_sweep("sft", words, measured=True, workers=2)
    weights = sum(parameter.numel() for parameter in tiny.model().parameters()) * FLOAT
    for row in found.rows:
        assert row.outcome.error is None
        assert row.outcome.summary["source"] == "run"
        assert row.outcome.roles["weights/trainable"] == weights
        assert row.outcome.categories["optimizer_states"] >= ADAM * weights
        assert row.outcome.categories["unattributed"] <= 0.001 * row.outcome.allocated_bytes
    assert list(tmp_path.iterdir()) == []
    assert [path.name for path in model.iterdir()] == ["config.json"]


# --- what is shown ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", ["8,all,16", "8,8.0,8e0"])
def test_what_is_no_number_is_a_choice_and_costs_what_it_costs(choices):
    grid = Grid.of(["--a", choices])
    sizes = (5, 6, 25)
    peaks = [{"peak": {"phase": "forward", "categories": {"weights": size}, "roles": {}}} for size in sizes]
    rows = [
        Row(point, Outcome({**peak, "allocated_peak_bytes": size}))
        for point, peak, size in zip(grid.points(), peaks, sizes, strict=True)
    ]
    assert [cost.spread.median for cost in Sweep("sft", grid, tuple(rows)).costs()] == [1, 20]


def hostile() -> Sweep:
    grid = Grid.of(["--a", "<b>x</b>,y\x1b[1m", "--lora_r", "1,2"])
    points = list(grid.points())
    summary = {"peak": {"phase": "forward", "categories": {"weights": 5}, "roles": {}}, "allocated_peak_bytes": 5}
    rows = [Row(point, Outcome(summary)) for point in points[:-1]] + [
        Row(points[-1], Outcome(error="</script>\x1b[2J"))
    ]
    return Sweep("sft", grid, tuple(rows), 1 << 30)


def test_text_from_outside_is_text(capsys):
    page = render_sweep(hostile())
    assert "<b>x</b>" not in page
    assert "\x1b" not in page
    print_sweep(hostile())
    assert "\x1b[1m" not in capsys.readouterr().out


def test_the_page_opens(folder):
    with chromium() as running:
        for width in (380, 1440):
            opened = Opened(running, folder / PAGE, width).drawn()
            assert opened.said == []
            assert opened.fetched == []
            assert opened.sticking_out() == []
            assert len(opened.page.query_selector_all(".plot .main-svg")) >= 3
