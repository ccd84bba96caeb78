"""What would help, in bytes that the books say were held. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .records import Peak, Suggestion

_PER_LAYER = ("attention", "mlp", "norm", "other")
_ADAM_STATES = ("exp_avg", "exp_avg_sq")
_LEAST_SHARE = 0.005


def suggest(
    held: Peak, settings: Mapping[str, Any], *, reserved_bytes: int | None = None, free_bytes: int | None = None
) -> tuple[Suggestion, ...]:
    """What would have freed memory at a moment, the most first.

    Args:
        held: what was alive at that moment.
        settings: the trainer's arguments, as in the run's record; what is unknown counts as off.
        reserved_bytes: what the caching allocator had reserved.
        free_bytes: what of it was free.

    Suggestions that would free less than 0.5% of what was held are left out.
    """
    least = _LEAST_SHARE * (held.bytes or 0)
    found = [row for row in _all(held, settings, reserved_bytes, free_bytes) if row.frees_bytes > least]
    return tuple(sorted(found, key=lambda row: -row.frees_bytes))


def _all(
    held: Peak, settings: Mapping[str, Any], reserved_bytes: int | None, free_bytes: int | None
) -> Iterator[Suggestion]:
    roles = held.roles

    def bytes_of(category: str, *details: str) -> int:
        return sum(roles.get(f"{category}/{detail}", 0) for detail in details)

    def all_of(category: str) -> int:
        return held.categories.get(category) or 0

    checkpointed = bool(settings.get("gradient_checkpointing") or settings.get("activation_checkpointing"))
    layers = bytes_of("activations", *_PER_LAYER)
    if not checkpointed:
        yield Suggestion(
            "gradient_checkpointing=True", "activations inside the layers are made again in backward", layers
        )
    elif not settings.get("activation_offloading"):
        yield Suggestion("activation_offloading=True", "activations wait in the host's memory", layers)

    batch, length = (_count(settings.get(name)) for name in ("per_device_train_batch_size", "max_length"))
    passing = all_of("activations") + all_of("inputs") + bytes_of("temporaries", "forward", "loss", "backward")
    if batch > 1:
        yield Suggestion(
            f"per_device_train_batch_size={batch // 2} with twice the gradient_accumulation_steps",
            "what a batch's tokens hold",
            passing * (batch - batch // 2) // batch,
        )
    elif length > 1:
        yield Suggestion(
            f"max_length={length // 2}",
            "what a sequence's tokens hold, where it is that long",
            passing // 2,
        )

    logits = bytes_of("activations", "logits")
    if not settings.get("use_liger_kernel"):
        yield Suggestion("use_liger_kernel=True", "the logits are never whole", logits)

    optimizer = str(settings.get("optim", ""))
    states = bytes_of("optimizer_states", *_ADAM_STATES)
    if "8bit" not in optimizer:
        yield Suggestion('optim="adamw_bnb_8bit"', "Adam's states in 8 bits in place of 32", states * 3 // 4)
    scratch = bytes_of("temporaries", "optimizer")
    yield Suggestion('optim="adamw_torch_fused"', "scratch memory of an optimizer that works on all at once", scratch)

    if not bytes_of("weights", "adapter"):
        trained = all_of("gradients") + all_of("optimizer_states")
        yield Suggestion("LoRA (use_peft)", "gradients and optimizer states of all but the adapters", trained)
    if not bytes_of("weights", "quant_state"):
        frozen = bytes_of("weights", "frozen")
        yield Suggestion("load_in_4bit=True", "frozen weights in 4 bits, from 16", frozen * 3 // 4)

    if free_bytes is not None and reserved_bytes:
        yield Suggestion(
            "PYTORCH_ALLOC_CONF=expandable_segments:True", "free memory in pieces that do not fit", free_bytes
        )


def _count(value: Any) -> int:
    """A setting that is a number; 0 where it is none."""
    return value if isinstance(value, int) else 0
