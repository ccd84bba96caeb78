"""What to look at in W&B: a report and a workspace, made for the metrics that a run has sent by its record. No torch.

Panels name metrics; one that nobody sends stays empty. So what they name is taken from the record: of its categories
those that ever held anything, of phases and of reserved memory what was seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .advice import suggest
from .categories import CATEGORIES, PHASES
from .errors import MemtraceError
from .records import RunTrace, StepRecord, Suggestion, Summary
from .sinks.metrics import PREFIX, step_metrics
from .sinks.wandb import GLOBAL_STEP, MODULES, TIMELINE
from .units import format_bytes

_WIDTH = 24
_PEAK = f"{PREFIX}run/peak/total_gib"
_OURS = f'SummaryMetric("{_PEAK}") >= 0'
_RESERVED = f"{PREFIX}reserved_gib"


class WandbReportError(MemtraceError):
    """W&B's library is not there, or W&B did not take what was made."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """The metrics that panels name.

    Attributes:
        categories: at the peak, by category, the one of most bytes first.
        phases: the highest level of each phase.
        totals: the peak, and what was reserved where there is a caching allocator.
        modules: whether there is a table by module.
        timeline: whether there is a figure of the peak step.
    """

    categories: tuple[str, ...]
    phases: tuple[str, ...]
    totals: tuple[str, ...]
    modules: bool
    timeline: bool

    @classmethod
    def of(cls, run: RunTrace, *, timeline: bool) -> Metrics:
        """Those of a run.

        Args:
            run: its record.
            timeline: whether the books of its peak step were kept, from which the figure is drawn.

        Raises:
            WandbReportError: no step of it was traced, so it sent nothing.
        """
        traced = [step for step in run if step.traced]
        if not traced:
            raise WandbReportError("no step of this run was traced, so it has sent no metrics to show")
        sent = {key for step in traced for key in step_metrics(step)}
        most = {category: max(_held(step, category.value) for step in traced) for category in CATEGORIES}
        held = sorted((category for category in CATEGORIES if most[category]), key=lambda category: -most[category])
        totals = (f"{PREFIX}peak/total_gib", _RESERVED)
        phases = (f"{PREFIX}{phase.value}/total_gib" for phase in PHASES)
        return cls(
            categories=tuple(f"{PREFIX}peak/{category.value}_gib" for category in held),
            phases=tuple(name for name in phases if name in sent),
            totals=tuple(name for name in totals if name in sent),
            modules=bool(run.peak.modules),
            timeline=timeline,
        )


def report_of(run: RunTrace, *, project: str, entity: str, title: str, timeline: bool = True) -> Any:
    """A ``wandb_workspaces.reports.v2.Report``; nothing is sent yet.

    Raises:
        WandbReportError: wandb-workspaces is not installed, or nothing was traced.
    """
    wr = _library("reports.v2")
    metrics, summary = Metrics.of(run, timeline=timeline), run.summary
    panels = _Panels(wr, metrics)

    def grid(*shown: Any) -> Any:
        runs = wr.Runset(name="Runs with MemTrace", filters=_OURS)
        return wr.PanelGrid(runsets=[runs], panels=_side_by_side(wr, shown))

    blocks = [
        wr.H1(text="What it came to"),
        *(wr.P(text=sentence) for sentence in _findings(summary)),
        grid(panels.peak()),
    ]

    def chapter(title: str, text: str, *shown: Any) -> None:
        if shown:
            blocks.extend([wr.H1(text=title), wr.P(text=text), grid(*shown)])

    chapter(
        "Over the steps",
        "What was held at the peak of each traced step, by category. The categories add up to what the allocator"
        " reports, to the byte; between two of the trainer's logs the step that held most stands for all.",
        *panels.over_steps(),
    )
    chapter(
        "By phase",
        "The highest level within each part of a step. The highest of them is the peak.",
        *panels.by_phase(),
    )
    chapter(
        "Within the step that held most",
        "Everything that was alive, from the step's first allocation to its end, by category and role.",
        *panels.timeline(),
    )
    chapter(
        "By module",
        "What each module held at the run's peak, the largest first; small ones count with their parents.",
        *panels.by_module(),
    )
    helped = suggest(summary.peak, summary.header.args)
    if helped:
        items = [_advice(suggestion) for suggestion in helped]
        blocks.extend([wr.H1(text="What would help"), wr.UnorderedList(items=items)])
    chapter("Runs side by side", "Which of their settings and figures differ.", panels.comparer())
    return wr.Report(project=project, entity=entity, title=title[:128], description=_sentence(summary), blocks=blocks)


def workspace_of(run: RunTrace, *, project: str, entity: str, title: str, timeline: bool = True) -> Any:
    """A ``wandb_workspaces.workspaces.Workspace`` with the same panels; nothing is sent yet.

    Raises:
        WandbReportError: wandb-workspaces is not installed, or nothing was traced.
    """
    ws, wr = _library("workspaces"), _library("reports.v2")
    metrics = Metrics.of(run, timeline=timeline)
    panels = _Panels(wr, metrics)
    sections = {
        "Memory over the steps": panels.over_steps(),
        "Memory by phase": panels.by_phase(),
        "Memory within the step that held most": panels.timeline(),
        "Memory by module": panels.by_module(),
        "Runs side by side": [panels.peak(), panels.comparer()],
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name=title,
        sections=[
            ws.Section(name=heading, panels=shown, is_open=True) for heading, shown in sections.items() if shown
        ],
        settings=ws.WorkspaceSettings(x_axis=GLOBAL_STEP),
        runset_settings=ws.RunsetSettings(filters=_OURS, pinned_columns=[f"summary:{_PEAK}"]),
    )


def spec_of(made: Any) -> dict[str, Any]:
    """What the API would be sent for a report or a workspace, without sending it."""
    model = made._to_model()
    spec: dict[str, Any] = json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))
    return {"entity": made.entity, "project": made.project, "displayName": model.display_name, "spec": spec}


def save(made: Any) -> str:
    """Send a report or a workspace to W&B.

    Returns:
        its address.

    Raises:
        WandbReportError: there is no login or no network, or W&B refuses it.
    """
    with _asking_wandb():
        return str(made.save().url)


def default_entity() -> str:
    """Whose things are when nobody is named: W&B's answer.

    Raises:
        WandbReportError: there is no login or no network.
    """
    with _asking_wandb():
        import wandb

        return str(wandb.Api().default_entity)


@contextmanager
def _asking_wandb() -> Iterator[None]:
    try:
        yield
    except Exception as problem:  # W&B's errors have no base of their own
        words = str(problem).strip() or type(problem).__name__
        raise WandbReportError(f"W&B cannot be asked: {words}; --dry prints what would be sent") from None


class _Panels:
    """The panels, each made anew for the grid that it stands in; none where the run has no metrics for it."""

    def __init__(self, wr: Any, metrics: Metrics) -> None:
        self._wr = wr
        self._metrics = metrics

    def over_steps(self) -> list[Any]:
        area = self._over_steps("Held at the peak, by category", self._metrics.categories, plot_type="stacked-area")
        return [*area, *self._over_steps("Peak and reserved", self._metrics.totals)]

    def by_phase(self) -> list[Any]:
        names = list(self._metrics.phases)
        bars = self._wr.BarPlot(title="Highest level of each phase, last traced step", metrics=names, title_x="GiB")
        return [bars, *self._over_steps("Highest level of each phase", names)] if names else []

    def peak(self) -> Any:
        return self._wr.BarPlot(title="Peak of the run", metrics=[_PEAK], title_x="GiB")

    def timeline(self) -> list[Any]:
        if not self._metrics.timeline:
            return []
        return [
            self._wr.MediaBrowser(title="The peak step", media_keys=[TIMELINE], num_columns=1, layout=self._wide())
        ]

    def by_module(self) -> list[Any]:
        if not self._metrics.modules:
            return []
        return [self._wr.WeavePanelSummaryTable(table_name=MODULES, layout=self._wide())]

    def comparer(self) -> Any:
        return self._wr.RunComparer(diff_only="split", layout=self._wide())

    def _wide(self) -> Any:
        return self._wr.Layout(w=_WIDTH, h=12)

    def _over_steps(self, title: str, metrics: Sequence[str], **options: Any) -> list[Any]:
        axes = {"x": GLOBAL_STEP, "y": list(metrics), "title_x": "step", "title_y": "GiB"}
        return [self._wr.LinePlot(title=title, smoothing_type="none", **axes, **options)] if metrics else []


def _side_by_side(wr: Any, panels: Sequence[Any]) -> list[Any]:
    """The panels in one row, as wide as the report; those that have a size keep it."""
    width = _WIDTH // len(panels)
    for place, panel in enumerate(panels):
        if panel.layout.w != _WIDTH:
            panel.layout = wr.Layout(x=place * width, y=0, w=width, h=10)
    return list(panels)


def _findings(summary: Summary) -> Iterable[str]:
    yield _sentence(summary)
    reserved, held = summary.reserved_peak_bytes, summary.allocated_peak_bytes
    if reserved is not None and held is not None:
        yield f"Reserved at most {format_bytes(reserved)}, of which at most {format_bytes(held)} was allocated."


def _sentence(summary: Summary) -> str:
    """Where the peak was and what it was made of."""
    peak = summary.peak
    held = sorted(((size, name) for name, size in peak.categories.items() if size), reverse=True)
    total = peak.bytes or 1
    parts = ", ".join(f"{name.replace('_', ' ')} {size / total:.0%}" for size, name in held[:3])
    where = f" in {peak.phase.value} of step {peak.step}" if peak.phase is not None else ""
    return f"Peak {format_bytes(peak.bytes)}{where}: {parts}."


def _advice(suggestion: Suggestion) -> str:
    return f"{suggestion.what} ({suggestion.why}): frees up to {format_bytes(suggestion.frees_bytes)}"


def _held(step: StepRecord, category: str) -> int:
    return step.peak.categories[category] or 0


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"wandb_workspaces.{name}")
    except ImportError:
        raise WandbReportError("this needs wandb-workspaces: pip install trl-memtrace[wandb-workspaces]") from None
