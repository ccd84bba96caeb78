"""fit: the largest batch, sequence or rank that a card holds, and what every memory saver gives, each by a dry run of
its own. No torch."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from .errors import MemtraceError
from .grid import Flag, changed
from .trials import Outcome, Trial, TrialPool

_BATCH, _ACCUMULATION, _LENGTH, _RANK = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "lora_r",
)
_GRANULES = {_BATCH: 1, _LENGTH: 64, _RANK: 8}
"""The knobs that can be sized, and in steps of what: tensor cores like lengths and ranks that are multiples."""

_MOST = {_BATCH: 1024, _LENGTH: 1 << 20, _RANK: 1024}
_LINES = 3

Told = Callable[[str], None]


class FitError(MemtraceError):
    """The flags as they are cannot be run, so that nothing can be said of them."""


@dataclass(frozen=True, slots=True)
class Saver:
    """A change of flags that is said to save memory.

    Attributes:
        name: what it is, in words.
        flags: what is set.
    """

    name: str
    flags: tuple[Flag, ...]

    @property
    def text(self) -> str:
        """As it is typed."""
        return " ".join(word for flag in self.flags for word in flag.words())


@dataclass(frozen=True, slots=True)
class Saving:
    """A saver and what it gives.

    Attributes:
        saver: the change.
        outcome: what the command takes with it.
        saves_bytes: how much less the card would show; None where it could not be run.
    """

    saver: Saver
    outcome: Outcome
    saves_bytes: int | None


@dataclass(frozen=True, slots=True)
class Largest:
    """How far a knob can be turned.

    Attributes:
        knob: its name.
        now: what it is set to.
        value: the largest that fits; None where none does.
        outcome: what the command takes with it.
        next_value: the next larger, with which it does not fit; None where the knob ends before the memory does.
        next_outcome: what it takes with that.
    """

    knob: str
    now: int
    value: int | None
    outcome: Outcome | None
    next_value: int | None
    next_outcome: Outcome | None


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a command fits, how far it could go, and what would help.

    Attributes:
        kind: the command of ``trl``.
        flags: its flags.
        device: the card.
        outcome: what the command takes as it is.
        largest: how far each knob can be turned.
        savings: what each saver gives, the most first.
        together: the fewest of the savers, the best first, with which it fits; empty where it does already, or none
            helps.
        together_outcome: what the command takes with these.
    """

    kind: str
    flags: tuple[str, ...]
    device: str | int
    outcome: Outcome
    largest: tuple[Largest, ...] = ()
    savings: tuple[Saving, ...] = ()
    together: tuple[Saver, ...] = ()
    together_outcome: Outcome | None = None

    def command(self, savers: Iterable[Saver]) -> str:
        """The whole command with some savers, ready to paste."""
        words = changed(self.flags, (flag for saver in savers for flag in saver.flags))
        return shlex.join(["trl", self.kind, *words])


@dataclass(slots=True)
class _Fitter:
    pool: TrialPool
    kind: str
    flags: tuple[str, ...]
    device: str | int
    steps: int
    lengths: tuple[int, ...] | None
    ranks: int
    tell: Told
    _made: dict[tuple[str, ...], Future[Outcome]] = field(default_factory=dict)

    def submit(self, changes: Iterable[Flag] = ()) -> Future[Outcome]:
        """Have the command tried with some flags set anew; once, however often that is asked."""
        flags = changed(self.flags, changes)
        if flags not in self._made:
            self._made[flags] = self.pool.submit(
                Trial(self.kind, flags, self.device, self.steps, self.lengths, ranks=self.ranks)
            )
        return self._made[flags]

    def tried(self, changes: Sequence[Flag] = ()) -> Outcome:
        """The outcome of it."""
        self.tell(" ".join(word for flag in changes for word in flag.words()) or "as it is")
        return self.submit(changes).result()


def fit(
    kind: str,
    flags: Sequence[str],
    device: str | int,
    *,
    knobs: Sequence[str] | None = None,
    savers: bool = True,
    steps: int = 2,
    lengths: Sequence[int] | None = None,
    ranks: int = 1,
    workers: int = 2,
    tell: Told = lambda what: None,
) -> Fit:
    """Find out what fits a card.

    Args:
        kind: the command of ``trl``, one of ``estimating.TRAINERS``.
        flags: its flags.
        device: a name from the table of devices, or a number of bytes.
        knobs: which of ``per_device_train_batch_size``, ``max_length`` and ``lora_r`` to size; when not given, those
            that matter to the command.
        savers: whether to try what saves memory.
        steps: how many optimizer steps to take.
        lengths: tokens of each example, as for ``estimate``.
        ranks: how many processes train together, each on such a card.
        workers: how many processes work beside each other.
        tell: is told what is being tried.

    Raises:
        FitError: the command cannot be run as it is, or has no such knob.
        GridError: the flags are none.
        ValueError: no such knob.
    """
    for knob in knobs or ():
        if knob not in _GRANULES:
            raise ValueError(f"a knob to size is one of {', '.join(_GRANULES)}, not {knob!r}")
    tokens = None if lengths is None else tuple(lengths)
    with ThreadPoolExecutor(len(_GRANULES)) as threads, TrialPool(workers) as pool:  # left first, so that threads end
        fitter = _Fitter(pool, kind, tuple(flags), device, steps, tokens, ranks, tell)
        now = fitter.tried()
        if now.error is not None:
            raise FitError(now.error)
        found = Fit(kind, tuple(flags), device, now)
        missing = [knob for knob in knobs or () if not isinstance(now.settings.get(knob), int)]
        if missing:
            raise FitError(f"there is no {missing[0]} to size in this command")
        if savers:
            found = _with_savings(found, fitter)
        sized = list(knobs) if knobs is not None else _knobs_of(found)
        return replace(found, largest=tuple(threads.map(lambda knob: _largest(fitter, knob, found), sized)))


# --- how far a knob can be turned ------------------------------------------------------------------------------------


def _knobs_of(found: Fit) -> list[str]:
    outcome = found.outcome
    knobs = [_BATCH]
    if outcome.longest is not None and outcome.longest == outcome.settings.get(_LENGTH):  # it is what ends sequences
        knobs.append(_LENGTH)
    if outcome.settings.get(_RANK):
        knobs.append(_RANK)
    return knobs


def _largest(fitter: _Fitter, knob: str, found: Fit) -> Largest:
    """The largest value that fits while the next does not: both are tried. Memory is nearly a straight line in each of
    these knobs, so that the line through two trials says where to try the third."""
    step, most = _step(knob, found), _MOST[knob]
    if knob == _LENGTH and found.outcome.positions is not None:
        most = found.outcome.positions
    now = int(found.outcome.settings[knob])

    known: dict[int, Outcome] = {now: found.outcome}
    for value in _guesses(known, step, most):
        if value not in known:
            known[value] = fitter.tried([Flag(knob, (str(value),))])
    best = max((value for value, outcome in known.items() if outcome.fits), default=None)
    beyond = min((value for value in known if best is not None and value > best), default=None)
    return Largest(
        knob,
        now,
        best,
        None if best is None else known[best],
        beyond,
        None if beyond is None else known[beyond],
    )


def _step(knob: str, found: Fit) -> int:
    """GRPO and RLOO take whole groups of completions into an optimizer step, and no other batch can be run."""
    settings = found.outcome.settings
    group, accumulation = settings.get("num_generations"), settings.get(_ACCUMULATION)
    if knob == _BATCH and group:
        return int(group) // math.gcd(int(group), int(accumulation or 1))
    return _GRANULES[knob]


def _guesses(known: Mapping[int, Outcome], step: int, most: int) -> Iterator[int]:
    """What to try next, until a value fits and the next larger does not, or there is nothing more to try. Where the
    line has led nowhere a few times, every other guess halves what is left."""
    for made in itertools.count():
        low = max((value for value, outcome in known.items() if outcome.fits), default=0)
        high = min((value for value in known if value > low), default=most + step)
        low_step, high_step = low // step, -(-high // step)
        if high_step - low_step <= 1:
            return
        halves = made >= _LINES and made % 2
        guess = (low_step + high_step) // 2 if halves else _on_the_line(known, low, high, step)
        yield min(max(guess, low_step + 1), high_step - 1) * step


def _on_the_line(known: Mapping[int, Outcome], low: int, high: int, step: int) -> int:
    """In steps: where the line through two trials meets the card's memory; doubled, or halved, where there is but
    one."""
    sizes = {value: outcome.process_bytes for value, outcome in known.items() if outcome.process_bytes is not None}
    near = sorted(sizes, key=lambda value: min(abs(value - low), abs(value - high)))[:2]
    if len(near) < 2 or sizes[near[0]] == sizes[near[1]]:
        return 2 * low // step if low else high // (2 * step)
    first, second = near
    slope = (sizes[second] - sizes[first]) / (second - first)
    capacity = next(outcome.summary["device"]["total_bytes"] for outcome in known.values() if outcome.summary)
    return int((first + (capacity - sizes[first]) / slope) // step) if slope > 0 else 2 * low // step


# --- what saves memory -----------------------------------------------------------------------------------------------


def _savers(found: Fit, ranks: int) -> Iterator[Saver]:
    """What is not in use yet."""
    settings, roles = found.outcome.settings, found.outcome.roles
    peft = bool(settings.get(_RANK))
    if not settings.get("gradient_checkpointing"):
        yield Saver("gradient checkpointing", (Flag("gradient_checkpointing", ("true",)),))
    if "8bit" not in str(settings.get("optim")):
        yield Saver("8-bit optimizer", (Flag("optim", ("adamw_bnb_8bit",)),))
    if not str(settings.get("optim")).startswith("paged"):
        yield Saver("8-bit optimizer, paged to the host", (Flag("optim", ("paged_adamw_8bit",)),))
    if not peft:
        lora = (Flag("use_peft", ("true",)), Flag("lora_target_modules", ("all-linear",)))
        yield Saver("LoRA", lora)
        yield Saver("LoRA on a 4-bit base", (*lora, Flag("load_in_4bit", ("true",))))
    elif not any("quant_state" in role for role in roles):
        yield Saver("4-bit base", (Flag("load_in_4bit", ("true",)),))
    if not settings.get("activation_offloading") and "activation_offloading" in settings:
        yield Saver("activations wait on the host", (Flag("activation_offloading", ("true",)),))
    batch, accumulation = settings.get(_BATCH), settings.get(_ACCUMULATION)
    if isinstance(batch, int) and isinstance(accumulation, int) and batch > 1:
        half = next(count for count in range(2, batch + 1) if batch % count == 0)
        for parts in dict.fromkeys((half, batch)):
            flags = (Flag(_BATCH, (str(batch // parts),)), Flag(_ACCUMULATION, (str(accumulation * parts),)))
            yield Saver("smaller batches, as many examples a step", flags)
    if ranks > 1 and not (settings.get("fsdp") or settings.get("deepspeed")):
        yield Saver("FSDP2, a shard on each rank", (Flag("fsdp"),))
    if not settings.get("use_liger_kernel"):
        yield Saver("Liger's kernels", (Flag("use_liger_kernel", ("true",)),))


def _with_savings(found: Fit, fitter: _Fitter) -> Fit:
    savers = list(_savers(found, fitter.ranks))
    for saver in savers:
        fitter.submit(saver.flags)
    savings = []
    for saver in savers:
        outcome = fitter.tried(saver.flags)
        size, before = outcome.process_bytes, found.outcome.process_bytes
        savings.append(Saving(saver, outcome, before - size if size is not None and before is not None else None))
    savings.sort(key=lambda saving: (saving.saves_bytes is None, -(saving.saves_bytes or 0)))
    found = replace(found, savings=tuple(savings))
    if found.outcome.fits:
        return found
    together: list[Saver] = []
    for saving in savings:
        touched = {flag.name for saver in together for flag in saver.flags}
        if (saving.saves_bytes or 0) <= 0 or touched & {flag.name for flag in saving.saver.flags}:
            continue  # another of its kind is in it already
        together.append(saving.saver)
        outcome = fitter.tried([flag for saver in together for flag in saver.flags])
        if outcome.fits:
            return replace(found, together=tuple(together), together_outcome=outcome)
    return found
