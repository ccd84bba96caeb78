"""What is changed in torch, transformers, accelerate and bitsandbytes for the time of a dry run. All of it is undone
at its end."""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor

from .cuda_autocast import casting_as_cuda
from .fake_calls import known
from .fake_models import loading_fakes
from .fake_offloading import offload_fakes
from .fake_ranks import first_of
from .kernels import functions, instead
from .patching import Put, put_until
from .pretended_cuda import pretend_cuda
from .rollout import generate_a_little
from .short_training import precompute_a_little, training_a_little, write_nothing

if TYPE_CHECKING:
    from .dryrun import DryRun

_KNOWN_VALUES = 1 << 22
"""Up to how many elements the values of a batch's tensors, and of what is computed from these alone, are known."""


@contextmanager
def pretend(dry: DryRun) -> Iterator[None]:
    """Everything that has to be otherwise while a dry run lasts."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="memtrace-"))
        put = functools.partial(put_until, stack)
        if dry.ranks > 1:  # first, since libraries are loaded for it and look at what is changed below
            stack.enter_context(first_of(dry.ranks, put, dry))
        _torch(put, dry)
        pretend_cuda(put, dry)
        if dry.is_cuda:
            stack.enter_context(casting_as_cuda())
        _transformers(put, dry, folder)
        _bitsandbytes(put, dry)
        # One process alone is about to have it on its card; of several, each may take no more than its shard there.
        host = dry.on_host if dry.ranks > 1 and dry.is_cuda else dry.inside
        warm_up = functools.partial(_warm_up, dry)
        stack.enter_context(loading_fakes(dry.inside, dry.outside, host, warm_up, dry.dtype))
        yield


def _warm_up(dry: DryRun, size: int) -> None:
    if dry.memory.allocator is not None:
        dry.memory.give_back(dry.memory.take([size]))


def _torch(put: Put, dry: DryRun) -> None:
    from torch.optim import optimizer
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    put(nn.Module, "_apply", _apply)
    put(fake_tensor, "CONSTANT_NUMEL_LIMIT", _KNOWN_VALUES)
    put(FakeTensor, "__deepcopy__", _copy)
    if dry.is_cuda:
        for module in (sys.modules["torch.utils._foreach_utils"], optimizer):
            put(module, "_get_foreach_kernels_supported_devices", lambda: ["cuda", "cpu"])
        put(optimizer, "_foreach_supported_types", [*optimizer._foreach_supported_types, FakeTensor])
        for owner, name, other in functions(dry.capability):
            put(owner, name, instead(getattr(owner, name), other))

    def numpy(self: FakeTensor, *, force: bool = False) -> Any:
        """Of ones, where no values are known."""
        with dry.outside():
            values = torch.ones(self.shape, dtype=self.dtype) if self.constant is None else self.constant
            return values.numpy(force=force)

    put(FakeTensor, "numpy", numpy)
    one_hot = nn.functional.one_hot

    def one_hot_of_known(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
        """It begins with zeros, which the fake mode does not take for known."""
        values = getattr(tensor, "constant", None)
        if values is None or values.numel() * num_classes > _KNOWN_VALUES:
            return one_hot(tensor, num_classes)
        with dry.outside():
            made = known(dry.fake_mode, one_hot(values, num_classes))
        dry.watch.see(made)
        return made

    put(nn.functional, "one_hot", one_hot_of_known)
    fetch = _BaseDataLoaderIter.__next__

    def fetch_on_host(self: Any) -> Any:
        with dry.outside():
            batch = fetch(self)
        return on_host(batch, dry)

    put(_BaseDataLoaderIter, "__next__", fetch_on_host)


def _apply(self: nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
    """``Module._apply``, which would swap fake tensors and fails where there are references to them."""
    if recurse:
        for child in self.children():
            _apply(child, fn)
    with torch.no_grad():
        for parameter in self._parameters.values():
            if parameter is None:
                continue
            applied = fn(parameter)
            if applied is not parameter:
                parameter.data = applied
            if parameter.grad is not None:
                gradient = fn(parameter.grad)
                if gradient is not parameter.grad:
                    parameter.grad.data = gradient
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
    return self


def _copy(self: FakeTensor, memo: dict[int, Any]) -> Any:
    """``Tensor.__deepcopy__``, which takes a fake tensor whose values are known for a real one."""
    values, self.constant = self.constant, None
    try:
        return torch.Tensor.__deepcopy__(self, memo)  # type: ignore[no-untyped-call]
    finally:
        self.constant = values


def on_host(batch: Any, dry: DryRun) -> Any:
    """A batch of real tensors, as fakes that are in the host's memory and whose values are known."""
    from torch.utils._pytree import tree_map_only

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        few = tensor.numel() <= _KNOWN_VALUES
        made = known(dry.fake_mode, tensor) if few else dry.fake_mode.from_tensor(tensor)
        dry.watch.keep_on_host(made)
        return made

    with dry.outside():
        kind = type(batch)
        if kind.__name__ == "BatchEncoding":
            return kind({name: tree_map_only(torch.Tensor, fake, value) for name, value in batch.items()})
        return tree_map_only(torch.Tensor, fake, batch)


def _transformers(put: Put, dry: DryRun, folder: str) -> None:
    import accelerate
    from transformers import Trainer, training_args
    from transformers.utils import import_utils

    put(import_utils, "is_fake_tensor", lambda value: False)
    put(training_args, "is_torch_bf16_gpu_available", lambda: True)
    start, train, prepare = Trainer.__init__, Trainer.train, accelerate.Accelerator.__init__

    @functools.wraps(start)
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        offload_fakes(put, dry)
        precompute_a_little(put, type(self), dry.steps)
        start(self, *args, **kwargs)

    @functools.wraps(train)
    def train_a_little(self: Any, *args: Any, **kwargs: Any) -> Any:
        with training_a_little(self, dry.steps):
            return train(self)

    @functools.wraps(prepare)
    def accelerator(self: Any, *args: Any, **kwargs: Any) -> None:
        half = kwargs.get("mixed_precision") == "fp16"
        if half and kwargs.get("deepspeed_plugin") is None:  # refused on a CPU; as many bytes
            kwargs["mixed_precision"] = "bf16"
        prepare(self, *args, **kwargs)

    put(Trainer, "__init__", make)
    write_nothing(put, folder)
    put(Trainer, "train", train_a_little)
    put(accelerate.Accelerator, "__init__", accelerator)
    generate_a_little(put, dry)


def _bitsandbytes(put: Put, dry: DryRun) -> None:
    bitsandbytes: Any = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:
        from importlib.util import find_spec

        if find_spec("bitsandbytes") is None:
            return
        import bitsandbytes
    functional: Any = bitsandbytes.functional
    functions: Any = sys.modules["bitsandbytes.autograd._functions"]
    put(functional, "name2qmap", dict(functional.name2qmap))
    if dry.is_cuda:

        def matmul(
            a: Any, b: Any, out: Any = None, state: Any = None, threshold: float = 0.0, bias: Any = None
        ) -> Any:
            """On CUDA int8 is multiplied as int8 in training too."""
            state = state or functions.MatmulLtState()
            if threshold > 0.0:
                state.threshold = threshold
            return functions.MatMul8bitLt.apply(a, b, out, bias, state)

        put(bitsandbytes, "matmul", matmul)
