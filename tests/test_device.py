"""The driver's view of a device, against a faked NVML that raises pynvml's own errors, and the table of devices."""

# ruff: noqa: N802, N815 (the fake's names are pynvml's)

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from trl_memtrace.allocator import CachingAllocator
from trl_memtrace.device import (
    DEVICES,
    DeviceUsage,
    Nvml,
    TorchRuntime,
    balance,
    cublas_workspace_bytes,
    custom_device,
    find_device,
    read_usage,
)
from trl_memtrace.errors import MemtraceError
from trl_memtrace.units import GIB, MIB

PID = 4242
A100 = "NVIDIA A100 80GB PCIe"
NOT_FOUND = pynvml.NVML_ERROR_NOT_FOUND
NO_PERMISSION = pynvml.NVML_ERROR_NO_PERMISSION
NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED
ERRORS = sorted(code for name, code in vars(pynvml).items() if name.startswith("NVML_ERROR_"))


def process(pid: int, mib: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=None if mib is None else mib * MIB)


@dataclass
class Card:
    """A card or a MIG instance. ``mig``: what nvmlDeviceGetMigMode says, None where it knows no such question."""

    uuid: str = "GPU-aaaa-1111"
    name: str = A100
    total: int = 81920
    used: int = 15005
    computing: list[Any] = field(default_factory=lambda: [process(PID, 15005)])
    drawing: list[Any] = field(default_factory=list)
    sharing: list[Any] = field(default_factory=list)
    mig: list[int] | None = None
    is_instance: bool = False


class FakeNvml:
    """NVML as pynvml shows it. ``errors`` maps the name of a function to the code that it fails with."""

    nvmlMemory_v2 = pynvml.nvmlMemory_v2

    def __init__(self, *cards: Card, instances: tuple[Card, ...] = (), errors: dict[str, int] | None = None) -> None:
        self.cards, self.instances, self.errors = cards, instances, errors or {}
        self.opened = 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in self.errors:
            return lambda *args, **kwargs: self.fail(self.errors[name])
        return super().__getattribute__(name)

    def fail(self, code: int) -> None:
        raise pynvml.NVMLError(code)

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "550.90.07"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 12040

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        for card in (*self.cards, *self.instances):
            if card.uuid == uuid:
                return card
        raise pynvml.NVMLError(NOT_FOUND)

    def nvmlDeviceGetUUID(self, handle: Card) -> str:
        return handle.uuid

    def nvmlDeviceGetName(self, handle: Card) -> str:
        return handle.name

    def nvmlDeviceGetMigMode(self, device: Card) -> list[int]:
        if device.mig is None:
            raise pynvml.NVMLError(NOT_SUPPORTED)
        return device.mig

    def nvmlDeviceIsMigDeviceHandle(self, device: Card) -> bool:
        return device.is_instance

    def nvmlDeviceGetMemoryInfo(self, handle: Card, version: int | None = None) -> SimpleNamespace:
        kept_by_the_driver = 0 if version == pynvml.nvmlMemory_v2 else 600
        return SimpleNamespace(total=handle.total * MIB, used=(handle.used + kept_by_the_driver) * MIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Card) -> list[Any]:
        return handle.computing

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: Card) -> list[Any]:
        return handle.drawing

    def nvmlDeviceGetMPSComputeRunningProcesses(self, handle: Card) -> list[Any]:
        return handle.sharing


@dataclass
class FakeRuntime:
    uuids: tuple[str, ...] = ()
    free_and_total: tuple[int, int] | None = None

    def uuid(self, index: int) -> str | None:
        return self.uuids[index] if self.uuids else None

    def memory(self, index: int) -> tuple[int, int] | None:
        return self.free_and_total


def read(nvml: FakeNvml, index: int = 0, runtime: FakeRuntime | None = None, **environ: str) -> DeviceUsage:
    usage = read_usage(index, nvml=nvml, runtime=runtime or FakeRuntime(), environ=environ, pid=PID)
    assert nvml.opened == 0 or {"nvmlInit", "nvmlShutdown"} & {*nvml.errors}, "NVML was left open"
    return usage


def only(usage: DeviceUsage) -> str:
    (line,) = usage.missing
    return line


def test_everything_is_known_where_the_driver_answers() -> None:
    card = Card(used=20000, computing=[process(PID, 15005), process(7, 3000)], drawing=[process(8, 1000)])
    assert read(FakeNvml(card)) == DeviceUsage(
        index=0,
        name=A100,
        total_bytes=81920 * MIB,
        used_bytes=20000 * MIB,
        process_bytes=15005 * MIB,
        other_processes_bytes=4000 * MIB,
        driver_version="550.90.07",
        cuda_version="12.4",
    )


def test_a_process_that_computes_and_draws_counts_once() -> None:
    card = Card(computing=[process(PID, 100), process(7, 30)], drawing=[process(PID, 99), process(7, None)])
    usage = read(FakeNvml(card))
    assert (usage.process_bytes, usage.other_processes_bytes, usage.missing) == (100 * MIB, 30 * MIB, ())


def test_processes_under_mps_are_counted() -> None:
    usage = read(FakeNvml(Card(computing=[process(9, 25)], sharing=[process(PID, 500), process(10, 300)])))
    assert (usage.process_bytes, usage.other_processes_bytes) == (500 * MIB, 325 * MIB)


def test_without_pynvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    usage = read_usage(runtime=FakeRuntime(), environ={})
    assert usage == DeviceUsage(0, missing=usage.missing)
    assert only(usage) == "all that the driver knows: the package nvidia-ml-py is not installed"


def test_pynvml_itself_is_asked_when_nobody_else_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(Card()))
    assert read_usage(runtime=FakeRuntime(), environ={}, pid=PID).process_bytes == 15005 * MIB


def test_pynvml_has_all_that_is_asked_of_it() -> None:
    asked = {**vars(Nvml), **Nvml.__annotations__}
    assert [name for name in asked if name.startswith("nvml") and not hasattr(pynvml, name)] == []
    assert "version" in inspect.signature(pynvml.nvmlDeviceGetMemoryInfo).parameters


def test_importing_the_module_loads_neither_torch_nor_pynvml() -> None:
    code = "import sys, trl_memtrace.device as d; print({'torch', 'pynvml'} & {*sys.modules}); d.read_usage()"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "set()\n"


@pytest.mark.parametrize("code", ERRORS)
def test_nvml_that_does_not_open_leaves_everything_unknown(code: int) -> None:
    usage = read(FakeNvml(Card(), errors={"nvmlInit": code}))
    assert usage == DeviceUsage(0, missing=(f"all that the driver knows: NVML says {pynvml.NVMLError(code)}",))


ASKED = {
    "nvmlSystemGetDriverVersion": {"driver_version"},
    "nvmlSystemGetCudaDriverVersion": {"cuda_version"},
    "nvmlDeviceGetCount": {"name", "total_bytes", "used_bytes", "process_bytes", "other_processes_bytes"},
    "nvmlDeviceGetHandleByIndex": {"name", "total_bytes", "used_bytes", "process_bytes", "other_processes_bytes"},
    "nvmlDeviceGetName": {"name"},
    "nvmlDeviceGetMemoryInfo": {"total_bytes", "used_bytes"},
    "nvmlDeviceGetComputeRunningProcesses": {"process_bytes", "other_processes_bytes"},
    "nvmlDeviceGetGraphicsRunningProcesses": {"other_processes_bytes"},
    "nvmlDeviceGetMPSComputeRunningProcesses": {"other_processes_bytes"},
    "nvmlShutdown": set(),
}


@pytest.mark.parametrize("function", ASKED)
@pytest.mark.parametrize("code", ERRORS)
def test_every_error_of_every_question_costs_its_own_answer_only(function: str, code: int) -> None:
    unheard = {pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND}
    usage = read(FakeNvml(Card(), errors={function: code}))
    lost = {name for name in DeviceUsage.__dataclass_fields__ if getattr(usage, name) is None}
    if code in unheard and function in (
        "nvmlDeviceGetGraphicsRunningProcesses",
        "nvmlDeviceGetMPSComputeRunningProcesses",
    ):
        assert (lost, usage.missing) == (set(), ())
    else:
        assert lost == ASKED[function]
        assert f"NVML says {pynvml.NVMLError(code)}" in only(usage)


@pytest.mark.parametrize("problem", [AttributeError("no such function"), pynvml.NVMLLibraryMismatchError("too new")])
def test_what_is_no_nvml_error_does_not_get_out_either(problem: Exception) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise problem

    nvml = FakeNvml(Card())
    nvml.nvmlDeviceGetComputeRunningProcesses = fails  # type: ignore[method-assign]
    assert str(problem) in only(read(nvml))


def test_an_old_driver_is_asked_in_the_old_way() -> None:
    class Old(FakeNvml):
        def nvmlDeviceGetMemoryInfo(self, handle: Card, version: int | None = None) -> SimpleNamespace:
            if version is not None:
                self.fail(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
            return super().nvmlDeviceGetMemoryInfo(handle)

    usage = read(Old(Card(used=1000)))
    assert (usage.used_bytes, usage.missing) == (1600 * MIB, ())


@pytest.mark.parametrize(("listed", "count"), [([], 0), ([process(31337, 15005)], 1)], ids=["hidden", "foreign pids"])
def test_a_container_that_hides_the_processes_is_said(listed: list[Any], count: int) -> None:
    usage = read(FakeNvml(Card(computing=listed)))
    assert (usage.used_bytes, usage.process_bytes, usage.other_processes_bytes) == (15005 * MIB, None, None)
    assert f"the driver lists {count} and not pid {PID}: a container" in only(usage)


def test_wddm_says_who_but_not_how_much() -> None:
    usage = read(FakeNvml(Card(computing=[process(PID, None), process(7, None), process(8, 5)])))
    assert (usage.process_bytes, usage.other_processes_bytes) == (None, None)
    assert [line.split(":")[0] for line in usage.missing] == ["this process", "other processes"]


JETSON = {"nvmlDeviceGetMemoryInfo": NOT_SUPPORTED, "nvmlDeviceGetComputeRunningProcesses": NOT_SUPPORTED}


def test_jetson_has_no_memory_of_its_own() -> None:
    usage = read(FakeNvml(Card(), errors=JETSON))
    assert (usage.name, usage.total_bytes, usage.used_bytes, usage.process_bytes) == (A100, None, None, None)
    assert all("NVML says Not Supported" in line for line in usage.missing)
    assert len(usage.missing) == 2


def test_cudas_runtime_knows_the_memory_where_nvml_does_not() -> None:
    usage = read(FakeNvml(Card(), errors=JETSON), runtime=FakeRuntime(free_and_total=(3 * GIB, 8 * GIB)))
    assert (usage.total_bytes, usage.used_bytes) == (8 * GIB, 5 * GIB)
    assert "CUDA's runtime was asked instead" in usage.missing[-1]
    assert read(FakeNvml(Card()), runtime=FakeRuntime(free_and_total=(1, 2))).used_bytes == 15005 * MIB


def test_a_runtime_that_fails_is_said() -> None:
    class Failing(FakeRuntime):
        def memory(self, index: int) -> tuple[int, int] | None:
            raise RuntimeError("CUDA error: out of memory")

    usage = read(FakeNvml(Card(), errors=JETSON), runtime=Failing())
    assert usage.missing[-1] == "total and used memory by CUDA's runtime: RuntimeError: CUDA error: out of memory"


TWO = Card("GPU-aaaa-1111", used=1), Card("GPU-bbbb-2222", used=2)
INSTANCE = Card("MIG-cccc", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4864, 3, is_instance=True, mig=[0, 0])
WHOLE = Card("GPU-dddd", "NVIDIA A100-SXM4-40GB", 40960, 9999, mig=[1, 1])


@pytest.mark.parametrize(
    ("index", "visible", "used"),
    [
        (0, None, 1),
        (1, None, 2),
        (0, "1", 2),
        (0, "1,0", 2),
        (1, " 1 , 0 ", 1),
        (0, "GPU-bbbb-2222", 2),
        (1, "GPU-bbbb,GPU-aa", 1),
        (0, "1,-1,0", 2),
    ],
)
def test_cudas_device_is_found_among_nvmls(index: int, visible: str | None, used: int) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert read(FakeNvml(*TWO), index, **environ).used_bytes == used * MIB


@pytest.mark.parametrize(
    ("index", "visible", "said"),
    [
        (2, None, "NVML sees 2 devices and none of number 2"),
        (-1, None, "none of number -1"),
        (0, "", "shows no device 0"),
        (0, "-1", "shows no device 0"),
        (-1, "0", "shows no device -1"),
        (1, "0", "shows no device 1"),
        (1, "1,-1,0", "shows no device 1"),
        (0, "0,0", "shows no device 0"),
        (0, "none", "shows no device 0"),
        (0, "5", "none of number 5"),
        (0, "GPU-", "shows no device 0"),
        (0, "GPU-eeee", "0 devices have a UUID that begins with GPU-eeee"),
        (0, "MIG-eeee", "NVML says Not Found"),
    ],
)
def test_a_device_that_is_not_there_is_said(index: int, visible: str | None, said: str) -> None:
    usage = read(FakeNvml(*TWO), index, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    assert said in only(usage)
    assert (usage.name, usage.driver_version) == (None, "550.90.07")


def test_a_uuid_that_fits_two_devices_is_not_guessed() -> None:
    cards = Card("GPU-aaaa-1"), Card("GPU-aaaa-2")
    assert "2 devices have a UUID" in only(read(FakeNvml(*cards), CUDA_VISIBLE_DEVICES="GPU-aaaa"))


def test_the_uuid_that_cuda_gives_comes_before_any_counting() -> None:
    runtime = FakeRuntime(("bbbb-2222", "aaaa-1111"))
    assert [read(FakeNvml(*TWO), index, runtime).used_bytes for index in (0, 1)] == [2 * MIB, 1 * MIB]


def test_unlike_cards_are_not_counted_where_cuda_sorts_them_by_speed() -> None:
    cards = Card("GPU-a", "Tesla T4", used=1), Card("GPU-b", A100, used=2)
    assert "set CUDA_DEVICE_ORDER=PCI_BUS_ID" in only(read(FakeNvml(*cards)))
    assert read(FakeNvml(*cards), CUDA_DEVICE_ORDER="PCI_BUS_ID").used_bytes == 1 * MIB
    assert read(FakeNvml(*cards), CUDA_VISIBLE_DEVICES="GPU-b").used_bytes == 2 * MIB
    assert read(FakeNvml(*cards), runtime=FakeRuntime(("b",))).used_bytes == 2 * MIB


@pytest.mark.parametrize("how", ["environment", "cuda"])
def test_a_mig_instance_is_read_and_not_its_card(how: str) -> None:
    nvml = FakeNvml(WHOLE, instances=(INSTANCE,))
    if how == "environment":
        usage = read(nvml, runtime=FakeRuntime(("dddd",)), CUDA_VISIBLE_DEVICES="MIG-cccc")
    else:
        usage = read(nvml, runtime=FakeRuntime(("cccc",)))
    assert (usage.name, usage.total_bytes, usage.used_bytes) == (INSTANCE.name, 4864 * MIB, 3 * MIB)
    assert usage.missing == ()


def test_a_card_in_instances_is_not_taken_for_one() -> None:
    usage = read(FakeNvml(WHOLE, instances=(INSTANCE,)), runtime=FakeRuntime(free_and_total=(1 * GIB, 4 * GIB)))
    assert (usage.name, usage.total_bytes, usage.process_bytes) == (WHOLE.name, 4 * GIB, None)
    assert "MIG is on" in usage.missing[0]


def test_a_mig_instance_without_permission() -> None:
    errors = {"nvmlDeviceGetComputeRunningProcesses": NO_PERMISSION}
    nvml = FakeNvml(WHOLE, instances=(INSTANCE,), errors=errors)
    usage = read(nvml, CUDA_VISIBLE_DEVICES="MIG-cccc")
    assert (usage.used_bytes, usage.process_bytes) == (3 * MIB, None)
    assert "NVML says Insufficient Permissions" in only(usage)


@pytest.mark.parametrize("loaded", [False, True])
def test_torch_is_not_asked_before_it_has_initialised_cuda(loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda) if loaded else None)
    assert TorchRuntime().uuid(0) is None
    assert TorchRuntime().memory(0) is None


def test_torch_is_asked_for_no_memory_where_that_would_make_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        get_device_properties=lambda index: SimpleNamespace(uuid=f"uuid-{index}"),
        memory_reserved=lambda index: index * MIB,
        mem_get_info=lambda index: (index, 10),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert TorchRuntime().uuid(1) == "uuid-1"
    assert (TorchRuntime().memory(0), TorchRuntime().memory(1)) == (None, (1, 10))


def lines_of(usage: DeviceUsage, allocated: int, reserved: int) -> dict[str, int | None]:
    lines = balance(usage, allocated * MIB, reserved * MIB)
    if usage.used_bytes is not None:
        assert sum(line.bytes or 0 for line in lines[:-1]) == usage.used_bytes == lines[-1].bytes
    assert all(line.why for line in lines)
    return {line.what: None if line.bytes is None else line.bytes // MIB for line in lines}


def used(mib: int | None, own: int | None = None, others: int | None = None, name: str = "x") -> DeviceUsage:
    used_bytes, process_bytes, other_bytes = (None if size is None else size * MIB for size in (mib, own, others))
    return DeviceUsage(0, name, 81920 * MIB, used_bytes, process_bytes, other_bytes)


def test_the_balance_ends_at_what_nvidia_smi_shows() -> None:
    assert lines_of(used(20000, 15005, 4995), 14576, 14578) == {
        "allocated": 14576,
        "free inside reserved": 2,
        "CUDA context": 427,
        "other processes": 4995,
        "used": 20000,
    }


def test_what_does_not_add_up_is_unexplained() -> None:
    assert lines_of(used(20500, 15005, 4995), 14576, 14578)["unexplained"] == 500
    assert lines_of(used(19900, 15005, 4995), 14576, 14578)["unexplained"] == -100


def test_a_hidden_process_list_is_helped_out_by_the_table() -> None:
    usage = used(20000, name=A100)
    assert lines_of(usage, 14576, 14578) == {
        "allocated": 14576,
        "free inside reserved": 2,
        "CUDA context": 457,
        "other processes": None,
        "unexplained": 4965,
        "used": 20000,
    }
    context, _, unexplained = balance(usage, 0, 0)[2:5]
    assert "nvidia-smi with Phi-3-mini" in context.why
    assert unexplained.why.endswith("other processes")


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "something new"])
def test_a_context_that_nobody_measured_stays_unknown(name: str) -> None:
    lines = lines_of(used(1000, name=name), 100, 200)
    assert (lines["CUDA context"], lines["other processes"], lines["unexplained"]) == (None, None, 800)
    assert balance(used(1000, name=name), 0, 0)[4].why.endswith("CUDA context, other processes")


def test_a_process_smaller_than_what_is_reserved_is_not_this_one() -> None:
    lines = lines_of(used(1000, own=150, others=850), 100, 200)
    assert (lines["CUDA context"], lines["other processes"], lines["unexplained"]) == (None, None, 800)
    assert "150.00 MiB for this pid" in balance(used(1000, own=150), 0, 200 * MIB)[2].why


def test_nothing_is_unexplained_where_nothing_is_known() -> None:
    assert lines_of(DeviceUsage(0), 1, 2) == {
        "allocated": 1,
        "free inside reserved": 1,
        "CUDA context": None,
        "other processes": None,
        "used": None,
    }


@pytest.mark.parametrize(("allocated", "reserved"), [(2, 1), (-1, 1)])
def test_no_balance_of_what_cannot_be(allocated: int, reserved: int) -> None:
    with pytest.raises(ValueError, match="allocated_bytes"):
        balance(DeviceUsage(0), allocated, reserved)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("A100 80GB", "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB"),
        ("a100-40gb", "NVIDIA A100-SXM4-40GB"),
        ("a100 80gb pcie", A100),
        ("h100", "NVIDIA H100 80GB HBM3"),
        ("T4", "Tesla T4"),
        ("NVIDIA Tesla T4", "Tesla T4"),
        ("L40S", "NVIDIA L40S"),
        ("RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("4090", "NVIDIA GeForce RTX 4090"),
    ],
)
def test_a_device_is_found_by_whatever_it_is_called(name: str, found: str) -> None:
    assert find_device(name).name == found


@pytest.mark.parametrize(
    ("name", "offered", "not_offered"),
    [
        ("A100", A100, "NVIDIA A10,"),
        ("V100", "Tesla V100-SXM2-32GB", "H100"),
        ("RTX 4091", "NVIDIA GeForce RTX 4090", "T4"),
        ("RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090", "T4"),
        ("TPU", "Tesla T4", "\n"),
        ("", "Tesla T4", "\n"),
    ],
)
def test_an_unknown_device_is_told_what_comes_close(name: str, offered: str, not_offered: str) -> None:
    with pytest.raises(MemtraceError) as told:
        find_device(name)
    assert repr(name) in str(told.value)
    assert offered in str(told.value)
    assert not_offered not in str(told.value)


def test_no_name_is_two_devices() -> None:
    assert all(find_device(name) is device for device in DEVICES for name in (device.name, *device.aliases))


def test_totals_are_nvidia_smis_or_nominal() -> None:
    assert find_device("T4").total_bytes == 15360 * MIB
    assert find_device("A100 80GB").total_bytes == 80 * GIB
    assert find_device("H100").total_bytes == 81559 * MIB
    nominal = [device for device in DEVICES if device.total_source is None]
    assert nominal
    assert all(device.total_bytes % GIB == 0 for device in nominal)


def test_contexts_are_known_only_where_a_source_is() -> None:
    assert {device.name for device in DEVICES if device.context} == {"Tesla T4", A100}
    assert (find_device("T4").context.bytes, find_device("T4").context.torch) == (147_718_144, "2.14.0")
    assert find_device("H100").context is None
    assert all(context.source for device in DEVICES for context in device.contexts)


def test_the_a100s_context_is_the_mean_of_its_readings() -> None:
    """Phi-3-mini, weight by weight, through the simulated allocator; int8 and int4 as docs/loading.md has them."""
    left = [503, 503]
    layer = [3072, 3072 * 9216, 3072 * 3072, 3072, 3072 * 16384, 8192 * 3072]
    for bytes_each, reading in ((4, 15005), (2, 7717), (2, 7717)):
        allocator = CachingAllocator()
        for count in [32064 * 3072, *layer * 32, 3072, 32064 * 3072]:
            allocator.allocate(count * bytes_each)
        left.append(reading - allocator.reserved_bytes // MIB)
    assert left == [503, 503, 427, 427, 427]
    assert find_device(A100).context.bytes == round(sum(left) / 5) * MIB


def test_the_t4s_context_is_its_processes_less_reserved() -> None:
    """Two rows of the published runs, in GiB."""
    for process_gib, reserved_gib in ((11.6083, 11.4707), (6.7196, 6.582)):
        assert find_device("T4").context.bytes == pytest.approx((process_gib - reserved_gib) * GIB, rel=1e-3)


def test_the_page_of_devices_shows_the_table() -> None:
    page = (Path(__file__).parent.parent / "docs" / "devices.md").read_text(encoding="utf-8")
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in page.splitlines()]
    for device in DEVICES:
        context = f"{device.context.bytes / MIB:g}" if device.context else ""
        capability = ".".join(map(str, device.capability))
        mib = f"{device.total_bytes // MIB}"
        source = next(row[4] for row in rows if row[0] == device.name)
        assert (device.name, mib, capability, context, source) in rows
        assert source == "nominal" if device.total_source is None else device.total_source in source


def test_a_device_of_any_size() -> None:
    device = custom_device(24 * GIB, (8, 9))
    assert (device.total_bytes, device.capability, device.context) == (24 * GIB, (8, 9), None)
    assert device.name == "a device of 24.00 GiB"
    with pytest.raises(ValueError, match="has memory"):
        custom_device(0)


@pytest.mark.parametrize(
    ("capability", "config", "expected"),
    [
        ((7, 5), None, 8_519_680),
        ((8, 0), None, 8_519_680),
        (None, None, 8_519_680),
        ((9, 0), None, 33_554_432),
        ((10, 0), None, 33_554_432),
        ((12, 0), None, 33_554_432),
        ((9, 0), ":4096:2:16:8", 8_519_680),
        ((8, 0), ":4096:8", 33_554_432),
        ((8, 0), ":16:8", 131_072),
        ((8, 0), ":0:0", 0),
        ((8, 0), "", 8_519_680),
        ((9, 0), "4096", 33_554_432),
    ],
)
def test_the_cublas_workspace(capability: tuple[int, int] | None, config: str | None, expected: int) -> None:
    environ = {} if config is None else {"CUBLAS_WORKSPACE_CONFIG": config}
    assert cublas_workspace_bytes(capability, environ) == expected


def test_the_end_of_a_run_adds_up_to_what_the_driver_shows(monkeypatch, capsys):
    import torch

    from trl_memtrace import device
    from trl_memtrace.records import RunHeader, Summary
    from trl_memtrace.reporters.terminal import print_summary
    from trl_memtrace.run_info import look_beyond

    usage = device.DeviceUsage(0, "card", 80 * GIB, 30 * GIB, 21 * GIB, 9 * GIB)
    monkeypatch.setattr(device, "read_usage", lambda index: usage)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 20 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: 15 * GIB)
    summary = Summary(RunHeader(device={"type": "cuda", "index": 0}), reserved_peak_bytes=25 * GIB)
    lines = look_beyond(summary)
    assert (summary.context_bytes, summary.process_peak_bytes) == (1 * GIB, 26 * GIB)
    assert look_beyond(Summary(RunHeader(device={"type": "cpu"}))) == ()
    print_summary(summary, beyond=lines)
    out = capsys.readouterr().out
    assert "30.00 GiB" in out
    assert "9.00 GiB" in out
