"""What a model is made of. Every expected count is written out from the shapes that a config stands for."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes, convert_bytes
from torch import nn

from trl_memtrace import model as model_module
from trl_memtrace.model import Component, ModelError, accelerate_estimate, describe, load_meta

PHI3 = {
    "embedding": 98_500_608,
    "attention": 1_207_959_552,
    "mlp": 2_415_919_104,
    "norm": 199_680,
    "head": 98_500_608,
    "experts": 0,
    "router": 0,
    "other": 0,
}


def on_meta(config: Any, kind: str = "AutoModelForCausalLM") -> Any:
    with torch.device("meta"):
        return getattr(transformers, kind).from_config(config, dtype=torch.float32)


@pytest.fixture(scope="module")
def phi3() -> Any:
    return on_meta(transformers.Phi3Config(tie_word_embeddings=False))


def sums(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def parameters(model: nn.Module) -> dict[str, int]:
    """Components that are there, checked against the model itself on the way."""
    description = describe(model)
    by_component = {part.value: amount.parameters for part, amount in description.components.items()}
    assert sum(by_component.values()) == description.total.parameters == sums(model)
    assert description.total.bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert description.in_layers.parameters + description.outside_layers.parameters == sums(model)
    assert {w.name for w in description.weights} == {n for n, _ in model.named_parameters(remove_duplicate=False)}
    return {name: count for name, count in by_component.items() if count}


# --- Phi-3-mini, figure by figure ---


def test_phi3_has_the_published_figures(phi3: Any) -> None:
    description = describe(phi3)
    assert description.total.parameters == 3_821_079_552 == description.trainable.parameters
    assert f"{description.total.bytes / 2**20:,.2f}" == "14,576.26"
    assert {part.value: amount.parameters for part, amount in description.components.items()} == PHI3
    (layers,) = description.layers
    assert (layers.stack, layers.count, layers.each.parameters) == ("model.layers", 32, 113_252_352)
    assert f"{layers.each.bytes / 2**20:.2f}" == "432.02"
    assert description.in_layers.parameters == 3_624_075_264
    assert description.outside_layers.parameters == 197_004_288
    assert [weight.name for weight in description.outside] == [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]


def test_phi3_norms_are_norms_whatever_they_are_called(phi3: Any) -> None:
    """The study's attention and norm figures come about when names decide; these are the same weights."""
    after_attention = [w for w in describe(phi3).weights if "post_attention_layernorm" in w.name]
    assert {w.component for w in after_attention} == {Component.NORM}
    misplaced = sum(w.parameters for w in after_attention)
    assert (PHI3["attention"] + misplaced, PHI3["norm"] - misplaced) == (1_208_057_856, 101_376)


def test_the_record_has_the_documented_shape(phi3: Any) -> None:
    record = describe(phi3).to_dict()
    assert record == {
        "parameters": 3_821_079_552,
        "trainable_parameters": 3_821_079_552,
        "bytes": 3_821_079_552 * 4,
        "components": {name: {"parameters": count, "bytes": count * 4} for name, count in PHI3.items()},
        "layers": [{"count": 32, "parameters_each": 113_252_352, "bytes_each": 113_252_352 * 4}],
        "layer_parameters": 3_624_075_264,
        "non_layer_parameters": 197_004_288,
    }
    assert json.loads(json.dumps(record)) == record


# --- other architectures ---

# vocabulary, hidden, intermediate, layers, heads, key and value heads, head size
V, H, F, L, A, K, D = 97, 64, 112, 3, 4, 2, 16
SHAPE = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": A,
    "num_key_value_heads": K,
    "head_dim": D,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_HEAD_DIM = {name: value for name, value in SHAPE.items() if name != "head_dim"}
GQA = L * (H * A * D * 2 + H * K * D * 2)
GATED = L * 3 * H * F
NORMS = (2 * L + 1) * H
E, M = 8, 24  # experts, and the intermediate size of one


def llama() -> tuple[nn.Module, dict[str, int]]:
    model = on_meta(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False))
    return model, {"embedding": V * H, "attention": GQA, "mlp": GATED, "norm": NORMS, "head": V * H}


def llama_tied() -> tuple[nn.Module, dict[str, int]]:
    model = on_meta(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True))
    return model, {"embedding": V * H, "attention": GQA, "mlp": GATED, "norm": NORMS}


def qwen2() -> tuple[nn.Module, dict[str, int]]:
    model = on_meta(transformers.Qwen2Config(**NO_HEAD_DIM, tie_word_embeddings=True))
    bias = L * (A + 2 * K) * D
    return model, {"embedding": V * H, "attention": GQA + bias, "mlp": GATED, "norm": NORMS}


def qwen3() -> tuple[nn.Module, dict[str, int]]:
    model = on_meta(transformers.Qwen3Config(**SHAPE, tie_word_embeddings=False))
    return model, {"embedding": V * H, "attention": GQA, "mlp": GATED, "norm": NORMS + L * 2 * D, "head": V * H}


def gemma2() -> tuple[nn.Module, dict[str, int]]:
    model = on_meta(transformers.Gemma2Config(**SHAPE))
    return model, {"embedding": V * H, "attention": GQA, "mlp": GATED, "norm": (4 * L + 1) * H}


def mixtral() -> tuple[nn.Module, dict[str, int]]:
    model = on_meta(transformers.MixtralConfig(**SHAPE, num_local_experts=E, tie_word_embeddings=False))
    experts, router = L * E * 3 * H * F, L * E * H
    parts = {"embedding": V * H, "attention": GQA, "norm": NORMS, "head": V * H}
    return model, {**parts, "experts": experts, "router": router}


def qwen2_moe() -> tuple[nn.Module, dict[str, int]]:
    """With a shared expert that has a gate of its own, and dense layers between the sparse ones."""
    config = transformers.Qwen2MoeConfig(
        **NO_HEAD_DIM,
        num_experts=E,
        moe_intermediate_size=M,
        shared_expert_intermediate_size=F,
        mlp_only_layers=[0],
        tie_word_embeddings=False,
    )
    sparse = L - 1
    return on_meta(config), {
        "embedding": V * H,
        "attention": GQA + L * (A + 2 * K) * D,
        "mlp": 3 * H * F,
        "norm": NORMS,
        "head": V * H,
        "experts": sparse * (E * 3 * H * M + 3 * H * F),
        "router": sparse * (E * H + H),
    }


def gpt_oss() -> tuple[nn.Module, dict[str, int]]:
    config = transformers.GptOssConfig(
        **SHAPE, num_local_experts=E, layer_types=["full_attention"] * L, tie_word_embeddings=False
    )
    experts = E * (H * 2 * F + 2 * F + F * H + H)
    biases_and_sinks = (A + 2 * K) * D + H + A
    return on_meta(config), {
        "embedding": V * H,
        "attention": GQA + L * biases_and_sinks,
        "norm": NORMS,
        "head": V * H,
        "experts": L * experts,
        "router": L * (E * H + E),
    }


def gpt2() -> tuple[nn.Module, dict[str, int]]:
    config = transformers.GPT2Config(vocab_size=V, n_positions=32, n_embd=H, n_layer=L, n_head=A)
    return on_meta(config), {
        "embedding": V * H + 32 * H,
        "attention": L * (H * 3 * H + 3 * H + H * H + H),
        "mlp": L * (H * 4 * H + 4 * H + 4 * H * H + H),
        "norm": (2 * L + 1) * 2 * H,
    }


def opt() -> tuple[nn.Module, dict[str, int]]:
    """Its feed-forward has no module of its own: fc1 and fc2 stand in the layer."""
    config = transformers.OPTConfig(
        vocab_size=V,
        hidden_size=H,
        ffn_dim=F,
        num_hidden_layers=L,
        num_attention_heads=A,
        max_position_embeddings=30,
        word_embed_proj_dim=H,
    )
    return on_meta(config), {
        "embedding": V * H + 32 * H,
        "attention": L * 4 * (H * H + H),
        "mlp": L * (2 * H * F + F + H),
        "norm": (2 * L + 1) * 2 * H,
    }


def t5() -> tuple[nn.Module, dict[str, int]]:
    config = transformers.T5Config(vocab_size=V, d_model=H, d_kv=D, d_ff=F, num_layers=L, num_heads=A)
    one = 4 * H * A * D
    biases = 2 * 32 * A  # one table of relative positions in each stack
    return on_meta(config, "AutoModelForSeq2SeqLM"), {
        "embedding": V * H,
        "attention": 3 * L * one + biases,
        "mlp": 2 * L * 2 * H * F,
        "norm": (2 * L + 1) * H + (3 * L + 1) * H,
    }


def vision_language() -> tuple[nn.Module, dict[str, int]]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=28, patch_size=14),
        text_config=transformers.LlamaConfig(**SHAPE),
        tie_word_embeddings=False,
    )
    text_side = {"embedding": V * H, "attention": GQA, "mlp": GATED, "norm": NORMS, "head": V * H}
    vision_side = {
        "embedding": 32 + 3 * 14 * 14 * 32 + 5 * 32,  # class, patches, positions
        "attention": 2 * 4 * (32 * 32 + 32),
        "mlp": 2 * (2 * 32 * 48 + 48 + 32),
        "norm": (2 * 2 + 2) * 2 * 32,
    }
    projector = {"other": 32 * H + H + H * H + H}
    model = on_meta(config, "AutoModelForImageTextToText")
    return model, {k: text_side.get(k, 0) + vision_side.get(k, 0) for k in text_side} | projector


def mamba() -> tuple[nn.Module, dict[str, int]]:
    config = transformers.MambaConfig(vocab_size=V, hidden_size=H, state_size=8, num_hidden_layers=L, time_step_rank=4)
    inner = 2 * H
    mixer = H * 2 * inner + inner * 4 + inner + inner * (4 + 2 * 8) + 4 * inner + inner + inner * 8 + inner + inner * H
    return on_meta(config), {"embedding": V * H, "norm": (L + 1) * H, "other": L * mixer}


def jamba() -> tuple[nn.Module, dict[str, int]]:
    """Attention in one layer, a state space in the others, experts in every second: nothing may leak between them."""
    config = transformers.JambaConfig(
        **NO_HEAD_DIM,
        num_experts=E,
        attn_layer_period=3,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        tie_word_embeddings=False,
    )
    inner = 2 * H
    mixer = H * 2 * inner + inner * 4 + inner + inner * (4 + 2 * 8) + 4 * inner + inner + inner * 8 + inner + inner * H
    return on_meta(config), {
        "embedding": V * H,
        "attention": GQA // L,
        "mlp": (L - 1) * 3 * H * F,
        "norm": NORMS + (L - 1) * (4 + 8 + 8),
        "head": V * H,
        "experts": E * 3 * H * F,
        "router": E * H,
        "other": (L - 1) * mixer,
    }


ARCHITECTURES: list[Callable[[], tuple[nn.Module, dict[str, int]]]] = [
    llama,
    llama_tied,
    qwen2,
    qwen3,
    gemma2,
    mixtral,
    qwen2_moe,
    gpt_oss,
    gpt2,
    opt,
    t5,
    vision_language,
    mamba,
    jamba,
]


@pytest.mark.parametrize("build", ARCHITECTURES, ids=lambda build: build.__name__)
def test_components_are_those_that_the_config_stands_for(
    build: Callable[[], tuple[nn.Module, dict[str, int]]],
) -> None:
    model, expected = build()
    assert parameters(model) == expected


def test_experts_of_attention_are_attention() -> None:
    config = transformers.JetMoeConfig(
        vocab_size=V, hidden_size=H, num_hidden_layers=1, num_key_value_heads=2, kv_channels=D, intermediate_size=F
    )
    components = {w.component for w in describe(on_meta(config)).weights if ".self_attention." in w.name}
    assert components == {Component.ATTENTION}


class OwnAttentionDecoderLayer(nn.Module):
    """Someone's own layer: named after attention, with its feed-forward spread over it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(4, 4, bias=False)
        self.up, self.down = nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False)
        self.post_attention_scale = nn.ParameterList([nn.Parameter(torch.ones(2, 4))])
        self.attn_gate = nn.Parameter(torch.ones(1))


class OwnAttentionModel(nn.Module):
    """Someone's own model: its names do not say which of its tables are embedding and head, and its own is no part."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.ModuleDict({"rows": nn.Linear(4, 10, bias=False), "norm": nn.LayerNorm(4)})
        self.steps = nn.ModuleList([OwnAttentionDecoderLayer() for _ in range(2)])
        self.back = nn.Linear(4, 10)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.back


def test_roles_come_before_names() -> None:
    assert parameters(OwnAttentionModel()) == {
        "embedding": 40,
        "norm": 8,
        "attention": 2 * (16 + 1),
        "mlp": 2 * (32 + 32),
        "head": 50,
        "other": 2 * 8,
    }


def test_a_getter_that_fails_is_no_role() -> None:
    model = OwnAttentionModel()
    model.get_output_embeddings = lambda: (_ for _ in ()).throw(NotImplementedError)  # type: ignore[method-assign]
    assert parameters(model)["other"] == 2 * 8 + 50


PUBLISHED = {
    "TinyLlama-1.1B": ("llama", 2048, 5632, 22, 32, 4, 32000, False, 1_100_048_384),
    "SmolLM2-135M": ("llama", 576, 1536, 30, 9, 3, 49152, True, 134_515_008),
    "Llama-3.2-3B": ("llama", 3072, 8192, 28, 24, 8, 128256, True, 3_212_749_824),
    "Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True, 1_543_714_304),
    "Qwen2.5-7B": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False, 7_615_616_512),
    "Mistral-7B": ("mistral", 4096, 14336, 32, 32, 8, 32768, False, 7_248_023_552),
    "PowerLM-3b": ("granite", 2304, 9216, 40, 36, 36, 49152, True, 3_510_819_072),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(tmp_path: Path, name: str) -> None:
    kind, hidden, intermediate, layers, heads, kv, vocabulary, tied, count = PUBLISHED[name]
    config = {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    description = describe(load_meta(tmp_path))
    assert description.total.parameters == count
    assert description.components[Component.OTHER].parameters == 0
    assert bool(description.components[Component.HEAD].parameters) is not tied
    assert [group.count for group in description.layers] == [layers]


# --- layers ---


def test_layers_that_differ_are_listed_apart() -> None:
    config = transformers.Qwen2MoeConfig(
        **{**NO_HEAD_DIM, "num_hidden_layers": 6}, num_experts=E, mlp_only_layers=[0, 3]
    )
    groups = describe(on_meta(config)).layers
    assert [(group.indices, group.count) for group in groups] == [((0, 3), 2), ((1, 2, 4, 5), 4)]
    assert groups[0].each.parameters != groups[1].each.parameters


def test_both_stacks_of_an_encoder_decoder_are_listed() -> None:
    model, _ = t5()
    stacks = [(group.stack, group.indices) for group in describe(model).layers]
    assert stacks == [
        ("encoder.block", (0,)),
        ("encoder.block", (1, 2)),
        ("decoder.block", (0,)),
        ("decoder.block", (1, 2)),
    ]


def test_a_frozen_layer_is_not_identical_to_a_trained_one() -> None:
    model, _ = llama()
    model.model.layers[1].requires_grad_(False)
    description = describe(model)
    assert [group.indices for group in description.layers] == [(0, 2), (1,)]
    one = description.layers[0].each.parameters
    assert description.frozen.parameters == one
    assert description.trainable.parameters == sums(model) - one


def test_a_layer_used_twice_is_counted_once() -> None:
    model, _ = llama()
    model.model.layers[2] = model.model.layers[0]
    description = describe(model)
    assert description.total.parameters == sums(model)
    assert description.tied["model.layers.2.mlp.up_proj.weight"] == "model.layers.0.mlp.up_proj.weight"
    assert description.in_layers.parameters == 2 * description.layers[0].each.parameters


def test_the_tree_folds_what_repeats_and_keeps_the_rest() -> None:
    model, _ = mixtral()
    (backbone, head) = describe(model).tree.children
    names = [child.name for child in backbone.children]
    assert (names, head.name) == (["embed_tokens", "layers", "norm"], "lm_head")
    (layer,) = backbone.children[1].children
    assert (layer.indices, layer.count, layer.kind) == ((0, 1, 2), 3, "MixtralDecoderLayer")
    assert layer.each.parameters == sums(model.model.layers[0])
    assert describe(model).tree.each.parameters == sums(model)


# --- ties ---


def test_tied_weights_are_counted_once_and_named() -> None:
    model, _ = gpt2()
    assert describe(model).tied == {"lm_head.weight": "transformer.wte.weight"}


def test_a_head_met_before_the_embedding_it_is_tied_to_is_that_embedding() -> None:
    model = nn.Module()
    model.lm_head, model.tokens = nn.Linear(4, 10, bias=False), nn.Embedding(10, 4)
    model.lm_head.weight = model.tokens.weight
    model.get_input_embeddings, model.get_output_embeddings = (lambda: model.tokens), (lambda: model.lm_head)
    assert parameters(model) == {"embedding": 40}


def test_two_parameters_over_one_storage_are_one_weight() -> None:
    first, second = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    second.weight = nn.Parameter(first.weight.data)
    description = describe(nn.Sequential(first, second))
    assert description.total.parameters == 12
    assert description.tied == {"1.weight": "0.weight"}


def test_different_views_of_one_storage_are_different_weights() -> None:
    flat = torch.zeros(20)
    first, second = nn.Linear(4, 3, bias=False), nn.Linear(4, 2, bias=False)
    first.weight, second.weight = nn.Parameter(flat[:12].view(3, 4)), nn.Parameter(flat[12:].view(2, 4))
    description = describe(nn.Sequential(first, second))
    assert (description.total.parameters, description.total.bytes) == (20, 80)


# --- models in memory ---


def small(tied: bool = False) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=tied))


def test_any_torch_model_will_do() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), num_layers=4, enable_nested_tensor=False)
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 16), "encoder": encoder})
    assert parameters(model) == {
        "embedding": 160,
        "attention": 4 * (3 * 16 * 16 + 3 * 16 + 16 * 16 + 16),
        "mlp": 4 * (2 * 16 * 32 + 32 + 16),
        "norm": 4 * 2 * 32,
    }
    assert [group.count for group in describe(model).layers] == [4]


def test_a_model_without_parameters_is_described() -> None:
    description = describe(nn.ReLU())
    assert (description.total.parameters, description.layers, description.weights) == (0, (), ())


def test_describing_changes_nothing() -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    describe(model)
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dtypes_are_told_apart() -> None:
    model = small().to(torch.bfloat16)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.float()
    dtypes = describe(model).dtypes
    assert list(dtypes) == ["bfloat16", "float32"]
    assert dtypes["float32"].parameters == NORMS
    assert dtypes["float32"].bytes == NORMS * 4
    assert dtypes["bfloat16"].bytes == (sums(model) - NORMS) * 2


def test_buffers_are_listed_and_not_counted() -> None:
    model = small()
    buffers = {buffer.name: buffer for buffer in describe(model).buffers}
    inverse = buffers["model.rotary_emb.inv_freq"]
    assert (inverse.shape, inverse.bytes, inverse.persistent) == ((D // 2,), D // 2 * 4, False)


def test_an_adapter_belongs_to_what_it_adapts() -> None:
    peft = pytest.importorskip("peft")
    r = 2
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=r, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(small(), config)
    expected = {"embedding": V * H, "attention": GQA, "mlp": GATED, "norm": NORMS, "head": V * H}
    expected["attention"] += L * r * (H + A * D)
    expected["mlp"] += L * r * (F + H)
    assert parameters(model) == expected
    description = describe(model)
    assert description.trainable.parameters == L * r * (H + A * D + F + H)
    assert [group.count for group in description.layers] == [L]


def test_layers_with_adapters_differ_from_those_without() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], layers_to_transform=[1])
    groups = describe(peft.get_peft_model(small(), config)).layers
    assert [group.indices for group in groups] == [(0, 2), (1,)]


def test_adapted_fc_layers_are_still_the_feed_forward() -> None:
    peft = pytest.importorskip("peft")
    model, expected = opt()
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["fc1", "fc2"]))
    assert parameters(adapted) == {**expected, "mlp": expected["mlp"] + L * 2 * 2 * (H + F)}


def quantized_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, make(child))
    return model


@pytest.mark.parametrize("double", [False, True])
def test_packed_4bit_weights_count_what_they_stand_for(double: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear: nn.Linear) -> nn.Module:
        packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
        packed.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=double, module=packed
        )
        return packed.to("cpu")

    description = describe(quantized_linears(small(), make))
    dense = {"embedding": V * H, "attention": GQA, "mlp": GATED, "norm": NORMS, "head": V * H}
    assert {k.value: v.parameters for k, v in description.components.items() if v.parameters} == dense
    assert description.components[Component.ATTENTION].bytes == GQA // 2
    assert description.components[Component.MLP].bytes == GATED // 2
    assert description.components[Component.HEAD].bytes == V * H * 4
    assert description.dtypes["nf4"].parameters == GQA + GATED
    assert description.trainable.parameters == 2 * V * H + NORMS
    query = next(w for w in description.weights if w.name == "model.layers.0.self_attn.q_proj.weight")
    assert query.shape == (A * D, H)
    blocks = A * D * H // 64
    code, absmax = 16 * 4, blocks * 4
    second = 256 * 4 + math.ceil(blocks / 256) * 4 + 4  # its code book, its absmax, the offset
    assert query.quant_state_bytes == (code + blocks + second if double else code + absmax)


def test_int8_weights_keep_their_scales_beside_them() -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear: nn.Linear) -> nn.Module:
        eight = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        eight.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return eight.to("cpu")

    model = quantized_linears(small(), make)
    rows = L * (A * D + 2 * K * D + H + 2 * F + H)
    for _ in range(2):
        description = describe(model)
        assert description.dtypes["int8"] == model_module.Amount(GQA + GATED, GQA + GATED)
        assert description.quant_state_bytes == rows * 4
        model(torch.ones(1, 4, dtype=torch.long))  # bitsandbytes now moves the scales to the module's state


# --- accelerate's formula ---


@pytest.mark.parametrize(
    ("dtype", "largest", "whole", "training"),
    [
        ("float32", "432.02 MB", "14.23 GB", "56.94 GB"),
        ("float16", "216.01 MB", "7.12 GB", "28.47 GB"),
        ("bfloat16", "216.01 MB", "7.12 GB", "28.47 GB"),
        ("int8", "108.01 MB", "3.56 GB", None),
        ("int4", "54.0 MB", "1.78 GB", None),
    ],
)
def test_accelerates_table_for_phi3(phi3: Any, dtype: str, largest: str, whole: str, training: str | None) -> None:
    estimate = accelerate_estimate(phi3, dtype)
    assert convert_bytes(estimate.largest_layer_bytes) == largest
    assert convert_bytes(estimate.total_bytes) == whole
    trains = estimate.training_bytes
    assert (None if trains is None else convert_bytes(trains)) == training


@pytest.mark.parametrize(
    ("dtype", "stages"),
    [
        ("float32", ["14.23 GB", "14.23 GB", "28.47 GB", "56.94 GB"]),
        ("bfloat16", ["14.23 GB", "21.35 GB", "28.47 GB", "28.47 GB"]),
    ],
)
def test_accelerates_stages_for_phi3(phi3: Any, dtype: str, stages: list[str]) -> None:
    found = accelerate_estimate(phi3, dtype).stages
    assert found is not None
    sizes = (found.model_bytes, found.gradients_bytes, found.backward_bytes, found.optimizer_step_bytes)
    assert [convert_bytes(size) for size in sizes] == stages


@pytest.mark.parametrize("build", ARCHITECTURES, ids=lambda build: build.__name__)
def test_the_formula_is_accelerates(build: Callable[[], tuple[nn.Module, dict[str, int]]]) -> None:
    model, _ = build()
    whole, (largest, _) = calculate_maximum_sizes(model)
    single, half = accelerate_estimate(model, "float32"), accelerate_estimate(model, "float16")
    assert (single.total_bytes, single.largest_layer_bytes) == (int(whole), int(largest))
    assert (half.total_bytes, half.largest_layer_bytes) == (int(whole) // 2, int(largest) // 2)
    for estimate in (single, half):
        assert estimate.training_bytes == max(estimate_training_usage(int(whole), estimate.dtype).values())


def test_the_formula_counts_a_model_in_16_bit_or_4_bit_as_float32() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    whole = accelerate_estimate(small(), "float32")
    assert accelerate_estimate(small().to(torch.bfloat16), "float32") == whole
    packed = quantized_linears(
        small(), lambda x: bnb.nn.Linear4bit(x.in_features, x.out_features, bias=False).to("cpu")
    )
    assert accelerate_estimate(packed, "float32") == whole


def test_bool_buffers_count_as_bits() -> None:
    with init_empty_weights():
        model = nn.Sequential(nn.Linear(8, 8, bias=False))
    model.register_buffer("mask", torch.ones(64, dtype=torch.bool))
    assert accelerate_estimate(model, "float32").total_bytes == calculate_maximum_sizes(model)[0] == 256 + 8


@pytest.mark.parametrize("call", [lambda m: accelerate_estimate(m, "fp8"), lambda m: load_meta("x", "int8")])
def test_an_unknown_dtype_is_the_callers_mistake(call: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(ValueError, match="float32"):
        call(nn.Linear(1, 1))


# --- a model by name ---


def write(folder: Path, content: Any) -> Path:
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_folder_and_its_config_are_the_same_model_and_hold_no_weights(tmp_path: Path) -> None:
    transformers.LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    by_folder, by_file = load_meta(tmp_path), load_meta(str(tmp_path / "config.json"))
    assert describe(by_folder) == describe(by_file)
    assert {parameter.device.type for parameter in by_folder.parameters()} == {"meta"}


def test_a_config_may_have_another_name(tmp_path: Path) -> None:
    transformers.LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    other = (tmp_path / "config.json").rename(tmp_path / "llama-small.json")
    assert type(load_meta(other)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("asked", "in_config", "built"),
    [
        ("float32", "bfloat16", torch.float32),
        ("bfloat16", None, torch.bfloat16),
        ("auto", "bfloat16", torch.bfloat16),
        ("auto", None, torch.float32),
    ],
)
def test_the_dtype_is_the_one_asked_for(tmp_path: Path, asked: str, in_config: str | None, built: torch.dtype) -> None:
    write(tmp_path, {"model_type": "llama", **SHAPE, "dtype": in_config})
    assert {parameter.dtype for parameter in load_meta(tmp_path, asked).parameters()} == {built}


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        ({"model_type": "t5", "num_layers": 1}, "T5ForConditionalGeneration"),
        ({"model_type": "bart", "encoder_layers": 1, "decoder_layers": 1}, "BartForConditionalGeneration"),
        ({"model_type": "llama", **SHAPE, "architectures": ["LlamaForSequenceClassification"]}, None),
        ({"model_type": "llama", **SHAPE, "architectures": ["SomebodysOwnLlama", "os"]}, "LlamaForCausalLM"),
        ({"model_type": "llama", **SHAPE, "architectures": ["GPT2LMHeadModel"]}, "LlamaForCausalLM"),
        ({"model_type": "llama", **SHAPE, "_attn_implementation": "flash_attention_2"}, "LlamaForCausalLM"),
        ({"model_type": "vit", "num_hidden_layers": 1}, "ViTModel"),
    ],
)
def test_the_class_is_the_configs(tmp_path: Path, config: dict[str, Any], architecture: str | None) -> None:
    write(tmp_path, config)
    assert type(load_meta(tmp_path)).__name__ == (architecture or config["architectures"][0])


BROKEN = {
    "bad JSON": '{"model_type": "llama",',
    "not text": '{"model_type": "llama"}'.encode("utf-16"),
    "a list": [1, 2],
    "no model_type": {"hidden_size": 64},
    "a model_type that is a number": {"model_type": 5},
    "an unknown model_type": {"model_type": "warp-drive"},
    "a wrong type": {"model_type": "llama", "hidden_size": "large"},
    "a null where a number belongs": {"model_type": "llama", "vocab_size": None},
    "no heads": {"model_type": "llama", "num_attention_heads": 0},
    "a negative size": {"model_type": "llama", **SHAPE, "intermediate_size": -1},
    "an unknown dtype": {"model_type": "llama", "dtype": "float33"},
    "architectures of a wrong type": {"model_type": "llama", "architectures": 5},
    "nested too deeply": "[" * 100_000,
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_config_is_one_clear_line(tmp_path: Path, what: str) -> None:
    content = BROKEN[what]
    if isinstance(content, bytes):
        (tmp_path / "config.json").write_bytes(content)
    else:
        write(tmp_path, content)
    with pytest.raises(ModelError) as caught:
        load_meta(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: ")
    assert "\n" not in message
    assert 0 < len(message.removeprefix(f"{tmp_path}: ")) < 330
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere/x", "a/b/c", "nowhere.json", "x" * 5000])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ModelError):
        load_meta(name)


def test_a_folder_without_a_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load_meta(tmp_path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("GatedRepoError", "gated"),
        ("RepositoryNotFoundError", "no such model"),
        ("RemoteEntryNotFoundError", "has no config.json"),
    ],
)
def test_what_the_hub_refuses_is_told(monkeypatch: pytest.MonkeyPatch, error: str, said: str) -> None:
    from huggingface_hub import errors

    kind = getattr(errors, error)

    def refuse(*_: Any, **__: Any) -> None:
        raise kind.__new__(kind)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refuse)
    with pytest.raises(ModelError, match=said):
        load_meta("somebody/something")


def unreachable(*_: Any, **__: Any) -> None:
    raise ConnectionError("no route\nto host")


def test_without_a_network_nothing_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    calls = []

    def download(*_: Any, **options: Any) -> str:
        calls.append(options)
        raise LocalEntryNotFoundError("not there")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ModelError, match="cannot be reached \\(no route to host\\)"):
        load_meta("somebody/something")
    assert calls == [{"local_files_only": True}]


def test_without_a_network_the_cache_will_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cached = write(tmp_path, {"model_type": "llama", **SHAPE})
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, local_files_only: str(cached))
    assert sums(load_meta("somebody/something")) == sums(load_meta(tmp_path))


@pytest.mark.parametrize("name", ["", "not a name", "owner/na\x1bme"])
def test_a_name_that_is_none_is_told(name: str) -> None:
    with pytest.raises(ModelError, match="neither a folder"):
        load_meta(name)
