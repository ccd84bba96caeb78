"""``trl-memtrace model``: what a model is made of."""

from __future__ import annotations

import json
import logging
import warnings
from enum import Enum
from typing import Annotated

import typer

from ..process import quick_imports

app = typer.Typer(add_completion=False)


class Dtype(str, Enum):
    """The dtypes a model can be shown in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    AUTO = "auto"


@app.command()
def model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder or a config.json.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    dtype: Annotated[
        Dtype,
        typer.Option(help="The dtype of the weights; auto is the config's own. TRL loads in float32 unless told."),
    ] = Dtype.FLOAT32,
) -> None:
    """What a model is made of: parameters and bytes by component, by layer and by dtype, and its structure.

    Only the config is read; no weights are downloaded or allocated.
    """
    if as_json and as_markdown:
        raise typer.BadParameter("--json and --markdown are two formats; choose one")
    with quick_imports():
        import transformers

        from ..model import describe, load_meta

        transformers.logging.set_verbosity(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            description = describe(load_meta(model, dtype.value), name=model)
    if as_json:
        print(json.dumps(description.to_dict(), indent=2))
        return
    from ..reporters import model_text

    if as_markdown:
        print(model_text.markdown(description))
    else:
        from rich.console import Console

        Console(highlight=False).print(model_text.render(description))
