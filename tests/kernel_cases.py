"""One small case of each way in which docs/dry-run.md says that CUDA's kernels are not the CPU's.

A case makes its tensors and gives the step to be measured; what that returns is alive while it is. ``tests/gpu`` holds
a dry run of each against the card, and ``tests/test_kernels.py`` sees that no way is without a case.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import tiny
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_memtrace.device import Device
from trl_memtrace.dryrun import dry_run

Step = Callable[[], Any]

_HEADS, _LENGTH, _HEAD = 8, 640, 64


def _tensor(*shape: int, dtype: torch.dtype = torch.float16, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device="cuda").requires_grad_(grad)


def _trained(inputs: list[torch.Tensor], forward: Callable[..., torch.Tensor]) -> Step:
    """Forward and backward, with gradients made anew each time."""

    def step() -> Any:
        for tensor in inputs:
            tensor.grad = None
        result = forward(*inputs)
        result.backward(torch.ones_like(result))
        return result

    return step


def _softmax() -> Step:
    scores = _tensor(_HEADS, 512, 512)
    return lambda: functional.softmax(scores, dim=-1, dtype=torch.float32)


def _softmax_backward() -> Step:
    return _trained(
        [_tensor(_HEADS, 512, 512, dtype=torch.float32, grad=True)], lambda x: functional.softmax(x, dim=-1)
    )


def _attention(mask: bool, grad: bool, key_heads: int = _HEADS) -> Callable[[], Step]:
    def make() -> Step:
        query = _tensor(2, _HEADS, _LENGTH, _HEAD, grad=grad)
        key, value = (_tensor(2, key_heads, _LENGTH, _HEAD, grad=grad) for _ in range(2))
        allowed = torch.ones(2, 1, _LENGTH, _LENGTH, dtype=torch.bool, device="cuda") if mask else None

        def attend(*tensors: torch.Tensor) -> torch.Tensor:
            return functional.scaled_dot_product_attention(
                *tensors, attn_mask=allowed, is_causal=not mask, enable_gqa=key_heads != _HEADS
            )

        return _trained([query, key, value], attend) if grad else lambda: attend(query, key, value)

    return make


def _dropout() -> Step:
    return _trained([_tensor(1024, 1024, grad=True)], lambda x: functional.dropout(x, 0.1))


def _rms_norm() -> Step:
    return _trained(
        [_tensor(1024, 1024, grad=True), _tensor(1024, grad=True)],
        lambda x, weight: functional.rms_norm(x, (1024,), weight, 1e-6),
    )


def _adamw() -> Step:
    parameters = [torch.nn.Parameter(_tensor(512, 512, dtype=torch.float32)) for _ in range(4)]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return optimizer.step


def _products() -> Step:
    return _trained([_tensor(512, 512, grad=True), _tensor(512, 512, grad=True)], torch.mm)


def _sum() -> Step:
    numbers = _tensor(65536, 64, dtype=torch.float32)
    return lambda: numbers.sum(0)


def _embedding_backward() -> Step:
    ids = torch.randint(0, 1000, (4, 2048), device="cuda")
    return _trained([_tensor(1000, 256, grad=True)], lambda weight: functional.embedding(ids, weight))


def _eight_bit() -> Step:
    """A linear layer of a model that was loaded in 8 bit."""
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    with tempfile.TemporaryDirectory() as folder:
        tiny.CONFIGS["llama"]().save_pretrained(folder)
        if torch.cuda.is_available():  # else nothing is read
            tiny.model().save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float16, device_map={"": 0}, quantization_config=quantization
        )
    layer = model.model.layers[0].mlp.gate_proj
    return _trained([_tensor(1024, layer.in_features, grad=True)], layer)


def _autocast() -> Step:
    def cubed(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.float16):
            return x.pow(3)

    return _trained([_tensor(1024, 1024, grad=True)], cubed)


CASES: dict[str, dict[str, Callable[[], Step]]] = {
    "`softmax(x, dtype=float32)` of float16": {"softmax": _softmax},
    "softmax's backward": {"softmax's backward": _softmax_backward},
    "attention": {
        "attention without a mask": _attention(mask=False, grad=False),
        "attention with a mask": _attention(mask=True, grad=False),
    },
    "flash attention's backward": {
        "flash": _attention(mask=False, grad=True),
        "flash, shared heads": _attention(mask=False, grad=True, key_heads=2),
    },
    "memory-efficient attention's backward": {"efficient": _attention(mask=True, grad=True)},
    "dropout": {"dropout": _dropout},
    "`rms_norm`": {"rms_norm": _rms_norm},
    "AdamW and others by default": {"AdamW": _adamw},
    "matrix products": {"products": _products},
    "sums over rows": {"sum": _sum},
    "embedding's backward": {"embedding's backward": _embedding_backward},
    "8-bit linear layers in training": {"8 bit": _eight_bit},
    "autocast": {"autocast": _autocast},
}
"""The cases of each way, by its name in the table of docs/dry-run.md."""


def predicted(make: Callable[[], Step], device: str | Device) -> tuple[int, int]:
    """What a step takes by a dry run of it: at its highest, and while its result is alive. In bytes beyond what was
    held before; the second step is measured, as the first leaves workspaces."""
    with dry_run(device=device) as dry:
        step = make()
        step()
        before = dry.memory.level
        dry.memory.begin()
        result = step()
        peak, end = int(dry.memory.end().ledger.level.max()), dry.memory.level
        del result
    return peak - before, end - before


def measured(make: Callable[[], Step]) -> tuple[int, int]:
    """The same by the counters of the card."""
    step = make()
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = step()
    peak, end = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del result
    return peak - before, end - before
