"""The callback by which a dry run, or a real one that is to be held against it, watches a Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .run_info import describe_run
from .tracer import MemoryTracer
from .trainer_watch import as_called, other_models


class DryTrace(TrainerCallback):
    """Traces every step in full. What goes wrong is not swallowed: nobody's training depends on it."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._tracer: MemoryTracer | None = None

    @property
    def tracer(self) -> MemoryTracer | None:
        """What has seen the training; None before its first step."""
        return self._tracer

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        if self._tracer is None:
            header = describe_run(args, model, self._trainer, {})
            self._tracer = MemoryTracer(
                as_called(model, self._trainer),
                optimizer,
                header=header,
                others=other_models(self._trainer, model),
                wrapper=getattr(self._trainer, "model_wrapped", None),
            )
        self._tracer.begin_step(state.global_step + 1, optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._tracer is not None:
            self._tracer.end_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._tracer is not None:
            self._tracer.close()
