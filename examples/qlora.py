"""Fine-tune a model in 4 bit with QLoRA inside a budget: training is saved and stops where a step holds more.

    python examples/qlora.py --preset full                   # Phi-3-mini on Dolly, in 12 GiB of a GPU
    python examples/qlora.py --preset tiny                   # a real Phi-3 made small, on the CPU, without the Hub
    python examples/qlora.py --preset tiny --limit 20MiB     # a budget that it does not keep to

Every flag but ``--limit`` is TRL's own; a preset only gives defaults. What bitsandbytes keeps beside the quantized
weights stands in the books as weights/quant_state.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import parse
from datasets import load_dataset
from phi3_dolly import DATASET, LORA_DEFAULTS, MODEL
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from trl_memtrace import MemTrace

QLORA = {**LORA_DEFAULTS, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
FULL: dict[str, Any] = {
    **QLORA,
    "model_name_or_path": MODEL,
    "dataset_name": DATASET,
    "output_dir": "outputs/qlora",
    "dtype": "bfloat16",
    "bf16": True,
    "optim": "paged_adamw_8bit",
    "gradient_checkpointing": True,
    "max_length": 1024,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "max_steps": 100,
}
TINY: dict[str, Any] = {
    **QLORA,
    "output_dir": "outputs/qlora-tiny",
    "max_length": 64,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
}


def train(limit: str, script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """What TRL's own SFT script does, and one line more."""
    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.add_callback(MemTrace(limit=limit, on_limit="save_and_stop"))
    trainer.train()


if __name__ == "__main__":
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--limit", default="12GiB")
    given, rest = own.parse_known_args()
    sys.argv[1:] = rest
    with tempfile.TemporaryDirectory(prefix="tiny-phi3-") as folder:
        train(given.limit, *parse(__doc__, SFTConfig, Path(folder), FULL, TINY))
