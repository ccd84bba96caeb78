"""A whole process of ours: quick to start, and silent about what is not its business."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quick_imports() -> Iterator[None]:
    """A place to import torch and transformers in: the garbage collector does not walk what they make, neither now nor
    at exit. It takes a third off the seconds that a short command takes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


@contextmanager
def quiet() -> Iterator[None]:
    """Libraries say nothing but errors: a dry run is not the run that they talk about."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def uncompiled() -> Iterator[None]:
    """``torch.compile`` gives back what it is given: nothing compiled can be faked, and bitsandbytes, which prepares
    to compile as it is imported, takes two seconds less."""
    import torch

    def as_it_is(model: Any = None, **options: Any) -> Any:
        return model if model is not None else as_it_is

    before = torch.compile
    torch.compile = as_it_is
    try:
        yield
    finally:
        torch.compile = before
