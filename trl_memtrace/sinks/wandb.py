"""W&B: metrics beside the trainer's own, a table by module, figures, the run's summary and configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..categories import CATEGORIES
from ..ranks import Ranks
from ..records import FailureRecord, Peak, RunHeader, RunTrace, StepRecord, Summary
from ..step_books import StepBooks
from ..units import to_gib
from . import Sink
from .metrics import PREFIX, failure_metrics, module_rows, ranks_metrics, step_metrics, summary_metrics

GLOBAL_STEP = "train/global_step"
"""What the Trainer's own W&B callback uses as x axis."""

MODULES = f"{PREFIX}modules"
"""The table of what every module held at the peak."""

TIMELINE = f"{PREFIX}timeline"
"""The figure of the peak step."""


class WandbSink(Sink):
    """Logs to the W&B run that the trainer has opened, whichever that is at the time; without one it does nothing.

    Metrics go into the row that the trainer's log is about to write (``commit=False``): the run's own step is never
    moved, and no row of anybody who passes ``step=`` is dropped because of us.

    Args:
        settings: what to put into the run's configuration.
        own_rows: the trainer does not log to W&B: write rows of our own.
        record: the record's file, from which figures are drawn at the end.
    """

    def __init__(self, settings: dict[str, Any], *, own_rows: bool = False, record: Path | None = None) -> None:
        self._settings = settings
        self._own_rows = own_rows
        self._record = record

    def open(self, header: RunHeader) -> None:
        run = _active_run()
        if run is not None:
            run.config.update({"memtrace": {**self._settings, "model": dict(header.model)}}, allow_val_change=True)

    def step(self, record: StepRecord) -> None:
        pass

    def log(self, record: StepRecord, global_step: int) -> None:
        run = _active_run()
        if run is not None:
            run.log({**step_metrics(record), GLOBAL_STEP: global_step}, commit=self._own_rows)

    def fail(self, failure: FailureRecord) -> None:
        run = _active_run()
        if run is not None:
            run.summary.update(failure_metrics(failure))

    def close(self, summary: Summary) -> None:
        run = _active_run()
        if run is not None:
            run.summary.update(summary_metrics(summary))
            if summary.peak.modules:
                run.log({MODULES: module_table(summary.peak)}, commit=False)
            if self._record is not None:
                run.log(dict(figures(self._record)), commit=False)

    def compare(self, ranks: Ranks) -> None:
        run = _active_run()
        if run is not None:
            run.summary.update(ranks_metrics(ranks))


def module_table(peak: Peak) -> Any:
    """A ``wandb.Table`` of what every module held at the peak, in GiB, the largest first."""
    import wandb

    columns: list[str | int] = ["module", "total_gib", *(f"{category.value}_gib" for category in CATEGORIES)]
    data = [
        [name or "(no module)", to_gib(total), *(to_gib(row.get(category.value, 0)) for category in CATEGORIES)]
        for name, row, total in module_rows(peak)
    ]
    return wandb.Table(columns=columns, data=data)


def figures(record: Path) -> Iterator[tuple[str, Any]]:
    """The figures of the HTML report as W&B takes them: ``memory/timeline`` of the peak step, where its books were
    kept, and ``memory/steps``, where several were traced."""
    import plotly.graph_objects
    import wandb

    from ..reporters.figures import steps_figure, timeline_figure

    step = StepBooks.of_record(record)
    drawings = {
        TIMELINE: timeline_figure(step) if step is not None else None,
        f"{PREFIX}steps": steps_figure(RunTrace.load(record).steps),
    }
    for name, drawing in drawings.items():
        if drawing is not None:
            yield name, wandb.Plotly(plotly.graph_objects.Figure(drawing))


def _active_run() -> Any:
    import wandb

    return wandb.run
