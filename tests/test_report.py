"""The HTML report and the report command: what the page says, that its figures are the record's, that text stays
text."""

from __future__ import annotations

import html.parser
import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_snapshot import FORWARD, MAIN, Made
from typer.testing import CliRunner

from trl_memtrace import RecordError, RunTrace
from trl_memtrace.attribution import Books, Span, Timeline
from trl_memtrace.categories import CATEGORIES, Category, Phase
from trl_memtrace.commands import app
from trl_memtrace.errors import MemtraceError
from trl_memtrace.ledger import Events, Ledger
from trl_memtrace.reading import read
from trl_memtrace.records import Peak, RunHeader, dump_line
from trl_memtrace.reporters import figures, page
from trl_memtrace.reporters.html import render_report
from trl_memtrace.step_books import StepBooks

MIB = 1024**2
GIB = 1024**3
SNAPSHOT = Path(__file__).parents[2] / "shared" / "fixtures" / "cuda_snapshots" / "transformer_fullstep.pickle"
NASTY = """<script>alert(1)</script></script><img src=x onerror=alert(1)>"'&lt;b&gt;${x}\u2028"""


def step_line(number: int, sizes: dict[str, int], *, traced: bool = True, reserved: int | None = None, **more) -> dict:
    categories = {category.value: sizes.get(category.value, 0) for category in CATEGORIES}
    total = sum(categories.values())
    phase = {"peak_bytes": total, "end_bytes": total, "at_peak": categories, "at_end": categories}
    untraced = dict.fromkeys(categories)
    return {
        "record": "step",
        "step": number,
        "traced": traced,
        "phases": {"backward": phase} if traced else {},
        "peak": {
            "phase": "backward" if traced else None,
            "bytes": total if traced else None,
            "allocator_bytes": total,
            "categories": categories if traced else untraced,
            "roles": more.get("roles", {}),
            "modules": more.get("modules", {}),
        },
        "reserved_bytes": reserved,
        "seconds": 1.0,
    }


def write(folder: Path, steps: list[dict], rank: int = 0, extra: list[dict] | None = None, **header) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [RunHeader(**header).to_json(), *steps, *(extra or [])]
    file = folder / f"rank-{rank:05d}.jsonl"
    file.write_text("".join(map(dump_line, lines)), encoding="utf-8")
    return file


CARD = {"type": "cuda", "index": 0, "name": "NVIDIA A100-SXM4-80GB", "total_bytes": 80 * GIB}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    roles = {"activations/logits": 4 * GIB, "activations/mlp": 6 * GIB, "weights/frozen": 6 * GIB}
    modules = {"": {"activations": 4 * GIB}, "model.layers.0.mlp": {"activations": 6 * GIB, "weights": 6 * GIB}}
    steps = [
        step_line(1, {"weights": 6 * GIB, "activations": 2 * GIB}, reserved=9 * GIB),
        step_line(2, {"weights": 6 * GIB}, traced=False, reserved=10 * GIB),
        step_line(3, {"weights": 6 * GIB, "activations": 10 * GIB}, reserved=20 * GIB, roles=roles, modules=modules),
    ]
    write(tmp_path / "run" / "memtrace", steps, device=CARD, args={"per_device_train_batch_size": 8})
    return tmp_path / "run" / "memtrace"


class Text(html.parser.HTMLParser):
    """What a reader sees, and which elements and attributes there are; scripts and styles apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.attributes, self.scripts, self._inside = "", [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.text += "" if tag in ("span", "b", "a") else " "
        self.tags.append(tag)
        self.attributes += attributes
        self._inside = tag
        if tag == "script":
            self.scripts.append([dict(attributes).get("type"), ""])

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1][1] += data
        elif self._inside != "style":
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    @property
    def drawings(self) -> list[dict]:
        return [json.loads(source) for kind, source in self.scripts if kind == "application/json"]


def report_of(path: Path) -> Text:
    return Text(render_report(read(path)))


# --- what it says --------------------------------------------------------------------------------------------------


def test_the_answer_comes_first(folder: Path) -> None:
    seen = report_of(folder)
    assert "Peak 16.00 GiB in backward of step 3: activations 62%, of which mlp 60%" in seen.words
    assert seen.words.index("Peak 16.00") < seen.words.index("What would help")
    assert "per_device_train_batch_size=4" in seen.words  # half of the 8 that the settings say
    assert "3 2 of them traced in full" in seen.words


def test_the_page_stands_alone(folder: Path) -> None:
    source = render_report(read(folder))
    seen = Text(source)
    fetched = [value for name, value in seen.attributes if name in ("src", "srcset", "action", "poster", "data")]
    links = [value for name, value in seen.attributes if name == "href" and not value.startswith("#")]
    assert fetched == []
    assert set(links) == {"data:,", "https://pypi.org/project/trl-memtrace/"}  # an icon of nothing, and one to follow
    assert "link" in seen.tags
    assert "iframe" not in seen.tags
    assert "@import" not in source[: source.index("</style>")]
    (policy,) = [value for _, value in seen.attributes if value and "default-src" in value]
    assert policy.startswith(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-eval' 'sha256-"
    )


def test_steps_are_drawn_as_they_were_recorded(folder: Path) -> None:
    drawing = report_of(folder).drawings[0]
    bands = {trace["name"]: trace for trace in drawing["data"] if trace.get("stackgroup")}
    assert set(bands) == {"weights", "activations"}
    assert bands["weights"]["x"] == [1, 3]
    assert bands["activations"]["y"] == [2.0, 10.0]
    (reserved,) = [trace for trace in drawing["data"] if trace.get("name") == "reserved"]
    assert (reserved["x"], reserved["y"]) == ([1, 2, 3], [9.0, 10.0, 20.0])


def test_plotly_knows_every_word_of_the_figures(folder: Path) -> None:
    go = pytest.importorskip("plotly.graph_objects")
    drawings = report_of(folder).drawings
    step = made_books(3000)
    for drawing in [*drawings, figures.timeline_figure(step), figures.peak_figure(figures.peak_tree(Peak(), step))]:
        go.Figure(drawing)  # raises on whatever its schema does not hold
    with pytest.raises(ValueError, match="stackgrp"):
        go.Figure({"data": [{"type": "scatter", "stackgrp": "a"}]})
    assert len(drawings) == 2


# --- nothing is lost in drawing ------------------------------------------------------------------------------------


ROLES = ("unattributed/during_step", "weights/frozen", "activations/mlp", "activations/logits", "temporaries/backward")


def made_books(count: int, seed: int = 0) -> StepBooks:
    """A step of random allocations and frees, with random tags."""
    rng = random.Random(seed)
    live: dict[int, int] = {}
    rows = []
    for number in range(count):
        if live and rng.random() < 0.45:
            address = rng.choice(list(live)) if len(live) < 400 else next(iter(live))
            rows.append((number * 1000 + rng.randrange(900), address, -live.pop(address)))
        else:
            address = (number + 1) << 32
            live[address] = rng.randrange(1, 1000) * 512 * (200 if rng.random() < 0.01 else 1)
            rows.append((number * 1000 + rng.randrange(900), address, live[address]))
    ledger = Ledger.of(Events.of(*zip(*rows, strict=True)))
    blocks = len(ledger.size)
    role = np.array([rng.randrange(len(ROLES)) for _ in range(blocks)], np.int64)
    codes = [CATEGORIES.index(Category(name.split("/")[0])) for name in ROLES]
    modules = ("", "model.layers.0.mlp", "model.layers.1.mlp", "lm_head")
    module = np.array([rng.randrange(len(modules)) for _ in range(blocks)], np.int64)
    spans = (Span(Phase.FORWARD, 0, count // 2), Span(Phase.BACKWARD, count // 2, count))
    books = Books(ledger, spans, np.array(codes, np.int64)[role], role, module, ROLES, modules)
    return StepBooks(7, books, ledger.level.copy(), Timeline([0], [Phase.FORWARD]))


def held_at(step: StepBooks, instant: int) -> dict[str, int]:
    """Bytes by role at an instant, block by block."""
    held: dict[str, int] = {}
    ledger = step.books.ledger
    for block in range(len(ledger.size)):
        if ledger.born[block] <= instant < ledger.died[block]:
            name = ROLES[step.books.role[block]]
            held[name] = held.get(name, 0) + int(ledger.size[block])
    return held


def test_the_timeline_holds_what_the_books_hold() -> None:
    step = made_books(3000)
    drawing = figures.timeline_figure(step)
    bands = [trace for trace in drawing["data"] if trace.get("stackgroup")]
    at, scale = drawing["layout"]["meta"]["at"], MIB
    assert drawing["layout"]["meta"]["unit"] == "MiB"
    peak = int(np.argmax(step.books.ledger.level))
    shown = {band["meta"]["name"].replace(", ", "/"): band["y"][at] for band in bands if band["y"][at]}
    held = {
        name.replace("temporaries/backward", "temporaries").replace("weights/frozen", "weights"): size
        for name, size in held_at(step, peak).items()
    }
    held["unattributed"] = held.pop("unattributed/during_step")
    assert shown == {name: pytest.approx(size / scale, abs=1e-4) for name, size in held.items()}
    times = step.books.ledger.time_ns
    assert bands[0]["x"][at] == pytest.approx((times[peak - 1] - times[0]) / 1e6, abs=1e-4)
    totals = np.sum([band["y"] for band in bands], axis=0)
    assert len(totals) < 1100
    assert totals.max() == pytest.approx(step.books.ledger.level.max() / scale, abs=1e-3)


def test_no_peak_and_no_valley_is_lost() -> None:
    rng = np.random.default_rng(0)
    place = np.cumsum(rng.integers(0, 50, 100_000))
    values = rng.integers(0, 10**12, 100_000)
    kept = figures.highest_and_lowest(values, place, 100)
    assert len(kept) <= 202
    assert list(kept) == sorted(set(kept.tolist()))
    assert kept[0] == 0
    assert kept[-1] == 99_999
    edges = place[0] + (place[-1] - place[0]) * np.arange(101) / 100
    for low, high in itertools.pairwise(edges):
        inside = np.flatnonzero((place >= low) & (place < high))
        mine = kept[np.isin(kept, inside)]
        assert values[mine].max() == values[inside].max()
        assert values[mine].min() == values[inside].min()


def test_a_few_points_are_all_drawn() -> None:
    assert figures.highest_and_lowest(np.arange(7), np.arange(7), 3).tolist() == list(range(7))


def test_what_the_allocator_has_beyond_the_blocks_is_unattributed() -> None:
    step = made_books(500)
    more = replace(step, allocator=step.allocator + 3 * MIB)
    bands = [trace for trace in figures.timeline_figure(more)["data"] if trace.get("stackgroup")]
    plain = [trace for trace in figures.timeline_figure(step)["data"] if trace.get("stackgroup")]
    assert [band["name"] for band in bands] == [band["name"] for band in plain]
    assert bands[-1]["meta"]["category"] == "unattributed"
    np.testing.assert_allclose(np.array(bands[-1]["y"]) - plain[-1]["y"], 3.0, atol=2e-4)
    tree = figures.peak_tree(Peak(), more)
    (unattributed,) = [part for part in tree.parts if part.category is Category.UNATTRIBUTED]
    assert ("beyond the blocks", 3 * MIB) in [(part.name, part.bytes) for part in unattributed.parts]


def test_the_peak_is_taken_apart_without_rest() -> None:
    step = made_books(2000)
    tree = figures.peak_tree(Peak(), step)
    held = held_at(step, int(np.argmax(step.books.ledger.level)))

    def check(branch: figures.Branch) -> None:
        if branch.parts:
            assert branch.bytes == sum(part.bytes for part in branch.parts)
        for part in branch.parts:
            check(part)

    check(tree)
    assert tree.bytes == sum(held.values())
    (activations,) = [part for part in tree.parts if part.name == "activations"]
    assert {part.name: part.bytes for part in activations.parts} == {
        "mlp": held["activations/mlp"],
        "logits": held["activations/logits"],
    }
    assert {part.name for part in activations.parts[0].parts} == {
        "no module",
        "model.layers.0",
        "model.layers.1",
        "lm_head",
    }
    (treemap,) = figures.peak_figure(tree)["data"]
    assert len(set(treemap["ids"])) == len(treemap["ids"])
    assert set(treemap["parents"]) <= {*treemap["ids"], ""}


# --- text from outside ---------------------------------------------------------------------------------------------


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    held = {"weights": GIB, "activations": 2 * GIB}
    roles = {f"activations/{NASTY}": 2 * GIB, f"weights/{NASTY}": GIB}
    steps = [step_line(n, held, roles=roles, modules={NASTY: held}, reserved=4 * GIB) for n in (1, 2)]
    failure = {
        **{"record": "oom", "step": 2, "error": NASTY, "phase": "backward", "module": NASTY, "requested_bytes": 5},
        **{"traced": True, **{key: steps[0]["peak"][key] for key in ("bytes", "allocator_bytes", "categories")}},
        **{"roles": roles, "modules": {NASTY: held}, "reserved_bytes": 1, "free_bytes": 1},
        "suggestions": [{"what": NASTY, "why": NASTY, "frees_bytes": 1}],
    }
    named = dict.fromkeys(("class", "name_or_path", "model_type", NASTY), NASTY)
    place = tmp_path / "<b>&lt;'\"<img src=x onerror=alert(1)>" / "memtrace"
    write(
        place,
        steps,
        extra=[failure],
        device={**CARD, "name": NASTY, NASTY: NASTY},
        versions={"trl-memtrace": NASTY, NASTY: NASTY},
        model={**named, "parameters": 1, "components": {NASTY: {"parameters": 1, "bytes": 1}}},
        trainer={"class": NASTY, "policy": {NASTY: NASTY}},
        args={NASTY: NASTY, "max_length": NASTY, "optim": NASTY},
    )
    clean = write(tmp_path / "clean" / "memtrace", steps)
    seen, like = report_of(place), report_of(clean.parent)
    assert {tag for tag in seen.tags if tag not in like.tags} <= {"h3"}
    assert "img" not in seen.tags
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert seen.words.count("<script>alert(1)</script>") > 15
    assert len([kind for kind, _ in seen.scripts if kind is None]) == 1
    source = render_report(read(place))
    embedded = re.findall(r'<script type="application/json">(.*?)</script>', source, re.S)
    assert len(embedded) == 2
    assert not [text for text in embedded if set(text) & set("<>&\u2028")]
    labels = [label for drawing in seen.drawings for trace in drawing["data"] for label in trace.get("labels", ())]
    assert not [label for label in labels if "<" in label]
    assert any("&lt;script&gt;" in label for label in labels)


def test_what_is_embedded_reads_back_as_it_was() -> None:
    data = {"a": [NASTY, "</script>", "<!--", 1.5, None]}
    assert json.loads(page.embedded(data)) == data


# --- damaged and foreign files -------------------------------------------------------------------------------------


def invoke(*arguments: str) -> object:
    return CliRunner().invoke(app, ["report", *arguments])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a MemTrace record"),
        (b"\n\n", "is not a MemTrace record"),
        (b'{"record": "run", "sch', "is not a MemTrace record"),
        (b"loss,step\n1,2\n", "is not a MemTrace record"),
        (bytes(range(256)) * 10, "is not a MemTrace record"),
        (b'{"record":"run","schema":2}\n', "schema 2 is newer"),
        (b"\x80\x04]\x94.", "snapshot"),
        (b"\x80garbage", "is not a pickle"),
    ],
)
def test_what_is_no_record_is_one_clear_line(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "rank-00000.jsonl"
    file.write_bytes(content)
    result = invoke(str(file), "-o", str(tmp_path / "out.html"))
    assert isinstance(result.exception, MemtraceError)
    assert result.exception.exit_code == 2
    assert said in str(result.exception)
    assert not (tmp_path / "out.html").exists()


def test_where_there_is_nothing(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere", tmp_path / ("x" * 300)):
        with pytest.raises(RecordError, match="no record at"):
            read(place)


def test_whatever_a_header_holds_there_is_a_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "plotly_js", lambda: "")  # five megabytes less, every time
    file = folder / "rank-00000.jsonl"
    first, *rest = file.read_text().splitlines(keepends=True)
    rows = [{"count": 2, "parameters_each": 1, "bytes_each": 2}]
    head = json.loads(first) | {
        "model": {"class": "A", "parameters": 3, "bytes": 9, "components": {"mlp": {"parameters": 2}}, "layers": rows},
        "trainer": {"world_size": 1, "policy": {"first_steps": 3}},
        "args": {"per_device_train_batch_size": 8, "max_length": 8, "optim": "adamw"},
    }
    places = list(paths_in({key: head[key] for key in ("model", "trainer", "args", "device", "versions")}))
    assert len(places) > 15
    for place in places:
        for value in (-1, 1.5, "x", [3], {"a": 1}):
            changed = json.loads(json.dumps(head))
            inside = changed
            for name in place[:-1]:
                inside = inside[name]
            inside[place[-1]] = value
            file.write_text(dump_line(changed) + "".join(rest), encoding="utf-8")
            try:
                assert "16.00" in report_of(folder).words
            except MemtraceError as error:
                assert "record" in str(error)  # noqa: PT017


def paths_in(data: object, above: tuple = ()) -> list[tuple]:
    """The place of every value in nested dictionaries and lists."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    found = [(*above, name) for name, _ in inner]
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return found + [place for name, value in inner for place in paths_in(value, (*above, name))]


def test_a_torn_record_is_reported_on_with_a_word_about_it(folder: Path) -> None:
    file = folder / "rank-00000.jsonl"
    file.write_text(file.read_text() + '{"record":"step","st', encoding="utf-8")
    assert "damaged lines were passed over, 1 of them" in report_of(folder).words


def test_damaged_books_cost_the_timeline_only(folder: Path) -> None:
    (folder / "rank-00000.peak.npz").write_bytes(b"PK\x03\x04 not quite")
    seen = report_of(folder)
    assert "does not hold a step's books" in seen.words
    assert "Peak 16.00 GiB" in seen.words
    assert "from beginning to end" not in seen.words


# --- the command ---------------------------------------------------------------------------------------------------


def test_json_is_the_summary_alone(folder: Path) -> None:
    result = invoke(str(folder), "--json")
    assert json.loads(result.stdout) == RunTrace.load(folder).summary.to_json()
    assert sorted(path.name for path in folder.iterdir()) == ["rank-00000.jsonl"]


def test_the_page_is_written_beside_the_record_or_where_it_should_be(folder: Path, tmp_path: Path) -> None:
    assert invoke(str(folder.parent)).stdout.strip() == str(folder / "report.html")
    assert invoke(str(folder / "rank-00000.jsonl"), "-o", str(tmp_path / "a" / "b.html"), "--json").exit_code == 0
    for written in (folder / "report.html", tmp_path / "a" / "b.html"):
        assert "Peak 16.00 GiB in backward of step 3" in Text(written.read_text(encoding="utf-8")).words
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.html"]


def test_a_place_that_cannot_be_written_is_one_clear_line(folder: Path) -> None:
    result = invoke(str(folder), "-o", str(folder / "rank-00000.jsonl" / "report.html"))
    assert isinstance(result.exception, MemtraceError)
    assert "cannot write" in str(result.exception)


def test_the_table_on_the_terminal(folder: Path) -> None:
    assert "Peak 16.00 GiB in backward of step 3" in " ".join(invoke(str(folder), "--terminal").stdout.split())


def test_ranks_stand_side_by_side_and_the_highest_is_told_of(folder: Path) -> None:
    write(folder, [step_line(1, {"weights": 30 * GIB})], rank=1, device=CARD)
    seen = report_of(folder)
    assert "Peak 30.00 GiB in backward of step 1: weights 100%" in seen.words
    assert "rank 1 of 2" in seen.words
    assert "rank 0 16.00 GiB rank 1 30.00 GiB" in seen.words
    assert "Peak 16.00 GiB" in report_of(folder / "rank-00000.jsonl").words


def test_what_a_run_of_more_processes_left_behind_is_not_this_runs(folder: Path) -> None:
    write(folder, [step_line(1, {"weights": 30 * GIB})], rank=1, trainer={"world_size": 2})
    assert "rank 1 of 2" in report_of(folder).words
    write(folder, [step_line(1, {"weights": GIB})], rank=0, trainer={"world_size": 1})
    seen = report_of(folder)
    assert "Peak 1.00 GiB" in seen.words
    assert "Ranks" not in seen.words


def test_the_rank_that_ran_out_of_memory_is_told_of(folder: Path) -> None:
    held = step_line(1, {"weights": 2 * GIB})["peak"]
    failure = {
        **{
            "record": "oom",
            "step": 1,
            "error": "OutOfMemoryError",
            "phase": "forward",
            "module": "model.layers.3.mlp",
        },
        **{"requested_bytes": 3 * GIB, "traced": True, "reserved_bytes": 25 * GIB, "free_bytes": 0, "suggestions": []},
        **{name: held[name] for name in ("bytes", "allocator_bytes", "categories", "roles", "modules")},
    }
    write(folder, [], rank=1, extra=[failure], device=CARD)
    seen = report_of(folder)
    said = "Out of memory in step 1, forward, in layers.3.mlp when 3.00 GiB more was asked for: weights 100%"
    assert said in seen.words
    assert "Reserved at most 25.00 GiB" in seen.words
    assert "rank 1, which ran out of memory" in seen.words


def test_a_snapshot_as_a_page_from_its_own_command(tmp_path: Path) -> None:
    made = Made()
    made.there_before(64 * MIB)
    made.free(made.alloc(MIB, FORWARD), MAIN)
    made.save(tmp_path / "gpu.pickle")
    result = CliRunner().invoke(app, ["snapshot", str(tmp_path / "gpu.pickle"), "--html", str(tmp_path / "a.html")])
    assert result.exit_code == 0
    assert "Peak 65.00 MiB in" in Text((tmp_path / "a.html").read_text(encoding="utf-8")).words


def test_a_run_of_which_nothing_was_traced(tmp_path: Path) -> None:
    write(tmp_path, [step_line(1, {"weights": 5}, traced=False)])
    seen = report_of(tmp_path)
    assert "1 step counted, none traced" in seen.words
    assert seen.drawings == []
    assert "plotly" not in render_report(read(tmp_path)).split("</style>")[1]


@pytest.mark.skipif(not SNAPSHOT.is_file(), reason="the real snapshots are not here")
def test_a_snapshot_is_reported_on_too() -> None:
    seen = report_of(SNAPSHOT)
    assert "Peak 51.30 GiB in optimizer: optimizer states 49%" in seen.words
    assert "cs336_basics/optimizers.py:82" in seen.words
    timeline = seen.drawings[0]
    totals = np.sum([trace["y"] for trace in timeline["data"] if trace.get("stackgroup")], axis=0)
    assert totals.max() == pytest.approx(51.30, abs=0.01)


def test_what_was_seen_beyond_the_allocator_is_read_back(folder: Path) -> None:
    file = folder / "rank-00000.jsonl"
    closing = {"record": "summary", "context_bytes": GIB // 2, "process_peak_bytes": 20 * GIB + GIB // 2}
    file.write_text(file.read_text() + dump_line(closing))
    printed = json.loads(invoke(str(folder), "--json").stdout)
    assert (printed["context_bytes"], printed["process_peak_bytes"]) == (GIB // 2, 20 * GIB + GIB // 2)
    assert "CUDA context, outside the allocator 0.50 GiB 0.6%" in report_of(folder).words
