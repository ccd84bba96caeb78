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
