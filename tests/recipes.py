"""One small real run of every trainer that TRL has, and the few facts of it that are known beforehand."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
import trl
import trl.experimental
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, Trainer

ROWS = 8
PROMPTS = ["the allocator", "owners say", "books balance", "to the byte"] * 2
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PROMPT = {"prompt": PROMPTS}
PREFERENCE = {"prompt": PROMPTS, "chosen": [" says how many"] * ROWS, "rejected": [" does not"] * ROWS}
UNPAIRED = {"prompt": PROMPTS, "completion": [" says how many"] * ROWS, "label": [True, False] * (ROWS // 2)}
TEXT = {"text": [f"{prompt} says how many bytes exist" for prompt in PROMPTS]}
CHAT = {
    "messages": [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": "says how many"}] for prompt in PROMPTS
    ]
}
TRIPLE = {**PREFERENCE, "reference": [" says whose they are"] * ROWS}
PRIVILEGED = {"prompt": PROMPTS, "privileged_context": ["says how many"] * ROWS}


def length_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """A reward that needs no model."""
    return [float(len(completion) % 7) for completion in completions]


def save_model(folder: Path, seed: int = 0) -> str:
    """A causal language model with its tokenizer, as the Hub has them."""
    tiny.model(seed=seed).save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def load(folder: Path, seed: int = 0) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(save_model(folder, seed), dtype=torch.float32)


def scorer() -> Any:
    """A reward model: a language model with one score for a head."""
    torch.manual_seed(2)
    config = tiny.CONFIGS["llama"]()
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)


@dataclass(frozen=True)
class Recipe:
    """How a trainer is made small.

    Attributes:
        columns: its data set.
        settings: of its configuration.
        models: what it is given beside the model, made anew for every run.
        weights: the roles under which it keeps weights beside the trained ones.
        rolls_out: whether it generates as it trains.
    """

    columns: dict[str, list[Any]]
    settings: dict[str, Any]
    models: Callable[[Path], dict[str, Any]]
    weights: tuple[str, ...] = ()
    rolls_out: bool = False


def nothing(folder: Path) -> dict[str, Any]:
    return {}


def teacher(folder: Path) -> dict[str, Any]:
    return {"teacher_model": load(folder / "teacher", seed=1)}


def rewarded(folder: Path) -> dict[str, Any]:
    return {"reward_funcs": [length_reward]}


def rewarded_by_model(folder: Path) -> dict[str, Any]:
    reward = scorer()
    return {"reward_funcs": [reward, length_reward], "reward_processing_classes": [tiny.tokenizer(), None]}


GROUP = {"num_generations": 2, "max_completion_length": 6}
RECIPES: dict[str, Recipe] = {
    "SFTTrainer": Recipe(TEXT, {}, nothing),
    "RewardTrainer": Recipe(PREFERENCE, {}, nothing),
    "DPOTrainer": Recipe(PREFERENCE, {}, nothing, ("reference",)),
    "KTOTrainer": Recipe(UNPAIRED, {}, nothing, ("reference",)),
    "GRPOTrainer": Recipe(PROMPT, {**GROUP, "beta": 0.1}, rewarded_by_model, ("reference", "reward"), True),
    "RLOOTrainer": Recipe(PROMPT, {**GROUP, "beta": 0.1}, rewarded_by_model, ("reference", "reward"), True),
    "DistillationTrainer": Recipe(PROMPT, {"max_completion_length": 6}, teacher, ("teacher",), True),
    "experimental.ORPOTrainer": Recipe(PREFERENCE, {}, nothing),
    "experimental.CPOTrainer": Recipe(PREFERENCE, {}, nothing),
    "experimental.TPOTrainer": Recipe(TRIPLE, {}, nothing),
    "experimental.GKDTrainer": Recipe(CHAT, {"max_new_tokens": 6, "lmbda": 1.0}, teacher, ("teacher",), True),
    "experimental.GOLDTrainer": Recipe(CHAT, {"max_completion_length": 6, "lmbda": 1.0}, teacher, ("teacher",), True),
    "experimental.IWOPDTrainer": Recipe(CHAT, {"max_completion_length": 6}, teacher, ("teacher",), True),
    "experimental.OnlineDPOTrainer": Recipe(
        PROMPT,
        {"max_new_tokens": 6, "max_length": 32, "eval_strategy": "no"},  # it inherits an evaluation that fails
        rewarded_by_model,
        ("reference", "reward"),
        rolls_out=True,
    ),
    "experimental.A2POTrainer": Recipe(PROMPT, {"max_completion_length": 6}, rewarded, ("reference",), True),
    "experimental.GMPOTrainer": Recipe(PROMPT, GROUP, rewarded, (), True),
    "experimental.SDFTTrainer": Recipe(PRIVILEGED, GROUP, nothing, ("teacher",), True),
    "experimental.SDPOTrainer": Recipe(PROMPT, GROUP, rewarded, ("teacher",), True),
}

ELSEWHERE = {
    "experimental.AsyncGRPOTrainer": "generates on a vLLM server",
    "experimental.AsyncDistillationTrainer": "generates on a vLLM server",
    "experimental.ServerDistillationTrainer": "asks a teacher on a vLLM server",
}
"""Trainers that cannot be run on one machine by themselves, and why."""


def trainers() -> Iterator[tuple[str, type]]:
    """Every trainer that TRL exports, by name; those that were promoted are met once."""
    seen: set[str] = set()
    for name in sorted(dir(trl)):
        if name.endswith("Trainer"):
            seen.add(name)
            yield name, getattr(trl, name)
    for package in pkgutil.iter_modules(trl.experimental.__path__):
        if not package.ispkg:
            continue
        module = importlib.import_module(f"trl.experimental.{package.name}")
        for name, value in sorted(vars(module).items()):
            is_trainer = inspect.isclass(value) and issubclass(value, Trainer)
            if is_trainer and value.__module__.startswith("trl.experimental") and name not in seen:
                seen.add(name)
                yield f"experimental.{name}", value


def configuration_of(trainer: type) -> type:
    """The configuration class that lies beside a trainer."""
    module = inspect.getmodule(trainer)
    return getattr(module, trainer.__name__.replace("Trainer", "Config"))


def make(name: str, folder: Path, **settings: Any) -> Any:
    """A small trainer by name, on a model that is the same every time."""
    recipe, trainer = RECIPES[name], dict(trainers())[name]
    configuration = configuration_of(trainer)
    defaults = {
        "output_dir": str(folder / "out"),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataset_num_proc": None,
    }
    known = inspect.signature(configuration).parameters
    given = {**defaults, **recipe.settings, **settings}
    args = configuration(**{key: value for key, value in given.items() if key in known})
    rows = Dataset.from_dict(recipe.columns)
    model = scorer() if name == "RewardTrainer" else load(folder / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return trainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
        processing_class=tokenizer,
        **recipe.models(folder),
    )
