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

from .fake_calls import known
from .fake_models import loading_fakes
from .kernels import functions, instead
from .pretended_cuda import pretend_cuda

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
        _torch(put, dry)
        pretend_cuda(put, dry)
        _transformers(put, dry, folder)
        _bitsandbytes(put, dry)
        stack.enter_context(loading_fakes(dry.inside, dry.outside, functools.partial(_warm_up, dry)))
        yield


def put_until(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack ends."""
    missing = object()
    old = vars(owner).get(name, missing)

    def undo() -> None:
        if old is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, old)

    setattr(owner, name, value)
    stack.callback(undo)


Put = Callable[[Any, str, Any], None]


def _warm_up(dry: DryRun, size: int) -> None:
    if dry.memory.allocator is not None:
        dry.memory.give_back(dry.memory.take([size]))


def _torch(put: Put, dry: DryRun) -> None:
    from torch.optim import optimizer
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    put(nn.Module, "_apply", _apply)
    put(fake_tensor, "CONSTANT_NUMEL_LIMIT", _KNOWN_VALUES)
    if dry.is_cuda:
        for module in (sys.modules["torch.utils._foreach_utils"], optimizer):
            put(module, "_get_foreach_kernels_supported_devices", lambda: ["cuda", "cpu"])
        put(optimizer, "_foreach_supported_types", [*optimizer._foreach_supported_types, FakeTensor])
        for owner, name, other in functions(dry.capability):
            put(owner, name, instead(getattr(owner, name), other))
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


def on_host(batch: Any, dry: DryRun) -> Any:
    """A batch of real tensors, as fakes that are in the host's memory and whose values are known."""
    from torch.utils._pytree import tree_map_only

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        made = dry.fake_mode.from_tensor(tensor)
        if tensor.numel() <= _KNOWN_VALUES:
            made.constant = tensor
        dry.watch.keep_on_host(made)
        return made

    with dry.outside():
        kind = type(batch)
        if kind.__name__ == "BatchEncoding":
            return kind({name: tree_map_only(torch.Tensor, fake, value) for name, value in batch.items()})
        return tree_map_only(torch.Tensor, fake, batch)


def _transformers(put: Put, dry: DryRun, folder: str) -> None:
    import accelerate
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, training_args
    from transformers.utils import import_utils

    put(import_utils, "is_fake_tensor", lambda value: False)
    put(training_args, "is_torch_bf16_gpu_available", lambda: True)
    start, train, prepare = Trainer.__init__, Trainer.train, accelerate.Accelerator.__init__

    @functools.wraps(start)
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        settings = kwargs.get("args") or next((value for value in args if hasattr(value, "output_dir")), None)
        if settings is not None:
            settings.output_dir, settings.push_to_hub = folder, False
        start(self, *args, **kwargs)

    @functools.wraps(train)
    def train_a_little(self: Any, *args: Any, **kwargs: Any) -> Any:
        with training_a_little(self, dry):
            return train(self)

    @functools.wraps(prepare)
    def accelerator(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("mixed_precision") == "fp16":  # refused on a CPU; as many bytes
            kwargs["mixed_precision"] = "bf16"
        prepare(self, *args, **kwargs)

    put(Trainer, "__init__", make)
    put(Trainer, "train", train_a_little)
    put(accelerate.Accelerator, "__init__", accelerator)
    for owner, names in (
        (Trainer, ("save_model", "save_state", "push_to_hub", "create_model_card", "save_metrics", "log_metrics")),
        (PreTrainedModel, ("save_pretrained", "push_to_hub")),
        (PreTrainedTokenizerBase, ("save_pretrained", "push_to_hub")),
    ):
        for name in names:
            put(owner, name, _nothing)
    put(Trainer, "evaluate", lambda self, *args, **kwargs: {})


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What is left out of a dry run."""


@contextmanager
def training_a_little(trainer: Any, dry: DryRun) -> Iterator[None]:
    """Take a few steps, watched, and neither save, evaluate, report nor print."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from .callback import MemTrace
    from .dry_trace import DryTrace

    left_out = (MemTrace, PrinterCallback, ProgressCallback, *INTEGRATION_TO_CALLBACK.values())
    handler, args = trainer.callback_handler, trainer.args
    callbacks = list(handler.callbacks)
    changes = {
        "max_steps": min(dry.steps, args.max_steps) if args.max_steps > 0 else dry.steps,
        "save_strategy": type(args.save_strategy)("no"),
        "eval_strategy": type(args.eval_strategy)("no"),
        "load_best_model_at_end": False,
        "torch_compile": False,
        "dataloader_num_workers": 0,
    }
    before = {name: getattr(args, name) for name in changes}
    handler.callbacks = [callback for callback in callbacks if not isinstance(callback, left_out)]
    handler.callbacks.append(DryTrace(dry, trainer))
    for name, value in changes.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        handler.callbacks = callbacks
        for name, value in before.items():
            setattr(args, name, value)


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
