"""A model description as text: tables and a structure tree, for a terminal or as Markdown.

Sizes are in MiB throughout, so that a column reads down. Names come from the model, and are escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..text import printable
from ..units import MIB, format_bytes

if TYPE_CHECKING:
    from ..model import Amount, ModelDescription, Node, Weight

    Row = tuple[str, Amount | None]

_STYLES = {
    "embedding": "magenta",
    "attention": "cyan",
    "mlp": "green",
    "norm": "yellow",
    "head": "blue",
    "experts": "bright_green",
    "router": "red",
    "other": "bright_black",
}
_BAR_WIDTH = 16
_MOST_RANGES = 4


def render(description: ModelDescription) -> RenderableType:
    """The description for a terminal: the whole, then by component, by layer, outside the layers, by dtype where there
    are several, and the structure."""
    tables = [_amounts(title, description.total, rows) for title, rows in _sections(description)]
    return Group(
        *(part for table in (_heading(description), *tables, _structure(description)) for part in (table, ""))
    )


def markdown(description: ModelDescription) -> str:
    """The same as Markdown."""
    lines = [f"# {_escape(printable(description.name or description.architecture))}", ""]
    lines += [f"- **{label}:** {_escape(value)}" for label, value in _facts(description)]
    for title, rows in _sections(description):
        lines += ["", f"## {title}", "", "| | Parameters | Share | Size | Share |", "|---|---:|---:|---:|---:|"]
        lines += [
            f"| {_escape(label)} | {' | '.join(_figures(amount, description.total))} |" for label, amount in rows
        ]
    tree = list(_tree_lines(_root(description)))
    fence = "`" * max(3, _most_backticks(tree) + 1)
    return "\n".join([*lines, "", "## Structure", "", fence, *tree, fence])


# --- what is shown, in either form -----------------------------------------------------------------------------------


def _facts(description: ModelDescription) -> Iterator[tuple[str, str]]:
    whole, trainable = description.total, description.trainable
    yield "Architecture", printable(description.architecture)
    yield "Total parameters", f"{whole.parameters:,}"
    yield "Trainable parameters", f"{trainable.parameters:,} ({_share(trainable.parameters, whole.parameters)})"
    if description.frozen.parameters:
        frozen = description.frozen.parameters
        yield "Frozen parameters", f"{frozen:,} ({_share(frozen, whole.parameters)})"
    yield "Model size", f"{_mib(whole.bytes)} in {', '.join(map(printable, description.dtypes))}"
    if description.quant_state_bytes:
        yield "Quantization state", f"{_mib(description.quant_state_bytes)} beside the parameters"
    if description.buffers:
        yield "Buffers", format_bytes(sum(buffer.bytes for buffer in description.buffers))
    if description.tied:
        names = ", ".join(f"{printable(name)} = {printable(first)}" for name, first in description.tied.items())
        yield "Tied, counted once", names


def _sections(description: ModelDescription) -> Iterator[tuple[str, list[Row]]]:
    parts = [(part.value, amount) for part, amount in description.components.items() if amount.parameters]
    yield "Components", [*parts, ("total", description.total)]
    if description.layers:
        yield "Layers", list(_layer_rows(description))
        outside = [(printable(w.name), w.amount) for w in description.outside if w.tied_to is None]
        yield "Outside the layers", [*outside, ("total", description.outside_layers)]
    if len(description.dtypes) > 1:
        yield "By dtype", [(printable(name), amount) for name, amount in description.dtypes.items()]


def _layer_rows(description: ModelDescription) -> Iterator[Row]:
    for group in description.layers:
        places = f"{group.stack}.[{_ranges(group.indices)}]" if group.stack else f"[{_ranges(group.indices)}]"
        if group.count == 1:
            yield printable(places), group.each
            continue
        yield printable(places), None
        yield f"  {group.count} identical layers, each", group.each
        yield f"  all {group.count}", group.all
    if len(description.layers) > 1:
        yield "total", description.in_layers


def _figures(amount: Amount | None, whole: Amount) -> tuple[str, str, str, str]:
    if amount is None:
        return "", "", "", ""
    return (
        f"{amount.parameters:,}",
        _share(amount.parameters, whole.parameters),
        _mib(amount.bytes),
        _share(amount.bytes, whole.bytes),
    )


def _mib(size: int) -> str:
    return f"{size / MIB:,.2f} MiB"


def _share(part: int, whole: int) -> str:
    return f"{part / whole if whole else 0:.2%}"


def _ranges(indices: Iterable[int]) -> str:
    """``0, 1, 2, 5`` -> ``0-2, 5``; of many ranges, the first ones."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    shown = [f"{first}-{last}" if last > first else str(first) for first, last in runs[:_MOST_RANGES]]
    return ", ".join(shown + ["..."] * (len(runs) > _MOST_RANGES))


# --- the structure ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Item:
    """What the tree shows of a module or of a weight."""

    label: str
    detail: str
    parameters: str
    size: str
    shape: str = ""
    part: str = ""
    inside: tuple[_Item, ...] = ()


def _root(description: ModelDescription) -> _Item:
    tree, whole = description.tree, description.total
    mixed = len(description.dtypes) > 1
    return _Item(printable(tree.kind), "", f"{whole.parameters:,}", _mib(whole.bytes), inside=_inside(tree, mixed))


def _inside(node: Node, mixed: bool, prefix: str = "") -> tuple[_Item, ...]:
    own = tuple(_weight_item(weight, prefix, node.count, mixed) for weight in node.weights)
    return own + tuple(item for child in node.children for item in _items(child, mixed))


def _items(node: Node, mixed: bool) -> tuple[_Item, ...]:
    """A module as one item, or as its weights when it holds nothing else; a module that only holds one other is
    written with it: ``layers.[0-31]``."""
    label = _label(node)
    while not node.weights and len(node.children) == 1 and node.count == 1:
        (node,) = node.children
        label = f"{label}.{_label(node)}"
    if not node.children:
        return _inside(node, mixed, f"{label}.")
    each = node.each
    return (
        _Item(
            label,
            printable(node.kind),
            f"{each.parameters:,}",
            _mib(each.bytes),
            _each_of(node.count),
            inside=_inside(node, mixed),
        ),
    )


def _label(node: Node) -> str:
    return f"[{_ranges(node.indices)}]" if node.indices else printable(node.name)


def _each_of(count: int) -> str:
    return f"each of {count}" if count > 1 else ""


def _weight_item(weight: Weight, prefix: str, count: int, mixed: bool) -> _Item:
    label = prefix + printable(weight.name.rpartition(".")[2])
    shape = " x ".join(map(str, weight.shape)) + (f" {printable(weight.dtype)}" if mixed else "")
    if weight.tied_to is not None:
        return _Item(label, f"= {printable(weight.tied_to)}", "tied", "", shape, weight.component.value)
    detail = _each_of(count) if prefix else ""
    return _Item(label, detail, f"{weight.parameters:,}", _mib(weight.bytes), shape, weight.component.value)


def _structure(description: ModelDescription) -> RenderableType:
    table = _new_table("Structure")
    for name in ("", "Parameters", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)

    def add(item: _Item, here: str, below: str) -> None:
        label = Text.assemble((here, "bright_black"), (item.label, _STYLES.get(item.part, "bold")))
        if item.detail:
            label.append(f"  {item.detail}", style="bright_black")
        style = "" if item.part else "bold"
        size = item.size.removesuffix(" MiB")
        table.add_row(label, Text(item.shape, "bright_black"), Text(item.parameters, style), Text(size, style))
        for number, inner in enumerate(item.inside, start=1):
            last = number == len(item.inside)
            add(inner, below + ("└ " if last else "├ "), below + ("  " if last else "│ "))

    add(_root(description), "", "")
    return table


def _tree_lines(item: _Item, depth: int = 0) -> Iterator[str]:
    what = ", ".join(filter(None, (item.detail, item.shape)))
    figures = f"{item.parameters} parameters, {item.size}" if item.size else item.parameters
    yield f"{'    ' * depth}{item.label}{':' if item.inside else ''}  # {what}{what and ': '}{figures}"
    for inner in item.inside:
        yield from _tree_lines(inner, depth + 1)


# --- for a terminal --------------------------------------------------------------------------------------------------


def _heading(description: ModelDescription) -> RenderableType:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), title_justify="left", title_style="bold")
    table.title = Text(printable(description.name)) if description.name else None
    for label, value in _facts(description):
        table.add_row(Text(label, "bright_black"), Text(value))
    return table


def _new_table(title: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False, expand=True, header_style="bright_black"
    )
    table.add_column(Text(title, "bold"), ratio=1, no_wrap=True, overflow="ellipsis")
    return table


def _amounts(title: str, whole: Amount, rows: list[Row]) -> RenderableType:
    table = _new_table(title)
    table.columns[0].overflow, table.columns[0].no_wrap = "fold", False
    for name in ("Parameters", "Share", "Size", "Share"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, amount in rows:
        table.add_row(
            _row_label(label, amount, whole), *_figures(amount, whole), style="bold" if label == "total" else ""
        )
    return table


def _row_label(label: str, amount: Amount | None, whole: Amount) -> Text:
    style = _STYLES.get(label)
    if style is None or amount is None:
        return Text(label)
    share = amount.bytes / whole.bytes if whole.bytes else 0
    return Text.assemble((f"{label:<10}", style), ("█" * round(share * _BAR_WIDTH), style))


# --- for Markdown ----------------------------------------------------------------------------------------------------

_MARKUP = re.compile(r"([\\`*\[<|~]|(?<!\w)_|_(?!\w))")


def _escape(text: str) -> str:
    """Names as text, never as markup; underscores inside words are text already."""
    return _MARKUP.sub(r"\\\1", text).strip()


def _most_backticks(lines: Iterable[str]) -> int:
    return max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
