"""measure: what a ``trl`` command takes for real, on the device that is here: ``estimate``'s data and steps."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .dryrun import DryRunError
from .estimating import Findings, Source, check, run_command
from .patching import put_until
from .records import RunTrace
from .run_info import look_beyond
from .short_training import TrainedError, leave_when_trained, training_a_little, write_nothing

if TYPE_CHECKING:
    from .dry_trace import DryTrace

_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(slots=True)
class Measurement(Findings):
    """What a command took.

    Attributes:
        run: the record.
    """

    run: RunTrace


class _Here:
    """This process and its device."""

    ranks = 1

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.trace: DryTrace | None = None

    def outside(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def until_trained(self) -> Iterator[None]:
        from transformers import Trainer

        train = Trainer.train

        def train_a_little(trainer: Any, *args: Any, **kwargs: Any) -> None:
            with training_a_little(trainer, self.steps) as self.trace:
                train(trainer)

        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="memtrace-"))
            put = functools.partial(put_until, stack)
            write_nothing(put, folder)
            leave_when_trained(put, train_a_little)
            with suppress(TrainedError):
                yield


def measure(kind: str, flags: Sequence[str], *, steps: int = 2, lengths: Sequence[int] | None = None) -> Measurement:
    """Run ``trl KIND FLAGS`` for a few steps, really, and record what it takes.

    A folder with a ``config.json`` and no weights is model enough: weights are drawn at random, in a folder that is
    removed again. Generation is not shortened.

    Args:
        kind: one of ``estimating.TRAINERS``.
        flags: those of ``trl``.
        steps: how many optimizer steps to take.
        lengths: as for ``estimate``.

    Raises:
        FlagError: TRL does not take the flags.
        ModelError: there is no such model.
        DryRunError: it cannot be run, or trained nothing.
        ValueError: no such kind, or lengths that are none.
    """
    check(kind, lengths)
    here, found = _Here(steps), Findings()
    run_command(kind, flags, here, lengths, found, with_weights=_with_weights)
    tracer = here.trace.tracer if here.trace is not None else None
    if tracer is None or not len(tracer.run):
        raise DryRunError(f"trl {kind} with these flags trained nothing")
    look_beyond(tracer.run.summary)
    return Measurement(tracer.run, assumed=found.assumed, longest=found.longest)


@contextmanager
def _with_weights(source: Source) -> Iterator[Source]:
    """A folder with weights: the model's own, or one of random ones in the config's dtype."""
    path = Path(source.path)
    if not path.is_dir() or any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        yield source
        return
    import torch

    from .model import architecture_of

    with tempfile.TemporaryDirectory(prefix="memtrace-") as folder:
        dtype = getattr(source.config, "dtype", None) or torch.get_default_dtype()
        architecture_of(source.config)._from_config(source.config, dtype=dtype).save_pretrained(folder)
        for beside in path.glob("*token*"):
            (Path(folder) / beside.name).symlink_to(beside.resolve())
        yield Source(Path(folder), source.config)
