"""The record: its schema key for key, its way to disk and back, and what is read of a damaged one."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_memtrace.attribution import fold_modules
from trl_memtrace.categories import Category, Phase
from trl_memtrace.errors import RecordError
from trl_memtrace.records import (
    UNTRACED,
    FailureRecord,
    Peak,
    PhaseRecord,
    RunHeader,
    RunTrace,
    StepRecord,
    Suggestion,
    Summary,
    category_table,
    dump_line,
    record_name,
)

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

CATEGORIES = {
    "weights",
    "gradients",
    "optimizer_states",
    "activations",
    "inputs",
    "temporaries",
    "communication",
    "unattributed",
}
PHASE_KEYS = {"peak_bytes", "end_bytes", "at_peak", "at_end"}
PEAK_KEYS = {"phase", "bytes", "allocator_bytes", "categories", "roles", "modules"}
RUN_KEYS = {"record", "schema", "source", "device", "versions", "model", "trainer", "args"}
STEP_KEYS = {"record", "step", "traced", "phases", "peak", "reserved_bytes", "seconds"}
SUMMARY_KEYS = {
    *(
        "record",
        "schema",
        "source",
        "steps",
        "peak",
        "phases",
        "end",
        "device",
        "fits",
        "unattributed_bytes",
        "growth",
    ),
    *("allocated_peak_bytes", "reserved_peak_bytes", "reserved_end_bytes", "context_bytes", "process_peak_bytes"),
}
BEYOND_THE_SCHEMA = {"tracing_seconds", "traced_steps"}

HEADER = RunHeader(device={"name": "Zürich"}, versions={"torch": "2.13.0"}, args={"learning_rate": 1e-4})

sizes = st.integers(0, 2**40)
seconds = st.integers(0, 10**9).map(lambda micros: micros / 10**6)
tables = sizes.map(lambda size: {name: size + number for number, name in enumerate(sorted(CATEGORIES))})
phase_records = st.builds(PhaseRecord, sizes, sizes, tables, tables)
peaks = st.builds(
    Peak,
    phase=st.sampled_from(Phase),
    bytes=sizes,
    allocator_bytes=sizes,
    categories=tables,
    roles=st.dictionaries(st.sampled_from(["weights/frozen", "gradients/adapter"]), sizes),
    modules=st.dictionaries(
        st.text(max_size=4), st.dictionaries(st.sampled_from(sorted(CATEGORIES)), sizes), max_size=3
    ),
)
traced_steps = st.builds(
    StepRecord,
    step=st.integers(1, 10**6),
    traced=st.just(True),
    phases=st.dictionaries(st.sampled_from([phase.value for phase in Phase]), phase_records, min_size=1, max_size=4),
    peak=peaks,
    reserved_bytes=st.none() | sizes,
    seconds=seconds,
    tracing_seconds=seconds,
)
counted_steps = st.builds(
    StepRecord,
    step=st.integers(1, 10**6),
    traced=st.just(False),
    phases=st.just({}),
    peak=st.builds(Peak, bytes=sizes, allocator_bytes=sizes) | st.just(Peak()),
    reserved_bytes=st.none() | sizes,
    seconds=seconds,
)
steps = traced_steps | counted_steps


def traced_step(number: int, size: int = 100) -> StepRecord:
    table = category_table({Category.WEIGHTS: size})
    phases = {name: PhaseRecord(size, size, table, table) for name in ("forward", "backward")}
    peak = Peak(Phase.BACKWARD, size, size, table, {"weights/frozen": size}, {"embed": {"weights": size}})
    return StepRecord(number, True, phases, peak, 2 * size, 0.25)


def lines_of(*records: RunHeader | StepRecord) -> list[str]:
    return [dump_line(record.to_json()) for record in records]


class TestSchema:
    def test_a_run_has_exactly_its_keys(self) -> None:
        assert HEADER.to_json().keys() == RUN_KEYS
        assert HEADER.to_json()["record"] == "run"
        assert HEADER.to_json()["schema"] == 1

    @given(steps)
    def test_a_step_has_exactly_its_keys(self, step: StepRecord) -> None:
        data = json.loads(dump_line(step.to_json()))
        assert data.keys() - BEYOND_THE_SCHEMA == STEP_KEYS
        assert data["record"] == "step"
        assert data["peak"].keys() == PEAK_KEYS
        assert data["peak"]["categories"].keys() == CATEGORIES
        for phase in data["phases"].values():
            assert phase.keys() == PHASE_KEYS
            assert phase["at_peak"].keys() == phase["at_end"].keys() == CATEGORIES

    @given(st.lists(steps, max_size=4))
    def test_a_summary_has_exactly_its_keys_even_of_no_step_at_all(self, run: list[StepRecord]) -> None:
        data = json.loads(dump_line(RunTrace(HEADER, run).summary.to_json()))
        assert data.keys() - BEYOND_THE_SCHEMA - {"seconds"} == SUMMARY_KEYS
        assert data["record"] == "summary"
        assert data["peak"].keys() == {*PEAK_KEYS, "step"}
        assert data["peak"]["categories"].keys() == CATEGORIES
        assert data["end"].keys() == {"bytes", "categories"}
        assert data["end"]["categories"].keys() == CATEGORIES
        assert all(phase.keys() == PHASE_KEYS for phase in data["phases"].values())

    def test_categories_of_a_counted_step_are_all_there_and_unknown(self) -> None:
        assert dict.fromkeys(CATEGORIES) == UNTRACED
        assert Peak().to_json()["categories"] == UNTRACED

    def test_a_category_table_names_all_and_holds_zero_for_the_rest(self) -> None:
        assert category_table({Category.INPUTS: 7}) == {**dict.fromkeys(CATEGORIES, 0), "inputs": 7}

    def test_names_of_files_sort_by_rank(self) -> None:
        assert record_name(0) == "rank-00000.jsonl"
        assert record_name(12) == "rank-00012.jsonl"


class TestRoundTrip:
    @given(steps)
    def test_a_step_comes_back_as_it_was(self, step: StepRecord) -> None:
        assert StepRecord.from_json(json.loads(dump_line(step.to_json()))) == step

    def test_a_header_comes_back_as_it_was(self) -> None:
        header = RunHeader(
            "dry_run", {"name": "A100"}, {"torch": "2.13.0"}, {"layers": 32}, {"kind": "SFT"}, {"lr": 1e-4}
        )
        assert RunHeader.from_json(json.loads(dump_line(header.to_json()))) == header

    @given(st.lists(steps, unique_by=lambda step: step.step, max_size=5))
    def test_a_run_comes_back_in_order_and_every_line_is_one(self, run: list[StepRecord]) -> None:
        lines = lines_of(HEADER, *run)
        assert all(line.count("\n") == 1 and line.endswith("\n") for line in lines)
        loaded = RunTrace.from_lines(lines)
        assert loaded.header == HEADER
        assert list(loaded) == sorted(run, key=lambda step: step.step)
        assert len(loaded) == len(run)
        assert loaded.damaged_lines == 0

    @pytest.mark.parametrize("text", ["\ud800", "Zürich", "\u2028", "\x00", "\n"])
    def test_any_text_can_be_written_as_utf_8(self, text: str) -> None:
        line = dump_line(RunHeader(args={"output_dir": text}).to_json())
        assert json.loads(line.encode("utf-8").decode("utf-8"))["args"]["output_dir"] == text

    def test_what_json_does_not_know_is_written_as_text(self) -> None:
        assert json.loads(dump_line({"dir": Path("out"), "phase": Phase.LOSS})) == {"dir": "out", "phase": "loss"}


class TestDamage:
    def test_a_record_cut_anywhere_gives_every_whole_line(self, tmp_path: Path) -> None:
        lines = [
            line.encode() for line in lines_of(HEADER, traced_step(1), StepRecord(2, False, {}, Peak(), None, 0.1))
        ]
        whole, file = b"".join(lines), tmp_path / record_name(0)
        ends = [len(b"".join(lines[: count + 1])) - 1 for count in range(len(lines))]  # the newline may be lost
        for cut in range(len(whole) + 1):
            file.write_bytes(whole[:cut])
            count = sum(end <= cut for end in ends)
            if count == 0:
                with pytest.raises(RecordError, match="not a MemTrace record"):
                    RunTrace.load(file)
            else:
                run = RunTrace.load(file)
                assert [step.step for step in run] == [1, 2][: count - 1]
                torn = cut > ends[count - 1] + 1 and cut not in ends
                assert run.damaged_lines == torn

    @pytest.mark.parametrize(
        "damage",
        [
            '{"record":"step","st',
            "\x00\x00\x00",
            "\ufffd",
            "null",
            "[1]",
            "7",
            '"record"',
            "{}",
            '{"record":"step"}',
            '{"record":"step","step":9,"traced":true,"phases":[],"peak":{},"reserved_bytes":0,"seconds":0}',
            "[" * 100_000,
        ],
    )
    def test_a_damaged_line_is_counted_and_costs_only_itself(self, damage: str) -> None:
        header, first, second = lines_of(HEADER, traced_step(1), traced_step(2))
        run = RunTrace.from_lines([header, first, damage + "\n", second])
        assert [step.step for step in run] == [1, 2]
        assert run.damaged_lines == 1

    @given(st.data())
    def test_a_step_with_anything_in_any_place_is_damaged_or_usable(self, data: st.DataObject) -> None:
        step = json.loads(dump_line(traced_step(3).to_json()))
        place: dict = step
        while True:
            key = data.draw(st.sampled_from(sorted(place.keys() - {"record"})))
            if not isinstance(place[key], dict) or data.draw(st.booleans()):
                break
            place = place[key]
        place[key] = data.draw(st.sampled_from([None, "x", [], {}, {"x": "y"}, -1.5, [[1]], True]))
        run = RunTrace.from_lines([*lines_of(HEADER, traced_step(1)), json.dumps(step) + "\n"])
        assert len(run) + run.damaged_lines == 2
        assert json.loads(dump_line(run.summary.to_json()))["steps"] == len(run)
        assert len(run.to_pandas()) == len(run)

    @pytest.mark.parametrize("field", ["device", "versions", "model", "trainer", "args"])
    def test_a_header_with_something_else_in_a_field_is_damaged(self, field: str) -> None:
        header = dump_line({**HEADER.to_json(), field: 5})
        with pytest.raises(RecordError, match="no line of a run"):
            RunTrace.from_lines([header])

    @pytest.mark.parametrize(
        "content", [b"", b"\n\n", b"step,loss\n1,2.5\n", b"\x80\x05\x95pickle\x00", b'{"a": 1}\n']
    )
    def test_an_empty_or_foreign_file_is_refused_by_name(self, tmp_path: Path, content: bytes) -> None:
        file = tmp_path / "log.jsonl"
        file.write_bytes(content)
        with pytest.raises(RecordError, match=r"log\.jsonl: this is not a MemTrace record"):
            RunTrace.load(file)

    def test_a_newer_schema_is_refused_with_what_to_do(self, tmp_path: Path) -> None:
        file = tmp_path / record_name(0)
        file.write_text(dump_line({**HEADER.to_json(), "schema": 2}))
        with pytest.raises(RecordError, match=r"schema 2 is newer .* upgrade trl_memtrace"):
            RunTrace.load(file)

    def test_records_of_other_kinds_are_passed_over(self) -> None:
        others = ['{"record":"something newer"}\n', '{"record":"summary"}\n']
        run = RunTrace.from_lines([*lines_of(HEADER, traced_step(1)), *others])
        assert len(run) == 1
        assert run.damaged_lines == 0


class TestLoad:
    @pytest.fixture
    def output_dir(self, tmp_path: Path) -> Path:
        folder = tmp_path / "memtrace"
        folder.mkdir()
        for rank in (0, 3):
            lines = lines_of(HEADER, traced_step(1, size=100 + rank))
            (folder / record_name(rank)).write_text("".join(lines), encoding="utf-8")
        return tmp_path

    @pytest.mark.parametrize("place", [".", "memtrace", "memtrace/rank-00000.jsonl"])
    def test_the_output_folder_the_record_folder_and_the_file_all_do(self, output_dir: Path, place: str) -> None:
        assert RunTrace.load(output_dir / place).peak.bytes == 100
        assert RunTrace.load(str(output_dir / place)).rank == 0

    @pytest.mark.parametrize("place", [".", "memtrace"])
    def test_of_a_folder_the_rank_asked_for_is_read(self, output_dir: Path, place: str) -> None:
        run = RunTrace.load(output_dir / place, rank=3)
        assert run.peak.bytes == 103
        assert run.rank == 3

    def test_a_file_says_itself_whose_it_is(self, output_dir: Path) -> None:
        assert RunTrace.load(output_dir / "memtrace" / "rank-00003.jsonl").rank == 3

    @pytest.mark.parametrize("place", ["nowhere", "x" * 5000, "memtrace/rank-00001.jsonl"])
    def test_what_is_not_there_is_refused_with_what_to_give(self, output_dir: Path, place: str) -> None:
        with pytest.raises(RecordError, match=r"no record at .*OUTPUT_DIR/memtrace"):
            RunTrace.load(output_dir / place)

    def test_a_folder_without_the_rank_is_refused(self, output_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(RecordError, match="no record at"):
            RunTrace.load(output_dir, rank=1)

    def test_a_resumed_run_has_its_last_header_and_the_last_word_on_every_step(self) -> None:
        resumed = RunHeader(args={"resume": True})
        before = [traced_step(number, size=10) for number in (1, 2, 3)]
        after = [traced_step(number, size=20) for number in (2, 3, 4)]
        run = RunTrace.from_lines(lines_of(HEADER, *before, resumed, *after))
        assert run.header == resumed
        assert [(step.step, step.peak.bytes) for step in run] == [(1, 10), (2, 20), (3, 20), (4, 20)]


class TestSummary:
    @given(st.lists(steps, max_size=6))
    def test_built_step_by_step_it_is_what_the_whole_run_says(self, run: list[StepRecord]) -> None:
        summary = Summary(HEADER)
        for step in run:
            summary.add(step)
        data = summary.to_json()
        traced = [step for step in run if step.traced]

        assert data == RunTrace(HEADER, run).summary.to_json()
        assert (data["steps"], data["traced_steps"]) == (len(run), len(traced))
        assert data["seconds"] == pytest.approx(sum(step.seconds for step in run), abs=1e-5)
        assert data["tracing_seconds"] == pytest.approx(sum(step.tracing_seconds for step in run), abs=1e-5)
        worst = max(traced or run, key=lambda step: step.peak.bytes or 0, default=None)
        if worst is not None:
            assert data["peak"] == {**worst.peak.to_json(), "step": worst.step}
            assert data["unattributed_bytes"] == worst.peak.categories["unattributed"]
        end = list(traced[-1].phases.values())[-1] if traced else None
        assert data["end"] == {
            "bytes": end.end_bytes if end else None,
            "categories": end.at_end if end else dict.fromkeys(CATEGORIES),
        }
        assert data["phases"].keys() == {name for step in run for name in step.phases}
        for name, phase in data["phases"].items():
            met = [step.phases[name] for step in run if name in step.phases]
            assert phase == max(met, key=lambda record: record.peak_bytes).to_json()
        reserved = [step.reserved_bytes for step in run]
        assert data["reserved_end_bytes"] == (reserved[-1] if run else None)
        assert data["reserved_peak_bytes"] == max((size for size in reserved if size is not None), default=None)
        allocated = [step.peak.allocator_bytes for step in run if step.peak.allocator_bytes is not None]
        assert data["allocated_peak_bytes"] == max(allocated, default=None)

    def test_a_traced_step_outranks_a_larger_one_that_was_only_counted(self) -> None:
        counted = StepRecord(2, False, {}, Peak(bytes=500, allocator_bytes=500), None, 0.1)
        summary = RunTrace(steps=[traced_step(1), counted]).summary
        assert summary.peak.step == 1
        assert summary.allocated_peak_bytes == 500


class TestPandas:
    def test_there_is_one_row_a_step_and_one_column_a_category_and_phase(self) -> None:
        counted = StepRecord(2, False, {}, Peak(), None, 0.5)
        table = RunTrace(steps=[traced_step(1), counted]).to_pandas()
        assert set(table) == {
            *("step", "traced", "seconds", "reserved_bytes", "peak_bytes", "peak_phase"),
            *(f"peak_{name}" for name in CATEGORIES),
            *("forward_peak_bytes", "backward_peak_bytes"),
        }
        assert table["step"].tolist() == [1, 2]
        assert table["peak_weights"][0] == table["forward_peak_bytes"][0] == 100
        assert table["peak_phase"][0] == "backward"
        assert table.loc[1, ["peak_bytes", "peak_weights", "forward_peak_bytes", "peak_phase"]].isna().all()

    def test_without_pandas_it_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(ImportError, match="pandas"):
            RunTrace(steps=[traced_step(1)]).to_pandas()


class TestSize:
    PARTS = (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )

    def lora_modules(self, size: int) -> dict[str, dict[Category, int]]:
        """A 32-layer decoder with LoRA on every projection, every module with all it can hold."""
        held = (Category.WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER_STATES, Category.ACTIVATIONS)
        prefix = "base_model.model.model"
        modules = {"": {Category.INPUTS: size, Category.TEMPORARIES: size}, f"{prefix}.embed_tokens": {held[0]: size}}
        for layer in range(32):
            for part in ("input_layernorm", "post_attention_layernorm"):
                modules[f"{prefix}.layers.{layer}.{part}"] = dict.fromkeys((held[0], held[3]), size)
            for number, part in enumerate(self.PARTS):
                name = f"{prefix}.layers.{layer}.{part}"
                modules[name] = {Category.ACTIVATIONS: size, Category.TEMPORARIES: size}
                modules[f"{name}.base_layer"] = {held[0]: size, held[3]: size}
                for adapter in ("lora_A.default", "lora_B.default"):
                    modules[f"{name}.{adapter}"] = dict.fromkeys(held, size // (number + 1))
        return modules

    def traced(self, number: int, limit: int) -> StepRecord:
        size = 80 * 1024**3 - number
        table = category_table(dict.fromkeys(Category, size))
        modules = fold_modules(self.lora_modules(size), limit)
        roles = [f"{category.value}/{kind}" for category in Category for kind in ("adapter", "attention", "embedding")]
        peak = Peak(
            Phase.BACKWARD,
            size,
            size,
            table,
            dict.fromkeys(roles, size),
            {name: {kind.value: held for kind, held in row.items()} for name, row in modules.items()},
        )
        phases = {phase.value: PhaseRecord(size, size, table, table) for phase in Phase}
        return StepRecord(number, True, phases, peak, size, 0.123456, 0.012345)

    def test_over_10_000_steps_a_counted_line_is_under_2_kb_and_a_traced_one_under_20(self, tmp_path: Path) -> None:
        from trl_memtrace.bookkeeping import MAX_MODULES

        assert MAX_MODULES == 64
        summary, longest = Summary(HEADER), {True: 0, False: 0}
        file = tmp_path / record_name(0)
        with file.open("w", encoding="utf-8") as record:
            record.write(dump_line(HEADER.to_json()))
            for number in range(1, 10_001):
                if number <= 3 or number % 100 == 0:
                    step = self.traced(number, MAX_MODULES)
                else:
                    peak = Peak(Phase.BACKWARD, 80 * 1024**3, 80 * 1024**3)
                    step = StepRecord(number, False, {}, peak, 80 * 1024**3, 0.123456, 0.012345)
                summary.add(step)
                line = dump_line(step.to_json())
                longest[step.traced] = max(longest[step.traced], len(line.encode()))
                record.write(line)

        assert 0 < longest[False] < 2_000
        assert 10_000 < longest[True] < 20_000
        run = RunTrace.load(file)
        assert len(run) == 10_000
        assert run.summary.to_json() == summary.to_json()
        assert len(dump_line(summary.to_json())) < 20_000


def test_a_failure_reads_back_as_it_was_written():
    peak = Peak(phase=Phase.BACKWARD, bytes=7, allocator_bytes=7, categories=category_table({Category.WEIGHTS: 7}))
    failure = FailureRecord(
        step=2,
        out_of_memory=True,
        error="OutOfMemoryError: no",
        phase=Phase.BACKWARD,
        module="model.layers.0",
        requested_bytes=5,
        peak=peak,
        traced=True,
        suggestions=(Suggestion("do this", "because", 3),),
    )
    line = json.dumps(failure.to_json())
    assert RunTrace.from_lines([*lines_of(HEADER), line]).failure == failure
    assert RunTrace.from_lines([*lines_of(HEADER), '{"record":"oom"}']).damaged_lines == 1
    other = json.dumps(replace(failure, out_of_memory=False).to_json())
    assert json.loads(other)["record"] == "failure"
    assert RunTrace.from_lines([*lines_of(HEADER), line, other, *lines_of(HEADER)]).failure is None
