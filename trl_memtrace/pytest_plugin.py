"""A limit for the tests of a training: ``@pytest.mark.memtrace_limit("40 MiB")``.

A test with this marker fails when a training step that was traced in it, by ``MemTrace`` or by a ``MemoryTracer``,
held more than the limit; so does one in which no step was traced, since nothing was checked. pytest finds this plugin
by its entry point. It loads nothing heavy: it only listens to what tracers in the test say.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import pytest

from .listeners import listening
from .records import FailureRecord, Peak, StepRecord
from .text import printable
from .units import format_bytes, parse_bytes

MARKER = "memtrace_limit"
_TOP_MODULES = 5


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f'{MARKER}(size): fail the test if a training step traced in it by trl_memtrace held more, as in "40 MiB"',
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    marker = item.get_closest_marker(MARKER)
    if marker is None:
        return (yield)
    limit = _limit_of(marker)
    seen: list[StepRecord | FailureRecord] = []
    with listening(seen.append):
        result = yield
    problem = problem_of(seen, limit)
    if problem is not None:
        pytest.fail(f"{MARKER}: {problem}", pytrace=False)
    return result


def problem_of(records: Sequence[StepRecord | FailureRecord], limit_bytes: int) -> str | None:
    """What is wrong with the steps of a test, in words for its report; None where they kept to the limit.

    Args:
        records: the steps, in the order in which they ended.
        limit_bytes: what a step may hold at most.
    """
    traced = [record for record in records if record.traced]
    if not traced:
        ran = f"{len(records)} steps ran, but none was traced in full" if records else "no training step was traced"
        return (
            f"{ran} in this test, so nothing was checked. Add MemTrace() to the trainer, or put the step into"
            " MemoryTracer.step(); what fixtures and other processes do is not seen."
        )
    worst = max(traced, key=lambda record: record.peak.bytes or 0)
    held = worst.peak.bytes or 0
    if held <= limit_bytes:
        return None
    where = f" in {worst.peak.phase.value}" if worst.peak.phase is not None else ""
    return "\n".join(
        [
            f"step {worst.step} held {format_bytes(held)}{where},"
            f" {format_bytes(held - limit_bytes)} over the limit of {format_bytes(limit_bytes)}",
            *_category_lines(worst.peak, held),
            *_module_lines(worst.peak),
        ]
    )


def _category_lines(peak: Peak, total: int) -> list[str]:
    held = sorted(((size, name) for name, size in peak.categories.items() if size), reverse=True)
    return [f"  {name.replace('_', ' '):<16} {format_bytes(size):>12}  {size / total:6.1%}" for size, name in held]


def _module_lines(peak: Peak) -> list[str]:
    sizes = sorted(((sum(row.values()), name) for name, row in peak.modules.items() if name), reverse=True)
    largest = ", ".join(f"{printable(name)} {format_bytes(size)}" for size, name in sizes[:_TOP_MODULES])
    return [f"  modules that hold most: {largest}"] if largest else []


def _limit_of(marker: pytest.Mark) -> int:
    size = marker.args[0] if len(marker.args) == 1 and not marker.kwargs else None
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    try:
        if isinstance(size, str):
            return parse_bytes(size)
    except ValueError:
        pass
    given = ", ".join([*map(repr, marker.args), *(f"{name}={value!r}" for name, value in marker.kwargs.items())])
    pytest.fail(f'{MARKER} takes one size, such as {MARKER}("40 MiB"), not ({given})', pytrace=False)
