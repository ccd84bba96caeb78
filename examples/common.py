"""What the examples share: presets, as defaults of TRL's own flags, and a small model that needs no network."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from phi3_dolly import SAMPLE, make_tiny_phi3
from trl import ModelConfig, ScriptArguments, TrlParser

PRESETS = ("full", "tiny")

TINY: dict[str, Any] = {
    "dataset_name": str(SAMPLE),
    "dtype": "float32",
    "bf16": False,
    "use_cpu": not torch.cuda.is_available(),
    "max_steps": 6,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}
"""What every tiny preset starts from."""


@dataclass
class ExampleArguments:
    """What the examples add to TRL's flags."""

    preset: str = field(
        default="full" if torch.cuda.is_available() else "tiny",
        metadata={"help": "Which defaults to start from.", "choices": PRESETS},
    )


def parse(
    description: str | None, configuration: type, folder: Path, full: Mapping[str, Any], tiny: Mapping[str, Any]
) -> tuple[ScriptArguments, Any, ModelConfig]:
    """TRL's flags, over the defaults of the preset.

    Args:
        description: what the script does.
        configuration: TRL's configuration class of the trainer.
        folder: where ``tiny`` puts the model that it makes.
        full: defaults for a GPU and the Hub.
        tiny: defaults for neither, over ``TINY``.
    """
    parser = TrlParser((ExampleArguments, ScriptArguments, configuration, ModelConfig), description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=ExampleArguments.preset)
    preset = first.parse_known_args()[0].preset
    if preset == "full":
        parser.set_defaults(**full)
    elif preset == "tiny":
        make_tiny_phi3(folder)
        parser.set_defaults(model_name_or_path=str(folder), **{**TINY, **tiny})
    _, script_args, training_args, model_args = parser.parse_args_and_config()
    return script_args, training_args, model_args


def exchanges(script_args: ScriptArguments) -> Dataset:
    """The conversations of a data set, each as its ``prompt`` and its ``answer``."""
    rows = load_dataset(script_args.dataset_name, name=script_args.dataset_config)[script_args.dataset_train_split]
    return rows.map(
        lambda row: {"prompt": row["messages"][:1], "answer": row["messages"][1]["content"]},
        remove_columns=rows.column_names,
    )
