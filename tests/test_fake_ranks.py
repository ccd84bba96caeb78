"""One rank of several, where there is no other. The oracle is arithmetic on shapes: what ``torch.chunk`` gives to the
first."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensor
from transformers import LlamaConfig
from typer.testing import CliRunner

from trl_memtrace import RunTrace, commands
from trl_memtrace.dryrun import DryRunError, dry_run
from trl_memtrace.estimating import FlagError, estimate
from trl_memtrace.fake_ranks import RankError

SHAPES = [tuple(parameter.shape) for parameter in tiny.model().parameters()]
WHOLE = 4 * sum(map(math.prod, SHAPES))
BUCKET = 10_000_000
"""Elements of ZeRO's reduce bucket: more than anything else."""

has_deepspeed = any((Path(path) / "deepspeed").is_dir() for path in sys.path)
needs_deepspeed = pytest.mark.skipif(not has_deepspeed, reason="DeepSpeed is not installed")


def block(size: int) -> int:
    """What the caching allocator gives for a size."""
    return -(-size // 512) * 512


def first_shards(ranks: int) -> list[int]:
    """Bytes of what FSDP2 gives to the first rank of each parameter, in float32."""
    return [4 * math.ceil(shape[0] / ranks) * math.prod(shape[1:]) for shape in SHAPES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    LlamaConfig(**tiny._SHAPE, architectures=["LlamaForCausalLM"]).save_pretrained(made)
    return made


def flags(folder: Path, *more: str) -> list[str]:
    return ["--model_name_or_path", str(folder), "--max_length", "32", "--bf16", "false", *more]


def zero(folder: Path, stage: int, **more: Any) -> str:
    file = folder.parent / f"zero{stage}.json"
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings = {"stage": stage, "reduce_bucket_size": BUCKET, **more}
    file.write_text(json.dumps({"zero_optimization": settings, **dict.fromkeys(auto, "auto")}))
    return str(file)


def last(made: Any) -> Any:
    """The last step, with its books checked."""
    step = made.dry.run.steps[-1]
    for phase in step.phases.values():
        assert sum(phase.at_peak.values()) == phase.peak_bytes
        assert sum(phase.at_end.values()) == phase.end_bytes
    assert sum(step.peak.categories.values()) == sum(step.peak.roles.values()) == step.peak.bytes
    return step


@pytest.mark.parametrize("ranks", [2, 8, 64, 1024])
def test_fsdp2_gives_the_first_rank_its_shards(ranks: int, folder: Path) -> None:
    made = estimate("sft", flags(folder, "--fsdp"), ranks=ranks)
    step, shards = last(made), first_shards(ranks)
    held = sum(map(block, shards))
    assert step.peak.roles["weights/trainable"] == held
    assert step.peak.roles["optimizer_states/exp_avg"] == step.peak.roles["optimizer_states/exp_avg_sq"] == held
    # A group's gradients are reduced into one buffer.
    gradients = step.phases["optimizer"].at_peak["gradients"]
    assert sum(shards) <= gradients <= sum(shards) + 512 * (tiny._SHAPE["num_hidden_layers"] + 3)
    assert made.dry.run.header.trainer["strategy"] == "fsdp2"
    assert made.dry.run.header.trainer["world_size"] == ranks
    assert made.dry.run.header.model["bytes"] == WHOLE
    layer = [shape for shape, (name, _) in zip(SHAPES, tiny.model().named_parameters(), strict=True) if "s.0." in name]
    gathered = 4 * sum(ranks * math.ceil(shape[0] / ranks) * math.prod(shape[1:]) for shape in layer)
    assert step.phases["backward"].at_peak["communication"] >= gathered


def test_ddp_has_buckets_as_large_as_its_gradients(folder: Path) -> None:
    alone, made = estimate("sft", flags(folder)), estimate("sft", flags(folder), ranks=8)
    step = last(made)
    held = sum(block(4 * math.prod(shape)) for shape in SHAPES)
    assert step.phases["idle"].at_end["communication"] == block(WHOLE)
    assert step.peak.roles["weights/trainable"] == step.phases["optimizer"].at_peak["gradients"] == held
    assert made.dry.run.header.trainer["strategy"] == "ddp"
    assert step.peak.bytes - last(alone).peak.bytes == pytest.approx(block(WHOLE), rel=0.01)


def test_ddp_takes_a_megabyte_first_and_then_what_it_is_told(tmp_path: Path) -> None:
    """The first parameters fill a bucket of 1 MiB at least, others some of ``ddp_bucket_cap_mb``; the last come first:
    torch's ``_DEFAULT_FIRST_BUCKET_BYTES`` and ``DistributedDataParallel._ddp_init_helper``."""
    model = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2048}
    sizes = [4 * parameter.numel() for parameter in tiny.model(**model).parameters()]
    expected, bucket, limit = [], 0, 1 << 20
    for size in sizes:
        bucket += size
        if bucket >= limit:
            expected.append(bucket)
            bucket, limit = 0, 2 << 20
    expected += [bucket] if bucket else []
    with dry_run(semantics="cpu", steps=1, ranks=4) as dry:
        trainer = tiny.trainer(tmp_path, tiny.model(**model), ddp_bucket_cap_mb=2)
        trainer.train()
        said = trainer.model_wrapped._get_ddp_logging_data()["bucket_sizes"]
    assert [int(size) for size in said.split(",")] == expected[::-1]
    assert dry.run.steps[0].phases["backward"].at_end["communication"] == sum(expected)


@needs_deepspeed
@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_gives_the_first_rank_its_partitions(stage: int, ranks: int, folder: Path) -> None:
    made = estimate("sft", flags(folder, "--deepspeed", zero(folder, stage)), ranks=ranks)
    step = last(made)
    decayed = [math.prod(shape) for shape in SHAPES if len(shape) > 1]
    others = [math.prod(shape) for shape in SHAPES if len(shape) == 1]
    if stage == 3:  # each parameter is parted, and padded for itself
        partitions = [sum(math.ceil(size / ranks) for size in group) for group in (decayed, others)]
        weights = block(4 * sum(partitions))
    else:  # a group is, padded to an even part for each
        partitions = [math.ceil(sum(group) / (2 * ranks)) * 2 for group in (decayed, others)]
        weights = sum(block(4 * size * ranks) for size in partitions)
    states = sum(block(4 * size) for size in partitions)
    for name in ("exp_avg", "exp_avg_sq", "master_weights"):
        assert step.peak.roles[f"optimizer_states/{name}"] == pytest.approx(states, abs=1024), name
    assert step.peak.roles["weights/trainable"] == pytest.approx(weights, rel=0.02, abs=1024)
    assert step.peak.roles["communication/buckets"] == 4 * BUCKET
    assert made.dry.run.header.trainer["strategy"] == f"zero{stage}"


def test_what_each_rank_holds_shrinks_with_their_number(folder: Path) -> None:
    """But for what is whole on each: activations, and the layer that is gathered just now."""
    few, many = (last(estimate("sft", flags(folder, "--fsdp"), ranks=ranks)) for ranks in (2, 16))
    for category in ("weights", "optimizer_states"):
        assert many.peak.categories[category] < few.peak.categories[category] / 4
    assert many.phases["forward"].at_end["activations"] == few.phases["forward"].at_end["activations"]


def test_a_model_that_no_card_could_hold_is_never_there_whole(tmp_path: Path) -> None:
    larger = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 32}
    LlamaConfig(**{**tiny._SHAPE, **larger}).save_pretrained(tmp_path)
    whole = sum(4 * parameter.numel() for parameter in tiny.model(**larger).parameters())
    made = estimate("sft", flags(tmp_path, "--fsdp"), ranks=64)
    assert made.summary()["reserved_peak_bytes"] < whole


def test_the_record_says_how_many_ranks_there_were(folder: Path, tmp_path: Path) -> None:
    told = CliRunner().invoke(
        commands.app,
        ["estimate", "sft", *flags(folder), "--fsdp", "--num_processes", "8", "--record", str(tmp_path), "--json"],
    )
    assert told.exit_code == 0, told.output
    summary = json.loads(told.stdout)
    run = RunTrace.load(tmp_path)
    assert (run.header.trainer["world_size"], run.header.trainer["rank"]) == (8, 0)
    assert run.header.trainer["strategy"] == "fsdp2"
    assert run.header.args["fsdp"]
    assert summary["peak"]["bytes"] == run.peak.bytes


def known() -> dict[str, Any]:
    """What being a rank changes in this process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import dataclasses
    from torch.distributed.fsdp import _init_utils
    from torch.distributed.fsdp._fully_shard import _fsdp_init, _fsdp_param
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.nn.parallel import distributed as ddp

    owners: list[Any] = [PartialState, dataclasses, _init_utils, _fsdp_init, _fsdp_param, ShardingPropagator]
    owners += [ddp, ddp.DistributedDataParallel, torch.UntypedStorage, FakeTensor, torch]
    if has_deepspeed:
        import deepspeed.accelerator.real_accelerator as accelerator
        import deepspeed.comm.comm as comm
        import deepspeed.comm.torch as backend
        import deepspeed.runtime.zero.stage3 as stage3
        import deepspeed.runtime.zero.stage_1_and_2 as stage2
        import deepspeed.utils.groups as groups

        owners += [accelerator, comm, backend, stage2, stage3, groups]
        owners += [stage2.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3]
    attributes = {
        f"{owner!r}.{name}": value
        for owner in owners
        for name, value in dict(vars(owner)).items()
        if not name.startswith("__")
    }
    states = {f"state {kind}": dict(kind._shared_state) for kind in (AcceleratorState, GradientState, PartialState)}
    return {**attributes, **states, "environment": dict(os.environ)}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_nothing_of_it_stays(kind: str, folder: Path) -> None:
    more = {"ddp": [], "fsdp2": ["--fsdp"], "zero3": ["--deepspeed", zero(folder, 3)]}[kind]
    environment, linear = dict(os.environ), torch.nn.functional.linear
    estimate("sft", flags(folder, *more), ranks=2)  # libraries are loaded late, and remember shapes
    assert torch.nn.functional.linear is linear
    before = known()
    assert not [name for name in os.environ.keys() - environment if name.startswith(("ACCELERATE", "FSDP", "MASTER"))]
    assert {"RANK", "WORLD_SIZE", "LOCAL_RANK"}.isdisjoint(os.environ.keys() - environment)
    estimate("sft", flags(folder, *more), ranks=2)
    with pytest.raises(RuntimeError, match="of the user's"), dry_run(ranks=4):
        raise RuntimeError("of the user's")
    assert not distributed.is_initialized()
    after = known()
    assert after.keys() == before.keys()
    assert [name for name, value in before.items() if after[name] is not value and after[name] != value] == []


def test_wrong_use_is_told(folder: Path) -> None:
    for ranks in (0, True, 1.5):
        with pytest.raises(ValueError, match="ranks"), dry_run(ranks=ranks):  # type: ignore[arg-type]
            pass
    for more in (["--fsdp"], ["--deepspeed", zero(folder, 2)]):
        with pytest.raises(FlagError, match="--num_processes"):
            estimate("sft", flags(folder, *more))
    offloaded = folder.parent / "offloaded.json"
    offloaded.write_text(json.dumps({"cpu_offload": True}))
    with pytest.raises(DryRunError, match="offloaded"):
        estimate("sft", flags(folder, "--fsdp", "--fsdp_config", str(offloaded)), ranks=2)


@needs_deepspeed
def test_zero_takes_its_steps_in_float16_too(folder: Path) -> None:
    """No scaled gradient is found to overflow, or there would be no states."""
    file = Path(zero(folder, 2))
    half = folder.parent / "half.json"
    half.write_text(json.dumps({**json.loads(file.read_text()), "fp16": {"enabled": True}}))
    step = last(estimate("sft", flags(folder, "--fp16", "--deepspeed", str(half)), ranks=2))
    assert step.peak.roles["optimizer_states/exp_avg"] == step.peak.roles["optimizer_states/master_weights"]


@needs_deepspeed
def test_what_zero_offloads_is_refused(folder: Path) -> None:
    file = zero(folder, 3, offload_optimizer={"device": "cpu"})
    with pytest.raises(DryRunError, match="offloaded"):
        estimate("sft", flags(folder, "--deepspeed", file), ranks=2)


def test_a_rank_makes_no_ranks() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(RankError, match="already"), dry_run(ranks=2):
            pass
        assert distributed.is_initialized()
    finally:
        distributed.destroy_process_group()
