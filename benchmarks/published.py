"""Dry runs against measurements of real GPUs that others published: how far off each figure is.

    python benchmarks/published.py FIXTURES [t4|peft|a100 ...] [--row N ...]

FIXTURES is the folder with their tables (``t4_measured.csv``, ``peft_metamathqa_measured.csv``,
``a100_trl_measured.csv``, ``model_configs.json``). The loops are those that the tables describe. Nothing is fitted
but the one length that the second table does not tell.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments, default_data_collator
from transformers.integrations import sdpa_attention

from trl_memtrace.dryrun import DryRun, dry_run
from trl_memtrace.units import MIB

GIB = 1024 * MIB
Figures = dict[str, tuple[float, float]]
"""Predicted and measured, in bytes, by name."""

LONGEST_BATCH = 641
"""Tokens of the longest batch of the PEFT runs, padding included: the one unknown, settled on their row
``lora--llama-3.2-3B-rank32``."""


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open() as file:
        return list(csv.DictReader(file))


@contextmanager
def model_folder(folder: Path, name: str) -> Iterator[str]:
    """A folder with nothing but the model's config."""
    config = json.loads((folder / "model_configs.json").read_text())[name]
    with tempfile.TemporaryDirectory() as made:
        kept = {key: value for key, value in config.items() if not key.startswith("_")}
        (Path(made) / "config.json").write_text(json.dumps(kept))
        yield made


def four_bit(dtype: torch.dtype, double: bool = False) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double,
    )


def peak_of(dry: DryRun, what: Callable[[], Any]) -> tuple[int, Any]:
    """The highest level while something is done, and what it gives."""
    dry.memory.begin()
    given = what()
    return int(dry.memory.end().ledger.level.max()), given


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def t4(folder: Path, row: dict[str, str]) -> Figures:
    """``out = model(ids, labels=ids); out.loss.backward(); optimizer.step(); optimizer.zero_grad()``."""
    quantized, pinned = row["quantization"] != "none", "pinned" in row["attn"]
    groups = sdpa_attention.use_gqa_in_sdpa
    sdpa_attention.use_gqa_in_sdpa = (lambda *args: False) if pinned else groups  # that kernel takes no groups
    try:
        with model_folder(folder, row["model"]) as path, dry_run(device="Tesla T4") as dry:
            model: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch.float16,
                attn_implementation=row["attn"].split("(")[0],
                quantization_config=four_bit(torch.float16) if quantized else None,
            )
            checkpoints = {"use_reentrant": False}
            if quantized:
                model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=checkpoints)
            targets = row["lora_targets"].split(";")
            model = get_peft_model(model, LoraConfig(r=int(row["lora_r"]), target_modules=targets, lora_dropout=0.0))
            if not quantized:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpoints)
                model.enable_input_require_grads()
            model.train()
            resident = dry.memory.level
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained)
            ids = torch.randint(0, 1000, (int(row["batch_size"]), int(row["seq_len"])))
            for _ in range(2):
                forward, out = peak_of(dry, lambda: model(input_ids=ids, labels=ids))
                backward, _ = peak_of(dry, out.loss.backward)
                gradients = bytes_of(parameter.grad for parameter in trained)
                step, _ = peak_of(dry, optimizer.step)
                optimizer.zero_grad()
                del out
            states = bytes_of(v for s in optimizer.state.values() for name, v in s.items() if name != "step")
            allocator = dry.memory.allocator
            assert allocator is not None
            reserved = allocator.reserved_peak_bytes
    finally:
        sdpa_attention.use_gqa_in_sdpa = groups
    predicted = {
        "resident_MiB": resident,
        "forward_peak_MiB": forward,
        "backward_peak_MiB": backward,
        "optimizer_peak_MiB": step,
        "grads_MiB": gradients,
        "optimizer_state_MiB": states,
        "reserved_peak_GiB": reserved,
        "process_GiB": reserved + dry.context_bytes,
    }
    return {name: (size, float(row[name]) * (GIB if "GiB" in name else MIB)) for name, size in predicted.items()}


def peft(folder: Path, row: dict[str, str]) -> Figures:
    """A plain loop with a mask, ``clip_grad_norm_`` and AdamW, batch 4, on an L40S."""
    settings = json.loads(row["config"])
    with model_folder(folder, "meta-llama/Llama-3.2-3B") as path, dry_run(device="L40S") as dry:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map={"": "cpu"})
        if settings:
            kind = PEFT_TYPE_TO_CONFIG_MAPPING[settings.pop("peft_type")]
            known = {name: value for name, value in settings.items() if name in kind.__dataclass_fields__}
            model = get_peft_model(model, kind(**known))
        model.train()
        optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
        with dry.outside():
            mask = torch.ones(4, LONGEST_BATCH, dtype=torch.int64)
            mask[1:, -20:] = 0  # all but the longest are padded
            ids, count = torch.randint(0, 1000, (4, LONGEST_BATCH)), torch.tensor(100)
        for _ in range(2):
            batch = dry.to_device({"input_ids": ids, "attention_mask": mask, "labels": ids})
            optimizer.zero_grad()
            out = model(**batch, num_items_in_batch=dry.to_device(count))
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert dry.memory.allocator is not None
        return {"reserved_peak_GiB": (dry.memory.allocator.reserved_peak_bytes, float(row["reserved_peak_GiB"]) * GIB)}


def old_loss(logits: Any, labels: Any, vocab_size: int, num_items_in_batch: Any = None, **rest: Any) -> Any:
    """The loss of transformers 4.48, of which the logits are shifted by copying them."""
    shifted = logits[..., :-1, :].contiguous().view(-1, vocab_size)
    target = labels[..., 1:].contiguous().view(-1)
    return torch.nn.functional.cross_entropy(shifted, target, reduction="sum") / num_items_in_batch


def old_casting(model: Any) -> None:
    """What TRL 0.13 did to QLoRA models after PEFT's ``prepare_model_for_kbit_training``.

    Its ``peft_module_casting_to_bf16`` left norms in float32, and so all hidden states from the first layer on.
    """
    for name, module in model.named_modules():
        if any(part in name for part in ("lm_head", "embed_tokens")):
            module.to(torch.bfloat16)


def a100(folder: Path, row: dict[str, str]) -> Figures:
    """A Trainer on packed rows of 4,096 tokens with the loss of its day; logits in float32 before it, as there.

    Of the runs only those of QLoRA had ``bf16=True`` (scripts/benchmarks/scenarios-granite.yaml of their repository).
    Which A100 it was is not said; the PCIe card is the one whose context is known.
    """
    from datasets import Dataset

    quantized = row["quantization"] != "none"
    with model_folder(folder, row["model"]) as path, dry_run(device="NVIDIA A100 80GB PCIe") as dry:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
            device_map={"": "cpu"},
            quantization_config=four_bit(torch.bfloat16, double=True) if quantized else None,
        )
        model.loss_function = old_loss
        model.lm_head.register_forward_hook(lambda module, args, output: output.float())
        if quantized:
            model = prepare_model_for_kbit_training(model)
        if row["method"] == "lora":
            targets = row["lora_targets"].split(";")
            model = get_peft_model(model, LoraConfig(r=int(row["lora_r"]), target_modules=targets))
            model.enable_input_require_grads()
        if quantized:
            old_casting(model)
        length, batch = int(row["seq_len"]), int(row["batch_size"])
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                per_device_train_batch_size=batch,
                gradient_checkpointing=True,
                gradient_checkpointing_kwargs={"use_reentrant": False},
                optim=row["optimizer"],
                bf16=quantized,
                report_to=[],
                remove_unused_columns=False,
            ),
            train_dataset=Dataset.from_dict(
                {"input_ids": [[5] * length] * 4 * batch, "labels": [[5] * length] * 4 * batch}
            ),
            data_collator=default_data_collator,
        )
        trainer.train()
        resident = dry.memory.level
    assert dry.memory.allocator is not None
    process = dry.memory.allocator.reserved_peak_bytes + dry.context_bytes
    return {
        "allocated_peak_GiB": (dry.memory.allocator.allocated_peak_bytes, float(row["allocated_peak_GiB"]) * GIB),
        "resident_GiB": (resident, float(row["resident_GiB"]) * GIB),
        "nvidia_smi_GiB": (process, float(row["nvidia_smi_GiB"]) * GIB),
    }


TABLES: dict[str, tuple[str, Callable[[Path, dict[str, str]], Figures]]] = {
    "t4": ("t4_measured.csv", t4),
    "peft": ("peft_metamathqa_measured.csv", peft),
    "a100": ("a100_trl_measured.csv", a100),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("fixtures", type=Path)
    parser.add_argument("tables", nargs="*", default=list(TABLES))
    parser.add_argument("--row", type=int, nargs="*")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for table in options.tables:
        name, predict = TABLES[table]
        for number, row in enumerate(rows(options.fixtures, name)):
            if options.row is not None and number not in options.row:
                continue
            figures = predict(options.fixtures, row)
            label = row.get("result") or f"{row['model']} {row['method']} {row['quantization']} {row.get('attn', '')}"
            off = ", ".join(f"{what} {predicted / real - 1:+.2%}" for what, (predicted, real) in figures.items())
            print(f"{table} {number} {label}: {off}", flush=True)


if __name__ == "__main__":
    main()
