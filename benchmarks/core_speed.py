"""How fast the books are kept: the events of one long training step through ledger and attribution, on one core.

    python benchmarks/core_speed.py --events 1000000

The step is made up, in the manner of a 32-layer decoder with gradient accumulation under a caching allocator: weights
and optimizer states are older than the recording, every module of every micro-batch leaves activations and scratch,
some modules run again inside backward, and an address that is freed is used again at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from array import array
from pathlib import Path

import numpy as np

from trl_memtrace.attribution import NO_MODULE, Books, Claims, Owner, Timeline, attribute, find_claimed, fold_modules
from trl_memtrace.categories import Category, Phase
from trl_memtrace.ledger import Events, Ledger
from trl_memtrace.units import format_bytes

PARTS = {
    "input_layernorm": "norm",
    "self_attn.q_proj": "attention",
    "self_attn.k_proj": "attention",
    "self_attn.v_proj": "attention",
    "self_attn.o_proj": "attention",
    "post_attention_layernorm": "norm",
    "mlp.gate_proj": "mlp",
    "mlp.up_proj": "mlp",
    "mlp.down_proj": "mlp",
}
BLOCK = 512
KEPT_PER_MODULE = 2
SCRATCH_PER_KEPT = 3
NAMED_MODULES = 64


class MadeUpStep:
    """What a recorder, the hooks and the owners would report of one step."""

    def __init__(self, layers: int = 32) -> None:
        self.time_ns, self.address, self.size = array("q"), array("q"), array("q")
        self.phases: list[tuple[int, Phase]] = []
        self.modules: list[tuple[int, int]] = []
        self.claims: list[tuple[int, int, int, int]] = []
        self.names = [f"model.layers.{layer}.{part}" for layer in range(layers) for part in PARTS]
        self.roles = [role for _ in range(layers) for role in PARTS.values()]
        self.owners = [
            Owner(category, f"{category.value}/{detail}", name)
            for category, detail in (
                (Category.WEIGHTS, "trainable"),
                (Category.GRADIENTS, "trainable"),
                (Category.OPTIMIZER_STATES, "exp_avg"),
            )
            for name in self.names
        ]
        self.owners.append(Owner(Category.INPUTS, "inputs/batch"))

        self._now, self._top = 0, BLOCK
        self._cached: dict[int, list[int]] = {}
        self._held: dict[int, int] = {}
        self._gradients: dict[int, int] = {}
        self._widths = [BLOCK * 16 * (1 + number % len(PARTS)) for number in range(len(self.names))]
        self._states = [self._grow(2 * width) for width in self._widths]
        for number, width in enumerate(self._widths):
            self._claim(self._grow(width), width, number)
        self._claim_states()

    def __len__(self) -> int:
        return len(self.address)

    def micro_batch(self) -> None:
        """One forward and one backward."""
        batch = self._alloc(8 * BLOCK)
        self._enter(Phase.FORWARD)
        self._claim(batch, 8 * BLOCK, len(self.owners) - 1)
        kept = [self._run(number) for number in range(len(self.names))]
        self._enter(Phase.LOSS)
        logits = self._alloc(2048 * BLOCK)
        self._enter(Phase.BACKWARD)
        for number in reversed(range(len(self.names))):
            again = self._run(number) if number % 3 == 0 else []
            scratch = self._alloc(self._widths[number])
            if number not in self._gradients:
                self._gradients[number] = self._alloc(self._widths[number])
            self._free(scratch, *again, *kept[number])
        self._free(logits)
        self._claim_gradients()
        self._enter(Phase.IDLE)
        self._free(batch)

    def optimizer_step(self) -> None:
        """A foreach step, whose scratch is as large as the parameters, then ``zero_grad``."""
        self._claim_gradients()
        self._enter(Phase.OPTIMIZER)
        self._free(*[self._alloc(width) for width in self._widths])
        self._claim_states()
        self._enter(Phase.IDLE)
        self._free(*self._gradients.values())
        self._gradients.clear()
        self._claim_states()

    def _run(self, number: int) -> list[int]:
        self.modules.append((self._tick(), number))
        kept = []
        for _ in range(KEPT_PER_MODULE):
            scratch = [self._alloc(BLOCK * (1 + index)) for index in range(SCRATCH_PER_KEPT)]
            kept.append(self._alloc(self._widths[number] // 2))
            self._free(*scratch)
        self.modules.append((self._tick(), NO_MODULE))
        return kept

    def _claim(self, address: int, size: int, owner: int) -> None:
        self.claims.append((self._tick(), address, size, owner))

    def _claim_gradients(self) -> None:
        for number, address in self._gradients.items():
            self._claim(address, self._widths[number], len(self.names) + number)

    def _claim_states(self) -> None:
        for number, address in enumerate(self._states):
            self._claim(address, 2 * self._widths[number], 2 * len(self.names) + number)

    def _enter(self, phase: Phase) -> None:
        self.phases.append((self._tick(), phase))

    def _tick(self) -> int:
        self._now += 1
        return self._now

    def _grow(self, size: int) -> int:
        address = self._top
        self._top += size
        return address

    def _alloc(self, size: int) -> int:
        cached = self._cached.setdefault(size, [])
        address = cached.pop() if cached else self._grow(size)
        self._held[address] = size
        self._log(address, size)
        return address

    def _free(self, *addresses: int) -> None:
        for address in addresses:
            size = self._held.pop(address)
            self._cached[size].append(address)
            self._log(address, -size)

    def _log(self, address: int, size: int) -> None:
        self.time_ns.append(self._tick())
        self.address.append(address)
        self.size.append(size)


def keep_books(step: MadeUpStep) -> Books:
    """What a traced step goes through: find what is older than the recording, tag every block, look at the peak and
    the end of every phase."""
    events = Events.of(*(np.frombuffer(column, np.int64) for column in (step.time_ns, step.address, step.size)))
    claims = Claims.of(step.claims, step.owners)
    timeline = Timeline(
        [when for when, _ in step.phases],
        [phase for _, phase in step.phases],
        [when for when, _ in step.modules],
        [number for _, number in step.modules],
        step.names,
        step.roles,
    )
    older = np.flatnonzero(find_claimed(Ledger.of(events), claims) < 0)
    _, first = np.unique(claims.address[older], return_index=True)
    baseline = claims.take(older[first])
    books = attribute(Ledger.of(events, baseline.address, baseline.size), claims, timeline)

    for phase in {span.phase for span in books.spans}:
        spans = [span for span in books.spans if span.phase is phase]
        for instant in (books.peak(spans), spans[-1].end):
            categories = books.categories_at(instant)
            assert sum(categories.values()) == books.ledger.level[instant]
            assert not categories[Category.UNATTRIBUTED]
    peak = books.peak(books.spans)
    assert sum(books.roles_at(peak).values()) == books.ledger.level[peak]
    assert len(fold_modules(books.modules_at(peak), NAMED_MODULES)) <= NAMED_MODULES + 1
    return books


def peak_rss_bytes() -> int:
    """The most memory this process has held. ``ru_maxrss`` on Linux would count the parent's too."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000, help="how many events, at least (default: 1000000)")
    parser.add_argument("--layers", type=int, default=32, help="layers of the made-up model (default: 32)")
    parser.add_argument("--repeat", type=int, default=3, help="how often; the slowest counts (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    step = MadeUpStep(options.layers)
    while len(step) < options.events:
        step.micro_batch()
    step.optimizer_step()

    seconds, cpu_seconds = [], []
    for _ in range(options.repeat):
        began, cpu_began = time.perf_counter(), time.process_time()
        books = keep_books(step)
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
    result = {
        "events": len(step),
        "blocks": len(books.category),
        "claims": len(step.claims),
        "module_changes": len(step.modules),
        "seconds": round(max(seconds), 3),
        "cpu_seconds": round(max(cpu_seconds), 3),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    if options.json:
        print(json.dumps(result))
        return
    counts = "{events:,} events, {blocks:,} blocks, {claims:,} claims, {module_changes:,} module changes"
    print(counts.format(**result))
    print("ledger and attribution: {seconds:.2f} s ({cpu_seconds:.2f} s of one core)".format(**result))
    print(f"peak RSS of the process: {format_bytes(result['peak_rss_bytes'])}")


if __name__ == "__main__":
    main()
