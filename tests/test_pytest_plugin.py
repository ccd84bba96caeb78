"""The ``memtrace_limit`` marker, as a user's tests meet it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import trl_memtrace
from trl_memtrace import MemoryTracer, listeners

PLUGIN = ("-p", "trl_memtrace.pytest_plugin", "-p", "no:cacheprovider")
ROOT = Path(trl_memtrace.__file__).parent.parent
TRAINING = """
import pytest, torch
from torch import nn
from trl_memtrace import MemoryTracer, TracePolicy

def train(rows, steps=1, policy=None):
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1))
    tracer = MemoryTracer(model, policy=policy)
    for _ in range(steps):
        batch = torch.zeros(rows, 256)
        with tracer.step():
            model(batch).sum().backward()
            model.zero_grad()
    tracer.close()
    return tracer.run.peak.bytes
"""


def peak_of_training(rows: int) -> int:
    """What the inner tests' training holds, measured here."""
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1))
    tracer = MemoryTracer(model)
    batch = torch.zeros(rows, 256)
    with tracer.step():
        model(batch).sum().backward()
        model.zero_grad()
    tracer.close()
    assert tracer.run.peak.bytes is not None
    return tracer.run.peak.bytes


@pytest.fixture(autouse=True)
def _only_our_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def outcome(pytester: pytest.Pytester, body: str, *options: str) -> tuple[dict[str, int], str]:
    pytester.makepyfile(TRAINING + body)
    result = pytester.runpytest_inprocess(*PLUGIN, *options)
    return result.parseoutcomes(), result.stdout.str()


def test_a_step_over_the_limit_fails_its_test_and_says_what_held_the_memory(pytester: pytest.Pytester) -> None:
    outcomes, shown = outcome(
        pytester, "\n@pytest.mark.memtrace_limit('1 MiB')\ndef test_it():\n    train(64, steps=2)\n"
    )
    assert outcomes == {"failed": 1}
    assert "memtrace_limit: step 1 held" in shown
    assert "over the limit of 1.00 MiB" in shown
    lines = {tuple(line.split()) for line in shown.splitlines()}  # once: under CI, pytest's summary repeats them
    weights = (256 * 1024 + 1024 + 1024 + 1) * 4
    (row,) = (line for line in lines if line[:1] == ("weights",))
    assert row[1:3] == (f"{weights / 1024**2:.2f}", "MiB")
    assert "modules that hold most: 0 " in shown
    assert "Traceback" not in shown


def test_the_limit_is_exact_and_a_test_within_it_passes(pytester: pytest.Pytester) -> None:
    peak = peak_of_training(64)
    outcomes, _ = outcome(
        pytester,
        f"""
@pytest.mark.memtrace_limit({peak})
def test_within():
    assert train(64) == {peak}

@pytest.mark.memtrace_limit("{peak - 1} B")
def test_over():
    assert train(64) == {peak}

def test_without_a_marker():
    train(64)
""",
    )
    assert outcomes == {"passed": 2, "failed": 1}


def test_the_worst_step_of_all_tracers_counts(pytester: pytest.Pytester) -> None:
    limit = (peak_of_training(16) + peak_of_training(512)) // 2
    body = f"\n@pytest.mark.memtrace_limit({limit})\ndef test_it():\n    train(16); train(512); train(16)\n"
    assert outcome(pytester, body)[0] == {"failed": 1}
    assert outcome(pytester, body.replace("train(512)", "train(16)"))[0] == {"passed": 1}


def test_the_last_step_of_a_tracer_that_is_never_closed_counts(pytester: pytest.Pytester) -> None:
    body = f"""
@pytest.mark.memtrace_limit({peak_of_training(64)})
def test_it():
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1))
    tracer = MemoryTracer(model)
    for rows in (8, 96):
        with tracer.step():
            model(torch.zeros(rows, 256)).sum().backward()
            model.zero_grad()
"""
    outcomes, shown = outcome(pytester, body)
    assert outcomes == {"failed": 1}
    assert "step 2 held" in shown


def test_the_marker_of_the_test_itself_is_the_one_that_counts(pytester: pytest.Pytester) -> None:
    body = """
@pytest.mark.memtrace_limit("1 KiB")
class TestAll:
    @pytest.mark.memtrace_limit("1 GiB")
    def test_mine(self):
        train(8)

    def test_of_the_class(self):
        train(8)
"""
    assert outcome(pytester, body)[0] == {"passed": 1, "failed": 1}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("pass", "no training step was traced in this test, so nothing was checked"),
        (
            "train(8, 3, TracePolicy(first_steps=0, every_n_steps=None, new_highs=False))",
            "3 steps ran, but none was traced",
        ),
    ],
)
def test_a_limit_that_checked_nothing_fails_and_says_so(pytester: pytest.Pytester, body: str, words: str) -> None:
    outcomes, shown = outcome(pytester, f"\n@pytest.mark.memtrace_limit('1 GiB')\ndef test_it():\n    {body}\n")
    assert outcomes == {"failed": 1}
    assert words in shown


def test_what_a_fixture_trains_is_not_the_tests(pytester: pytest.Pytester) -> None:
    body = """
@pytest.fixture
def trained():
    return train(512)

@pytest.mark.memtrace_limit("1 GiB")
def test_it(trained):
    assert trained
"""
    outcomes, shown = outcome(pytester, body)
    assert outcomes == {"failed": 1}
    assert "what fixtures and other processes do is not seen" in shown


def test_an_exception_of_the_test_itself_is_what_is_shown(pytester: pytest.Pytester) -> None:
    body = """
@pytest.mark.memtrace_limit("1 KiB")
def test_it():
    train(8)
    raise RuntimeError("my own trouble")

@pytest.mark.memtrace_limit("1 KiB")
def test_skipped():
    pytest.skip("not here")
"""
    outcomes, shown = outcome(pytester, body)
    assert outcomes == {"failed": 1, "skipped": 1}
    assert listeners._listeners == []
    assert "my own trouble" in shown
    assert "memtrace_limit:" not in shown


def test_the_moment_of_an_exception_that_the_test_expects_counts(pytester: pytest.Pytester) -> None:
    body = """
@pytest.mark.memtrace_limit("1 MiB")
def test_it():
    model = nn.Linear(8, 8)
    tracer = MemoryTracer(model)
    with pytest.raises(KeyError), tracer.step():
        held = torch.zeros(2**20)
        model(torch.zeros(1, 8))
        raise KeyError("x")
    tracer.close()
"""
    outcomes, shown = outcome(pytester, body)
    assert outcomes == {"failed": 1}
    assert "step 1 held 4.00 MiB" in shown


@pytest.mark.parametrize("arguments", ["", "'lots'", "-1", "True", "'1 MiB', '2 MiB'", "limit='1 MiB'", "1.5"])
def test_a_marker_without_a_size_is_told_in_words(pytester: pytest.Pytester, arguments: str) -> None:
    body = f"\n@pytest.mark.memtrace_limit({arguments})\ndef test_it():\n    train(8)\n"
    outcomes, shown = outcome(pytester, body)
    assert outcomes == {"failed": 1}
    assert f'memtrace_limit takes one size, such as memtrace_limit("40 MiB"), not ({arguments})' in shown


def test_names_cannot_act_on_a_terminal(pytester: pytest.Pytester) -> None:
    body = """
@pytest.mark.memtrace_limit(1)
def test_it():
    model = nn.Sequential()
    model.add_module("evil\\x1b[2J\\u202e", nn.Linear(8, 8))
    tracer = MemoryTracer(model)
    with tracer.step():
        model(torch.zeros(1, 8)).sum().backward()
    tracer.close()
"""
    _, shown = outcome(pytester, body)
    assert "evil\\x1b[2J\\u202e" in shown
    assert not set(shown) & {"\x1b", "\u202e"}


def test_the_plugin_is_found_by_its_entry_point_and_is_light(pytester: pytest.Pytester, monkeypatch) -> None:
    """An installed distribution with the entry points that pyproject.toml declares; pytest finds the rest."""
    declared = (ROOT / "pyproject.toml").read_text().split("[project.entry-points.pytest11]\n")[1].split("\n\n")[0]
    name, module = declared.replace('"', "").split(" = ")
    installed = pytester.path / "site"
    info = installed / "memtrace_test_install-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: memtrace-test-install\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[pytest11]\n{name} = {module}\n")
    monkeypatch.setenv("PYTHONPATH", f"{installed}:{ROOT}")
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    pytester.makepyfile(
        "import sys, pytest\n"
        "def test_light(): assert not {'torch', 'numpy', 'transformers', 'rich', 'wandb'} & set(sys.modules)\n"
        "@pytest.mark.memtrace_limit('1 GiB')\n"
        "def test_nothing(): pass\n"
    )
    result = pytester.run(sys.executable, "-m", "pytest", "--strict-markers", "-p", "no:hypothesispytest")
    assert result.parseoutcomes() == {"passed": 1, "failed": 1}
    assert "so nothing was checked" in result.stdout.str()
