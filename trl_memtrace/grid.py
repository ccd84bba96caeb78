"""Flags as data: which of them have several values, and what they become one by one. No torch."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .errors import MemtraceError

_COMMA = re.compile(r"(?<!\\),")


class GridError(MemtraceError):
    """Flags that make no grid."""


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag and its values, as they stand on a command line."""

    name: str
    values: tuple[str, ...] = ()

    def words(self) -> list[str]:
        """As they are typed."""
        return [f"--{self.name}", *self.values]


@dataclass(frozen=True, slots=True)
class Knob:
    """A flag that is tried with several values.

    Attributes:
        name: the flag's.
        choices: the values, each as it is typed: ``"q_proj v_proj"``.
    """

    name: str
    choices: tuple[str, ...]

    @property
    def numbers(self) -> tuple[float, ...] | None:
        """The choices as numbers, where all of them are, and no two the same."""
        try:
            found = tuple(map(float, self.choices))
        except ValueError:
            return None
        return found if all(map(math.isfinite, found)) and len(set(found)) == len(found) else None


@dataclass(frozen=True, slots=True)
class Point:
    """One configuration of a grid.

    Attributes:
        choices: what each knob is set to, in the order of the knobs.
        flags: all flags.
    """

    choices: tuple[str, ...]
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """Every combination of some knobs, over flags that stay."""

    fixed: tuple[Flag, ...]
    knobs: tuple[Knob, ...]

    @classmethod
    def of(cls, words: Sequence[str]) -> Grid:
        """The grid that a command line means: a flag whose value has commas is tried with each of its parts.

        A part may be several values, as in ``--lora_target_modules all-linear,"q_proj v_proj"``. Values in braces or
        brackets are left whole, and so is a comma behind a backslash.

        Raises:
            GridError: something stands before the first flag, a flag comes twice, or a part is empty.
        """
        fixed: list[Flag] = []
        knobs: list[Knob] = []
        for flag in read_flags(words):
            if flag.name in {other.name for other in fixed} | {knob.name for knob in knobs}:
                raise GridError(f"--{flag.name} is given twice")
            value = " ".join(flag.values)
            parts = [value] if value[:1] in ("{", "[") else _COMMA.split(value)
            if len(parts) == 1:
                fixed.append(Flag(flag.name, tuple(word.replace("\\,", ",") for word in flag.values)))
                continue
            choices = tuple(dict.fromkeys(" ".join(part.split()).replace("\\,", ",") for part in parts))
            if "" in choices:
                raise GridError(f"--{flag.name} has an empty value among {value!r}")
            knobs.append(Knob(flag.name, choices))
        return cls(tuple(fixed), tuple(knobs))

    def points(self) -> Iterator[Point]:
        """Every configuration; the last knob changes first."""
        for choices in itertools.product(*(knob.choices for knob in self.knobs)):
            turned = [Flag(knob.name, tuple(choice.split())) for knob, choice in zip(self.knobs, choices, strict=True)]
            yield Point(choices, tuple(word for flag in (*self.fixed, *turned) for word in flag.words()))


def read_flags(words: Iterable[str]) -> list[Flag]:
    """The flags of a command line, their names in snake_case.

    Raises:
        GridError: something stands before the first flag.
    """
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            found.append((name.replace("-", "_"), [value] if equals else []))
        elif not found:
            raise GridError(f"{word!r} stands where a flag was expected, such as --model_name_or_path")
        else:
            found[-1][1].append(word)
    return [Flag(name, tuple(values)) for name, values in found]


def changed(words: Iterable[str], changes: Iterable[Flag]) -> tuple[str, ...]:
    """A command line with some flags set anew; those that it does not have come last.

    Raises:
        GridError: something stands before the first flag.
    """
    anew = {flag.name: flag for flag in changes}
    kept = [anew.pop(flag.name, flag) for flag in read_flags(words)]
    return tuple(word for flag in (*kept, *anew.values()) for word in flag.words())
