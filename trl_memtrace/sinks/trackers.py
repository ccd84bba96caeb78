"""Every other tracker that a Trainer reports to, through the trainer's own callback for it, so that runs are not
doubled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..records import FailureRecord, RunHeader, StepRecord, Summary
from . import Sink
from .metrics import step_metrics

Send = Callable[[dict[str, Any], int], None]


class TrackerSink(Sink):
    """Sends the same keys as W&B gets to one tracker.

    Args:
        send: takes metrics and the global step.
    """

    def __init__(self, send: Send) -> None:
        self._send = send

    def open(self, header: RunHeader) -> None:
        pass

    def step(self, record: StepRecord) -> None:
        pass

    def log(self, record: StepRecord, global_step: int) -> None:
        self._send(step_metrics(record), global_step)

    def fail(self, failure: FailureRecord) -> None:
        pass

    def close(self, summary: Summary) -> None:
        pass


def tensorboard(callback: Any) -> Send:
    """Scalars through the writer of transformers' ``TensorBoardCallback``."""

    def send(metrics: dict[str, Any], global_step: int) -> None:
        if callback.tb_writer is not None:
            for name, value in metrics.items():
                callback.tb_writer.add_scalar(name, value, global_step)

    return send


def trackio() -> Send:
    """The current trackio run."""

    def send(metrics: dict[str, Any], global_step: int) -> None:
        import trackio

        trackio.log({**metrics, "train/global_step": global_step})

    return send


def any_reporter(callback: Any, args: Any, state: Any, control: Any) -> Send:
    """Whatever else: the reporting callback is handed our metrics as it is handed the trainer's."""

    def send(metrics: dict[str, Any], global_step: int) -> None:
        callback.on_log(args, state, control, logs=dict(metrics))

    return send
