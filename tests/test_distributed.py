"""Several real processes, started by ``accelerate launch`` with the files in examples/accelerate, on CPUs and gloo.

What each rank must hold is worked out here from the shapes of the model alone.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny

from trl_memtrace import MemTrace, RunTrace
from trl_memtrace.commands.report import report
from trl_memtrace.dryrun import dry_run
from trl_memtrace.ranks import Ranks

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("distributed_run.py")
FLOAT = 4
SHAPES = {name: tuple(parameter.shape) for name, parameter in tiny.model().named_parameters()}
NUMELS = {name: math.prod(shape) for name, shape in SHAPES.items()}
WHOLE = FLOAT * sum(NUMELS.values())
MODULES = {name for name, _ in tiny.model().named_modules()}
TAIL = ("model.norm.weight", "lm_head.weight")
"""What accelerate shards together at the model's end, and FSDP2 keeps gathered from forward to backward."""

STEPS = 3
needs_deepspeed = pytest.mark.skipif(
    not any((Path(path) / "deepspeed").is_dir() for path in sys.path), reason="DeepSpeed is not installed"
)


@dataclass(frozen=True)
class Launched:
    folder: Path
    seen: list[dict[str, Any]]

    def runs(self) -> list[RunTrace]:
        return [RunTrace.load(self.folder / "traced", rank) for rank in range(len(self.seen))]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def launch(folder: Path, kind: str, ranks: int = 2, **told: Any) -> Launched:
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"),
        *("--config_file", str(ROOT / "examples" / "accelerate" / f"{kind}.yaml"), "--num_processes", str(ranks)),
        *(str(SCRIPT), json.dumps({"folder": str(folder), "kind": kind, **told})),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "120"}
    if kind.startswith("zero"):
        environment["DS_ACCELERATOR"] = "cpu"
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=400
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    seen = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    return Launched(folder, seen)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> Launched:
    return launch(tmp_path_factory.mktemp("ddp"), "ddp", ports=free_ports(2))


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory) -> Launched:
    return launch(tmp_path_factory.mktemp("fsdp2"), "fsdp2")


@pytest.fixture(scope="module")
def zero2(tmp_path_factory) -> Launched:
    return launch(tmp_path_factory.mktemp("zero2"), "zero2")


def check_run(launched: Launched, strategy: str) -> None:
    """What holds whatever shards the model."""
    assert [len(seen["plain"]) for seen in launched.seen] == [STEPS] * len(launched.seen)
    for seen in launched.seen:
        assert seen["traced"] == seen["plain"]
        assert seen["left"] == []
    for rank, run in enumerate(launched.runs()):
        assert run.rank == rank
        assert run.finished
        assert run.header.trainer["strategy"] == strategy
        assert run.header.trainer["world_size"] == len(launched.seen)
        assert run.header.model["class"] == "LlamaForCausalLM"
        assert run.header.model["parameters"] == run.header.model["trainable_parameters"] == sum(NUMELS.values())
        assert run.header.model["bytes"] == WHOLE
        assert [step.traced for step in run] == [True] * STEPS
        for step in run:
            assert sum(step.peak.categories.values()) == step.peak.bytes == step.peak.allocator_bytes
            assert sum(step.peak.roles.values()) == step.peak.bytes
            assert step.peak.categories["unattributed"] <= 0.001 * step.peak.bytes
            for phase in step.phases.values():
                assert sum(phase.at_peak.values()) == phase.peak_bytes
                assert sum(phase.at_end.values()) == phase.end_bytes
                assert phase.at_peak["unattributed"] <= 0.001 * phase.peak_bytes
                assert phase.at_end["unattributed"] <= 0.001 * phase.end_bytes
            assert set(step.phases) >= {"forward", "loss", "backward", "optimizer"}
            assert set(step.peak.modules) <= MODULES


def roles(run: RunTrace, name: str) -> set[int]:
    """What a role held at the peak of every step but the first, in which some things are not there yet."""
    return {step.peak.roles.get(name, 0) for step in run.steps[1:]}


def check_states(run: RunTrace, local: int, steps_bytes: int) -> None:
    assert roles(run, "optimizer_states/exp_avg") == roles(run, "optimizer_states/exp_avg_sq") == {local}
    for step in run:
        held = step.phases["optimizer"].at_end["optimizer_states"]
        assert held == 2 * local + steps_bytes + step.peak.roles.get("optimizer_states/master_weights", 0)


def test_ddp_holds_everything_on_every_rank_and_buckets_beside_the_gradients(ddp):
    check_run(ddp, "ddp")
    for run in ddp.runs():
        assert roles(run, "weights/trainable") == {WHOLE}
        check_states(run, WHOLE, FLOAT * len(NUMELS))
        for step in run:
            assert step.phases["optimizer"].at_peak["gradients"] == WHOLE
            assert step.phases["idle"].at_end["gradients"] == 0
            for phase in step.phases.values():
                assert phase.at_peak["communication"] == phase.at_end["communication"] == WHOLE
            assert step.peak.roles["communication/buckets"] == WHOLE


def test_buckets_that_ddp_makes_anew_are_counted_once(ddp):
    whole = 4 * 256 * 256 * FLOAT
    for seen in ddp.seen:
        first, second, third = seen["bare"]["beside"]
        for step in (first, third):
            for at_peak, at_end in step.values():
                assert at_peak["communication"] == at_end["communication"] == whole
        assert second["idle"][0]["communication"] == 2 * whole  # the new are there before the old are gone
        for name in ("forward", "loss", "backward", "optimizer"):
            assert [levels["communication"] for levels in second[name]] == [whole, whole]
        for step in seen["bare"]["view"]:
            for at_peak, at_end in step.values():  # one memory, called by what it is for
                assert at_peak["gradients"] == at_end["gradients"] == whole
                assert at_peak["communication"] < 64  # the sizes that ranks tell each other as they rebuild
        assert seen["bare"]["names"] == ["", "0", "1", "2", "3"]


def rows_of(shape: tuple[int, ...], rank: int, ranks: int) -> int:
    """How many rows of the first dimension a rank has, as torch.chunk deals them out; padded ones are allocated."""
    return math.ceil(shape[0] / ranks)


def fsdp2_bytes(rank: int, ranks: int) -> int:
    return FLOAT * sum(rows_of(shape, rank, ranks) * math.prod(shape[1:]) for shape in SHAPES.values())


def test_fsdp2_holds_shards_and_gathers_are_communication(fsdp2):
    check_run(fsdp2, "fsdp2")
    tail = FLOAT * sum(NUMELS[name] for name in TAIL)
    for rank, run in enumerate(fsdp2.runs()):
        local = fsdp2_bytes(rank, 2)
        assert roles(run, "weights/trainable") == {local}
        check_states(run, local, FLOAT * len(NUMELS))
        for step in run:
            assert step.phases["optimizer"].at_peak["gradients"] == local
            assert step.phases["idle"].at_end["gradients"] == 0
            # At the end of forward the tail is being gathered: a buffer, and the parameters made from it.
            assert step.phases["forward"].at_peak["communication"] == 2 * tail
            assert step.phases["loss"].at_peak["communication"] == tail
            assert step.phases["idle"].at_end["communication"] == 0
    assert sum(run.peak.roles["weights/trainable"] for run in fsdp2.runs()) == WHOLE
    assert sum(run.steps[-1].peak.roles["optimizer_states/exp_avg"] for run in fsdp2.runs()) == WHOLE
    assert sum(run.steps[-1].phases["optimizer"].at_peak["gradients"] for run in fsdp2.runs()) == WHOLE


def zero_groups() -> list[list[int]]:
    """The Trainer's two groups: what decays, and what does not."""
    return [
        [size for name, size in NUMELS.items() if "norm" not in name],
        [size for name, size in NUMELS.items() if "norm" in name],
    ]


def zero2_gradients(rank: int, ranks: int) -> int:
    """ZeRO-2 keeps the gradients of every parameter that reaches into its partition, whole."""
    kept = 0
    for sizes in zero_groups():
        partition, place = sum(sizes) // ranks, 0
        for size in sizes:
            kept += size if place < (rank + 1) * partition and place + size > rank * partition else 0
            place += size
    return FLOAT * kept


@needs_deepspeed
def test_zero2_holds_partitions_of_gradients_and_states(zero2):
    check_run(zero2, "zero2")
    for rank, run in enumerate(zero2.runs()):
        local = WHOLE // 2  # both groups divide by two
        assert roles(run, "weights/trainable") == {WHOLE}
        assert roles(run, "optimizer_states/master_weights") == {local}
        check_states(run, local, FLOAT * len(zero_groups()))
        for step in run:
            assert step.phases["backward"].at_end["gradients"] == zero2_gradients(rank, 2)
            assert step.phases["backward"].at_end["communication"] == 0
            assert step.phases["idle"].at_end["gradients"] == 0
    assert roles(zero2.runs()[0], "communication/buckets") == {500_000_000 * FLOAT}  # DeepSpeed's default
    for name in ("exp_avg", "exp_avg_sq", "master_weights"):
        assert sum(run.peak.roles[f"optimizer_states/{name}"] for run in zero2.runs()) == WHOLE


def test_rank_0_shows_the_spread(ddp):
    runs = ddp.runs()
    spread = {row.what: row for row in Ranks.load(ddp.folder / "traced").spread}
    peaks = [run.peak.bytes for run in runs]
    assert (spread["peak"].least, spread["peak"].most) == (min(peaks), max(peaks))
    assert peaks[spread["peak"].least_rank] == min(peaks)
    assert peaks[spread["peak"].most_rank] == max(peaks)
    assert peaks[0] != peaks[1]
    assert "2 ranks (ddp), in MiB" in ddp.seen[0]["shown"]
    assert f"{max(peaks) / 2**20:.2f}" in ddp.seen[0]["shown"].split("2 ranks")[1]
    assert "MemTrace" not in ddp.seen[1]["shown"]


def test_a_rank_that_is_killed_costs_nobody_else_anything(ddp, capsys):
    first, second = (seen["killed"] for seen in ddp.seen)
    assert [second[name]["status"] for name in ("plain", "traced")] == [-signal.SIGKILL, -signal.SIGKILL]
    assert first["plain"]["status"] == first["traced"]["status"] == 1
    assert first["plain"]["error"] == first["traced"]["error"]
    folder = ddp.folder / "killed-traced"
    ranks = Ranks.load(folder)
    assert sorted(ranks.runs) == [0, 1]
    assert ranks.unfinished == (1,)
    assert ranks.runs[0].failure is not None
    assert ranks.runs[0].failure.step == 2
    assert [step.step for step in ranks.runs[1]] == [1]
    told = "Rank 1 of 2 did not finish: its record ends with step 1."
    assert told in first["traced"]["shown"]
    report(folder, terminal=True)
    assert told in " ".join(capsys.readouterr().out.split())
    report(folder)
    assert told in (folder / "memtrace" / "report.html").read_text()


FLAGS: dict[str, dict[str, Any]] = {
    "ddp": {"use_cpu": True},
    "fsdp2": {"use_cpu": True, "fsdp": True},
    "fsdp1": {"use_cpu": True, "fsdp": True, "fsdp_config": {"version": 1}},
    **{
        f"zero{stage}": {
            "deepspeed": {
                "zero_optimization": {"stage": stage},
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
            }
        }
        for stage in (1, 2, 3)
    },
}
"""What says to the Trainer what the launch files say to accelerate."""


def check_dry_run(folder: Path, launched: Launched, kind: str) -> None:
    """A dry run of the first rank, on this process alone, is what the first rank was."""
    real, ranks = launched.runs()[0], len(launched.seen)
    with dry_run(semantics="cpu", steps=STEPS, ranks=ranks) as dry:
        given = {"use_cpu": False, "ddp_backend": "gloo", "max_grad_norm": 1.0, **FLAGS[kind]}
        tiny.trainer(folder, **given).train()
    for name in ("world_size", "rank", "strategy", "class"):
        assert dry.run.header.trainer[name] == real.header.trainer[name], name
    assert dry.run.header.model == real.header.model
    assert len(dry.run) == len(real) == STEPS
    tensors = FLOAT * 4 * len(NUMELS)  # the optimizer's step counts, and numbers that are there for a moment
    for step, told in zip(real, dry.run, strict=True):
        assert told.peak.bytes == pytest.approx(step.peak.bytes, rel=0.0005, abs=tensors)
        assert told.peak.categories["unattributed"] <= 0.001 * told.peak.bytes
        assert told.phases.keys() == step.phases.keys()
        for phase, levels in step.phases.items():
            held = told.phases[phase].at_end
            for category in ("weights", "gradients", "communication"):
                assert held[category] == pytest.approx(levels.at_end[category], abs=2 * FLOAT), (phase, category)
            counts = levels.at_end["optimizer_states"] - held["optimizer_states"]
            assert 0 <= counts <= FLOAT * len(NUMELS), phase
            assert told.phases[phase].peak_bytes == pytest.approx(levels.peak_bytes, rel=0.005, abs=tensors), phase
        for role, size in step.peak.roles.items():
            if role.startswith(("weights/trainable", "gradients/", "communication/", "optimizer_states/")):
                assert told.peak.roles.get(role, 0) == size or role == "optimizer_states/step", role


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", pytest.param("zero2", marks=needs_deepspeed)])
def test_a_dry_run_is_what_the_first_rank_is(kind, request, tmp_path):
    check_dry_run(tmp_path, request.getfixturevalue(kind), kind)


@pytest.mark.slow
def test_fsdp1_holds_flat_shards(tmp_path):
    launched = launch(tmp_path, "fsdp1")
    check_run(launched, "fsdp1")
    check_dry_run(tmp_path / "dry", launched, "fsdp1")
    for run in launched.runs():
        assert roles(run, "weights/trainable") == {WHOLE // 2}
        assert roles(run, "optimizer_states/exp_avg") == {WHOLE // 2}
        assert roles(run, "communication/gathered_weights") != {0}
        for step in run:
            assert step.phases["optimizer"].at_peak["gradients"] == WHOLE // 2


@pytest.mark.slow
def test_fsdp2_on_three_ranks_with_accumulation_and_checkpointing(tmp_path):
    settings = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    launched = launch(tmp_path, "fsdp2", 3, settings=settings)
    check_run(launched, "fsdp2")
    for rank, run in enumerate(launched.runs()):
        assert roles(run, "weights/trainable") == {fsdp2_bytes(rank, 3)}
        for step in run:
            assert step.phases["idle"].at_end["gradients"] == 0


@pytest.mark.slow
@needs_deepspeed
def test_zero1_holds_partitions_of_states(tmp_path):
    launched = launch(tmp_path, "zero1")
    check_run(launched, "zero1")
    check_dry_run(tmp_path / "dry", launched, "zero1")
    for run in launched.runs():
        assert roles(run, "weights/trainable") == {WHOLE}
        assert roles(run, "optimizer_states/master_weights") == {WHOLE // 2}
        check_states(run, WHOLE // 2, FLOAT * len(zero_groups()))


@pytest.mark.slow
@needs_deepspeed
def test_zero3_holds_partitions_of_weights_too(tmp_path):
    launched = launch(tmp_path, "zero3", apart=free_ports(2))
    check_run(launched, "zero3")
    check_dry_run(tmp_path / "dry", launched, "zero3")
    for run in launched.runs():
        assert roles(run, "weights/trainable") == {WHOLE // 2}
        assert roles(run, "optimizer_states/master_weights") == {WHOLE // 2}
        check_states(run, WHOLE // 2, FLOAT * len(zero_groups()))
        assert roles(run, "gradients/partition") == {WHOLE // 2}
        assert roles(run, "communication/gathered_weights") == {WHOLE}  # small ones are never let go of
        for step in run:
            assert step.phases["backward"].at_end["gradients"] == WHOLE // 2


def test_a_model_that_is_dispatched_over_devices_is_counted_as_ever(tmp_path):
    from accelerate import dispatch_model

    places: dict[str, Callable | str] = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.norm": "cpu", "lm_head": "cpu"}
    trainer = tiny.trainer(tmp_path, dispatch_model(tiny.model(), places, force_hooks=True))
    plain = tiny.trainer(tmp_path / "plain")
    callback = MemTrace()
    trainer.add_callback(callback)
    trainer.train()
    plain.train()
    assert tiny.losses(trainer) == tiny.losses(plain)
    assert callback.run.peak.roles["weights/trainable"] == WHOLE
    assert callback.run.peak.categories["unattributed"] <= 0.001 * callback.run.peak.bytes
    assert callback.run.header.trainer["strategy"] is None
