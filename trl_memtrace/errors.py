"""What a user is told when something is wrong, with the exit code a command ends with."""

from __future__ import annotations

import logging
import warnings

logger = logging.getLogger(__name__)


class MemtraceError(Exception):
    """A problem the user can act on; a command prints it as one line and exits with ``exit_code``."""

    exit_code = 2


class RecordError(MemtraceError):
    """A record that cannot be read: missing, empty, damaged, foreign or of a newer schema."""


class UnwritableError(MemtraceError):
    """Something cannot be written where it should go."""


def warn(message: str) -> None:
    """Warn of what is not measured. Where warnings are made errors, it is logged: a guest's warning never ends a
    run."""
    try:
        warnings.warn(message, MemtraceWarning, stacklevel=4)
    except MemtraceWarning:
        logger.warning(message)


class MemtraceWarning(UserWarning):
    """Something is not measured, or MemTrace has switched a part of itself off. Training goes on."""
