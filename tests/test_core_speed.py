"""The books are kept fast enough: benchmarks/core_speed.py, with its bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trl_memtrace

ROOT = Path(trl_memtrace.__file__).parent.parent
BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "core_speed.py"


@pytest.mark.slow
def test_a_million_events_go_through_in_3_seconds_and_500_megabytes_on_one_core() -> None:
    printed = subprocess.run(
        [sys.executable, str(BENCHMARK), "--events", "1000000", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    result = json.loads(printed)
    assert result["events"] >= 1_000_000
    assert result["claims"] > 10_000
    assert result["cpu_seconds"] < 3
    assert result["peak_rss_bytes"] < 500 * 10**6
