"""Two records side by side: the arithmetic against sums made by hand, the command as a user meets it."""

from __future__ import annotations

import html.parser
import json
import pickle
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from trl_memtrace import commands
from trl_memtrace.comparison import Side, Tolerance, compare, read_side, same_names
from trl_memtrace.records import RunTrace

MIB = 1024**2
CATEGORIES = (
    "weights",
    "gradients",
    "optimizer_states",
    "activations",
    "inputs",
    "temporaries",
    "communication",
    "unattributed",
)
SHARED = Path(__file__).parents[2] / "shared" / "fixtures" / "cuda_snapshots"


def levels(**sizes: int) -> dict[str, int]:
    return {name: sizes.get(name, 0) for name in CATEGORIES}


def phase(**sizes: int) -> dict[str, Any]:
    total = sum(sizes.values())
    return {"peak_bytes": total, "end_bytes": total, "at_peak": levels(**sizes), "at_end": levels(unattributed=total)}


def step(number: int, modules: dict[str, dict[str, int]], phases: dict[str, Any], reserved: int | None = None) -> dict:
    sizes: Counter[str] = Counter()
    for row in modules.values():
        sizes.update(row)
    total = sum(sizes.values())
    return {
        "record": "step",
        "step": number,
        "traced": True,
        "phases": phases,
        "peak": {
            "phase": "backward",
            "bytes": total,
            "allocator_bytes": total,
            "categories": levels(**sizes),
            "roles": {f"{name}/some": size for name, size in sizes.items()},
            "modules": modules,
        },
        "reserved_bytes": reserved,
        "seconds": 0.1,
    }


def write(file: Path, *steps: dict, source: str = "run", schema: Any = 1, more: list[dict] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"record": "run", "schema": schema, "source": source}, *steps, *(more or [])]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


FIRST = step(
    4,
    {
        "": {"temporaries": 5 * MIB},
        "model.a": {"weights": 10 * MIB, "activations": 2 * MIB},
        "model.b": {"weights": 3},
    },
    {"forward": phase(weights=12 * MIB), "backward": phase(weights=10 * MIB, temporaries=7 * MIB + 3)},
    reserved=20 * MIB,
)
SECOND = step(
    2,
    {"": {"temporaries": 4 * MIB}, "model.a": {"weights": 10 * MIB, "activations": 6 * MIB}, "model.c": {"inputs": 7}},
    {"backward": phase(weights=10 * MIB, temporaries=10 * MIB + 7), "optimizer": phase(gradients=1 * MIB)},
    reserved=24 * MIB,
)


def run(*arguments: object, **options: Any) -> Any:
    return CliRunner().invoke(commands.app, ["diff", *map(str, arguments)], env={"COLUMNS": "100"}, **options)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["trl-memtrace", "diff", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        commands.main()
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "a" / "rank-00000.jsonl", FIRST), write(tmp_path / "b" / "rank-00000.jsonl", SECOND)


def test_growth_by_category_module_and_phase_is_what_a_hand_counts(two: tuple[Path, Path]) -> None:
    data = json.loads(run(*two, "--json").stdout)
    assert data["peak"] == {"before_bytes": 17 * MIB + 3, "after_bytes": 20 * MIB + 7, "growth_bytes": 3 * MIB + 4}
    assert {row["name"]: row["growth_bytes"] for row in data["categories"]} == levels(
        activations=4 * MIB, inputs=7, weights=-3, temporaries=-MIB
    )
    assert [row["name"] for row in data["categories"]][:2] == ["activations", "inputs"]
    assert [row["name"] for row in data["categories"]][-2:] == ["weights", "temporaries"]
    assert [(row["name"], row["before_bytes"], row["after_bytes"]) for row in data["modules"]] == [
        ("model.a", 12 * MIB, 16 * MIB),
        ("model.c", None, 7),
        ("model.b", 3, None),
        ("", 5 * MIB, 4 * MIB),
    ]
    assert [(row["name"], row["growth_bytes"]) for row in data["phases"]] == [
        ("backward", 3 * MIB + 4),
        ("optimizer", MIB),
        ("forward", -12 * MIB),
    ]
    (backward,) = (row for row in data["phases"] if row["name"] == "backward")
    assert {row["name"]: row["growth_bytes"] for row in backward["categories"]} == levels(temporaries=3 * MIB + 4)
    assert data["reserved"]["growth_bytes"] == 4 * MIB
    assert [data[side]["step"] for side in ("before", "after")] == [4, 2]


names = st.lists(st.sampled_from("abc"), min_size=0, max_size=4).map(".".join)
tables = st.dictionaries(names, st.dictionaries(st.sampled_from(CATEGORIES), st.integers(1, 2**40)), max_size=12)


def total(table: dict[str, dict[str, int]]) -> Counter[str]:
    counted: Counter[str] = Counter()
    for row in table.values():
        counted.update(row)
    return counted


@settings(deadline=None)
@given(tables, tables)
def test_no_byte_is_lost_when_modules_are_brought_under_the_same_names(before: dict, after: dict) -> None:
    first, second = same_names(before, after)
    assert (total(first), total(second)) == (total(before), total(after))
    for own, other in ((first, second), (second, first)):
        for name in own.keys() - other.keys():
            parts = name.split(".")
            assert not any(".".join(parts[:upto]) in other for upto in range(1, len(parts)))


@settings(deadline=None)
@given(tables, tables)
def test_every_part_adds_up_to_the_growth_of_the_peak(before: dict, after: dict) -> None:
    sides = []
    for table in (before, after):
        lines = [{"record": "run", "schema": 1}, step(1, table, {"backward": phase(**total(table))})]
        sides.append(Side.of_run("x", RunTrace.from_lines(map(json.dumps, lines))))
    comparison = compare(*sides)
    grown = sum(total(after).values()) - sum(total(before).values())
    for changes in (comparison.categories, comparison.roles, comparison.modules, comparison.phases):
        assert sum(change.growth_bytes for change in changes) == grown
        assert [change.growth_bytes for change in changes] == sorted(
            (change.growth_bytes for change in changes), reverse=True
        )


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"l.0": 9}, {"l.0.mlp": 4, "l.0.attn": 7}, ({"l.0": 9}, {"l.0": 11})),
        (
            {"l.0": 9, "l.0.mlp": 1},
            {"l.0.mlp": 4, "l.0.attn": 7},
            ({"l.0": 9, "l.0.mlp": 1}, {"l.0": 7, "l.0.mlp": 4}),
        ),
        (
            {"base_model.model.l.q.base_layer": 3, "base_model.model.l.q.lora_A": 2},
            {"l.q": 3},
            ({"l.q": 5}, {"l.q": 3}),
        ),
        ({"base_model.model": 3, "base_model": 1, "": 2}, {"": 6}, ({"": 6}, {"": 6})),
        ({"l": 1}, {"m.n": 2}, ({"l": 1}, {"m.n": 2})),
        ({"": 1, "a.b": 5}, {"": 2}, ({"": 1, "a.b": 5}, {"": 2})),
    ],
)
def test_a_module_that_one_side_has_folded_is_compared_where_the_other_has_it(before, after, expected) -> None:
    found = same_names(*({name: {"weights": size} for name, size in side.items()} for side in (before, after)))
    assert tuple({name: row["weights"] for name, row in side.items()} for side in found) == expected


@pytest.mark.parametrize(
    ("limit", "code"),
    [("0%", 1), ("17.6%", 1), ("17.7%", 0), ("200%", 0), ("3MiB", 1), (f"{3 * MIB + 3}", 1), (f"{3 * MIB + 4} B", 0)],
)
def test_fail_over_is_exact(two: tuple[Path, Path], limit: str, code: int) -> None:
    result = run(*two, "--fail-over", limit)
    assert result.exit_code == code
    assert ("Over: the peak grew by 3.00 MiB (+17.6%)" in result.stdout) == (code == 1)
    data = json.loads(run(*two, "--fail-over", limit, "--json").stdout)
    assert (data["over"], data["fail_over"]) == (code == 1, limit)
    assert run(two[1], two[0], "--fail-over", limit).exit_code == 0  # what shrinks is never over


def test_a_growth_of_exactly_the_share_allowed_is_allowed() -> None:
    tolerance = Tolerance.parse(" 10 % ")
    for size, allowed in ((1100, True), (1101, False)):
        lines = [[{"record": "run", "schema": 1}, step(1, {"m": {"weights": weight}}, {})] for weight in (1000, size)]
        sides = [Side.of_run("x", RunTrace.from_lines(map(json.dumps, side))) for side in lines]
        assert tolerance.allows(compare(*sides).peak) == allowed


@pytest.mark.parametrize("limit", ["lots", "-1%", "2%%", "1e3", "%", "5 apples"])
def test_a_limit_that_is_none_is_told_in_words(two: tuple[Path, Path], limit: str) -> None:
    result = run(*two, "--fail-over", limit)
    assert result.exit_code == 2
    assert "neither a share" in " ".join(result.stderr.replace("│", " ").split())


def test_the_terminal_shows_what_grew_the_largest_first(two: tuple[Path, Path]) -> None:
    shown = run(*two).stdout
    assert "The peak grew by 3.00 MiB (+17.6%): most of it activations, +4.00 MiB." in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["model.a", "12.00", "MiB", "16.00", "MiB", "+4.00", "MiB", "+33.3%"] in lines
    assert ["model.c", "·", "7", "B", "+7", "B", "new"] in lines
    assert lines.index(["model.c", "·", "7", "B", "+7", "B", "new"]) < lines.index(
        ["(no", "module)", "5.00", "MiB", "4.00", "MiB", "-1.00", "MiB", "-20.0%"]
    )
    assert "The peak is the same: 17.00 MiB." in run(two[0], two[0]).stdout


def test_a_run_and_its_dry_run_are_compared(tmp_path: Path) -> None:
    real = write(tmp_path / "run.jsonl", FIRST)
    dry = write(tmp_path / "dry.jsonl", FIRST, source="dry_run")
    data = json.loads(run(dry, real, "--json").stdout)
    assert (data["before"]["source"], data["after"]["source"]) == ("dry_run", "run")
    assert data["peak"]["growth_bytes"] == 0


def snapshot(file: Path, size: int) -> Path:
    frame = {"name": "train", "filename": "/home/me/train\x1b[31m.py", "line": 3}
    entry = {"action": "alloc", "addr": 4096, "size": size, "stream": 0, "time_us": 1, "frames": [frame]}
    block = {"address": 4096, "size": size, "state": "active_allocated"}
    segments = [{"device": 0, "address": 4096, "total_size": 4 * MIB, "blocks": [block]}]
    file.write_bytes(pickle.dumps({"segments": segments, "device_traces": [[entry]]}))
    return file


def test_two_snapshots_are_compared_by_call_site_too(tmp_path: Path) -> None:
    paths = snapshot(tmp_path / "a.pickle", MIB), snapshot(tmp_path / "b.pickle", 2 * MIB)
    data = json.loads(run(*paths, "--json").stdout)
    (site,) = data["sites"]
    assert site["name"].endswith(".py:3 train")
    assert (site["before_bytes"], site["after_bytes"]) == (MIB, 2 * MIB)
    assert data["peak"]["growth_bytes"] == MIB
    assert (data["before"]["source"], data["reserved"]["growth_bytes"]) == ("snapshot", 0)
    assert "\x1b" not in run(*paths).stdout


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real snapshots are not here")
def test_two_real_snapshots() -> None:
    comparison = compare(read_side(SHARED / "toy.pickle"), read_side(SHARED / "transformer_fullstep.pickle"))
    assert comparison.categories[0].name == "optimizer_states"
    assert sum(change.growth_bytes for change in comparison.categories) == comparison.peak.growth_bytes
    assert len(comparison.sites) > 5


def test_the_moment_of_an_out_of_memory_counts_where_it_was_the_highest(tmp_path: Path) -> None:
    oom = {
        "record": "oom",
        "step": 5,
        "error": "OutOfMemoryError: x",
        "phase": "forward",
        "module": "model.a",
        "requested_bytes": 1,
        "traced": True,
        "bytes": 30 * MIB,
        "allocator_bytes": 30 * MIB,
        "categories": levels(activations=30 * MIB),
        "roles": {},
        "modules": {},
        "reserved_bytes": 31 * MIB,
        "free_bytes": MIB,
        "suggestions": [],
    }
    failed = read_side(write(tmp_path / "failed.jsonl", FIRST, more=[oom]))
    assert (failed.peak.bytes, failed.peak.step, failed.reserved_peak_bytes) == (30 * MIB, 5, 31 * MIB)
    untraced = read_side(write(tmp_path / "untraced.jsonl", FIRST, more=[{**oom, "traced": False}]))
    assert untraced.peak.bytes == 17 * MIB + 3
    first_step = read_side(write(tmp_path / "first.jsonl", more=[oom]))
    assert (first_step.peak.bytes, first_step.peak.phase) == (30 * MIB, "forward")


HOSTILE = "model.\x1b]0;owned\x07\x1b[2J\u202e[bold]"


def test_names_cannot_act_on_a_terminal(tmp_path: Path) -> None:
    hostile = step(1, {HOSTILE: {"weights": 5 * MIB}}, {HOSTILE: phase(weights=5 * MIB)})
    hostile["peak"]["roles"] = {f"weights/{HOSTILE}": 5 * MIB}
    paths = write(tmp_path / "a" / "\x1b[31mA.jsonl", hostile), write(tmp_path / "b.jsonl", FIRST)
    for order in (paths, paths[::-1]):
        result = run(*order, "--fail-over", "1 B")
        assert not set(result.stdout) & {"\x1b", "\x07", "\u202e"}
        assert "\\x1b]0;owned\\x07\\x1b[2J\\u202e[bold]" in "".join(result.stdout.split())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a MemTrace record"),
        (b'{"a": 1}\n', "not a MemTrace record"),
        (b"\xff\xfe\x00garbage", "not a MemTrace record"),
        (b'{"record": "run", "schema": 99}\n', "newer than this trl_memtrace reads"),
        (b'{"record": "run", "schema": 1}\n', "no step of it was traced"),
        (b'{"record": "run", "schema": 1}\n' + json.dumps(step(1, {"m": {"weights": 10**30}}, {})).encode(), "traced"),
        (pickle.dumps([1, 2]), "not a memory snapshot"),
        (pickle.dumps({"segments": [], "device_traces": []}), "no history"),
        (pickle.dumps(Path("x")), "no class"),
        (b"\x80\x04\x95", "cut short"),
        (b"\x80\x04?", "damaged"),
    ],
)
def test_what_is_no_record_is_one_clear_line(tmp_path, monkeypatch, capsys, two, content: bytes, words: str) -> None:
    bad = tmp_path / "bad\x1b[31m"
    bad.write_bytes(content)
    for arguments in ((bad, two[0]), (two[0], bad)):
        assert run_main(monkeypatch, *arguments) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.count("\n") == 1
        assert words in told.err
        assert "\x1b" not in told.err


def test_a_record_that_is_not_there_is_one_clear_line(tmp_path, monkeypatch, capsys, two) -> None:
    assert run_main(monkeypatch, two[0], tmp_path / "nothing") == 2
    assert "no record at" in capsys.readouterr().err


class Cells(html.parser.HTMLParser):
    """The rows of all tables of a page, its whole text, and what it would fetch or run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.text = ""
        self.fetched: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self._skipped = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._skipped += tag in ("style", "script")
        for name, value in attributes:
            if name in ("src", "href") and not (value or "").startswith(("#", "data:")):
                self.fetched.append((tag, value))
            assert not name.startswith("on")
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._skipped -= tag in ("style", "script")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.text += data
            if self.rows and self.rows[-1]:
                self.rows[-1][-1] += data.replace("\xa0", " ").rstrip("\n")


def page_of(file: Path, *paths: Path, **options: str) -> Cells:
    more = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    result = run(*paths, "--html", file, *more)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Cells(file.read_text(encoding="utf-8"))


def test_the_page_says_what_the_terminal_says_and_stands_alone(two: tuple[Path, Path], tmp_path: Path) -> None:
    page = page_of(tmp_path / "new" / "diff.html", *two, fail_over="2%")
    assert "The peak grew by 3.00 MiB (+17.6%): most of it activations, +4.00 MiB." in page.text
    assert "more than the 2% allowed" in page.text
    rows = {row[0]: row[1:] for row in page.rows if len(row) == 5}
    assert rows["activations"] == ["2.00 MiB", "6.00 MiB", "+4.00 MiB", "+200.0%"]
    assert rows["model.a"] == ["12.00 MiB", "16.00 MiB", "+4.00 MiB", "+33.3%"]
    assert rows["optimizer"] == ["-", "1.00 MiB", "+1.00 MiB", "new"]
    assert rows["(no module)"][2] == "-1.00 MiB"
    assert "communication" not in rows  # neither has any
    assert page.fetched == []
    assert "script" not in page.tags
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["diff.html"]


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script><img src=x onerror=y>\x1b[2J"
    record = step(1, {hostile: {"weights": 5 * MIB}}, {hostile: phase(weights=5 * MIB)})
    record["peak"]["roles"] = {f"weights/{hostile}": 5 * MIB}
    evil = write(tmp_path / "<i>\x1b[2J.jsonl", record)
    for paths in ((evil, write(tmp_path / "b.jsonl", FIRST)), (write(tmp_path / "b.jsonl", FIRST), evil)):
        page = page_of(tmp_path / "diff.html", *paths)
        assert not {"script", "img", "i"} & set(page.tags)
        assert page.text.count("<script>alert(1)</script><img src=x onerror=y>\\x1b[2J") >= 3
        assert "\x1b" not in page.text


def test_a_page_of_many_modules_names_those_that_changed_most(tmp_path: Path) -> None:
    many = step(1, {f"m.{number}": {"weights": number + 1} for number in range(300)}, {})
    page = page_of(
        tmp_path / "diff.html", write(tmp_path / "a.jsonl", step(1, {}, {})), write(tmp_path / "b.jsonl", many)
    )
    named = [row for row in page.rows if row[0].startswith("m.")]
    assert [row[0] for row in named] == [f"m.{number}" for number in range(299, 239, -1)]
    (rest,) = (row for row in page.rows if row[0] == "240 more")
    assert rest[3] == f"+{sum(range(1, 241)) / 1024:.2f} KiB"


def test_a_page_that_cannot_be_written_is_one_clear_line(two, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert run_main(monkeypatch, *two, "--html", tmp_path / "file" / "diff.html") == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert "cannot write" in told.err
