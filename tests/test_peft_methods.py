"""Every method that PEFT has, and every form of bitsandbytes: whose weights are whose, books that balance, losses bit
for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import bitsandbytes
import pytest
import tiny
import torch
from matrix_table import Section
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftType, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_memtrace import MemoryTracer, RunTrace

TABLE = Section("PEFT methods", "method", "adapter, bytes", "peak", "losses", "unattributed")
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2, "target_modules": None},
    "C3A": {"block_size": 16},
    "CPT": {"cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "OFT": {"oft_block_size": 0},
    "ROAD": {"group_size": 16},
    "SHADOW": {"target_modules": None},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6], "target_modules": ["embed_tokens"]},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 100},
}
"""What a method has to be told for a model as small as this, beside its rank and its targets."""

REFUSED = {"ADAMSS": (ImportError, "scikit-learn is required")}
"""Methods that cannot be used here, with what PEFT says of it."""


def config_of(kind: PeftType, folder: Any) -> Any:
    made = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    fields = {field.name for field in dataclasses.fields(made)}
    usual = {"target_modules": ["q_proj", "v_proj"], "r": 4, "num_virtual_tokens": 4}
    settings = {name: value for name, value in usual.items() if name in fields}
    if kind is PeftType.XLORA:
        expert = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        expert.save_pretrained(folder)
        settings = {"hidden_size": 64, "adapters": {"0": str(folder), "1": str(folder)}}
    return made(task_type="CAUSAL_LM", **{**settings, **SETTINGS.get(kind.value, {})})


def batches(task_ids: bool) -> Iterator[dict[str, torch.Tensor]]:
    for number in range(3):
        torch.manual_seed(number)
        ids = torch.randint(8, tiny.VOCABULARY, (2, 16 + 4 * number))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        yield {**batch, "task_ids": torch.zeros(2, dtype=torch.long)} if task_ids else batch


def train(
    model: Any, optimizer: Any, traced: bool, task_ids: bool = False
) -> tuple[list[float], list[int], RunTrace | None]:
    """A few steps: their losses, the bytes of their gradients counted by hand, and the record."""
    losses, gradients = [], []
    tracer = MemoryTracer(model, optimizer) if traced else None
    torch.manual_seed(7)
    for batch in batches(task_ids):
        if tracer is not None:
            tracer.begin_step()
        loss = model(**batch).loss
        loss.backward()
        gradients.append(bytes_of(parameter.grad for parameter in model.parameters() if parameter.grad is not None))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if tracer is not None:
            tracer.end_step()
    if tracer is None:
        return losses, gradients, None
    tracer.close()
    return losses, gradients, tracer.run


def bytes_of(tensors) -> int:
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def assert_balanced(run: RunTrace) -> float:
    shares = []
    assert len(run) == 3
    for step in run:
        assert step.traced
        assert sum(step.peak.categories.values()) == step.peak.bytes == step.peak.allocator_bytes
        assert sum(step.peak.roles.values()) == step.peak.bytes
        for phase in step.phases.values():
            assert sum(phase.at_peak.values()) == phase.peak_bytes
            shares.append(phase.at_peak["unattributed"] / phase.peak_bytes)
            shares.append(phase.at_end["unattributed"] / phase.end_bytes)
    assert max(shares) < 0.005
    return max(shares)


OFTEN_USED = (
    "LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "VERA", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "LN_TUNING",
    "TRAINABLE_TOKENS", "ADAPTION_PROMPT", "MISS", "ADAMSS",
)  # fmt: skip


def often(name: str, used: tuple[str, ...]) -> Any:
    return name if name in used else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", [often(name, OFTEN_USED) for name in sorted(PEFT_TYPE_TO_CONFIG_MAPPING)])
def test_every_method(tmp_path, kind):
    kind = PeftType(kind)
    if kind.value in REFUSED:
        problem, words = REFUSED[kind.value]
        with pytest.raises(problem, match=words):
            get_peft_model(tiny.model(), config_of(kind, tmp_path))
        TABLE.add(kind.value, "-", "-", f"refused: {words} ...", "-")
        return
    given = {"use_cache": False} if kind is PeftType.XLORA else {}
    task_ids = kind in (PeftType.POLY, PeftType.MULTITASK_PROMPT_TUNING)
    losses, run, model = [], None, None
    for traced in (False, True):
        base = tiny.model(**given)
        own = {id(parameter) for parameter in base.parameters()}
        torch.manual_seed(1)
        model = get_peft_model(base, config_of(kind, tmp_path))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=False)
        its, gradients, run = train(model, optimizer, traced, task_ids)
        losses.append(its)
    assert losses[0] == losses[1]
    share = assert_balanced(run)

    added = [parameter for parameter in model.parameters() if id(parameter) not in own or parameter.requires_grad]
    for step, expected in zip(run, gradients, strict=True):
        assert step.peak.roles["weights/adapter"] == bytes_of(added)
        assert step.phases["optimizer"].at_peak["gradients"] == expected > 0
        assert step.peak.categories["weights"] >= bytes_of([*model.parameters(), *model.buffers()])
    kinds = {role for step in run for role in step.peak.roles if role.startswith("gradients/")}
    assert kinds <= {"gradients/adapter"}
    peak = run.peak
    TABLE.add(kind.value, f"{bytes_of(added):,}", f"{peak.bytes:,} in {peak.phase}", "the same", f"{100 * share:.2f}%")


def test_the_committed_table_is_what_this_run_gives():
    TABLE.check([kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING])
    assert set(PEFT_TYPE_TO_CONFIG_MAPPING) == set(PeftType)


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("form", ["nf4", "fp4", "int8"])
def test_every_form_of_quantized_weights(tmp_path, form, double):
    if form == "int8" and double:
        pytest.skip("int8 has one level only")
    tiny.model().save_pretrained(tmp_path)
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": form, "bnb_4bit_use_double_quant": double}
    config = BitsAndBytesConfig(**({"load_in_8bit": True} if form == "int8" else four))
    losses, run, model = [], None, None
    for traced in (False, True):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, device_map="cpu", dtype=torch.float32
        )
        torch.manual_seed(1)
        model = get_peft_model(loaded, tiny.lora())
        optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
        its, _, run = train(model, optimizer, traced)
        losses.append(its)
    assert losses[0] == losses[1]
    assert_balanced(run)
    states = [state for parameter in model.parameters() if (state := getattr(parameter, "quant_state", None))]
    kept = [tensor for state in states for tensor in (state.absmax, state.code)]
    if double:
        kept += [tensor for state in states for tensor in (state.offset, state.state2.absmax, state.state2.code)]
    if form == "int8":
        kept = [module.state.SCB for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear8bitLt)]
    assert bool(kept)
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for step in run:
        assert step.peak.roles["weights/adapter"] == bytes_of(adapter)
        assert step.peak.roles["weights/quant_state"] >= bytes_of(kept)
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        assert step.peak.roles["weights/frozen"] == bytes_of(frozen)


@pytest.mark.parametrize(
    "form", [name for name in sorted(vars(bitsandbytes.nn)) if "Embedding" in name and "Patched" not in name]
)
def test_every_form_of_embedding(form):
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            embedding = getattr(bitsandbytes.nn, form)(64, 128)
            source = torch.nn.Embedding(64, 128)
            embedding.load_state_dict(source.state_dict(), strict=False)
            self.embedding = embedding.to("cpu")
            self.head = torch.nn.Linear(128, 64)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(ids).float()).square().mean()

    losses = []
    for traced in (False, True):
        model = Model()
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
        tracer = MemoryTracer(model, optimizer) if traced else None
        for _ in range(2):
            if tracer is not None:
                tracer.begin_step()
            loss = model(torch.arange(64))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if tracer is not None:
                tracer.end_step()
                assert tracer.run.steps[-1].peak.categories["unattributed"] == 0
                weights = tracer.run.steps[-1].peak.categories["weights"]
                assert weights >= bytes_of(model.parameters())
        if tracer is not None:
            tracer.close()
    assert losses[:2] == losses[2:]


OPTIMIZERS = sorted(
    name
    for name, made in vars(bitsandbytes.optim).items()
    if isinstance(made, type) and issubclass(made, bitsandbytes.optim.optimizer.Optimizer8bit)
)
REFUSED_OPTIMIZERS = {"AdEMAMix32bit": "broadcast shape", "PagedAdEMAMix32bit": "broadcast shape"}
"""What bitsandbytes cannot do on the CPU, and what comes of it."""


@pytest.mark.parametrize("name", [often(name, ("AdamW8bit", "Lion32bit", "PagedAdamW8bit")) for name in OPTIMIZERS])
def test_every_optimizer(name):
    losses, model, optimizer, run = [], None, None, None
    options = {"momentum": 0.9} if name.startswith(("SGD", "LARS")) else {}
    for traced in (False, True):
        model = tiny.model()
        optimizer = getattr(bitsandbytes.optim, name)(model.parameters(), lr=1e-3, **options)
        if name in REFUSED_OPTIMIZERS:
            with pytest.raises(RuntimeError, match=REFUSED_OPTIMIZERS[name]):
                train(model, optimizer, traced)
            return
        its, _, run = train(model, optimizer, traced)
        losses.append(its)
    assert losses[0] == losses[1]
    assert_balanced(run)
    kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert run.steps[-1].phases["optimizer"].at_end["optimizer_states"] >= bytes_of(kept) > 0
