"""Tiny models of every kind from random configurations, and adapters on them by made-up plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    MPNetForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from e2lora.adapters import FAMILIES, adapt, trainable_parameters
from e2lora.adapters.storage import save_adapter
from e2lora.config import AdapterConfig, PlanConfig
from e2lora.models import Base, reset_head
from e2lora.moments import Target
from e2lora.plan import SharingPlan, build_plan
from e2lora.targets import find_targets
from e2lora.weights import weights_fingerprint
from tests.made_up import make_profile

R, ALPHA = 4, 12.0
SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 64,
    "initializer_range": 0.2,
}
SMALL_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "vocab_size": 64}
IMAGES = {"image_size": 16, "patch_size": 8}
VISION = {**SMALL, **IMAGES, "hidden_size": 48, "num_hidden_layers": 3}
BERT = ("query", "value")
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")


# ---- models -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of model: how a tiny one of so many layers is made, and what of it is adapted.

    ``types`` are the (layers, in, out) of its module types, written out by hand.
    """

    build: Callable[[int], Any]
    names: tuple[str, ...]
    types: Sequence[tuple[int, int, int]]
    inputs: Mapping[str, Tensor]
    head: tuple[str, ...] = ()


def _ids(length: int, seed: int = 3) -> Tensor:
    return torch.randint(2, 64, (3, length), generator=torch.Generator().manual_seed(seed))


def _pixels() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(4))


def _classifier(model: Any, config: Any, **options: Any) -> Callable[[int], Any]:
    return lambda n: model(config(**SMALL, **options, num_hidden_layers=n, num_labels=3))


KINDS = {
    "llama": Kind(  # grouped-query attention: two shapes
        lambda n: LlamaForCausalLM(
            LlamaConfig(**SMALL, num_hidden_layers=n, num_key_value_heads=2)
        ),
        LLAMA,
        [(4, 32, 32), (4, 32, 16), (4, 32, 16), (4, 32, 32)],
        {"input_ids": _ids(7)},
    ),
    "bert": Kind(
        _classifier(BertForSequenceClassification, BertConfig),
        BERT,
        [(4, 32, 32)] * 2,
        {"input_ids": _ids(7)},
        ("classifier",),
    ),
    "roberta": Kind(
        _classifier(RobertaForSequenceClassification, RobertaConfig),
        ("key", "intermediate.dense"),
        [(4, 32, 32), (4, 32, 64)],
        {"input_ids": _ids(6)},
        ("classifier",),
    ),
    "mpnet": Kind(
        _classifier(MPNetForSequenceClassification, MPNetConfig),
        ("q", "o"),
        [(4, 32, 32)] * 2,
        {"input_ids": _ids(6)},
        ("classifier",),
    ),
    "gpt2": Kind(  # Conv1D: weights lie as (in × out)
        lambda n: GPT2LMHeadModel(GPT2Config(**SMALL, num_hidden_layers=n)),
        ("c_attn", "attn.c_proj"),
        [(4, 32, 96), (4, 32, 32)],
        {"input_ids": _ids(7)},
    ),
    "t5": Kind(  # self-attention and feed-forward of the encoder; the decoder's; cross-attention
        lambda n: T5ForConditionalGeneration(
            T5Config(**SMALL_T5, num_layers=n, num_decoder_layers=3)
        ),
        ("q", "wo"),
        [(4, 32, 32), (4, 64, 32), (3, 32, 32), (3, 32, 32), (3, 64, 32)],
        {"input_ids": _ids(6), "decoder_input_ids": _ids(5)},
    ),
    "vit": Kind(
        _classifier(ViTForImageClassification, ViTConfig, **IMAGES),
        ("q_proj", "fc2"),
        [(4, 32, 32), (4, 64, 32)],
        {"pixel_values": _pixels()},
        ("classifier",),
    ),
    "clip": Kind(  # two towers of different width and depth
        lambda n: CLIPModel(
            CLIPConfig(text_config={**SMALL, "num_hidden_layers": n}, vision_config=VISION)
        ),
        ("v_proj", "fc1"),
        [(4, 32, 32), (4, 32, 64), (3, 48, 48), (3, 48, 64)],
        {"input_ids": _ids(6), "pixel_values": _pixels()},
    ),
}


def make_base(kind: str, num_layers: int = 4, head_seed: int = 0) -> Base:
    """A tiny frozen base; the same trunk whatever the seed of its head."""
    torch.manual_seed(0)
    model = KINDS[kind].build(num_layers).requires_grad_(False).eval()
    head = KINDS[kind].head
    reset_head(model, head, head_seed)
    return Base(model, None, head, weights_fingerprint(model, skip=head))


def output_of(model: Any, kind: str) -> Tensor:
    return model(**KINDS[kind].inputs)[0]


def loss_of(model: Any, kind: str) -> Tensor:
    return output_of(model, kind).float().log_softmax(-1)[..., 0].sum()


# ---- systems ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharing:
    """Which layers share: a plan's options, and the scopes of A and B."""

    plan: Mapping[str, Any]
    scopes: Mapping[str, str] = field(default_factory=dict)


_A, _B = {"a_scope": "type"}, {"b_scope": "type"}
SHARINGS = {
    "own": Sharing({"topology": "none"}),
    "all": Sharing({"topology": "all"}),
    "blocks(3)": Sharing({"topology": "blocks", "block_size": 3}),
    "strided(2)": Sharing({"topology": "strided", "stride": 2}),
    "LSS only": Sharing({"topology": "e2", "allocation": "uniform"}),
    "E²": Sharing({"topology": "e2"}),
    "ShareLoRA-A": Sharing({"topology": "none"}, _A),
    "ShareLoRA-B": Sharing({"topology": "none"}, _B),
    "ShareLoRA-AB": Sharing({"topology": "none"}, {**_A, **_B}),
    "E²ShareLoRA": Sharing({"topology": "e2"}, _A),
    "E² + shared B": Sharing({"topology": "e2"}, _B),
    "E² + shared AB": Sharing({"topology": "e2"}, {**_A, **_B}),
    "E² + own A": Sharing({"topology": "e2"}, {"a_scope": "layer"}),
    "E² + own B": Sharing({"topology": "e2"}, {"b_scope": "layer"}),
}


def make_plan(
    base: Base, config: AdapterConfig, options: Mapping[str, Any], r: int = R, alpha: float = ALPHA
) -> SharingPlan:
    """By a made-up profile: the first two layers alike and the others larger and larger.

    In every second module type it is the other way round: the last two are alike, and the first is
    the largest.
    """
    targets = find_targets(base.model, config.target_modules)
    plan = PlanConfig(**options, r=r, lora_alpha=alpha)
    return build_plan(targets, plan, made_up_profile(targets) if plan.needs_profile else None)


def made_up_profile(targets: Sequence[Target]) -> Any:
    types: dict[str, list[int]] = {}
    for target in targets:
        types.setdefault(target.module_type, []).append(target.layer)
    stds = []
    for target in targets:
        layers = sorted(types[target.module_type])
        place = layers.index(target.layer)
        if list(types).index(target.module_type) % 2:
            place = len(layers) - 1 - place
        stds.append(1.1**place if place < 2 else 4.0 ** (place - 1))
    return make_profile(targets, stds)


class Adapted:
    """A tiny base with the adapters of a system, as a trial would make them."""

    def __init__(
        self,
        kind: str,
        sharing: str = "E²",
        family: str = "lora",
        base: Base | None = None,
        torch_seed: int = 1,
        **options: Any,
    ) -> None:
        self.kind = kind
        self.base = base or make_base(kind)
        self.config = AdapterConfig(
            family=family,  # type: ignore[arg-type]
            target_modules=() if family == "full" else KINDS[kind].names,
            **SHARINGS[sharing].scopes,  # type: ignore[arg-type]
            **options,
        )
        self.plan = make_plan(self.base, self.config, SHARINGS[sharing].plan)
        gradients = made_up_gradients(self.plan) if FAMILIES[family].needs_gradients else None
        torch.manual_seed(torch_seed)
        self.model = adapt(
            self.base.model,
            self.plan,
            self.config,
            self.base.head,
            gradients=gradients,
            in_loop=True,
        )
        self.model.eval()

    def output(self) -> Tensor:
        return output_of(self.model, self.kind)

    def save(self, folder: Path) -> Path:
        save_adapter(folder, self.model, self.base, self.plan, self.config)
        return folder

    def save_plain(self, folder: Path) -> Path:
        """As PEFT itself saves it: every layer by itself."""
        self.model.save_pretrained(folder, save_embedding_layers=False)
        return folder


def made_up_gradients(plan: SharingPlan) -> dict[str, Tensor]:
    """∂loss/∂W (out × in) of each target: one for all of a group."""
    generator = torch.Generator().manual_seed(5)
    shapes = {t.module_type: (t.out_features, t.in_features) for t in plan.targets}
    of_group = {g: torch.randn(shapes[g.module_type], generator=generator) for g in plan.groups}
    return {path: of_group[group] for path, group in plan.group_of_target().items()}


def fill(model: nn.Module, seed: int = 2) -> None:
    """Give every trainable tensor values of its own, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
