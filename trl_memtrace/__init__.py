"""Where the memory of fine-tuning goes, to the byte.

    trainer.add_callback(MemTrace())

Importing this package imports neither torch nor trl nor wandb; names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Category": "categories",
    "MemTrace": "callback",
    "MemoryTracer": "tracer",
    "MemtraceError": "errors",
    "MemtraceWarning": "errors",
    "Phase": "categories",
    "RecordError": "errors",
    "RunTrace": "records",
    "StepRecord": "records",
    "TracePolicy": "tracer",
    "dry_run": "dryrun",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .callback import MemTrace as MemTrace
    from .categories import Category as Category
    from .categories import Phase as Phase
    from .dryrun import dry_run as dry_run
    from .errors import MemtraceError as MemtraceError
    from .errors import MemtraceWarning as MemtraceWarning
    from .errors import RecordError as RecordError
    from .records import RunTrace as RunTrace
    from .records import StepRecord as StepRecord
    from .tracer import MemoryTracer as MemoryTracer
    from .tracer import TracePolicy as TracePolicy


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
