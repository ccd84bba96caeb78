"""A step as metrics: the keys that W&B, TensorBoard, trackio and all others get alike."""

from __future__ import annotations

from collections.abc import Mapping

from ..ranks import Ranks
from ..records import Categories, FailureRecord, Peak, StepRecord, Summary
from ..units import to_gib

PREFIX = "memory/"


def step_metrics(record: StepRecord) -> dict[str, float]:
    """``memory/peak/activations_gib``, ``memory/forward/total_gib``, ... of a traced step, in GiB.

    The categories under ``memory/peak/`` add up to ``memory/peak/total_gib``, those under a phase to that phase's
    peak.
    """
    metrics = _levels(f"{PREFIX}peak", record.peak.bytes, record.peak.categories)
    for name, phase in record.phases.items():
        metrics.update(_levels(f"{PREFIX}{name}", phase.peak_bytes, phase.at_peak))
    if record.reserved_bytes is not None:
        metrics[f"{PREFIX}reserved_gib"] = to_gib(record.reserved_bytes)
    metrics[f"{PREFIX}step"] = record.step
    metrics[f"{PREFIX}tracing_seconds"] = record.tracing_seconds
    return metrics


def summary_metrics(summary: Summary) -> dict[str, float | str]:
    """The whole run: ``memory/run/peak/total_gib``, ``memory/run/peak/phase``, ..."""
    peak = summary.peak
    metrics: dict[str, float | str] = {**_levels(f"{PREFIX}run/peak", peak.bytes, peak.categories)}
    if peak.phase is not None and peak.step is not None:
        metrics[f"{PREFIX}run/peak/phase"] = peak.phase.value
        metrics[f"{PREFIX}run/peak/step"] = peak.step
    if summary.reserved_peak_bytes is not None:
        metrics[f"{PREFIX}run/reserved_peak_gib"] = to_gib(summary.reserved_peak_bytes)
    if summary.growth is not None:
        metrics[f"{PREFIX}run/growth/gib_per_step"] = to_gib(summary.growth.bytes_per_step)
        metrics[f"{PREFIX}run/growth/category"] = summary.growth.category
        metrics[f"{PREFIX}run/growth/since_step"] = summary.growth.since_step
    metrics[f"{PREFIX}run/traced_steps"] = summary.traced_steps
    metrics[f"{PREFIX}run/tracing_seconds"] = summary.tracing_seconds
    return metrics


def failure_metrics(failure: FailureRecord) -> dict[str, float | str]:
    """What held the memory when training failed: ``memory/failure/total_gib``, ``memory/failure/error``, ..."""
    prefix = f"{PREFIX}failure"
    metrics: dict[str, float | str] = {**_levels(prefix, failure.peak.bytes, failure.peak.categories)}
    metrics[f"{prefix}/error"] = failure.error
    metrics[f"{prefix}/step"] = failure.step
    metrics[f"{prefix}/out_of_memory"] = failure.out_of_memory
    if failure.phase is not None:
        metrics[f"{prefix}/phase"] = failure.phase.value
    if failure.requested_bytes is not None:
        metrics[f"{prefix}/requested_gib"] = to_gib(failure.requested_bytes)
    if failure.suggestions:
        metrics[f"{prefix}/would_help"] = failure.suggestions[0].what
    return metrics


def ranks_metrics(ranks: Ranks) -> dict[str, float | str]:
    """How ranks differ: ``memory/ranks/peak/max_gib``, ``memory/ranks/peak/max_rank``,
    ``memory/ranks/peak/uneven``, ..., and which are missing."""
    prefix = f"{PREFIX}ranks"
    metrics: dict[str, float | str] = {f"{prefix}/world_size": ranks.world_size}
    for spread in ranks.spread:
        metrics[f"{prefix}/{spread.what}/min_gib"] = to_gib(spread.least)
        metrics[f"{prefix}/{spread.what}/min_rank"] = spread.least_rank
        metrics[f"{prefix}/{spread.what}/max_gib"] = to_gib(spread.most)
        metrics[f"{prefix}/{spread.what}/max_rank"] = spread.most_rank
        metrics[f"{prefix}/{spread.what}/uneven"] = spread.uneven
    for name, absent in {"missing": ranks.missing, "unfinished": ranks.unfinished}.items():
        if absent:
            metrics[f"{prefix}/{name}"] = ", ".join(map(str, absent))
    return metrics


def module_rows(peak: Peak) -> list[tuple[str, dict[str, int], int]]:
    """Name, bytes by category and total of every module at the peak, the largest first; what belongs to none is
    last."""
    rows = [(name, dict(row), sum(row.values())) for name, row in peak.modules.items()]
    return sorted(rows, key=lambda row: (row[0] == "", -row[2], row[0]))


def _levels(prefix: str, total: int | None, categories: Categories | Mapping[str, int | None]) -> dict[str, float]:
    sizes = {"total": total, **categories}
    return {f"{prefix}/{name}_gib": to_gib(size) for name, size in sizes.items() if size is not None}
