"""Small real models, a tokenizer trained on the spot, a dataset and a trainer to try things on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, prepare_model_for_kbit_training
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)
from trl import SFTConfig, SFTTrainer

VOCABULARY = 320
_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "qwen": lambda: Qwen3Config(**_SHAPE, head_dim=16, tie_word_embeddings=True),
    "phi3": lambda: Phi3Config(**_SHAPE),
    "gpt2": lambda: GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=1),
    "moe": lambda: MixtralConfig(**_SHAPE, num_local_experts=4),
    "qwen_moe": lambda: Qwen3MoeConfig(
        **_SHAPE, head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64
    ),
    "deepseek": lambda: DeepseekV3Config(
        **{**_SHAPE, "num_key_value_heads": 4},
        moe_intermediate_size=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=48,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
}
LORA_TARGETS = {"deepseek": ["q_a_proj", "o_proj"], "gpt2": ["c_attn", "c_proj"], "phi3": ["qkv_proj", "o_proj"]}
SENTENCES = ["the allocator says how many bytes exist", "owners say whose they are", "books balance to the byte"]


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    made.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def dataset(rows: int = 48) -> Dataset:
    return Dataset.from_dict({"text": [" ".join(SENTENCES[: 1 + row % 3]) for row in range(rows)]})


def model(kind: str = "llama", seed: int = 0, **config: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    settings = CONFIGS[kind]()
    for name, value in config.items():
        setattr(settings, name, value)
    return AutoModelForCausalLM.from_config(settings, dtype=torch.float32)


def batch(length: int = 24, rows: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(2, VOCABULARY, (rows, length))
    return {"input_ids": ids, "labels": ids.clone()}


def quantized(kind: str, bits: int, folder: Path) -> PreTrainedModel:
    model(kind).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    return prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)


def lora(kind: str = "llama", **options: Any) -> LoraConfig:
    return LoraConfig(
        r=4, target_modules=LORA_TARGETS.get(kind, ["q_proj", "v_proj"]), task_type="CAUSAL_LM", **options
    )


def trainer(
    folder: Path,
    of: PreTrainedModel | None = None,
    *,
    peft_config: Any = None,
    optimizer: str | None = None,
    eval_rows: int = 0,
    **settings: Any,
) -> SFTTrainer:
    """A real SFTTrainer. ``optimizer`` is "foreach" for an AdamW that works on all parameters at once, else the
    Trainer's own word for one."""
    of = model() if of is None else of
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "optim": "adamw_torch" if optimizer in (None, "foreach") else optimizer,
        "dataset_num_proc": None,
    }
    args = SFTConfig(**{**defaults, **settings})
    made = SFTTrainer(
        model=of,
        args=args,
        train_dataset=dataset(),
        eval_dataset=dataset(eval_rows) if eval_rows else None,
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    if optimizer == "foreach":
        trained = [parameter for parameter in made.model.parameters() if parameter.requires_grad]
        made.optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, foreach=True)
    return made


def losses(of: SFTTrainer) -> list[float]:
    return [row["loss"] for row in of.state.log_history if "loss" in row]
