"""MemoryTracer: recorder, owners, phases and ledger brought together for one model and its optimizer, step by step."""

from __future__ import annotations

import gc
import logging
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from .advice import suggest
from .attribution import Books, Claims
from .bookkeeping import books_of_step, keep_books, last_allocation, peak_at, step_record
from .categories import BUCKETS, Phase
from .collectives import ALL_GATHER
from .errors import warn
from .failures import error_line, is_out_of_memory, requested_bytes
from .growth import FOLLOWED_STEPS, GrowthWatch, follow, rise_of
from .ledger import Int64Array
from .listeners import tell
from .owners import Found, Owners, Row, activation_roles, tensors_in
from .phases import COMPILED_CHILD, Hook, PhaseWatch, generate_watch, is_compiled
from .recorders import AnyRecording, Recorder, RecorderBusyError, WholeRecording
from .recorders.counters import AcceleratorCounters, CountersRecorder
from .records import FailureRecord, Peak, RunHeader, RunTrace, StepRecord, Summary
from .sharding import unwrapped
from .step_books import StepBooks
from .underway import current

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

_FORWARDS_BETWEEN_STEPS = 4
"""Where steps are followed in one recording and more than these come between two, it is somebody's evaluation, whose
books would take much memory themselves: the recording is given up."""


@dataclass(frozen=True, slots=True)
class TracePolicy:
    """Which steps are traced in full. The others are only counted.

    Attributes:
        first_steps: how many steps at the beginning, 0 or more.
        every_n_steps: after those, every Nth step, 1 or more; None for none.
        new_highs: also every step with a larger batch, in tokens, than any traced before. The step that matters is not
            missed.

    Raises:
        ValueError: a field has a value that it cannot take.
    """

    first_steps: int = 3
    every_n_steps: int | None = 100
    new_highs: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.first_steps, bool) or not isinstance(self.first_steps, int) or self.first_steps < 0:
            raise ValueError(f"first_steps must be an integer of 0 or more, not {self.first_steps!r}")
        every = self.every_n_steps
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every_n_steps must be an integer of 1 or more, or None, not {every!r}")
        if not isinstance(self.new_highs, bool):
            raise ValueError(f"new_highs must be True or False, not {self.new_highs!r}")

    @property
    def may_miss(self) -> bool:
        """Whether a new high has to be looked out for."""
        return self.new_highs and self.every_n_steps != 1

    def wants(self, number: int) -> bool:
        """Whether the ``number``-th step seen (the first is 1) is to be traced."""
        return number <= self.first_steps or (self.every_n_steps is not None and number % self.every_n_steps == 0)


class MemoryTracer:
    """Keeps the memory books of a training loop.

        tracer = MemoryTracer(model, optimizer)
        for batch in batches:
            with tracer.step():
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        tracer.close()
        tracer.run.peak.categories["activations"]  # bytes

    It only watches: the numbers of a run are the same with it and without. What goes wrong inside it is warned about
    once and switches it off; an exception of the training itself passes through, and everything installed is removed.

    Args:
        model: the model, as it is called: what ``torch.compile`` or PEFT returned, where they were used.
        optimizer: its optimizer, or None.
        policy: which steps to trace in full; every step when not given.
        header: what to say about the run in its record.
        others: further models that are kept in memory, such as a reference model, by name.
        on_record: called with every step's record, and once more where something was traced after the step and
            before the next; when not given the records are kept, in ``run``.
        wrapper: what the model is called through, where that is not the model: DDP or a DeepSpeed engine.

    Known limits: only the thread that calls ``step`` is seen; modules inside a compiled model are not told apart.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any = None,
        *,
        policy: TracePolicy | None = None,
        header: RunHeader | None = None,
        others: Mapping[str, nn.Module] | None = None,
        on_record: Callable[[StepRecord], None] | None = None,
        wrapper: nn.Module | None = None,
    ) -> None:
        self._wrapper = model if wrapper is None else wrapper
        self._model = model = unwrapped(model)
        self._owned: nn.Module = model._modules.get(COMPILED_CHILD) or model
        self._optimizer = optimizer
        self._others = {name: weakref.ref(other) for name, other in (others or {}).items()}
        self._policy = policy or TracePolicy(first_steps=0, every_n_steps=1)
        self._steps: list[StepRecord] = []
        self._on_record = on_record
        self.summary = Summary(header or RunHeader())
        self.failure: FailureRecord | None = None
        self.peak_books: StepBooks | None = None
        self._recorder: Recorder | None = None
        self._roles: dict[str, str] | None = None
        self._largest_batch = 0
        self._seen = 0
        self._warned: set[str] = set()
        self._closed = False
        self._window: _Window | None = None
        self._number = 0
        self._last: StepRecord | None = None
        self._phase: Phase | None = None  # what is under way between two steps
        self._phases_seen: Counter[Phase] = Counter()
        self._rollouts_seen = False
        self._rollout_in_step = False
        self._rollouts_missed = False
        self._growth = GrowthWatch()
        self._followed: list[_Followed] | None = None  # the steps that are in one recording
        self._unless_dropped: weakref.finalize[..., MemoryTracer] | None = None
        self._batch_bytes = 0
        self._planned = False
        self._trace_next = False
        self._forwards = 0
        self._owners: Owners | None = None
        self._owned_others: frozenset[str] = frozenset()
        self._began = 0.0
        self._tracing_seconds = 0.0
        self._size_hook: Any = None
        device_type, index = device_of(model)
        with self._guarded():
            self._recorder = _recorder_for(device_type, index)
        if self._closed:
            return
        dry = current()
        if dry is not None:
            self.summary.header = replace(self.summary.header, source="dry_run", device=dry.describe_device())
            dry.adopt(self)
        if self._recorder is None:
            self._warn_once("device", f"memory of {device_type} devices cannot be measured; steps are only counted")
        elif isinstance(self._recorder, CountersRecorder):
            self._warn_once("device", f"{device_type} memory has no history: books are kept from counters")
        elif self._policy.may_miss and not self._recorder.sees_every_step and not is_compiled(model):
            hook = Hook(self._batch_seen)
            self._size_hook = model.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        self._peak_before = self._recorder.peak_bytes() if self._recorder is not None else None
        if not self._recorder_runs_always:
            generate_watch.add(self._generates)

    @property
    def run(self) -> RunTrace:
        """The records kept so far, as one run."""
        steps = list(self._steps)
        return RunTrace(header=self.summary.header, steps=steps, failure=self.failure, growth=self.summary.growth)

    @contextmanager
    def step(self) -> Iterator[None]:
        """One training step: everything from the forward to ``zero_grad``, accumulation included."""
        self.begin_step()
        try:
            yield
        except BaseException as problem:
            self.fail(problem)
            raise
        try:
            self.end_step()
        except BaseException:
            self.abandon_step()
            raise

    def begin_step(self, number: int | None = None, optimizer: Any = None) -> None:
        """A step begins.

        Args:
            number: what to call it in the record; one more than the last when not given.
            optimizer: the optimizer from here on, where it has come or changed since.
        """
        if self._closed:
            return
        if optimizer is not None:
            self._optimizer = optimizer
        if self._began or not self._followed:
            self.abandon_step()
        self._rollout_in_step = False
        self._batch_bytes = 0
        self._seen += 1
        self._number = self._number + 1 if number is None else number
        self._began = time.perf_counter()
        self._tracing_seconds = 0.0
        self._planned = self._policy.wants(self._seen) or self._trace_next or self._growth.wants_tracing
        self._trace_next = False
        self._forwards = 0
        if self._window is not None:
            self._window.use(self._optimizer)
        elif self._growth.wants_following and not self._recorder_runs_always:
            self._start_following()
        elif self._planned or (self._recorder is not None and self._recorder.sees_every_step):
            self._start_window()

    def end_step(self) -> StepRecord | None:
        """The step has ended: its record, or None after ``close``."""
        if self._closed or not self._began:
            return None
        seconds = time.perf_counter() - self._began
        record: StepRecord | None = None
        if self._followed is None:
            with self._timed(), self._guarded():
                record = self._close_books(seconds)
        if record is None:
            reserved = self._recorder.reserved_bytes() if self._recorder is not None else None
            record = StepRecord(self._number, False, {}, Peak(), reserved, seconds)
        record = replace(record, tracing_seconds=self._tracing_seconds)
        self._began = 0.0
        if record.traced:
            self._rollouts_missed = self._rollouts_seen and not self._rollout_in_step
        self._last = record
        self.summary.add(record)
        self._hand_over(record)
        self._look_for_growth(record)
        return record

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Something that is no training: an evaluation, a rollout, saving. Inside a step it is a phase of the step;
        after one it is traced by itself, as the policy says, and joins the record of the step before it."""
        self.begin_phase(phase)
        yield
        self.end_phase()

    def begin_phase(self, phase: Phase) -> None:
        """A phase begins. One inside another is part of it."""
        if self._closed:
            return
        if self._began:
            if self._window is not None:
                self._window.phases.begin(phase)
        elif self._phase is None and self._last is not None:
            self._end_following()
            self._phase = phase
            self._phases_seen[phase] += 1
            self._tracing_seconds = 0.0
            self._planned = self._policy.wants(self._phases_seen[phase]) or self._policy.wants(self._seen)
            if self._planned or self._recorder_runs_always:
                self._start_window()
            if self._window is not None:
                self._window.phases.begin(phase)

    def end_phase(self, *, early: bool = False) -> None:
        """The phase has ended.

        Args:
            early: it goes on, and has been traced for long enough.
        """
        if self._closed:
            return
        if self._began:
            if self._window is not None and not early:
                self._window.phases.end()
        elif self._phase is not None and self._last is not None:
            later: StepRecord | None = None
            with self._timed(), self._guarded():
                later = self._close_books(0.0, cut_short=early)
            if later is not None:
                later = replace(later, tracing_seconds=self._tracing_seconds)
                record = self._last.followed_by(later)
                self.summary.amend(self._last, record)
                self._last = record
                self._hand_over(record)
            if not early:
                self._phase = None

    def claim_batch(self, batch: Any) -> None:
        """A batch is about to be trained on: its tensors are inputs, whether or not the model is called with them."""
        if self._began:
            self._batch_bytes += sum(tensor.nbytes for tensor in tensors_in(batch))
        if self._window is not None:
            self._window.claim_inputs(batch)

    def fail(self, problem: BaseException) -> FailureRecord | None:
        """The step ended in an exception: what held the memory then. Whatever was installed for the step is removed.

        Returns:
            the record, which ``run.failure`` holds too; None where no step was under way.
        """
        if self._closed or not (self._began or self._phase):
            return None
        self.failure = None
        with self._guarded():
            self.failure = self._describe_failure(problem)
            tell(self.failure)
        self.abandon_step()
        return self.failure

    def abandon_step(self) -> None:
        """Forget the step under way: whatever was installed for it is removed, and it is not recorded."""
        self._began = 0.0
        self._phase = self._followed = None
        if self._unless_dropped is not None:
            self._unless_dropped.detach()
        window, self._window = self._window, None
        if window is not None:
            window.abandon()

    def close(self) -> None:
        """Remove every hook and let go of the model. What was recorded stays."""
        if self._closed:
            return
        if not self._began:
            self._end_following()
        if not self._closed:  # as it is where that has failed
            self._let_go()

    def _let_go(self) -> None:
        self.abandon_step()
        self._closed = True
        generate_watch.remove(self._generates)
        if self._size_hook is not None:
            self._size_hook.remove()
            self._size_hook = None
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None
        del self._model, self._wrapper, self._owned, self._optimizer, self._owners, self._others

    @property
    def counted_peak_bytes(self) -> int | None:
        """The most that training has held by the allocator's own counter; None where it has none, or has held more
        before."""
        peak = self._recorder.peak_bytes() if self._recorder is not None else None
        return peak if peak is not None and peak > (self._peak_before or 0) else None

    @property
    def _recorder_runs_always(self) -> bool:
        return self._recorder is not None and self._recorder.sees_every_step

    def _hand_over(self, record: StepRecord) -> None:
        (self._on_record or self._keep)(record)
        with self._guarded():
            tell(record)

    def _keep(self, record: StepRecord) -> None:
        for place in range(len(self._steps) - 1, max(len(self._steps) - 1 - FOLLOWED_STEPS, -1), -1):
            if self._steps[place].step == record.step:
                self._steps[place] = record
                return
        self._steps.append(record)

    def _look_for_growth(self, record: StepRecord) -> None:
        with self._timed(), self._guarded():
            level = self._recorder.allocated_bytes() if self._recorder is not None else None
            if level is not None:
                self._growth.step(record.step, level - self._batch_bytes)
            if self._followed is not None and self._recorder is not None:
                self._followed.append(_Followed(record, self._recorder.clock(), self._planned))
                if self._window is not None:
                    self._window.phases.forwards_left = _FORWARDS_BETWEEN_STEPS
                if len(self._followed) == FOLLOWED_STEPS:
                    self._end_following()
        self._tell_growth()

    def _amend_followed(self, counted: StepRecord, books: Books, allocator: Int64Array) -> None:
        traced = step_record(counted.step, books, allocator, counted.seconds, counted.reserved_bytes)
        traced = replace(traced, tracing_seconds=counted.tracing_seconds)
        self.summary.amend(counted, traced)
        if self._last is counted:
            self._last = traced
        self._hand_over(traced)

    def _tell_growth(self) -> None:
        if self._growth.found is not None and self.summary.growth is None:
            self.summary.growth = self._growth.found
            self._warn_once("growth", str(self._growth.found))

    def _start_following(self) -> None:
        self._start_window()
        if self._window is not None:
            self._followed = []
            self._unless_dropped = weakref.finalize(self, self._window.abandon)  # nobody else would, between two steps

    def _end_following(self) -> None:
        """Steps were followed in one recording: each gets its record, and what they left behind is looked at."""
        followed, self._followed = self._followed, None
        window, self._window = self._window, None
        if self._unless_dropped is not None:
            self._unless_dropped.detach()
        if followed is None or window is None:
            self._window = window
            return
        with self._guarded():
            try:
                recorded = window.close()
            finally:
                window.abandon()
            if recorded is None or not followed:
                return
            books, allocator = keep_books(recorded.recording, recorded.claims, window.phases.timeline(self._roles))
            ends = books.ledger.instants([step.ended_ns for step in followed]).tolist()
            for step, start, end in zip(followed, [0, *ends], ends, strict=False):
                if step.planned:
                    self._amend_followed(step.record, books_of_step(books, start, end), allocator)
            self._growth.followed([step.record.step for step in followed], *follow(books, ends))
        self._tell_growth()

    def _generates(self, begins: bool) -> None:
        """Steps that generate may fall between those that are traced, again and again: then one is traced from its
        rollout on."""
        if not begins or not self._began or self._closed:
            return
        if self._window is None and self._rollouts_missed:
            self._start_window()
            if self._window is not None:
                self._window.phases.begin(Phase.ROLLOUT)
        self._rollouts_seen = self._rollout_in_step = True

    def _start_window(self) -> None:
        if self._recorder is None or self._window is not None:
            return
        with self._timed(), self._guarded():
            others = {name: other for name, known in self._others.items() if (other := known()) is not None}
            if self._roles is None:
                self._roles = activation_roles(self._owned)
            if self._owners is None or self._planned or others.keys() != self._owned_others:
                self._owned_others = frozenset(others)
                self._owners = Owners(
                    self._owned,
                    self._optimizer,
                    self._recorder.device_type,
                    others,
                    self._wrapper,
                    self._recorder.address_of,
                )
            window = _Window(self._model, self._optimizer, others, self._owners, self._recorder, self._fail)
            try:
                window.open(detailed=self._planned or not self._recorder.sees_every_step)
            except RecorderBusyError as problem:
                window.abandon()
                self._warn_once("busy", f"{problem}: MemTrace stands aside, and only counts steps while that is so")
            except BaseException:
                window.abandon()
                raise
            else:
                self._window = window

    def _close_books(self, seconds: float, *, cut_short: bool = False) -> StepRecord | None:
        window = self._window
        if window is None or self._recorder is None:
            return None
        seen_after = self._recorder.sees_every_step and not self._planned
        try:
            if seen_after and not (self._policy.new_highs and self._recorder.is_new_high()):
                return None
            reserved = self._recorder.reserved_bytes()
            recorded = window.close()
        finally:
            window.abandon()
            self._window = None
            if not self._recorder.sees_every_step:
                self._owners = None  # it holds what its models may have let go of by the next step
        if recorded is None:
            self._warn_once(
                "busy", "another profiler was started: MemTrace stands aside, and only counts steps while that is so"
            )
            return None
        timeline = window.phases.timeline(self._roles)
        books, allocator = keep_books(recorded.recording, recorded.claims, timeline, cut_short=cut_short)
        self._keep_if_highest(StepBooks(self._number, books, allocator, timeline))
        if isinstance(recorded.recording, WholeRecording):
            reserved = recorded.recording.reserved_bytes
        record = step_record(self._number, books, allocator, seconds, reserved)
        if self._began:
            has_levels = self._recorder.allocated_bytes() is not None
            self._growth.traced(record.step, record.peak.bytes or 0, rise_of(books), has_levels=has_levels)
        return record

    def _describe_failure(self, problem: BaseException) -> FailureRecord:
        window, self._window = self._window, None
        last = self.summary.last
        failed = FailureRecord(
            step=self._number,
            out_of_memory=is_out_of_memory(problem),
            error=error_line(problem),
            phase=None,
            module="",
            requested_bytes=requested_bytes(problem),
            peak=last.peak if last is not None else Peak(),
            traced=False,
        )
        if window is not None and self._recorder is not None:
            sighting = window.phases.sighting_of(problem)
            failed = replace(failed, phase=sighting.phase, module=sighting.module)
            try:
                recorded = window.close(failed=True)
            finally:
                window.abandon()
            if recorded is not None:
                timeline = window.phases.timeline(self._roles)
                if sighting.phase in (Phase.FORWARD, Phase.LOSS):  # the backward that would have needed what was there
                    timeline = timeline.followed_by(Phase.BACKWARD, sighting.time_ns)
                books, allocator = keep_books(recorded.recording, recorded.claims, timeline, cut_short=True)
                self._keep_if_highest(StepBooks(self._number, books, allocator, timeline))
                moment = last_allocation(books.ledger, sighting.time_ns)
                failed = replace(failed, traced=True, peak=peak_at(books, allocator, moment, sighting.phase))
                if isinstance(recorded.recording, WholeRecording):
                    reserved = recorded.recording.reserved_bytes
                    failed = replace(
                        failed, reserved_bytes=reserved, free_bytes=reserved - recorded.recording.end_bytes
                    )
                    requested = recorded.recording.refused_bytes
                    failed = replace(failed, requested_bytes=requested or failed.requested_bytes)
        advice = suggest(
            failed.peak,
            self.summary.header.args,
            reserved_bytes=failed.reserved_bytes,
            free_bytes=failed.free_bytes,
        )
        return replace(failed, suggestions=advice)

    def _keep_if_highest(self, step: StepBooks) -> None:
        if self.peak_books is None or step.peak_bytes > self.peak_books.peak_bytes:
            self.peak_books = step

    def _batch_seen(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Trace a step whose batch is larger than any before, from its forward on."""
        if not self._began or not module.training or not torch.is_grad_enabled():
            return
        with self._guarded():
            self._forwards += 1
            size = max((tensor.numel() for tensor in tensors_in((args, kwargs), 2)), default=0)
            if size <= self._largest_batch:
                return
            if self._window is not None:
                self._largest_batch = size
            elif self._forwards == 1:
                self._largest_batch = size
                self._start_window()
                if self._window is not None:  # its own hook came too late for this call
                    self._window.phases.enter_root(module, args, kwargs)
            else:  # what earlier forwards of this step hold would be missing from the books
                self._trace_next = True

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Time that the training waits for us; thousands of small objects in one go do not set the collector off."""
        began, collecting = time.perf_counter(), gc.isenabled()
        try:
            gc.disable()
            yield
        finally:
            if collecting:
                gc.enable()
            self._tracing_seconds += time.perf_counter() - began

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as problem:  # a guest's failure must never cost the run
            self._fail(problem)

    def _fail(self, problem: Exception) -> None:
        logger.debug("MemTrace failed", exc_info=problem)
        self.close()
        self._warn_once(
            "failure", f"MemTrace has switched itself off, training goes on: {type(problem).__name__}: {problem}"
        )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warn(message)


@dataclass(frozen=True, slots=True, eq=False)
class _Followed:
    """A step in a recording of several.

    Attributes:
        record: what was counted of it.
        ended_ns: when it ended, on the recorder's clock.
        planned: whether it is to have a record in full.
    """

    record: StepRecord
    ended_ns: int
    planned: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Recorded:
    recording: AnyRecording
    claims: Claims


class _Window:
    """One traced step: what is installed for it, and the claims gathered while it runs."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        others: Mapping[str, nn.Module],
        owners: Owners,
        recorder: Recorder,
        fail: Callable[[Exception], None],
    ) -> None:
        self._owners: Owners | None = owners
        self._recorder = recorder
        self._fail = weakref.WeakMethod(fail)  # hooks hold this window; they are not to hold its tracer
        self._detailed = True
        self._remembers = not isinstance(recorder, CountersRecorder)  # else a claim holds only while it is repeated
        self._rows: list[Row] = []
        self._buckets: list[Row] = []
        self._rebuilt = False
        self._handles: list[Any] = []
        self.phases = PhaseWatch(
            model,
            optimizer,
            others=others,
            on_inputs=self._claim_called_with,
            on_backward_end=self._claim_gradients,
            on_optimizer_begin=self._claim_gradients,
            on_optimizer_end=self._claim_states,
            on_collective=self._claim_collective,
            on_too_many=self.abandon,
            clock=recorder.clock,
        )

    def open(self, detailed: bool) -> None:
        """Begin.

        Args:
            detailed: whether modules are told apart, and everything is claimed now; else only what may be gone at the
                end is.
        """
        owners = self._owners
        assert owners is not None
        self._detailed = detailed
        self._recorder.start()
        now = self._recorder.clock()
        everything = (owners.weights, owners.gradients, owners.optimizer_states, owners.communication)
        for source in everything if detailed else (owners.gradients,):
            self._claim_standing(source(now))
        self._buckets, self._rebuilt = owners.buckets(now), owners.buckets_rebuilt
        self._rows.extend(self._buckets)
        self.phases.install(modules=detailed)
        for parameter in owners.used_up_in_backward():
            hooks: Any = parameter._post_accumulate_grad_hooks
            theirs = dict(hooks)
            hooks.clear()  # they are called in the order of their insertion, and ours comes before whoever frees it
            try:
                register: Any = parameter.register_post_accumulate_grad_hook
                self._handles.append(register(self._claim_gradient))
            finally:
                hooks.update(theirs)

    def close(self, failed: bool = False) -> _Recorded | None:
        if not self.phases.sees_optimizer:
            self._claim_gradients()
        if not (self.phases.sees_optimizer and self._detailed and self._remembers):
            self._claim_states()
        if self._owners is not None:
            now, whole = self._recorder.clock(), self._detailed and self._remembers
            self._rows.extend(row for row, _ in (self._owners.moved_weights if whole else self._owners.weights)(now))
            self._rows.extend(row for row, _ in self._owners.communication(now))
        self._unhook()
        recording = self._recorder.stop(failed)
        owners, self._owners = self._owners, None
        if recording is None or owners is None:
            return None
        return _Recorded(recording, Claims.of(self._rows, owners.owners))

    def use(self, optimizer: Any) -> None:
        """A step begins inside a recording that is under way, with this optimizer."""
        self.phases.forwards_left = None
        self.phases.use(optimizer)
        if self._owners is not None:
            self._owners.use(optimizer)

    def abandon(self) -> None:
        self._unhook()
        self._recorder.abandon()
        self._owners = None

    def _unhook(self) -> None:
        self.phases.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _claim_standing(self, found: Iterable[Found]) -> None:
        """Claim storages that may be older than the recording, and look out for their end."""
        rows, storages = [], []
        for row, storage in found:
            rows.append(row)
            storages.append(storage)
        self._rows.extend(rows)
        self._recorder.watch(storages)

    def _claim_called_with(self, arguments: tuple[Any, Any]) -> None:
        for batch in arguments:
            self.claim_inputs(batch)

    def claim_inputs(self, batch: Any) -> None:
        """Tensors of a batch, or of a call's arguments."""
        with self._safely():
            if self._owners is not None:
                self._claim_standing(self._owners.inputs(self._recorder.clock(), batch))

    def _claim_gradients(self) -> None:
        with self._safely():
            if self._owners is not None:
                self._rows.extend(row for row, _ in self._owners.gradients(self._recorder.clock()))

    def _claim_gradient(self, parameter: Any) -> None:
        with self._safely():
            if self._owners is not None:
                self._rows.extend(row for row, _ in self._owners.gradient(self._recorder.clock(), parameter))

    def _claim_states(self) -> None:
        if not self._remembers:
            self._claim_gradients()
        with self._safely():
            if self._owners is not None:
                self._rows.extend(row for row, _ in self._owners.optimizer_states(self._recorder.clock()))

    def _claim_collective(self, begins: bool, detail: str, subject: Any) -> None:
        with self._safely():
            if self._owners is None:
                return
            if begins:
                rows = self._owners.about_to_be_reduced(self._recorder.clock(), subject)
                self._rows.extend(row for row, _ in rows)
            elif detail == ALL_GATHER:  # a thread of the process group's may be the last to let go of them
                self._claim_standing(self._owners.in_flight(self._recorder.clock(), subject))
            elif detail == BUCKETS and self._owners.buckets_rebuilt != self._rebuilt:
                self._recorder.note_ended([address for _, address, _, _ in self._buckets])
                self._rebuilt = True

    @contextmanager
    def _safely(self) -> Iterator[None]:
        try:
            yield
        except Exception as problem:
            fail = self._fail()
            if fail is not None:
                fail(problem)


def device_of(model: nn.Module) -> tuple[str, int]:
    """The device that most of a model's parameters are on: its type and index."""
    sizes: dict[tuple[str, int], int] = {}
    for parameter in model.parameters():
        device = parameter.device.type, parameter.device.index or 0
        sizes[device] = sizes.get(device, 0) + parameter.numel()
    return max(sizes, key=lambda device: sizes[device]) if sizes else ("cpu", 0)


def _recorder_for(device_type: str, index: int) -> Recorder | None:
    dry = current()
    if dry is not None:
        from .recorders.fake import FakeRecorder

        return FakeRecorder(dry.memory)
    if device_type == "cpu":
        from .recorders.cpu import CpuRecorder

        return CpuRecorder()
    if device_type == "cuda":
        from .recorders.cuda import CudaRecorder

        try:
            return CudaRecorder(index)
        except (AttributeError, TypeError, NotImplementedError):  # an API is missing
            logger.debug("no CUDA history", exc_info=True)
    try:
        return CountersRecorder(device_type, AcceleratorCounters(device_type, index))
    except (NotImplementedError, AttributeError, RuntimeError):
        return None


__all__ = ["MemoryTracer", "TracePolicy", "device_of"]
