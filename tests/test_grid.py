"""Flags as data, and the grids they make."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_memtrace.grid import Flag, Grid, GridError, Knob, changed, read_flags

NAMES = st.from_regex(r"[a-z]{1,8}(_[a-z]{1,8})?", fullmatch=True)
VALUES = st.from_regex(r"[A-Za-z0-9./-]{1,6}", fullmatch=True).filter(lambda text: not text.startswith("-"))


def test_a_flag_with_commas_is_a_knob():
    grid = Grid.of(
        [
            *("--model_name_or_path", "m", "--lora_r", "8,16,64", "--lora-target-modules", "all-linear,q_proj v_proj"),
            *("--use_peft", "--optim=adamw_torch_fused,adamw_bnb_8bit"),
        ]
    )
    assert grid.fixed == (Flag("model_name_or_path", ("m",)), Flag("use_peft"))
    assert grid.knobs == (
        Knob("lora_r", ("8", "16", "64")),
        Knob("lora_target_modules", ("all-linear", "q_proj v_proj")),
        Knob("optim", ("adamw_torch_fused", "adamw_bnb_8bit")),
    )
    points = list(grid.points())
    assert len(points) == 3 * 2 * 2
    assert points[0].flags == (
        *("--model_name_or_path", "m", "--use_peft", "--lora_r", "8", "--lora_target_modules", "all-linear"),
        *("--optim", "adamw_torch_fused"),
    )
    assert points[2].choices == ("8", "q_proj v_proj", "adamw_torch_fused")
    assert points[2].flags[-4:] == ("q_proj", "v_proj", "--optim", "adamw_torch_fused")


def test_numbers_are_known_as_such():
    assert Knob("lora_r", ("8", "16")).numbers == (8.0, 16.0)
    for choices in (("8", "all"), ("1e-4", "0.0001"), ("1", "nan"), ("1", "inf")):
        assert Knob("lora_r", choices).numbers is None


def test_what_is_one_value_stays_one():
    kwargs = '{"a": 1, "b": 2}'
    grid = Grid.of(["--model_init_kwargs", kwargs, "--optim_args", "a=1\\,b=2", "--lora_target_modules", "q", "v"])
    assert not grid.knobs
    assert [flag.values for flag in grid.fixed] == [(kwargs,), ("a=1,b=2",), ("q", "v")]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["sft", "--lora_r", "8"], "'sft' stands where a flag was expected"),
        (["--lora_r", "8,,16"], "--lora_r has an empty value among '8,,16'"),
        (["--lora_r", "8,"], "empty value"),
        (["--lora_r", "8", "--lora-r", "8,16"], "--lora_r is given twice"),
    ],
)
def test_flags_that_make_no_grid(words, problem):
    with pytest.raises(GridError, match=problem):
        Grid.of(words)


@given(st.dictionaries(NAMES, st.lists(VALUES, min_size=1, max_size=4, unique=True), max_size=4))
def test_every_combination_comes_once(chosen):
    words = [word for name, values in chosen.items() for word in (f"--{name}", ",".join(values))]
    expected = list(itertools.product(*(values for values in chosen.values() if len(values) > 1)))
    points = list(Grid.of(words).points())
    assert [point.choices for point in points] == expected
    for point in points:
        settings = {flag.name: flag.values for flag in read_flags(point.flags)}
        turned = dict(zip((name for name, values in chosen.items() if len(values) > 1), point.choices, strict=True))
        assert settings == {name: (turned.get(name, values[0]),) for name, values in chosen.items()}


def test_a_changed_flag_keeps_its_place_and_a_new_one_comes_last():
    words = ["--a", "1", "2", "--b=3", "--use-peft"]
    assert changed(words, [Flag("b", ("4",)), Flag("c", ("5",))]) == (
        "--a",
        "1",
        "2",
        "--b",
        "4",
        "--use_peft",
        "--c",
        "5",
    )
    assert changed(words, []) == ("--a", "1", "2", "--b", "3", "--use_peft")
