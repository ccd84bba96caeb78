"""Models far larger than this machine's memory. The oracles are counts from the published architectures."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV3Config, LlamaConfig

from trl_memtrace.estimating import estimate
from trl_memtrace.units import GIB

LLAMA_70B = 70_553_706_496
"""Parameters of Llama-3.1-70B."""
DEEPSEEK_V3 = 671_026_404_352
"""Parameters of DeepSeek-V3 without its layer for multi-token prediction."""
ROUTERS = 58 * 256 * 7168
"""Of these, the routers', which stay in float32."""


def _flags(folder: Path, *more: str) -> list[str]:
    return ["--model_name_or_path", str(folder), "--dtype", "bfloat16", "--max_length", "1024", *more]


def _peak(folder: Path, *more: str) -> dict[str, Any]:
    summary = estimate("sft", _flags(folder, "--per_device_train_batch_size", "1", *more), steps=1).summary()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 24 * GIB
    peak: dict[str, Any] = summary["phases"]["optimizer"]["at_end"]
    return peak


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ).save_pretrained(tmp_path)
    return tmp_path


def test_a_model_of_70_billion_parameters(llama: Path) -> None:
    held = _peak(llama)
    assert held["weights"] == pytest.approx(2 * LLAMA_70B, abs=80 * 512)  # and the frequencies of positions
    assert held["gradients"] == 2 * LLAMA_70B
    assert held["optimizer_states"] == pytest.approx(4 * LLAMA_70B, abs=80 * 10 * 512)


@pytest.mark.slow
def test_a_mixture_of_experts_of_671_billion_parameters(tmp_path: Path) -> None:
    DeepseekV3Config().save_pretrained(tmp_path)
    held = _peak(tmp_path)
    weights = 2 * DEEPSEEK_V3 + 2 * ROUTERS
    # Blocks between 1 and 10 MiB are cut from segments of 20 MiB, whose ends are left on them where too small to use.
    for category, share in (("weights", 1), ("gradients", 1), ("optimizer_states", 2)):
        assert weights * share <= held[category] <= 1.0001 * weights * share, category


@pytest.mark.slow
def test_a_mixture_of_experts_with_adapters_on_attention(tmp_path: Path) -> None:
    DeepseekV3Config().save_pretrained(tmp_path)
    held = _peak(tmp_path, "--use_peft", "--lora_r", "16", "--lora_target_modules", "q_a_proj", "o_proj")
    adapters = 4 * 61 * 16 * (7168 + 1536 + 128 * 128 + 7168)
    for category, size in (("weights", 2 * DEEPSEEK_V3 + 2 * ROUTERS + adapters), ("optimizer_states", 2 * adapters)):
        assert size <= held[category] <= 1.01 * size, category
