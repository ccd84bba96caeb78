"""Which versions decide what a run takes."""

from __future__ import annotations

import importlib.metadata
import platform

_PACKAGES = (
    "trl-memtrace",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "deepspeed",
    "wandb",
)


def versions() -> dict[str, str]:
    """The versions of Python and of every package that has a say, where it is installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
