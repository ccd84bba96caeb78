"""Train a model with GRPO, and see what a rollout holds: its phase in the books, its cache as activations/kv_cache.

    python examples/grpo.py --preset full                    # Qwen2.5-0.5B on TL;DR, on a GPU
    python examples/grpo.py --preset tiny                    # a real Phi-3 made small, on the CPU, without the Hub
    python examples/grpo.py --preset tiny --beta 0.04        # with a reference model: weights/reference

Every flag is TRL's own; a preset only gives defaults.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import exchanges, parse
from datasets import Dataset, load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, get_peft_config

from trl_memtrace import MemTrace

FULL: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "dataset_name": "trl-lib/tldr",
    "output_dir": "outputs/grpo",
    "per_device_train_batch_size": 8,
    "max_completion_length": 128,
    "max_steps": 100,
    "bf16": True,
}
TINY: dict[str, Any] = {
    "output_dir": "outputs/grpo-tiny",
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 12,
    "max_steps": 3,
    "lora_target_modules": ["qkv_proj", "o_proj"],
}


def reward_brevity(completions: list[Any], **kwargs: Any) -> list[float]:
    """A reward that is easy to see in the samples: short answers, of many different letters."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [len(set(text)) / (1 + len(text)) for text in texts]


def prompts(script_args: ScriptArguments) -> Dataset:
    """A data set with a ``prompt`` in each row."""
    if script_args.dataset_name == FULL["dataset_name"]:
        return load_dataset(script_args.dataset_name, split=script_args.dataset_train_split)
    return exchanges(script_args).remove_columns("answer")


def train(script_args: ScriptArguments, training_args: GRPOConfig, model_args: ModelConfig) -> None:
    """What TRL's own GRPO script does, and one line more."""
    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        reward_funcs=reward_brevity,
        train_dataset=prompts(script_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.add_callback(MemTrace())
    trainer.train()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="tiny-phi3-") as folder:
        train(*parse(__doc__, GRPOConfig, Path(folder), FULL, TINY))
