"""A run watched while it trains: the reading of a file that grows, the frame, the command in a shell of its own."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_comparison import FIRST, HOSTILE, SECOND, phase, step
from typer.testing import CliRunner

import trl_memtrace
from trl_memtrace import MemTrace, RunTrace, commands
from trl_memtrace.errors import RecordError
from trl_memtrace.live import LiveRun, Tail, read_on
from trl_memtrace.reporters.live_text import frame, sparkline

MIB = 1024**2
ROOT = Path(trl_memtrace.__file__).parent.parent
HEADER = {"record": "run", "schema": 1, "source": "run", "model": {"class": "Tiny"}, "device": {"type": "cpu"}}
SUMMARY = {"record": "summary", "schema": 1}


def lines(*records: dict[str, Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def text_of(run: LiveRun, width: int = 100, quiet: float | None = None) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(frame(run, Path("/runs/a.jsonl"), quiet, width))
    return console.file.getvalue()


def watched(content: bytes) -> LiveRun:
    run = LiveRun()
    for line in content.decode().splitlines():
        run.take(line)
    return run


@settings(deadline=None)
@given(st.lists(st.integers(1, 400), max_size=30))
def test_however_the_file_grows_what_is_seen_is_what_is_in_it(tmp_path_factory, cuts: list[int]) -> None:
    file = tmp_path_factory.mktemp("tail") / "rank-00000.jsonl"
    whole = lines(HEADER, FIRST, SECOND | {"step": 5, "note": "\u00e9\u4e16"}, SUMMARY)
    file.write_bytes(b"")
    tail, run, place = Tail(file), LiveRun(), 0
    for cut in [*cuts, len(whole)]:
        with file.open("ab") as out:
            out.write(whole[place : place + cut])
        place += cut
        run = read_on(tail, run)
    read = RunTrace.load(file)
    assert (run.finished, run.damaged_lines, run.summary.steps) == (True, 0, len(read))
    assert run.summary.to_json() == read.summary.to_json()
    assert list(run.recent) == [record.peak.bytes for record in read]


def test_a_torn_last_line_waits_for_its_end(tmp_path: Path) -> None:
    file = tmp_path / "rank-00000.jsonl"
    torn = lines(HEADER, FIRST, SECOND)
    file.write_bytes(torn[:-10])
    tail = Tail(file)
    run = read_on(tail, LiveRun())
    assert (run.summary.steps, run.damaged_lines) == (1, 0)
    with file.open("ab") as out:
        out.write(torn[-10:])
    assert read_on(tail, run).summary.steps == 2


def test_a_run_that_begins_anew_in_the_same_place_is_another_run(tmp_path: Path) -> None:
    file = tmp_path / "rank-00000.jsonl"
    file.write_bytes(lines(HEADER, FIRST, SECOND, SUMMARY))
    tail = Tail(file)
    run = read_on(tail, LiveRun())
    assert run.finished
    file.write_bytes(lines(HEADER))  # opened anew and truncated
    run = read_on(tail, run)
    assert (run.finished, run.summary.steps) == (False, 0)
    other = tmp_path / "other"
    other.write_bytes(lines(HEADER, FIRST, SECOND, SECOND, SECOND))
    other.replace(file)  # put in its place, and longer
    assert read_on(tail, run).summary.steps == 4


def test_a_run_that_is_resumed_goes_on_behind_its_end() -> None:
    run = watched(lines(HEADER, FIRST, SUMMARY, HEADER, SECOND))
    assert (run.finished, run.summary.steps, run.last and run.last.step) == (False, 1, 2)


def test_a_damaged_line_is_counted_and_passed_over() -> None:
    run = watched(lines(HEADER, FIRST) + b'{"record": "step"}\n[1]\nnonsense\n' + lines(SECOND))
    assert (run.summary.steps, run.damaged_lines) == (2, 3)
    assert "3 damaged lines were passed over" in text_of(run)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"nonsense\n", "not a MemTrace record"),
        (b'{"record": "step"}\n', "not a MemTrace record"),
        (lines(FIRST), "not a MemTrace record"),
        (b'{"record": "run"}\n', "no schema"),
        (b'{"record": "run", "schema": 99}\n', "newer than this trl_memtrace reads"),
    ],
)
def test_what_is_no_record_is_one_clear_line(tmp_path, monkeypatch, capsys, content: bytes, words: str) -> None:
    file = tmp_path / "\x1b[31mbad.jsonl"
    file.write_bytes(content)
    for options in ([], ["--once"]):
        monkeypatch.setattr(sys, "argv", ["trl-memtrace", "watch", str(file), *options])
        with pytest.raises(SystemExit) as left:
            commands.main()
        assert left.value.code == 2
        told = capsys.readouterr()
        assert told.err.count("\n") == 1
        assert words in told.err
        assert "\x1b" not in told.err + told.out


def test_a_record_that_is_there_but_empty_has_not_begun(tmp_path: Path) -> None:
    (tmp_path / "rank-00000.jsonl").write_bytes(b"")
    result = CliRunner().invoke(commands.app, ["watch", str(tmp_path), "--once"])
    assert result.exit_code == 0
    assert "The run has not begun" in result.stdout
    with pytest.raises(RecordError, match="the run has not begun"):
        raise CliRunner().invoke(commands.app, ["watch", str(tmp_path / "none"), "--once"]).exception  # type: ignore[misc]


def test_the_frame_says_where_the_run_is() -> None:
    shown = text_of(watched(lines(HEADER, FIRST, SECOND, {**FIRST, "step": 9, "traced": False})))
    assert "MemTrace  Tiny" in shown
    assert "step 9, 2 of 3 traced, 0.1 s a step" in shown
    assert "Peak so far 20.00 MiB in backward of step 2" in shown
    assert "Reserved at most 24.00 MiB" in shown
    rows = {words[0]: words for line in shown.splitlines() if len(words := line.split()) > 1}
    assert rows["activations"][1:3] == ["6.00", "30.0%"]
    assert "ago" not in shown
    assert "; last line 75 s ago" in text_of(watched(lines(HEADER, FIRST)), quiet=75.2)
    assert "The run has ended." in text_of(watched(lines(HEADER, FIRST, SUMMARY)), quiet=75.2)
    assert "The run has begun; no step yet." in text_of(watched(lines(HEADER)))


def test_the_share_of_the_card_is_shown_where_there_is_one() -> None:
    device = {"type": "cuda", "name": "Card", "total_bytes": 40 * MIB}
    assert "50.0% of the card's 40.00 MiB" in text_of(watched(lines({**HEADER, "device": device}, SECOND)))


@pytest.mark.parametrize(
    ("values", "shown"), [([], ""), ([0, 0], "▁▁"), ([1, 50, 100, 99], "▁▅██"), ([7] * 9, "█████")]
)
def test_the_sparkline_is_in_proportion_to_the_highest(values: list[int], shown: str) -> None:
    assert sparkline(values, 5)[-5:] == shown


def test_a_failure_is_shown() -> None:
    oom = {
        **{key: FIRST["peak"][key] for key in ("bytes", "allocator_bytes", "categories", "roles", "modules")},
        "record": "oom",
        "step": 7,
        "error": "OutOfMemoryError: \x1b[2Jno",
        "phase": None,
        "module": "",
        "requested_bytes": 1,
        "traced": False,
        "reserved_bytes": None,
        "free_bytes": None,
        "suggestions": [],
    }
    shown = text_of(watched(lines(HEADER, FIRST, oom, SUMMARY)))
    assert "The run ran out of memory in step 7." in shown
    assert "OutOfMemoryError: \\x1b[2Jno" in shown
    assert "The run ended in an exception" in text_of(watched(lines(HEADER, FIRST, {**oom, "record": "failure"})))


def test_names_cannot_act_on_a_terminal() -> None:
    header = {
        **HEADER,
        "model": {"class": HOSTILE},
        "device": {"type": HOSTILE, "name": HOSTILE, "total_bytes": HOSTILE},
    }
    hostile = step(1, {HOSTILE: {"weights": 5}}, {HOSTILE: phase(weights=5)})
    shown = text_of(watched(lines(header, hostile)))
    assert not set(shown) & {"\x1b", "\x07", "\u202e"}
    assert "\\x1b]0;owned" in shown


def test_a_long_run_is_kept_in_bounded_memory() -> None:
    run = LiveRun()
    run.take(json.dumps(HEADER))
    record = json.dumps(FIRST)
    for _ in range(1000):
        run.take(record)
    assert (run.summary.steps, len(run.recent)) == (1000, 240)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunTrace]:
    folder = tmp_path_factory.mktemp("run")
    trainer = tiny.trainer(folder)
    callback = MemTrace(print_table=False)
    trainer.add_callback(callback)
    trainer.train()
    return folder, callback.run


def test_a_real_run_is_shown_once(trained: tuple[Path, RunTrace]) -> None:
    folder, run = trained
    for place in (folder, folder / "memtrace", folder / "memtrace" / "rank-00000.jsonl"):
        shown = CliRunner().invoke(commands.app, ["watch", str(place), "--once"]).stdout
        assert f"Peak so far {run.peak.bytes / MIB:.2f} MiB in {run.peak.phase} of step {run.peak.step}" in shown
        assert "The run has ended." in shown


class Shell:
    """The command in a process and on a terminal of its own."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self.master, slave = pty.openpty()
        code = "from trl_memtrace.commands import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "watch", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "TERM": "xterm",
                "COLUMNS": "100",
                "LINES": "50",
                **environment,
            },
        )
        os.close(slave)
        self.shown = ""

    def wait_for(self, words: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while words not in self.shown:
            assert time.monotonic() < end, self.shown
            self._read(0.2)

    def _read(self, seconds: float) -> bool:
        if not select.select([self.master], [], [], seconds)[0]:
            return True
        try:
            content = os.read(self.master, 65536)
        except OSError:  # the other end is closed
            return False
        self.shown += content.decode(errors="replace")
        return bool(content)

    def end(self, seconds: float = 20) -> int:
        last = time.monotonic() + seconds
        try:
            while self._read(0.5) and self.process.poll() is None:
                assert time.monotonic() < last, self.shown
            return self.process.wait(timeout=5)
        finally:
            self.process.kill()
            os.close(self.master)


def test_it_waits_follows_and_ends_with_the_run(tmp_path: Path) -> None:
    shell = Shell(tmp_path / "out" / "memtrace", "--interval", "0.05")
    shell.wait_for("Waiting for the run to begin")
    file = tmp_path / "out" / "memtrace" / "rank-00000.jsonl"
    file.parent.mkdir(parents=True)
    with file.open("ab", buffering=0) as out:
        out.write(lines(HEADER))
        shell.wait_for("The run has begun; no step yet.")
        out.write(lines(FIRST))
        shell.wait_for("Peak so far 17.00 MiB")
        record = lines({**SECOND, "step": 5})
        out.write(record[:50])
        time.sleep(0.2)
        out.write(record[50:])
        shell.wait_for("Peak so far 20.00 MiB")
        out.write(lines(SUMMARY))
    assert shell.end() == 0
    assert "The run has ended." in shell.shown
    assert "Traceback" not in shell.shown


def test_ctrl_c_ends_it_quietly(tmp_path: Path) -> None:
    (tmp_path / "rank-00000.jsonl").write_bytes(lines(HEADER, FIRST))
    shell = Shell(tmp_path)
    shell.wait_for("Peak so far 17.00 MiB")
    shell.process.send_signal(signal.SIGINT)
    assert shell.end() == 0
    assert "Traceback" not in shell.shown


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_without_a_terminal_the_last_frame_is_printed(tmp_path: Path, encoding: str) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from trl_memtrace.commands import main; main()",
            "watch",
            tmp_path,
            "--interval",
            "0.05",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert b"Waiting for the run" in process.stdout.readline()
    (tmp_path / "part").write_bytes(lines(HEADER, FIRST, SUMMARY))
    (tmp_path / "part").replace(tmp_path / "rank-00000.jsonl")
    shown, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, b"")
    assert shown.count(b"Peak so far 17.00 MiB") == 1
