"""Ten thousand steps: what MemTrace holds stays as it was, and nothing of it is left."""

from __future__ import annotations

import gc
import os
import threading
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GenerationMixin, Trainer, TrainerCallback, TrainingArguments

import trl_memtrace
from trl_memtrace import MemTrace

STEPS = 10_000
OURS = str(Path(trl_memtrace.__file__).parent / "*")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(inputs).square().mean()}


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"inputs": torch.full((8,), float(index % 7))}


class Measures(TrainerCallback):
    """Bytes that were allocated in our own code and are still held, at some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.held = steps, []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.steps[0] // 2:
            tracemalloc.start()
        if state.global_step in self.steps:
            gc.collect()
            found = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, OURS)])
            self.held.append(sum(row.size for row in found.statistics("filename")))


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def open_files() -> set[str]:
    files = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of this very listing
            files.add(os.readlink(f"/proc/self/fd/{name}"))
    return files


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_ten_thousand_steps_leave_nothing_and_hold_no_more(tmp_path):
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    args = TrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, optim="sgd", remove_unused_columns=False,
    )  # fmt: skip
    model, measures, callback = Model(), Measures(2_000, 6_000, STEPS), MemTrace(report=False)
    trainer = Trainer(model=model, args=args, train_dataset=Rows(), callbacks=[callback, measures])
    threads, wrapped = (
        set(threading.enumerate()),
        {name: getattr(torch.autograd, name) for name in dir(torch.autograd)},
    )
    generate = GenerationMixin.generate
    try:
        trainer.train()
    finally:
        tracemalloc.stop()
        torch.set_num_threads(threads_before)

    first, *later = measures.held
    assert len(later) == 2
    assert first > 0
    assert max(later) <= first + 16_384
    assert max(measures.held) < 100_000_000
    assert hooks(model) == 0
    assert set(threading.enumerate()) == threads
    assert not [name for name in open_files() if str(tmp_path) in name]
    assert {name: getattr(torch.autograd, name) for name in wrapped} == wrapped
    assert GenerationMixin.generate is generate
    assert not [name for name in vars(trainer) if name in ("_run_epoch", "evaluate", "_prepare_inputs")]
    run = callback.run
    assert len(run) == STEPS
    assert [step.step for step in run if step.traced] == [1, 2, 3, *range(100, STEPS + 1, 100)]
    assert run.growth is None
