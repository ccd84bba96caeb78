"""Attributes of other people's modules and classes that are something else for a while."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

Put = Callable[[Any, str, Any], None]
"""Sets an attribute of something, until it is put back."""


def put_until(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack ends."""
    missing = object()
    old = vars(owner).get(name, missing)

    def undo() -> None:
        if old is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, old)

    setattr(owner, name, value)
    stack.callback(undo)
