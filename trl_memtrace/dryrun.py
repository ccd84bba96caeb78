"""dry_run: the user's own trainer, its real step, on tensors that have shapes and no memory.

Everything happens as in a real run but the arithmetic: the same modules, the same autograd, the same optimizer.
Storages are seen to come and go, go through a simulated caching allocator, and end in the same books and the same
record.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .allocator import SMALL_SEGMENT, AllocatorConfig, CachingAllocator
from .device import Device, custom_device, find_device
from .errors import MemtraceError
from .fake_calls import Calls
from .kernels import Card, CpuKernels, CudaKernels, DeviceFunctions
from .recorders.fake import FakeMemory, StorageWatch
from .records import RunTrace, dump_line, record_name
from .step_books import peak_books_path
from .underway import current, under_way

DEFAULT_CAPABILITY = (8, 0)
"""Of a device of which only the memory is known."""


def _downwards() -> Callable[[int], int]:
    """Places segments as the driver does on Linux, each below the last, as the snapshots of real runs show. It matters
    where free blocks are equal."""
    lowest = 1 << 47

    def place(size: int) -> int:
        nonlocal lowest
        lowest -= -(-size // SMALL_SEGMENT) * SMALL_SEGMENT
        return lowest

    return place


class DryRunError(MemtraceError):
    """Something that cannot be faked, or a dry run in which nothing was trained."""


class DryRun:
    """A dry run under way, or over.

    Attributes:
        device: the card that is pretended; None for one without limits.
        memory: what its allocator has.
    """

    def __init__(
        self,
        device: Device | None,
        dtype: torch.dtype | None,
        semantics: str,
        steps: int,
        allocator: AllocatorConfig,
        ranks: int = 1,
    ) -> None:
        self.device = device
        self.steps = steps
        self.ranks = ranks
        self.dtype = dtype
        self._semantics = semantics
        self._runs: list[Any] = []
        self.capability = (device.capability if device is not None else None) or DEFAULT_CAPABILITY
        if semantics == "cuda":
            capacity = device.total_bytes - self.context_bytes if device is not None else None
            self.memory = FakeMemory(CachingAllocator(allocator, capacity, place=_downwards()))
            self._kernels: Any = CudaKernels(Card.of(self.capability))
        else:
            self.memory = FakeMemory(None)
            self._kernels = CpuKernels()
        self.fake_mode = _FakeMode(allow_non_fake_inputs=True)
        self.watch = StorageWatch(self.memory, self._kernels, Calls(self.fake_mode))
        self.functions = DeviceFunctions(self.watch)

    @property
    def is_cuda(self) -> bool:
        """Whether CUDA's kernels and allocator are pretended."""
        return self._semantics == "cuda"

    @property
    def context_bytes(self) -> int:
        """The CUDA context, where a source for it is known; else 0."""
        context = self.device.context if self.device is not None else None
        return context.bytes if context is not None else 0

    @property
    def run(self) -> RunTrace:
        """The record of what was trained.

        Raises:
            DryRunError: nothing was.
        """
        run: RunTrace = self._trained().run
        return run

    def _trained(self) -> Any:
        """The last tracer that saw a step."""
        for tracer in reversed(self._runs):
            if len(tracer.run):
                return tracer
        raise DryRunError("nothing was trained in this dry run: no step of a Trainer or a MemoryTracer was seen")

    def describe_device(self) -> dict[str, Any]:
        """The ``device`` of the record."""
        if not self.is_cuda:
            return {"type": "cpu", "name": "CPU", "total_bytes": None}
        return {
            "type": "cuda",
            "name": self.device.name if self.device is not None else None,
            "total_bytes": self.device.total_bytes if self.device is not None else None,
        }

    @property
    def is_watched(self) -> bool:
        """Whether a tracer has begun to watch in here."""
        return bool(self._runs)

    def adopt(self, tracer: Any) -> None:
        """A tracer has begun to watch in here."""
        self._runs.append(tracer)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Tensors are fake and counted."""
        with self.fake_mode, self.watch:
            yield

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Tensors are fake and in the host's memory."""
        with self.inside(), self.watch.elsewhere():
            yield

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Tensors are real."""
        from torch.utils._python_dispatch import _disable_current_modes

        with _disable_current_modes():
            yield

    def until_trained(self) -> AbstractContextManager[None]:
        """Leaves when the first training in here is over."""
        from .dry_script import until_trained

        return until_trained(self)

    def to_device(self, batch: Any) -> Any:
        """Real tensors as fakes on the device, whose values are known where they are few enough."""
        from torch.utils._pytree import tree_map_only

        from .pretence import on_host

        return tree_map_only(torch.Tensor, lambda tensor: tensor.to("cpu"), on_host(batch, self))

    def summary(self) -> dict[str, Any]:
        """The record's summary, with what the whole process would take and whether it fits.

        Raises:
            DryRunError: nothing was trained.
        """
        summary = self.run.summary
        data = summary.to_json()
        allocator = self.memory.allocator
        if allocator is not None:
            process = allocator.reserved_peak_bytes + self.context_bytes
            data["reserved_peak_bytes"] = allocator.reserved_peak_bytes
            data["reserved_end_bytes"] = allocator.reserved_bytes
            data["context_bytes"] = self.context_bytes or None
            data["process_peak_bytes"] = process
            if self.device is not None:
                data["fits"] = self.memory.refusal is None and process <= self.device.total_bytes
        return data

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write its record into a folder, as a run leaves one, for ``report`` and ``diff``.

        Returns:
            the record's file.

        Raises:
            DryRunError: nothing was trained.
            OSError: it cannot be written.
        """
        tracer, path = self._trained(), Path(folder) / record_name(0)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [tracer.run.header.to_json(), *(step.to_json() for step in tracer.run), self.summary()]
        path.write_text("".join(map(dump_line, lines)), encoding="utf-8")
        if tracer.peak_books is not None:
            tracer.peak_books.save(peak_books_path(path))
        return path


class _FakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """It is shared by the copies of what was made in it. PyTorch copies it with every fake tensor, and with it weak
    references to storages, of which each is then freed twice."""

    def __deepcopy__(self, memo: Any) -> _FakeMode:
        return self


@contextmanager
def dry_run(
    device: str | int | Device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    semantics: str = "cuda",
    steps: int = 2,
    allocator: str = "",
    ranks: int = 1,
) -> Iterator[DryRun]:
    """Run code without its memory and without its arithmetic, and learn what it would have taken.

        with dry_run(device="NVIDIA A100-SXM4-80GB") as dry:
            trainer = SFTTrainer(model="microsoft/Phi-3-mini-128k-instruct", ...)
            trainer.train()
        dry.run.peak

    Inside, ``from_pretrained`` makes tensors without weights from the config; tensors are made as usual and hold no
    data; a Trainer trains ``steps`` steps and saves, evaluates and reports nothing.

    Args:
        device: a name from the table of devices, a number of bytes, or None for a card without limits.
        dtype: the dtype of models whose loading names none.
        semantics: ``"cuda"``, or ``"cpu"`` to do as the CPU's kernels and allocator do.
        steps: how many optimizer steps a Trainer takes.
        allocator: ``PYTORCH_CUDA_ALLOC_CONF`` for the simulated allocator.
        ranks: how many processes train together; this is the first of them, and nobody else is there.

    Raises:
        MemtraceError: no such device.
        ValueError: ``dtype``, ``semantics``, ``steps``, ``allocator`` or ``ranks`` has a value that it cannot take.
        DryRunError: a dry run is under way already.
        RankError: there are to be several ranks, and this process is one of several itself.
    """
    if semantics not in ("cuda", "cpu"):
        raise ValueError(f"semantics must be 'cuda' or 'cpu', not {semantics!r}")
    for name, value in (("steps", steps), ("ranks", ranks)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of 1 or more, not {value!r}")
    if current() is not None:
        raise DryRunError("a dry run is under way already")
    card = (
        find_device(device)
        if isinstance(device, str)
        else custom_device(device)
        if isinstance(device, int)
        else device
    )
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(chosen, torch.dtype) and chosen.is_floating_point):
        raise ValueError(f"dtype must be one of torch's for weights, such as 'bfloat16', not {dtype!r}")
    dry = DryRun(card, chosen, semantics, steps, AllocatorConfig.parse(allocator), ranks)
    from .pretence import pretend

    with ExitStack() as stack:
        stack.enter_context(under_way(dry))
        stack.enter_context(pretend(dry))
        stack.enter_context(dry.functions)
        stack.enter_context(dry.inside())
        yield dry
