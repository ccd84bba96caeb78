"""Fine-tune Phi-3-mini on Dolly with LoRA, and see where the memory goes.

    accelerate launch examples/phi3_dolly.py                                     # the preset that this machine can run
    accelerate launch examples/phi3_dolly.py --preset full --lora_r 64 --per_device_train_batch_size 4
    accelerate launch examples/phi3_dolly.py --preset tiny --report_to wandb

Every flag is TRL's own (ScriptArguments, SFTConfig, ModelConfig; ``--config file.yaml`` too). A preset only gives
defaults:

- ``full``: microsoft/Phi-3-mini-128k-instruct on philschmid/dolly-15k-oai-style, in bfloat16. Needs a GPU of 16 GiB
  and the Hugging Face Hub.
- ``tiny``: a real Phi-3 made small, with random weights and a tokenizer trained on the spot, on the conversations in
  ``examples/data``. Needs neither; a minute on two CPU cores.
- ``auto``: full where it can run, else tiny; it says which and why.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from trl_memtrace import MemTrace

MODEL = "microsoft/Phi-3-mini-128k-instruct"
DATASET = "philschmid/dolly-15k-oai-style"
SAMPLE = Path(__file__).parent / "data"
PRESETS = ("full", "tiny", "auto")
NEEDED_BYTES = 16 * 1024**3

LORA_DEFAULTS: dict[str, Any] = {
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "learning_rate": 2e-4,
    "report_to": "none",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass
class ExampleArguments:
    """What this example adds to TRL's flags."""

    preset: str = field(default="auto", metadata={"help": "Which defaults to start from.", "choices": PRESETS})


def choose_preset() -> tuple[str, str]:
    """The preset that this machine can run, and why."""
    if not torch.cuda.is_available():
        return "tiny", "there is no CUDA GPU"
    total = torch.cuda.get_device_properties(0).total_memory
    if total < NEEDED_BYTES:
        return "tiny", f"the GPU has {total / 1024**3:.0f} GiB, Phi-3-mini with LoRA needs 16"
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(MODEL, timeout=5)
    except Exception as problem:
        return "tiny", f"the Hugging Face Hub cannot be reached ({type(problem).__name__})"
    return "full", "there is a GPU and the Hub can be reached"


def preset_defaults(preset: str, folder: Path) -> dict[str, Any]:
    """TRL flags of a preset.

    Args:
        preset: ``full`` or ``tiny``.
        folder: where ``tiny`` puts the model that it makes.
    """
    if preset == "full":
        return {
            **LORA_DEFAULTS,
            "model_name_or_path": MODEL,
            "dataset_name": DATASET,
            "output_dir": "outputs/phi3-dolly",
            "dtype": "bfloat16",
            "bf16": True,
            "max_length": 1024,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 8,
            "max_steps": 100,
            "logging_steps": 1,
        }
    make_tiny_phi3(folder)
    return {
        **LORA_DEFAULTS,
        "model_name_or_path": str(folder),
        "dataset_name": str(SAMPLE),
        "output_dir": "outputs/phi3-dolly-tiny",
        "dtype": "float32",
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "max_length": 256,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "logging_steps": 1,
        "save_strategy": "no",
    }


def make_tiny_phi3(folder: Path) -> None:
    """Save a small Phi-3 with random weights, and a byte-level BPE tokenizer trained on the sample, as a hub model
    is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

    conversations = load_dataset(str(SAMPLE), split="train")["messages"]
    texts = (message["content"] for conversation in conversations for message in conversation)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4096, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        original_max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    Phi3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def parse(folder: Path) -> tuple[ScriptArguments, SFTConfig, ModelConfig]:
    """TRL's flags, over the defaults of the preset."""
    parser = TrlParser((ExampleArguments, ScriptArguments, SFTConfig, ModelConfig), description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="auto")
    preset, why = first.parse_known_args()[0].preset, "asked for"
    if preset == "auto":
        preset, why = choose_preset()
    if preset in PRESETS:
        parser.set_defaults(**preset_defaults(preset, folder))
        print(f"preset {preset}: {why}")
    _, script_args, training_args, model_args = parser.parse_args_and_config()
    return script_args, training_args, model_args


def train(script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """What TRL's own SFT script does, and one line more."""
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    evaluated = training_args.eval_strategy != "no"
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if evaluated else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.add_callback(MemTrace())
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tiny-phi3-") as folder:
        train(*parse(Path(folder)))


if __name__ == "__main__":
    main()
