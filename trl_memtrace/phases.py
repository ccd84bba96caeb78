"""The hooks that say which phase and which module a step is in. Whatever is installed here is removed here."""

from __future__ import annotations

import functools
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
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


OTHER_MODELS_ROLE = "logits"
"""What outlives the forward of a model that is only used: its answer."""


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


class _CallWatch:
    """Tells listeners when a function of somebody else's begins and ends, where there is no hook that says so.

    The function is wrapped while anybody listens, and put back after.

    Args:
        find: the object that holds the function now, None where there is none.
        name: the function's name in it.
    """

    def __init__(self, find: Callable[[], Any], name: str) -> None:
        self._find = find
        self._name = name
        self._listeners: list[tuple[int, weakref.WeakMethod[Callable[[bool], None]]]] = []
        self._original: Callable[..., Any] | None = None
        self._lock = threading.Lock()

    def add(self, listener: Callable[[bool], None]) -> None:
        """Call ``listener(True)`` when a call from this thread begins, ``listener(False)`` when it has ended. It is a
        method, whose object is not kept alive."""
        with self._lock:
            self._listeners.append((threading.get_ident(), weakref.WeakMethod(listener)))
            owner = self._find()
            if self._original is None and self._name in vars(owner or object):
                self._original = vars(owner)[self._name]
                setattr(owner, self._name, self._wrap(self._original))

    def remove(self, listener: Callable[[bool], None]) -> None:
        """Stop calling a listener; one that is not there is passed over."""
        with self._lock:
            self._listeners = [row for row in self._listeners if row[1]() not in (listener, None)]
            if self._listeners or self._original is None:
                return
            owner = self._find()
            if getattr(getattr(owner, self._name, None), "_memtrace", None) is self:
                setattr(owner, self._name, self._original)
                self._original = None

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            thread = threading.get_ident()
            alive = ((ident, method()) for ident, method in self._listeners)
            listening = [listener for ident, listener in alive if ident == thread and listener is not None]
            for listener in listening:
                listener(True)
            try:
                return original(*args, **kwargs)
            finally:
                for listener in listening:
                    listener(False)

        watched._memtrace = self  # type: ignore[attr-defined]
        return watched


backward_watch = _CallWatch(lambda: torch.autograd, "_engine_run_backward")
"""Backward passes. A hook on the loss would miss a loss made after the model's forward, and full backward hooks change
the graph; every backward, that of reentrant checkpointing too, goes through this function."""

generate_watch = _CallWatch(
    lambda: getattr(sys.modules.get("transformers.generation.utils"), "GenerationMixin", None), "generate"
)
"""Generation by any transformers model. The class is watched, not a model: an attribute of a model would go with its
copies."""


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
        others: further models that run forward, such as a reference model, by name.
        on_inputs: called with (args, kwargs) when the model itself is called, outside backward and generation.
        on_backward_end: called when a backward pass has ended.
        on_optimizer_begin, on_optimizer_end: called around ``optimizer.step``.
        on_collective: told of transfers between ranks.
        on_too_many: called where more forwards begin than ``forwards_left`` allows.
        clock: nanoseconds, as the recorder counts them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        others: Mapping[str, nn.Module] | None = None,
        on_inputs: Callable[[Any], None],
        on_backward_end: Callable[[], None],
        on_optimizer_begin: Callable[[], None],
        on_optimizer_end: Callable[[], None],
        on_too_many: Callable[[], None],
        on_collective: CollectiveListener = does_nothing,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._model = model
        self._optimizer = inner_optimizer(optimizer)
        self._others = dict(others or {})
        self._on_inputs = on_inputs
        self._on_backward_end = on_backward_end
        self._on_optimizer_begin = on_optimizer_begin
        self._on_optimizer_end = on_optimizer_end
        self._on_collective = on_collective
        self._on_too_many = on_too_many
        self.forwards_left: int | None = None
        """How many forwards may begin from here on; None for any number."""
        self._clock = clock
        self._handles: list[Any] = []
        self._names: list[str] = []
        self._stack: list[int] = []
        self._backward_depth = 0
        self._optimizer_depth = 0
        self._generate_depth = 0
        self._resting = Phase.IDLE  # what is under way between forward and backward: nothing, or the optimizer's step
        self._outer: Phase | None = None  # what all is part of, whichever forward runs: evaluation, a rollout
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
        for name, other in self._others.items():
            if not is_compiled(other):
                self._hook_module(len(self._names), name, other)
        backward_watch.add(self._backward)
        collective_watch.add(self._collective)
        generate_watch.add(self._generate)
        self._hook_optimizer()

    def remove(self) -> None:
        """Take every hook away again."""
        backward_watch.remove(self._backward)
        collective_watch.remove(self._collective)
        generate_watch.remove(self._generate)
        for handle in self._handles:
            with suppress(Exception):
                handle.remove()
        self._handles.clear()
        self._others.clear()
        # These hold this object, or whoever holds it: nothing is to wait for the garbage collector.
        self.enter_root = self._on_inputs = self._on_collective = does_nothing
        self._on_backward_end = self._on_optimizer_begin = self._on_optimizer_end = self._on_too_many = does_nothing

    def use(self, optimizer: Any) -> None:
        """Another optimizer is stepped from here on, beside those before it."""
        if inner_optimizer(optimizer) is not self._optimizer:
            self._optimizer = inner_optimizer(optimizer)
            self._hook_optimizer()

    def _hook_optimizer(self) -> None:
        if self.sees_optimizer:
            self._handles.append(self._optimizer.register_step_pre_hook(self._optimizer_begin))
            self._handles.append(self._optimizer.register_step_post_hook(self._optimizer_end))

    def timeline(self, roles: dict[str, str] | None = None) -> Timeline:
        """What was seen so far."""
        known = activation_roles(self._model) if roles is None else roles
        return Timeline(
            phase_ns=self._phase_ns,
            phase=self._phases,
            module_ns=self._module_ns,
            module=self._modules,
            module_names=self._names,
            activation_roles=[known.get(name, OTHER_MODELS_ROLE) for name in self._names],
            transfer_ns=self._transfer_ns,
            transfer=self._transfer,
        )

    def begin(self, phase: Phase) -> None:
        """Everything from here on is part of a phase, whatever runs in it."""
        self._outer = phase
        self._enter(phase)

    def end(self) -> None:
        """The phase that was begun has ended."""
        self._outer = None
        self._enter(self._resting)

    def _hook_module(self, number: int, name: str, module: nn.Module) -> None:
        self._names.append(name)
        stack, times, modules, clock = self._stack, self._module_ns, self._modules, self._clock
        is_root = module is self._model

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if torch.compiler.is_compiling():
                return
            if not stack and not self._backward_depth:
                self._enter_forward()
                if is_root and not self._generate_depth:
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
            if not stack and not self._backward_depth and self._outer is None:
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

    def _enter_forward(self) -> None:
        if self.forwards_left is not None:
            self.forwards_left -= 1
            if self.forwards_left < 0:
                self._on_too_many()
                return
        if self._outer is Phase.ROLLOUT and torch.is_grad_enabled():  # what was rolled out is now trained on
            self._outer = None
        if self._outer is None:
            self._enter(Phase.FORWARD)

    def _generate(self, begins: bool) -> None:
        """A rollout lasts from generation to the first forward that is to be trained on: scoring is part of it."""
        self._generate_depth += 1 if begins else -1
        if begins and self._outer is None and not self._backward_depth:
            self.begin(Phase.ROLLOUT)

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._phases.append(phase)
        self._phase_ns.append(self._clock())

    def _backward(self, begins: bool) -> None:
        if begins:
            self._backward_depth += 1
            if self._backward_depth == 1:
                if self._outer is Phase.ROLLOUT:
                    self._outer = None
                self._enter(Phase.BACKWARD)
            return
        self._look()
        self._backward_depth -= 1
        if self._backward_depth == 0:
            self._on_backward_end()
            self._enter(self._outer or (Phase.FORWARD if self._stack else self._resting))

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
        self._outer = None
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
