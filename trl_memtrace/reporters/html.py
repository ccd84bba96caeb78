"""The report that people open: one HTML file that needs nothing else. Made of a record and a step's books only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..advice import suggest
from ..categories import CATEGORIES, PHASES, ROLE_SEPARATOR, Category, Phase
from ..reading import Reading
from ..records import Peak, PhaseRecord, Suggestion
from ..text import one_line, printable, words
from ..units import common_unit, format_bytes
from .figures import MOST_MARKS, Branch, peak_figure, peak_tree, short_module, steps_figure, timeline_figure
from .page import (
    NOTHING,
    Cell,
    bar,
    bars,
    category_key,
    category_name,
    contents,
    details,
    facts,
    figure,
    header,
    join,
    key,
    level,
    page,
    section,
    share,
    size,
    swatch,
    table,
    write_whole,
)

_MOST_STEPS = 200
_MOST_SUGGESTIONS = 5
_WHOLE = 0.995
_NAMES = (("Class", "class"), ("Name", "name_or_path"), ("Type", "model_type"))
_KINDS = {"run": "Run", "dry_run": "Dry run", "snapshot": "Snapshot"}
_SHOWN_PHASES = tuple(phase for phase in PHASES if phase not in (Phase.IDLE, Phase.LOAD, Phase.SAVE))

Part = tuple[str, str, Markup]
"""A section with the anchor and the heading that lead to it."""


def write_report(reading: Reading, path: str | os.PathLike[str]) -> Path:
    """Write the report, whole or not at all.

    Args:
        reading: what to report on.
        path: the file to write; its folder is made.

    Raises:
        OSError: it cannot be written.
        PlotlyMissingError: plotly is not installed.
    """
    return write_whole(render_report(reading), path)


def render_report(reading: Reading) -> str:
    """The report as text."""
    parts = list(_parts(reading))
    head = header(
        Markup("<b>MemTrace</b> {} {} {}").format(
            _KINDS.get(reading.source, "Run"), "\N{MIDDLE DOT}", printable(reading.name)
        ),
        _unbroken(answer(reading)),
        _facts(reading),
        contents((anchor, heading) for anchor, heading, _ in parts),
        lead=_lead(reading),
    )
    version = reading.summary.header.versions.get("trl-memtrace")
    made_by = Markup('Made by <a href="https://pypi.org/project/trl-memtrace/">trl-memtrace</a>{}. {}').format(
        f" {version}" if version else "", "Sizes are in binary units: 1 GiB is 1,073,741,824 bytes."
    )
    return page(f"{reading.name}: memory", head, (markup for _, _, markup in parts), made_by)


# --- the answer ----------------------------------------------------------------------------------------------------


def answer(reading: Reading) -> str:
    """What there is to know, in a sentence: ``Peak 17.90 GiB in backward of step 3: activations 61%, of which logits
    38%``."""
    held, failure = reading.held, reading.run.failure
    if failure is not None and failure.out_of_memory:
        where = f", in {short_module(one_line(failure.module))}" if failure.module else ""
        asked = f" when {format_bytes(failure.requested_bytes)} more was asked for" if failure.requested_bytes else ""
        phase = f", {failure.phase.value}" if failure.phase else ""
        return f"Out of memory in step {failure.step}{phase}{where}{asked}: {largest(held)}"
    if held.bytes is None or held.phase is None:
        count = reading.summary.steps
        return f"{count} {'step' if count == 1 else 'steps'} counted, none traced"
    step = f" of step {held.step:,}" if held.step is not None and reading.source != "snapshot" else ""
    return f"Peak {format_bytes(held.bytes)} in {held.phase.value}{step}: {largest(held)}"


def largest(peak: Peak) -> str:
    """``activations 61%, of which logits 38%``: the largest category, and the largest role in it where it has
    several."""
    if not peak.bytes:
        return "nothing was held"
    category = max(CATEGORIES, key=lambda name: peak.categories[name] or 0)
    held = peak.categories[category] or 0
    roles = {name: part for name, part in peak.roles.items() if name.split(ROLE_SEPARATOR)[0] == category.value}
    text = f"{words(category.value)} {100 * held / peak.bytes:.0f}%"
    if not roles or not held:
        return text
    role = max(roles, key=lambda name: roles[name])
    if roles[role] >= _WHOLE * held:
        return text
    return f"{text}, of which {words(role.partition(ROLE_SEPARATOR)[2])} {100 * roles[role] / held:.0f}%"


def _unbroken(text: str) -> str:
    """Text in which a number keeps its unit beside it."""
    return re.sub(r"(?<=\d) (?=[KMGT]?i?B\b)|(?<=\bstep) (?=\d)", "\N{NO-BREAK SPACE}", text)


def _lead(reading: Reading) -> str:
    described = reading.summary.header
    if reading.source == "snapshot" and reading.books is not None:
        events = len(reading.books.books.ledger.time_ns)
        return f"Device {described.device.get('index', 0)}, {events:,} allocations and frees"
    model, device = described.model, described.device
    pieces = []
    if model.get("class"):
        pieces.append(f"{model['class']}, {_count(model.get('parameters'))} parameters")
        if model.get("trainable_parameters") is not None:
            pieces.append(f"{_count(model['trainable_parameters'])} of them trained")
    name = device.get("name") or device.get("type")
    total = device.get("total_bytes")
    if name:
        size_of = f" ({format_bytes(total)})" if isinstance(total, int) else ""
        pieces.append(f"on {name}{size_of}")
    if len(reading.runs) > 1:
        pieces.append(f"rank {reading.run.rank} of {len(reading.runs)}")
    return printable(", ".join(pieces))


def _facts(reading: Reading) -> Markup:
    summary, held = reading.summary, reading.held
    rows: list[tuple[Cell, Cell, Cell]] = []
    if held.bytes is not None:
        where = held.phase.value if held.phase else ""
        rows.append(("Allocated at the peak", size(held.bytes), f"in {where}" if where else ""))
    reserved = _reserved(reading)
    if reserved is not None:
        free = reserved - (summary.allocated_peak_bytes or held.bytes or 0)
        rows.append(("Reserved at most", size(reserved), f"{format_bytes(max(free, 0))} of it cache"))
    total = summary.header.device.get("total_bytes")
    used = summary.process_peak_bytes or reserved
    if isinstance(total, int) and total > 0 and used is not None:
        rows.append(("Of the card", share(used, total), f"of {format_bytes(total)}"))
    if held.bytes is not None:
        left = held.categories[Category.UNATTRIBUTED] or 0
        rows.append(
            ("Unattributed", size(left), f"{share(left, held.bytes)} of the peak; the rest adds up to the byte")
        )
    if reading.source != "snapshot":
        rows.append(("Steps", f"{summary.steps:,}", f"{summary.traced_steps:,} of them traced in full"))
    return facts(rows)


def _reserved(reading: Reading) -> int | None:
    """What the caching allocator had reserved at most, when training failed too."""
    failure = reading.run.failure
    known = (reading.summary.reserved_peak_bytes, failure.reserved_bytes if failure is not None else None)
    return max((count for count in known if count is not None), default=None)


# --- the sections --------------------------------------------------------------------------------------------------


def _parts(reading: Reading) -> Iterator[Part]:
    sections = (_advice, _steps, _timeline, _peak, _phases, _card, _ranks, _sites, _model, _settings)
    for made in (build(reading) for build in sections):
        if made is not None:
            yield made


def _part(anchor: str, heading: str, *parts: Markup, intro: Cell = "") -> Part:
    return anchor, heading, section(anchor, heading, *parts, intro=intro)


def _advice(reading: Reading) -> Part | None:
    failure, held = reading.run.failure, reading.held
    settings = reading.summary.header.args
    found: Sequence[Suggestion] = (
        failure.suggestions
        if failure is not None and failure.suggestions
        else suggest(held, settings, reserved_bytes=reading.summary.reserved_peak_bytes)
    )
    parts = [Markup('<p class="warning">{}</p>').format(printable(warning)) for warning in reading.warnings]
    if failure is not None:
        parts.append(Markup('<p class="warning">{}</p>').format(printable(failure.error)))
    if found:
        rows = [
            (
                Markup('<span class="name">{}</span>').format(printable(row.what)),
                printable(row.why),
                size(row.frees_bytes),
            )
            for row in found[:_MOST_SUGGESTIONS]
        ]
        parts.append(table(("what to do", "what it is about", "frees up to"), rows, text_columns=(1,), optional=(1,)))
    if not parts:
        return None
    unknown = "" if settings else " The settings are not known here: what is on already cannot help again."
    intro = (
        "By the books, of what was held at that moment, each taken by itself; the peak may then be elsewhere."
        + unknown
    )
    return _part("advice", "What would help", *parts, intro=intro if found else "")


def _steps(reading: Reading) -> Part | None:
    steps = reading.run.steps
    drawing = steps_figure(steps)
    if drawing is None:
        return None
    traced = [step for step in steps if step.traced]
    drawn = len(drawing["data"][0]["x"])
    caption = (
        "Marks on the axis are the steps that were traced in full; between them the bands are drawn through."
        if drawn <= MOST_MARKS
        else "Between the steps that were traced in full the bands are drawn through."
    )
    if drawn < len(traced):
        caption += (
            f" Of {len(traced):,} traced steps {drawn:,} are drawn: of every stretch the highest and the lowest,"
            " so that no peak is lost."
        )
    shown = sorted(sorted(traced, key=lambda step: -(step.peak.bytes or 0))[:_MOST_STEPS], key=lambda step: step.step)
    unit, scale = common_unit(reading.summary.peak.bytes)
    held = [name for name in CATEGORIES if any(step.peak.categories[name] for step in shown)]
    rows = [
        (
            f"{step.step:,}",
            step.peak.phase.value if step.peak.phase else "-",
            level(step.peak.bytes, scale),
            *(level(step.peak.categories[name], scale) for name in held),
        )
        for step in shown
    ]
    which = f", the {_MOST_STEPS} highest" if len(shown) < len(traced) else ""
    numbers = table(
        ("step", "peak in", unit, *(words(name.value) for name in held)),
        rows,
        text_columns=(1,),
        optional=range(3, 3 + len(held)),
        caption=f"Peak of every traced step{which}, in {unit}",
    )
    return _part(
        "steps",
        "Memory over the steps",
        figure(
            drawing,
            label="Peak memory of every step by category",
            caption=caption,
            more=details("As a table", numbers),
        ),
        intro="The peak of every step, by what held it.",
    )


def _timeline(reading: Reading) -> Part | None:
    if reading.books is None:
        return None
    drawing = timeline_figure(reading.books, counts_events=reading.source != "run")
    blocks, drawn = len(reading.books.books.ledger.size), len(drawing["data"][0]["x"])
    caption = f"{blocks:,} blocks of memory."
    if drawn < len(reading.books.allocator):
        caption += (
            f" Of {len(reading.books.allocator):,} instants {drawn:,} are drawn: of every stretch the highest and the"
            " lowest, so that no peak is lost."
        )
    snapshot = reading.source == "snapshot"
    return _part(
        "timeline",
        "The history" if snapshot else f"Step {reading.books.step:,} from beginning to end",
        figure(drawing, label="Memory over time by category and role", caption=caption, tall=True),
        intro="What was alive at every moment, by what it was for."
        if snapshot
        else "The step that held most: what was alive at every moment, by what it was for.",
    )


def _peak(reading: Reading) -> Part | None:
    held = reading.held
    if not held.bytes:
        return None
    books = reading.books if reading.books and reading.books.step == held.step and _same(reading.books, held) else None
    if reading.source == "snapshot":
        books = reading.books
    tree = peak_tree(held, books)
    rows = [
        (category_name(name), level(held.categories[name], 1), share(held.categories[name], held.bytes))
        for name in sorted(CATEGORIES, key=lambda name: -(held.categories[name] or 0))
        if held.categories[name] or name is Category.UNATTRIBUTED
    ]
    numbers = table(("", "bytes", "share"), rows, total=("total", f"{held.bytes:,}", "100.0%"))
    by = "category, role and module" if books is not None else "category and module"
    return _part(
        "peak",
        "The peak, taken apart",
        numbers,
        figure(
            peak_figure(tree),
            label=f"The peak by {by}",
            caption="Areas are bytes. Choose one to look into it; the bar above leads back.",
            tall=True,
            more=details("As a list", _tree(tree)),
        ),
        intro=f"{format_bytes(held.bytes)} by {by}.",
    )


def _same(books: Any, held: Peak) -> bool:
    return bool(books.peak_bytes == held.allocator_bytes)


def _tree(tree: Branch) -> Markup:
    def branch(part: Branch) -> Markup:
        line = Markup('{}<span class="grow">{}</span><span>{}</span><span class="share">{}</span>').format(
            swatch(part.category.value) if part.category else NOTHING,
            short_module(printable(part.name)),
            size(part.bytes),
            share(part.bytes, tree.bytes),
        )
        if not part.parts:
            return Markup('<div class="leaf">{}</div>').format(line)
        return Markup('<details class="branch"><summary>{}</summary><div>{}</div></details>').format(
            line, join(map(branch, part.parts))
        )

    return join(map(branch, tree.parts))


def _phases(reading: Reading) -> Part | None:
    phases = reading.summary.worst_phases
    shown = [(phase.value, phases[phase.value]) for phase in _SHOWN_PHASES if phase.value in phases]
    if not shown:
        return None
    highest = max(phase.peak_bytes for _, phase in shown)
    rows = [(name, _held(phase.at_peak), size(phase.peak_bytes, highest)) for name, phase in shown]
    return _part(
        "phases",
        "Phases side by side",
        bars(rows, highest),
        category_key(phase.at_peak for _, phase in shown),
        _phase_table(shown, reading.held.phase),
        intro="The highest level in each phase, and what held it; each in the step in which that phase held most.",
    )


def _phase_table(shown: Sequence[tuple[str, PhaseRecord]], peak_in: Phase | None) -> Markup:
    unit, scale = common_unit(max(phase.peak_bytes for _, phase in shown))
    names = [name for name, _ in shown]
    rows = [
        (category_name(category), *(level(phase.at_peak[category], scale) for _, phase in shown))
        for category in CATEGORIES
        if any(phase.at_peak[category] for _, phase in shown)
    ]
    return table(
        (f"in {unit}", *names),
        rows,
        total=("total", *(level(phase.peak_bytes, scale) for _, phase in shown)),
        marked=names.index(peak_in.value) + 1 if peak_in and peak_in.value in names else None,
    )


def _card(reading: Reading) -> Part | None:
    summary = reading.summary
    reserved, total = _reserved(reading), summary.header.device.get("total_bytes")
    allocated = summary.allocated_peak_bytes or reading.held.bytes
    if reserved is None or allocated is None:
        return None
    context = summary.context_bytes or 0
    card = total if isinstance(total, int) and total > 0 else None
    whole = max(card or 0, reserved + context)
    cache = max(reserved - allocated, 0)
    parts = [("used", allocated), ("free", cache), ("beyond", context)]
    entries: list[tuple[str, Cell]] = [("used", "allocated"), ("free", "reserved, not allocated")]
    rows = [
        ("Allocated at most", size(allocated, whole), share(allocated, whole)),
        ("Reserved and not allocated: cache and fragments", size(cache, whole), share(cache, whole)),
    ]
    if context:
        entries.append(("beyond", "CUDA context"))
        rows.append(("CUDA context, outside the allocator", size(context, whole), share(context, whole)))
    if card is not None:
        left = card - reserved - context
        rows.append(
            (
                "Left on the card" if left >= 0 else "More than the card has",
                size(abs(left), whole),
                share(abs(left), whole),
            )
        )
    label = f"{format_bytes(allocated)} allocated, {format_bytes(reserved)} reserved, of {format_bytes(whole)}"
    name = summary.header.device.get("name")
    return _part(
        "card",
        "Allocated, reserved, and the card",
        bar(parts, whole, label),
        key(entries),
        table(
            ("", "bytes", "share"),
            rows,
            total=(printable(str(name or "the card")), size(card, whole), "100.0%")
            if card
            else ("reserved", size(reserved, whole), "100.0%"),
        ),
        intro="What tensors use, what the caching allocator holds beyond that, and what the card has.",
    )


def _ranks(reading: Reading) -> Part | None:
    if len(reading.runs) < 2:
        return None
    sides = [(run.rank, summary.peak) for run, summary in zip(reading.runs, reading.summaries, strict=True)]
    highest = max(peak.bytes or 0 for _, peak in sides)
    rows = [(f"rank {rank}", _held(peak.categories), size(peak.bytes, highest)) for rank, peak in sides]
    failure = reading.run.failure
    why = "ran out of memory" if failure is not None and failure.out_of_memory else "held most"
    numbers = [
        (
            f"rank {run.rank}",
            f"{summary.peak.step or '-'}",
            summary.peak.phase.value if summary.peak.phase else "-",
            size(summary.peak.bytes, highest),
            size(summary.reserved_peak_bytes, highest),
        )
        for run, summary in zip(reading.runs, reading.summaries, strict=True)
    ]
    return _part(
        "ranks",
        "Ranks side by side",
        bars(rows, highest),
        category_key(peak.categories for _, peak in sides),
        details("As a table", table(("", "step", "phase", "peak", "reserved"), numbers, text_columns=(2,))),
        intro=f"The peak of every process. All else on this page is of rank {reading.run.rank}, which {why}.",
    )


def _sites(reading: Reading) -> Part | None:
    if not reading.sites:
        return None
    rows = [
        (
            Markup('<span class="name">{}</span>').format(printable(f"{site.where} {site.function}".strip())),
            category_name(site.category.value),
            size(site.bytes, reading.held.bytes),
        )
        for site in reading.sites[:12]
    ]
    return _part(
        "sites",
        "Lines of code that hold most",
        table(("asked for by", "what", "at the peak"), rows, text_columns=(1,)),
        intro="Where what was alive at the peak had been asked for.",
    )


def _model(reading: Reading) -> Part | None:
    model = reading.summary.header.model
    parameters, total = _integer(model.get("parameters")), _integer(model.get("bytes"))
    if parameters is None:
        return None
    about = [
        *((what, printable(str(model[key]))) for what, key in _NAMES if model.get(key)),
        ("Parameters", f"{parameters:,}"),
        ("Trainable parameters", f"{_integer(model.get('trainable_parameters')) or 0:,}"),
        ("Size", size(total)),
    ]
    parts = [table(("", ""), [(what, value) for what, value in about])]
    components = model.get("components")
    if isinstance(components, Mapping):
        parts += [Markup("<h3>By component</h3>"), _amounts("component", components.items(), parameters, total)]
    layers = _layer_rows(model, total)
    if layers:
        parts += [Markup("<h3>By layer</h3>"), _amounts("layers", layers, parameters, total)]
    return _part("model", "The model", *parts, intro="What was trained, and what it is made of.")


def _layer_rows(model: Mapping[str, Any], total: int | None) -> list[tuple[str, Mapping[str, Any]]]:
    rows: list[tuple[str, Mapping[str, Any]]] = []
    inside = 0
    for group in _mappings(model.get("layers")):
        count, each = _integer(group.get("count")) or 0, _integer(group.get("bytes_each")) or 0
        inside += count * each
        name = f"{count} identical layers, each" if count > 1 else "one layer"
        rows.append((name, {"parameters": group.get("parameters_each"), "bytes": each}))
    if rows and total is not None:
        rows.append(("all layers", {"parameters": model.get("layer_parameters"), "bytes": inside}))
        outside = {"parameters": model.get("non_layer_parameters"), "bytes": total - inside}
        rows.append(("outside the layers", outside))
    return rows


def _amounts(heading: str, rows: Iterable[tuple[str, Any]], parameters: int, total: int | None) -> Markup:
    cells = [
        (printable(words(name)), f"{count:,}", share(count, parameters), size(_integer(row.get("bytes")), total))
        for name, row in rows
        if isinstance(row, Mapping) and (count := _integer(row.get("parameters")))
    ]
    return table((heading, "parameters", "of total", "size"), cells)


def _integer(value: Any) -> int | None:
    """A count in a record's header, which nobody has checked."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _settings(reading: Reading) -> Part | None:
    described = reading.summary.header
    policy = described.trainer.get("policy")
    groups: list[tuple[str, Mapping[str, Any]]] = [
        (
            "Training",
            {
                "trainer": described.trainer.get("class"),
                "world_size": described.trainer.get("world_size"),
                **described.args,
            },
        ),
        ("Tracing", policy if isinstance(policy, Mapping) else {}),
        ("Device", described.device),
        ("Versions", described.versions),
    ]
    shown = [(name, {what: value for what, value in row.items() if value is not None}) for name, row in groups]
    tables = [
        Markup("<div><h3>{}</h3>{}</div>").format(
            name,
            table(
                ("", ""),
                [
                    (Markup('<span class="name">{}</span>').format(printable(str(what))), _value(what, value))
                    for what, value in row.items()
                ],
            ),
        )
        for name, row in shown
        if row
    ]
    if not tables:
        return None
    return _part("settings", "Settings", Markup('<div class="columns">{}</div>').format(join(tables)))


def _value(what: str, value: Any) -> Cell:
    if what.endswith("_bytes") and _integer(value) is not None:
        return size(value)
    return printable(str(value))


def _held(categories: Mapping[str, int | None]) -> list[tuple[str, int]]:
    return [(category.value, categories[category] or 0) for category in CATEGORIES]


def _count(number: Any) -> str:
    value = float(number) if isinstance(number, (int, float)) else 0.0
    for unit in ("", "thousand", "million", "billion"):
        if value < 1000:
            return f"{value:.4g} {unit}".strip()
        value /= 1000
    return f"{value:.4g} trillion"
