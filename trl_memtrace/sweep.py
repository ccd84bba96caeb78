"""sweep: a grid of configurations, each tried by itself, and what each knob costs. No torch."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

from .categories import CATEGORIES
from .grid import Grid, GridError, Knob, Point
from .records import dump_line
from .trials import Outcome, Trial, TrialPool

OUTCOMES, TABLE, PAGE = "sweep.jsonl", "sweep.csv", "sweep.html"
"""What a sweep leaves in its folder."""

_BATCH, _LENGTH = "per_device_train_batch_size", "max_length"
_UNITS = {_BATCH: "a sequence", _LENGTH: "a token of length", "lora_r": "a rank"}


@dataclass(frozen=True, slots=True)
class Row:
    """A configuration and what came of it."""

    point: Point
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Spread:
    """Bytes, over all settings of the other knobs."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value at least."""
        return cls(min(values), statistics.median(values), max(values))


@dataclass(frozen=True, slots=True)
class Cost:
    """What turning a knob costs: bytes at the peak of what is allocated.

    Attributes:
        knob: its name.
        what: what is counted: ``"a unit"`` of a number, from one value to the next, or a choice against the first.
        spread: bytes for each.
        categories: the median by category, for those that change.
    """

    knob: str
    what: str
    spread: Spread
    categories: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Sweep:
    """A grid and what came of it.

    Attributes:
        kind: the command of ``trl``.
        grid: the flags and the knobs.
        rows: every configuration, in the order of the grid.
        device: what was asked for; None for a card without limits.
        measured: whether the runs were real.
    """

    kind: str
    grid: Grid
    rows: tuple[Row, ...]
    device: str | int | None = None
    measured: bool = False

    def costs(self) -> list[Cost]:
        """What each knob costs, of those of which two values could be run."""
        return [cost for place, knob in enumerate(self.grid.knobs) for cost in self._costs_of(place, knob)]

    @property
    def assumed(self) -> list[str]:
        """What had to be assumed, once each."""
        return list(dict.fromkeys(sentence for row in self.rows for sentence in row.outcome.assumed))

    @property
    def errors(self) -> list[str]:
        """Why configurations could not be run, once each."""
        return list(dict.fromkeys(row.outcome.error for row in self.rows if row.outcome.error is not None))

    def _costs_of(self, place: int, knob: Knob) -> Iterator[Cost]:
        numbers = knob.numbers
        if numbers is None:
            for choice in knob.choices[1:]:
                yield from _cost(
                    knob.name, f"{choice}, not {knob.choices[0]}", self._turns(place, knob.choices[0], choice, 1.0)
                )
            return
        in_order = sorted(zip(numbers, knob.choices, strict=True))
        turns = [
            turn
            for (low, before), (high, after) in itertools.pairwise(in_order)
            for turn in self._turns(place, before, after, high - low)
        ]
        yield from _cost(knob.name, _UNITS.get(knob.name, "a unit"), turns)
        tokens = [_tokens(knob.name, turn.before.outcome) for turn in turns]
        if all(tokens):
            each = zip(turns, tokens, strict=True)
            yield from _cost(
                knob.name, "a token", [replace(turn, units=turn.units * (size or 1)) for turn, size in each]
            )

    def _turns(self, place: int, before: str, after: str, units: float) -> list[_Turn]:
        """Configurations that differ in one knob, by so many units, where both could be run."""
        ran = {row.point.choices: row for row in self.rows if row.outcome.allocated_bytes is not None}
        turns = []
        for choices, row in ran.items():
            other = ran.get((*choices[:place], after, *choices[place + 1 :]))
            if choices[place] == before and other is not None:
                turns.append(_Turn(row, other, units))
        return turns


@dataclass(frozen=True, slots=True)
class _Turn:
    """A knob turned, and nothing else: by how many units."""

    before: Row
    after: Row
    units: float

    def each(self, size_of: Callable[[Outcome], int | None]) -> float:
        """Bytes a unit."""
        return ((size_of(self.after.outcome) or 0) - (size_of(self.before.outcome) or 0)) / self.units


def _cost(knob: str, what: str, turns: Sequence[_Turn]) -> Iterator[Cost]:
    if not turns:
        return
    by_category = {
        name.value: statistics.median(
            turn.each(lambda outcome, name=name.value: outcome.categories.get(name))  # type: ignore[misc]
            for turn in turns
        )
        for name in CATEGORIES
    }
    yield Cost(
        knob,
        what,
        Spread.of([turn.each(lambda outcome: outcome.allocated_bytes) for turn in turns]),
        {name: size for name, size in by_category.items() if size},
    )


def _tokens(knob: str, outcome: Outcome) -> int | None:
    """How many tokens a unit of a knob is; None where it is not made of them, or that is not known."""
    batch, length = outcome.settings.get(_BATCH), outcome.settings.get(_LENGTH)
    if knob == _BATCH:
        return outcome.longest
    return batch if knob == _LENGTH and outcome.longest == length else None


# --- on disk ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Kept:
    """The outcomes of a sweep in its folder, a line each, so that one that was ended goes on where it was.

    Args:
        path: the file.
        versions: those of the packages that decide; what another version found is found anew.
    """

    path: Path
    versions: Mapping[str, str]
    _known: dict[str, Outcome] = field(init=False, default_factory=dict)
    _was_cut: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        self._was_cut = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                data = json.loads(line)
                outcome = Outcome.from_json(data["outcome"])
                key = str(data["key"])
            except (ValueError, TypeError, KeyError):  # a line that was cut short, or is none of ours
                continue
            if outcome.error is None:
                self._known[key] = outcome

    def find(self, trial: Trial) -> Outcome | None:
        """What came of a trial, where it was made before. One that failed is made again."""
        return self._known.get(self._key(trial))

    def keep(self, trial: Trial, outcome: Outcome) -> None:
        """Write what came of a trial.

        Raises:
            OSError: it cannot be written.
        """
        line = {"record": "trial", "key": self._key(trial), "trial": trial.to_json(), "outcome": outcome.to_json()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._was_cut + dump_line(line))
        self._was_cut = False

    def _key(self, trial: Trial) -> str:
        said = [trial.to_json(), dict(self.versions), [_content(word) for word in trial.flags]]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:24]


def _content(word: str) -> str | None:
    """What a file, or a model's config, that a flag names holds now: another content is another trial."""
    path = Path(word)
    try:
        if path.is_dir():
            path = path / "config.json"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    except OSError:
        return None


def write_table(sweep: Sweep, path: str | os.PathLike[str]) -> Path:
    """Write every configuration as a line of CSV, sizes in bytes.

    Raises:
        OSError: it cannot be written.
    """
    knobs = [knob.name for knob in sweep.grid.knobs]
    sizes = ("allocated_peak_bytes", "reserved_peak_bytes", "process_peak_bytes")
    categories = [f"{name.value}_bytes" for name in CATEGORIES]
    target = Path(path)
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*knobs, *sizes, "fits", "peak_phase", *categories, "error"])
        for row in sweep.rows:
            outcome = row.outcome
            writer.writerow(
                [
                    *row.point.choices,
                    outcome.allocated_bytes,
                    outcome.reserved_bytes,
                    outcome.process_bytes,
                    outcome.fits,
                    outcome.phase,
                    *(outcome.categories.get(name.value) for name in CATEGORIES),
                    outcome.error,
                ]
            )
    return target


# --- the run ---------------------------------------------------------------------------------------------------------


def run_sweep(
    kind: str,
    flags: Sequence[str],
    *,
    device: str | int | None = None,
    steps: int = 2,
    lengths: Sequence[int] | None = None,
    measured: bool = False,
    ranks: int = 1,
    workers: int | None = None,
    kept: Kept | None = None,
    on_row: Callable[[Row, int, int], None] | None = None,
) -> Sweep:
    """Try every configuration of a grid.

    Args:
        kind: the command of ``trl``, one of ``estimating.TRAINERS``.
        flags: its flags, some of them with several values; see ``Grid.of``.
        device: a name from the table of devices, a number of bytes, or None for a card without limits.
        steps: how many optimizer steps to take.
        lengths: tokens of each example, as for ``estimate``.
        measured: run them for real on the device that is here, one after the other, each in a process of its own.
        ranks: how many processes train together; what is tried is the first of them.
        workers: how many processes work beside each other; one for each core when not given.
        kept: where outcomes are kept and looked up.
        on_row: is told each row, how many are done and how many there are.

    Raises:
        GridError: the flags make no grid.
        OSError: an outcome cannot be kept.
    """
    grid = Grid.of(flags)
    if not grid.knobs:
        raise GridError("nothing to sweep: give a flag several values, such as --lora_r 8,16,64")
    points = list(grid.points())
    trials = [
        Trial(kind, point.flags, device, steps, None if lengths is None else tuple(lengths), measured, ranks)
        for point in points
    ]
    rows: dict[int, Row] = {}

    def done(place: int, outcome: Outcome) -> None:
        rows[place] = Row(points[place], outcome)
        if on_row is not None:
            on_row(rows[place], len(rows), len(points))

    for place, trial in enumerate(trials):
        found = kept.find(trial) if kept is not None else None
        if found is not None:
            done(place, found)
    left = [place for place in range(len(points)) if place not in rows]
    count = 1 if measured else max(min(workers or os.cpu_count() or 1, len(left)), 1)
    with TrialPool(count) as pool:
        futures = {pool.submit(trials[place]): place for place in left}
        for future in as_completed(futures):
            place = futures[future]
            outcome = future.result()
            if kept is not None:
                kept.keep(trials[place], outcome)
            done(place, outcome)
    return Sweep(kind, grid, tuple(rows[place] for place in range(len(points))), device, measured)
