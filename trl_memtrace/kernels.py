"""What a device's kernels do with memory that is not seen from outside: blocks they hold while they run, and operators
that CUDA carries out where the CPU carries out others.

Fake tensors are CPU tensors, so what PyTorch does with them is what it does on a CPU. Each entry here is a place where
CUDA differs; docs/dry-run.md lists them with their sources.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from . import cuda_attention, cuda_bitsandbytes
from .cuda_autocast import has_kernel, in_float32
from .device import cublas_workspace_bytes
from .pretended_cuda import on_cpu
from .recorders.fake import FakeMemory, StorageWatch

aten: Any = torch.ops.aten
_FAKE_KEY = torch._C._TorchDispatchModeKey.FAKE
_HALF = (torch.float16, torch.bfloat16)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


# --- kernels ---------------------------------------------------------------------------------------------------------


def _bitsandbytes(path: str) -> Callable[..., Any] | None:
    """A function of one of bitsandbytes' backends, where it is there."""
    backend = sys.modules.get(f"bitsandbytes.backends.{path.split('.')[0]}.ops")
    return getattr(backend, path.split(".")[1], None)


def parts(func: Any, functions: Mapping[str, str | Callable[..., Any]]) -> Callable[..., Any] | None:
    """What an operator of bitsandbytes is made of, if it is a function of operators that are seen one by one."""
    found = functions.get(func._opname) if func.namespace == "bitsandbytes" else None
    return _bitsandbytes(found) if isinstance(found, str) else found


_ON_ALL: Mapping[str, str] = {"gemm_4bit": "default._gemm_4bit_default_impl"}
"""4-bit weights are dequantized and multiplied; CUDA has a kernel of its own for the few rows of generating."""

_ON_CPU = {**_ON_ALL, "optimizer_update_8bit_blockwise": "cpu._optimizer_update_8bit_blockwise_cpu"}

_ON_CUDA: Mapping[str, str | Callable[..., Any]] = {**_ON_ALL, **cuda_bitsandbytes.OPERATORS}


class CpuKernels:
    """The CPU's: nothing is added."""

    def parts(self, func: Any) -> Callable[..., Any] | None:
        """What an operator is made of, if its parts are to be seen."""
        return parts(func, _ON_CPU)

    def prepare(self, func: Any, memory: FakeMemory) -> None:
        """Nothing is made ready."""

    def needs(self, func: Any, args: Any, kwargs: Any) -> Sequence[int]:
        """Nothing is held."""
        return ()


@dataclass(frozen=True, slots=True)
class Card:
    """What of a device decides how its kernels work.

    Attributes:
        capability: its compute capability.
        multiprocessors: how many it has.
        threads: how many run at once on each.
    """

    capability: tuple[int, int]
    multiprocessors: int
    threads: int

    @classmethod
    def of(cls, capability: tuple[int, int]) -> Card:
        """A usual card of that capability."""
        return cls(capability, *_USUAL.get(capability, _USUAL[8, 0]))


_USUAL = {
    (7, 0): (80, 2048),
    (7, 5): (40, 1024),
    (8, 0): (108, 2048),
    (8, 6): (84, 1536),
    (8, 9): (142, 1536),
    (9, 0): (132, 2048),
    (10, 0): (148, 2048),
    (12, 0): (188, 1536),
}
"""Multiprocessors and threads on each: T4, A100, A6000, L40S, H100, B200, RTX PRO 6000."""

Held = Callable[..., "list[int]"]
"""From the card and an operator's arguments, the bytes of the blocks that it holds while it runs."""


def _softmax_backward(card: Card, grad: torch.Tensor, output: torch.Tensor, *rest: Any) -> list[int]:
    """``tmp = grad * output``: aten/src/ATen/native/cuda/SoftMax.cu, softmax_backward_cuda_out."""
    return [max(_bytes(grad), _bytes(output))]


def _embedding_backward(card: Card, grad: torch.Tensor, indices: torch.Tensor, rows: int, *rest: Any) -> list[int]:
    """Sorted indices, and partial sums in float32: aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu."""
    count = indices.numel()
    if count <= _EMBEDDING_WITHOUT_SORTING:
        return []
    partial = (count // 10 + min(count, rows)) * grad.shape[-1] * 4
    return [count * 8, count * 8, partial]


_EMBEDDING_WITHOUT_SORTING = 3072


def _flash_backward(
    card: Card, grad: Any, query: Any, key: Any, value: Any, out: Any, *rest: Any, **_: Any
) -> list[int]:
    return cuda_attention.flash_backward_bytes(grad, query, key, out)


def _efficient_backward(card: Card, grad: Any, query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> list[int]:
    return cuda_attention.efficient_backward_bytes(grad, query, key, value, card.capability)


def _cudnn_backward(card: Card, grad: Any, query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> list[int]:
    return cuda_attention.cudnn_backward_bytes(query, key, value)


def _sum(card: Card, tensor: torch.Tensor, dims: Any = None, *rest: Any, **_: Any) -> list[int]:
    """What a sum over rows holds for its parts: aten/src/ATen/native/cuda/Reduce.cuh, setReduceConfig."""
    if not dims or not tensor.numel():
        return []
    summed = {dim % tensor.dim() for dim in dims}
    outputs = math.prod(size for dim, size in enumerate(tensor.shape) if dim not in summed)
    if tensor.dim() - 1 in summed:
        return []
    return [size for size in [_staging_bytes(card, outputs, tensor.numel() // outputs)] if size]


def _staging_bytes(card: Card, outputs: int, inputs: int) -> int:
    """Bytes in global memory by which blocks hand on their parts of ``outputs`` sums of ``inputs`` numbers each."""
    vector = next(width for width in (4, 2, 1) if outputs % width == 0)
    most = 512 // vector
    columns, rows = outputs // vector, inputs
    width = min(_power_of_two_below(columns, most), 32)
    height = min(_power_of_two_below(rows, most), most // width)
    width = min(_power_of_two_below(columns, most), most // height)
    if inputs < min(height * 16, 256):
        return 0
    per_thread = -(-inputs // height)
    at_once = card.multiprocessors * (card.threads // (width * height))
    blocks = -(-columns // width)
    if per_thread < 256 or blocks > at_once:
        return 0
    parts = max(min(-(-at_once // blocks), -(-per_thread // 16)), -(-per_thread // 256))
    return 4 * outputs * parts * width * vector if parts > 1 else 0


def _power_of_two_below(value: int, most: int) -> int:
    return min(1 << (max(value, 1).bit_length() - 1), most)


HELD: Mapping[Any, Held] = {
    aten._softmax_backward_data.default: _softmax_backward,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
    aten.sum.dim_IntList: _sum,
}

MATRIX_PRODUCTS = frozenset({aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.addmv, aten.mv, aten.dot})


class CudaKernels:
    """CUDA's."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self._workspace = cublas_workspace_bytes(card.capability)
        self._workspaces: set[bool] = set()

    def parts(self, func: Any) -> Callable[..., Any] | None:
        """What an operator is made of, if its parts are to be seen."""
        return parts(func, _ON_CUDA)

    def prepare(self, func: Any, memory: FakeMemory) -> None:
        """cuBLAS takes its workspace when it is first used on a thread: that of the forward, that of the backward."""
        if func.overloadpacket in MATRIX_PRODUCTS:
            backward = torch._C._current_graph_task_id() != -1
            if backward not in self._workspaces:
                self._workspaces.add(backward)
                memory.take([self._workspace])

    def needs(self, func: Any, args: Any, kwargs: Any) -> Sequence[int]:
        """What an operator holds beside its results while it runs."""
        holds = HELD.get(func)
        return holds(self._card, *args, **kwargs) if holds is not None else ()


# --- functions that CUDA carries out by other operators --------------------------------------------------------------
#
# Each takes the arguments of PyTorch's function, by PyTorch's names, and either answers or says NotImplemented, and
# then that function is called. They stand in PyTorch's place instead of in a mode, since the engine does not take
# modes for functions along into what checkpoints run again.


def softmax(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None, **rest: Any) -> Any:
    """Half in, float out, without a copy in float: aten/src/ATen/native/SoftMax.cpp."""
    if dtype is torch.float32 and input.dtype is torch.float16 and dim is not None:
        return aten._softmax(input, dim, True)
    return NotImplemented


def log_softmax(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None, **rest: Any) -> Any:
    """As ``softmax``."""
    if dtype is torch.float32 and input.dtype is torch.float16 and dim is not None:
        return aten._log_softmax(input, dim, True)
    return NotImplemented


def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """One kernel, and a mask of a byte an element: aten/src/ATen/native/Dropout.cpp, is_fused_kernel_acceptable."""
    if training and 0 < p < 1 and not inplace and input.numel():
        return aten.native_dropout(input, p, True)[0]
    return NotImplemented


class _RmsNorm(torch.autograd.Function):
    """One kernel forward and one backward, with the inverse root of each row kept in float32 between them."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, weight: torch.Tensor | None, dims: int) -> torch.Tensor:
        rows = tensor.new_empty((*tensor.shape[: tensor.dim() - dims], *(1,) * dims), dtype=torch.float32)
        ctx.save_for_backward(tensor, weight, rows)
        return torch.empty_like(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensor, weight, _ = ctx.saved_tensors
        wanted = zip((tensor, weight), ctx.needs_input_grad, strict=False)
        return *(torch.empty_like(of) if needed else None for of, needed in wanted), None


def rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
    """One kernel: aten/src/ATen/native/cuda/layer_norm_kernel.cu; not where a weight has another dtype
    (aten/src/ATen/native/layer_norm.cpp), nor in a PyTorch that has no such kernel yet."""
    if torch.is_autocast_enabled("cpu") and has_kernel("rms_norm", "AutocastCUDA"):
        input, weight = in_float32(input), in_float32(weight)
    if hasattr(aten, "_fused_rms_norm_backward") and (weight is None or weight.dtype is input.dtype):
        apply: Any = _RmsNorm.apply
        return apply(input, weight, len(normalized_shape))
    return NotImplemented


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    capability: tuple[int, int],
) -> Any:
    """By the kernel that CUDA would take; autocast makes its inputs half first: aten/src/ATen/autocast_mode.h."""
    if torch.is_autocast_enabled("cpu"):
        half = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(half) for tensor in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(half)
    asked = cuda_attention.Call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return cuda_attention.attend(asked, capability)


def functions(capability: tuple[int, int]) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Where each function of PyTorch stands, by owner and name, and what CUDA does instead."""
    functional = torch.nn.functional
    yield functional, "softmax", softmax
    yield functional, "log_softmax", log_softmax
    yield functional, "dropout", dropout
    yield functional, "rms_norm", rms_norm
    yield functional, "scaled_dot_product_attention", functools.partial(attention, capability=capability)


def instead(original: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """``other`` for fake tensors, and ``original`` where it has no answer."""

    @functools.wraps(original)
    def call_either(*args: Any, **kwargs: Any) -> Any:
        fake = any(isinstance(value, FakeTensor) for value in (*args, *kwargs.values()))
        result = other(*args, **kwargs) if fake else NotImplemented
        return original(*args, **kwargs) if result is NotImplemented else result

    return call_either


_SET_DATA: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class DeviceFunctions(TorchFunctionMode):
    """What no operator tells: a batch comes to the device when it is sent there; new data has other values."""

    def __init__(self, watch: StorageWatch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs is None and len(args) == 1 and func is not torch.Tensor.cuda:  # most are attributes
            return func(*args)
        args, kwargs = on_cpu(args, kwargs or {})
        if func is torch.Tensor.cuda:
            func, args, kwargs = torch.Tensor.to, (args[0], "cpu"), {}
        if func == _SET_DATA and isinstance(args[0], FakeTensor):
            args[0].constant = None
        if func is torch.Tensor.to and isinstance(args[0], FakeTensor) and _names_device(args[1:], kwargs):
            return args[0].clone() if self._watch.is_on_host(args[0]) else func(*args, **kwargs)
        return func(*args, **kwargs)


def _names_device(args: Any, kwargs: Any) -> bool:
    return "device" in kwargs or any(isinstance(value, (str, int, torch.device)) for value in args[:1])
