"""The bundled example, run as its users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trl_memtrace import RunTrace

EXAMPLE = Path(__file__).parents[1] / "examples" / "phi3_dolly.py"
SAMPLE = EXAMPLE.parent / "data" / "dolly_sample.jsonl"


def launch(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        str(EXAMPLE),
        *flags,
    ]
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "100"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_sample_has_dollys_schema():
    conversations = [json.loads(line)["messages"] for line in SAMPLE.read_text().splitlines()]
    assert len(conversations) >= 120
    for conversation in conversations:
        assert [message["role"] for message in conversation] == ["user", "assistant"]
        assert all(message["content"].strip() for message in conversation)
    assert len({conversation[0]["content"] for conversation in conversations}) == len(conversations)


@pytest.mark.parametrize("preset", [[], ["--preset", "tiny", "--use_peft", "false"]])
def test_it_trains_and_shows_where_the_memory_went(tmp_path, preset):
    ended = launch(tmp_path, *preset, "--max_steps", "2", "--output_dir", "out", "--lora_r", "4")
    assert ended.returncode == 0, ended.stderr
    assert "preset tiny: " in ended.stdout
    assert "Peak" in ended.stdout
    assert "out/memtrace/rank-00000.jsonl" in ended.stdout
    run = RunTrace.load(tmp_path / "out")
    assert [step.traced for step in run] == [True, True]
    for step in run:
        assert sum(step.peak.categories.values()) == step.peak.allocator_bytes
        assert step.peak.categories["unattributed"] <= 0.001 * step.peak.bytes
    assert ("weights/adapter" in run.peak.roles) == (not preset)
    assert run.header.model["model_type"] == "phi3"


def test_an_unknown_flag_or_preset_is_refused(tmp_path):
    assert "unknown" in launch(tmp_path, "--preset", "tiny", "--unknown", "3").stderr
    refused = launch(tmp_path, "--preset", "huge")
    assert refused.returncode != 0
    assert "invalid choice: 'huge'" in refused.stderr


ALIGNED = [
    ("dpo.py", [], "weights/reference"),
    ("dpo.py", ["--use_peft"], "weights/adapter"),
    ("dpo.py", ["--precompute_ref_log_probs", "true"], "inputs/reference_logps"),
    ("grpo.py", [], "weights/trainable"),
    ("qlora.py", [], "weights/quant_state"),
]


@pytest.mark.parametrize(
    ("script", "flags", "role"),
    [row if not row[1] else pytest.param(*row, marks=pytest.mark.slow) for row in ALIGNED],
)
def test_the_other_examples_run_without_a_gpu_and_without_network(tmp_path, script, flags, role):
    command = [sys.executable, str(EXAMPLE.parent / script), "--preset", "tiny", "--max_steps", "2", *flags]
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [*command, "--output_dir", "out"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "Peak" in ended.stdout
    run = RunTrace.load(tmp_path / "out")
    assert len(run) == 2
    assert role in run.peak.roles
    assert ("rollout" in run.summary.worst_phases) == (script == "grpo.py")
    assert ("weights/reference" in run.peak.roles) == (script == "dpo.py" and not flags)
    for step in run:
        assert sum(step.peak.categories.values()) == step.peak.allocator_bytes
        assert step.peak.categories["unattributed"] <= 0.001 * step.peak.bytes


def test_the_budget_of_qlora_is_held_to(tmp_path):
    flags = ["--preset", "tiny", "--limit", "5MiB", "--output_dir", "out"]
    ended = subprocess.run(
        [sys.executable, str(EXAMPLE.parent / "qlora.py"), *flags],
        cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "more than the limit of 5.00 MiB; training is saved and stops here. What held it" in ended.stderr
    assert len(RunTrace.load(tmp_path / "out")) == 1
    assert (tmp_path / "out" / "checkpoint-1" / "adapter_model.safetensors").is_file()


def test_the_budget_in_a_test_is_held_to(tmp_path):
    import shutil

    for name in ("phi3_dolly.py", "test_memory_budget.py"):
        shutil.copy(EXAMPLE.parent / name, tmp_path)
    shutil.copytree(EXAMPLE.parent / "data", tmp_path / "data")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "trl_memtrace.pytest_plugin"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def outcome() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "test_memory_budget.py"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    kept = outcome()
    assert kept.returncode == 0, kept.stdout
    assert "1 passed" in kept.stdout
    script = tmp_path / "test_memory_budget.py"
    script.write_text(script.read_text().replace("400 MiB", "4 MiB"))
    broken = outcome()
    assert broken.returncode == 1
    assert "4.00 MiB" in broken.stdout
