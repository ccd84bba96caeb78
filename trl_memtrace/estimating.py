"""estimate: what a ``trl`` command would take, from its own flags and a model's config."""

from __future__ import annotations

import importlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .dryrun import DryRun, DryRunError, dry_run
from .errors import MemtraceError
from .model import find_config, read_config
from .patching import put_until
from .text import one_line

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig

    from .device import Device

TRAINERS = {
    "sft": "SFTTrainer",
    "dpo": "DPOTrainer",
    "kto": "KTOTrainer",
    "reward": "RewardTrainer",
    "grpo": "GRPOTrainer",
    "rloo": "RLOOTrainer",
}
"""The commands of ``trl`` whose trainers can be run, and these."""

_ONLINE = ("grpo", "rloo")
_PROMPT_TOKENS = 512
_LONGEST_ASSUMED = 2048
_ROWS_READ = 20_000
_OTHER_ENGINES = ("use_vllm", "use_transformers_continuous_batching")


class FlagError(MemtraceError):
    """TRL does not take these flags."""


class Ground(Protocol):
    """Where a command runs: on fake tensors, or for real.

    Attributes:
        steps: how many optimizer steps are taken.
        ranks: how many processes train together.
    """

    @property
    def steps(self) -> int: ...

    @property
    def ranks(self) -> int: ...

    def outside(self) -> AbstractContextManager[None]:
        """Where tensors are real."""

    def until_trained(self) -> AbstractContextManager[None]:
        """Leaves when a training is over."""


@dataclass(slots=True, kw_only=True)
class Findings:
    """What is known of the data of a run.

    Attributes:
        assumed: what had to be assumed, a sentence each.
        longest: tokens of the longest example; None where that is not known.
        positions: how many the model has; None where its config does not say.
        lora_r: the rank of the adapters; None where there are none.
    """

    assumed: list[str] = field(default_factory=list)
    longest: int | None = None
    positions: int | None = None
    lora_r: int | None = None


@dataclass(slots=True)
class Estimate(Findings):
    """What a command would take.

    Attributes:
        dry: the dry run of it.
    """

    dry: DryRun

    def summary(self) -> dict[str, Any]:
        """As ``--json`` prints it: the record's summary, and what was assumed."""
        return {**self.dry.summary(), "assumed": self.assumed}


def estimate(
    kind: str,
    flags: Sequence[str],
    *,
    device: str | int | Device | None = None,
    steps: int = 2,
    lengths: Sequence[int] | None = None,
    ranks: int = 1,
) -> Estimate:
    """Run ``trl KIND FLAGS`` on fake tensors: TRL's own parser, configs, script and trainer.

    A folder with a ``config.json`` is model enough. The longest batch comes first. Nothing is downloaded but the
    config of a model on the Hub, and nothing of the user's is written.

    Args:
        kind: one of ``TRAINERS``.
        flags: those of ``trl``.
        device: a name from the table of devices, a number of bytes, or None for a card without limits.
        steps: how many optimizer steps to take.
        lengths: tokens of each example (of its prompt, for grpo and rloo). When not given, those of the dataset that
            the flags name, where it is on this machine and the model's tokenizer too; else ``max_length`` each.
        ranks: how many processes train together, each on a card of its own; what is estimated is the first of them.

    Raises:
        FlagError: TRL does not take the flags.
        ModelError: there is no such model.
        DryRunError: it cannot be run on fake tensors.
        ValueError: no such kind, or lengths that are none.
    """
    check(kind, lengths)
    with dry_run(device, steps=steps, ranks=ranks) as dry:
        made = Estimate(dry)
        run_command(kind, flags, dry, lengths, made)
    return made


def check(kind: str, lengths: Sequence[int] | None) -> None:
    """See that there is such a command of ``trl``, and that lengths are some.

    Raises:
        ValueError: they are not.
    """
    if kind not in TRAINERS:
        raise ValueError(f"kind must be one of {', '.join(TRAINERS)}, not {kind!r}")
    if lengths is not None and not (lengths and all(length > 0 for length in lengths)):
        raise ValueError("lengths must be positive numbers of tokens, one at least")


def run_command(
    kind: str,
    flags: Sequence[str],
    ground: Ground,
    lengths: Sequence[int] | None,
    found: Findings,
    *,
    with_weights: Callable[[Source], AbstractContextManager[Source]] = nullcontext,
) -> None:
    """Run ``trl KIND FLAGS`` until it has trained.

    Args:
        kind: one of ``TRAINERS``.
        flags: those of ``trl``.
        ground: where it runs.
        lengths: tokens of each example; None where that is to be found out.
        found: is told what is known of the data.
        with_weights: where to load a model from, instead of where its config is.

    Raises:
        FlagError: TRL does not take the flags.
        ModelError: there is no such model.
        DryRunError: it cannot be run.
    """
    module = importlib.import_module(f"trl.scripts.{kind}")
    with ExitStack() as stack:
        script, training, model, mixture = _parse(module, kind, flags)
        _refuse(kind, training, ground.ranks)
        source = stack.enter_context(_model_folder(model.model_name_or_path))
        source = stack.enter_context(with_weights(source))
        model.model_name_or_path = str(source.path)
        stack.enter_context(_offline())
        found.lora_r = model.lora_r if model.use_peft else None
        found.positions = getattr(source.config.get_text_config(), "max_position_embeddings", None)
        data, tokenizer_is_real = _data(kind, script, training, mixture, source, lengths, ground, found)
        _settle(kind, script, training, mixture)
        stack.enter_context(_standing_in(kind, data, source, training, tokenizer_is_real, ground, found))
        _run(module, kind, (script, training, model, mixture), ground)


# --- flags -----------------------------------------------------------------------------------------------------------


def _parse(module: Any, kind: str, flags: Sequence[str]) -> Any:
    parser = module.make_parser(prog=f"trl {kind}")

    def refuse(message: str) -> None:
        raise FlagError(f"trl {kind}: {message}")

    parser.error = refuse
    before = dict(os.environ)
    try:
        return parser.parse_args_and_config(_with_output(flags), fail_with_unknown_args=False)
    except MemtraceError:
        raise
    except Exception as problem:  # whatever TRL's configs make of the flags
        raise FlagError(f"trl {kind}: {one_line(str(problem)) or type(problem).__name__}") from problem
    finally:  # the environment that a config file sets
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def _with_output(flags: Sequence[str]) -> list[str]:
    """Nothing is written, so nobody has to say where."""
    named = any(flag.split("=")[0] in ("--output_dir", "--output-dir") for flag in flags)
    return [*flags] if named or "--config" in flags else [*flags, "--output_dir", "out"]


def _refuse(kind: str, training: Any, ranks: int) -> None:
    for name in _OTHER_ENGINES:
        if getattr(training, name, None):
            raise DryRunError(f"trl {kind} with --{name} cannot be faked: a dry run is of torch alone")
    for name in ("fsdp", "deepspeed"):
        if getattr(training, name) and ranks == 1:
            raise FlagError(f"--{name} is for several ranks: say with --num_processes how many")
    zero = getattr(training, "hf_deepspeed_config", None)
    if (zero is not None and zero.is_offload()) or (training.fsdp_plugin_args or {}).get("cpu_offload"):
        raise DryRunError("what is offloaded to the host cannot be told from what is on the card in a dry run")


def _settle(kind: str, script: Any, training: Any, mixture: Any) -> None:
    """What a dry run does in its own way, whatever the flags say."""
    script.dataset_name, script.dataset_streaming, mixture.datasets = "stand-in", False, []
    training.eval_strategy = type(training.eval_strategy)("no")
    training.train_sampling_strategy = "sequential"
    training.report_to, training.resume_from_checkpoint = [], None
    if kind in _ONLINE:
        training.shuffle_dataset = False
        script.reward_funcs = [f"{__package__}.stand_ins.constant_reward"]


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's config is.

    Attributes:
        path: what to load it by: a folder, or an id on the Hub whose config is in the cache.
        config: the config.
    """

    path: str | Path
    config: PreTrainedConfig


@contextmanager
def _model_folder(model: str | None) -> Iterator[Source]:
    if model is None:
        raise FlagError("--model_name_or_path is missing: a hub id, a folder or a config.json")
    path = find_config(model)
    config = read_config(path, model)
    if config.architectures and path.name == "config.json":
        yield Source(path.parent if Path(model).exists() else model, config)
        return
    # TRL asks the config which class to take.
    from .model import architecture_of

    with tempfile.TemporaryDirectory(prefix="memtrace-") as folder:
        config.architectures = config.architectures or [architecture_of(config).__name__]
        config.save_pretrained(folder)
        for beside in path.parent.glob("*token*"):
            (Path(folder) / beside.name).symlink_to(beside.resolve())
        yield Source(Path(folder), config)


@contextmanager
def _offline() -> Iterator[None]:
    """Nobody is asked on the network, and no cache is written."""
    import datasets
    from huggingface_hub import constants

    with ExitStack() as stack:
        put_until(stack, constants, "HF_HUB_OFFLINE", True)
        put_until(stack, datasets.config, "HF_HUB_OFFLINE", True)
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        yield


# --- the data --------------------------------------------------------------------------------------------------------


def _data(
    kind: str,
    script: Any,
    training: Any,
    mixture: Any,
    source: Source,
    lengths: Sequence[int] | None,
    ground: Ground,
    found: Findings,
) -> tuple[Dataset, bool]:
    """The dataset, and whether the model's own tokenizer is to be used with it."""
    from . import stand_ins

    named, assumed = script.dataset_name or ", ".join(part.path for part in mixture.datasets), found.assumed
    with ground.outside():
        if lengths is None and named:
            real = _real(named, script, mixture, assumed)
            if real is not None and (stand_ins.is_tokenized(real.column_names) or _has_tokenizer(source)):
                return real, True
            if real is not None:
                assumed.append(f"{named} is not read: the model has no tokenizer beside its config.")
        rows = _rows_needed(kind, training, ground.steps)
        if lengths is None:
            length = _assumed_length(kind, training, source, assumed)
            lengths = [length] * rows
        found.longest = max(lengths) + (training.max_completion_length if kind in _ONLINE else 0)
        limit = None if getattr(training, "packing", False) else rows
        made = stand_ins.dataset(kind, sorted(lengths, reverse=True)[:limit])
    return made, False


def _rows_needed(kind: str, training: Any, steps: int) -> int:
    """How many examples the steps take, at least."""
    return max(int(steps * training.per_device_train_batch_size * max(training.gradient_accumulation_steps, 1)), 1)


def _assumed_length(kind: str, training: Any, source: Source, assumed: list[str]) -> int:
    if kind in _ONLINE:
        assumed.append(
            f"Prompts of {_PROMPT_TOKENS} tokens (--lengths FILE for others), and completions of"
            f" {training.max_completion_length}, the longest allowed."
        )
        return _PROMPT_TOKENS
    length: int | None = training.max_length
    if length is None:
        positions = getattr(source.config.get_text_config(), "max_position_embeddings", None) or _LONGEST_ASSUMED
        length = min(int(positions), _LONGEST_ASSUMED)
    assumed.append(f"Every sequence has {length} tokens (--lengths FILE for others).")
    return length


def _real(named: str, script: Any, mixture: Any, assumed: list[str]) -> Dataset | None:
    """The dataset that the flags name, where it is on this machine."""
    import datasets
    from trl.scripts.utils import get_dataset

    is_local = bool(script.dataset_name) and Path(script.dataset_name).expanduser().exists()
    try:
        if mixture.datasets:
            found = get_dataset(mixture)["train"]
        else:
            # Streamed, since a local file would else be copied into the cache.
            loaded = datasets.load_dataset(script.dataset_name, name=script.dataset_config, streaming=is_local)
            found = loaded[script.dataset_train_split]
        return datasets.Dataset.from_list(list(islice(found, _ROWS_READ)))
    except Exception as problem:
        if is_local or mixture.datasets:
            raise FlagError(f"the dataset {named} cannot be read: {one_line(str(problem))}") from problem
        assumed.append(f"{named} is not on this machine.")
        return None


def _has_tokenizer(source: Source) -> bool:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(source.path)
    except Exception:  # whatever a folder without one, or half of one, leads to
        return False
    return True


# --- the run ---------------------------------------------------------------------------------------------------------


@contextmanager
def _standing_in(
    kind: str,
    data: Dataset,
    source: Source,
    training: Any,
    tokenizer_is_real: bool,
    ground: Ground,
    found: Findings,
) -> Iterator[None]:
    """For the time of the run, TRL's script finds this dataset, and a tokenizer for it."""
    import datasets
    import transformers
    import trl

    from . import stand_ins

    names = [getattr(training, name, None) for name in ("eos_token", "pad_token")]

    def from_pretrained(original: Callable[..., Any]) -> Any:
        def load(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
            with ground.outside():
                if tokenizer_is_real or getattr(training, "chat_template_path", None):
                    try:
                        return original(cls, name, *args, **kwargs)
                    except (OSError, ValueError):  # there is none
                        pass
                config = source.config
                if str(name) != str(source.path):
                    config = transformers.AutoConfig.from_pretrained(name)
                return stand_ins.tokenizer(config, names)

        return classmethod(load)

    trainer = getattr(trl, TRAINERS[kind])
    with ExitStack() as stack:
        put_until(stack, datasets, "load_dataset", lambda *args, **kwargs: _Splits(data))
        for loader in (transformers.AutoProcessor, transformers.AutoTokenizer):
            put_until(stack, loader, "from_pretrained", from_pretrained(vars(loader)["from_pretrained"].__func__))
        if kind not in _ONLINE:
            prepare = _longest_first(trainer._prepare_dataset, kind, ground.steps, found)
            put_until(stack, trainer, "_prepare_dataset", prepare)
        yield


class _Splits:
    """A dataset with any split."""

    def __init__(self, data: Dataset) -> None:
        self._data = data

    def __getitem__(self, split: str) -> Dataset:
        return self._data


def _longest_first(prepare: Callable[..., Any], kind: str, steps: int, found: Findings) -> Callable[..., Any]:
    """A trainer's own preparation of its dataset, the longest examples first."""
    from . import stand_ins

    def prepare_longest_first(self: Any, dataset: Any, processing_class: Any, args: Any, *rest: Any) -> Any:
        if "prompt_ids" not in dataset.column_names:  # DPO and KTO would tokenize once more
            dataset = prepare(self, dataset, processing_class, args, *rest)
        sizes = [stand_ins.tokens_of(example) for example in dataset]
        found.longest = max(sizes, default=None)
        order = sorted(range(len(sizes)), key=lambda row: -sizes[row])
        return dataset.select(order[: _rows_needed(kind, args, steps)], keep_in_memory=True)

    return prepare_longest_first


def _run(module: Any, kind: str, arguments: Any, ground: Ground) -> None:
    path = list(sys.path)
    try:
        with ground.until_trained(), redirect_stdout(io.StringIO()):
            module.main(*arguments)
    except MemtraceError:
        raise
    except Exception as problem:  # whatever the trainer makes of fake tensors, or of the flags
        raise DryRunError(
            f"trl {kind} cannot be run with these flags: {type(problem).__name__}: {one_line(str(problem))}"
        ) from problem
    finally:
        sys.path[:] = path
