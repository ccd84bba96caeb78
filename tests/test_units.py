"""Bytes as text and back."""

from __future__ import annotations

import re
from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trl_memtrace.units import GIB, KIB, MIB, format_bytes, parse_bytes, to_gib

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (-1536, "-1.50 KiB"),
        (80 * GIB, "80.00 GiB"),
        (5 * 1024 * GIB, "5.00 TiB"),
        (5000 * 1024 * GIB, "5000.00 TiB"),
    ],
)
def test_bytes_are_written_in_the_largest_binary_unit_that_they_fill(size: int | None, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(-(2**50), 2**50))
@example(MIB - 1)
@example(GIB - 1)
def test_what_is_written_is_within_half_of_its_last_place_and_never_1024_of_a_smaller_unit(size: int) -> None:
    number, unit = format_bytes(size).split()
    assert abs(Fraction(number) * UNITS[unit] - size) <= Fraction(UNITS[unit], 200)
    assert abs(Fraction(number)) < 1024 or unit == "TiB"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1024", 1024),
        ("0", 0),
        ("40GiB", 40 * GIB),
        ("24 GB", 24 * 10**9),
        (" 1.5 kib ", 1536),
        ("512MiB", 512 * MIB),
        ("1kB", 1000),
        ("0.1KB", 100),
        ("2 TiB", 2 * 1024 * GIB),
        ("3TB", 3 * 10**12),
        ("7 mb", 7 * 10**6),
        ("9 B", 9),
    ],
)
def test_sizes_are_read_with_binary_and_decimal_units_in_any_case(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@given(st.integers(0, 2**80))
@example(2**60 + 1)
def test_whole_bytes_are_read_exactly(size: int) -> None:
    assert parse_bytes(str(size)) == size
    assert parse_bytes(f"{size}KiB") == size * KIB


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1e9", "4 0GiB", "40GiBs", "1.", ".5", "40 bits", "ten", "1,5 GB", "9" * 31]
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(repr(text))} is not a size; .* 40GiB"):
        parse_bytes(text)


@given(st.from_regex(r"\A\s*[0-9]{1,400}(\.[0-9]{1,5})?\s*[a-zA-Z]{0,3}\Z") | st.text(max_size=6))
@example("9" * 400)
@example("9" * 5000)
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    with suppress(ValueError):
        assert parse_bytes(text) >= 0


def test_gib_are_a_plain_quotient() -> None:
    assert to_gib(3 * GIB // 2) == 1.5
