"""``trl-memtrace load``: what it takes to load a model."""

from __future__ import annotations

import json
import logging
import warnings
from enum import Enum
from typing import Annotated

import typer

from ..errors import MemtraceError
from ..process import quick_imports
from ..units import parse_bytes

app = typer.Typer(add_completion=False)


class Form(str, Enum):
    """The forms a model can be loaded in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT4 = "int4"


class Rest(str, Enum):
    """The dtypes of what is not quantized."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Order(str, Enum):
    """Whose order of allocations is followed."""

    TRANSFORMERS5 = "transformers5"
    TRANSFORMERS4 = "transformers4"


def words(arguments: list[str], known: type[Enum], option: str) -> list[str]:
    """Values that are written with spaces or commas between them, each once.

    Raises:
        typer.BadParameter: one of them is not known.
    """
    found = list(dict.fromkeys(word for argument in arguments for word in argument.replace(",", " ").split()))
    for word in found:
        if word not in [member.value for member in known]:
            names = ", ".join(member.value for member in known)
            raise typer.BadParameter(f"{word!r} is none of {names}", param_hint=option)
    return found


def _readings(texts: list[str]) -> dict[str, int]:
    found = {}
    for text in texts:
        form, _, size = text.partition("=")
        if form not in [known.value for known in Form]:
            raise typer.BadParameter(f"{text!r} takes DTYPE=SIZE, such as int8=4425MiB", param_hint="--reading")
        try:
            found[form] = parse_bytes(size)
        except ValueError as reason:
            raise typer.BadParameter(str(reason), param_hint="--reading") from None
    return found


@app.command()
def load(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder or a config.json.")],
    dtypes: Annotated[
        list[str] | None,
        typer.Option("--dtypes", help="Some of float32, float16, bfloat16, int8, int4; all when left out."),
    ] = None,
    more_dtypes: Annotated[list[str] | None, typer.Argument(metavar="[DTYPE]...", hidden=True)] = None,
    device: Annotated[
        str | None, typer.Option(help="The card, for its size and its CUDA context; this machine's when left out.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model really (MODEL is a folder with weights).")
    ] = False,
    reading: Annotated[
        list[str] | None,
        typer.Option(metavar="DTYPE=SIZE", help="What nvidia-smi showed elsewhere, to compare: int8=4425MiB."),
    ] = None,
    torch_dtype: Annotated[Rest, typer.Option(help="The dtype of what is not quantized.")] = Rest.FLOAT16,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="Quantize absmax too (int4).")] = False,
    loader: Annotated[
        Order, typer.Option(help="Whose order of allocations; transformers4 is that of mid 2024.")
    ] = Order.TRANSFORMERS5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """What it takes to load a model, by dtype and quantization: accelerate's figure, ours line by line, and the real
    one.

    Only the config is read, unless --measure is given.
    """
    forms = words([*(dtypes or ()), *(more_dtypes or ())], Form, "--dtypes") or [form.value for form in Form]
    readings = _readings(reading or [])
    if measure and readings:
        raise typer.BadParameter("--measure and --reading are two measurements; choose one")
    with quick_imports():
        import torch
        import transformers

        from ..device import find_device
        from ..loading import Loader, load_rows

        card = None
        if device is not None:
            card = find_device(device)
        elif torch.cuda.is_available():
            try:
                card = find_device(torch.cuda.get_device_name(0))
            except MemtraceError:
                card = None  # its context is not known, and so neither is the process
        transformers.logging.set_verbosity(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = load_rows(
                model,
                forms,
                card,
                torch_dtype=torch_dtype.value,
                double_quant=double_quant,
                loader=Loader(loader.value),
                measured=measure,
                readings=readings,
            )
    if as_json:
        print(json.dumps({"rows": [row.to_dict() for row in rows]}, indent=2))
        return
    from rich.console import Console

    from ..reporters import loading_text

    Console(highlight=False).print(loading_text.render_load(model, rows, None if card is None else card.name))
