"""``import trl_memtrace`` is light: what is heavy is imported when first needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import trl_memtrace

HEAVY = {"torch", "wandb", "trl", "transformers", "numpy", "pandas", "rich"}


def heavy_modules_after(statement: str) -> set[str]:
    """Which heavy modules a fresh interpreter has loaded after one statement."""
    root = str(Path(trl_memtrace.__file__).parent.parent)
    printed = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys\nprint(*sys.modules)"],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return HEAVY & set(printed.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import trl_memtrace",
        "import trl_memtrace; dir(trl_memtrace); trl_memtrace.__version__",
        "from trl_memtrace import Category, Phase, RecordError, MemtraceWarning",
        "from trl_memtrace import RunTrace; RunTrace().summary.to_json()",
        "import trl_memtrace.units",
    ],
)
def test_importing_the_package_and_reading_a_record_loads_nothing_heavy(statement: str) -> None:
    assert heavy_modules_after(statement) == set()


def test_the_books_need_numpy_and_no_torch() -> None:
    assert heavy_modules_after("import trl_memtrace.ledger, trl_memtrace.attribution") == {"numpy"}


@pytest.mark.parametrize("heavy", ["torch", "numpy"])
def test_the_check_sees_what_a_module_imports(tmp_path: Path, heavy: str) -> None:
    (tmp_path / "guilty.py").write_text(f"import {heavy}\n")
    assert heavy in heavy_modules_after(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import guilty")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'trl_memtrace' has no attribute 'nothing'"):
        trl_memtrace.nothing  # noqa: B018


def test_every_public_name_is_listed() -> None:
    assert set(trl_memtrace.__all__) == set(dir(trl_memtrace))
    assert trl_memtrace.__all__[0] == "__version__"
