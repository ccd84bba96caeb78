"""Books on disk are the books that were kept."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from trl_memtrace import MemoryTracer, MemTrace, RunTrace
from trl_memtrace.errors import RecordError
from trl_memtrace.step_books import StepBooks, peak_books_path


@pytest.fixture(scope="module")
def traced() -> MemoryTracer:
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    tracer = MemoryTracer(model, optimizer)
    for rows in (16, 512, 32):
        with tracer.step():
            model(torch.randn(rows, 64)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    tracer.close()
    return tracer


def test_the_books_of_the_highest_step_are_kept(traced: MemoryTracer) -> None:
    kept, peak = traced.peak_books, traced.run.peak
    assert kept is not None
    assert (kept.step, kept.peak_bytes) == (peak.step, peak.bytes) == (2, peak.allocator_bytes)


def test_books_come_back_as_they_were(traced: MemoryTracer, tmp_path: Path) -> None:
    kept = traced.peak_books
    assert kept is not None
    kept.save(tmp_path / "step.npz")
    back = StepBooks.load(tmp_path / "step.npz")
    instant = back.books.peak(back.books.spans)
    assert dict(traced.run.peak.categories) == {
        category.value: size for category, size in back.books.categories_at(instant).items()
    }
    assert back.books.modules_at(instant) == kept.books.modules_at(instant)
    assert [span.phase for span in back.books.spans] == [span.phase for span in kept.books.spans]
    np.testing.assert_array_equal(back.books.ledger.time_ns, kept.books.ledger.time_ns)
    assert list(back.timeline.module_names) == list(kept.timeline.module_names)
    assert [path.name for path in tmp_path.iterdir()] == ["step.npz"]


def test_memtrace_writes_them_beside_the_record(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    callback = MemTrace(print_table=False)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.path is not None
    books = StepBooks.of_record(callback.path)
    assert books is not None
    assert books.peak_bytes == RunTrace.load(tmp_path).peak.allocator_bytes


def test_what_is_no_books_file_is_said_so(traced: MemoryTracer, tmp_path: Path) -> None:
    kept, path = traced.peak_books, tmp_path / "step.npz"
    assert kept is not None
    assert StepBooks.of_record(tmp_path / "rank-00000.jsonl") is None
    kept.save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for damaged in (b"", b"not a zip", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(damaged)
        with pytest.raises(RecordError):
            StepBooks.load(path)
    for _ in range(50):
        bytes_ = bytearray(whole)
        for place in rng.integers(0, len(whole), 5):
            bytes_[place] ^= 0xFF
        path.write_bytes(bytes(bytes_))
        with contextlib.suppress(RecordError):
            StepBooks.load(path)
    np.savez(path, version=np.int64(2))
    with pytest.raises(RecordError, match="newer"):
        StepBooks.load(path)
    assert peak_books_path("a/rank-00003.jsonl") == Path("a/rank-00003.peak.npz")
