"""What no event of a Trainer tells: who is calling, which models he keeps, when he evaluates and saves, what a batch
holds, and that training has ended in an exception."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from .categories import Phase
from .phases import COMPILED_CHILD

_PHASES = {"evaluate": Phase.EVALUATE, "_save_checkpoint": Phase.SAVE}


class Watcher(Protocol):
    """What is told."""

    def training_failed(self, problem: BaseException) -> None:
        """Training is ending in an exception."""

    def taken_off(self) -> None:
        """The callback is no longer among the trainer's."""

    def phase_begins(self, phase: Phase) -> None:
        """Evaluation or saving begins; one may be inside another."""

    def phase_ends(self) -> None:
        """The outermost of these has ended."""

    def batch_ready(self, batch: Any) -> None:
        """A batch is about to be trained on."""


def calling_trainer(state: Any) -> Any:
    """The Trainer that is calling: no event hands it over, but it is on the stack. None where something else calls."""
    from transformers import Trainer

    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and caller.state is state:
            return caller
        frame = frame.f_back
    return None


def other_models(trainer: Any, model: Any) -> dict[str, Any]:
    """What else a trainer keeps in memory: reference, reward, value and teacher models, by the names it has for them
    (``ref_model``, ``reward_funcs.0``)."""
    if trainer is None:
        return {}
    own = {id(part) for root in (model, trainer.model_wrapped) for part in root.modules()}
    kept = (row for name, value in vars(trainer).items() for row in _models_in(name, value))
    return {name: value for name, value in kept if id(value) not in own}


def _models_in(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    from torch import nn

    if isinstance(value, nn.Module):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            if isinstance(item, nn.Module):
                yield f"{name}.{place}", item


def watch_trainer(trainer: Any, watcher: Watcher) -> Callable[[], None] | None:
    """Have a watcher told what no event tells, by methods of this one trainer. Returns what undoes it."""
    if trainer is None:
        return None
    handler = trainer.callback_handler
    loop = "_run_epoch" if hasattr(trainer, "_run_epoch") else "training_step"
    running: list[Phase] = []
    undos = [
        _wrap(trainer, loop, _failures(watcher, lambda: watcher not in handler.callbacks)),
        _wrap(handler, "call_event", _failures(watcher, lambda: False)),
        _wrap(trainer, "_prepare_inputs", _batches(watcher)),
        *(_wrap(trainer, name, _phase(watcher, phase, running)) for name, phase in _PHASES.items()),
    ]

    def undo_all() -> None:
        for undo in undos:
            undo()

    return undo_all


_Call = Callable[..., Any]


def _wrap(owner: Any, name: str, wrapper: Callable[[_Call], _Call]) -> Callable[[], None]:
    """Put a wrapper around one object's method, unless somebody else has."""
    if name in vars(owner):
        return lambda: None
    watched = functools.wraps(getattr(owner, name))(wrapper(getattr(owner, name)))

    def undo() -> None:
        if vars(owner).get(name) is watched:
            delattr(owner, name)

    setattr(owner, name, watched)
    return undo


def _failures(watcher: Watcher, taken_off: Callable[[], bool]) -> Callable[[_Call], _Call]:
    def wrapper(original: _Call) -> _Call:
        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                result = original(*args, **kwargs)
            except BaseException as problem:
                watcher.training_failed(problem)
                raise
            if taken_off():
                watcher.taken_off()
            return result

        return watched

    return wrapper


def _batches(watcher: Watcher) -> Callable[[_Call], _Call]:
    def wrapper(original: _Call) -> _Call:
        def watched(*args: Any, **kwargs: Any) -> Any:
            batch = original(*args, **kwargs)
            watcher.batch_ready(batch)
            return batch

        return watched

    return wrapper


def _phase(watcher: Watcher, phase: Phase, running: list[Phase]) -> Callable[[_Call], _Call]:
    def wrapper(original: _Call) -> _Call:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not running:  # evaluation on several datasets evaluates on each
                watcher.phase_begins(phase)
            running.append(phase)
            try:
                result = original(*args, **kwargs)
            finally:  # an exception that ends training has its phase yet to be told
                running.pop()
            if not running:
                watcher.phase_ends()
            return result

        return watched

    return wrapper


def as_called(model: Any, trainer: Any) -> Any:
    """What the trainer calls: the compiled model, whose insides must not be hooked, where it has compiled one."""
    wrapped = getattr(trainer, "model_wrapped", None)
    return wrapped if COMPILED_CHILD in getattr(wrapped, "_modules", ()) else model
