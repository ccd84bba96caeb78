"""``trl-memtrace estimate`` and ``dry-run``, as a user meets them. The oracles are arithmetic on the config."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig
from typer.testing import CliRunner

from trl_memtrace import commands
from trl_memtrace.dry_script import ScriptError, run_script
from trl_memtrace.dryrun import DryRunError
from trl_memtrace.errors import MemtraceError
from trl_memtrace.estimating import TRAINERS, FlagError, estimate

HIDDEN, INNER, LAYERS, HEADS, KEYS, VOCABULARY = 64, 160, 2, 4, 2, 320
WEIGHTS = (
    2 * VOCABULARY * HIDDEN
    + LAYERS * (HIDDEN * HIDDEN * 2 + 2 * HIDDEN * (HIDDEN // HEADS * KEYS) + 3 * HIDDEN * INNER + 2 * HIDDEN)
    + HIDDEN
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing but a config.json, without ``architectures``."""
    made = tmp_path_factory.mktemp("model")
    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
    ).save_pretrained(made)
    (made / "generation_config.json").unlink(missing_ok=True)
    return made


def _flags(folder: Path, *more: str) -> list[str]:
    return ["--model_name_or_path", str(folder), "--max_length", "64", "--bf16", "false", *more]


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(commands.app, list(arguments), env={"COLUMNS": "100"}, catch_exceptions=True)


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "reward"])
def test_a_folder_with_a_config_is_model_enough(kind: str, folder: Path) -> None:
    before = _files(folder)
    made = estimate(kind, _flags(folder, "--per_device_train_batch_size", "2"), device=24 << 30)
    summary = made.summary()
    assert summary["source"] == "dry_run"
    assert summary["steps"] == 2
    assert summary["fits"] is True
    peak = summary["peak"]
    assert sum(peak["categories"].values()) == peak["bytes"] == peak["allocator_bytes"]
    models = 2 if kind in ("dpo", "kto") else 1
    head = (VOCABULARY - 1) * HIDDEN if kind == "reward" else 0
    exact = 4 * (WEIGHTS - head) * models
    assert exact <= peak["categories"]["weights"] <= 1.02 * exact + 512 * 60
    assert _files(folder) == before


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_rollout_is_generated(kind: str, folder: Path) -> None:
    flags = ["--model_name_or_path", str(folder), "--bf16", "false", "--max_completion_length", "100"]
    flags += ["--per_device_train_batch_size", "8"]
    steps = list(estimate(kind, flags, lengths=[40] * 16).dry.run)
    rollout = steps[0].phases["rollout"] if "rollout" in steps[0].phases else steps[0].phases["forward"]
    cache = 2 * LAYERS * 8 * KEYS * (HIDDEN // HEADS) * 4 * 139  # keys and values of all but the last token
    assert rollout.peak_bytes >= 4 * WEIGHTS + cache


def test_flags_decide(folder: Path) -> None:
    def trained(*more: str) -> dict[str, int]:
        categories: dict[str, int] = estimate("sft", _flags(folder, *more)).summary()["peak"]["categories"]
        return categories

    full = trained()
    lora = trained("--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj")
    half = trained("--dtype", "bfloat16")
    adapter = 4 * LAYERS * 4 * (2 * HIDDEN + HIDDEN + HIDDEN // HEADS * KEYS)
    assert 8 * WEIGHTS <= full["optimizer_states"] <= 8 * WEIGHTS * 1.05
    assert 2 * adapter <= lora["optimizer_states"] <= 2 * adapter + 512 * 3 * 8
    assert half["weights"] < 0.55 * full["weights"]


@pytest.mark.parametrize(("bits", "each"), [(8, 1.0), (4, 0.5 + 4 / 64)])
def test_a_quantized_base_is_trained(bits: int, each: float, folder: Path) -> None:
    """In 8 bit a byte each and a scale a row; in 4 bit half a byte each and a scale for every 64."""
    lora = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]
    flags = _flags(folder, f"--load_in_{bits}bit", "--dtype", "float16", *lora)
    weights = estimate("sft", flags).dry.run.steps[1].peak.roles
    linear = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // HEADS * KEYS + 3 * HIDDEN * INNER)
    held = sum(size for role, size in weights.items() if role in ("weights/frozen", "weights/quant_state"))
    exact = each * linear + 2 * (WEIGHTS - linear)
    assert exact <= held <= 1.02 * exact + 512 * 80


def test_a_config_file_is_read_and_its_environment_not_kept(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"env:\n  A_NAME_OF_OURS: 'yes'\nmodel_name_or_path: {folder}\nmax_length: 32\nbf16: false\n"
        "output_dir: never\nper_device_train_batch_size: 3\n"
    )
    made = estimate("sft", ["--config", str(file)])
    assert made.dry.run.header.args["per_device_train_batch_size"] == 3
    assert "Every sequence has 32 tokens" in made.assumed[0]
    assert "A_NAME_OF_OURS" not in os.environ
    assert not Path("never").exists()


def _inputs(made: Any) -> int:
    return max(step.phases["forward"].at_peak["inputs"] or 0 for step in made.dry.run)


def test_the_longest_batch_comes_first(folder: Path) -> None:
    made = estimate(
        "sft", _flags(folder, "--per_device_train_batch_size", "2"), lengths=[5] * 40 + [64, 48] + [7] * 40
    )
    first, second = (step.phases["forward"].at_peak["inputs"] for step in made.dry.run)
    ids = 2 * 64 * 8
    assert first is not None
    assert second is not None
    assert ids <= first <= 4 * ids
    assert second < first


def test_a_local_dataset_is_read_and_left_alone(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "data" / "train.jsonl"
    file.parent.mkdir()
    rows = [{"input_ids": [5] * length, "labels": [5] * length} for length in (3, 50, 4, 5)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    before = _files(file.parent)
    made = estimate(
        "sft", _flags(folder, "--dataset_name", str(file.parent), "--per_device_train_batch_size", "1"), steps=1
    )
    assert made.assumed == []
    assert 2 * 50 * 8 <= _inputs(made) <= 4 * 512 + 2 * 50 * 8
    assert _files(file.parent) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no_such_flag", "1"], "no_such_flag"),
        (["--per_device_train_batch_size", "many"], "invalid int value"),
        (["--load_in_4bit", "--load_in_8bit"], "4 bit"),
    ],
)
def test_flags_that_trl_refuses(folder: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(FlagError, match=message) as caught:
        estimate("sft", _flags(folder, *arguments))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_estimated_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MemtraceError, match=r"config\.json"):
        estimate("sft", _flags(tmp_path))
    with pytest.raises(FlagError, match="model_name_or_path is missing"):
        estimate("sft", [])
    with pytest.raises(DryRunError, match="use_vllm cannot be faked"):
        estimate("grpo", ["--model_name_or_path", str(folder), "--use_vllm"])
    with pytest.raises(ValueError, match="kind must be one of"):
        estimate("ppo", [])


def test_nothing_of_the_pretence_remains(folder: Path) -> None:
    import datasets
    import trl
    from huggingface_hub import constants

    def state() -> list[Any]:
        classes = [getattr(trl, name) for name in TRAINERS.values()]
        return [
            *(vars(trainer).get("_prepare_dataset") for trainer in classes),
            vars(transformers.Trainer)["train"],
            vars(transformers.AutoProcessor)["from_pretrained"],
            vars(transformers.AutoTokenizer)["from_pretrained"],
            vars(transformers.GenerationMixin)["generate"],
            datasets.load_dataset,
            constants.HF_HUB_OFFLINE,
            torch.nn.Module.__call__,
            torch.optim.Optimizer.__init__,
            torch.cuda.synchronize,
            torch.cuda.max_memory_allocated,
            torch.autocast.__init__,
            dict(os.environ),
        ]

    before = state()
    estimate("sft", _flags(folder))
    with pytest.raises(DryRunError):
        estimate("sft", _flags(folder, "--padding_free", "true"))
    assert state() == before


LOOP = """
import sys
import torch

assert __name__ == "__main__"
model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256)).to("cuda")
model.cuda()
optimizer = torch.optim.AdamW(model.parameters())
torch.cuda.reset_peak_memory_stats()
for step in range(int(sys.argv[1])):
    batch = torch.randn(16, 256, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(batch).float().pow(2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    print("held", torch.cuda.max_memory_allocated() > 0)
print("too far")
"""


def _script(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "train.py"
    path.write_text(text)
    return path


def test_a_plain_loop_is_traced_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry = run_script(_script(tmp_path, LOOP), ["5"], device=1 << 30)
    assert capsys.readouterr().out == "held True\nheld True\n"
    first, second = dry.run
    parameters = 2 * 256 * 512 + 512 + 256
    weights = second.peak.categories["weights"]
    assert weights is not None
    assert 4 * parameters <= weights <= 4 * parameters + 4 * 512
    states = second.phases["forward"].at_end["optimizer_states"]
    assert states is not None
    assert 8 * parameters <= states <= 8 * parameters + 12 * 512
    assert first.phases["forward"].at_end["optimizer_states"] == 0
    assert {"forward", "backward", "optimizer"} <= set(first.phases)


def test_a_loop_shorter_than_the_steps_counts_what_there_is(tmp_path: Path) -> None:
    assert len(run_script(_script(tmp_path, LOOP), ["1"]).run) == 1


TRAINER = """
import sys
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

folder, out = sys.argv[1:]
from trl_memtrace.stand_ins import tokenizer
model = AutoModelForCausalLM.from_pretrained(folder)
model.config.architectures = ["LlamaForCausalLM"]
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(output_dir=out, max_steps=50, report_to=[], bf16=False, per_device_train_batch_size=2),
    train_dataset=Dataset.from_dict({"input_ids": [[5] * 20] * 8}),
    processing_class=tokenizer(model.config),
)
try:
    trainer.train()
except Exception:
    pass
raise RuntimeError("after training")
"""


def test_a_script_with_a_trainer_ends_with_its_training(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = _script(tmp_path, TRAINER)
    result = _run("dry-run", "--json", "--device", "T4", str(path), str(folder), str(out))
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["source"] == "dry_run"
    assert summary["steps"] == 2
    assert summary["fits"] is True
    assert summary["device"]["name"] == "Tesla T4"
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import torch\nx = 1\n", "ended and had trained nothing"),
        ("x = 1\n\nraise KeyError('its own')\n", r"line 3: KeyError: 'its own'"),
        ("x = = 1\n", "line 1: SyntaxError"),
        ("import sys\nsys.exit(3)\n", "line 2 ended with 3"),
    ],
)
def test_a_script_that_does_not_train_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ScriptError, match=message):
        run_script(_script(tmp_path, text), [])
    with pytest.raises(ScriptError, match="no such script"):
        run_script(tmp_path / "none.py", [])


def test_estimate_on_the_command_line(folder: Path) -> None:
    flags = _flags(folder, "--per_device_train_batch_size", "2")
    result = _run("estimate", "sft", *flags, "--memory", "1MiB", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["fits"] is False
    assert summary["process_peak_bytes"] > 1 << 20
    text = _run("estimate", "sft", *flags, "--device", "T4").stdout
    for words in ("nvidia-smi would show", "It fits Tesla T4", "optimizer states", "Every sequence has 64 tokens"):
        assert words in text


def test_mistakes_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "lengths.txt"
    bad.write_text("12\nmany\n")
    for arguments, words in (
        (["--device", "no such card"], "no known device"),
        (["--device", "T4", "--memory", "1GiB"], "choose one"),
        (["--lengths", str(bad)], "one integer a line"),
        (["--lengths", str(tmp_path / "none")], "cannot read"),
    ):
        result = _run("estimate", "sft", *_flags(folder), *arguments)
        assert result.exit_code != 0
        assert words in result.output + str(result.exception)
