"""A real SFTTrainer in every configuration: books that balance, owners counted by hand, losses bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import tiny
import torch

from trl_memtrace import MemTrace

QUICK = [
    ("llama", "full", "adamw_torch_fused", False, 1),
    ("llama", "full", "foreach", True, 4),
    ("qwen", "lora", "adamw_torch_fused", False, 1),
    ("phi3", "qlora", "adamw_bnb_8bit", True, 1),
    ("gpt2", "full", "adamw_torch", False, 4),
    ("llama", "8bit", "adamw_torch_fused", False, 1),
    ("moe", "full", "foreach", False, 1),
]
OPTIMIZERS = ["adamw_torch_fused", "foreach", "adamw_bnb_8bit"]
WHOLE = [
    *itertools.product(["llama"], ["full", "lora", "qlora", "8bit"], OPTIMIZERS, [False, True], [1, 4]),
    *itertools.product(["qwen", "gpt2", "phi3"], ["full", "lora", "qlora", "8bit"], ["foreach"], [True], [4]),
    *itertools.product(["qwen", "gpt2", "phi3", "moe"], ["full", "lora"], ["adamw_torch_fused"], [False], [1]),
]


def make(folder: Path, kind: str, tuning: str, optimizer: str, checkpointing: bool, accumulation: int):
    if tuning in ("qlora", "8bit"):
        base = tiny.quantized(kind, 4 if tuning == "qlora" else 8, folder / "base")
    else:
        base = tiny.model(kind)
    torch.manual_seed(1)
    return tiny.trainer(
        folder,
        base,
        peft_config=None if tuning == "full" else tiny.lora(kind),
        optimizer=optimizer,
        gradient_checkpointing=checkpointing,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=1.0,
    )


def bytes_of(tensors) -> int:
    """Bytes of the storages under some tensors, each once."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def state_tensors(optimizer) -> list[torch.Tensor]:
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]


def check(folder: Path, configuration: tuple) -> None:
    plain = make(folder / "plain", *configuration)
    plain.train()
    traced = make(folder / "traced", *configuration)
    callback = MemTrace(first_steps=100)
    traced.add_callback(callback)
    traced.train()

    assert tiny.losses(traced) == tiny.losses(plain)
    assert len(tiny.losses(traced)) == 3

    trained = [parameter for parameter in traced.model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    held = [*traced.model.parameters(), *traced.model.buffers()]
    states = bytes_of(state_tensors(traced.optimizer))
    steps = callback.run.steps
    assert [step.traced for step in steps] == [True] * 3
    for step in steps:
        assert sum(step.peak.categories.values()) == step.peak.bytes == step.peak.allocator_bytes
        assert sum(step.peak.roles.values()) == step.peak.bytes
        assert sum(sum(row.values()) for row in step.peak.modules.values()) == step.peak.bytes
        assert step.peak.categories["unattributed"] <= 0.001 * step.peak.bytes
        assert max(phase.peak_bytes for phase in step.phases.values()) == step.peak.bytes
        for phase in step.phases.values():
            assert sum(phase.at_peak.values()) == phase.peak_bytes
            assert sum(phase.at_end.values()) == phase.end_bytes
            assert phase.at_peak["unattributed"] <= 0.001 * phase.peak_bytes
            quantization = step.peak.roles.get("weights/quant_state", 0)
            assert phase.at_peak["weights"] == bytes_of(held) + quantization + extra_buffers(traced.model, held)
        assert step.phases["optimizer"].at_peak["gradients"] == gradients
        assert step.phases["optimizer"].at_end["optimizer_states"] == states
        assert step.phases["idle"].at_end["gradients"] == 0
        assert set(step.phases) >= {"forward", "loss", "backward", "optimizer"}


def extra_buffers(model, held) -> int:
    """Tensors that modules keep as plain attributes, such as a rotary embedding's first frequencies."""
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    plain = [
        value
        for module in model.modules()
        if not type(module).__module__.startswith("bitsandbytes")
        for value in vars(module).values()
        if torch.is_tensor(value) and value.untyped_storage().data_ptr() not in known
    ]
    return bytes_of(plain)


@pytest.mark.parametrize("configuration", QUICK, ids=lambda row: "-".join(map(str, row)))
def test_books_balance_and_losses_are_the_same(tmp_path, configuration):
    check(tmp_path, configuration)


@pytest.mark.slow
@pytest.mark.parametrize(
    "configuration", [row for row in WHOLE if row not in QUICK], ids=lambda row: "-".join(map(str, row))
)
def test_books_balance_and_losses_are_the_same_in_the_whole_matrix(tmp_path, configuration):
    check(tmp_path, configuration)
