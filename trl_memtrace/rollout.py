"""Generation in a dry run: its first tokens and its last, and not the hundreds between.

A rollout holds most when its cache of keys and values is full. So a model generates a few tokens from the prompt, then
the cache is made as long as it ends, and the last tokens are generated with it. What lies between is not run: the
allocator's free blocks between the two, left by caches that grew by one token at a time, are not modelled.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from .patching import Put

if TYPE_CHECKING:
    import torch

    from .dryrun import DryRun

_FEW = 2
"""Tokens generated at the beginning, and at the end."""


def generate_a_little(put: Put, dry: DryRun) -> None:
    """Have ``generate`` of a model take few steps, whatever the number of tokens, and give as many as are allowed.
    Only plain calls are shortened: from tokens, by a decoder, answered with tokens. It comes before
    ``GenerationMixin.generate``, which others may watch meanwhile, and put back.

    Args:
        put: sets an attribute, until it is put back.
        dry: in which tokens are made.
    """
    from transformers import GenerationMixin, PreTrainedModel

    def generate(self: Any, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        config = generation_config or self.generation_config
        in_parts = config.return_dict_in_generate or kwargs.get("return_dict_in_generate") or kwargs.get("streamer")
        if prompt is None or in_parts or getattr(self.config, "is_encoder_decoder", False):
            return GenerationMixin.generate(self, inputs, generation_config, **kwargs)
        kwargs.pop("input_ids", None)
        mask = kwargs.pop("attention_mask", None)
        new = kwargs.pop("max_new_tokens", None) or config.max_new_tokens
        if new is None:
            new = max((config.max_length or 0) - prompt.shape[1], 1)

        def some(tokens: Any, attention: Any, count: int, cache: Any = None) -> Any:
            short = copy.deepcopy(config)
            short.max_new_tokens, short.min_new_tokens, short.return_dict_in_generate = count, count, True
            return GenerationMixin.generate(
                self,
                tokens,
                generation_config=short,
                attention_mask=attention,
                past_key_values=cache,
                **kwargs,
            )

        whole = _longer(prompt, prompt.shape[1] + new, dry)
        full = _longer(mask, prompt.shape[1] + new, dry) if mask is not None else None
        few = min(_FEW, new)
        begun = some(prompt, mask, few)
        if new > 2 * _FEW and begun.past_key_values is not None:
            until = whole.shape[1] - _FEW
            cache = begun.past_key_values
            del begun
            _lengthen(cache, until - 1)
            some(whole[:, :until], full[:, :until] if full is not None else None, _FEW, cache)
        return whole

    put(PreTrainedModel, "generate", generate)


def _longer(tokens: torch.Tensor, length: int, dry: DryRun) -> torch.Tensor:
    """A tensor of tokens, or of a mask, of another length; its values are known, and it is on the device."""
    import torch

    from .fake_calls import known
    from .stand_ins import TOKEN

    with dry.outside():
        made = known(dry.fake_mode, torch.full((tokens.shape[0], length), TOKEN, dtype=torch.int64))
    dry.watch.see(made)
    return made


def _lengthen(cache: Any, length: int) -> None:
    """Make every layer's keys and values as long as they are after ``length`` tokens."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            held = getattr(layer, name, None)
            if held is not None and held.dim() == 4:
                window = getattr(layer, "sliding_window", None)
                size = min(length, window - 1) if layer.is_sliding and window else length
                shape = (*held.shape[:2], size, held.shape[3])
                setattr(layer, name, None)
                setattr(layer, name, held.new_empty(shape))
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = length
