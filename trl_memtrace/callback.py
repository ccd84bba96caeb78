"""MemTrace: the events of a Trainer, adapted to the tracer and the sinks."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainerCallback

from .budget import Budget, OnLimit
from .categories import Phase
from .errors import warn
from .ranks import Ranks, wait_for_ends
from .records import FailureRecord, Peak, RunTrace, StepRecord, Summary, record_name
from .run_info import describe_run, look_beyond
from .sinks import Sink
from .sinks.jsonl import JsonlSink
from .step_books import StepBooks, peak_books_path
from .tracer import MemoryTracer, TracePolicy
from .trainer_watch import as_called, calling_trainer, other_models, watch_trainer

logger = logging.getLogger(__name__)

_Event = TypeVar("_Event", bound=Callable[..., None])
_FOLLOW_TRAINER = "trainer"
_PATIENCE_SECONDS = 5.0
"""How long rank 0 waits at the end for the last line of the others' records; not at all after a failure."""

_TRACED_PREDICTIONS = 8
"""How many batches of an evaluation are traced: the books of a whole one would take too much memory themselves."""
_active: weakref.WeakKeyDictionary[Any, MemTrace] = weakref.WeakKeyDictionary()
"""Which MemTrace watches which model."""


def _never_costs_the_run(event: _Event) -> _Event:
    """What goes wrong in an event is warned about, and switches MemTrace off; the training goes on."""

    @functools.wraps(event)
    def guarded(self: MemTrace, *args: Any, **kwargs: Any) -> None:
        try:
            event(self, *args, **kwargs)
        except Exception as problem:
            logger.debug("MemTrace failed in %s", event.__name__, exc_info=problem)
            self._switch_off()
            warn(f"MemTrace has switched itself off, training goes on: {type(problem).__name__}: {problem}")

    return guarded  # type: ignore[return-value]


class MemTrace(TrainerCallback):
    """Says where the memory of a training run goes: on the terminal, in a file, and wherever the Trainer reports to.

        trainer.add_callback(MemTrace())

    Steps are counted, and some are traced in full: their categories (weights, gradients, optimizer states,
    activations, ...) add up to what the allocator reports, by phase of the step and by module. The record goes to
    ``<output_dir>/memtrace``; metrics (``memory/peak/activations_gib``, ...) go where ``args.report_to`` says.
    Training is only watched: its losses are bit for bit those without, and no failure of MemTrace's ends a run.

    Args:
        first_steps: how many steps to trace in full at the beginning, 0 or more.
        every_n_steps: after those, trace every Nth step, 1 or more; None for none.
        new_highs: also trace every step whose batch holds more tokens than any traced before.
        output_dir: folder of the record; ``<args.output_dir>/memtrace`` when not given.
        report_to: ``"trainer"`` for every tracker that the Trainer reports to, ``"none"``, or the names of some of
            them.
        print_table: whether to print the table at the end; when not given, unless ``args.disable_tqdm``. Only the main
            process prints.
        report: whether to write ``report.html`` beside the record at the end, for people to look at. Only the main
            process writes it, after training.

        limit: the most that a step may hold: ``"40GiB"``, or bytes; None for any amount. It is held against every step
            that is traced and, where the allocator has a counter, against every other.
        on_limit: what to do about a step that holds more: ``"warn"``, ``"stop"`` (end training after this step) or
            ``"save_and_stop"``.

    Raises:
        ValueError: an argument has a value that it cannot take.
    """

    def __init__(
        self,
        first_steps: int = 3,
        every_n_steps: int | None = 100,
        new_highs: bool = True,
        output_dir: str | os.PathLike[str] | None = None,
        report_to: str | Sequence[str] = _FOLLOW_TRAINER,
        print_table: bool | None = None,
        report: bool = True,
        limit: int | str | None = None,
        on_limit: str = OnLimit.WARN.value,
    ) -> None:
        self._policy = TracePolicy(first_steps, every_n_steps, new_highs)
        self._output_dir = _checked_folder(output_dir)
        self._report_to = _checked_report_to(report_to)
        if print_table not in (None, True, False):
            raise ValueError(f"print_table must be True, False or None, not {print_table!r}")
        if report not in (True, False):
            raise ValueError(f"report must be True or False, not {report!r}")
        self._budget = Budget.of(limit, on_limit)
        self._over_limit: str | None = None
        self._limit_told = False
        self._print_table = print_table
        self._report = report
        self._tracer: MemoryTracer | None = None
        self._begin: Callable[..., MemoryTracer] | None = None
        self._summary: Summary | None = None
        self._sinks: list[Sink] = []
        self._pending: StepRecord | None = None
        self._run: RunTrace | None = None
        self._path: Path | None = None
        self._table_wanted = self._page_wanted = False
        self._unwatch: Callable[[], None] | None = None
        self._predictions = 0

    @property
    def run(self) -> RunTrace:
        """The record of the run, as it stands; read from its file.

        Raises:
            RecordError: nothing has been recorded.
        """
        return RunTrace.load(self._path or "memtrace")

    @property
    def path(self) -> Path | None:
        """The record's file, once training has begun."""
        return self._path

    @_never_costs_the_run
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._switch_off()
        self._over_limit, self._limit_told = None, False
        trainer = calling_trainer(state)
        other = _active.get(model)
        if other is not None and (trainer is None or other in trainer.callback_handler.callbacks):
            warn("this trainer has a MemTrace already; the second one is switched off")
            return
        if other is not None:  # left behind by a trainer that failed before its first step
            other._switch_off()
        header = describe_run(args, model, trainer, asdict(self._policy))
        self._sinks = list(self._make_sinks(args, state, control, trainer))
        _active[model] = self
        self._summary = Summary(header)
        # Not before the first step: what fails until then fails with nothing of ours on the model.
        self._begin = functools.partial(
            MemoryTracer,
            as_called(model, trainer),
            policy=self._policy,
            header=header,
            on_record=self._take,
            others=other_models(trainer, model),
            wrapper=getattr(trainer, "model_wrapped", None),
        )
        chosen = self._print_table
        self._table_wanted = state.is_world_process_zero and (not args.disable_tqdm if chosen is None else chosen)
        self._page_wanted = state.is_world_process_zero and self._report
        self._unwatch = watch_trainer(trainer, self)
        self._tell_sinks(lambda sink: sink.open(header))

    @_never_costs_the_run
    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self._begin is not None:
            self._tracer, self._begin = self._begin(optimizer=optimizer), None
            self._summary = self._tracer.summary
        if self._tracer is not None:
            self._tracer.begin_step(state.global_step + 1, optimizer)

    @_never_costs_the_run
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        record = self._tracer.end_step() if self._tracer is not None else None
        if self._budget is not None:
            self._hold_to_limit(self._budget, record, args, control)
        if self._tracer is not None and control.should_log:  # the trainer logs next: our metrics go with its own
            self._log_pending(state.global_step)

    @_never_costs_the_run
    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._predictions += 1
        if self._tracer is not None and self._predictions == _TRACED_PREDICTIONS:
            self._tracer.end_phase(early=True)

    @_never_costs_the_run
    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log_pending(state.global_step)

    @_never_costs_the_run
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._finish()

    def _take(self, record: StepRecord) -> None:
        self._tell_sinks(lambda sink: sink.step(record))
        if self._budget is not None and record.peak.bytes is not None:
            self._over_limit = self._over_limit or self._budget.exceeded(record.step, record.peak.bytes, record.peak)
        if record.traced and (self._pending is None or _bytes(record.peak) >= _bytes(self._pending.peak)):
            self._pending = record

    def _hold_to_limit(self, budget: Budget, record: StepRecord | None, args: Any, control: Any) -> None:
        """Say, and do, what was asked for where a step has held more than the limit. What was traced after a step is
        held against it when the next one ends. Every process comes here in every step."""
        counted = self._tracer.counted_peak_bytes if self._tracer is not None else None
        if record is not None and not record.traced and counted is not None:
            self._over_limit = self._over_limit or budget.exceeded(record.step, counted, record.peak)
        over, self._over_limit = self._over_limit, None
        if over is not None and not self._limit_told:
            self._limit_told = True
            warn(over)
        if budget.on_limit is not OnLimit.WARN and _any_process(over is not None, args):
            control.should_training_stop = True
            control.should_save = control.should_save or budget.on_limit is OnLimit.SAVE_AND_STOP

    def _log_pending(self, global_step: int) -> None:
        record, self._pending = self._pending, None
        if record is not None:
            self._tell_sinks(lambda sink: sink.log(record, global_step))

    def training_failed(self, problem: BaseException) -> None:
        """Training is ending in an exception."""
        with contextlib.suppress(Exception):
            failure = self._tracer.fail(problem) if self._tracer is not None else None
            if failure is not None:
                self._tell_sinks(lambda sink: sink.fail(failure))
            self._finish(failure)
        self._switch_off()

    @_never_costs_the_run
    def phase_begins(self, phase: Phase) -> None:
        """The trainer evaluates, or saves."""
        self._predictions = 0
        if self._tracer is not None:
            self._tracer.begin_phase(phase)

    @_never_costs_the_run
    def phase_ends(self) -> None:
        """It has done so."""
        if self._tracer is not None:
            self._tracer.end_phase()

    @_never_costs_the_run
    def batch_ready(self, batch: Any) -> None:
        """The trainer has a batch to train on, with all that it has computed beforehand."""
        if self._tracer is not None:
            self._tracer.claim_batch(batch)

    @_never_costs_the_run
    def taken_off(self) -> None:
        """Somebody has removed this callback from its trainer."""
        self._finish()

    def _finish(self, failure: FailureRecord | None = None) -> None:
        if self._summary is None:
            return
        if self._tracer is not None:
            self._tracer.close()
            self._keep_books(self._tracer.peak_books)
        summary, self._summary = self._summary, None
        beyond = look_beyond(summary)
        self._tell_sinks(lambda sink: sink.close(summary))
        ranks = _all_ranks(summary, self._path, _PATIENCE_SECONDS if failure is None else 0.0)
        if ranks is not None:
            self._tell_sinks(lambda sink: sink.compare(ranks))
        wanted, path = self._table_wanted, self._path
        self._switch_off()
        page = _write_page(path.parent) if self._page_wanted and path is not None else None
        if wanted:
            from .reporters.ranks_text import print_ranks
            from .reporters.terminal import print_failure, print_summary

            print_summary(summary, path, beyond=beyond, page=page)
            if failure is not None:
                print_failure(failure)
            if ranks is not None:
                print_ranks(ranks)

    def _keep_books(self, books: StepBooks | None) -> None:
        if books is not None and self._path is not None:
            try:
                books.save(peak_books_path(self._path))
            except OSError as problem:
                warn(f"the books of the peak step could not be written: {problem}")

    def _switch_off(self) -> None:
        """Remove everything that is installed."""
        tracer, self._tracer = self._tracer, None
        if tracer is not None:
            tracer.close()
        self._begin = self._summary = None
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None
        for model in [model for model, callback in _active.items() if callback is self]:
            del _active[model]
        self._sinks = []
        self._pending = None

    def _tell_sinks(self, tell: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                tell(sink)
            except Exception as problem:
                name = type(sink).__name__
                logger.debug("%s failed", name, exc_info=problem)
                self._sinks.remove(sink)
                reason = f"{type(problem).__name__}: {problem}"
                warn(f"{name} is switched off, training and the other reports go on: {reason}")

    def _make_sinks(self, args: Any, state: Any, control: Any, trainer: Any) -> Iterator[Sink]:
        folder = self._output_dir or Path(args.output_dir) / "memtrace"
        self._path = folder / record_name(args.process_index)
        yield JsonlSink(self._path, resume=state.global_step > 0)
        if not state.is_world_process_zero:
            return
        followed = list(args.report_to or [])
        wanted = followed if self._report_to == _FOLLOW_TRAINER else self._report_to
        handler = getattr(trainer, "callback_handler", None)
        callbacks = handler.callbacks if handler is not None else []
        yield from _tracker_sinks(wanted, callbacks, args, state, control, asdict(self._policy), self._path)


def _write_page(folder: Path) -> Path | None:
    """Write the report of the records in a folder; None where that fails, which costs nobody anything else."""
    try:
        from .reading import read
        from .reporters.html import write_report

        return write_report(read(folder), folder / "report.html")
    except Exception as problem:
        logger.debug("the report failed", exc_info=problem)
        warn(f"the HTML report is not written, the record is: {type(problem).__name__}: {problem}")
        return None


def _all_ranks(summary: Summary, path: Path | None, patience_seconds: float) -> Ranks | None:
    """On rank 0 of several, what the others have written: read from their folder, since to ask them could hang."""
    trainer = summary.header.trainer
    if path is None or trainer["rank"] != 0 or trainer["world_size"] < 2:
        return None
    wait_for_ends(path.parent, range(1, trainer["world_size"]), patience_seconds)
    return Ranks.load(path.parent)


def _tracker_sinks(
    wanted: Sequence[str],
    callbacks: Sequence[Any],
    args: Any,
    state: Any,
    control: Any,
    settings: dict[str, Any],
    record: Path,
) -> Iterator[Sink]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    from .sinks import trackers

    for name in wanted:
        if name == "wandb":
            from .sinks.wandb import WandbSink

            yield WandbSink(settings, own_rows=name not in (args.report_to or ()), record=record)
        elif name == "trackio":
            yield trackers.TrackerSink(trackers.trackio())
        else:
            kind = INTEGRATION_TO_CALLBACK.get(name)
            callback = next((callback for callback in callbacks if kind and isinstance(callback, kind)), None)
            if callback is None:
                continue
            send = (
                trackers.tensorboard(callback)
                if name == "tensorboard"
                else trackers.any_reporter(callback, args, state, control)
            )
            yield trackers.TrackerSink(send)


def _any_process(flag: bool, args: Any) -> bool:
    """Whether it is so in any of the processes that train together: they can only stop together."""
    import torch

    if args.world_size < 2 or not torch.distributed.is_initialized():
        return flag
    flags = torch.tensor([flag], dtype=torch.int32, device=args.device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags.item())


def _checked_folder(folder: str | os.PathLike[str] | None) -> Path | None:
    if folder is None:
        return None
    try:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, TypeError) as problem:
        raise ValueError(f"output_dir must be a folder that can be made, not {folder!r}: {problem}") from None
    if not os.access(path, os.W_OK):
        raise ValueError(f"output_dir must be a folder that can be written to, not {folder!r}")
    return path


def _checked_report_to(report_to: str | Sequence[str]) -> str | list[str]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if report_to == _FOLLOW_TRAINER:
        return _FOLLOW_TRAINER
    names = [report_to] if isinstance(report_to, str) else report_to
    allowed = ["none", *INTEGRATION_TO_CALLBACK]
    if not isinstance(names, (list, tuple)) or any(name not in allowed for name in names):
        raise ValueError(f"report_to must be 'trainer', 'none' or some of {', '.join(allowed[1:])}, not {report_to!r}")
    return list(names)


def _bytes(peak: Peak) -> int:
    return peak.bytes or 0
