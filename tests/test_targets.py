"""Targets are found by structure in models of every kind, and the rows of q, k and v are theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BlipVisionConfig,
    BlipVisionModel,
    BloomConfig,
    CLIPConfig,
    CodeGenConfig,
    DbrxConfig,
    FalconConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    GPTNeoXJapaneseConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    MixtralConfig,
    ModernBertConfig,
    MptConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PersimmonConfig,
    Phi3Config,
    Qwen3NextConfig,
    T5Config,
    ViTConfig,
)
from transformers.pytorch_utils import Conv1D

from e2lora.adapters import adapt
from e2lora.config import AdapterConfig, PlanConfig
from e2lora.plan import build_plan
from e2lora.targets import LAYOUTS, find_targets, fused_parts, layers_without, linear_shape

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TEXT = {**SMALL, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 2}
TINY_BERT = BertConfig(**SMALL, vocab_size=64)
TINY_GPT2 = GPT2Config(**TEXT)


def on_meta(auto_class: Any, config: Any) -> Any:
    with torch.device("meta"):
        return auto_class.from_config(config)


def layers_of(model: nn.Module, names: Sequence[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for target in find_targets(model, names):
        found.setdefault(target.module_type, []).append(target.layer)
    return found


# ---- models -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auto_class", "config", "name", "stacks"),
    [
        (AutoModel, TINY_BERT, "query", {"encoder.layer.*.attention.self.query": 3}),
        (
            AutoModelForCausalLM,
            LlamaConfig(**GROUPED),
            "k_proj",
            {"model.layers.*.self_attn.k_proj": 3},
        ),
        (
            AutoModelForCausalLM,
            GPTNeoXConfig(**TEXT),
            "query_key_value",
            {"gpt_neox.layers.*.attention.query_key_value": 3},
        ),
        (
            AutoModelForCausalLM,
            TINY_GPT2,
            "c_proj",
            {"transformer.h.*.attn.c_proj": 3, "transformer.h.*.mlp.c_proj": 3},
        ),
        (
            AutoModelForCausalLM,
            BloomConfig(**TEXT),
            "dense_h_to_4h",
            {"transformer.h.*.mlp.dense_h_to_4h": 3},
        ),
        (
            AutoModelForCausalLM,
            Phi3Config(**GROUPED),
            "qkv_proj",
            {"model.layers.*.self_attn.qkv_proj": 3},
        ),
        (
            AutoModelForCausalLM,
            OPTConfig(
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                ffn_dim=64,
                word_embed_proj_dim=32,
                vocab_size=64,
            ),
            "fc2",
            {"model.decoder.layers.*.fc2": 3},
        ),
        (  # two numbers in a path: the first is the layer's, the second stays in the type
            AutoModelForSeq2SeqLM,
            T5Config(d_model=32, num_layers=3, num_decoder_layers=2, num_heads=4, d_kv=8, d_ff=64),
            "q",
            {
                "encoder.block.*.layer.0.SelfAttention.q": 3,
                "decoder.block.*.layer.0.SelfAttention.q": 2,
                "decoder.block.*.layer.1.EncDecAttention.q": 2,
            },
        ),
        (AutoModel, ViTConfig(**SMALL), "fc1", {"layers.*.mlp.fc1": 3}),
        (  # two towers are two stacks
            AutoModel,
            CLIPConfig(text_config=SMALL, vision_config={**SMALL, "num_hidden_layers": 2}),
            "q_proj",
            {
                "text_model.encoder.layers.*.self_attn.q_proj": 3,
                "vision_model.encoder.layers.*.self_attn.q_proj": 2,
            },
        ),
        (
            AutoModelForCausalLM,
            MixtralConfig(**GROUPED),
            "v_proj",
            {"model.layers.*.self_attn.v_proj": 3},
        ),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_layers_are_found_by_structure(
    auto_class: Any, config: Any, name: str, stacks: dict[str, int]
) -> None:
    model = on_meta(auto_class, config)
    for target in find_targets(model, [name]):
        shape = tuple(model.get_submodule(target.path).weight.shape)
        if config.model_type == "gpt2":  # stored as (in x out)
            shape = shape[::-1]
        assert shape == (target.out_features, target.in_features)
        assert target.module_type.replace("*", str(target.layer), 1) == target.path
    assert layers_of(model, [name]) == {s: list(range(size)) for s, size in stacks.items()}
    assert layers_without(model, find_targets(model, [name])) == {}


def test_targets_come_in_model_order_and_once_however_they_are_named() -> None:
    model = on_meta(AutoModel, TINY_BERT)
    targets = find_targets(model, ["value", "query"])
    assert targets == find_targets(model, ["self.query", "query", "self.value"])
    assert [t.path for t in targets[:2]] == [
        "encoder.layer.0.attention.self.query",
        "encoder.layer.0.attention.self.value",
    ]


def test_one_target_can_be_named_in_full() -> None:
    model, path = on_meta(AutoModel, TINY_BERT), "encoder.layer.1.attention.self.query"
    targets = find_targets(model, [path])
    assert [t.path for t in targets] == [path]
    assert layers_without(model, targets) == {}, "the other layers have it, though not named"


def test_linear_outside_of_numbered_layers_is_no_target() -> None:
    model = on_meta(AutoModelForSequenceClassification, TINY_BERT)
    assert isinstance(model.classifier, nn.Linear)
    with pytest.raises(ValueError, match="'classifier' matches none"):
        find_targets(model, ["classifier"])


@pytest.mark.parametrize("name", ["q_proj", "uery", ".query", "*query", ""])
def test_name_that_matches_nothing_lists_the_known_names(name: str) -> None:
    known = r"This model has: dense, key, query, value\."
    with pytest.raises(ValueError, match=known) as raised:
        find_targets(on_meta(AutoModel, TINY_BERT), ["query", name])
    assert repr(name) in str(raised.value)


# ---- kinds of linear modules ------------------------------------------------------------------


class Quantised(nn.Module):
    """As GPTQ, AWQ and HQQ store a weight: packed, of another shape, and with scales."""

    def __init__(self, names: tuple[str, str] = ("in_features", "out_features")) -> None:
        super().__init__()
        for name, size in zip(names, (8, 4), strict=True):
            setattr(self, name, size)
        self.register_buffer("qweight", torch.zeros(1, 4, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(4))

    def forward(self, x: Tensor, *extra: Any, **options: Any) -> Tensor:
        return x[..., :4]


class NormedFirst(Quantised):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)  # a vector, no matrix


class Packed(nn.Linear):
    """As bitsandbytes does: an nn.Linear whose weight tells nothing of its sizes."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)


class Container(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 4
        self.gate = nn.Parameter(torch.ones(()))
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Experts(Container):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 8, 4))

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:  # type: ignore[override]
        return x


class NoTensors(nn.Module):
    in_features, out_features = 8, 4


@pytest.mark.parametrize(
    "make",
    [
        partial(nn.Linear, 8, 4),
        partial(Conv1D, 4, 8),
        Packed,
        Quantised,
        NormedFirst,
        partial(Quantised, ("infeatures", "outfeatures")),
    ],
)
def test_linear_module_is_a_target_however_its_weight_is_stored(
    make: Callable[[], nn.Module],
) -> None:
    assert linear_shape(make()) == (8, 4)
    (target,) = find_targets(nn.ModuleList([nn.ModuleDict({"up": make()})]), ["up"])
    assert (target.in_features, target.out_features) == (8, 4)
    assert (target.path, target.module_type) == ("0.up", "*.up")


@pytest.mark.parametrize(
    "make",
    [
        partial(Container, inner=nn.Linear(8, 4)),
        partial(Container, conv=nn.Conv2d(8, 4, 1)),
        partial(Container, inner=Quantised()),
        Experts,
        NoTensors,
        partial(nn.Embedding, 8, 4),
        partial(nn.LayerNorm, 8),
    ],
)
def test_module_that_names_sizes_and_is_not_linear_is_no_target(
    make: Callable[[], nn.Module],
) -> None:
    model = nn.ModuleList([nn.ModuleDict({"up": make()})])
    with pytest.raises(ValueError, match="'up' matches none"):
        find_targets(model, ["up"])


def test_projection_that_multihead_attention_never_calls_is_no_target() -> None:
    model = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16)])
    assert layers_of(model, ["linear1", "linear2"]) == {"*.linear1": [0], "*.linear2": [0]}
    with pytest.raises(ValueError, match=r"has: linear1, linear2\."):
        find_targets(model, ["out_proj"])


@pytest.mark.parametrize(
    ("auto_class", "config", "name"),
    [(AutoModel, TINY_BERT, "query"), (AutoModelForCausalLM, TINY_GPT2, "c_attn")],
    ids=["linear", "conv1d"],
)
def test_layer_of_an_adapter_is_no_target(auto_class: Any, config: Any, name: str) -> None:
    model, adapter = on_meta(auto_class, config), AdapterConfig(target_modules=(name,))
    adapt(model, build_plan(find_targets(model, [name]), PlanConfig(r=2)), adapter)
    with pytest.raises(ValueError, match=f"'{name}' matches none"):
        find_targets(model, [name])


# ---- layers that differ -----------------------------------------------------------------------


def test_layers_of_unequal_shape_are_not_one_module_type() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleDict({"up": nn.Linear(4, width), "down": nn.Linear(8, 4)}) for width in (8, 8, 16)
    )
    targets = find_targets(model, ["up", "down"])
    assert {(t.module_type, t.layer) for t in targets} == {
        ("layers.*.up (8x4)", 0),
        ("layers.*.up (8x4)", 1),
        ("layers.*.up (16x4)", 2),
        *(("layers.*.down", layer) for layer in range(3)),
    }
    assert layers_without(model, targets) == {}, "each layer has an `up`"


HYBRIDS = {
    "jamba": (
        JambaConfig(
            **GROUPED, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_dt_rank=4
        ),
        {"self_attn.q_proj": (0, 2), "mamba.in_proj": (1,)},
    ),
    "lfm2": (
        Lfm2Config(**GROUPED, layer_types=["conv", "full_attention", "conv"]),
        {"self_attn.q_proj": (0, 2), "conv.in_proj": (1,)},
    ),
    "qwen3_next": (
        Qwen3NextConfig(
            **GROUPED,
            layer_types=["linear_attention", "linear_attention", "full_attention"],
            num_experts=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
        {"self_attn.q_proj": (0, 1), "linear_attn.in_proj_qkvz": (2,)},
    ),
}


@pytest.mark.parametrize("kind", HYBRIDS)
def test_layers_of_a_hybrid_model_without_a_target_are_skipped_and_named(kind: str) -> None:
    config, without = HYBRIDS[kind]
    model = on_meta(AutoModelForCausalLM, config)
    targets = find_targets(model, list(without))
    named = {f"model.layers.*.{name}": layers for name, layers in without.items()}
    assert layers_without(model, targets) == named
    assert layers_of(model, list(without)) == {
        module_type: [layer for layer in range(3) if layer not in layers]
        for module_type, layers in named.items()
    }


def test_layer_whose_place_is_taken_by_something_else_is_without_the_target() -> None:
    model = nn.ModuleList(
        nn.ModuleDict({"up": up}) for up in (nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4))
    )
    assert layers_without(model, find_targets(model, ["up"])) == {"*.up": (1,)}


def test_layers_that_use_one_module_all_have_it() -> None:
    """As the attention that Zamba's layers share: found once, under its first path."""
    shared = nn.Linear(4, 4)
    model = nn.ModuleList(nn.ModuleDict({"up": shared}) for _ in range(2))
    targets = find_targets(model, ["up"])
    assert [t.path for t in targets] == ["0.up"]
    assert layers_without(model, targets) == {}


# ---- fused projections ------------------------------------------------------------------------


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 64, (2, 6))}


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}


def tokens_and_encoded() -> dict[str, Tensor]:
    return {**tokens(), "encoder_hidden_states": torch.randn(2, 5, 32, dtype=torch.float64)}


# class and name of the projection → what to build, and what it takes
FUSED: dict[str, list[tuple[Any, Callable[[], dict[str, Tensor]]]]] = {
    "Attention.c_attn": [(OpenAIGPTConfig(**TEXT), tokens)],
    "GPT2Attention.c_attn": [
        (TINY_GPT2, tokens),
        (GPT2Config(**TEXT, add_cross_attention=True), tokens_and_encoded),
    ],
    "GPTBigCodeAttention.c_attn": [
        (GPTBigCodeConfig(**TEXT, multi_query=True), tokens),
        (GPTBigCodeConfig(**TEXT, multi_query=False), tokens),
    ],
    "GPTNeoXAttention.query_key_value": [(GPTNeoXConfig(**TEXT), tokens)],
    "GPTNeoXJapaneseAttention.query_key_value": [(GPTNeoXJapaneseConfig(**TEXT), tokens)],
    "BloomAttention.query_key_value": [(BloomConfig(**TEXT), tokens)],
    "PersimmonAttention.query_key_value": [(PersimmonConfig(**TEXT, qk_layernorm=False), tokens)],
    "FalconAttention.query_key_value": [
        (FalconConfig(**TEXT, multi_query=True), tokens),
        (FalconConfig(**TEXT, multi_query=False, alibi=True), tokens),
        (FalconConfig(**TEXT, new_decoder_architecture=True, num_kv_heads=2), tokens),
    ],
    "CodeGenAttention.qkv_proj": [(CodeGenConfig(**TEXT, rotary_dim=4), tokens)],
    "Phi3Attention.qkv_proj": [(Phi3Config(**GROUPED), tokens)],
    "MptAttention.Wqkv": [(MptConfig(d_model=32, n_heads=4, n_layers=3, vocab_size=64), tokens)],
    "DbrxAttention.Wqkv": [
        (
            DbrxConfig(
                d_model=32,
                n_heads=4,
                n_layers=3,
                vocab_size=64,
                attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 100.0},
                ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1},
            ),
            tokens,
        )
    ],
    "ModernBertAttention.Wqkv": [(ModernBertConfig(**TEXT), tokens)],
    "BlipAttention.qkv": [(BlipVisionConfig(**SMALL, image_size=16, patch_size=8), pixels)],
}


every_layout = pytest.mark.parametrize(
    ("key", "case"), [(key, case) for key, cases in FUSED.items() for case in range(len(cases))]
)


def tiny_fused(key: str, case: int) -> tuple[Any, dict[str, Tensor]]:
    """A model in float64 with attention that matters, and its inputs."""
    config, make_inputs = FUSED[key][case]
    torch.manual_seed(0)
    build = BlipVisionModel._from_config if "Blip" in key else AutoModel.from_config
    model: Any = build(config, attn_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
    return model, make_inputs()


def gradients_without(key: str, case: int, part: str) -> list[dict[str, Tensor]]:
    """With the rows of ``part`` zero in all layers: of each projection that has such rows, the
    largest absolute gradient of each row, by part."""
    model, inputs = tiny_fused(key, case)
    targets = find_targets(model, [key.partition(".")[2]])
    fused = {path: parts for path, parts in fused_parts(model, targets).items() if part in parts}
    for path, parts in fused.items():
        module = model.get_submodule(path)
        rows = list(parts[part])
        with torch.no_grad():
            out_by_in(module, module.weight)[rows] = 0
            if module.bias is not None:
                module.bias[rows] = 0
    output = model(**inputs)[0]
    (output * torch.randn_like(output)).sum().backward()
    largest = []
    for path, parts in fused.items():
        module = model.get_submodule(path)
        of_rows = out_by_in(module, module.weight.grad).abs().amax(1)
        largest.append({name: of_rows[list(rows)] for name, rows in parts.items()})
    return largest


def out_by_in(module: nn.Module, weight: Tensor) -> Tensor:
    return weight.T if isinstance(module, Conv1D) else weight


@every_layout
def test_parts_of_a_fused_projection_are_all_its_rows_once(key: str, case: int) -> None:
    model, _ = tiny_fused(key, case)
    targets = find_targets(model, [key.partition(".")[2]])
    parts = fused_parts(model, targets)
    assert list(parts) == [target.path for target in targets]
    for target in targets:
        rows = sorted(row for rows in parts[target.path].values() for row in rows)
        assert rows == list(range(target.out_features))


@every_layout
def test_where_v_is_zero_only_the_rows_of_v_have_a_gradient(key: str, case: int) -> None:
    """All that is attended to is then zero: scores, so q and k, can't matter."""
    for largest in gradients_without(key, case, "v"):
        assert largest.pop("v").min() > 0
        assert all(rows.max() == 0 for rows in largest.values())


@every_layout
def test_where_q_is_zero_the_rows_of_k_have_no_gradient(key: str, case: int) -> None:
    """Each score is q·k, and its gradient by k is q."""
    for largest in gradients_without(key, case, "q"):
        assert largest["q"].min() > 0
        assert largest["v"].min() > 0
        assert largest["k"].max() == 0


@every_layout
def test_last_token_depends_on_no_other_query_but_on_other_keys(key: str, case: int) -> None:
    """In the last layer, after whose attention nothing more passes between tokens."""
    model, inputs = tiny_fused(key, case)
    target = find_targets(model, [key.partition(".")[2]])[-1]
    parts = fused_parts(model, [target])[target.path]
    outputs: list[Tensor] = []
    module = model.get_submodule(target.path)
    module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    last = model(**inputs)[0][:, -1]
    (deltas,) = torch.autograd.grad((last * torch.randn_like(last)).sum(), outputs)
    of_rows = deltas[:, :-1].abs().amax((0, 1))
    assert all(of_rows[list(parts[name])].min() > 0 for name in "kv")
    assert "q" not in parts or of_rows[list(parts["q"])].max() == 0


def test_every_known_layout_is_proven() -> None:
    assert set(FUSED) == set(LAYOUTS)


def test_projection_of_unknown_layout_has_no_parts() -> None:
    class GPT2Attention(nn.Module):  # the name alone proves nothing
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = nn.Linear(4, 12)

    model = nn.ModuleList([GPT2Attention(), nn.ModuleDict({"c_attn": nn.Linear(4, 12)})])
    targets = find_targets(model, ["c_attn"])
    assert len(targets) == 2
    assert fused_parts(model, targets) == {}


def test_separate_projections_have_no_parts() -> None:
    model = on_meta(AutoModel, TINY_GPT2)
    assert fused_parts(model, find_targets(model, ["attn.c_proj", "c_fc"])) == {}
