"""Scaled dot product attention as CUDA does it: which kernel is chosen, what it keeps, what it holds while it runs.

Sources, in PyTorch: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (the choice), .../cuda/attention.cu and
attention_backward.cu, .../cuda/flash_attn/flash_api.cpp, .../cuda/mem_eff_attention/kernel_backward.h (workspaces).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch

aten: Any = torch.ops.aten

_HALF = (torch.float16, torch.bfloat16)
_FLOAT_BYTES = 4
_LARGEST_FLASH_HEAD = 256
_LARGEST_CUDNN_HEAD = 128


class Backend(enum.Enum):
    """The kernels there are."""

    FLASH = "flash"
    EFFICIENT = "efficient"
    CUDNN = "cudnn"
    MATH = "math"


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Call:
    """What ``scaled_dot_product_attention`` is asked for. All three are ``(batch, heads, length, head)``."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    dropout: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in (self.query, self.key, self.value))


def choose(call: Call, capability: tuple[int, int]) -> Backend:
    """The kernel that is taken: the first that is enabled and can, cuDNN first on Hopper and Blackwell."""
    cudnn_first = capability[0] in (9, 10) and capability[1] in (0, 3)
    order = [Backend.FLASH, Backend.EFFICIENT]
    order.insert(0 if cudnn_first else 2, Backend.CUDNN)
    enabled = {
        Backend.FLASH: torch._C._get_flash_sdp_enabled(),
        Backend.EFFICIENT: torch._C._get_mem_efficient_sdp_enabled(),
        Backend.CUDNN: torch._C._get_cudnn_sdp_enabled() and cudnn_first,
    }
    able = {Backend.FLASH: _flash_can, Backend.EFFICIENT: _efficient_can, Backend.CUDNN: _cudnn_can}
    return next((kind for kind in order if enabled[kind] and able[kind](call, capability)), Backend.MATH)


def _shapes_fit(call: Call, gqa: bool) -> bool:
    query, key, value = call.query, call.key, call.value
    if any(tensor.dim() != 4 or tensor.stride(-1) != 1 for tensor in (query, key, value)):
        return False
    if not query.shape[0] == key.shape[0] == value.shape[0] or 0 in (query.shape[2], key.shape[2]):
        return False
    heads = query.shape[1], key.shape[1], value.shape[1]
    if heads[0] == heads[1] == heads[2]:
        return True
    return gqa and call.enable_gqa and heads[1] == heads[2] and heads[0] % heads[1] == 0


def _flash_can(call: Call, capability: tuple[int, int]) -> bool:
    query, key, value = call.query, call.key, call.value
    head = query.shape[-1]
    if call.mask is not None or query.dtype not in _HALF or not (8, 0) <= capability <= (12, 1):
        return False
    if not head == key.shape[-1] == value.shape[-1] <= _LARGEST_FLASH_HEAD or not _shapes_fit(call, gqa=True):
        return False
    small_shared_memory = (8, 6) <= capability <= (8, 9) or capability in ((12, 0), (12, 1))
    if call.needs_grad and small_shared_memory and (192 < head <= 224 or (head > 224 and call.dropout > 0)):
        return False
    return not (call.is_causal and query.shape[2] != key.shape[2])


def _efficient_can(call: Call, capability: tuple[int, int]) -> bool:
    query, key, value = call.query, call.key, call.value
    modern = capability >= (8, 0)
    if query.dtype not in ((*_HALF, torch.float32) if modern else (torch.float16, torch.float32)):
        return False
    half = query.dtype in _HALF
    alignment = (8 if half else 4) if modern else (8 if half else 1)
    aligned = query.shape[-1] % alignment == 0 and value.shape[-1] % alignment == 0
    mask_fits = call.mask is None or call.mask.stride(-1) in (0, 1)
    return aligned and mask_fits and query.shape[-1] == key.shape[-1] and _shapes_fit(call, gqa=False)


def _cudnn_can(call: Call, capability: tuple[int, int]) -> bool:
    query, value = call.query, call.value
    heads = query.shape[-1], value.shape[-1]
    sized = all(head % 8 == 0 and head <= _LARGEST_CUDNN_HEAD for head in heads)
    plain_mask = call.mask is None or not call.mask.requires_grad
    return query.dtype in _HALF and sized and plain_mask and call.key.shape[2] != 1 and _shapes_fit(call, gqa=True)


def attend(call: Call, capability: tuple[int, int]) -> Any:
    """Attention by the kernel that CUDA would take; the result is ``(batch, heads, length, head)``."""
    backend = choose(call, capability)
    query, key, value = call.query, call.key, call.value
    if backend is Backend.MATH:
        options = {"scale": call.scale, "enable_gqa": call.enable_gqa}
        return aten._scaled_dot_product_attention_math(
            query, key, value, call.mask, call.dropout, call.is_causal, None, **options
        )[0]
    mask = _additive(call.mask, query.dtype)
    if backend is Backend.FLASH:
        width = query.shape[-1]
        padded = [torch.nn.functional.pad(t, (0, -width % 8)) if width % 8 else t for t in (query, key, value)]
        scale = call.scale if call.scale is not None else width**-0.5
        result = aten._scaled_dot_product_flash_attention(*padded, call.dropout, call.is_causal, False, scale=scale)[0]
        return result[..., :width] if width % 8 else result
    if backend is Backend.CUDNN:
        bias = mask.expand(*query.shape[:3], key.shape[2]) if mask is not None else None
        return aten._scaled_dot_product_cudnn_attention(
            query, key, value, bias, call.needs_grad, call.dropout, call.is_causal, False, scale=call.scale
        )[0]
    if mask is not None:
        mask = _aligned(mask).expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, call.needs_grad, call.dropout, call.is_causal, scale=call.scale
    )[0]


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask of booleans as one that is added: convert_boolean_attn_mask."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.full((), float("-inf"), dtype=dtype, device=mask.device))


def _aligned(mask: torch.Tensor) -> torch.Tensor:
    """A mask whose rows begin at multiples of 8 elements: preprocess_mask, pad_bias."""
    if all(stride % 8 == 0 for stride in mask.stride()[:-1]) and mask.stride(-1) == 1:
        return mask
    width = mask.shape[-1]
    return torch.nn.functional.pad(mask, (0, 8 - width % 8))[..., :width]


def flash_backward_bytes(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, out: torch.Tensor) -> list[int]:
    """What flash attention's backward holds: mha_bwd.

    ``dq`` and a sum for each row in float32, keys' and values' gradients for every query head where heads share them,
    and copies of what does not lie as ``(batch, length, heads, head)``.
    """
    batch, heads, length, head = query.shape
    rows, width = _up(length, 128), _up(head, 32)
    width = width if width < 224 else 256
    held = [_FLOAT_BYTES * batch * heads * rows, _FLOAT_BYTES * batch * rows * heads * width]
    if key.shape[1] != heads:
        held += [batch * key.shape[2] * heads * head * key.itemsize] * 2
    return held + [_bytes(tensor) for tensor in (grad, out) if not tensor.transpose(1, 2).is_contiguous()]


def efficient_backward_bytes(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, capability: tuple[int, int]
) -> list[int]:
    """What the memory-efficient backward holds: a sum for each row, the float32 gradients that its kernel keeps
    outside registers, a copy of a gradient that does not lie as ``(batch, length, heads, head)``."""
    batch, heads, length, head = query.shape
    keys, value_head = key.shape[2], value.shape[-1]
    half = query.dtype in _HALF
    rows, columns, in_registers = _efficient_tile(capability, half, max(head, value_head))
    accumulates = half and not in_registers
    splits = -(-keys // columns)
    if accumulates:
        splits = min(splits, 200 // (batch * heads))
    splits = max(splits, 1)
    query_part = -(-length // rows) * -(-head // columns) * (rows * columns + 4)
    key_part = splits * columns * _up(head, rows) if accumulates else 0
    value_part = splits * columns * _up(value_head, rows) if accumulates else 0
    workspace = batch * heads * _FLOAT_BYTES * _up(query_part + key_part + value_part, 4)
    held = [_FLOAT_BYTES * batch * heads * length, workspace]
    if not half:
        held.append(_FLOAT_BYTES * grad.numel())
    return held if grad.transpose(1, 2).is_contiguous() else [*held, _bytes(grad)]


def _efficient_tile(capability: tuple[int, int], half: bool, head: int) -> tuple[int, int, bool]:
    """Rows and columns of a tile of the kernel that is taken, and whether it keeps dk and dv in registers."""
    much_shared_memory = capability[0] in (9, 10) or capability in ((8, 0), (8, 7))
    if not half:
        return (128, 64, False) if head > 64 and much_shared_memory else (64, 64, False)
    if head <= 64:
        return 64, 64, True
    if capability in ((8, 6), (8, 9)) and head <= 96:
        return 128, 64, True
    if head <= 128:
        return (128, 128, True) if much_shared_memory else (64, 64, False)
    return (128, 64, False) if much_shared_memory else (64, 64, False)


def cudnn_backward_bytes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[int]:
    """What cuDNN's backward holds: ``dq`` and a sum for each row in float32, and what flash holds for shared heads."""
    batch, heads, length, head = query.shape
    held = [_FLOAT_BYTES * batch * heads * length * (head + 1)]
    if key.shape[1] != heads:
        held.append(batch * heads * key.shape[2] * (head + value.shape[-1]) * key.itemsize)
    return held


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize
