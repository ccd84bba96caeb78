"""Beyond the allocator: what the driver says of a device and of who uses it, and a table of known devices.

Nothing here creates a CUDA context, and nothing needs a GPU. docs/devices.md says where every figure is from.
"""

# ruff: noqa: N802, N815 (Nvml's names are pynvml's)

from __future__ import annotations

import difflib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from .errors import MemtraceError
from .units import GIB, MIB, format_bytes

Answer = TypeVar("Answer")
Handle = Any
"""NVML's own pointer to a device."""


class Nvml(Protocol):
    """The part of ``pynvml`` that is used; the module itself is one, and a test brings another."""

    nvmlMemory_v2: int

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> str: ...
    def nvmlSystemGetCudaDriverVersion(self) -> int: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Handle: ...
    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Handle: ...
    def nvmlDeviceGetUUID(self, handle: Handle) -> str: ...
    def nvmlDeviceGetName(self, handle: Handle) -> str: ...
    def nvmlDeviceGetMigMode(self, device: Handle) -> Any: ...
    def nvmlDeviceIsMigDeviceHandle(self, device: Handle) -> Any: ...
    def nvmlDeviceGetMemoryInfo(self, handle: Handle, version: int | None = None) -> Any: ...
    def nvmlDeviceGetComputeRunningProcesses(self, handle: Handle) -> Any: ...
    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: Handle) -> Any: ...
    def nvmlDeviceGetMPSComputeRunningProcesses(self, handle: Handle) -> Any: ...


class Runtime(Protocol):
    """What CUDA's runtime knows where NVML does not answer."""

    def uuid(self, index: int) -> str | None: ...
    def memory(self, index: int) -> tuple[int, int] | None: ...


class TorchRuntime:
    """CUDA's runtime through torch, asked only where torch has initialised it already."""

    def uuid(self, index: int) -> str | None:
        """The UUID of CUDA's device ``index``, without ``GPU-`` or ``MIG-`` before it."""
        cuda = self._cuda()
        return str(cuda.get_device_properties(index).uuid) if cuda else None

    def memory(self, index: int) -> tuple[int, int] | None:
        """Free and total bytes; None where this process holds nothing yet, as the question would make a context."""
        cuda = self._cuda()
        if cuda is None or not cuda.memory_reserved(index):
            return None
        free, total = cuda.mem_get_info(index)
        return int(free), int(total)

    def _cuda(self) -> Any:
        torch = sys.modules.get("torch")
        return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """What the driver says of one device. Whatever it does not say is None, and ``missing`` says why.

    Attributes:
        index: the device, as CUDA counts in this process.
        name: as the driver calls it.
        total_bytes: all its memory; of a MIG instance, the instance's.
        used_bytes: what ``nvidia-smi`` shows as used, by whomever.
        process_bytes: what this process holds of that, its CUDA context included.
        other_processes_bytes: what all other processes hold together.
        driver_version: such as ``550.90.07``.
        cuda_version: the newest CUDA that the driver serves, such as ``12.4``.
        missing: what is not known and why, a line each.
    """

    index: int
    name: str | None = None
    total_bytes: int | None = None
    used_bytes: int | None = None
    process_bytes: int | None = None
    other_processes_bytes: int | None = None
    driver_version: str | None = None
    cuda_version: str | None = None
    missing: tuple[str, ...] = ()


def read_usage(
    index: int = 0,
    *,
    nvml: Nvml | None = None,
    runtime: Runtime | None = None,
    environ: Mapping[str, str] = os.environ,
    pid: int | None = None,
) -> DeviceUsage:
    """Ask the driver about a device. Never raises: what cannot be known is None and said in ``missing``.

    Args:
        index: the device, as CUDA counts in this process (after CUDA_VISIBLE_DEVICES).
        nvml: who answers; pynvml when not given.
        runtime: who knows the device's UUID, and its memory where NVML does not; torch when not given.
        environ: where CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER are looked up.
        pid: which process is this one; the calling one when not given.
    """
    questions = _Questions()
    runtime = runtime or TorchRuntime()
    usage = DeviceUsage(index)
    opened = questions.ask("all that the driver knows", lambda: _open(nvml))
    if opened is not None:
        usage = replace(
            usage,
            driver_version=questions.ask("driver version", lambda: opened.nvmlSystemGetDriverVersion()),
            cuda_version=questions.ask("CUDA version", lambda: _cuda_version(opened)),
        )
        handle = questions.ask("device", lambda: _find(opened, index, runtime, environ))
        if handle is not None:
            usage = _read_device(usage, opened, handle, os.getpid() if pid is None else pid, questions)
        questions.ask("end of NVML", lambda: opened.nvmlShutdown())
    if usage.used_bytes is None:
        memory = questions.ask("total and used memory by CUDA's runtime", lambda: runtime.memory(index))
        if memory is not None:
            free, total = memory
            usage = replace(usage, total_bytes=total, used_bytes=total - free)
            questions.missing.append("total and used memory by the driver's count: CUDA's runtime was asked instead")
    return replace(usage, missing=tuple(questions.missing))


class _Questions:
    """Puts questions whose answer may fail to come, and keeps in words what did not come."""

    def __init__(self) -> None:
        self.missing: list[str] = []

    def ask(self, what: str, question: Callable[[], Answer]) -> Answer | None:
        try:
            return question()
        except Exception as problem:  # pynvml's own are of two families, and an old one lacks functions
            self.missing.append(f"{what}: {_in_words(problem)}")
            return None


def _in_words(problem: Exception) -> str:
    if isinstance(problem, ImportError):
        return "the package nvidia-ml-py is not installed"
    if isinstance(problem, LookupError):
        return str(problem)
    kind = type(problem).__name__
    return f"NVML says {problem}" if kind.startswith("NVML") else f"{kind}: {problem}"


def _open(nvml: Nvml | None) -> Nvml:
    if nvml is None:
        import pynvml

        nvml = pynvml
    nvml.nvmlInit()
    return nvml


def _cuda_version(nvml: Nvml) -> str:
    number = nvml.nvmlSystemGetCudaDriverVersion()
    return f"{number // 1000}.{number % 1000 // 10}"


def _find(nvml: Nvml, index: int, runtime: Runtime, environ: Mapping[str, str]) -> Handle:
    """NVML's handle of CUDA's device ``index``. NVML knows nothing of CUDA_VISIBLE_DEVICES and counts in PCI order.

    Raises:
        LookupError: it cannot be told which one it is.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    entry = str(index) if visible is None else _entry(visible, index)
    if entry.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(entry)
    uuid = runtime.uuid(index)
    for known in (f"MIG-{uuid}", f"GPU-{uuid}") if uuid else ():
        try:
            return nvml.nvmlDeviceGetHandleByUUID(known)
        except Exception:  # of the two only one exists
            continue
    handles = [nvml.nvmlDeviceGetHandleByIndex(position) for position in range(nvml.nvmlDeviceGetCount())]
    if entry.startswith("GPU-"):
        found = [handle for handle in handles if nvml.nvmlDeviceGetUUID(handle).startswith(entry)]
        if len(found) != 1:
            raise LookupError(f"{len(found)} devices have a UUID that begins with {entry}")
        return found[0]
    if not 0 <= int(entry) < len(handles):
        raise LookupError(f"NVML sees {len(handles)} devices and none of number {entry}")
    by_speed = len(handles) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
    if by_speed and len({*map(nvml.nvmlDeviceGetName, handles)}) > 1:
        raise LookupError(
            "the devices differ, and CUDA sorts them by speed where NVML goes by the bus;"
            " set CUDA_DEVICE_ORDER=PCI_BUS_ID, or ask once torch has initialised CUDA"
        )
    return handles[int(entry)]


def _entry(visible: str, index: int) -> str:
    """What CUDA_VISIBLE_DEVICES says of one device; as in CUDA, one that is none ends the list, and one
    that comes twice empties it."""
    entries = [entry.strip() for entry in visible.split(",")]
    entries = list(itertools.takewhile(re.compile(r"\d+|(?:GPU|MIG)-.+").fullmatch, entries))
    if not 0 <= index < len(entries) or len({*entries}) < len(entries):
        raise LookupError(f"CUDA_VISIBLE_DEVICES={visible} shows no device {index}")
    return entries[index]


def _read_device(usage: DeviceUsage, nvml: Nvml, handle: Handle, pid: int, questions: _Questions) -> DeviceUsage:
    usage = replace(usage, name=questions.ask("name", lambda: nvml.nvmlDeviceGetName(handle)))
    if _has_instances(nvml, handle):
        questions.missing.append(
            "memory and processes: MIG is on, and nothing says which instance this process has (CUDA_VISIBLE_DEVICES"
            " names none); the figures would be the whole card's"
        )
        return usage
    memory = questions.ask("total and used memory", lambda: _memory(nvml, handle))
    if memory is not None:
        total, used = memory
        usage = replace(usage, total_bytes=total, used_bytes=used)
    own, others = _processes(nvml, handle, pid, questions)
    return replace(usage, process_bytes=own, other_processes_bytes=others)


def _has_instances(nvml: Nvml, handle: Handle) -> bool:
    """Whether this is a whole card cut into MIG instances."""
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0]) and not nvml.nvmlDeviceIsMigDeviceHandle(handle)
    except Exception:  # a card, an instance or a driver that does not know the question
        return False


def _memory(nvml: Nvml, handle: Handle) -> tuple[int, int]:
    """Total and used bytes. Version 2 counts as nvidia-smi does; in version 1, all that drivers before 510 have, what
    the driver keeps for itself counts as used."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except Exception:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return int(memory.total), int(memory.used)


def _processes(nvml: Nvml, handle: Handle, pid: int, questions: _Questions) -> tuple[int | None, int | None]:
    """Bytes of this process and of all others together."""

    def ask(what: str, question: Callable[[], Iterable[Any]]) -> list[tuple[int, int | None]] | None:
        return questions.ask(what, lambda: _pairs(question()))

    lists = [
        ask("this process and other processes", lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        ask("other processes, drawing", lambda: _if_any(lambda: nvml.nvmlDeviceGetGraphicsRunningProcesses(handle))),
        ask("other processes, MPS", lambda: _if_any(lambda: nvml.nvmlDeviceGetMPSComputeRunningProcesses(handle))),
    ]
    if lists[0] is None:
        return None, None
    held = _largest_by_pid(pair for pairs in lists for pair in pairs or ())
    if pid not in held:
        questions.missing.append(
            f"this process and other processes: the driver lists {len(held)} and not pid {pid}: a container has pids"
            " of its own or hides the list, or this process has not used the device yet"
        )
        return None, None
    own = held.pop(pid)
    if own is None:
        questions.missing.append("this process: the driver does not say what it holds, as under WDDM on Windows")
    others = [size for size in held.values() if size is not None]
    if len(others) < len(held):
        questions.missing.append(
            f"other processes: what {len(held) - len(others)} of them hold the driver does not say"
        )
    return own, None if None in lists or len(others) < len(held) else sum(others)


def _pairs(listed: Iterable[Any]) -> list[tuple[int, int | None]]:
    return [(int(entry.pid), None if entry.usedGpuMemory is None else int(entry.usedGpuMemory)) for entry in listed]


def _if_any(question: Callable[[], Iterable[Any]]) -> Iterable[Any]:
    try:
        return question()
    except Exception as problem:
        if type(problem).__name__ in ("NVMLError_NotSupported", "NVMLError_FunctionNotFound", "AttributeError"):
            return ()
        raise


def _largest_by_pid(pairs: Iterable[tuple[int, int | None]]) -> dict[int, int | None]:
    """Bytes by process. One that both computes and draws stands in both lists, each time with all that it holds."""
    held: dict[int, int | None] = {}
    for pid, size in pairs:
        sizes = (held.get(pid), size)
        held[pid] = max((known for known in sizes if known is not None), default=None)
    return held


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the balance: what, how many bytes (None: not known), and why it is there."""

    what: str
    bytes: int | None
    why: str


def balance(usage: DeviceUsage, allocated_bytes: int, reserved_bytes: int) -> tuple[Line, ...]:
    """From what PyTorch has allocated to what ``nvidia-smi`` shows as used.

    The last line is ``used``; the known ones before it add up to it, by way of an ``unexplained`` line where they
    would not. What other libraries of this process allocate past PyTorch (NCCL, for example) stands in the CUDA
    context: the driver counts by process and does not tell them apart.

    Args:
        usage: what the driver says.
        allocated_bytes: what the caching allocator has handed out, that is, the sum of the categories.
        reserved_bytes: what it holds.

    Raises:
        ValueError: more is allocated than reserved.
    """
    if not 0 <= allocated_bytes <= reserved_bytes:
        raise ValueError(f"allocated_bytes is {allocated_bytes}: not between 0 and reserved_bytes, {reserved_bytes}")
    lines = [
        Line("allocated", allocated_bytes, "what the categories add up to"),
        Line("free inside reserved", reserved_bytes - allocated_bytes, "kept by the caching allocator for later"),
        *_beyond(usage, reserved_bytes),
    ]
    if usage.used_bytes is not None:
        rest = usage.used_bytes - sum(line.bytes or 0 for line in lines)
        if rest:
            lines.append(Line("unexplained", rest, _why_unexplained(lines, rest)))
    return *lines, Line("used", usage.used_bytes, "by the driver's count, as nvidia-smi shows it")


def _beyond(usage: DeviceUsage, reserved_bytes: int) -> Iterator[Line]:
    own, others, doubt = usage.process_bytes, usage.other_processes_bytes, ""
    if own is not None and own < reserved_bytes:
        doubt = f"the driver counts {format_bytes(own)} for this pid, less than is reserved: some other process's; "
        own = others = None
    if own is not None:
        why = "this process less reserved: the context, its kernels, and what NCCL and other libraries allocate"
        yield Line("CUDA context", own - reserved_bytes, why)
    else:
        device = _lookup(usage.name) if usage.name else None
        context = device.context if device else None
        if context is not None:
            yield Line("CUDA context", context.bytes, f"{doubt}not measured here; elsewhere: {context.source}")
        else:
            yield Line("CUDA context", None, f"{doubt}this process is not told apart, and no source is known for it")
    why = "what the driver counts for them" if others is not None else f"{doubt}not known"
    yield Line("other processes", others, why)


def _why_unexplained(lines: Iterable[Line], rest: int) -> str:
    unknown = [line.what for line in lines if line.bytes is None]
    if rest < 0:
        return "more is known of than is used: read at different instants, or a context smaller than the one assumed"
    if unknown:
        return f"holds what is not known apart: {', '.join(unknown)}"
    return "nobody's by the driver's count: its own share, or a change between two readings"


@dataclass(frozen=True, slots=True)
class Context:
    """A measured CUDA context: what a process holds on a device beyond what PyTorch has reserved.

    Attributes:
        bytes: its size; it grows with the kernels that are loaded.
        source: who measured what.
        driver: the driver's version, where known.
        cuda: CUDA's version, where known.
        torch: torch's version, where known.
    """

    bytes: int
    source: str
    driver: str | None = None
    cuda: str | None = None
    torch: str | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """A card.

    Attributes:
        name: as the driver calls it.
        total_bytes: all its memory. torch reports a little less.
        capability: its compute capability; None for one that only has a size.
        aliases: what else a user may call it.
        total_source: where ``nvidia-smi`` showed that total; None where it is the nominal one.
        contexts: CUDA contexts that were measured on it, the newest last; empty where no source is known.
    """

    name: str
    total_bytes: int
    capability: tuple[int, int] | None = None
    aliases: tuple[str, ...] = ()
    total_source: str | None = None
    contexts: tuple[Context, ...] = ()

    @property
    def context(self) -> Context | None:
        """The newest measured CUDA context; None where no source is known."""
        return self.contexts[-1] if self.contexts else None


def find_device(name: str) -> Device:
    """The known device of this name: the driver's (``NVIDIA A100-SXM4-80GB``) or a short one (``A100 80GB``, ``t4``).

    Raises:
        MemtraceError: there is none; the message names those that come close.
    """
    device = _lookup(name)
    if device is None:
        key = _key(name)
        like = [known for known in _BY_KEY if key and known.startswith(key)]
        like = like or difflib.get_close_matches(key, _BY_KEY, n=5, cutoff=0.6)
        names = list(dict.fromkeys(_BY_KEY[known].name for known in like)) or [device.name for device in DEVICES]
        raise MemtraceError(
            f"no known device is called {name!r}; give its memory instead, or one of: {', '.join(names)}"
        )
    return device


def custom_device(total_bytes: int, capability: tuple[int, int] | None = None) -> Device:
    """A device of which only the memory is known.

    Raises:
        ValueError: ``total_bytes`` is not positive.
    """
    if total_bytes <= 0:
        raise ValueError(f"total_bytes is {total_bytes}: a device has memory")
    return Device(f"a device of {format_bytes(total_bytes)}", total_bytes, capability)


def cublas_workspace_bytes(capability: tuple[int, int] | None, environ: Mapping[str, str] = os.environ) -> int:
    """Bytes of one cuBLAS workspace, which PyTorch takes from its caching allocator, so that they count as allocated.

    A training step usually holds two, as forward and the engine's backward thread have a handle each. Computed as
    ``parseChosenWorkspaceSize`` in PyTorch's aten/src/ATen/cuda/CublasHandlePool.cpp does: pairs of ``:KIB:COUNT`` in
    CUBLAS_WORKSPACE_CONFIG add up; without them 32 MiB on Hopper and Blackwell, else 8,519,680 (``:4096:2:16:8``).

    Args:
        capability: the device's compute capability, such as ``(9, 0)``; None counts as neither of those two.
        environ: where CUBLAS_WORKSPACE_CONFIG is looked up.
    """
    pairs = re.findall(r":([0-9]+):([0-9]+)", environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if pairs:
        return sum(int(kib) * 1024 * int(count) for kib, count in pairs)
    return 32 * MIB if capability is not None and capability[0] in (9, 10, 12) else 8_519_680


_SMI_LIST = "https://thundergolfer.com/blog/nvidia-gpu-memory-capacity"
_T4 = "fitcheck-llm 0.3.1, after training steps (69 of its 79 runs; 141.0 MiB in the other ten)"
_A100 = (
    "nvidia-smi with Phi-3-mini loaded in five forms, 15005, 7717, 7717, 4425 and 2861 MiB, less what the caching"
    " allocator reserves, 14578, 7290, 7290, 3922 and 2358: 427 three times, 503 for int8 and int4, 457 on average"
)


def _smi(name: str, mib: int, capability: tuple[int, int], *aliases: str, source: str = _SMI_LIST) -> Device:
    return Device(name, mib * MIB, capability, aliases, source)


def _nominal(name: str, gib: int, capability: tuple[int, int], *aliases: str) -> Device:
    return Device(name, gib * GIB, capability, aliases)


DEVICES: tuple[Device, ...] = (
    replace(
        _smi("Tesla T4", 15360, (7, 5)),
        contexts=(
            Context(round(140.875 * MIB), _T4, cuda="12.8", torch="2.10.0"),
            Context(round(140.875 * MIB), _T4, cuda="13.0", torch="2.14.0"),
        ),
    ),
    _smi("Tesla V100-SXM2-16GB", 16384, (7, 0), "V100 16GB", source="https://github.com/1CatAI/1Cat-vLLM/issues/85"),
    _nominal("Tesla V100-SXM2-32GB", 32, (7, 0), "V100 32GB"),
    _smi("NVIDIA A100-SXM4-40GB", 40960, (8, 0), "A100 40GB", "A100 SXM 40GB"),
    _nominal("NVIDIA A100-PCIE-40GB", 40, (8, 0), "A100 PCIe 40GB"),
    _smi("NVIDIA A100-SXM4-80GB", 81920, (8, 0), "A100 80GB", "A100 SXM 80GB"),
    replace(
        _smi("NVIDIA A100 80GB PCIe", 81920, (8, 0), "A100 PCIe 80GB", source="the readings of its context below"),
        contexts=(Context(457 * MIB, _A100, driver="550.90.07", cuda="12.4"),),
    ),
    _smi("NVIDIA A800-SXM4-80GB", 81920, (8, 0), "A800", source="https://github.com/dexmal/dexbotic/issues/41"),
    _nominal("NVIDIA A30", 24, (8, 0)),
    _smi("NVIDIA A10", 23028, (8, 6)),
    _nominal("NVIDIA A10G", 24, (8, 6)),
    _nominal("NVIDIA A40", 48, (8, 6)),
    _nominal("NVIDIA RTX A5000", 24, (8, 6), "A5000"),
    _nominal("NVIDIA RTX A6000", 48, (8, 6), "A6000"),
    _smi("NVIDIA L4", 23034, (8, 9)),
    _nominal("NVIDIA L40", 48, (8, 9)),
    _smi("NVIDIA L40S", 46068, (8, 9)),
    _nominal("NVIDIA RTX 6000 Ada Generation", 48, (8, 9), "RTX 6000 Ada"),
    _smi("NVIDIA H100 80GB HBM3", 81559, (9, 0), "H100", "H100 80GB", "H100 SXM", "H100 SXM5"),
    _nominal("NVIDIA H100 PCIe", 80, (9, 0)),
    _nominal("NVIDIA H100 NVL", 94, (9, 0)),
    _smi("NVIDIA H200", 143771, (9, 0), "H200 SXM"),
    _smi("NVIDIA B200", 183359, (10, 0), source="https://github.com/NVIDIA/TensorRT-LLM/issues/10278"),
    _nominal("NVIDIA GeForce RTX 2080 Ti", 11, (7, 5), "2080 Ti"),
    _smi(
        "NVIDIA GeForce RTX 3060",
        12288,
        (8, 6),
        "3060",
        source="https://github.com/geerlingguy/raspberry-pi-pcie-devices/issues/790",
    ),
    _nominal("NVIDIA GeForce RTX 3080", 10, (8, 6), "3080"),
    _smi(
        "NVIDIA GeForce RTX 3090", 24576, (8, 6), "3090", source="https://github.com/noonghunna/club-3090/issues/741"
    ),
    _smi(
        "NVIDIA GeForce RTX 4070",
        12282,
        (8, 9),
        "4070",
        source="https://github.com/Frogging-Family/nvidia-all/pull/212",
    ),
    _nominal("NVIDIA GeForce RTX 4080", 16, (8, 9), "4080"),
    _smi("NVIDIA GeForce RTX 4090", 24564, (8, 9), "4090", source="https://github.com/RLinf/RLinf/issues/255"),
    _smi(
        "NVIDIA GeForce RTX 5090", 32607, (12, 0), "5090", source="https://github.com/noonghunna/club-3090/issues/741"
    ),
    _nominal("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 96, (12, 0), "RTX PRO 6000"),
    _nominal("NVIDIA RTX PRO 6000 Blackwell Server Edition", 96, (12, 0)),
)
"""The known devices."""


def _key(name: str) -> str:
    """A name without its maker, its brand, case, spaces and signs; a MIG instance's keeps what sets it apart."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


_BY_KEY = {_key(name): device for device in DEVICES for name in (device.name, *device.aliases)}


def _lookup(name: str) -> Device | None:
    return _BY_KEY.get(_key(name))
