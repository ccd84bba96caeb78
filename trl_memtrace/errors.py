"""What a user is told when something is wrong, with the exit code a command ends with."""

from __future__ import annotations


class MemtraceError(Exception):
    """A problem the user can act on; a command prints it as one line and exits with ``exit_code``."""

    exit_code = 2


class RecordError(MemtraceError):
    """A record that cannot be read: missing, empty, damaged, foreign or of a newer schema."""


class MemtraceWarning(UserWarning):
    """Something is not measured, or MemTrace has switched a part of itself off. Training goes on."""
