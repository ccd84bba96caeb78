"""What it takes to load a model. The oracles are worked out by hand here, or are what a loaded model holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Phi3Config
from typer.testing import CliRunner

from trl_memtrace import commands, loading
from trl_memtrace.allocator import CachingAllocator
from trl_memtrace.categories import Category
from trl_memtrace.device import find_device
from trl_memtrace.errors import MemtraceError
from trl_memtrace.loading import FORMS, Footprint, Loader, Tensor, load_into, load_rows, measure
from trl_memtrace.records import Peak, PhaseRecord, RunHeader, StepRecord, category_table, dump_line

MIB = 1024**2
CARD = "NVIDIA A100 80GB PCIe"
READINGS = {"float32": 15005, "float16": 7717, "bfloat16": 7717, "int8": 4425, "int4": 2861}

V, H, F, L = 100, 96, 160, 2  # a Phi-3 in small: vocabulary, width, feed-forward, layers
LINEAR = L * (3 * H * H + H * H + 2 * F * H + H * F)
ROWS = L * (3 * H + H + 2 * F + H)
NORMS = (2 * L + 1) * H
KEPT = 2 * V * H + NORMS  # embedding, head and norms
BUFFERS = 2 * (H // 4 // 2) * 4  # inv_freq and original_inv_freq, float32


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phi3")
    Phi3Config(tie_word_embeddings=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    config = Phi3Config(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    transformers.Phi3ForCausalLM(config).save_pretrained(folder)
    return folder


def run(*arguments: str) -> Any:
    return CliRunner().invoke(commands.app, list(arguments), env={"COLUMNS": "100"}, catch_exceptions=False)


def study(folder: Path, loader: Loader) -> dict[str, loading.LoadRow]:
    readings = {form: mib * MIB for form, mib in READINGS.items()}
    rows = load_rows(folder, device=find_device(CARD), loader=loader, readings=readings)
    return {row.dtype: row for row in rows}


# --- the weights ---


def by_hand(form: str, double_quant: bool = False) -> int:
    if form in ("float32", "float16", "bfloat16"):
        return (LINEAR + KEPT) * (4 if form == "float32" else 2) + BUFFERS
    if form == "int8":
        return LINEAR + ROWS * 4 + KEPT * 2 + BUFFERS
    state = 0
    for shape in L * [(3 * H, H), (H, H), (2 * F, H), (H, F)]:
        blocks = shape[0] * shape[1] // 64
        state += 16 * 4
        state += blocks + -(-blocks // 256) * 4 + 256 * 4 + 4 if double_quant else blocks * 4
    return LINEAR // 2 + state + KEPT * 2 + BUFFERS


@pytest.mark.parametrize("form", FORMS)
def test_predicted_measured_and_worked_out_weights_are_the_same_to_the_byte(small: Path, form: str) -> None:
    (row,) = load_rows(small, [form], measured=True)
    assert row.measured is not None
    assert row.predicted.weights_bytes == row.measured.weights_bytes == by_hand(form)
    assert row.errors is not None
    assert row.errors[1] == 0
    assert sum(line.bytes for line in row.measured.lines) == by_hand(form)


def test_double_quantization_is_counted_to_the_byte(small: Path) -> None:
    (row,) = load_rows(small, ["int4"], double_quant=True, measured=True)
    assert row.measured is not None
    assert row.predicted.weights_bytes == row.measured.weights_bytes == by_hand("int4", double_quant=True)


def tied() -> Any:
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=V,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=64,
        )
    )


def turned() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, n_embd=64, n_layer=2, n_head=4))


def kept_in_float32() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=V, d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16)
    )


def fused_experts() -> Any:
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=V,
            hidden_size=64,
            intermediate_size=96,
            moe_intermediate_size=32,
            num_experts=4,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        )
    )


@pytest.mark.parametrize("build", [tied, turned, kept_in_float32, fused_experts])
@pytest.mark.parametrize("torch_dtype", ["float16", "bfloat16"])
def test_other_architectures_weigh_what_is_predicted(tmp_path: Path, build: Any, torch_dtype: str) -> None:
    build().save_pretrained(tmp_path)
    for row in load_rows(tmp_path, [torch_dtype, "int8", "int4"], torch_dtype=torch_dtype, measured=True):
        assert row.measured is not None
        assert row.predicted.weights_bytes == row.measured.weights_bytes, row.dtype


def test_a_measurement_can_differ_from_a_prediction(small: Path) -> None:
    (predicted,) = load_rows(small, ["int8"], torch_dtype="float32")
    measured = measure(small, "int8", torch_dtype="float16")
    assert predicted.predicted.weights_bytes == by_hand("int8") + KEPT * 2 != measured.weights_bytes


# --- the segments ---


def reserved(*tensors: Tensor, loader: Loader, double_quant: bool = False) -> tuple[int, int]:
    allocator = CachingAllocator()
    load_into(allocator, tensors, loader, double_quant)
    return allocator.allocated_bytes, allocator.reserved_bytes


@pytest.mark.parametrize("loader", list(Loader))
def test_a_16_bit_copy_leaves_its_segment(loader: Loader) -> None:
    # 4096 x 4096: copy 32 MiB, packed 8 MiB, absmax 1 MiB, code 512 bytes. Small blocks share a segment of 2 MiB.
    weight = Tensor("a.weight", (4096, 4096), "int4", 32 * MIB)
    allocated, held = reserved(weight, loader=loader)
    assert allocated == 8 * MIB + MIB + 512
    if loader is Loader.TRANSFORMERS4:  # 8 MiB come from a segment of 20 MiB, and the copy's stays cached
        assert held == (32 + 20 + 2) * MIB
    else:  # 8 MiB are asked for at first, and leave a segment of 20 MiB, where the packed weights go
        assert held == (20 + 32 + 2) * MIB


def test_accelerate_emptied_the_cache_after_what_is_not_quantized() -> None:
    weight = Tensor("a.weight", (4096, 4096), "int4", 32 * MIB)
    norm = Tensor("b.weight", (4096,), "float16", 8192)
    allocated, held = reserved(weight, norm, loader=Loader.TRANSFORMERS4)
    assert allocated == 8 * MIB + MIB + 512 + 8192
    assert held == (20 + 2) * MIB  # absmax, code and norm share a small segment; the copy's is given back


def test_int8_needs_the_copy_twice_in_transformers_5() -> None:
    # 4096 x 4096: copies of 32 MiB, int8 16 MiB, SCB 16 KiB. Asked for at first: 16 MiB, where the int8 weights go.
    weight = Tensor("a.weight", (4096, 4096), "int8", 32 * MIB)
    assert reserved(weight, loader=Loader.TRANSFORMERS5) == (16 * MIB + 16384, (16 + 32 + 32 + 2) * MIB)
    # Before: one copy, the codes by columns, the codes by rows.
    assert reserved(weight, loader=Loader.TRANSFORMERS4) == (16 * MIB + 16384, (32 + 16 + 16 + 2) * MIB)


# --- Phi-3-mini on the card of the study ---


def test_phi3_in_the_study_is_met_in_all_five_forms(phi3: Path) -> None:
    """Within 2%, with the one context that is the mean of all five."""
    rows = study(phi3, Loader.TRANSFORMERS4)
    off = {form: round((row.predicted.process_bytes or 0) / MIB / READINGS[form] - 1, 4) for form, row in rows.items()}
    assert off == {"float32": 0.002, "float16": 0.0039, "bfloat16": 0.0039, "int8": -0.0104, "int4": -0.0161}
    sizes = [[line.bytes for line in rows[form].predicted.lines] for form in ("float16", "bfloat16")]
    assert sizes[0] == sizes[1]
    accelerate = {form: row.errors[0] for form, row in rows.items() if row.errors is not None}
    assert accelerate["int4"] == pytest.approx(-0.3631, abs=1e-4)


def test_the_context_is_larger_where_bitsandbytes_has_run(phi3: Path) -> None:
    """docs/loading.md says what is known of it: what the readings leave for the context, less what is reserved."""
    rows = study(phi3, Loader.TRANSFORMERS4)
    left = {form: READINGS[form] - (row.predicted.reserved_bytes or 0) // MIB for form, row in rows.items()}
    assert left == {"float32": 427, "float16": 427, "bfloat16": 427, "int8": 503, "int4": 503}


@pytest.mark.parametrize("loader", list(Loader))
def test_the_lines_add_up(phi3: Path, loader: Loader) -> None:
    for row in study(phi3, loader).values():
        lines = {line.what: line.bytes for line in row.predicted.lines}
        assert sum(lines.values()) == row.predicted.process_bytes
        assert lines["CUDA context"] == 457 * MIB
        weights = sum(lines.values()) - sum(
            lines[what] for what in ("CUDA context", "kept in segments", "allocator rounding")
        )
        assert weights == row.predicted.weights_bytes
        assert all(line.why for line in row.predicted.lines)


def test_phi3_quantized_weighs_what_the_layers_say(phi3: Path) -> None:
    linear, rows, kept = 3_623_878_656, 32 * (16384 + 3072 + 9216 + 3072), 2 * 98_500_608 + 65 * 3072
    table = {row.dtype: {x.what: x.bytes for x in row.predicted.lines} for row in load_rows(phi3, ["int8", "int4"])}
    assert (table["int8"]["int8 weights"], table["int8"]["SCB"]) == (linear, rows * 4)
    assert (table["int4"]["4-bit weights"], table["int4"]["absmax"]) == (linear // 2, linear // 64 * 4)
    assert table["int4"]["code"] == 4 * 32 * 64
    assert table["int8"]["float16 weights"] == table["int4"]["float16 weights"] == kept * 2


# --- the commands ---


def test_the_json_is_the_records(small: Path) -> None:
    printed = json.loads(run("load", str(small), "--dtypes", "float32", "int8", "--measure", "--json").stdout)
    assert list(printed) == ["rows"]
    assert [row["dtype"] for row in printed["rows"]] == ["float32", "int8"]
    keys = {"weights_bytes", "allocated_bytes", "reserved_bytes", "process_bytes", "lines"}
    for row in printed["rows"]:
        assert set(row) == {"dtype", "accelerate", "predicted", "measured"}
        assert set(row["accelerate"]) == {"largest_layer_bytes", "total_bytes", "training_bytes"}
        assert set(row["predicted"]) == set(row["measured"]) == keys
        assert all(set(line) == {"what", "bytes", "why"} for line in row["predicted"]["lines"])
        assert row["measured"]["weights_bytes"] == by_hand(row["dtype"])
    assert printed["rows"][0]["accelerate"]["total_bytes"] == (LINEAR + KEPT) * 4 + BUFFERS
    assert printed["rows"][1]["accelerate"]["training_bytes"] is None


def test_without_a_measurement_there_is_none_and_without_a_card_no_context(small: Path) -> None:
    printed = json.loads(run("load", str(small), "--dtypes", "int4", "--json").stdout)
    assert printed["rows"][0]["measured"] is None
    if not torch.cuda.is_available():
        assert printed["rows"][0]["predicted"]["process_bytes"] is None


def test_the_table_shows_both_errors(phi3: Path) -> None:
    readings = [f"--reading={form}={mib}MiB" for form, mib in READINGS.items()]
    result = run("load", str(phi3), "--device", CARD, "--loader", "transformers4", *readings)
    assert result.exit_code == 0
    for figure in ("15,035.0", "7,717.0", "4,379.0", "4,425.0", "-17.65%", "-1.04%", "-36.31%", "-1.61%", "SCB"):
        assert figure in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--dtypes", "int3"), "int3"),
        (("--reading", "int8=much"), "much"),
        (("--reading", "4425MiB"), "DTYPE=SIZE"),
        (("--reading", "int8=1MiB", "--measure"), "choose one"),
    ],
)
def test_a_wrong_option_is_told(small: Path, arguments: tuple[str, ...], said: str) -> None:
    result = run("load", str(small), *arguments)
    assert (result.exit_code, said in result.output) == (2, True)


def test_what_cannot_be_measured_is_one_line(phi3: Path, small: Path, tmp_path: Path) -> None:
    with pytest.raises(MemtraceError, match="weights") as caught:
        run("load", str(phi3), "--measure", "--dtypes", "float16")
    assert caught.value.exit_code == 2
    (tmp_path / "config.json").write_bytes((small / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(MemtraceError, match="cannot be loaded in float16") as caught:
        measure(tmp_path, "float16")
    assert "\n" not in str(caught.value)
    with pytest.raises(MemtraceError, match="no known device"):
        run("load", str(small), "--device", "abacus")
    with pytest.raises(MemtraceError, match="no such file"):
        run("load", str(tmp_path / "nowhere"))


def test_a_prediction_takes_a_known_form(small: Path) -> None:
    with pytest.raises(ValueError, match="int4"):
        loading.predict(loading.load_meta(small), "int3")


def test_a_footprint_is_as_wide_as_it_is_known() -> None:
    assert Footprint(1, 2, 3, 4).bytes == 4
    assert Footprint(1, 2, 3).bytes == 3
    assert Footprint(1).bytes == 1
    assert Footprint().bytes is None


def test_the_stages_are_the_studys(phi3: Path) -> None:
    printed = run("stages", str(phi3), "--dtype", "float32", "float16").stdout
    rows = [line.split() for line in printed.splitlines() if line.startswith("float")]
    assert rows == [
        ["float32", "14.23", "14.23", "28.47", "56.94"],
        ["float16", "14.23", "21.35", "28.47", "28.47"],
    ]


def test_a_record_stands_beside_the_stages(small: Path, tmp_path: Path) -> None:
    gib = 1024**3
    sizes = category_table({Category.WEIGHTS: gib})

    def phase(peak: int) -> PhaseRecord:
        return PhaseRecord(peak * gib, gib, category_table({Category.WEIGHTS: peak * gib}), sizes)

    phases = {"forward": phase(2), "backward": phase(3), "optimizer": phase(4)}
    step = StepRecord(step=1, traced=True, phases=phases, peak=Peak(), reserved_bytes=None, seconds=1.0)
    record = tmp_path / "rank-00000.jsonl"
    record.write_text(f"{dump_line(RunHeader().to_json())}\n{dump_line(step.to_json())}\n")
    printed = run("stages", str(small), "--record", str(tmp_path)).stdout
    (row,) = [line.split() for line in printed.splitlines() if line.startswith("the run")]
    assert row == ["the", "run", "1.00", "2.00", "3.00", "4.00"]
    found = json.loads(run("stages", str(small), "--dtype", "int8", "--record", str(tmp_path), "--json").stdout)
    assert found["rows"] == [{"dtype": "int8", "accelerate": None}]
    assert found["phases"]["backward"]["peak_bytes"] == 3 * gib
