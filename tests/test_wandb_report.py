"""The report and the workspace for W&B: their specs against wandb-workspaces' own models, the metrics that they name
against those that a real offline run wrote, and what happens without a login, a network or the library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import wandb_file
from test_comparison import FIRST, HOSTILE, SECOND, step, write
from typer.testing import CliRunner

import trl_memtrace
from trl_memtrace import MemTrace, RunTrace, commands, wandb_report

pytest.importorskip("wandb_workspaces")

from wandb_workspaces.reports.v2 import interface as reports
from wandb_workspaces.reports.v2 import internal as report_models
from wandb_workspaces.workspaces import interface as workspaces
from wandb_workspaces.workspaces import internal as workspace_models

ROOT = Path(trl_memtrace.__file__).parent.parent


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str], set[str]]:
    """A real offline run: its record, the keys of its history, the keys of its summary."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(folder))
        trainer = tiny.trainer(folder, max_steps=4, report_to=["wandb"])
        trainer.add_callback(MemTrace(print_table=False))
        trainer.train()
        rows, summary, _ = wandb_file.read(folder)
    kinds = {"memory/modules/_type": "table-file", "memory/timeline/_type": "plotly-file"}
    assert kinds.items() <= summary.items()  # what the panels of these two can show
    history = {key.removesuffix("/_type") for row in rows for key in row}
    return folder / "memtrace", history, {key.removesuffix("/_type") for key in summary}


@pytest.fixture(scope="module")
def run(sent: tuple[Path, set[str], set[str]]) -> RunTrace:
    return RunTrace.load(sent[0])


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(commands.app, ["wandb-report", *map(str, arguments)])


def panels(spec: Any) -> Iterator[dict[str, Any]]:
    """Every panel anywhere in a spec."""
    if isinstance(spec, dict):
        if "viewType" in spec:
            yield spec
        for value in spec.values():
            yield from panels(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from panels(value)


def by_kind(spec: Any) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for panel in panels(spec):
        found.setdefault(panel["viewType"], []).append(panel["config"])
    return found


def table_of(config: dict[str, Any]) -> str:
    return config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]


@pytest.mark.parametrize("options", [[], ["--workspace"]])
def test_no_panel_can_be_empty(sent: tuple[Path, set[str], set[str]], options: list[str]) -> None:
    record, history, summary = sent
    spec = json.loads(invoke(record, "--dry", "--project", "p", "--entity", "e", *options).stdout)
    kinds = by_kind(spec)
    assert set(kinds) == {"Run History Line Plot", "Bar Chart", "Run Comparer", "Weave", "Media Browser"}
    for config in kinds["Run History Line Plot"]:
        assert config["metrics"]
        assert {config["xAxis"], *config["metrics"]} <= history
    for config in kinds["Bar Chart"]:
        assert config["metrics"]
        assert set(config["metrics"]) <= summary | history
    assert {table_of(config) for config in kinds["Weave"]} == {"memory/modules"} <= summary
    assert {key for config in kinds["Media Browser"] for key in config["mediaKeys"]} == {"memory/timeline"} <= history
    assert json.dumps(spec).count("memory/run/peak/total_gib") >= 2
    assert "memory/run/peak/total_gib" in summary  # the runs are chosen by it, and it is a column


def test_the_area_holds_every_category_that_held_anything_and_no_other(run: RunTrace) -> None:
    spec = wandb_report.spec_of(wandb_report.report_of(run, project="p", entity="e", title="t"))
    (area,) = (config for config in by_kind(spec)["Run History Line Plot"] if config.get("plotType") == "stacked-area")
    held = {name for record in run if record.traced for name, size in record.peak.categories.items() if size}
    assert area["metrics"] == sorted(
        (f"memory/peak/{name}_gib" for name in held),
        key=lambda key: -max(record.peak.categories[key[12:-4]] or 0 for record in run),
    )
    (bars,) = (config for config in by_kind(spec)["Bar Chart"] if len(config["metrics"]) > 1)
    seen = {name for record in run for name in record.phases}
    assert set(bars["metrics"]) == {f"memory/{name}/total_gib" for name in seen}


def test_what_would_be_sent_is_valid_by_their_own_models(run: RunTrace) -> None:
    report = wandb_report.spec_of(wandb_report.report_of(run, project="p", entity="e", title="t"))
    model = report_models.ReportViewspec.model_validate(
        {
            "id": "1",
            "displayName": report["displayName"],
            "description": "",
            "project": {"name": "p", "entityName": "e"},
            "spec": report["spec"],
        }
    )
    back = reports.Report._from_model(model)
    kinds = [type(block).__name__ for block in back.blocks]
    assert kinds.count("PanelGrid") == kinds.count("H1") - ("UnorderedList" in kinds)
    assert not {"UnknownBlock"} & set(kinds)
    shown = [
        type(panel).__name__ for block in back.blocks if type(block).__name__ == "PanelGrid" for panel in block.panels
    ]
    assert sorted(set(shown)) == ["BarPlot", "LinePlot", "MediaBrowser", "RunComparer", "WeavePanelSummaryTable"]
    view = wandb_report.workspace_of(run, project="p", entity="e", title="t")._to_model()
    again = workspace_models.WorkspaceViewspec.model_validate_json(view.spec.model_dump_json(by_alias=True))
    assert len(again.section.panel_bank_config.sections) == 5
    assert again.section.settings.x_axis == "train/global_step"


def texts(spec: Any) -> str:
    if isinstance(spec, dict):
        return "".join([str(spec.get("text", "")), *(texts(value) for value in spec.values())])
    return "".join(map(texts, spec)) if isinstance(spec, list) else ""


def test_the_text_says_where_the_peak_was(run: RunTrace) -> None:
    report = wandb_report.report_of(run, project="p", entity="e", title="t")
    shown = texts(wandb_report.spec_of(report)["spec"])
    assert f"Peak {run.peak.bytes / 2**20:.2f} MiB in {run.peak.phase} of step {run.peak.step}: " in shown
    assert "gradient_checkpointing=True" in shown
    assert report.description in shown


def test_saving_sends_exactly_what_dry_prints(run: RunTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        default_entity = "me"

        def projects(self, entity: str) -> list[Any]:
            return []

        def create_project(self, project: str, entity: str) -> None:
            created.append((entity, project))

    created: list[tuple[str, str]] = []
    calls: list[dict[str, Any]] = []

    def graphql(api: Any, query: Any, variables: dict[str, Any]) -> dict[str, Any]:
        calls.append(variables)
        spec = json.loads(variables["spec"])
        view = {"id": "abc", "name": "n", "displayName": "t", "description": "", "spec": spec}
        return {"upsertView": {"view": {**view, "project": {"name": "p", "entityName": "e"}}}}

    monkeypatch.setattr(reports, "_get_api", Api)
    monkeypatch.setattr(reports, "execute_graphql", graphql)
    monkeypatch.setattr(reports, "get_app_url", lambda api: "https://wandb.example")
    report = wandb_report.report_of(run, project="p", entity="e", title="t")
    dry = wandb_report.spec_of(report)
    assert wandb_report.save(report) == "https://wandb.example/e/p/reports/t--abc"
    (call,) = calls
    assert json.loads(call["spec"]) == dry["spec"]
    assert (call["entityName"], call["projectName"], call["displayName"]) == ("e", "p", "t")
    assert created == [("e", "p")]

    def upsert(view: Any) -> dict[str, Any]:
        calls.append(json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True)))
        return {"upsertView": {"view": {"name": "nw-x-v", "id": "1"}}}

    monkeypatch.setattr(workspace_models, "upsert_view2", upsert)
    monkeypatch.setattr(workspaces.wandb, "Api", Api)
    monkeypatch.setattr(workspaces, "get_app_url", lambda api: "https://wandb.example")
    workspace = wandb_report.workspace_of(run, project="p", entity="e", title="t")
    dry = wandb_report.spec_of(workspace)
    assert wandb_report.save(workspace).startswith("https://wandb.example/e/p?nw=")
    assert calls[-1] == dry["spec"]


def test_panels_are_only_of_what_the_record_has(tmp_path: Path) -> None:
    record = write(tmp_path / "rank-00000.jsonl", FIRST, SECOND)
    spec = json.loads(invoke(record, "--dry").stdout)
    kinds = by_kind(spec)
    assert "Media Browser" not in kinds  # no books beside it
    metrics = {name for config in kinds["Run History Line Plot"] for name in config["metrics"]}
    assert metrics == {
        *(f"memory/peak/{name}_gib" for name in ("weights", "activations", "temporaries", "inputs")),
        *(f"memory/{name}/total_gib" for name in ("peak", "forward", "backward", "optimizer")),
        "memory/reserved_gib",
    }
    assert (spec["project"], spec["entity"]) == ("huggingface", "")
    without = step(1, {}, {})
    without["peak"]["roles"] = {}
    bare = by_kind(json.loads(invoke(write(tmp_path / "bare.jsonl", without), "--dry").stdout))
    assert "Weave" not in bare
    assert all(config["metrics"] for config in [*bare["Run History Line Plot"], *bare["Bar Chart"]])


def apart(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own that can reach nothing: every socket is refused."""
    code = (
        "import socket, sys\n"
        "class Refused(socket.socket):\n"
        "    def connect(self, address):\n"
        "        if self.family != socket.AF_UNIX: raise ConnectionRefusedError(111, 'no network')\n"
        "        return super().connect(address)\n"
        "socket.socket = Refused\n"
        "from trl_memtrace.commands import main\n"
        "sys.argv[0] = 'trl-memtrace'\n"
        "main()\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return subprocess.run(
        [sys.executable, "-c", code, "wandb-report", *map(str, arguments)],
        env={**kept, "PYTHONPATH": str(ROOT), "HOME": "/nonexistent", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_dry_needs_neither_network_nor_login(sent: tuple[Path, set[str], set[str]]) -> None:
    for options in ([], ["--workspace"]):
        result = apart(sent[0], "--dry", *options)
        assert (result.returncode, result.stderr) == (0, "")
        assert json.loads(result.stdout)["spec"]


def test_without_a_login_it_is_one_clear_line(sent: tuple[Path, set[str], set[str]], tmp_path: Path) -> None:
    for options in ([], ["--entity", "e", "--workspace"]):
        result = apart(sent[0], *options, WANDB_DIR=str(tmp_path), WANDB_BASE_URL="http://127.0.0.1:9")
        assert (result.returncode, result.stdout) == (2, "")
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("trl-memtrace: W&B cannot be asked: ")
        assert last.endswith("--dry prints what would be sent")
        assert "Traceback" not in result.stderr


def test_a_refusal_is_one_clear_line(run: RunTrace, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuse(self: Any) -> None:
        raise RuntimeError("permission\x1b[31m denied\nfor you")

    monkeypatch.setattr(reports.Report, "save", refuse)
    report = wandb_report.report_of(run, project="p", entity="e", title="t")
    with pytest.raises(wandb_report.WandbReportError, match="permission"):
        wandb_report.save(report)


def test_without_the_library_it_says_what_to_install(two_steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(wandb_report.WandbReportError, match=r"pip install trl-memtrace\[wandb-workspaces\]"):
        raise invoke(two_steps, "--dry").exception


@pytest.fixture
def two_steps(tmp_path: Path) -> Path:
    return write(tmp_path / "rank-00000.jsonl", FIRST, SECOND)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not a MemTrace record"),
        ('{"record": "run", "schema": 99}\n', "newer than"),
        ('{"record": "run", "schema": 1}\n', "no step of this run was traced"),
    ],
)
def test_what_is_no_record_is_one_clear_line(tmp_path, monkeypatch, capsys, content: str, words: str) -> None:
    file = tmp_path / "x\x1b[31m.jsonl"
    file.write_text(content)
    monkeypatch.setattr(sys, "argv", ["trl-memtrace", "wandb-report", str(file), "--dry"])
    with pytest.raises(SystemExit) as left:
        commands.main()
    told = capsys.readouterr()
    assert (left.value.code, told.out, told.err.count("\n")) == (2, "", 1)
    assert words in told.err
    assert "\x1b" not in told.err


def test_names_cannot_act_on_a_terminal(tmp_path: Path) -> None:
    hostile = step(1, {HOSTILE: {"weights": 5}}, {HOSTILE: {**FIRST["phases"]["forward"]}})
    record = write(tmp_path / "rank-00000.jsonl", hostile)
    shown = invoke(record, "--dry", "--title", HOSTILE, "--project", HOSTILE).stdout
    assert not set(shown) & {"\x1b", "\x07", "\u202e"}
    assert json.loads(shown)["displayName"] == HOSTILE
