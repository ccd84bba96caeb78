"""Align a model with DPO, and see what the reference model costs.

    python examples/dpo.py --preset full                     # Qwen2.5-0.5B on UltraFeedback, on a GPU
    python examples/dpo.py --preset tiny                     # a real Phi-3 made small, on the CPU, without the Hub
    python examples/dpo.py --preset tiny --use_peft          # the adapter switched off is the reference
    python examples/dpo.py --preset tiny --precompute_ref_log_probs true

Every flag is TRL's own; a preset only gives defaults. The reference model stands in the books as weights/reference,
log-probabilities computed beforehand as inputs/reference_logps.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import exchanges, parse
from datasets import Dataset, load_dataset
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, get_peft_config

from trl_memtrace import MemTrace

FULL: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "dataset_name": "trl-lib/ultrafeedback_binarized",
    "output_dir": "outputs/dpo",
    "per_device_train_batch_size": 4,
    "max_steps": 100,
    "bf16": True,
}
TINY: dict[str, Any] = {
    "output_dir": "outputs/dpo-tiny",
    "per_device_train_batch_size": 2,
    "max_length": 64,
    "max_steps": 3,
    "lora_target_modules": ["qkv_proj", "o_proj"],
}


def preferences(script_args: ScriptArguments) -> Dataset:
    """Pairs of answers. From plain conversations: the answer is chosen, the next conversation's is rejected."""
    if script_args.dataset_name == FULL["dataset_name"]:
        return load_dataset(script_args.dataset_name, split=script_args.dataset_train_split)
    rows = exchanges(script_args)
    answers = [[{"role": "assistant", "content": answer}] for answer in rows["answer"]]
    return Dataset.from_dict(
        {"prompt": list(rows["prompt"]), "chosen": answers, "rejected": [*answers[1:], answers[0]]}
    )


def train(script_args: ScriptArguments, training_args: DPOConfig, model_args: ModelConfig) -> None:
    """What TRL's own DPO script does, and one line more."""
    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    trainer = DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=preferences(script_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.add_callback(MemTrace())
    trainer.train()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="tiny-phi3-") as folder:
        train(*parse(__doc__, DPOConfig, Path(folder), FULL, TINY))
