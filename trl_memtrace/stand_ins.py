"""What a dry run needs and a user may not have at hand: a tokenizer, a dataset, a reward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

TOKEN = 5
"""The token that all sequences are made of; any will do that is not a special one."""

_SPECIAL = ("eos", "pad", "bos")


def tokenizer(config: PreTrainedConfig, names: Iterable[str | None] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer with as many tokens as a model has, and its special ones; every word is a token.

    Args:
        config: the model's.
        names: further tokens that a user names, such as a padding token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = config.get_text_config()
    size = int(text.vocab_size)
    special = {kind: token for kind in _SPECIAL if (token := _special(text, kind)) is not None and token < size}
    special.setdefault("eos", 0)
    words = [f"t{number}" for number in range(size)]
    for kind, token in special.items():
        if words[token].startswith("t"):
            words[token] = f"<{kind}>"
    free = (number for number in range(size - 1, TOKEN, -1) if number not in special.values())
    for name, number in zip(dict.fromkeys(name for name in names if name), free, strict=False):
        words[number] = name
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[TOKEN]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast
    result: PreTrainedTokenizerFast = make(
        tokenizer_object=made,
        padding_side="left",
        **{f"{kind}_token": words[token] for kind, token in special.items()},
    )
    return result


def _special(config: Any, kind: str) -> int | None:
    token = getattr(config, f"{kind}_token_id", None)
    if isinstance(token, (list, tuple)):
        token = token[0] if token else None
    return token if isinstance(token, int) and token >= 0 else None


def dataset(kind: str, lengths: Sequence[int]) -> Dataset:
    """Sequences of some lengths, as a trainer has them once it has tokenized.

    Args:
        kind: the trainer: sft, dpo, kto, reward, grpo or rloo.
        lengths: tokens of each example; of its prompt, for grpo and rloo. A preference pair has two answers to one
            prompt, each half as long.
    """
    from datasets import Dataset

    def ids(sizes: Iterable[int]) -> list[list[int]]:
        return [[TOKEN] * size for size in sizes]

    prompts = [max(length // 2, 1) for length in lengths]
    answers = [max(length - length // 2, 1) for length in lengths]
    columns: dict[str, list[Any]]
    if kind == "sft":
        columns = {"input_ids": ids(lengths), "labels": ids(lengths)}
    elif kind == "dpo":
        columns = {"prompt_ids": ids(prompts), "chosen_ids": ids(answers), "rejected_ids": ids(answers)}
    elif kind == "kto":
        columns = {
            "prompt_ids": ids(prompts),
            "completion_ids": ids(answers),
            "KL_completion_ids": ids(answers),
            "label": [number % 2 == 0 for number in range(len(lengths))],
        }
    elif kind == "reward":
        columns = {"chosen_ids": ids(lengths), "rejected_ids": ids(lengths)}
    else:
        columns = {"prompt": [" ".join([f"t{TOKEN}"] * length) for length in lengths]}
    return Dataset.from_dict(columns)


def is_tokenized(columns: Iterable[str]) -> bool:
    """Whether a dataset is as a trainer has it once it has tokenized."""
    return not {"input_ids", "prompt_ids", "chosen_ids"}.isdisjoint(columns)


def tokens_of(example: dict[str, Any]) -> int:
    """Tokens of the longest sequence that a trainer makes of a tokenized example."""
    prompt = len(example.get("prompt_ids") or ())
    return prompt + max(
        (len(value) for name, value in example.items() if name.endswith("_ids") and name != "prompt_ids"), default=0
    )


def constant_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """The same for every completion."""
    return [1.0] * len(completions)
