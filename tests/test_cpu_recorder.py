"""The CPU recorder, on what the profiler keeps quiet about."""

from __future__ import annotations

import threading

import numpy as np
import torch

from trl_memtrace.recorders.cpu import CpuRecorder

SIZE = 3 * 2**20


def let_go(holder: list[torch.Tensor]) -> None:
    """Drop a tensor on a thread of its own, whose frees the profiler does not see."""
    thread = threading.Thread(target=holder.clear)
    thread.start()
    thread.join()


def changes(recording, address: int) -> list[int]:
    events = recording.events
    return [1 if size > 0 else -1 for size in events.size[events.address == address].tolist()]


def test_what_another_thread_lets_go_of_ends_where_it_did():
    recorder = CpuRecorder()
    recorder.start()
    holder = [torch.empty(SIZE, dtype=torch.uint8)]
    address = holder[0].data_ptr()
    recorder.watch([holder[0].untyped_storage()])
    before = torch.empty(SIZE // 3, dtype=torch.uint8)
    let_go(holder)
    after = torch.empty(SIZE // 2, dtype=torch.uint8)
    recording = recorder.stop()
    recorder.close()
    assert changes(recording, address)[:2] == [1, -1]  # it may be given out again
    events = recording.events
    first = np.flatnonzero(events.address == before.data_ptr())[0]
    end = np.flatnonzero((events.address == address) & (events.size < 0))[0]
    last = np.flatnonzero((events.address == after.data_ptr()) & (events.size > 0))[-1]
    assert first < end < last
    level = np.cumsum(recording.reported)  # the profiler's own count, which never falls by what it did not see
    assert level[end] == SIZE // 3
    assert level[last] == SIZE // 3 + SIZE // 2


def test_what_the_profiler_saw_end_is_not_ended_twice_and_what_comes_to_its_place_lives_on():
    recorder = CpuRecorder()
    recorder.start()
    first = torch.empty(SIZE, dtype=torch.uint8)
    address = first.data_ptr()
    recorder.watch([first.untyped_storage()])
    del first
    others = [torch.empty(SIZE, dtype=torch.uint8) for _ in range(4)]
    recording = recorder.stop()
    recorder.close()
    came = any(other.data_ptr() == address for other in others)
    assert changes(recording, address) == ([1, -1, 1] if came else [1, -1])
