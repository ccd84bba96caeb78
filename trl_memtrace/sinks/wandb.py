"""W&B: metrics beside the trainer's own, a table by module, the run's summary and configuration."""

from __future__ import annotations

from typing import Any

from ..categories import CATEGORIES
from ..records import FailureRecord, Peak, RunHeader, StepRecord, Summary
from ..units import to_gib
from . import Sink
from .metrics import PREFIX, failure_metrics, module_rows, step_metrics, summary_metrics

GLOBAL_STEP = "train/global_step"
"""What the Trainer's own W&B callback uses as x axis."""


class WandbSink(Sink):
    """Logs to the W&B run that the trainer has opened, whichever that is at the time; without one it does nothing.

    Metrics go into the row that the trainer's log is about to write (``commit=False``): the run's own step is never
    moved, and no row of anybody who passes ``step=`` is dropped because of us.

    Args:
        settings: what to put into the run's configuration.
        own_rows: the trainer does not log to W&B: write rows of our own.
    """

    def __init__(self, settings: dict[str, Any], *, own_rows: bool = False) -> None:
        self._settings = settings
        self._own_rows = own_rows

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
                run.log({f"{PREFIX}modules": module_table(summary.peak)}, commit=False)


def module_table(peak: Peak) -> Any:
    """A ``wandb.Table`` of what every module held at the peak, in GiB, the largest first."""
    import wandb

    columns: list[str | int] = ["module", "total_gib", *(f"{category.value}_gib" for category in CATEGORIES)]
    data = [
        [name or "(no module)", to_gib(total), *(to_gib(row.get(category.value, 0)) for category in CATEGORIES)]
        for name, row, total in module_rows(peak)
    ]
    return wandb.Table(columns=columns, data=data)


def _active_run() -> Any:
    import wandb

    return wandb.run
