"""A Trainer that takes a few steps and writes nothing: in a dry run, and in a real one to be held against it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .patching import Put

if TYPE_CHECKING:
    from .dry_trace import DryTrace


_PRECOMPUTE = "_precompute_ref_logps"


class TrainedError(BaseException):
    """A training is over that somebody waits for. No ``except Exception`` of a script holds it up."""


def leave_when_trained(put: Put, train: Callable[..., Any]) -> None:
    """Have trainers train so, and then leave by ``TrainedError``: what comes after would work with what a few steps
    have made.

    Args:
        put: sets an attribute, until it is put back.
        train: in place of ``Trainer.train``.
    """
    from transformers import Trainer

    @functools.wraps(Trainer.train)
    def train_and_leave(*args: Any, **kwargs: Any) -> Any:
        train(*args, **kwargs)
        raise TrainedError

    put(Trainer, "train", train_and_leave)


def write_nothing(put: Put, folder: str) -> None:
    """See that trainers write into a folder of ours, and neither save, evaluate nor push."""
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    start = Trainer.__init__

    @functools.wraps(start)
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        settings = kwargs.get("args") or next((value for value in args if hasattr(value, "output_dir")), None)
        if settings is not None:
            settings.output_dir, settings.push_to_hub = folder, False
        start(self, *args, **kwargs)

    put(Trainer, "__init__", make)
    for owner, names in (
        (Trainer, ("save_model", "save_state", "push_to_hub", "create_model_card", "save_metrics", "log_metrics")),
        (PreTrainedModel, ("save_pretrained", "push_to_hub")),
        (PreTrainedTokenizerBase, ("save_pretrained", "push_to_hub")),
    ):
        for name in names:
            put(owner, name, _nothing)
    put(Trainer, "evaluate", lambda self, *args, **kwargs: {})


def precompute_a_little(put: Put, kind: type, steps: int) -> None:
    """Have a trainer that computes its reference's log-probabilities beforehand do so for a few batches, and then take
    zeros for all. No weights are hashed for the name of a file, and none is kept.

    Args:
        put: sets an attribute, until it is put back.
        kind: the trainer's class.
        steps: of how many batches.
    """
    owner: Any = next((base for base in kind.__mro__ if _PRECOMPUTE in vars(base)), None)
    if owner is None or hasattr(vars(owner)[_PRECOMPUTE], "__wrapped__"):
        return
    from datasets import Dataset

    original = vars(owner)[_PRECOMPUTE]

    @functools.wraps(original)
    def of_a_few(self: Any, dataset: Any, name: str, batch_size: int) -> Any:
        if not isinstance(dataset, Dataset):
            return original(self, dataset, name, batch_size)
        few = Dataset.from_dict(dataset[: steps * batch_size])
        for column in original(self, few, name, batch_size).column_names:
            if column not in dataset.column_names:
                dataset = dataset.add_column(column, [0.0] * len(dataset))
        return dataset

    put(owner, _PRECOMPUTE, of_a_few)
    put(sys.modules[owner.__module__], "hash_module", lambda module: "")


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What is left out."""


@contextmanager
def training_a_little(trainer: Any, steps: int) -> Iterator[DryTrace]:
    """Take a few steps, watched, and neither save, evaluate, report nor print."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from .callback import MemTrace
    from .dry_trace import DryTrace

    left_out = (MemTrace, PrinterCallback, ProgressCallback, *INTEGRATION_TO_CALLBACK.values())
    handler, args = trainer.callback_handler, trainer.args
    callbacks = list(handler.callbacks)
    changes = {
        "max_steps": min(steps, args.max_steps) if args.max_steps > 0 else steps,
        "save_strategy": type(args.save_strategy)("no"),
        "eval_strategy": type(args.eval_strategy)("no"),
        "load_best_model_at_end": False,
        "torch_compile": False,
        "dataloader_num_workers": 0,
    }
    before = {name: getattr(args, name) for name in changes}
    handler.callbacks = [callback for callback in callbacks if not isinstance(callback, left_out)]
    trace = DryTrace(trainer)
    handler.callbacks.append(trace)
    for name, value in changes.items():
        setattr(args, name, value)
    try:
        yield trace
    finally:
        handler.callbacks = callbacks
        for name, value in before.items():
            setattr(args, name, value)
