"""Memory that rises from step to step: planted leaks are found and named, clean runs are silent."""

from __future__ import annotations

import functools
import gc
import json
import random
import warnings
from collections.abc import Callable
from itertools import pairwise

import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from trl_memtrace import MemoryTracer, MemTrace, MemtraceWarning, RunTrace, TracePolicy
from trl_memtrace import tracer as tracer_module
from trl_memtrace.growth import FOLLOWED_STEPS, GrowthWatch
from trl_memtrace.records import Growth

GIB = 1024**3


@pytest.fixture(autouse=True)
def one_thread():
    """So small a model is slower on many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Small(nn.Module):
    """Large enough to have books, small enough for a thousand steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mlp(self.embed(ids)))


class Loop:
    """A loop that leaks as asked."""

    def __init__(self, leak: Callable[[Loop, int, torch.Tensor | None], None] = lambda *arguments: None) -> None:
        self.model = Small()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.leak = leak
        self.kept: list = []
        self.random = random.Random(1)

    def run(self, steps: int, policy: TracePolicy | None = None) -> MemoryTracer:
        tracer = MemoryTracer(self.model, self.optimizer, policy=policy or TracePolicy(), on_record=self.hear)
        self.heard = []
        for number in range(1, steps + 1):
            tracer.begin_step(optimizer=self.optimizer)
            ids = torch.randint(0, 50, (4, self.random.randint(8, 64)))
            logits = self.model(ids)
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
            self.leak(self, number, losses)
            losses.mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            del logits, losses
            tracer.end_step()
            self.leak(self, number, None)
        tracer.close()
        return tracer

    def hear(self, record) -> None:
        self.heard.append(record)


def inside(leak: Callable[[Loop, int, torch.Tensor], None]) -> Callable[[Loop, int, torch.Tensor | None], None]:
    """A leak inside the step, before its backward."""

    @functools.wraps(leak)
    def leaks(loop: Loop, number: int, losses: torch.Tensor | None) -> None:
        if losses is not None:
            leak(loop, number, losses)

    return leaks


@inside
def keeps_graph(loop: Loop, number: int, losses: torch.Tensor) -> None:
    loop.kept.append(loop.model(torch.randint(0, 50, (4, 16))).mean())


@inside
def keeps_losses(loop: Loop, number: int, losses: torch.Tensor) -> None:
    loop.kept.append(losses.detach())


@inside
def grows_cache(loop: Loop, number: int, losses: torch.Tensor) -> None:
    cache = torch.cat([*loop.kept, torch.zeros(500)])
    loop.kept = [cache]


def swaps_optimizer(loop: Loop, number: int, losses: torch.Tensor | None) -> None:
    if losses is None:
        loop.kept.append(loop.optimizer)
        loop.optimizer = torch.optim.AdamW(loop.model.parameters())


@inside
def replaces_buffer(loop: Loop, number: int, losses: torch.Tensor) -> None:
    loop.kept = [losses.detach().clone()]


@inside
def flushes_sometimes(loop: Loop, number: int, losses: torch.Tensor) -> None:
    loop.kept = [] if number % 5 == 0 else [*loop.kept, losses.detach()]


@pytest.mark.parametrize(
    ("leak", "category", "module", "expected"),
    [
        (keeps_graph, "activations", ("embed", "mlp", "head"), (4 * 16 * (32 + 64 + 64) * 4, 5)),
        (keeps_losses, "activations", ("",), (4 * 36 * 4, 2)),
        (grows_cache, "activations", ("",), (2000, 1.2)),
        (swaps_optimizer, "optimizer_states", ("embed", "mlp", "head"), (2 * 4 * 7474, 1.2)),
    ],
)
def test_a_planted_leak_is_found_and_named_once(leak, category, module, expected):
    with pytest.warns(MemtraceWarning, match="memory rises by") as caught:
        tracer = Loop(leak).run(40)
    assert sum("memory rises" in str(warning.message) for warning in caught) == 1
    growth = tracer.summary.growth
    assert growth.category == category
    assert growth.module.startswith(module)
    assert growth.since_step == 2  # the first, in which what lasts is made, says nothing
    size, factor = expected
    assert size / factor <= growth.bytes_per_step <= size * factor
    assert str(growth) in str(caught[0].message)


def test_a_leak_that_begins_late_is_found_by_the_next_traced_step():
    def late(loop: Loop, number: int, losses: torch.Tensor | None) -> None:
        if number >= 30:
            keeps_losses(loop, number, losses)

    with pytest.warns(MemtraceWarning, match="memory rises by"):
        tracer = Loop(late).run(60, TracePolicy(3, 20, False))
    assert tracer.summary.growth.since_step == 21  # after the last step that was seen to be clean


@pytest.mark.parametrize("leak", [None, replaces_buffer, flushes_sometimes], ids=["clean", "replaced", "flushed"])
def test_a_thousand_steps_of_varying_length_are_silent(leak):
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemtraceWarning)
        loop = Loop(*filter(None, [leak]))
        tracer = loop.run(1000)
    assert tracer.summary.growth is None
    assert tracer.summary.to_json()["growth"] is None
    steps = {record.step: record for record in loop.heard}
    assert len(steps) == 1000
    assert sum(record.traced for record in steps.values()) <= 3 + 10 + 12  # and new highs of random lengths


def test_steps_that_were_followed_together_have_records_of_their_own():
    with pytest.warns(MemtraceWarning):
        loop = Loop(keeps_graph)
        tracer = loop.run(20, TracePolicy(0, 1))
    seen = [(record.step, record.traced) for record in loop.heard]
    together = range(3, 3 + FOLLOWED_STEPS)  # step 2 was the first that left something behind
    counted, traced = [(number, False) for number in together], [(number, True) for number in together]
    assert seen == [(1, True), (2, True), *counted, *traced, *((number, True) for number in range(11, 21))]
    for record in loop.heard:
        if record.traced:
            assert sum(record.peak.categories.values()) == record.peak.bytes == record.peak.allocator_bytes
            assert max(phase.peak_bytes for phase in record.phases.values()) == record.peak.bytes
            assert {"forward", "loss", "backward", "optimizer", "idle"} <= set(record.phases)
            assert record.peak.step is None
    assert tracer.summary.steps == 20
    assert tracer.summary.traced_steps == 20
    kept = [record.phases["idle"].end_bytes for record in loop.heard if record.traced and record.step in together]
    rises = [after - before for before, after in pairwise(kept)]
    assert min(rises) > 0


def test_books_that_fail_as_a_run_ends_while_steps_are_followed_do_not_fail_the_run(monkeypatch):
    loop = Loop(keeps_graph)
    tracer = MemoryTracer(loop.model, loop.optimizer, on_record=lambda record: None)
    for _ in range(4):
        with tracer.step():
            losses = loop.model(torch.randint(0, 50, (4, 16)))
            loop.leak(loop, 0, losses)
            losses.mean().backward()
    monkeypatch.setattr(tracer_module, "keep_books", lambda *args, **kwargs: 1 / 0)
    with pytest.warns(MemtraceWarning, match="switched itself off, training goes on: ZeroDivisionError"):
        tracer.close()
    assert not any(module._forward_hooks for module in loop.model.modules())
    assert not torch.autograd._profiler_enabled()


def test_every_step_wanted_is_every_step_traced_and_a_run_may_end_while_steps_are_followed():
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemtraceWarning)
        loop = Loop(keeps_graph)
        tracer = loop.run(7, TracePolicy(0, 1))
    assert tracer.summary.traced_steps == tracer.summary.steps == 7
    assert {record.step for record in loop.heard if record.traced} == set(range(1, 8))


def recording() -> bool:
    return torch.autograd._profiler_enabled()


def test_an_evaluation_between_steps_that_are_followed_ends_the_recording():
    loop, seen = Loop(keeps_graph), []

    def evaluates(loop: Loop, number: int, losses: torch.Tensor | None) -> None:
        keeps_graph(loop, number, losses)
        if losses is None and number == 5:
            for _ in range(10):
                seen.append(recording())
                loop.model(torch.zeros(1, 4, dtype=torch.long))

    loop.leak = evaluates
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemtraceWarning)
        tracer = loop.run(12, TracePolicy(3, None, False))
    assert seen == [True] * 5 + [False] * 5
    assert not any(module._forward_hooks for module in loop.model.modules())
    assert tracer.summary.steps == 12


def test_a_tracer_that_is_dropped_while_steps_are_followed_leaves_nothing():
    model = Small()
    kept = []

    def train() -> None:
        tracer = MemoryTracer(model, policy=TracePolicy(3, None, False))
        for _ in range(4):
            with tracer.step():
                kept.append(model(torch.zeros(4, 16, dtype=torch.long)))
        assert recording()

    train()
    gc.collect()
    assert not recording()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_real_trainer_that_leaks_is_warned_about_and_its_record_says_so(tmp_path, capsys):
    trainer = tiny.trainer(tmp_path, max_steps=14)
    kept = []
    original = trainer.compute_loss

    def compute_loss(*arguments, **options):
        loss, outputs = original(*arguments, **{**options, "return_outputs": True})
        kept.append(outputs)
        return loss

    trainer.compute_loss = compute_loss
    trainer.add_callback(MemTrace(new_highs=False, print_table=True))
    with pytest.warns(MemtraceWarning, match="memory rises by"):
        trainer.train()
    run = RunTrace.load(tmp_path)
    assert run.growth is not None
    assert run.growth.since_step == 2
    assert run.summary.growth == run.growth
    last = json.loads((tmp_path / "memtrace" / "rank-00000.jsonl").read_text().splitlines()[-1])
    assert Growth.from_json(last["growth"]) == run.growth
    assert "Growth: memory rises by" in capsys.readouterr().out
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_a_real_trainer_that_does_not_is_silent(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=14)
    trainer.add_callback(MemTrace(first_steps=14))
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemtraceWarning)
        trainer.train()
    assert RunTrace.load(tmp_path).growth is None


def levels(watch: GrowthWatch, values: list[int]) -> int | None:
    """The number of values after which something was found, in a run whose steps are traced when asked for."""
    for step, value in enumerate(values, 1):
        watch.step(step, value)
        if watch.wants_tracing:
            watch.traced(step, value, {("layer", "activations"): 1000}, has_levels=True)
        if watch.found is not None:
            return step
    return None


@given(
    st.integers(10 * 2**20, 40 * GIB),
    st.floats(0.0001, 0.01),
    st.integers(0, 400),
    st.floats(0, 3),
    st.integers(0, 2**32).map(random.Random),
)
@settings(deadline=None, max_examples=60)
def test_a_rise_of_counted_levels_is_found_whatever_the_noise(base, rate, since, noise, chance):
    per_step = round(base * rate)
    quiet = [base + round(noise * per_step * chance.random()) for _ in range(since)]
    rising = [base + step * per_step + round(noise * per_step * chance.random()) for step in range(1, 601)]
    watch = GrowthWatch()
    found = levels(watch, quiet + rising)
    assert found is not None
    assert found > since
    assert watch.found.category == "activations"
    assert watch.found.module == "layer"
    assert per_step / 3 < watch.found.bytes_per_step < per_step * 2
    assert watch.found.since_step <= found


@given(
    st.integers(10 * 2**20, 40 * GIB),
    st.floats(0, 1),
    st.floats(0, 0.5),
    st.integers(0, 300),
    st.sampled_from(["uniform", "rarely", "saw", "two"]),
    st.integers(0, 2**32).map(random.Random),
)
@settings(deadline=None, max_examples=100)
def test_levels_that_vary_or_jump_and_do_not_rise_are_silent(base, noise, jump, at, kind, chance):
    def level(step: int) -> int:
        shape = {
            "uniform": chance.random(),
            "rarely": float(chance.random() < 0.05),
            "saw": step % 10 / 10,  # flushed every tenth step
            "two": float(step % 2),
        }[kind]
        return base + round(noise * base * shape) + (round(jump * base) if step > at else 0)

    watch = GrowthWatch()
    assert levels(watch, [level(step) for step in range(1000)]) is None
    assert not watch.wants_tracing


def test_a_rise_too_small_to_matter_is_silent():
    assert levels(GrowthWatch(), [GIB + 512 * step for step in range(1000)]) is None
    assert levels(GrowthWatch(), [GIB + 50_000 * step for step in range(1000)]) is not None


def test_a_rise_within_the_noise_is_waited_for():
    unit = GIB // 1000
    values = [GIB + (step // 4) * unit + (9 * unit if step % 4 else 0) for step in range(2000)]
    assert levels(GrowthWatch(), values[:40]) is None  # every low is higher than the last, by less than levels differ
    assert levels(GrowthWatch(), values) is not None


def test_the_watch_holds_no_more_after_many_steps():
    watch = GrowthWatch()
    for step in range(1, 20_000):
        watch.step(step, GIB + random.Random(step).randrange(10_000_000))
    held = watch._levels
    assert len(held._latest) <= 8
    assert len(held._whole) <= 16


def table(size: int, module: str = "layer", category: str = "activations") -> dict[tuple[str, str], int]:
    return {(module, category): size} if size else {}


STEPS = list(range(11, 11 + FOLLOWED_STEPS))


def suspected() -> GrowthWatch:
    watch = GrowthWatch()
    watch.traced(1, GIB, table(GIB // 2), has_levels=False)
    assert not watch.wants_following
    watch.traced(2, GIB, {}, has_levels=False)
    watch.traced(9, GIB, {}, has_levels=False)
    assert not watch.wants_following
    watch.traced(10, GIB, table(2**20), has_levels=False)
    assert watch.wants_following
    return watch


@given(st.lists(st.integers(2**17, 2**24), min_size=FOLLOWED_STEPS, max_size=FOLLOWED_STEPS))
def test_what_every_followed_step_left_behind_is_growth(left):
    watch = suspected()
    levels_at_ends = [GIB + sum(left[: number + 1]) for number in range(FOLLOWED_STEPS)]
    watch.followed(STEPS, [table(size) for size in left], levels_at_ends)
    mean = sum(left[:-1]) / (FOLLOWED_STEPS - 1)
    assert watch.found == Growth("activations", "layer", 10, round(mean))
    assert not watch.wants_following


@given(
    st.lists(st.integers(0, 2**24), min_size=FOLLOWED_STEPS, max_size=FOLLOWED_STEPS),
    st.integers(0, FOLLOWED_STEPS - 2),
)
@example([0] + [10738] * (FOLLOWED_STEPS - 1), 0)  # the first step, before which there is no level
def test_one_step_that_left_nothing_clears_the_rest(left, nothing):
    left[nothing] = 0
    watch = suspected()
    levels_at_ends = [GIB + sum(left[: number + 1]) for number in range(FOLLOWED_STEPS)]
    watch.followed(STEPS, [table(size) for size in left], levels_at_ends)
    assert watch.found is None
    assert not watch.wants_following
    least = max(*left, 2**20)
    watch.traced(40, GIB, table(least // 2), has_levels=False)
    assert not watch.wants_following
    watch.traced(41, GIB, table(2 * least), has_levels=False)
    assert watch.wants_following  # so much more was not cleared
    watch.wants_following = False
    watch.traced(100, GIB, table(2**20), has_levels=False)
    assert watch.wants_following  # that was long ago
    watch.followed([step + 100 for step in STEPS], [table(2**20)] * FOLLOWED_STEPS, [GIB] * FOLLOWED_STEPS)
    assert watch.found.since_step == STEPS[-1] + 1


def test_a_buffer_that_is_replaced_by_a_larger_one_each_time_is_growth_and_by_one_of_any_size_is_not():
    for sizes, grows in ((range(10, 10 + FOLLOWED_STEPS), True), ([5, 9, 3, 8, 1, 7, 2, 6], False)):
        watch = suspected()
        survivors = [{}] * (FOLLOWED_STEPS - 1) + [table(sizes[-1] * 2**20, "cache", "unattributed")]
        watch.followed(STEPS, survivors, [GIB + size * 2**20 for size in sizes])
        assert (watch.found is not None) == grows
        if grows:
            assert watch.found == Growth("unattributed", "cache", 10, 2**20)


def test_too_few_steps_say_nothing():
    watch = suspected()
    watch.followed(STEPS[:-1], [table(2**22)] * (FOLLOWED_STEPS - 1), list(range(GIB, GIB + 7 * 2**22, 2**22)))
    assert watch.found is None


def test_what_rises_has_a_name_in_any_case():
    watch = GrowthWatch()
    for step in range(1, 200):
        watch.step(step, GIB + step * 2**20)
        if watch.wants_tracing:
            watch.traced(step, GIB, {}, has_levels=True)
            break
    assert watch.found.category == "unattributed"
    assert watch.found.module == ""
    assert watch.found.bytes_per_step == pytest.approx(2**20, rel=0.01)
