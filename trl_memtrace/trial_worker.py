"""What a worker does: take trials from standard input and write their outcomes, a line of JSON each.

python -m trl_memtrace.trial_worker
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import queue
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .errors import MemtraceError
from .process import quick_imports, quiet, uncompiled
from .text import one_line
from .trials import Outcome, Trial

if TYPE_CHECKING:
    from .estimating import Findings
    from .records import RunTrace


def try_out(trial: Trial) -> Outcome:
    """Try a configuration here and now. What goes wrong is in the outcome."""
    began = time.monotonic()
    gc.disable()
    try:
        with quiet():
            outcome = _measure(trial) if trial.measured else _estimate(trial)
    except MemtraceError as problem:
        outcome = Outcome(error=one_line(str(problem)))
    except Exception as problem:  # whatever somebody's flags lead to; the next trial is to be made
        outcome = Outcome(error=f"{type(problem).__name__}: {one_line(str(problem))}")
    finally:
        gc.enable()
        gc.collect()
    return replace(outcome, seconds=round(time.monotonic() - began, 3))


def _estimate(trial: Trial) -> Outcome:
    from .estimating import estimate

    with uncompiled():
        made = estimate(
            trial.kind,
            trial.flags,
            device=trial.device,
            steps=trial.steps,
            lengths=trial.lengths,
            ranks=trial.ranks,
        )
    return _outcome(made.dry.summary(), made.dry.run, made)


def _measure(trial: Trial) -> Outcome:
    from .measuring import measure

    made = measure(trial.kind, trial.flags, steps=trial.steps, lengths=trial.lengths)
    return _outcome(made.run.summary.to_json(), made.run, made)


def _outcome(summary: dict[str, Any], run: RunTrace, found: Findings) -> Outcome:
    settings = {**run.header.args, "lora_r": found.lora_r}
    return Outcome(summary, settings, found.longest, found.positions, tuple(found.assumed))


def _listen(told: queue.SimpleQueue[str]) -> None:
    """Hear what is to be tried. Where nobody is left to tell, nobody waits for what is being tried either."""
    for line in sys.stdin:
        told.put(line)
    os._exit(0)


def main() -> None:
    """Work until whoever tells the trials is gone, however it ended."""
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(told,), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    with quick_imports(), quiet():
        import trl  # noqa: F401
    for place in itertools.count():
        outcome = try_out(Trial.from_json(json.loads(told.get())))
        print(json.dumps(outcome.to_json()), file=answers, flush=True)
        if place == 0:
            gc.freeze()  # what was imported meanwhile is not to be walked after every trial


if __name__ == "__main__":
    main()
