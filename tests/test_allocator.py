"""The simulated allocator: each rule by hand, PyTorch's own answers, random programs, and real snapshots."""

from __future__ import annotations

import pickle
import random
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_memtrace.allocator import (
    DEFAULT_POOL,
    AllocatorConfig,
    CachingAllocator,
    Mismatch,
    Replay,
    SegmentEvent,
    SimulatedOutOfMemoryError,
    replay_snapshot,
)
from trl_memtrace.units import KIB, MIB

SNAPSHOTS = Path(__file__).resolve().parents[1].parent / "shared" / "fixtures" / "cuda_snapshots"


def make(text: str = "", capacity_mib: int | None = None) -> CachingAllocator:
    return CachingAllocator(AllocatorConfig.parse(text), None if capacity_mib is None else capacity_mib * MIB)


def sizes(events: list[SegmentEvent]) -> list[float]:
    return [event.size / MIB for event in events]


class TestConfig:
    def test_defaults(self) -> None:
        assert AllocatorConfig.parse("") == AllocatorConfig()

    def test_every_option(self) -> None:
        config = AllocatorConfig.parse(
            " backend:native, large_segment_size_mb:32,max_split_size_mb:64,max_non_split_rounding_mb:40,"
            "garbage_collection_threshold:0.8,roundup_power2_divisions:4,expandable_segments:True,"
            "per_process_memory_fraction:0.9,pinned_use_background_threads:True,release_lock_on_cudamalloc:True,"
        )
        assert config == AllocatorConfig(
            max_split_bytes=64 * MIB,
            max_non_split_rounding_bytes=40 * MIB,
            large_segment_bytes=32 * MIB,
            garbage_collection_threshold=0.8,
            roundup_power2_divisions=(4,) * 16,
            expandable_segments=True,
            per_process_memory_fraction=0.9,
        )

    def test_divisions_by_size(self) -> None:
        # The first entry also holds below, and ">" above the last one named.
        config = AllocatorConfig.parse("roundup_power2_divisions:[4:2,16:8,>:1]")
        assert config.roundup_power2_divisions == (2, 2, 2, 0, 8, *(1,) * 11)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("max_split_size_mb:19", r"max_split_bytes=19922944: takes large_segment_bytes \(20971520\) or more"),
            ("max_split_size_mb:big", "max_split_size_mb: 'big' is not a whole number of MiB"),
            ("max_split_size_mb", "'max_split_size_mb': takes option:value"),
            ("max_non_split_rounding_mb:1", "max_non_split_rounding_bytes=1048576: takes"),
            ("large_segment_size_mb:10", "large_segment_bytes=10485760: takes more than 10485760"),
            ("garbage_collection_threshold:1", r"garbage_collection_threshold=1.0: takes a number in \[0, 1\)"),
            ("garbage_collection_threshold:0.0", "garbage_collection_threshold: '0.0' is not above 0"),
            ("garbage_collection_threshold:nan", "garbage_collection_threshold=nan"),
            ("per_process_memory_fraction:1.5", r"per_process_memory_fraction=1.5: takes a number in \[0, 1\]"),
            ("roundup_power2_divisions:3", "roundup_power2_divisions: '3' takes a power of two"),
            ("roundup_power2_divisions:[3:4]", "roundup_power2_divisions: '.3:4.' takes a power of two"),
            ("roundup_power2_divisions:[4:3]", "roundup_power2_divisions: '.4:3.' takes a power of two"),
            ("roundup_power2_divisions:[4:2", "roundup_power2_divisions: '.4:2' takes a power of two"),
            ("expandable_segments:true", "expandable_segments: 'true' is neither True nor False"),
            ("backend:cudaMallocAsync", "backend: 'cudaMallocAsync' is not the caching allocator; takes native"),
            ("max_split:20", "'max_split' is not an allocator option; takes backend, max_split_size_mb, "),
        ],
    )
    def test_refuses(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            AllocatorConfig.parse(text)

    def test_from_snapshot(self) -> None:
        recorded = {
            "PYTORCH_CUDA_ALLOC_CONF": "per_process_memory_fraction:0.5,large_segment_size_mb:24",
            "max_split_size": 100 * MIB,
            "garbage_collection_threshold": 0.7,
            "expandable_segments": True,
            "roundup_power2_divisions": {str(1 << power): 8 for power in range(16)},
        }
        assert AllocatorConfig.from_snapshot(recorded) == AllocatorConfig(
            max_split_bytes=100 * MIB,
            large_segment_bytes=24 * MIB,
            garbage_collection_threshold=0.7,
            roundup_power2_divisions=(8,) * 16,
            expandable_segments=True,
            per_process_memory_fraction=0.5,
        )

    @pytest.mark.parametrize(
        "recorded",
        [
            {"PYTORCH_CUDA_ALLOC_CONF": "an_option_of_the_future:1", "max_split_size": -1},
            {"max_split_size": 2**63 - 1, "garbage_collection_threshold": "0.5"},
            {"max_split_size": 5, "garbage_collection_threshold": 7.0},
            {"roundup_power2_divisions": dict.fromkeys(range(16), "x"), "PYTORCH_CUDA_ALLOC_CONF": None},
        ],
    )
    def test_from_snapshot_keeps_defaults(self, recorded: dict[str, Any]) -> None:
        assert AllocatorConfig.from_snapshot(recorded) == AllocatorConfig()


class TestSizes:
    @pytest.mark.parametrize(
        ("size", "rounded"), [(1, 512), (511, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)]
    )
    def test_rounds_up_to_512(self, size: int, rounded: int) -> None:
        assert AllocatorConfig().rounded(size) == rounded

    @pytest.mark.parametrize(
        ("size", "rounded"),
        [
            (1200 * KIB, 1280 * KIB),  # 1024, 1280, 1536, 1792, 2048
            (1280 * KIB, 1280 * KIB),
            (1281 * KIB, 1536 * KIB),
            (1024 * KIB, 1024 * KIB),
            (1025, 1536),  # not above 512 bytes times 4
            (2049, 2560),
        ],
    )
    def test_power_of_two_divisions(self, size: int, rounded: int) -> None:
        assert AllocatorConfig.parse("roundup_power2_divisions:4").rounded(size) == rounded

    @pytest.mark.parametrize(
        ("mib", "rounded_mib"),
        [(65, 80), (300, 300), (511, 511), (513, 768), (800, 1024), (1025, 1152), (70_000, 73_728)],
    )
    def test_divisions_differ_by_size(self, mib: int, rounded_mib: int) -> None:
        config = AllocatorConfig.parse("roundup_power2_divisions:[128:4,256:1,512:2,>:8]")
        assert config.rounded(mib * MIB) == rounded_mib * MIB

    @pytest.mark.parametrize(
        ("size", "segment"),
        [
            (512, 2 * MIB),
            (MIB, 2 * MIB),
            (MIB + 512, 20 * MIB),
            (10 * MIB - 512, 20 * MIB),
            (10 * MIB, 10 * MIB),
            (10 * MIB + 512, 12 * MIB),
            (101 * MIB, 102 * MIB),
        ],
    )
    def test_segments(self, size: int, segment: int) -> None:
        assert AllocatorConfig().segment_bytes(size) == segment
        allocator = make()
        allocator.allocate(size)
        assert allocator.reserved_bytes == segment

    def test_large_segment_size(self) -> None:
        assert AllocatorConfig.parse("large_segment_size_mb:32").segment_bytes(2 * MIB) == 32 * MIB


class TestBlocks:
    def test_small_requests_share_a_segment(self) -> None:
        allocator = make()
        first = allocator.allocate(1000)
        assert allocator.allocate(1) == first + 1024
        assert (allocator.allocated_bytes, allocator.reserved_bytes) == (1536, 2 * MIB)

    def test_a_large_block_keeps_a_remainder_of_one_mib(self) -> None:
        allocator = make()
        allocator.allocate(19 * MIB)
        assert allocator.allocated_bytes == 20 * MIB

    def test_a_large_block_splits_off_more_than_one_mib(self) -> None:
        allocator = make()
        first = allocator.allocate(19 * MIB - 512)
        assert allocator.allocated_bytes == 19 * MIB - 512
        assert list(allocator.free_blocks()) == [(first + 19 * MIB - 512, MIB + 512)]

    def test_best_fit(self) -> None:
        allocator = make()
        large, small = allocator.allocate(40 * MIB), allocator.allocate(30 * MIB)
        allocator.free(large)
        allocator.free(small)
        assert allocator.allocate(25 * MIB) == small

    def test_of_equal_blocks_the_lowest_address(self) -> None:
        addresses = iter((1 << 40, 1 << 30, 1 << 35))
        allocator = CachingAllocator(place=lambda size: next(addresses))
        for address in [allocator.allocate(12 * MIB) for _ in range(3)]:
            allocator.free(address)
        assert allocator.allocate(12 * MIB) == 1 << 30

    def test_merges_with_both_neighbours(self) -> None:
        allocator = make()
        blocks = [allocator.allocate(4 * MIB) for _ in range(5)]
        for index in (0, 2, 1, 4):
            allocator.free(blocks[index])
        assert sorted(allocator.free_blocks()) == [(blocks[0], 12 * MIB), (blocks[4], 4 * MIB)]

    def test_small_and_large_pools_are_apart(self) -> None:
        allocator = make()
        allocator.free(allocator.allocate(4 * MIB))
        allocator.allocate(512)
        assert sizes(allocator.segment_requests) == [20, 2]

    def test_streams_are_apart(self) -> None:
        allocator = make()
        allocator.free(allocator.allocate(4 * MIB, stream=1))
        allocator.allocate(4 * MIB, stream=2)
        allocator.allocate(4 * MIB, stream=1)
        assert sizes(allocator.segment_requests) == [20, 20]

    def test_private_pools_are_apart(self) -> None:
        allocator = make()
        allocator.free(allocator.allocate(4 * MIB, pool=(1, 0)))
        allocator.allocate(4 * MIB)
        allocator.empty_cache()
        assert (sizes(allocator.segment_requests), sizes(allocator.segment_frees)) == ([20, 20], [])
        allocator.empty_cache((1, 0))
        assert sizes(allocator.segment_frees) == [20]

    def test_empty_cache_returns_whole_segments_only(self) -> None:
        allocator = make()
        kept, gone = allocator.allocate(4 * MIB), allocator.allocate(30 * MIB)
        allocator.free(gone)
        allocator.empty_cache()
        assert allocator.segment_frees == [SegmentEvent(event=3, size=30 * MIB, address=gone)]
        allocator.free(kept)
        allocator.empty_cache()
        assert allocator.reserved_bytes == 0

    def test_peaks(self) -> None:
        allocator = make()
        allocator.free(allocator.allocate(30 * MIB))
        allocator.empty_cache()
        allocator.allocate(512)
        assert (allocator.allocated_peak_bytes, allocator.reserved_peak_bytes) == (30 * MIB, 30 * MIB)

    def test_requests_carry_the_event(self) -> None:
        allocator = make()
        allocator.free(allocator.allocate(512))
        allocator.allocate(12 * MIB)
        assert [request.event for request in allocator.segment_requests] == [0, 2]

    @pytest.mark.parametrize("text", ["", "expandable_segments:True"])
    def test_a_driver_uses_addresses_again_but_not_twice(self, text: str) -> None:
        allocator = CachingAllocator(AllocatorConfig.parse(text), place=lambda size: 1 << 40)
        allocator.free(allocator.allocate(40 * MIB))
        allocator.empty_cache()
        first = allocator.allocate(40 * MIB)
        second = allocator.allocate(512)
        assert first == 1 << 40
        assert not first <= second < first + 40 * MIB

    def test_refuses_what_it_does_not_hold(self) -> None:
        allocator = make()
        address = allocator.allocate(512)
        allocator.free(address)
        with pytest.raises(ValueError, match=f"address={address:#x}: takes one that allocate"):
            allocator.free(address)
        with pytest.raises(ValueError, match="size=0: takes a positive number"):
            allocator.allocate(0)


class TestMaxSplit:
    def test_an_oversize_block_stays_whole(self) -> None:
        allocator = make("max_split_size_mb:40")
        allocator.free(allocator.allocate(60 * MIB))
        allocator.allocate(45 * MIB)
        assert allocator.allocated_bytes == 60 * MIB

    def test_a_small_request_does_not_take_an_oversize_block(self) -> None:
        allocator = make("max_split_size_mb:40")
        allocator.free(allocator.allocate(60 * MIB))
        allocator.allocate(30 * MIB)
        assert sizes(allocator.segment_requests) == [60, 30]

    @pytest.mark.parametrize(("text", "requests"), [("", [70, 50]), (",max_non_split_rounding_mb:30", [70])])
    def test_rounding_has_a_limit(self, text: str, requests: list[int]) -> None:
        allocator = make("max_split_size_mb:40" + text)
        allocator.free(allocator.allocate(70 * MIB))
        allocator.allocate(50 * MIB)
        assert sizes(allocator.segment_requests) == requests

    def test_gives_back_just_enough(self) -> None:
        allocator = make("max_split_size_mb:40", capacity_mib=200)
        for address in [allocator.allocate(size * MIB) for size in (50, 60, 80)]:
            allocator.free(address)
        allocator.allocate(100 * MIB)
        assert sizes(allocator.segment_frees) == [80, 60]
        assert (allocator.reserved_bytes, allocator.retries) == (150 * MIB, 0)


class TestFullDevice:
    def test_gives_back_the_cache_and_tries_again(self) -> None:
        allocator = make(capacity_mib=100)
        allocator.free(allocator.allocate(50 * MIB))
        allocator.free(allocator.allocate(512, stream=3))
        allocator.allocate(60 * MIB)
        assert sizes(allocator.segment_frees) == [50, 2]
        assert (allocator.reserved_bytes, allocator.retries) == (60 * MIB, 1)

    def test_out_of_memory(self) -> None:
        allocator = make(capacity_mib=100)
        kept = allocator.allocate(4 * MIB)
        allocator.free(allocator.allocate(70 * MIB))
        with pytest.raises(
            SimulatedOutOfMemoryError, match=r"90\.00 MiB asked for, a segment of 90\.00 MiB"
        ) as caught:
            allocator.allocate(90 * MIB - 1)
        error = caught.value
        assert (error.requested_bytes, error.segment_bytes) == (90 * MIB - 1, 90 * MIB)
        assert (error.allocated_bytes, error.reserved_bytes) == (4 * MIB, 20 * MIB)
        assert (error.capacity_bytes, error.largest_free_bytes) == (100 * MIB, 16 * MIB)
        allocator.free(kept)
        allocator.allocate(90 * MIB)
        assert allocator.reserved_bytes == 90 * MIB

    def test_memory_fraction(self) -> None:
        allocator = make("per_process_memory_fraction:0.5", capacity_mib=100)
        with pytest.raises(SimulatedOutOfMemoryError) as caught:
            allocator.allocate(52 * MIB)
        assert caught.value.capacity_bytes == 50 * MIB

    def test_garbage_of_average_age_is_collected(self) -> None:
        allocator = make("garbage_collection_threshold:0.5,per_process_memory_fraction:0.9", capacity_mib=200)
        first, second, third = (allocator.allocate(size * MIB) for size in (30, 40, 50))
        allocator.free(first)
        allocator.free(second)  # as old as the first
        allocator.allocate(512)
        allocator.free(third)
        for _ in range(9):
            allocator.allocate(512)
        # 122 MiB are reserved, 32 above half of 180: the two older segments go, the younger stays.
        allocator.allocate(60 * MIB)
        assert sorted(sizes(allocator.segment_frees)) == [30, 40]

    def test_no_garbage_collection_without_a_fraction(self) -> None:
        allocator = make("garbage_collection_threshold:0.1", capacity_mib=200)
        allocator.free(allocator.allocate(30 * MIB))
        allocator.allocate(60 * MIB)
        assert allocator.segment_frees == []


class TestExpandableSegments:
    def test_grows_by_whole_pages(self) -> None:
        allocator = make("expandable_segments:True")
        first = allocator.allocate(30 * MIB)
        assert allocator.allocate(30 * MIB) == first + 30 * MIB
        assert sizes(allocator.segment_requests) == [40, 20]
        assert allocator.segment_requests[1].address == first + 40 * MIB
        allocator.allocate(1)
        assert allocator.segment_requests[2].size == 2 * MIB

    def test_splits_to_the_last_512_bytes(self) -> None:
        allocator = make("expandable_segments:True")
        allocator.allocate(20 * MIB - 512)
        assert allocator.allocated_bytes == 20 * MIB - 512

    def test_gives_back_the_pages_inside_a_free_block(self) -> None:
        allocator = make("expandable_segments:True")
        blocks = [allocator.allocate(30 * MIB) for _ in range(3)]  # 100 MiB mapped, 90 used
        allocator.free(blocks[1])
        allocator.empty_cache()
        assert allocator.segment_frees == [SegmentEvent(4, 20 * MIB, blocks[0] + 40 * MIB)]
        assert sorted(allocator.free_blocks()) == [
            (blocks[1], 10 * MIB),
            (blocks[0] + 90 * MIB, 10 * MIB),
        ]

    def test_fills_the_lowest_hole_first(self) -> None:
        allocator = make("expandable_segments:True")
        blocks = [allocator.allocate(40 * MIB) for _ in range(3)]
        allocator.free(blocks[1])
        allocator.empty_cache()
        assert allocator.allocate(30 * MIB) == blocks[1]
        assert sizes(allocator.segment_requests) == [40, 40, 40, 40]
        assert allocator.allocate(50 * MIB) == blocks[2] + 40 * MIB

    def test_prefers_what_cannot_grow(self) -> None:
        allocator = make("expandable_segments:True")
        blocks = [allocator.allocate(size * MIB) for size in (40, 20, 40)]  # and nothing free behind
        allocator.allocate(10 * MIB)  # the last page is half free and can grow
        allocator.free(blocks[0])
        assert allocator.allocate(5 * MIB) == blocks[0]

    def test_of_those_that_grow_alike_the_smaller(self) -> None:
        allocator = make("expandable_segments:True")
        blocks = [allocator.allocate(size * MIB) for size in (10, 10, 20, 30, 10)]
        allocator.free(blocks[1])
        allocator.free(blocks[2])
        allocator.empty_cache()  # 10 MiB are left, with a hole of 20 behind
        allocator.free(blocks[3])
        assert allocator.allocate(10 * MIB) == blocks[1]

    def test_an_empty_segment_goes_altogether(self) -> None:
        places = iter((1 << 40, 1 << 45))
        allocator = CachingAllocator(AllocatorConfig(expandable_segments=True), place=lambda size: next(places))
        allocator.free(allocator.allocate(30 * MIB))
        allocator.empty_cache()
        assert (allocator.reserved_bytes, allocator.allocate(30 * MIB)) == (0, 1 << 45)

    def test_pages_mapped_before_the_device_was_full_are_used(self) -> None:
        allocator = make("expandable_segments:True", capacity_mib=100)
        allocator.free(allocator.allocate(60 * MIB))
        allocator.allocate(100 * MIB)
        assert sizes(allocator.segment_requests) == [60, 40]
        with pytest.raises(SimulatedOutOfMemoryError):
            allocator.allocate(512)

    def test_can_be_switched_off(self) -> None:
        allocator = make("expandable_segments:True")
        allocator.free(allocator.allocate(30 * MIB))
        allocator.set_expandable(False)
        allocator.allocate(30 * MIB)
        assert sizes(allocator.segment_requests) == [40, 30]


# What PyTorch 2.11's own allocator did on a made-up driver with so many MiB: a12/7 allocates 12 bytes on stream 7,
# f0 frees the first allocation, e empties the cache; =address, +MiB@address asked of the driver,
# -MiB@address given back. Addresses count 512 bytes.
PYTORCH = {
    ("", 120): """
a14680064 +14@0 =0; f0; a14680064 =0; f1; a3145728/7 +20@28672 =28672; a3145728 =0; a300 +2@69632 =69632;
a34603008 +34@73728 =73728; f5; a3145728/7 =34816; f2; f6; f4; a300 =69632; a10485760/7 =28672; a3145728 =6144;
a67108864 -34@73728 +64@143360 =143360; f9; f7; e -2@69632; f10; a300 +2@274432 =274432; f3;
a67108864/7 -14@0 -64@143360 +64@278528 =278528; a300/7 +2@409600 =409600; f8; a67108864/7 -20@28672 oom; f12;
a300/7 =409601; a300 =274433; a67108864 -64@278528 +64@413696 =413696; a67108864 oom; a67108864 oom;
a10485760 +10@544768 =544768""",
    ("expandable_segments:True", 130): """
a9437184 +20@0 =0; f0; a19922944 =0; a26214400 +40@40960 =38912; a26214400 +20@122880 =90112; f3; a1048577 =90112;
e -20@122880; a19922944 +20@122880 =92161; a1048577 =131073; a1048577 =133122; a716800 +2@327680 =327680;
a1048577 =135171; f9; a19922944 +20@163840 =135171; a716800 =329080; a19922944 +20@204800 =174083; a19922944 oom; f12;
e -20@204800; a716800 +2@331776 =330480; f8; a26214400 +20@204800 =174083; a1048577 =225283; f10; a9437184 =135171; f2;
f5; a9437184 =153603; a1048577 =92161; e -20@40960; f14; a67108864 -2@331776 oom""",
    ("expandable_segments:True", None): """
a1048577/7 +20@0 =0; a9437184/7 =2049; a1048577/7 =20481; a1048576 +2@2415943680 =2415943680;
a1048577 +20@4831862784 =4831862784; f3; e -2@2415943680; f1; f4; f0; a9437184 =4831862784; f2; a1048577/7 =0; f5;
a1048576 +2@7247806464 =7247806464; a1048576 =7247808512; a9437184 =4831862784; f7; f6; a9437184 =4831881216; f9;
e -20@0; a1048577/7 +20@9663725568 =9663725568; f10; f8; a1048577/7 =9663727617; f12; f11;
e -20@4831862784 -20@9663725568 -2@7247806464; a1048576/7 +2@12079669248 =12079669248;
a1048577 +20@14495588352 =14495588352; f14; f13; e -20@14495588352 -2@12079669248""",
    ("max_split_size_mb:20", 150): """
a34603008 +34@0 =0; f0; a3145728 +20@69632 =69632; f1; a5242880 +20@110592 =110592; f2; a41943040 +40@151552 =151552;
a34603008 =0; a34603008 +34@233472 =233472; a5242880 -20@69632 +20@303104 =303104; a19922944 -20@110592 +20@344064
=344064; a41943040 oom; a3145728 =313344; e; f4; f5; f7; a3145728 =319488; a34603008 =0; f6; f11; a34603008 =0;
a3145728 =303104; a34603008 =233472; a41943040 -20@344064 oom; f13; f10; a34603008 oom; f14; f9; a34603008 =233472;
a34603008 -20@303104 +34@385024 =385024; f3""",
    ("garbage_collection_threshold:0.5,per_process_memory_fraction:0.9", 200): """
e; a19922944 +20@0 =0; a19922944 +20@40960 =40960; f1; a300 +2@81920 =81920; a67108864 +64@86016 =86016; f0; f3;
a300 =81921; f4; f2; a19922944 =0; f5; a716800 =81920; a67108864 =86016; a67108864 -20@40960 +64@217088 =217088;
a19922944 =0; a19922944 +20@348160 =348160; f7; a716800 =83320; a716800 -64@86016 +2@389120 =389120; f6; f10;
a67108864 -20@348160 +64@393216 =393216; f13; a19922944 =393216; f12; a716800 =81920; f8; a67108864 =217088;
a19922944 =432128; f17; a67108864 -2@389120 oom; a67108864 oom""",
    ("expandable_segments:True,max_split_size_mb:32", 160): """
a300 +2@0 =0; f0; a67108864 +80@368640 =368640; a3145728 =499712; a300 =0; f3; a67108864 +60@532480 =505856;
a3145728 =636928; f2; f4; a41943040 -40@532480 -2@0 +40@532480 =499712; f1; f6; a3145728 =643072;
a19922944 +20@655360 =649216; a19922944 -120@368640 +20@368640 =368640; a41943040 +40@409600 =407552;
a67108864 +60@491520 =489472; a3145728 =620544; f12; f11; a67108864 =489472; a67108864 oom; a67108864 oom; f13;
a3145728 =688128; a14680064 -60@491520 +20@491520 =489472; a41943040 +40@532480 =518144; a300 oom; a14680064 =600064;
f9; e; a41943040 oom; f10""",
}


@pytest.mark.parametrize(("text", "capacity_mib"), list(PYTORCH))
def test_answers_as_pytorch_does(text: str, capacity_mib: int | None) -> None:
    base = 1 << 46
    asked: list[str] = []

    def place(size: int) -> int | None:
        return base + int(asked[0].partition("@")[2]) * 512 if asked else None

    capacity = None if capacity_mib is None else capacity_mib * MIB
    allocator = CachingAllocator(AllocatorConfig.parse(text), capacity, place)
    addresses: list[int] = []
    for step in PYTORCH[text, capacity_mib].split(";"):
        operation, *expected = step.split()
        asked[:] = [word for word in expected if word[0] == "+"]
        before = len(allocator.segment_requests), len(allocator.segment_frees)
        outcome = []
        if operation[0] == "a":
            size, _, stream = operation[1:].partition("/")
            try:
                addresses.append(allocator.allocate(int(size), int(stream or 0)))
                outcome = [f"={(addresses[-1] - base) // 512}"]
            except SimulatedOutOfMemoryError:
                addresses.append(0)
                outcome = ["oom"]
        elif operation[0] == "f":
            allocator.free(addresses[int(operation[1:])])
        else:
            allocator.empty_cache()
        given = [f"-{event.size // MIB}@{(event.address - base) // 512}" for event in allocator.segment_frees]
        got = [f"+{event.size // MIB}@{(event.address - base) // 512}" for event in allocator.segment_requests]
        assert given[before[1] :] + got[before[0] :] + outcome == expected, step


CONFIGS = [
    "",
    "expandable_segments:True",
    "max_split_size_mb:32",
    "roundup_power2_divisions:[1:4,8:8,>:2]",
    "expandable_segments:True,max_split_size_mb:64",
    "garbage_collection_threshold:0.5,per_process_memory_fraction:0.9",
]
SIZES = st.one_of(
    st.integers(1, 4096),
    st.integers(4096, 2 * MIB),
    st.integers(2 * MIB, 24 * MIB),
    st.sampled_from([MIB, MIB + 1, 10 * MIB, 19 * MIB, 20 * MIB, 48 * MIB, 70 * MIB]),
)
PROGRAMS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), SIZES, st.sampled_from([0, 0, 7])),
        st.tuples(st.just("allocate"), SIZES, st.sampled_from([0, 0, 7])),
        st.tuples(st.just("free"), st.integers(0, 10**6), st.just(0)),
        st.tuples(st.just("empty_cache"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(PROGRAMS, st.sampled_from(CONFIGS), st.sampled_from([None, 150, 400]))
def test_the_books_balance(program: list[tuple[str, int, int]], text: str, capacity_mib: int | None) -> None:
    allocator = make(text, capacity_mib)
    live: dict[int, int] = {}
    refused = 0
    for operation, value, stream in program:
        if operation == "allocate":
            try:
                live[allocator.allocate(value, stream)] = value
            except SimulatedOutOfMemoryError:
                refused += 1
        elif operation == "free" and live:
            address = sorted(live)[value % len(live)]
            del live[address]
            allocator.free(address)
        elif operation == "empty_cache":
            allocator.empty_cache()

        held = dict(allocator.live_blocks())
        assert held.keys() == live.keys()
        assert all(held[address] >= allocator.config.rounded(size) for address, size in live.items())
        assert allocator.allocated_bytes == sum(held.values())
        blocks = sorted([*allocator.live_blocks(), *allocator.free_blocks()])
        assert all(start + size <= following for (start, size), (following, _) in pairwise(blocks))
        assert allocator.reserved_bytes == sum(size for _, size in blocks)
        asked, given = sum(sizes(allocator.segment_requests)), sum(sizes(allocator.segment_frees))
        assert allocator.reserved_bytes == (asked - given) * MIB
        assert capacity_mib is None or allocator.reserved_bytes <= capacity_mib * MIB
    assert not refused or capacity_mib is not None
    for address in live:
        allocator.free(address)
    allocator.empty_cache()
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 0)
    assert list(allocator.free_blocks()) == []


def entry(action: str, addr: int = 0, size: int = 0, **more: Any) -> dict[str, Any]:
    return {"action": action, "addr": addr, "size": size, "stream": 0, **more}


def segment(address: int, mib: int, *held: tuple[int, int], **more: Any) -> dict[str, Any]:
    """A final segment of a snapshot, in which ``held`` (offset and bytes) is live."""
    blocks, at = [], 0
    for offset, size in held:
        blocks += [{"size": offset - at, "state": "inactive"}] if offset > at else []
        blocks.append({"size": size, "state": "active_allocated"})
        at = offset + size
    blocks += [{"size": mib * MIB - at, "state": "inactive"}] if at < mib * MIB else []
    kind = "small" if mib == 2 else "large"
    return {"device": 0, "address": address, "total_size": mib * MIB, "segment_type": kind, "blocks": blocks, **more}


def snapshot(segments: list[dict[str, Any]], trace: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"segments": segments, "device_traces": [trace], **more}


def record(text: str, capacity_mib: int | None, steps: int, seed: int) -> dict[str, Any]:
    """Run a random program and write down what a snapshot would say of it."""
    config = AllocatorConfig.parse(text)
    expandable = config.expandable_segments
    places = count(1 << 46, 1 << 41)
    capacity = None if capacity_mib is None else capacity_mib * MIB
    allocator = CachingAllocator(config, capacity, lambda size: next(places))
    page = 2 * MIB if expandable else 1 << 60
    names = ("segment_unmap", "segment_map") if expandable else ("segment_free", "segment_alloc")
    chance = random.Random(seed)
    favourites = [chance.choice([700, 300_000, 2 * MIB + 1, 7 * MIB, 19 * MIB, 33 * MIB]) for _ in range(6)]
    trace: list[dict[str, Any]] = []
    live: dict[int, tuple[int, int]] = {}
    owners: dict[int, tuple[int, str]] = {}  # of each segment or page: its stream and type
    for _ in range(steps):
        asked, given = len(allocator.segment_requests), len(allocator.segment_frees)
        size, stream = chance.choice(favourites), chance.choice([0, 0, 7])
        if chance.random() < 0.05:
            allocator.empty_cache()
            after = []
        elif chance.random() < 0.55 or not live:
            try:
                address = allocator.allocate(size, stream)
                live[address] = size, stream
                after = [entry("alloc", address, size, stream=stream)]
            except SimulatedOutOfMemoryError:
                after = [entry("oom", size=size, stream=stream)]
        else:
            address = chance.choice(sorted(live))
            size, stream = live.pop(address)
            allocator.free(address)
            after = [entry(f"free_{what}", address, size, stream=stream) for what in ("requested", "completed")]
        for event in allocator.segment_frees[given:]:
            trace.append(entry(names[0], event.address, event.size, stream=owners[event.address][0]))
        for event in allocator.segment_requests[asked:]:
            trace.append(entry(names[1], event.address, event.size, stream=stream))
            for start in range(event.address, event.address + event.size, page):
                owners[start] = stream, "small" if size <= MIB else "large"
        trace += after

    held = dict(allocator.live_blocks())
    segments: list[dict[str, Any]] = []
    for address, size in sorted([*held.items(), *allocator.free_blocks()]):
        stream, kind = owners[max(start for start in owners if start <= address)]
        last = segments[-1] if segments else {}
        same = (last.get("stream"), last.get("segment_type")) == (stream, kind)
        starts = address in owners and not expandable
        if not same or starts or last["address"] + last["total_size"] != address:
            last = {"device": 0, "address": address, "total_size": 0, "stream": stream, "segment_type": kind}
            last |= {"is_expandable": expandable, "blocks": []}
            segments.append(last)
        last["total_size"] += size
        last["blocks"].append({"size": size, "state": "active_allocated" if address in held else "inactive"})
    return snapshot(segments, trace, allocator_settings={"expandable_segments": expandable})


def exact(replay: Replay) -> bool:
    return (
        replay.mismatches == ()
        and replay.matching_segment_requests == replay.segment_requests == replay.simulated_segment_requests
        and replay.matching_segment_frees == replay.segment_frees
        and replay.matching_allocations == replay.allocations
        and replay.reserved_end_bytes == replay.recorded_reserved_end_bytes
        and replay.reserved_peak_bytes == replay.recorded_reserved_peak_bytes
        and replay.strays == ()
    )


class TestReplay:
    @pytest.mark.parametrize("share", [1.0, 0.7, 0.4, 0.1])
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("text", ["", "expandable_segments:True"])
    def test_a_trace_cut_off_at_its_start(self, text: str, seed: int, share: float) -> None:
        recorded = record(text, None, 300, seed)
        trace = recorded["device_traces"][0]
        del trace[: round(len(trace) * (1 - share))]
        replay = replay_snapshot(recorded)
        assert exact(replay)
        assert replay.allocations > 0

    def test_a_free_whose_allocation_is_before_the_trace(self) -> None:
        # 19 MiB held 20 before the trace: the 1 MiB that was not split off goes with it.
        trace = [
            entry("free_requested", 1 << 40, 19 * MIB),
            entry("free_completed", 1 << 40, 19 * MIB),
        ]
        replay = replay_snapshot(snapshot([segment(1 << 40, 20)], trace))
        assert exact(replay)
        assert (replay.allocated_peak_bytes, replay.allocated_end_bytes) == (20 * MIB, 0)

    def test_a_remainder_shown_by_the_next_allocation(self) -> None:
        # [12 MiB + 1 MiB not split off][free 27 MiB]: a best fit of 26.5 MiB is there, one of 27.5 MiB is not.
        base = 1 << 40
        trace = [
            entry("free_completed", 1 << 44, 512),
            entry("segment_alloc", 1 << 42, 28 * MIB),
            entry("alloc", 1 << 42, 27 * MIB + 512),
            entry("alloc", base + 13 * MIB, 26 * MIB + 512),
            entry("free_requested", base, 12 * MIB),
            entry("free_completed", base, 12 * MIB),
        ]
        final = [
            segment(base, 40, (13 * MIB, 27 * MIB)),
            segment(1 << 42, 28, (0, 28 * MIB)),
            segment(1 << 44, 2),
        ]
        replay = replay_snapshot(snapshot(final, trace))
        assert exact(replay)
        assert (replay.segment_requests, replay.allocated_end_bytes) == (1, 55 * MIB)
        assert replay.allocated_peak_bytes == (13 + 55) * MIB

    def test_the_first_allocation_may_have_lost_its_request(self) -> None:
        # The segment is oversize, so that no cached block like it would have served these 5 MiB.
        trace = [entry("alloc", 1 << 40, 5 * MIB), entry("alloc", (1 << 40) + 5 * MIB, 15 * MIB)]
        final = [segment(1 << 40, 20, (0, 5 * MIB), (5 * MIB, 15 * MIB))]
        replay = replay_snapshot(snapshot(final, trace, allocator_settings={"max_split_size": 20 * MIB}))
        assert exact(replay)
        assert replay.allocations == 1

    def test_memory_returns_when_the_free_completes(self) -> None:
        trace = [
            entry("segment_alloc", 1 << 40, 30 * MIB),
            entry("alloc", 1 << 40, 30 * MIB),
            entry("free_requested", 1 << 40, 30 * MIB),
            entry("segment_alloc", 1 << 42, 30 * MIB),
            entry("alloc", 1 << 42, 30 * MIB),
            entry("free_completed", 1 << 40, 30 * MIB),
            entry("alloc", 1 << 40, 30 * MIB),
        ]
        final = [segment(1 << 40, 30, (0, 30 * MIB)), segment(1 << 42, 30, (0, 30 * MIB))]
        assert exact(replay_snapshot(snapshot(final, trace)))

    def test_a_free_that_has_not_completed_at_the_end(self) -> None:
        trace = [
            entry("free_completed", 1 << 44, 512),
            entry("free_requested", 1 << 40, 30 * MIB),
        ]
        final = [segment(1 << 40, 30, (0, 30 * MIB)), segment(1 << 44, 2)]
        final[0]["blocks"][0]["state"] = "active_awaiting_free"
        replay = replay_snapshot(snapshot(final, trace))
        assert exact(replay)
        assert replay.allocated_end_bytes == 30 * MIB

    def test_a_trace_without_completed_frees(self) -> None:
        trace = [
            entry("segment_alloc", 1 << 40, 30 * MIB),
            entry("alloc", 1 << 40, 30 * MIB),
            entry("free_requested", 1 << 40, 30 * MIB),
            entry("alloc", 1 << 40, 29 * MIB),
        ]
        assert exact(replay_snapshot(snapshot([segment(1 << 40, 30, (0, 30 * MIB))], trace)))

    def test_empty_cache_is_taken_from_the_file(self) -> None:
        trace = [
            entry("segment_free", 1 << 40, 30 * MIB),
            entry("segment_free", 1 << 42, 2 * MIB),
            entry("segment_alloc", 1 << 40, 24 * MIB),
            entry("alloc", 1 << 40, 24 * MIB),
        ]
        replay = replay_snapshot(snapshot([segment(1 << 40, 24, (0, 24 * MIB))], trace))
        assert exact(replay)
        assert (replay.segment_frees, replay.reserved_peak_bytes) == (2, 32 * MIB)

    def test_with_max_split_only_part_of_the_cache_goes(self) -> None:
        trace = [
            entry("segment_free", 1 << 42, 60 * MIB),
            entry("segment_alloc", 1 << 43, 62 * MIB),
            entry("alloc", 1 << 43, 62 * MIB),
        ]
        final = [segment(1 << 40, 50), segment(1 << 43, 62, (0, 62 * MIB))]
        recorded = snapshot(final, trace, allocator_settings={"max_split_size": 40 * MIB})
        assert exact(replay_snapshot(recorded))
        recorded["allocator_settings"] = {}
        assert replay_snapshot(recorded).reserved_end_bytes == 62 * MIB

    def test_an_expandable_segment(self) -> None:
        base = 1 << 40
        more = {"is_expandable": True}
        trace = [
            entry("free_completed", base + 40 * MIB, 40 * MIB),
            entry("segment_unmap", base + 40 * MIB, 40 * MIB),
            entry("segment_map", base + 40 * MIB, 20 * MIB),
            entry("alloc", base + 40 * MIB, 20 * MIB),
            entry("segment_map", base + 100 * MIB, 20 * MIB),
            entry("alloc", base + 95 * MIB, 21 * MIB),
        ]
        final = [
            segment(base, 60, (0, 40 * MIB), (40 * MIB, 20 * MIB), **more),
            segment(base + 80 * MIB, 40, (0, 15 * MIB), (15 * MIB, 21 * MIB), **more),
        ]
        replay = replay_snapshot(snapshot(final, trace))
        assert exact(replay)
        assert replay.config.expandable_segments
        assert (replay.segment_requests, replay.segment_frees) == (2, 1)

    def test_an_expandable_segment_whose_first_page_was_not_mapped(self) -> None:
        base = 1 << 40
        trace = [
            entry("free_completed", 1 << 44, 512),
            entry("segment_map", base, 20 * MIB),
            entry("alloc", base, 20 * MIB),
        ]
        final = [
            segment(base, 60, (0, 20 * MIB), (20 * MIB, 40 * MIB), is_expandable=True),
            segment(1 << 44, 2, is_expandable=True),
        ]
        assert exact(replay_snapshot(snapshot(final, trace)))

    def test_an_expandable_segment_that_was_full(self) -> None:
        # Neighbours show that 460 MiB are reserved for each. The first has a hole of 280 and a rest of 140: 290 go to
        # another one.
        base, small, second = 1 << 40, (1 << 40) + 460 * MIB, (1 << 40) + 920 * MIB
        trace = [
            entry("free_completed", small, 512),
            entry("segment_map", second + 20 * MIB, 300 * MIB),
            entry("alloc", second + 20 * MIB, 290 * MIB),
        ]
        final = [
            segment(base, 20, (0, 20 * MIB), is_expandable=True),
            segment(base + 300 * MIB, 20, (0, 20 * MIB), is_expandable=True),
            segment(small, 2, is_expandable=True),
            segment(second, 320, (0, 20 * MIB), (20 * MIB, 290 * MIB), is_expandable=True),
        ]
        assert exact(replay_snapshot(snapshot(final, trace)))

    def test_expandable_segments_switched_off_in_the_trace(self) -> None:
        base = 1 << 40
        trace = [
            entry("free_completed", 1 << 44, 512),
            entry("alloc", base + 5 * MIB, 5 * MIB),
            entry("segment_map", base + 20 * MIB, 20 * MIB),
            entry("alloc", base + 10 * MIB, 25 * MIB),
            entry("free_requested", base + 10 * MIB, 25 * MIB),
            entry("free_completed", base + 10 * MIB, 25 * MIB),
            entry("segment_alloc", 1 << 42, 24 * MIB),
            entry("alloc", 1 << 42, 23 * MIB),
        ]
        final = [
            segment(base, 40, (0, 5 * MIB), (5 * MIB, 5 * MIB), is_expandable=True),
            segment(1 << 42, 24, (0, 24 * MIB)),
            segment(1 << 44, 2, is_expandable=True),
        ]
        assert exact(replay_snapshot(snapshot(final, trace, allocator_settings={"expandable_segments": False})))

    def test_the_pages_mapped_before_an_oom_stay(self) -> None:
        # Two ranges were to be mapped, the driver had pages for the first only.
        base = 1 << 40
        trace = [
            entry("free_completed", 1 << 44, 512),
            entry("segment_map", base + 40 * MIB, 20 * MIB),
            entry("oom", size=90 * MIB),
            entry("alloc", base + 40 * MIB, 20 * MIB),
        ]
        final = [
            segment(base, 80, (0, 40 * MIB), (40 * MIB, 20 * MIB), is_expandable=True),
            segment(1 << 44, 2, is_expandable=True),
        ]
        assert exact(replay_snapshot(snapshot(final, trace)))

    def test_the_pages_mapped_before_a_retry_are_given_back(self) -> None:
        base = 1 << 40
        trace = [
            entry("free_completed", 1 << 44, 512),
            entry("segment_map", base + 40 * MIB, 20 * MIB),
            entry("segment_unmap", base + 40 * MIB, 40 * MIB),
            entry("segment_unmap", 1 << 44, 2 * MIB),
            entry("segment_map", base + 40 * MIB, 60 * MIB),
            entry("alloc", base + 40 * MIB, 60 * MIB),
        ]
        final = [segment(base, 100, (0, 40 * MIB), (40 * MIB, 60 * MIB), is_expandable=True)]
        assert exact(replay_snapshot(snapshot(final, trace)))

    def test_what_is_left_of_the_cache_is_not_searched_again(self) -> None:
        # 36 MiB free are too many to be split for 12, the 16 left of them after the retry would do.
        base = 1 << 40
        trace = [
            entry("segment_unmap", base + 60 * MIB, 20 * MIB),
            entry("segment_map", base + 20 * MIB, 20 * MIB),
            entry("alloc", base + 20 * MIB, 12 * MIB),
        ]
        held = (0, 20 * MIB), (20 * MIB, 12 * MIB), (40 * MIB, 4 * MIB)
        recorded = snapshot([segment(base, 60, *held, is_expandable=True)], trace)
        recorded["allocator_settings"] = {"expandable_segments": True, "max_split_size": 32 * MIB}
        assert exact(replay_snapshot(recorded))

    def test_frees_that_a_retry_waited_for_are_not_searched(self) -> None:
        base = 1 << 40
        trace = [
            entry("free_completed", base + 40 * MIB, 14 * MIB),
            entry("segment_unmap", 1 << 44, 2 * MIB),
            entry("segment_map", base + 20 * MIB, 20 * MIB),
            entry("alloc", base + 20 * MIB, 12 * MIB),
        ]
        held = (0, 20 * MIB), (20 * MIB, 12 * MIB), (54 * MIB, 6 * MIB)
        assert exact(replay_snapshot(snapshot([segment(base, 60, *held, is_expandable=True)], trace)))

    def test_overlapping_segments(self) -> None:
        final = [segment(1 << 40, 20, (0, 4 * MIB)), segment((1 << 40) + 10 * MIB, 30, (0, 4 * MIB))]
        replay = replay_snapshot(snapshot(final, []))
        assert (replay.reserved_end_bytes, replay.recorded_reserved_end_bytes) == (30 * MIB, 50 * MIB)

    def test_private_pools(self) -> None:
        pool = {"segment_pool_id": (1, 0)}
        trace = [
            entry("segment_alloc", 1 << 40, 20 * MIB),
            entry("alloc", 1 << 40, 2 * MIB),
            entry("segment_alloc", 1 << 42, 20 * MIB),
            entry("alloc", 1 << 42, 2 * MIB),
        ]
        final = [segment(1 << 40, 20, (0, 2 * MIB)), segment(1 << 42, 20, (0, 2 * MIB), **pool)]
        assert exact(replay_snapshot(snapshot(final, trace)))
        for place, one in zip((DEFAULT_POOL, DEFAULT_POOL, (1, 0), (1, 0)), trace, strict=True):
            one["pool_id"] = place
        assert exact(replay_snapshot(snapshot(final, trace)))

    def test_devices_are_apart(self) -> None:
        final = [segment(1 << 40, 2), segment(1 << 40, 20, (0, 4 * MIB)) | {"device": 1}]
        trace = [entry("segment_alloc", 1 << 40, 20 * MIB), entry("alloc", 1 << 40, 4 * MIB)]
        replay = replay_snapshot({"segments": final, "device_traces": [[], trace]}, device=1)
        assert exact(replay)
        assert (replay.device, replay.reserved_end_bytes) == (1, 20 * MIB)
        assert replay_snapshot({"segments": final, "device_traces": [[], trace]}, device=5).allocations == 0

    def test_says_where_it_differs(self) -> None:
        trace = [
            entry("free_completed", 1 << 40, 4 * MIB),
            entry("segment_alloc", 1 << 42, 22 * MIB),
            entry("alloc", 1 << 42, 5 * MIB),
        ]
        replay = replay_snapshot(snapshot([segment(1 << 40, 20), segment(1 << 42, 22, (0, 5 * MIB))], trace))
        assert replay.mismatches == (Mismatch(event=2, recorded=(22 * MIB,), simulated=()),)
        assert (replay.matching_segment_requests, replay.segment_requests) == (0, 1)
        assert (replay.matching_allocations, replay.allocations) == (0, 1)

    def test_other_settings(self) -> None:
        trace = [entry("segment_alloc", 1 << 40, 20 * MIB), entry("alloc", 1 << 40, 5 * MIB)]
        recorded = snapshot([segment(1 << 40, 20, (0, 5 * MIB))], trace)
        replay = replay_snapshot(recorded, config=AllocatorConfig(large_segment_bytes=64 * MIB))
        assert (replay.reserved_end_bytes, replay.recorded_reserved_end_bytes) == (64 * MIB, 20 * MIB)
        assert replay.mismatches == (Mismatch(event=1, recorded=(20 * MIB,), simulated=(64 * MIB,)),)
        replay = replay_snapshot(recorded, config=AllocatorConfig(expandable_segments=True))
        assert replay.matching_segment_requests == 1

    def test_a_smaller_device(self) -> None:
        recorded = record("", None, 200, seed=3)
        capacity = replay_snapshot(recorded).reserved_peak_bytes // 2
        replay = replay_snapshot(recorded, capacity_bytes=capacity)
        assert replay.reserved_peak_bytes <= capacity
        assert replay.out_of_memory
        assert replay.strays == ()

    def test_an_inconsistent_trace(self) -> None:
        trace = [
            entry("free_completed", 1 << 50, 512),  # in no segment
            entry("alloc", 1 << 40, 4 * MIB),
            entry("alloc", 1 << 40, 4 * MIB),  # over what is held
            entry("alloc", "nonsense", 4 * MIB),  # type: ignore[arg-type]
            {"action": ["alloc"]},
            {},
        ]
        replay = replay_snapshot(snapshot([segment(1 << 40, 20, (0, 4 * MIB))], trace))
        assert replay.strays == (0, 2)
        assert replay.reserved_end_bytes == 20 * MIB

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 10**6), st.sampled_from(["", "expandable_segments:True"]), st.data())
    def test_survives_damage(self, seed: int, text: str, data: st.DataObject) -> None:
        recorded = record(text, 300, 80, seed)
        trace = recorded["device_traces"][0]
        for _ in range(data.draw(st.integers(1, 15))):
            at = data.draw(st.integers(0, len(trace) - 1))
            how = data.draw(st.sampled_from(["drop", "repeat", "move", "resize", "swap", "segment"]))
            if how == "drop" and len(trace) > 1:
                del trace[at]
            elif how == "repeat":
                trace.insert(at, dict(trace[at]))
            elif how == "move":
                trace[at]["addr"] = trace[at].get("addr", 0) + data.draw(st.sampled_from([512, -512, 20 * MIB]))
            elif how == "resize":
                trace[at]["size"] = data.draw(st.sampled_from([0, -1, None, 3 * MIB, 1 << 45]))
            elif how == "swap":
                trace[at], trace[at - 1] = trace[at - 1], trace[at]
            elif recorded["segments"]:
                recorded["segments"].pop(at % len(recorded["segments"]))
        replay = replay_snapshot(recorded)
        assert min(replay.allocated_end_bytes, replay.reserved_end_bytes) >= 0
        assert replay.matching_segment_requests <= replay.segment_requests


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


@pytest.mark.skipif(not SNAPSHOTS.is_dir(), reason="the real snapshots are not here")
@pytest.mark.parametrize(
    ("name", "requests", "reserved_mib"), [("toy", 9, 3_606), ("transformer_fullstep", 783, 58_280)]
)
def test_real_snapshots(name: str, requests: int, reserved_mib: int) -> None:
    with (SNAPSHOTS / f"{name}.pickle").open("rb") as file:
        recorded = _PlainUnpickler(file).load()
    replay = replay_snapshot(recorded)
    assert exact(replay)
    assert replay.summary() == {
        "reserved_peak_bytes": reserved_mib * MIB,
        "reserved_end_bytes": reserved_mib * MIB,
        "segment_requests": requests,
        "matching_segment_requests": requests,
    }
    assert replay.allocated_end_bytes == sum(one["active_size"] for one in recorded["segments"])

    trace = recorded["device_traces"][0]
    del trace[: len(trace) // 2]
    assert exact(replay_snapshot(recorded))
