"""Somebody's script inside a dry run: run until it has trained, and no further."""

from __future__ import annotations

import functools
import runpy
import sys
import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from .dryrun import DryRun, DryRunError, dry_run
from .errors import MemtraceError
from .short_training import TrainedError, leave_when_trained
from .text import one_line


class ScriptError(MemtraceError):
    """A script that cannot be run, that failed, or that trained nothing."""


def run_script(
    script: Path, arguments: Sequence[str], *, device: Any = None, steps: int = 2, ranks: int = 1
) -> DryRun:
    """Run a script as ``python SCRIPT ARGUMENTS`` would, on fake tensors, until it has trained.

    What is traced is the first training in it: a Trainer's, or a loop of its own with an optimizer of torch's kind.

    Args:
        script: the file.
        arguments: its ``sys.argv[1:]``.
        device: as for ``dry_run``.
        steps: how many optimizer steps to take.
        ranks: as for ``dry_run``.

    Raises:
        ScriptError: it cannot be run, failed or trained nothing; the message names the line.
    """
    if not script.is_file():
        raise ScriptError(f"{script}: no such script")
    with dry_run(device, steps=steps, ranks=ranks) as dry, until_trained(dry):
        _run(script, arguments)
    try:
        dry.run  # noqa: B018
    except DryRunError:
        raise ScriptError(
            f"{script} ended and had trained nothing: no Trainer took a step, and no optimizer of torch's kind had"
            " parameters of a module that was called in training mode"
        ) from None
    return dry


@contextmanager
def until_trained(dry: DryRun) -> Iterator[None]:
    """Leave when the first training in here is over: what comes after would work with numbers that nobody has
    computed.

    A Trainer's training is over when ``train`` returns. A loop that neither a Trainer nor a MemoryTracer watches is
    traced, and is over when it has taken the dry run's steps.
    """
    from transformers import Trainer

    from .patching import put_until

    with ExitStack() as stack:
        leave_when_trained(functools.partial(put_until, stack), Trainer.train)
        loop = _Loop(dry)
        stack.callback(loop.close)
        loop.install(stack)
        with suppress(TrainedError):
            yield
        loop.end_step()


class _Loop:
    """Traces a training loop that nobody has prepared for it.

    The model is the outermost module that is called, in training mode, and has parameters of an optimizer; a step is
    over where the model is called again after the optimizer's step.
    """

    def __init__(self, dry: DryRun) -> None:
        self._dry = dry
        self._optimizers: list[weakref.ref[Any]] = []
        self._tracer: Any = None
        self._depth = 0
        self._taken = 0
        self._is_over = False

    def install(self, stack: ExitStack) -> None:
        """See optimizers made and stepping, and modules called, until the stack ends."""
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook

        from .patching import put_until

        make, call = torch.optim.Optimizer.__init__, torch.nn.Module.__call__
        loop = self

        @functools.wraps(make)
        def make_optimizer(self: Any, *args: Any, **kwargs: Any) -> None:
            make(self, *args, **kwargs)
            loop._optimizers.append(weakref.ref(self))

        def call_module(self: Any, *args: Any, **kwargs: Any) -> Any:
            loop._depth += 1
            try:
                if loop._depth == 1:
                    loop._called(self)
                return call(self, *args, **kwargs)
            finally:
                loop._depth -= 1

        put_until(stack, torch.optim.Optimizer, "__init__", make_optimizer)
        put_until(stack, torch.nn.Module, "__call__", call_module)
        stack.callback(register_optimizer_step_post_hook(self._stepped).remove)

    def end_step(self) -> None:
        """The step is over, if one was taken."""
        if self._is_over:
            self._is_over = False
            self._tracer.end_step()

    def close(self) -> None:
        """Let go of the model."""
        if self._tracer is not None:
            self._tracer.close()

    def _called(self, module: Any) -> None:
        if self._tracer is None:
            if module.training and not self._dry.is_watched:
                self._begin(module)
        elif self._is_over:
            self.end_step()
            if self._taken >= self._dry.steps:
                raise TrainedError
            self._tracer.begin_step()

    def _begin(self, module: Any) -> None:
        from .records import RunHeader
        from .run_info import describe_model
        from .tracer import MemoryTracer
        from .versions import versions

        own = {id(parameter) for parameter in module.parameters()}
        for reference in self._optimizers:
            optimizer = reference()
            groups = optimizer.param_groups if optimizer is not None else ()
            if any(id(parameter) in own for group in groups for parameter in group["params"]):
                header = RunHeader(versions=versions(), model=describe_model(module))
                self._tracer = MemoryTracer(module, optimizer, header=header)
                self._tracer.begin_step()
                return

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._tracer is not None and not self._is_over:
            self._is_over = True
            self._taken += 1


def _run(script: Path, arguments: Sequence[str]) -> None:
    """Run a script as python does, and say what went wrong in it."""
    before = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            code = end.code if isinstance(end.code, int) else one_line(str(end.code))
            raise ScriptError(f"{_where(script, end)} ended with {code} before it had trained") from end
    except Exception as problem:  # whatever somebody's script leads to
        kind = "" if isinstance(problem, MemtraceError) else f"{type(problem).__name__}: "
        raise ScriptError(f"{_where(script, problem)}: {kind}{one_line(str(problem))}") from problem
    finally:
        sys.argv, sys.path[:] = before


def _where(script: Path, problem: BaseException) -> str:
    """The script's own line that a problem came from."""
    if isinstance(problem, SyntaxError) and problem.filename == str(script):
        return f"{script}, line {problem.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == str(script)]
    return f"{script}, line {lines[-1]}" if lines else str(script)
