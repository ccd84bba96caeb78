"""Every trainer that TRL has: books that balance in every phase, whose weights are whose, losses bit for bit."""

from __future__ import annotations

import gc
import inspect
import warnings
from pathlib import Path

import pytest
import recipes
import tiny
import torch
from matrix_table import Section
from test_memtrace import assert_nothing_is_left
from transformers import GenerationMixin, TrainerCallback

from trl_memtrace import MemoryTracer, MemTrace, RunTrace, TracePolicy
from trl_memtrace.categories import Phase

TABLE = Section("Trainers", "trainer", "phases", "other weights", "losses", "unattributed")
OFTEN_USED = (
    "SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer", "RLOOTrainer", "GRPOTrainer",
    "experimental.ORPOTrainer", "experimental.CPOTrainer", "experimental.GKDTrainer", "experimental.OnlineDPOTrainer",
)  # fmt: skip
ORDER = ("rollout", "forward", "loss", "backward", "optimizer", "evaluate", "save", "idle")


def bytes_of(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [value for module in model.modules() for value in vars(module).values() if torch.is_tensor(value)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def watched(name: str, folder: Path, callback: MemTrace | None = None, **settings):
    trainer = recipes.make(name, folder, **settings)
    callback = callback or MemTrace(first_steps=100)
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback.run


def numbers(trainer) -> list[float]:
    """Every loss and gradient norm that was logged."""
    rows = trainer.state.log_history
    return [value for row in rows for name, value in row.items() if name in ("loss", "eval_loss", "grad_norm")]


def assert_balanced(run: RunTrace) -> float:
    """The books of every step and phase balance. Returns the largest share that is unattributed."""
    shares = [0.0]
    for step in run:
        assert step.traced
        assert sum(step.peak.categories.values()) == step.peak.bytes == step.peak.allocator_bytes
        assert sum(step.peak.roles.values()) == step.peak.bytes
        assert sum(sum(row.values()) for row in step.peak.modules.values()) == step.peak.bytes
        assert max(phase.peak_bytes for phase in step.phases.values()) == step.peak.bytes
        for phase in step.phases.values():
            assert sum(phase.at_peak.values()) == phase.peak_bytes
            assert sum(phase.at_end.values()) == phase.end_bytes
            shares.append(phase.at_peak["unattributed"] / phase.peak_bytes)
            shares.append(phase.at_end["unattributed"] / phase.end_bytes)
    assert max(shares) < 0.005
    return max(shares)


NAMES = [name for name, _ in recipes.trainers()]


@pytest.mark.parametrize(
    "name", [name if name in OFTEN_USED else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_every_trainer(tmp_path, name):
    if name in recipes.ELSEWHERE:
        TABLE.add(name, "not run", recipes.ELSEWHERE[name], "-", "-")
        assert "VLLMClient" in inspect.getsource(inspect.getmodule(dict(recipes.trainers())[name]))
        return
    recipe = recipes.RECIPES[name]
    plain = recipes.make(name, tmp_path / "plain")
    plain.train()
    trainer, run = watched(name, tmp_path / "traced")

    assert numbers(trainer) == numbers(plain)
    assert len(tiny.losses(trainer)) == len(run) == 3
    share = assert_balanced(run)
    phases = {phase for step in run for phase in step.phases}
    assert {"forward", "loss", "backward", "optimizer", "save"} <= phases
    assert ("rollout" in phases) == recipe.rolls_out
    assert ("evaluate" in phases) == (recipe.settings.get("eval_strategy") != "no")
    assert "evaluate" not in run.steps[0].phases
    others = {
        "reference": [getattr(trainer, "ref_model", None)],
        "teacher": [getattr(trainer, "teacher_model", None)],
        "reward": [model for model in getattr(trainer, "reward_funcs", []) if isinstance(model, torch.nn.Module)],
    }
    for role, models in others.items():
        expected = sum(bytes_of(model) for model in models if model is not None)
        assert bool(expected) == (role in recipe.weights)
        for step in run:
            assert step.peak.roles.get(f"weights/{role}", 0) == expected
    assert run.peak.roles["weights/trainable"] == sum(parameter.nbytes for parameter in trainer.model.parameters())
    assert_nothing_is_left(trainer)
    TABLE.add(
        name,
        ", ".join(phase for phase in ORDER if phase in phases),
        ", ".join(recipe.weights) or "-",
        "the same",
        f"{100 * share:.2f}%",
    )


def test_the_committed_table_is_what_this_run_gives():
    assert set(NAMES) == set(recipes.RECIPES) | set(recipes.ELSEWHERE)
    TABLE.check(NAMES)


def test_there_is_no_ppo_in_this_trl():
    assert not [name for name in NAMES if "PPO" in name]


class Generating:
    """Generation by a model whose cache can be counted."""

    def __init__(self, rows: int = 4, prompt: int = 2, new: int = 40) -> None:
        self.model = tiny.model(num_hidden_layers=3).eval()
        self.rows, self.length, self.new = rows, prompt + new, new
        self.inputs = torch.randint(2, tiny.VOCABULARY, (rows, prompt))

    def __call__(self) -> None:
        self.model.generate(self.inputs, max_new_tokens=self.new, min_new_tokens=self.new, do_sample=False)

    def cache_bytes(self, tokens: int) -> int:
        config = self.model.config
        width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
        return 2 * config.num_hidden_layers * self.rows * tokens * width * 4


def test_the_cache_of_a_rollout_is_activations_of_its_own_role():
    generating = Generating()
    tracer = MemoryTracer(generating.model)
    with tracer.step():
        generating()
    tracer.close()
    (step,) = tracer.run
    assert step.peak.phase is Phase.ROLLOUT
    cache = step.peak.roles["activations/kv_cache"]
    # The last token is never fed back; while a layer's cache grows, the old one is still there.
    assert generating.cache_bytes(generating.length - 1) * 0.98 <= cache
    assert cache <= generating.cache_bytes(generating.length - 1) * 4 / 3 + 1
    held = [name for name, row in step.peak.modules.items() if row.get("activations", 0) > cache / 4]
    assert all("self_attn" in name for name in held)
    assert "_memtrace" not in vars(GenerationMixin.generate)


def test_a_static_cache_is_found_too():
    generating = Generating(new=8)
    generating.model.generation_config.cache_implementation = "static"
    tracer = MemoryTracer(generating.model)
    with tracer.step():
        generating()
    tracer.close()
    assert tracer.run.peak.roles["activations/kv_cache"] >= generating.cache_bytes(generating.length - 1)


def test_scoring_after_generation_is_part_of_the_rollout_and_training_is_not():
    model, tracer = tiny.model(), None
    inputs = torch.randint(2, tiny.VOCABULARY, (2, 8))
    tracer = MemoryTracer(model)
    with tracer.step():
        model.generate(inputs, max_new_tokens=4, do_sample=False)
        with torch.no_grad():
            model(inputs)
        model(input_ids=inputs, labels=inputs).loss.backward()
    tracer.close()
    (step,) = tracer.run
    assert list(step.phases) == ["rollout", "forward", "loss", "backward", "idle"]
    assert step.phases["forward"].at_end["activations"] > 0


def test_generation_that_fails_leaves_nothing(tmp_path):
    model = tiny.model()
    tracer = MemoryTracer(model)
    with pytest.raises(ValueError, match="greater than 0"), tracer.step():
        model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=0)
    tracer.close()
    assert "_memtrace" not in vars(GenerationMixin.generate)


@pytest.mark.parametrize(
    ("accumulation", "per_generation", "iterations", "generates_in"),
    [(1, 1, 1, [1, 2, 3, 4]), (2, 2, 1, [1, 2, 3, 4]), (2, 4, 1, [1, 3]), (1, 2, 2, [1])],
)
def test_rollouts_are_where_grpo_generates(tmp_path, accumulation, per_generation, iterations, generates_in):
    _, run = watched(
        "GRPOTrainer",
        tmp_path,
        max_steps=4,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        num_iterations=iterations,
        eval_strategy="no",
        save_strategy="no",
    )
    assert [step.step for step in run if "rollout" in step.phases] == generates_in
    assert_balanced(run)
    for step in run:
        assert step.peak.categories["inputs"] > 0


def test_a_rollout_that_falls_between_traced_steps_is_traced_all_the_same(tmp_path):
    callback = MemTrace(first_steps=1, every_n_steps=2, new_highs=False)
    _, run = watched(
        "GRPOTrainer",
        tmp_path,
        callback,
        max_steps=10,
        gradient_accumulation_steps=1,
        steps_per_generation=4,
        eval_strategy="no",
        save_strategy="no",
    )
    # It generates in 1, 5 and 9; of those the first is among the first steps, and 2, 4, 6, 8, 10 are every second.
    assert [step.step for step in run if step.traced] == [1, 2, 4, 5, 6, 8, 9, 10]
    assert [step.step for step in run if "rollout" in step.phases] == [1, 5, 9]


def test_log_probabilities_computed_beforehand_are_named(tmp_path):
    _, run = watched("DPOTrainer", tmp_path, precompute_ref_log_probs=True, eval_strategy="no")
    for step in run:
        assert step.peak.roles["inputs/reference_logps"] == 2 * 2 * 4
        assert "weights/reference" not in step.peak.roles
    assert_balanced(run)
    _, run = watched(
        "GRPOTrainer", tmp_path / "grpo", eval_strategy="no", gradient_accumulation_steps=1, steps_per_generation=2
    )
    assert run.peak.roles["inputs/logps"] > 0
    assert run.peak.roles["inputs/reference_logps"] > 0


def test_a_disabled_adapter_is_no_copy_and_a_frozen_one_is_a_reference(tmp_path):
    from peft import get_peft_model

    rows = recipes.Dataset.from_dict(recipes.PREFERENCE)
    adapter = None
    for further in (False, True):
        from trl import DPOConfig, DPOTrainer

        model = tiny.model()
        base = bytes_of(model)
        if further:
            model = get_peft_model(model, tiny.lora())
        args = DPOConfig(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
            save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            processing_class=tiny.tokenizer(),
            peft_config=None if further else tiny.lora(),
        )
        callback = MemTrace()
        trainer.add_callback(callback)
        trainer.train()
        assert_balanced(callback.run)
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        adapter = sum(parameter.nbytes for parameter in trained)
        roles = callback.run.peak.roles
        assert roles["weights/adapter"] == adapter
        assert roles.get("weights/reference", 0) == (adapter if further else 0)
        assert callback.run.peak.categories["weights"] == base + adapter * (2 if further else 1)


def test_a_reference_that_shares_storages_is_counted_once():
    model, reference = tiny.model(), tiny.model(seed=1)
    reference.model.embed_tokens.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach())
    tracer = MemoryTracer(model, others={"ref_model": reference})
    with tracer.step():
        model(torch.ones(1, 8, dtype=torch.long)).logits.sum().backward()
    tracer.close()
    shared = model.model.embed_tokens.weight.nbytes
    roles = tracer.run.peak.roles
    assert roles["weights/trainable"] == sum(parameter.nbytes for parameter in model.parameters())
    assert roles["weights/reference"] == bytes_of(reference) - shared


def test_a_model_that_its_trainer_lets_go_of_is_not_kept_alive():
    import weakref

    model, reference = tiny.model(), tiny.model(seed=1)
    tracer = MemoryTracer(model, others={"ref_model": reference})
    gone = weakref.ref(reference)
    with tracer.step():
        model(torch.ones(1, 8, dtype=torch.long))
    del reference
    gc.collect()
    assert gone() is None
    with tracer.step():
        model(torch.ones(1, 8, dtype=torch.long))
    tracer.close()
    assert ["weights/reference" in step.peak.roles for step in tracer.run] == [True, False]


def test_a_tracer_that_nobody_closes_goes_with_its_last_reference():
    import weakref

    from trl_memtrace.phases import generate_watch

    model = tiny.model()
    tracer = MemoryTracer(model)
    with tracer.step():
        model(torch.ones(1, 8, dtype=torch.long))
    gone = weakref.ref(tracer)
    gc.disable()
    try:
        del tracer
        assert gone() is None
    finally:
        gc.enable()
    generate_watch.remove(print)
    assert not generate_watch._listeners


def test_a_long_evaluation_is_traced_for_a_while_only(tmp_path, monkeypatch):
    from trl_memtrace import callback as module

    monkeypatch.setattr(module, "_TRACED_PREDICTIONS", 2)
    installed = []

    class Looks(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            installed.append(torch.autograd._profiler_enabled())

    trainer = tiny.trainer(tmp_path, eval_strategy="steps", eval_steps=3, eval_rows=12, per_device_eval_batch_size=2)
    trainer.add_callback(MemTrace(first_steps=1, new_highs=False))
    trainer.add_callback(Looks())
    trainer.train()
    assert installed == [True] + [False] * 5
    run = RunTrace.load(tmp_path)
    assert [list(step.phases) for step in run][1:] == [[], ["evaluate"]]
    assert run.steps[2].traced
    assert run.steps[2].phases["evaluate"].at_peak["unattributed"] == 0
    assert run.summary.worst_phases["evaluate"].peak_bytes > 0


def test_an_evaluation_of_several_data_sets_is_one_phase_and_its_failure_is_told(tmp_path):
    trainer = tiny.trainer(tmp_path, eval_strategy="steps", eval_steps=1, eval_rows=2)
    trainer.eval_dataset = {"one": trainer.eval_dataset, "two": trainer.eval_dataset}

    class Fails(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise MemoryError("none left")

    trainer.add_callback(MemTrace())
    trainer.add_callback(Fails())
    with pytest.raises(MemoryError):
        trainer.train()
    run = RunTrace.load(tmp_path)
    assert ["evaluate" in step.phases for step in run] == [True, False]
    assert run.failure.phase is Phase.EVALUATE
    assert run.failure.step == 2
    assert run.failure.traced
    assert_nothing_is_left(trainer)


def test_an_evaluation_that_somebody_asks_for_inside_a_step_is_a_phase_of_the_step(tmp_path):
    trainer = tiny.trainer(tmp_path, eval_rows=2)

    class Evaluates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            trainer.evaluate()

    trainer.add_callback(MemTrace())
    trainer.add_callback(Evaluates())
    trainer.train()
    run = RunTrace.load(tmp_path)
    assert_balanced(run)
    for step in run:
        assert list(step.phases) == ["forward", "loss", "backward", "evaluate", "optimizer", "idle"]
        gradients = sum(parameter.nbytes for parameter in trainer.model.parameters())
        assert step.phases["evaluate"].at_peak["gradients"] == gradients


def test_phases_of_a_plain_loop():
    model = tiny.model()
    inputs = torch.ones(2, 8, dtype=torch.long)
    tracer = MemoryTracer(model, policy=TracePolicy(first_steps=2, every_n_steps=None))
    for _ in range(3):
        with tracer.step():
            model(input_ids=inputs, labels=inputs).loss.backward()
        with tracer.phase(Phase.EVALUATE), torch.no_grad():
            kept = model(inputs)
            torch.empty(2_000_000)
        del kept
    tracer.close()
    run = tracer.run
    assert [step.traced for step in run] == [True, True, False]
    assert ["evaluate" in step.phases for step in run] == [True, True, False]
    assert run.peak.phase is Phase.EVALUATE
    assert run.peak.roles["temporaries/evaluate"] == 8_000_000
    assert run.summary.steps == tracer.summary.steps == 3
    assert run.summary.traced_steps == tracer.summary.traced_steps == 2
    assert tracer.summary.to_json()["peak"] == run.summary.to_json()["peak"]


def test_a_summary_of_amended_steps_is_that_of_the_steps_as_they_became():
    from dataclasses import replace

    from trl_memtrace.records import Summary

    model = tiny.model()
    inputs = torch.ones(4, 16, dtype=torch.long)
    tracer = MemoryTracer(model)
    with tracer.step():
        model(input_ids=inputs, labels=inputs).loss.backward()
    (before,) = tracer.run
    with tracer.phase(Phase.SAVE):
        pass
    tracer.close()
    (after,) = tracer.run
    assert list(after.phases) == [*before.phases, "save"]
    expected = Summary()
    expected.add(after)
    assert replace(tracer.summary, header=expected.header) == expected


def test_an_amended_step_is_read_back_as_one(tmp_path):
    _, run = watched("SFTTrainer", tmp_path)
    path = tmp_path / "out" / "memtrace" / "rank-00000.jsonl"
    lines = path.read_text().splitlines()
    assert sum('"record":"step","step":2,' in line for line in lines) == 3  # the step, the evaluation, the checkpoint
    assert [step.step for step in run] == [1, 2, 3]
    assert run.damaged_lines == 0
    import json

    assert json.loads(lines[-1])["peak"] == run.summary.to_json()["peak"]
    assert json.loads(lines[-1])["steps"] == 3


def test_nothing_is_warned_about_when_a_trainer_rolls_out(tmp_path):
    from trl_memtrace import MemtraceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", MemtraceWarning)
        watched("RLOOTrainer", tmp_path, max_steps=1)
