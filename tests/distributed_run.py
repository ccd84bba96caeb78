"""What every rank runs in test_distributed.py: trainings without MemTrace and with it, in one process group after the
other. Writes what it saw to ``<folder>/rank-<rank>.json``.

    accelerate launch --config_file examples/accelerate/ddp.yaml tests/distributed_run.py '{"folder": "...", ...}'
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import tiny  # noqa: E402
import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from trl_memtrace import MemoryTracer, MemTrace  # noqa: E402

RANK = int(os.environ["RANK"])
HANG_SECONDS = 90.0
PAUSE_SECONDS = 0.05


def let_cpus_be_sharded() -> None:
    """accelerate shards only what runs on accelerators, and FSDP1 knows a CPU by no number."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    begin = PartialState.__init__

    def begin_as_if_on_accelerators(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            state = self._shared_state
            state["distributed_type"], state["device"] = DistributedType.MULTI_GPU, torch.device("cpu")

    PartialState.__init__ = begin_as_if_on_accelerators


def do_without_compiled_operators() -> None:
    """DeepSpeed would compile one for shared memory between CPU ranks, which takes minutes; gloo does as well."""
    import deepspeed

    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)


class Killer(TrainerCallback):
    """Ends rank 1 as its second step begins, while the others go on with theirs."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def let_the_group_catch_up(*_: Any) -> None:
    """Before FSDP lets go of what it gathered last: gloo's thread, which may come late on a busy machine, has done so
    then, and the buffer ends where FSDP says."""
    time.sleep(PAUSE_SECONDS)


def train(folder: Path, kind: str, traced: bool, *callbacks: TrainerCallback, **settings: Any) -> list[float]:
    trainer = tiny.trainer(
        folder,
        use_cpu=not kind.startswith("zero"),
        ddp_backend="gloo",
        max_grad_norm=1.0,
        **settings,
    )
    if kind == "fsdp2":
        trainer.model.register_forward_hook(let_the_group_catch_up)
    for callback in callbacks:
        trainer.add_callback(callback)
    if traced:
        trainer.add_callback(MemTrace(first_steps=100, print_table=True))
    trainer.train()
    return tiny.losses(trainer)


def in_a_child(port: int, run: Any) -> dict[str, Any]:
    """Run something in a process group of its own, in a fork of this process: how it ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
        shown, said = io.StringIO(), {}
        try:
            with contextlib.redirect_stdout(shown):
                said = {"result": run()}
            code = 0
        except BaseException as problem:
            said = {"error": type(problem).__name__}
            code = 1
        os.write(writer, json.dumps({**said, "shown": shown.getvalue()}).encode())
        os._exit(code)
    os.close(writer)
    began, status = time.monotonic(), None
    while status is None and time.monotonic() - began < HANG_SECONDS:
        ended, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else None
        time.sleep(0.05)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    return {"status": status, **(json.loads(text) if text else {})}


def killed(folder: Path, kind: str, ports: list[int]) -> dict[str, Any]:
    """A run whose rank 1 is killed, without MemTrace and with it."""
    return {
        "plain": in_a_child(ports[0], lambda: train(folder / "killed-plain", kind, False, Killer())),
        "traced": in_a_child(ports[1], lambda: train(folder / "killed-traced", kind, True, Killer())),
    }


def bare_loops() -> dict[str, Any]:
    """Plain loops over DDP, with buckets that are rebuilt after the first step: beside the gradients, and under
    them."""
    seen: dict[str, Any] = {}
    for view in (False, True):
        torch.manual_seed(0)
        inner = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(4)))
        model = torch.nn.parallel.DistributedDataParallel(inner, gradient_as_bucket_view=view, bucket_cap_mb=0.3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracer = MemoryTracer(model, optimizer)
        for _ in range(3):
            with tracer.step():
                model(torch.ones(2, 256)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        tracer.close()
        seen["view" if view else "beside"] = [
            {name: [phase.at_peak, phase.at_end] for name, phase in step.phases.items()} for step in tracer.run
        ]
        seen["names"] = sorted(tracer.run.peak.modules)
    return seen


def wrapped_functions() -> list[str]:
    """The functions of torch's and DeepSpeed's that are still wrapped by MemTrace."""
    modules = [module for name, module in sys.modules.items() if name.startswith(("torch.", "deepspeed."))]
    owners = [
        *modules,
        *(kind for module in modules for kind in vars(module).values() if issubclass(type(kind), type)),
    ]
    return sorted(
        {name for owner in owners for name, value in vars(owner).items() if "_memtrace" in _attributes(value)}
    )


def _attributes(value: Any) -> Any:
    return getattr(value, "__dict__", ()) if callable(value) and not isinstance(value, type) else ()


def main() -> None:
    told = json.loads(sys.argv[1])
    folder, kind = Path(told["folder"]), told["kind"]
    if kind.startswith("fsdp"):
        let_cpus_be_sharded()
    if kind.startswith("zero"):
        do_without_compiled_operators()
    seen: dict[str, Any] = {"threads": torch.get_num_threads()}
    if told.get("ports"):
        seen["killed"] = killed(folder, kind, told["ports"])
    settings = told.get("settings", {})
    if told.get("apart"):  # ZeRO-3 changes how the process makes models, so that a second one is another
        plain, traced = told["apart"]
        seen["plain"] = in_a_child(plain, lambda: train(folder / "plain", kind, False, **settings))["result"]
        ended = in_a_child(traced, lambda: [train(folder / "traced", kind, True, **settings), wrapped_functions()])
        (seen["traced"], seen["left"]), seen["shown"] = ended["result"], ended["shown"]
    else:
        seen["plain"] = train(folder / "plain", kind, False, **settings)
        gc.collect()
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            seen["traced"] = train(folder / "traced", kind, True, **settings)
        seen["shown"], seen["left"] = shown.getvalue(), wrapped_functions()
    if kind == "ddp":
        seen["bare"] = bare_loops()
    (folder / f"rank-{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
