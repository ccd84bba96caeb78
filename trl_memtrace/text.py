"""Text that comes from outside, made safe to show."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with every character that a terminal would act on, not show, written as an escape: ``\\x1b``, ``\\n``.

    Names of modules, paths and words of a config are somebody else's; shown raw they could move the cursor or
    reorder the line.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def one_line(text: str) -> str:
    """``text`` as a single printable line, runs of white space made one space."""
    return printable(" ".join(text.split()))


def words(name: str) -> str:
    """A category, phase or role as it is read: ``optimizer states``."""
    return name.replace("_", " ")
