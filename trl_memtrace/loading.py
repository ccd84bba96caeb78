"""What it takes to load a model, by dtype and quantization: predicted from its config alone, and measured.

A prediction is what every weight really becomes, one request after the other in the order in which the loader makes
them, through the simulated caching allocator. docs/loading.md says where each rule is from.
"""

from __future__ import annotations

import enum
import gc
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .allocator import CachingAllocator
from .device import Device, read_usage
from .errors import MemtraceError
from .model import ACCELERATE_DTYPES, AccelerateEstimate, ModelError, accelerate_estimate, load_meta
from .owners import dense_parts, tensors_in
from .text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMS = ACCELERATE_DTYPES
"""The forms in which a model can be loaded: a dtype, or ``int8`` and ``int4`` by bitsandbytes."""

BLOCK_4BIT = 64
"""Weights that share one absmax, in bitsandbytes' 4-bit coding."""
BLOCK_ABSMAX = 256
"""Absmax values that share one of their own, with double quantization."""

_CODE_4BIT = 16 * 4  # the 16 values of a code, fp32
_CODE_8BIT = 256 * 4
_SCALAR = 4


class Loader(str, enum.Enum):
    """Whose order of allocations a prediction follows.

    ``transformers5`` asks for all the weights' bytes at once, gives the block back to the cache, and fills it in the
    natural order of names. ``transformers4`` (with bitsandbytes 0.43 and accelerate 0.30, mid 2024) places one weight
    after the other by name and has accelerate empty the cache after each that it does not quantize.
    """

    TRANSFORMERS5 = "transformers5"
    TRANSFORMERS4 = "transformers4"

    __str__ = str.__str__


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an account: what it is, its bytes, and why it is there."""

    what: str
    bytes: int
    why: str

    def to_dict(self) -> dict[str, Any]:
        """The line for ``--json``."""
        return {"what": self.what, "bytes": self.bytes, "why": self.why}


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a loaded model holds, in bytes; None where it is not known.

    Attributes:
        weights_bytes: the storages of parameters, of buffers, and of what quantization keeps beside them.
        allocated_bytes: those, as the caching allocator hands them out.
        reserved_bytes: what the caching allocator holds of the device.
        process_bytes: what the driver counts for the process, and ``nvidia-smi`` shows.
        lines: how the last known of these is made up; they add up to it.
    """

    weights_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    process_bytes: int | None = None
    lines: tuple[Line, ...] = ()

    @property
    def bytes(self) -> int | None:
        """The most that is known of it: the process, else what the allocator holds, else the weights."""
        known = (self.process_bytes, self.reserved_bytes, self.allocated_bytes, self.weights_bytes)
        return next((size for size in known if size is not None), None)

    def to_dict(self) -> dict[str, Any]:
        """The record for ``--json``."""
        return {
            "weights_bytes": self.weights_bytes,
            "allocated_bytes": self.allocated_bytes,
            "reserved_bytes": self.reserved_bytes,
            "process_bytes": self.process_bytes,
            "lines": [line.to_dict() for line in self.lines],
        }


@dataclass(frozen=True, slots=True)
class LoadRow:
    """One form of a model: what accelerate says, what we say, and what was measured."""

    dtype: str
    accelerate: AccelerateEstimate
    predicted: Footprint
    measured: Footprint | None = None

    @property
    def errors(self) -> tuple[float, float] | None:
        """How far accelerate's total and our prediction are off what was measured, as shares of it.

        The three are compared at the widest level that was measured and predicted; accelerate has one figure only.
        """
        if self.measured is None:
            return None
        for name in ("process_bytes", "reserved_bytes", "allocated_bytes", "weights_bytes"):
            real, ours = getattr(self.measured, name), getattr(self.predicted, name)
            if real and ours is not None:
                return self.accelerate.total_bytes / real - 1, ours / real - 1
        return None

    def to_dict(self) -> dict[str, Any]:
        """The row for ``--json``."""
        return {
            "dtype": self.dtype,
            "accelerate": {
                "largest_layer_bytes": self.accelerate.largest_layer_bytes,
                "total_bytes": self.accelerate.total_bytes,
                "training_bytes": self.accelerate.training_bytes,
            },
            "predicted": self.predicted.to_dict(),
            "measured": None if self.measured is None else self.measured.to_dict(),
        }


# --- what every tensor becomes ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the model, as it will be stored.

    Attributes:
        name: its full name.
        shape: its shape in the checkpoint; of a quantized weight, rows (outputs) by columns.
        coding: its dtype, or ``int8`` or ``int4`` where bitsandbytes codes it.
        copy_bytes: what it takes before it is coded; of other tensors, what it takes.
        is_buffer: whether it is no parameter.
        in_checkpoint: whether the loader places it; the others are made by the model itself.
    """

    name: str
    shape: tuple[int, ...]
    coding: str
    copy_bytes: int
    is_buffer: bool = False
    in_checkpoint: bool = True

    @property
    def is_quantized(self) -> bool:
        """Whether bitsandbytes codes it."""
        return self.coding in ("int8", "int4")

    def kept(self, double_quant: bool = False) -> dict[str, int]:
        """The bytes of the tensors that are kept of it, by what they are."""
        numbers = math.prod(self.shape)
        if self.coding == "int8":
            return {"int8 weights": numbers, "SCB": self.shape[0] * 4}
        if self.coding == "int4":
            blocks = -(-numbers // BLOCK_4BIT)
            packed = {"4-bit weights": (numbers + 1) // 2, "code": _CODE_4BIT}
            if not double_quant:
                return {**packed, "absmax": blocks * 4}
            second = -(-blocks // BLOCK_ABSMAX) * 4
            return {
                **packed,
                "absmax": blocks,
                "second absmax": second,
                "second code": _CODE_8BIT,
                "offset": _SCALAR,
            }
        return {"buffers" if self.is_buffer else f"{self.coding} weights": self.copy_bytes}


def stored_tensors(model: PreTrainedModel, form: str, torch_dtype: str = "float16") -> tuple[Tensor, ...]:
    """What every tensor of ``model`` becomes when it is loaded in ``form``. Tied weights come once.

    What is quantized is decided as transformers' bitsandbytes integration does: every ``nn.Linear`` and ``Conv1D`` but
    the head, the last module, and what is tied or kept in float32 (``get_modules_to_not_convert``).

    Args:
        model: the model on the meta device, built in the dtype that ``form`` or, if it is quantized, ``torch_dtype``
            names.
        form: one of ``FORMS``.
        torch_dtype: the dtype of what is not quantized.
    """
    from transformers.core_model_loading import build_glob_alternation

    quantized = _quantized(model) if form in ("int8", "int4") else {}
    plan = model._get_dtype_plan(getattr(torch, torch_dtype if form in ("int8", "int4") else form))
    pattern = build_glob_alternation(list(plan))[0] if plan else None
    in_checkpoint = set(model.state_dict())
    met: set[int] = set()
    found: list[Tensor] = []
    buffers = {id(tensor) for tensor in model.buffers()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) in met:
            continue
        met.add(id(tensor))
        saved = name in in_checkpoint
        wide = saved and pattern is not None and pattern.search(name) is not None
        dtype = torch.float32 if wide else tensor.dtype
        shape = tuple(tensor.shape)
        swaps = quantized.get(name)
        found.append(
            Tensor(
                name,
                shape[::-1] if swaps else shape,
                form if swaps is not None else str(dtype).removeprefix("torch."),
                tensor.numel() * dtype.itemsize,
                id(tensor) in buffers,
                saved,
            )
        )
    return tuple(found)


def _quantized(model: PreTrainedModel) -> dict[str, bool]:
    """The weights that bitsandbytes codes, and whether it turns them first (``Conv1D`` has its outputs last)."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    left = HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or ()))
    return {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, left)
    }


# --- the allocations, in the loader's order --------------------------------------------------------------------------


def load_into(
    allocator: CachingAllocator,
    tensors: Iterable[Tensor],
    loader: Loader = Loader.TRANSFORMERS5,
    double_quant: bool = False,
) -> None:
    """Make the requests that loading ``tensors`` makes of the caching allocator, in the loader's order."""
    placed = [tensor for tensor in tensors if tensor.in_checkpoint]
    made = [tensor for tensor in tensors if not tensor.in_checkpoint]
    if loader is Loader.TRANSFORMERS5:
        from transformers.core_model_loading import dot_natural_key

        placed.sort(key=lambda tensor: dot_natural_key(tensor.name))
        share = {"int8": 1.0, "int4": 0.5}
        total = sum(
            math.prod(tensor.shape) * share[tensor.coding] if tensor.is_quantized else tensor.copy_bytes
            for tensor in placed
        )
        _temporary(allocator, int(total // 2) * 2)  # caching_allocator_warmup
    else:
        placed.sort(key=lambda tensor: tensor.name)
    for tensor in placed:
        if tensor.coding == "int8":
            _quantize_int8(allocator, tensor, loader)
        elif tensor.coding == "int4":
            _quantize_int4(allocator, tensor, double_quant)
        else:
            _take(allocator, tensor.copy_bytes)
            if loader is Loader.TRANSFORMERS4:
                allocator.empty_cache()  # at the end of accelerate's set_module_tensor_to_device
    for tensor in made:
        _take(allocator, tensor.copy_bytes)


def _take(allocator: CachingAllocator, size: int) -> Callable[[], None]:
    """Allocate; the answer frees it again. PyTorch asks for nothing where there are no bytes."""
    if size == 0:
        return lambda: None
    address = allocator.allocate(size)
    return lambda: allocator.free(address)


def _temporary(allocator: CachingAllocator, size: int) -> None:
    _take(allocator, size)()


def _quantize_int8(allocator: CachingAllocator, tensor: Tensor, loader: Loader) -> None:
    numbers, rows = math.prod(tensor.shape), tensor.shape[0]
    if loader is Loader.TRANSFORMERS4:  # Int8Params.cuda, then double_quant: coded by rows and by columns
        free_copy = _take(allocator, numbers * 2)
        _take(allocator, rows * 4)
        free_column_scales = _take(allocator, numbers // rows * 4)
        free_columns = _take(allocator, numbers)
        _take(allocator, numbers)
        for free in (free_columns, free_column_scales, free_copy):
            free()
        return
    # Bnb8bitQuantize: the copy on the device goes to the CPU and, as float16, back, while the first is still held
    free_first = _take(allocator, tensor.copy_bytes)
    free_copy = _take(allocator, numbers * 2)
    _take(allocator, rows * 4)
    _take(allocator, numbers)
    free_copy()
    free_first()


def _quantize_int4(allocator: CachingAllocator, tensor: Tensor, double_quant: bool) -> None:
    """``quantize_4bit``: the copy, absmax, the packed weights, then the code with what scales it."""
    blocks = -(-math.prod(tensor.shape) // BLOCK_4BIT)
    free_copy = _take(allocator, tensor.copy_bytes)
    free_absmax = _take(allocator, blocks * 4)
    _take(allocator, tensor.kept()["4-bit weights"])
    _take(allocator, _CODE_4BIT)
    free_magnitudes = _take(allocator, _CODE_4BIT)
    free_largest = _take(allocator, _SCALAR)
    free_magnitudes()
    free_largest()
    if double_quant:
        kept = tensor.kept(double_quant=True)
        _take(allocator, kept["offset"])
        free_centred = _take(allocator, blocks * 4)
        _take(allocator, kept["second absmax"])
        _take(allocator, kept["absmax"])
        _take(allocator, kept["second code"])
        free_centred()
        free_absmax()
    free_copy()


# --- the prediction --------------------------------------------------------------------------------------------------

_WHY = {
    "int8 weights": "linear layers but the head, one byte a weight (bitsandbytes Linear8bitLt)",
    "SCB": "the scale of each row of an int8 weight, float32",
    "4-bit weights": "linear layers but the head, two weights a byte (bitsandbytes Linear4bit)",
    "code": "the 16 values that 4 bits can mean, float32, beside every weight",
    "second code": "the 256 values that 8 bits can mean, float32, beside every weight",
    "second absmax": f"the scale of every {BLOCK_ABSMAX} absmax, float32",
    "offset": "the mean of the absmax, float32, beside every weight",
    "buffers": "tensors of the model that are no parameters",
}


def predict(
    model: PreTrainedModel,
    form: str,
    device: Device | None = None,
    *,
    torch_dtype: str = "float16",
    double_quant: bool = False,
    loader: Loader = Loader.TRANSFORMERS5,
) -> Footprint:
    """What loading a model takes, line by line.

    Args:
        model: the model on the meta device, built in ``build_dtype(form, torch_dtype)``.
        form: one of ``FORMS``.
        device: the card, for its CUDA context; where that is not known, ``process_bytes`` is None.
        torch_dtype: the dtype of what is not quantized, in the forms ``int8`` and ``int4``.
        double_quant: whether absmax is quantized too (``bnb_4bit_use_double_quant``).
        loader: whose order of allocations.

    Raises:
        ValueError: ``form`` is none of ``FORMS``.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
    tensors = stored_tensors(model, form, torch_dtype)
    sizes: dict[str, int] = {}
    for tensor in tensors:
        for what, size in tensor.kept(double_quant).items():
            sizes[what] = sizes.get(what, 0) + size
    why = {
        **_WHY,
        "absmax": f"the scale of every {BLOCK_4BIT} weights, {'8 bit' if double_quant else 'float32'}",
    }
    rest = "what is not quantized: embeddings, norms, head" if form in ("int8", "int4") else "every parameter"
    lines = [Line(what, size, why.get(what, rest)) for what, size in sizes.items()]
    weights = sum(sizes.values())

    allocator = CachingAllocator()
    load_into(allocator, tensors, loader, double_quant)
    allocated, reserved = allocator.allocated_bytes, allocator.reserved_bytes
    lines += [
        Line(
            "allocator rounding",
            allocated - weights,
            "every tensor takes a multiple of 512 bytes, and a large block keeps up to 1 MiB that is not split off",
        ),
        Line(
            "kept in segments",
            reserved - allocated,
            "segments come in 2 MiB steps, and those of the 16-bit copies made while quantizing stay while a part of"
            " them is in use"
            if form in ("int8", "int4")
            else "segments come in steps of 2 MiB",
        ),
    ]
    context = None if device is None else device.context
    if context is None:
        return Footprint(weights, allocated, reserved, None, tuple(lines))
    assert device is not None
    why_context = f"what a process holds on {device.name} beside its segments; from {context.source}"
    lines.append(Line("CUDA context", context.bytes, why_context))
    return Footprint(weights, allocated, reserved, reserved + context.bytes, tuple(lines))


def build_dtype(form: str, torch_dtype: str = "float16") -> str:
    """The dtype in which the meta model of a form is built."""
    return torch_dtype if form in ("int8", "int4") else form


def load_rows(
    model: str | os.PathLike[str],
    forms: Iterable[str] = FORMS,
    device: Device | None = None,
    *,
    torch_dtype: str = "float16",
    double_quant: bool = False,
    loader: Loader = Loader.TRANSFORMERS5,
    measured: bool = False,
    readings: Mapping[str, int] | None = None,
) -> tuple[LoadRow, ...]:
    """The table: for each form what accelerate says, what we predict and, where asked, what loading really took.

    Args:
        model: a hub id, a folder or a config.json; to measure, a folder with weights.
        forms: some of ``FORMS``.
        device: as for ``predict``, as are ``torch_dtype``, ``double_quant`` and ``loader``.
        measured: whether to load the model really, on this machine.
        readings: by form, bytes of the process that were read elsewhere, such as from ``nvidia-smi``.

    Raises:
        ModelError: the model cannot be had.
        MemtraceError: it cannot be loaded here.
    """
    readings = readings or {}
    rows = []
    for form in forms:
        meta = load_meta(model, build_dtype(form, torch_dtype))
        row = LoadRow(
            form,
            accelerate_estimate(meta, form),
            predict(meta, form, device, torch_dtype=torch_dtype, double_quant=double_quant, loader=loader),
            Footprint(process_bytes=readings[form]) if form in readings else None,
        )
        if measured:
            row = replace(row, measured=measure(model, form, torch_dtype=torch_dtype, double_quant=double_quant))
        rows.append(row)
    return tuple(rows)


# --- the measurement -------------------------------------------------------------------------------------------------


def measure(
    folder: str | os.PathLike[str], form: str, *, torch_dtype: str = "float16", double_quant: bool = False
) -> Footprint:
    """Load a model from a folder, on the GPU if there is one, else on the CPU, and count what it holds.

    On a GPU the allocator and the driver are asked as well.

    Raises:
        MemtraceError: it holds no weights, or loading fails.
    """
    path = Path(folder).expanduser()
    if not path.is_dir() or not any(path.glob("*.safetensors")):
        raise MemtraceError(f"{folder}: to measure takes a folder with the model's weights (*.safetensors)")
    cuda = torch.cuda.is_available()
    before = 0
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    model = _load(path, form, torch_dtype, double_quant, "cuda:0" if cuda else "cpu")
    lines = tuple(_held(model))
    weights = sum(line.bytes for line in lines)
    if not cuda:
        return Footprint(weights, lines=lines)
    gc.collect()
    allocated, reserved = torch.cuda.memory_allocated() - before, torch.cuda.memory_reserved()
    process = read_usage(0).process_bytes
    beyond = [
        Line("allocator rounding", allocated - weights, "what the allocator says, less the weights"),
        Line("kept in segments", reserved - allocated, "what the allocator has reserved, less what is allocated"),
    ]
    if process is not None:
        beyond.append(Line("CUDA context", process - reserved, "what the driver counts for this process beyond that"))
    return Footprint(weights, allocated, reserved, process, (*lines, *beyond))


def _load(path: Path, form: str, torch_dtype: str, double_quant: bool, device: str) -> nn.Module:
    architecture = type(load_meta(path))
    options: dict[str, Any] = {}
    if form in ("int8", "int4"):
        from transformers import BitsAndBytesConfig

        asked: dict[str, Any] = {"load_in_8bit": True}
        if form == "int4":
            asked = {"load_in_4bit": True, "bnb_4bit_use_double_quant": double_quant}
        options["quantization_config"] = BitsAndBytesConfig(**asked)  # type: ignore[no-untyped-call]
    try:
        loaded: nn.Module = architecture.from_pretrained(
            path, dtype=getattr(torch, build_dtype(form, torch_dtype)), device_map={"": device}, **options
        )
    except ImportError:
        raise MemtraceError(f"{form} takes bitsandbytes: pip install 'trl-memtrace[bitsandbytes]'") from None
    except Exception as reason:
        raise ModelError(f"{path}: cannot be loaded in {form}: {one_line(str(reason))[:240]}") from None
    return loaded


def _held(model: nn.Module) -> Iterator[Line]:
    """The storages of a model, each once: of its parameters by dtype, its buffers, its quantization state."""
    met: set[int] = set()

    def new(tensors: Iterable[torch.Tensor]) -> int:
        size = 0
        for tensor in tensors:
            for part in dense_parts(tensor):
                storage = part.untyped_storage()
                if storage._cdata not in met:
                    met.add(storage._cdata)
                    size += storage.nbytes()
        return size

    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        what = f"parameters in {str(parameter.dtype).removeprefix('torch.')}"
        sizes[what] = sizes.get(what, 0) + new([parameter])
    sizes["buffers"] = new(model.buffers())
    sizes["quantization state"] = sum(new(tensors_in(vars(parameter))) for parameter in model.parameters()) + sum(
        new(tensors_in(getattr(module, "state", None))) for module in model.modules()
    )
    for what, size in sizes.items():
        if size:
            yield Line(what, size, "the storages of the loaded model, each once")
