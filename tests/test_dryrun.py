"""Dry runs against real runs on the CPU, and against what others measured on real GPUs."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedModel, Trainer

from trl_memtrace import MemoryTracer, MemTrace, RunTrace
from trl_memtrace.device import cublas_workspace_bytes
from trl_memtrace.dryrun import DryRunError, dry_run
from trl_memtrace.errors import MemtraceError
from trl_memtrace.step_books import StepBooks
from trl_memtrace.units import MIB

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT.parent / "shared" / "fixtures"
_LARGER = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2048}
"""Large enough for 0.5% of a peak to be more than the smallest blocks."""

Make = Callable[[Path], Any]


def _folder(path: Path) -> str:
    """A small model on disk, made the first time, which is for real."""
    if not path.is_dir():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(**{**tiny._SHAPE, **_LARGER})).save_pretrained(path)
    return str(path)


def _sft(kind: str = "llama", experts: str | None = None, **settings: Any) -> Make:
    def make(folder: Path) -> Any:
        model = tiny.model(kind, **_LARGER)
        if experts is not None:
            model.set_experts_implementation(experts)
        return tiny.trainer(folder, model, **settings)

    return make


def _qlora(bits: int = 4, **settings: Any) -> Make:
    def make(folder: Path) -> Any:
        loaded = AutoModelForCausalLM.from_pretrained(
            _folder(folder.with_name("base")),
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4"
            ),
            device_map="cpu",
            dtype=torch.float32,
        )
        prepared = prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)
        return tiny.trainer(folder, prepared, peft_config=tiny.lora(), **settings)

    return make


def _preferences(rows: int = 24) -> Any:
    from datasets import Dataset

    prompt, good, bad = tiny.SENTENCES
    return Dataset.from_dict({"prompt": [prompt] * rows, "chosen": [good] * rows, "rejected": [bad] * rows})


def _common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }


def _other(kind: str, **settings: Any) -> Make:
    def make(folder: Path) -> Any:
        import trl

        common = {**_common(folder), **settings}
        if kind == "dpo":
            arguments: Any = trl.DPOConfig(**common)
            model: Any = _folder(folder.with_name("base"))  # it loads its reference model from there too
        else:
            from transformers import AutoModelForSequenceClassification

            torch.manual_seed(0)
            config = LlamaConfig(**{**tiny._SHAPE, **_LARGER}, num_labels=1)
            arguments, model = trl.RewardConfig(**common), AutoModelForSequenceClassification.from_config(config)
        trainer = trl.DPOTrainer if kind == "dpo" else trl.RewardTrainer
        return trainer(model=model, args=arguments, train_dataset=_preferences(), processing_class=tiny.tokenizer())

    return make


def _online(kind: str) -> Make:
    """LoRA on what the model itself has written."""

    def make(folder: Path) -> Any:
        import trl
        from datasets import Dataset

        arguments: Any = getattr(trl, f"{kind}Config")
        trainer: Any = getattr(trl, f"{kind}Trainer")
        return trainer(
            model=_folder(folder.with_name("base")),
            args=arguments(**_common(folder), num_generations=2, max_completion_length=24),
            reward_funcs=[lambda completions, **_: [float(len(completion) % 7) for completion in completions]],
            train_dataset=Dataset.from_dict({"prompt": tiny.SENTENCES * 4}),
            processing_class=tiny.tokenizer(),
            peft_config=tiny.lora(),
        )

    return make


def _prompt_tuning(folder: Path) -> Any:
    from peft import PromptTuningConfig

    return _sft(peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20))(folder)


CONFIGURATIONS: dict[str, Make] = {
    "prompt tuning, padded": _prompt_tuning,
    "full, fused": _sft(optimizer="adamw_torch_fused"),
    "full, foreach": _sft(optimizer="foreach"),
    "full, fused, checkpoints": _sft(optimizer="adamw_torch_fused", gradient_checkpointing=True),
    "full, 8-bit": _sft(optimizer="adamw_bnb_8bit"),
    "full, foreach, checkpoints, accumulation": _sft(
        optimizer="foreach", gradient_checkpointing=True, gradient_accumulation_steps=2
    ),
    "LoRA, fused": _sft(peft_config=tiny.lora(), optimizer="adamw_torch_fused"),
    "LoRA, foreach, checkpoints": _sft(peft_config=tiny.lora(), optimizer="foreach", gradient_checkpointing=True),
    "LoRA, 8-bit, accumulation": _sft(
        peft_config=tiny.lora(), optimizer="adamw_bnb_8bit", gradient_accumulation_steps=2
    ),
    "DoRA, fused": _sft(peft_config=tiny.lora(use_dora=True), optimizer="adamw_torch_fused"),
    "DoRA, foreach, accumulation": _sft(
        peft_config=tiny.lora(use_dora=True), optimizer="foreach", gradient_accumulation_steps=2
    ),
    "QLoRA, fused": _qlora(optimizer="adamw_torch_fused"),
    "QLoRA, 8-bit, checkpoints": _qlora(optimizer="adamw_bnb_8bit", gradient_checkpointing=True),
    "LoRA on 8 bit, fused": _qlora(8, optimizer="adamw_torch_fused"),
    "DPO, full, fused": _other("dpo"),
    "DPO, checkpoints, accumulation": _other("dpo", gradient_checkpointing=True, gradient_accumulation_steps=2),
    "DPO, reference computed beforehand": _other("dpo", precompute_ref_log_probs=True),
    "GRPO, LoRA": _online("GRPO"),
    "RLOO, LoRA": _online("RLOO"),
    "reward, full, fused": _other("reward"),
    "reward, checkpoints, accumulation": _other("reward", gradient_checkpointing=True, gradient_accumulation_steps=2),
    "tied embeddings, full, fused": _sft("qwen", optimizer="adamw_torch_fused"),
    "Mixtral, full, fused": _sft("moe", optimizer="adamw_torch_fused"),
    "Mixtral, LoRA, accumulation": _sft("moe", peft_config=tiny.lora(), gradient_accumulation_steps=2),
    "Mixtral, expert by expert, full, fused": _sft("moe", "eager", optimizer="adamw_torch_fused"),
    "Qwen3-MoE, full, foreach, checkpoints": _sft("qwen_moe", optimizer="foreach", gradient_checkpointing=True),
    "Qwen3-MoE, expert by expert, LoRA, accumulation": _sft(
        "qwen_moe", "eager", peft_config=tiny.lora(), gradient_accumulation_steps=2
    ),
    "DeepSeek-V3, full, fused": _sft("deepseek", optimizer="adamw_torch_fused"),
    "DeepSeek-V3, LoRA, checkpoints, accumulation": _sft(
        "deepseek", peft_config=tiny.lora("deepseek"), gradient_checkpointing=True, gradient_accumulation_steps=2
    ),
    "DeepSeek-V3, expert by expert, full, accumulation": _sft(
        "deepseek", "eager", optimizer="foreach", gradient_accumulation_steps=2
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * ("accumulation" in name)) for name in CONFIGURATIONS]
)
def test_a_dry_run_is_what_a_real_run_on_the_cpu_is(name: str, tmp_path: Path) -> None:
    make = CONFIGURATIONS[name]
    trainer = make(tmp_path / "real")
    callback = MemTrace(print_table=False, report=False, report_to="none")
    trainer.add_callback(callback)
    trainer.train()
    with dry_run(semantics="cpu", steps=3) as dry:
        make(tmp_path / "dry").train()
    assert len(dry.run) == 3
    for real, faked in zip(callback.run, dry.run, strict=True):
        assert faked.peak.bytes == pytest.approx(real.peak.bytes, rel=0.005)
        for category, size in real.peak.categories.items():
            assert size is not None
            assert faked.peak.categories[category] == pytest.approx(size, rel=0.01, abs=MIB), category
        if real.peak.phase is faked.peak.phase:  # else two phases hold the same
            assert faked.peak.categories["weights"] == pytest.approx(real.peak.categories["weights"], abs=1024)


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the measurements are not here")
@pytest.mark.parametrize("number", [13, pytest.param(9, marks=pytest.mark.slow)])
def test_a_dry_run_is_what_was_measured_on_a_t4(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """TinyLlama in float16 with memory-efficient attention, and SmolLM2 in 4 bit with eager attention."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import published

    figures = published.t4(FIXTURES, published.rows(FIXTURES, "t4_measured.csv")[number])
    for name in ("grads_MiB", "optimizer_state_MiB"):
        assert figures[name][0] == figures[name][1]
    for name in ("resident_MiB", "forward_peak_MiB", "backward_peak_MiB", "optimizer_peak_MiB"):
        assert figures[name][0] == pytest.approx(figures[name][1], rel=0.001), name
    for name in ("reserved_peak_GiB", "process_GiB"):
        assert figures[name][0] == pytest.approx(figures[name][1], rel=0.05), name


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the measurements are not here")
@pytest.mark.parametrize("number", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2))])
def test_a_dry_run_is_what_was_measured_on_an_a100(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PowerLM-3b in a Trainer: QLoRA, full, LoRA."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import published

    figures = published.a100(FIXTURES, published.rows(FIXTURES, "a100_trl_measured.csv")[number])
    for name, bound in (("allocated_peak_GiB", 0.03), ("resident_GiB", 0.005), ("nvidia_smi_GiB", 0.1)):
        assert figures[name][0] == pytest.approx(figures[name][1], rel=bound), name


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the measurements are not here")
def test_a_dry_run_is_what_was_measured_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-3.2-3B in a plain loop: each method within 3% of what was reserved, half of all within 1%."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import published

    off = []
    for row in published.rows(FIXTURES, "peft_metamathqa_measured.csv"):
        predicted, measured = published.peft(FIXTURES, row)["reserved_peak_GiB"]
        off.append(abs(predicted / measured - 1))
        assert off[-1] < 0.03, row["result"]
    assert statistics.median(off) < 0.01


def test_weights_are_read_ahead_of_being_coded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is coded, the next four have been read, as transformers' threads do."""
    import bitsandbytes.functional as functional

    folder, levels = _folder(tmp_path / "base"), []
    with dry_run(semantics="cpu") as dry:
        quantize = functional.quantize_4bit

        def noted(*args: Any, **kwargs: Any) -> Any:
            levels.append(dry.memory.level)
            return quantize(*args, **kwargs)

        monkeypatch.setattr(functional, "quantize_4bit", noted)
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float16, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )
    hidden, inner = _LARGER["hidden_size"], _LARGER["intermediate_size"]
    around = 2 * hidden * _LARGER["vocab_size"] + hidden  # the head, the embedding and the first norm, by name
    assert levels[0] == 2 * (around + 3 * hidden * inner + hidden + hidden * hidden // 2)
    assert len(levels) == 7 * tiny._SHAPE["num_hidden_layers"]


def test_a_model_is_loaded_without_its_weights(tmp_path: Path) -> None:
    base = _folder(tmp_path / "base")
    with dry_run() as dry:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        held = dry.memory.level
    expected = AutoModelForCausalLM.from_config(LlamaConfig(**{**tiny._SHAPE, **_LARGER}))
    counts = [-(-parameter.numel() * 2 // 512) * 512 for parameter in expected.parameters()]
    buffers = sum(-(-buffer.numel() * buffer.itemsize // 512) * 512 for buffer in expected.buffers())
    assert held == sum(counts) + buffers
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_dtype_is_of_models_whose_loading_names_none(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model")
    for dtype, named, expected in (
        ("bfloat16", {}, torch.bfloat16),
        (torch.float16, {}, torch.float16),
        ("bfloat16", {"dtype": torch.float32}, torch.float32),
        (None, {}, torch.float32),
    ):
        with dry_run(dtype=dtype):
            model = AutoModelForCausalLM.from_pretrained(folder, **named)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_the_books_of_a_dry_run_balance(tmp_path: Path) -> None:
    with dry_run(device="Tesla T4") as dry:
        _sft(peft_config=tiny.lora())(tmp_path).train()
    summary, workspace = dry.summary(), -(-cublas_workspace_bytes((7, 5)) // 512) * 512
    assert summary["source"] == "dry_run"
    assert summary["fits"] is True
    assert summary["device"]["name"] == "Tesla T4"
    assert summary["reserved_peak_bytes"] >= summary["allocated_peak_bytes"]
    assert summary["process_peak_bytes"] == summary["reserved_peak_bytes"] + summary["context_bytes"]
    for step in dry.run:
        assert sum(size or 0 for size in step.peak.categories.values()) == step.peak.bytes
        assert step.peak.bytes == step.peak.allocator_bytes
        assert sum(step.peak.roles.values()) == step.peak.bytes
        assert workspace <= (step.peak.categories["unattributed"] or 0) <= 2 * workspace + 4096  # one for each thread


def test_activations_that_wait_on_the_host_are_not_on_the_card(tmp_path: Path) -> None:
    held, rows = {}, 32
    for offloading in (False, True):
        with dry_run() as dry:
            _sft(activation_offloading=offloading, per_device_train_batch_size=rows)(tmp_path).train()
        step = dry.run.steps[1]
        assert sum(step.peak.categories.values()) == step.peak.bytes
        held[offloading] = step.phases["loss"].at_end["activations"]
        assert step.phases["idle"].at_end["activations"] < 0.05 * held[False]
    # Of the layers only those stay that were sent last: TRL waits for no more than five.
    assert held[True] < 0.5 * held[False]


def test_what_does_not_fit_is_said_so(tmp_path: Path) -> None:
    with dry_run(device=24 * MIB) as dry:
        _sft()(tmp_path).train()
    assert dry.summary()["fits"] is False
    assert dry.memory.refusal is not None
    with dry_run() as unlimited:
        _sft()(tmp_path).train()
    assert dry.run.peak == unlimited.run.peak  # a request that is refused keeps nothing alive


def test_a_plain_loop_is_traced_by_its_tracer() -> None:
    with dry_run(semantics="cpu") as dry:
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
        optimizer = torch.optim.AdamW(model.parameters())
        tracer = MemoryTracer(model, optimizer)
        for _ in range(2):
            with tracer.step():
                model(torch.randn(32, 64)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        tracer.close()
    weights = (64 * 256 + 256 + 256 * 8 + 8) * 4
    peak = dry.run.peak.categories
    assert (peak["weights"], peak["gradients"]) == (weights, weights)
    assert dry.run.header.source == "dry_run"


def test_a_batch_keeps_its_values(tmp_path: Path) -> None:
    """A mask without a hole is none to attention, and one with a hole is."""
    with dry_run() as dry:
        full = dry.to_device(torch.ones(2, 8, dtype=torch.int64))
        holes = dry.to_device(torch.tensor([[1, 0], [1, 1]]))
        assert bool(full.all())
        assert not bool(holes.all())
        assert dry.memory.level == 2 * 512


def _state() -> dict[str, Any]:
    """Everything that a dry run changes for its time."""
    import accelerate
    import bitsandbytes
    import torch.optim.optimizer as optimizer
    from torch._subclasses import fake_tensor
    from torch.utils.data.dataloader import _BaseDataLoaderIter
    from transformers import modeling_utils, training_args
    from transformers.utils import import_utils
    from trl.models.activation_offloading import OffloadActivations

    owners: list[Any] = [
        nn.Module,
        nn.functional,
        torch.Tensor,
        Trainer,
        PreTrainedModel,
        accelerate.Accelerator,
        fake_tensor,
        optimizer,
        sys.modules["torch.utils._foreach_utils"],
        _BaseDataLoaderIter,
        import_utils,
        training_args,
        modeling_utils,
        bitsandbytes,
        bitsandbytes.functional,
        torch,
        torch.cuda,
        torch.accelerator,
        torch.UntypedStorage,
        OffloadActivations,
    ]
    return {f"{owner!r}.{name}": value for owner in owners for name, value in dict(vars(owner)).items()}


def test_nothing_of_it_stays(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained  # noqa: B018  loads what is loaded late
    before, files = _state(), set(tmp_path.iterdir())
    with dry_run():
        _sft(activation_offloading=True)(tmp_path / "out").train()
    with pytest.raises(RuntimeError, match="of the user's"), dry_run():
        raise RuntimeError("of the user's")
    after = _state()
    changed = {name for name, value in before.items() if after.get(name) is not value}
    assert {name for name in changed if not name.endswith(("__warningregistry__", "_lru_cache__"))} == set()
    assert set(tmp_path.iterdir()) == files
    assert type(torch.empty(1)) is torch.Tensor


@pytest.mark.parametrize("dtype", ["half-ish", "int8", "nn", 16])
def test_a_dtype_that_is_none_is_told(dtype: Any) -> None:
    with pytest.raises(ValueError, match="dtype must be one of torch's"), dry_run(dtype=dtype):
        pass


def test_wrong_use_is_told(tmp_path: Path) -> None:
    with pytest.raises(MemtraceError, match="no known device"), dry_run(device="a toaster"):
        pass
    with pytest.raises(ValueError, match="semantics"), dry_run(semantics="tpu"):
        pass
    with pytest.raises(ValueError, match="steps"), dry_run(steps=0):
        pass
    with dry_run() as dry, pytest.raises(DryRunError, match="under way"), dry_run():
        pass
    with pytest.raises(DryRunError, match="nothing was trained"):
        _ = dry.run


def test_its_record_is_a_record(tmp_path: Path) -> None:
    with dry_run(semantics="cpu") as dry:
        _sft()(tmp_path).train()
    lines = [json.dumps(dry.run.header.to_json()), *(json.dumps(step.to_json()) for step in dry.run)]
    back = RunTrace.from_lines(lines)
    assert back.header.source == "dry_run"
    assert back.peak.bytes == dry.run.peak.bytes
    path = dry.save(tmp_path / "record")
    assert RunTrace.load(path).peak == dry.run.peak
    books = StepBooks.of_record(path)
    assert books is not None
    assert books.peak_bytes == dry.run.peak.bytes
