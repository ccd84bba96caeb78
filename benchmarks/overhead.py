"""What watching costs: step times with MemTrace against none, torch.profiler with memory, and PyTorch's MemTracker.

All contenders take turns in one process, a step each in an order drawn anew each round, so that a machine that speeds
up or slows down meets them alike. They train one model: where a model lies in memory, and who frees memory before a
step, are worth a percent of it.
Printed are the medians of the steps and their ratios to the plain ones; the median and the quartiles of the ratios of
steps of the same round, which say most on a machine that is not quiet; and the ratio of the means, which for MemTrace
by default is over all its steps, traced and counted. MemoryTracer is measured, which hands over each record as its
step ends; what the trackers of a trainer do with it is not in these times.

    python benchmarks/overhead.py                 # a 5 ms step and a 250 ms step
    python benchmarks/overhead.py --seconds 60 --json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trl_memtrace import MemoryTracer, TracePolicy

SHAPES: dict[str, dict[str, int]] = {
    "5 ms": {"layers": 1, "hidden": 32, "rows": 1, "length": 16},
    "250 ms": {"layers": 4, "hidden": 256, "rows": 8, "length": 128},
}
SLOW = ("torch.profiler, profile_memory", "MemTracker")
SLOW_EVERY = 10
WARM_UP = 4  # MemTrace traces the first three steps by default: what is measured is what comes after


class Training:
    """A plain loop over one small Llama."""

    def __init__(self, layers: int, hidden: int, rows: int, length: int) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=hidden * 3,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=1024,
        )
        self.model = LlamaForCausalLM(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.ids = torch.randint(0, 1024, (rows, length))

    def step(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def plain(training: Training) -> Callable[[], None]:
    return training.step


def memtrace(policy: TracePolicy) -> Callable[[Training], Callable[[], None]]:
    def make(training: Training) -> Callable[[], None]:
        tracer = MemoryTracer(training.model, training.optimizer, policy=policy)

        def step() -> None:
            with tracer.step():
                training.step()

        return step

    return make


def torch_profiler(training: Training) -> Callable[[], None]:
    def step() -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True):
            training.step()

    return step


def mem_tracker(training: Training) -> Callable[[], None]:
    from torch.distributed._tools.mem_tracker import MemTracker

    def step() -> None:
        tracker = MemTracker()
        tracker.track_external(training.model, training.optimizer)
        with tracker:
            training.step()

    return step


CONTENDERS: dict[str, Callable[[Training], Callable[[], None]]] = {
    "plain": plain,
    "MemTrace, by default": memtrace(TracePolicy()),
    "MemTrace, every step traced": memtrace(TracePolicy(first_steps=0, every_n_steps=1)),
    "torch.profiler, profile_memory": torch_profiler,
    "MemTracker": mem_tracker,
}


def measure(shape: dict[str, int], steps: int) -> dict[str, dict[str, float]]:
    """For each contender the milliseconds of the median step, and the ratios to the plain one: of medians, of means,
    and of the steps of one round (their median and quartiles)."""
    training = Training(**shape)
    runs = {name: make(training) for name, make in CONTENDERS.items()}
    for step in runs.values():
        for _ in range(WARM_UP):
            step()
    times: dict[str, dict[int, float]] = {name: {} for name in runs}  # by round
    names = list(runs)
    draw = random.Random(0)
    for number in range(steps):
        for name in draw.sample(names, len(names)):
            if name in SLOW and number % SLOW_EVERY:
                continue
            began = time.perf_counter()
            runs[name]()
            times[name][number] = time.perf_counter() - began
    return {name: compare(taken, times["plain"]) for name, taken in times.items()}


def compare(taken: dict[int, float], plain: dict[int, float]) -> dict[str, float]:
    """One contender's times against the plain ones, both by round."""
    low, middle, high = statistics.quantiles((seconds / plain[number] for number, seconds in taken.items()), n=4)
    return {
        "median_ms": statistics.median(taken.values()) * 1e3,
        "ratio_of_medians": statistics.median(taken.values()) / statistics.median(plain.values()),
        "ratio_of_pairs": middle,
        "ratio_of_pairs_low": low,
        "ratio_of_pairs_high": high,
        "ratio_of_means": statistics.fmean(taken.values()) / statistics.fmean(plain.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help="about how long each quick contender runs")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's; one is the steadiest on a shared machine")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    for name, shape in SHAPES.items():
        steps = round(options.seconds * 1e3 / float(name.split()[0]))
        results[name] = measure(shape, max(steps, 2 * SLOW_EVERY))
    if options.json:
        print(json.dumps(results))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, rows in results.items():
        heading = f"{'median':>11} {'of medians':>12} {'of pairs (quartiles)':>26} {'of means':>10}"
        print(f"\na step of about {name:<16}{heading}")
        for contender, row in rows.items():
            print(
                f"  {contender:<30}{row['median_ms']:8.2f} ms {row['ratio_of_medians']:11.3f}x"
                f" {row['ratio_of_pairs']:10.3f}x ({row['ratio_of_pairs_low']:.3f}-{row['ratio_of_pairs_high']:.3f})"
                f" {row['ratio_of_means']:9.3f}x"
            )


if __name__ == "__main__":
    main()
