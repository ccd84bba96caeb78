"""A budget as a test: what a training step of your own may hold, checked in CI before it reaches a GPU.

    pytest examples/test_memory_budget.py

The marker comes with trl_memtrace. It fails the test where a traced step held more, and says what held it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import load_dataset
from phi3_dolly import SAMPLE, make_tiny_phi3
from trl import SFTConfig, SFTTrainer

from trl_memtrace import MemTrace


@pytest.mark.memtrace_limit("400 MiB")
def test_a_step_of_fine_tuning_keeps_to_its_budget(tmp_path: Path) -> None:
    make_tiny_phi3(tmp_path / "model")
    args = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        max_length=64,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
    )
    trainer = SFTTrainer(
        model=str(tmp_path / "model"), args=args, train_dataset=load_dataset(str(SAMPLE), split="train")
    )
    trainer.add_callback(MemTrace(print_table=False))
    trainer.train()
