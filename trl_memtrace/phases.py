"""The hooks that say which phase and which module a step is in. Whatever is installed here is removed here."""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .attribution import NO_MODULE, Timeline
from .categories import Phase
from .collectives import WHOLE_BACKWARD, WHOLE_STEP, CollectiveListener, collective_watch
from .owners import activation_roles, inner_optimizer
from .sharding import module_name

COMPILED_CHILD = "_orig_mod"
"""The name under which what ``torch.compile`` returned holds the model it compiled."""


_ENGINE = "_engine_run_backward"


class Hook:
    """A hook that belongs to the model it was put on: a copy of that model, or its pickle, has one that does
    nothing."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.call(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return does_nothing

    def __reduce__(self) -> str | tuple[Any, ...]:
        return _nothing, ()


def does_nothing(*args: Any, **kwargs: Any) -> None:
    """What copies of a hook do."""


def _nothing() -> Callable[..., None]:
    return does_nothing


def is_compiled(module: nn.Module) -> bool:
    """Whether what a module does when it is called is compiled, hooks on it included: ``module.compile()``, or a
    compiled ``forward``."""
    forward = vars(module).get("forward")
    compiled_forward = hasattr(forward, "_torchdynamo_orig_callable") and COMPILED_CHILD not in module._modules
    return getattr(module, "_compiled_call_impl", None) is not None or compiled_forward


class _BackwardWatch:
    """Tells listeners when autograd begins and ends a backward pass.

    There is no public hook for this: a hook on the loss would miss a loss made after the model's forward, and full
    backward hooks change the graph. Every backward, that of reentrant checkpointing too, goes through
    ``torch.autograd._engine_run_backward``; it is wrapped while anybody listens and put back after.
    """

    def __init__(self) -> None:
        self._listeners: list[tuple[int, Callable[[bool], None]]] = []
        self._original: Callable[..., Any] | None = None
        self._lock = threading.Lock()

    def add(self, listener: Callable[[bool], None]) -> None:
        """Call ``listener(True)`` when a backward of this thread begins, ``listener(False)`` when it has ended."""
        with self._lock:
            self._listeners.append((threading.get_ident(), listener))
            if self._original is None and hasattr(torch.autograd, _ENGINE):
                self._original = getattr(torch.autograd, _ENGINE)
                setattr(torch.autograd, _ENGINE, self._wrap(self._original))

    def remove(self, listener: Callable[[bool], None]) -> None:
        """Stop calling a listener; one that is not there is passed over."""
        with self._lock:
            self._listeners = [row for row in self._listeners if row[1] != listener]
            current = getattr(torch.autograd, _ENGINE, None)
            if not self._listeners and self._original is not None and getattr(current, "_memtrace", None) is self:
                setattr(torch.autograd, _ENGINE, self._original)
                self._original = None

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def engine_run_backward(*args: Any, **kwargs: Any) -> Any:
            thread = threading.get_ident()
            listening = [listener for ident, listener in self._listeners if ident == thread]
            for listener in listening:
                listener(True)
            try:
                return original(*args, **kwargs)
            finally:
                for listener in listening:
                    listener(False)

        engine_run_backward._memtrace = self  # type: ignore[attr-defined]
        return engine_run_backward


backward_watch = _BackwardWatch()


def hookable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model that hooks may be put on, with their names: all but those inside a compiled region, where
    a hook would be compiled into the graph. A model that torch.compile returned can be hooked itself."""
    pending = [("", model)]
    seen: set[int] = set()
    while pending:
        name, module = pending.pop()
        if id(module) in seen or is_compiled(module):
            continue
        seen.add(id(module))
        yield name, module
        if COMPILED_CHILD not in module._modules:
            prefix = f"{name}." if name else ""
            pending.extend((module_name(prefix + child), part) for child, part in module.named_children())


@dataclass(frozen=True, slots=True)
class Sighting:
    """Where an exception was first seen. It is known by its identity: to hold it would hold what its frames hold.

    Attributes:
        identity: ``id`` of the exception.
        phase: the phase under way.
        module: the innermost module whose forward was under way, ``""`` outside all.
        time_ns: when, on the recorder's clock.
    """

    identity: int
    phase: Phase
    module: str
    time_ns: int


class PhaseWatch:
    """Follows one step of one model through its phases and modules.

    Args:
        model: what runs forward; what ``torch.compile`` returned, where it is compiled.
        optimizer: its optimizer, or None.
        on_inputs: called with (args, kwargs) when the model itself is called, outside backward.
        on_backward_end: called when a backward pass has ended.
        on_optimizer_begin, on_optimizer_end: called around ``optimizer.step``.
        on_collective: told of transfers between ranks.
        clock: nanoseconds, as the recorder counts them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        on_inputs: Callable[[Any], None],
        on_backward_end: Callable[[], None],
        on_optimizer_begin: Callable[[], None],
        on_optimizer_end: Callable[[], None],
        on_collective: CollectiveListener = does_nothing,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._model = model
        self._optimizer = inner_optimizer(optimizer)
        self._on_inputs = on_inputs
        self._on_backward_end = on_backward_end
        self._on_optimizer_begin = on_optimizer_begin
        self._on_optimizer_end = on_optimizer_end
        self._on_collective = on_collective
        self._clock = clock
        self._handles: list[Any] = []
        self._names: list[str] = []
        self._stack: list[int] = []
        self._backward_depth = 0
        self._optimizer_depth = 0
        self._resting = Phase.IDLE  # what is under way between forward and backward: nothing, or the optimizer's step
        self.enter_root: Callable[..., None] = does_nothing
        """What the model's own pre-hook does; to be called where the hooks are installed as the model is being
        called."""
        self._sighting: Sighting | None = None
        self._phase = Phase.IDLE
        self._phase_ns: list[int] = []
        self._phases: list[Phase] = []
        self._module_ns: list[int] = []
        self._modules: list[int] = []
        self._transfers: list[str] = []  # those under way, the innermost last
        self._transfer_ns: list[int] = []
        self._transfer: list[str | None] = []

    @property
    def sees_optimizer(self) -> bool:
        """Whether it is told of the optimizer's steps; an optimizer that is not torch's has no hooks."""
        return isinstance(self._optimizer, torch.optim.Optimizer)

    def sighting_of(self, problem: BaseException) -> Sighting:
        """Where an exception was first seen; here and now, where it has not been seen before."""
        if self._sighting is None or self._sighting.identity != id(problem):
            self._see(problem)
        assert self._sighting is not None
        return self._sighting

    def install(self, modules: bool = True) -> None:
        """Put every hook in place; those on the model's parts only to tell modules apart."""
        for name, module in hookable_modules(self._model):
            self._hook_module(len(self._names), name, module)
            if not modules:
                break
        if not self._names:  # compiled as a whole: all until the backward is its forward
            self._enter(Phase.FORWARD)
        backward_watch.add(self._backward)
        collective_watch.add(self._collective)
        if self.sees_optimizer:
            self._handles.append(self._optimizer.register_step_pre_hook(self._optimizer_begin))
            self._handles.append(self._optimizer.register_step_post_hook(self._optimizer_end))

    def remove(self) -> None:
        """Take every hook away again."""
        backward_watch.remove(self._backward)
        collective_watch.remove(self._collective)
        for handle in self._handles:
            with suppress(Exception):
                handle.remove()
        self._handles.clear()

    def timeline(self, roles: dict[str, str] | None = None) -> Timeline:
        """What was seen so far."""
        known = activation_roles(self._model) if roles is None else roles
        return Timeline(
            phase_ns=self._phase_ns,
            phase=self._phases,
            module_ns=self._module_ns,
            module=self._modules,
            module_names=self._names,
            activation_roles=[known.get(name, "other") for name in self._names],
            transfer_ns=self._transfer_ns,
            transfer=self._transfer,
        )

    def _hook_module(self, number: int, name: str, module: nn.Module) -> None:
        self._names.append(name)
        stack, times, modules, clock = self._stack, self._module_ns, self._modules, self._clock
        is_root = number == 0

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if torch.compiler.is_compiling():
                return
            if not stack and not self._backward_depth:
                self._enter(Phase.FORWARD)
                if is_root:
                    self._on_inputs((args, kwargs))
            stack.append(number)
            times.append(clock())
            modules.append(number)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if torch.compiler.is_compiling() or number not in stack:
                return
            self._look()
            while stack.pop() != number:  # modules whose own end was lost to an exception
                pass
            times.append(clock())
            modules.append(stack[-1] if stack else NO_MODULE)
            if not stack and not self._backward_depth:
                self._enter(Phase.LOSS)

        if is_root:
            self.enter_root = enter
        self._handles.append(module.register_forward_pre_hook(Hook(enter), with_kwargs=True, prepend=is_root))
        self._handles.append(module.register_forward_hook(Hook(leave), always_call=True))

    def _look(self) -> None:
        """See the exception that is passing through, if one is."""
        problem = sys.exc_info()[1]
        if problem is not None and (self._sighting is None or self._sighting.identity != id(problem)):
            self._see(problem)

    def _see(self, problem: BaseException) -> None:
        module = self._names[self._stack[-1]] if self._stack else ""
        self._sighting = Sighting(id(problem), self._phase, module, self._clock())

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._phases.append(phase)
        self._phase_ns.append(self._clock())

    def _backward(self, begins: bool) -> None:
        if begins:
            self._backward_depth += 1
            if self._backward_depth == 1:
                self._enter(Phase.BACKWARD)
            return
        self._look()
        self._backward_depth -= 1
        if self._backward_depth == 0:
            self._on_backward_end()
            self._enter(Phase.FORWARD if self._stack else self._resting)

    def _collective(self, begins: bool, detail: str, subject: Any) -> None:
        if detail == WHOLE_BACKWARD:
            self._backward(begins)
            return
        if detail == WHOLE_STEP:
            (self._optimizer_begin if begins else self._optimizer_end)(subject)
            return
        if begins:
            self._on_collective(begins, detail, subject)
            self._transfers.append(detail)
        elif self._transfers:
            self._transfers.pop()
        self._transfer_ns.append(self._clock())
        self._transfer.append(self._transfers[-1] if self._transfers else None)
        if not begins:
            self._on_collective(begins, detail, subject)

    def _optimizer_begin(self, optimizer: Any, *_: Any) -> None:
        self._on_optimizer_begin()
        self._optimizer_depth += 1  # DeepSpeed steps its inner optimizer once for each group, in a step of its own
        if self._optimizer_depth == 1:
            self._resting = Phase.OPTIMIZER
            self._enter(Phase.OPTIMIZER)

    def _optimizer_end(self, optimizer: Any, *_: Any) -> None:
        self._on_optimizer_end()
        self._optimizer_depth -= 1
        if self._optimizer_depth <= 0:
            self._optimizer_depth = 0
            self._resting = Phase.IDLE
            self._enter(Phase.IDLE)
