"""The probe on models of every kind, tiny and random, against plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    CLIPConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    Phi3Config,
    T5Config,
    ViTConfig,
)

from e2lora.config import ModelConfig
from e2lora.gradients import Microbatch, Probing, Round, measure_gradients
from e2lora.models import load_base
from e2lora.targets import find_targets, fused_parts, is_transposed, layers_without
from tests.test_sft import EOS, byte_tokenizer
from tests.test_targets import SMALL, TEXT

VISION = {**SMALL, "image_size": 8, "patch_size": 4}
ROWS = 6
F32 = torch.float32


class Kind(NamedTuple):
    auto_class: Any
    config: Any
    names: tuple[str, ...]
    inputs: Callable[[], dict[str, Tensor]]
    types: int


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 64, (ROWS, 7))}


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(ROWS, 3, 8, 8)}


KINDS = {
    "encoder": Kind(
        AutoModelForSequenceClassification, BertConfig(**TEXT), ("query", "dense"), tokens, 4
    ),
    "decoder, grouped queries, tied embeddings": Kind(
        AutoModelForCausalLM,
        LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=True),
        ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"),
        tokens,
        5,
    ),
    "GPT-2: transposed, fused": Kind(
        AutoModelForCausalLM,
        GPT2Config(**TEXT, n_inner=64),
        ("c_attn", "c_proj", "c_fc"),
        tokens,
        4,
    ),
    "fused by head": Kind(
        AutoModelForCausalLM, GPTNeoXConfig(**TEXT), ("query_key_value",), tokens, 1
    ),
    "fused, grouped queries": Kind(
        AutoModelForCausalLM, Phi3Config(**TEXT, num_key_value_heads=2), ("qkv_proj",), tokens, 1
    ),
    "encoder-decoder": Kind(
        AutoModelForSeq2SeqLM,
        T5Config(
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_decoder_layers=3,
            num_heads=4,
            vocab_size=64,
            decoder_start_token_id=0,
        ),
        ("q", "v"),
        lambda: {**tokens(), "decoder_input_ids": torch.randint(3, 64, (ROWS, 5))},
        6,
    ),
    "hybrid": Kind(
        AutoModelForCausalLM,
        Lfm2Config(
            **TEXT,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention", "full_attention"],
            block_auto_adjust_ff_dim=False,
        ),
        ("q_proj", "v_proj"),
        tokens,
        2,
    ),
    "vision transformer": Kind(AutoModel, ViTConfig(**VISION), ("q_proj", "v_proj"), pixels, 2),
    "two towers": Kind(
        AutoModel,
        CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16),
        ("q_proj", "fc1"),
        lambda: {**tokens(), **pixels()},
        4,
    ),
}


def loss_sum(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Of every output that is differentiable: each row counts, and each token."""
    out = model(**inputs)
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        value = getattr(out, name, None)
        if value is not None:
            weights = torch.linspace(0.5, 1.5, value[0].numel()).reshape(value[0].shape)
            return (value * weights).square().sum()
    raise AssertionError(f"{type(out).__name__} has no known output")


def build(kind: Kind) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    kind.config._attn_implementation = "eager"
    model = kind.auto_class.from_config(kind.config).float().eval()
    for parameter in model.parameters():  # wider than any initialisation, so that all layers count
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.requires_grad_(False), kind.inputs()


def by_autograd(model: Any, targets: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """(out × in), in float64."""
    modules = {t.path: model.get_submodule(t.path) for t in targets}
    weights = [module.weight.requires_grad_(True) for module in modules.values()]
    gradients = torch.autograd.grad(loss_sum(model, inputs) / ROWS, weights)
    model.requires_grad_(False)
    return {
        path: (g.T if is_transposed(module) else g).double()
        for (path, module), g in zip(modules.items(), gradients, strict=True)
    }


def rows_of(inputs: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    return {key: value[begin:end] for key, value in inputs.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model_is_measured_as_by_autograd(name: str, checkpointing: bool) -> None:
    kind = KINDS[name]
    model, inputs = build(kind)
    targets, caches = (
        find_targets(model, kind.names),
        model.config.use_cache if hasattr(model.config, "use_cache") else None,
    )
    assert len({t.module_type for t in targets}) == kind.types
    expected = by_autograd(model, targets, inputs)
    parts = fused_parts(model, targets)
    together = [Round((0, 1), (Microbatch(inputs, (2, 4)),))]
    # rows of a contrastive model depend on each other: only one batch has its loss
    cut = [
        Round((0,), (Microbatch(rows_of(inputs, 0, 2), (2,)),)),
        Round((1,), tuple(Microbatch(rows_of(inputs, b, b + 2), (2,)) for b in (2, 4))),
    ]
    for rounds in (together,) if name == "two towers" else (together, cut):
        found = measure_gradients(
            model,
            targets,
            rounds,
            loss_sum,
            (2, 4),
            (2, 4),
            Probing(parts=parts, checkpointing=checkpointing),
        )
        assert found.method == ("blocks" if rounds is together else "accumulators")
        for entry in found.layers:
            gradient = expected[entry.target.path]
            assert entry.moments.std == pytest.approx(
                gradient.std(correction=0).item(), rel=1e-5
            ), entry.target.path
            for part, rows in parts.get(entry.target.path, {}).items():
                of_rows = gradient[list(rows)].std(correction=0).item()
                assert entry.parts[part].std == pytest.approx(of_rows, rel=1e-5)
    assert getattr(model.config, "use_cache", None) == caches


def test_fused_kinds_have_parts_and_hybrid_ones_say_what_they_lack() -> None:
    for name, kind in KINDS.items():
        model, _ = build(kind)
        targets = find_targets(model, kind.names)
        assert bool(fused_parts(model, targets)) == ("fused" in name)
        assert bool(layers_without(model, targets)) == (name == "hybrid")


class Int8Linear(nn.Module):
    """y = (scale · q) x: as quantised layers are, no nn.Linear, its weight in a buffer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("quantised", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.quantised * self.scale, self.bias)


def test_quantised_layers_have_the_gradient_of_the_weight_they_stand_for() -> None:
    kind = KINDS["encoder"]
    model, inputs = build(kind)
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        attention.query = Int8Linear(attention.query)
    targets = find_targets(model, ("query",))
    rounds = [Round((0,), (Microbatch(inputs, (ROWS,)),))]
    found = measure_gradients(model, targets, rounds, loss_sum, (ROWS,), (ROWS,))

    for layer in model.bert.encoder.layer:  # the same weights, in layers autograd can see
        quantised = layer.attention.self.query
        plain = nn.Linear(quantised.in_features, quantised.out_features)
        plain.weight.data = quantised.quantised * quantised.scale
        plain.bias.data = quantised.bias
        layer.attention.self.query = plain.requires_grad_(False)
    expected = by_autograd(model, targets, inputs)
    assert len(found.layers) == 3
    for entry in found.layers:
        std = expected[entry.target.path].std(correction=0).item()
        assert entry.moments.std == pytest.approx(std, rel=1e-5)


def test_gpt2_without_a_token_for_padding_is_profiled_on_texts_of_unlike_length(
    tmp_path: Path,
) -> None:
    """As the real one is: its configuration names none, and its tokenizer has none."""
    config = GPT2Config(**{**TEXT, "vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1})
    config.pad_token_id = None
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer(eos_token=EOS).save_pretrained(tmp_path)
    base = load_base(ModelConfig(name=str(tmp_path)), AutoModelForSequenceClassification, 2, F32)
    assert base.processor.pad_token_id == base.model.config.pad_token_id == 1
    batch = base.processor(["good", "not good at all"], padding=True, return_tensors="pt")
    assert base.model(**batch).logits.shape == (2, 2)
