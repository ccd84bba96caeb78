"""What fits: the search against every value tried one by one, and the command on a small model."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import tiny
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from trl_memtrace import commands, fitting, trials
from trl_memtrace.fitting import FitError, fit
from trl_memtrace.grid import read_flags
from trl_memtrace.reporters.fit_text import print_fit
from trl_memtrace.trials import Outcome, Trial

CARD = 10_000


class Pool:
    """Trials whose outcome is a formula's."""

    def __init__(self, takes, settings=None, **known) -> None:
        self.takes, self.settings, self.known = takes, settings or {}, known
        self.tried: list[dict[str, str]] = []

    def __call__(self, workers: int) -> Pool:
        return self

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *problem) -> None:
        pass

    def submit(self, trial: Trial) -> Future[Outcome]:
        flags = {flag.name: " ".join(flag.values) for flag in read_flags(trial.flags)}
        self.tried.append(flags)
        future: Future[Outcome] = Future()
        size = self.takes(flags)
        if isinstance(size, str):
            future.set_result(Outcome(error=size))
            return future
        numbers = {name: int(flags[name]) for name in self.settings if flags.get(name, "").isdigit()}
        summary = {
            "peak": {"phase": "forward", "categories": {}, "roles": {"weights/trainable": 1}},
            "process_peak_bytes": size,
            "device": {"total_bytes": CARD, "name": "a card"},
            "fits": size <= CARD,
        }
        future.set_result(Outcome(summary, {**self.settings, **numbers}, **self.known))
        return future


def sized(monkeypatch, pool: Pool, knob: str, *flags: str):
    monkeypatch.setattr(fitting, "TrialPool", pool)
    (row,) = fit("sft", flags, CARD, knobs=[knob], savers=False).largest
    return row


@given(
    st.integers(0, 12_000), st.integers(1, 4_000), st.integers(0, 400), st.integers(1, 600), st.sampled_from([1, 512])
)
@example(0, 1, 0, 1, 1)
@example(9_999, 1, 0, 300, 1)
def test_the_largest_batch_is_the_largest(base, slope, curve, now, grain):
    def takes(flags):
        batch = int(flags["per_device_train_batch_size"])
        return base + -(-(slope * batch + curve * batch * batch // 100) // grain) * grain

    pool = Pool(takes, {"per_device_train_batch_size": now})
    with pytest.MonkeyPatch.context() as patch:
        row = sized(patch, pool, "per_device_train_batch_size", "--per_device_train_batch_size", str(now))
    fitting_ones = [size for size in range(1, 1025) if takes({"per_device_train_batch_size": size}) <= CARD]
    assert row.value == max(fitting_ones, default=None)
    assert len(pool.tried) <= (6 if not curve and grain == 1 else 27)  # a line is found at once
    if row.value is not None and row.value < 1024:
        assert row.next_value == row.value + 1
        assert row.next_outcome.fits is False


@pytest.mark.parametrize(("now", "largest"), [(1000, 1152), (64, 1152), (1190, 1190), (4000, 1152)])
def test_a_length_is_sized_in_steps_of_64_and_ends_with_the_positions(monkeypatch, now, largest):
    pool = Pool(lambda flags: 1000 + int(7.5 * int(flags["max_length"])), {"max_length": now}, longest=now)
    row = sized(monkeypatch, pool, "max_length", "--max_length", str(now))
    assert (row.now, row.value) == (now, largest)
    short = Pool(lambda flags: 1000 + int(flags["max_length"]), {"max_length": now}, longest=now, positions=512)
    row = sized(monkeypatch, short, "max_length", "--max_length", str(now))
    assert (row.value, row.next_value) == (max(now, 512) if now < 9000 else 512, None)


def test_a_batch_is_of_whole_groups_of_completions(monkeypatch):
    name = "per_device_train_batch_size"
    settings = {name: 4, "gradient_accumulation_steps": 2, "num_generations": 8}

    def takes(flags):
        batch = int(flags[name])
        return 700 * batch if batch * 2 % 8 == 0 else "not divisible by the number of generations"

    row = sized(monkeypatch, Pool(takes, settings), name, f"--{name}", "4")
    assert (row.value, row.next_value) == (12, 16)
    assert row.next_outcome.error is None


def test_only_what_matters_is_sized(monkeypatch):
    settings = {"per_device_train_batch_size": 1, "max_length": 1024}
    words = ["--max_length", "1024", "--per_device_train_batch_size", "1"]
    monkeypatch.setattr(fitting, "TrialPool", Pool(lambda flags: 5, settings, longest=300))
    assert [row.knob for row in fit("sft", words, CARD, savers=False).largest] == ["per_device_train_batch_size"]


def test_savers_are_ranked_and_the_fewest_that_help_are_put_together(monkeypatch):
    def takes(flags):
        if flags.get("use_liger_kernel"):
            return "it is not there"
        size = 14_000 + 1_000 * int(flags["per_device_train_batch_size"])
        size -= 3_000 if flags.get("gradient_checkpointing") == "true" else 0
        size -= 2_500 if flags.get("optim") == "adamw_bnb_8bit" else 0
        size -= 2_400 if flags.get("optim") == "paged_adamw_8bit" else 0
        return size + (500 if flags.get("use_peft") else 0)

    settings = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "optim": "adamw_torch"}
    pool = Pool(takes, settings)
    monkeypatch.setattr(fitting, "TrialPool", pool)
    words = ("--per_device_train_batch_size", "6", "--use-thing", "a b")
    found = fit("sft", words, CARD, knobs=[])
    saved = {saving.saver.text: saving.saves_bytes for saving in found.savings}
    assert saved == {
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 12": 5_000,
        "--per_device_train_batch_size 3 --gradient_accumulation_steps 4": 3_000,
        "--gradient_checkpointing true": 3_000,
        "--optim adamw_bnb_8bit": 2_500,
        "--optim paged_adamw_8bit": 2_400,
        "--use_peft true --lora_target_modules all-linear": -500,
        "--use_peft true --lora_target_modules all-linear --load_in_4bit true": -500,
        "--use_liger_kernel true": None,
    }
    sizes = [saving.saves_bytes for saving in found.savings]
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
    assert [saver.name for saver in found.together] == [
        "smaller batches, as many examples a step",
        "gradient checkpointing",
        "8-bit optimizer",
    ]
    assert found.together_outcome.process_bytes == 20_000 - 5_000 - 3_000 - 2_500
    assert shlex.split(found.command(found.together)) == [
        *("trl", "sft", "--per_device_train_batch_size", "1", "--use_thing", "a b"),
        *("--gradient_accumulation_steps", "12", "--gradient_checkpointing", "true", "--optim", "adamw_bnb_8bit"),
    ]
    assert len(pool.tried) == len({tuple(sorted(flags.items())) for flags in pool.tried})


@pytest.mark.parametrize(("ranks", "settings", "offered"), [(1, {}, 0), (8, {}, 1), (8, {"fsdp": True}, 0)])
def test_several_ranks_may_share_a_model(monkeypatch, ranks, settings, offered):
    pool = Pool(lambda flags: 5_000 if "fsdp" in flags else 20_000, {"per_device_train_batch_size": 1, **settings})
    monkeypatch.setattr(fitting, "TrialPool", pool)
    found = fit("sft", ["--a", "b"], CARD, knobs=[], ranks=ranks)
    assert [saving.saver.text for saving in found.savings].count("--fsdp") == offered
    if offered:
        assert found.command(found.together) == "trl sft --a b --fsdp"


def test_a_command_that_cannot_be_run_says_why(monkeypatch):
    monkeypatch.setattr(fitting, "TrialPool", Pool(lambda flags: "no such model"))
    with pytest.raises(FitError, match="no such model"):
        fit("sft", [], CARD)
    monkeypatch.setattr(fitting, "TrialPool", Pool(lambda flags: 5, {"per_device_train_batch_size": 1}))
    with pytest.raises(FitError, match="there is no lora_r to size in this command"):
        fit("sft", [], CARD, knobs=["lora_r"])
    with pytest.raises(ValueError, match="a knob to size is one of"):
        fit("sft", [], CARD, knobs=["seed"])


def test_text_from_outside_is_text(monkeypatch, capsys):
    pool = Pool(lambda flags: "\x1b[2J" if flags.get("optim") else 20_000, {"optim": "adamw"})
    monkeypatch.setattr(fitting, "TrialPool", pool)
    print_fit(fit("sft", ["--x", "\x1b[1m"], CARD, knobs=[]))
    assert "\x1b[2J" not in capsys.readouterr().out


# --- on a real model -------------------------------------------------------------------------------------------------


def test_ending_it_while_knobs_are_sized_ends_the_workers(monkeypatch):
    """A second trial that never ends, while Ctrl-C comes."""
    code = "import sys, time; input(); print(sys.argv[1], flush=True); input(); time.sleep(600)"
    pool = Pool(lambda flags: 1, {"per_device_train_batch_size": 1})
    first = pool.submit(Trial("sft", ())).result()
    monkeypatch.setattr(trials._Worker, "COMMAND", (sys.executable, "-c", code, json.dumps(first.to_json())))
    began = time.monotonic()
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt), Interrupted(lambda: len(told) > 1):
        fit("sft", ("--a", "1"), CARD, savers=False, workers=1, tell=told.append)
    assert time.monotonic() - began < 60


class Interrupted:
    """Ctrl-C as soon as something is so."""

    def __init__(self, when) -> None:
        self.thread = threading.Thread(target=self.wait, args=(when,))

    def wait(self, when) -> None:
        while not when():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *problem) -> None:
        self.thread.join()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.model().config.save_pretrained(folder)
    return folder


def estimated(words: list[str]) -> dict:
    ended = CliRunner().invoke(commands.app, ["estimate", "sft", *words, "--json"])
    assert ended.exit_code == 0, ended.output
    return json.loads(ended.stdout)


def test_the_command_finds_what_estimate_confirms(model):
    words = ["--model_name_or_path", str(model), "--max_length", "64", "--memory", "60MiB"]
    words += ["--gradient_checkpointing", "false"]
    ended = CliRunner().invoke(
        commands.app,
        [
            "fit",
            "sft",
            *words,
            "--per_device_train_batch_size",
            "32",
            "--knob",
            "per_device_train_batch_size",
            "--json",
        ],
    )
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout)
    assert not found["outcome"]["summary"]["fits"]
    (row,) = found["largest"]
    for value, outcome, fits in (("value", "outcome", True), ("next_value", "next_outcome", False)):
        summary = row[outcome]["summary"]
        alone = estimated([*words, "--per_device_train_batch_size", str(row[value])])
        assert summary["fits"] is alone["fits"] is fits
        assert alone["allocated_peak_bytes"] == summary["allocated_peak_bytes"]
    assert row["outcome"]["summary"]["process_peak_bytes"] <= 60 * 2**20
    savings = {saving["flags"]: saving for saving in found["savings"]}
    offloaded = savings["--activation_offloading true"]
    assert offloaded["outcome"]["error"] is None
    assert (
        offloaded["outcome"]["summary"]["peak"]["categories"]["activations"]
        < found["outcome"]["summary"]["peak"]["categories"]["activations"]
    )
    again = estimated([*shlex.split(savings["--gradient_checkpointing true"]["command"])[2:], "--memory", "60MiB"])
    saved = savings["--gradient_checkpointing true"]["outcome"]["summary"]
    assert again["process_peak_bytes"] == saved["process_peak_bytes"]


def test_the_rank_that_a_config_names_is_known(model, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("use_peft: true\nlora_r: 24\nlora_target_modules: all-linear\nmax_length: 32\n")
    words = ["--model_name_or_path", str(model), "--config", str(config), "--memory", "42MiB"]
    ended = CliRunner().invoke(commands.app, ["fit", "sft", *words, "--no-savers", "--knob", "lora_r", "--json"])
    assert ended.exit_code == 0, ended.output
    (row,) = json.loads(ended.stdout)["largest"]
    assert row["now"] == 24
    assert row["next_value"] == row["value"] + 8
    for value, outcome, fits in (("value", "outcome", True), ("next_value", "next_outcome", False)):
        found = row[outcome]["summary"]
        alone = estimated([*words, "--lora_r", str(row[value])])
        assert found["fits"] is alone["fits"] is fits
        assert alone["allocated_peak_bytes"] == found["allocated_peak_bytes"]


def test_a_card_is_asked_for(model, capsys, monkeypatch):
    ended = CliRunner().invoke(commands.app, ["fit", "sft", "--model_name_or_path", str(model)])
    assert ended.exit_code == 2
    monkeypatch.setattr(sys, "argv", ["trl-memtrace", "fit", "sft", "--nonsense", "1", "--memory", "1GiB"])
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
