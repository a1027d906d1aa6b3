"""Every sharing system on kinds of models: counts, identity, gradients, and the way to disk."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from e2lora.adapters import (
    adapt,
    count_adapter_parameters,
    count_parameters,
    is_head,
    trainable_parameters,
)
from e2lora.adapters.storage import load_adapter, save_adapter
from e2lora.config import AdapterConfig, ModelConfig, PlanConfig
from e2lora.models import Base, load_base, reset_head, weights_fingerprint
from e2lora.moments import GradientProfile, LayerGradient, Moments, Provenance, Target
from e2lora.plan import SharingPlan, build_plan
from e2lora.targets import find_targets

R, ALPHA = 4, 12.0
SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 64,
    "initializer_range": 0.2,
}
BERT = ("query", "value")
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")  # grouped-query: two shapes
GPT2 = ("c_attn", "attn.c_proj")  # weights lie as (in x out)
TARGETS = {"bert": BERT, "llama": LLAMA, "gpt2": GPT2}
SHAPES = {  # (in, out) of each target of a layer
    "bert": [(32, 32)] * 2,
    "llama": [(32, 32), (32, 16), (32, 16), (32, 32)],
    "gpt2": [(32, 96), (32, 32)],
}

# name in reports → topology, block size, scope of A
SYSTEMS = {
    "LoRA": ("none", None, "interval"),
    "all-shared": ("all", None, "interval"),
    "blocks(2)": ("blocks", 2, "interval"),
    "blocks(3)": ("blocks", 3, "interval"),
    "ShareLoRA-A": ("none", None, "type"),
    "E²LoRA": ("e2", None, "interval"),
}
KINDS = tuple(TARGETS)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_system = pytest.mark.parametrize("system", SYSTEMS)


def make_base(kind: str, num_layers: int = 4, head_seed: int = 0) -> Base:
    """A tiny frozen base; the same trunk whatever the seed of its head."""
    torch.manual_seed(0)
    model: Any
    if kind == "bert":
        config = BertConfig(**SMALL, num_hidden_layers=num_layers, num_labels=3)
        model, head = BertForSequenceClassification(config), ("classifier",)
    elif kind == "gpt2":
        model, head = GPT2LMHeadModel(GPT2Config(**SMALL, num_hidden_layers=num_layers)), ()
    else:
        small = {**SMALL, "num_hidden_layers": num_layers, "num_key_value_heads": 2}
        model, head = LlamaForCausalLM(LlamaConfig(**small)), ()
    model.requires_grad_(False).eval()
    reset_head(model, head, head_seed)
    return Base(model, None, head, weights_fingerprint(model, skip=head))


def adapter_config(kind: str, a_scope: Any = "interval", **options: Any) -> AdapterConfig:
    return AdapterConfig(target_modules=TARGETS[kind], a_scope=a_scope, **options)


def profile_of(targets: Sequence[Target]) -> GradientProfile:
    """A made-up profile: the first two layers alike, the others larger and larger."""
    stds = [1.0, 1.1, 8.0, 64.0]
    layers = [
        LayerGradient(
            target=target,
            moments=Moments(
                count=target.in_features * target.out_features,
                mean=0.0,
                std=stds[min(target.layer, 3)],
                mean_abs=1.0,
            ),
        )
        for target in targets
    ]
    provenance = Provenance(
        model="made up",
        model_fingerprint="",
        task="none",
        num_samples=1,
        num_supervised=1,
        seed=0,
        dtype="float32",
        mean_loss=1.0,
        method="blocks",
        num_workers=1,
        versions={},
    )
    return GradientProfile(provenance=provenance, layers=tuple(layers))


def make_plan(base: Base, config: AdapterConfig, system: str, r: int = R) -> SharingPlan:
    topology, block_size, _ = SYSTEMS[system]
    targets = find_targets(base.model, config.target_modules)
    options = PlanConfig(
        topology=topology,  # type: ignore[arg-type]
        block_size=block_size,
        r=r,
        lora_alpha=ALPHA,
    )
    return build_plan(targets, options, profile_of(targets) if topology == "e2" else None)


class Adapted:
    """A tiny base with the adapters of a system, as a trial would make them."""

    def __init__(self, kind: str, system: str, **options: Any) -> None:
        self.base = make_base(kind)
        self.config = adapter_config(kind, SYSTEMS[system][2], **options)
        self.plan = make_plan(self.base, self.config, system)
        torch.manual_seed(1)
        self.model = adapt(self.base.model, self.plan, self.config, self.base.head)
        self.model.eval()

    def save(self, folder: Path) -> Path:
        save_adapter(folder, self.model, self.base, self.plan, self.config)
        return folder

    def save_plain(self, folder: Path) -> Path:
        """As PEFT itself saves it: every layer by itself."""
        self.model.save_pretrained(folder, save_embedding_layers=False)
        return folder


def fill(model: nn.Module, seed: int = 2) -> None:
    """Give every trainable tensor values of its own, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def output_of(model: Any) -> Tensor:
    ids = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(3))
    return model(input_ids=ids).logits


def loss_of(model: Any) -> Tensor:
    return output_of(model).float().log_softmax(-1)[..., 0].sum()


def lora_of(model: Any, path: str, name: str) -> nn.Parameter:
    """The tensor A or B of a target, in a model that PEFT adapted."""
    return getattr(model.get_base_model().get_submodule(path), f"lora_{name}")["default"].weight


def sharers(plan: SharingPlan, config: AdapterConfig, name: str) -> list[list[str]]:
    """Which targets are to share a tensor: taken from the groups alone."""
    paths = {(t.module_type, t.layer): t.path for t in plan.targets}
    if name == "A" and config.a_scope == "type":
        return [
            [path for (kind, _), path in paths.items() if kind == module_type]
            for module_type in {t.module_type: None for t in plan.targets}
        ]
    return [[paths[group.module_type, layer] for layer in group.layers] for group in plan.groups]


def require_tied(model: Any, plan: SharingPlan, config: AdapterConfig) -> None:
    for name in "AB":
        expected = sharers(plan, config, name)
        assert sorted(path for paths in expected for path in paths) == sorted(
            t.path for t in plan.targets
        )
        owners = []
        for paths in expected:
            first = lora_of(model, paths[0], name)
            assert all(lora_of(model, path, name) is first for path in paths)
            owners.append(first)
        assert len({id(owner) for owner in owners}) == len(owners), "groups share nothing"
        assert len({owner.data_ptr() for owner in owners}) == len(owners)


# ---- what is made -----------------------------------------------------------------------------


@every_kind
def test_made_up_e2_plan_has_unequal_groups_and_ranks(kind: str) -> None:
    """What the tests of E²LoRA below rely on."""
    adapted = Adapted(kind, "E²LoRA")
    groups = adapted.plan.groups_of(adapted.plan.module_types[0])
    assert [group.layers for group in groups] == [(0, 1), (2,), (3,)]
    ranks = [group.r for group in groups]
    assert ranks == sorted(ranks)
    assert ranks[0] < R < ranks[-1]


@every_kind
@every_system
def test_count_is_that_of_the_formula(kind: str, system: str) -> None:
    adapted = Adapted(kind, system)
    shapes = SHAPES[kind]
    s_in, s_out = (sum(shape[i] for shape in shapes) for i in (0, 1))
    ranks = {
        module_type: sum(group.r for group in adapted.plan.groups_of(module_type))
        for module_type in adapted.plan.module_types
    }
    expected = {
        "LoRA": R * 4 * (s_in + s_out),
        "all-shared": R * (s_in + s_out),
        "blocks(2)": 2 * R * (s_in + s_out),
        "blocks(3)": 2 * R * (s_in + s_out),
        "ShareLoRA-A": R * (s_in + 4 * s_out),
        "E²LoRA": sum(r * sum(shape) for r, shape in zip(ranks.values(), shapes, strict=True)),
    }[system]
    head = 3 * 32 + 3 if kind == "bert" else 0
    assert count_parameters(adapted.model) == (expected, head)
    assert count_adapter_parameters(adapted.plan, adapted.config) == expected
    optimised = {id(p): p.numel() for p in adapted.model.parameters() if p.requires_grad}
    assert sum(optimised.values()) == expected + head


@every_kind
@every_system
def test_untrained_adapter_changes_no_output(kind: str, system: str) -> None:
    expected = output_of(make_base(kind).model)
    adapted = Adapted(kind, system)
    assert torch.equal(output_of(adapted.model), expected)
    fill(adapted.model)
    assert not torch.allclose(output_of(adapted.model), expected)


@every_kind
@every_system
def test_tensors_are_shared_by_the_layers_of_a_group_and_by_no_others(
    kind: str, system: str
) -> None:
    adapted = Adapted(kind, system)
    require_tied(adapted.model, adapted.plan, adapted.config)


@every_kind
@every_system
def test_initial_tensors_depend_on_the_torch_seed_only(kind: str, system: str) -> None:
    first, again = (trainable_parameters(Adapted(kind, system).model) for _ in range(2))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@every_kind
@every_system
def test_every_trainable_tensor_gets_a_gradient_and_nothing_else_does(
    kind: str, system: str
) -> None:
    adapted = Adapted(kind, system)
    fill(adapted.model)
    loss_of(adapted.model).backward()
    for name, parameter in adapted.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
            assert "lora_" in name or is_head(name)
        else:
            assert parameter.grad is None, name


@every_kind
@every_system
def test_gradient_of_a_shared_tensor_is_the_sum_over_untied_copies(
    kind: str, system: str, tmp_path: Path
) -> None:
    """The reference is plain PEFT with the expanded weights, every layer with its own."""
    adapted = Adapted(kind, system)
    fill(adapted.model)
    plain = PeftModel.from_pretrained(
        make_base(kind).model, adapted.save_plain(tmp_path), is_trainable=True
    ).eval()
    for model in (adapted.model, plain):
        model.double()
        loss_of(model).backward()
    separate = [lora_of(plain, t.path, name) for t in adapted.plan.targets for name in "AB"]
    assert len({id(tensor) for tensor in separate}) == len(separate), "the reference is untied"
    for name in "AB":
        for paths in sharers(adapted.plan, adapted.config, name):
            expected = sum(lora_of(plain, path, name).grad for path in paths)
            tied = lora_of(adapted.model, paths[0], name).grad
            torch.testing.assert_close(tied, expected, rtol=1e-6, atol=1e-9)


@every_kind
@every_system
def test_scaling_is_alpha_over_r_whatever_the_rank(kind: str, system: str, tmp_path: Path) -> None:
    adapted = Adapted(kind, system)
    plain = PeftModel.from_pretrained(make_base(kind).model, adapted.save_plain(tmp_path))
    groups = adapted.plan.group_of_target()
    for model in (adapted.model, plain):
        for path, group in groups.items():
            layer = model.get_base_model().get_submodule(path)
            assert layer.r["default"] == group.r == lora_of(model, path, "A").shape[0]
            assert layer.scaling["default"] == pytest.approx(ALPHA / R, rel=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_lora_dropout_passes_through(dropout: float) -> None:
    adapted = Adapted("bert", "E²LoRA", lora_dropout=dropout)
    fill(adapted.model)
    evaluated = output_of(adapted.model)
    for name, module in adapted.model.named_modules():
        module.training = "lora_dropout" in name  # the base's own dropout shall not act
    for target in adapted.plan.targets:
        module = adapted.base.model.get_submodule(target.path).lora_dropout["default"]
        assert getattr(module, "p", 0.0) == dropout
    assert torch.equal(output_of(adapted.model), evaluated) == (dropout == 0.0)


def test_classifier_that_the_checkpoint_brought_is_not_trained_and_not_changed() -> None:
    """No fresh head: PEFT's own way with classifiers would train it all the same."""
    base, config = make_base("bert"), adapter_config("bert")
    whole = weights_fingerprint(base.model)
    model = adapt(base.model, make_plan(base, config, "LoRA"), config, head=())
    assert count_parameters(model)[1] == 0
    fill(model)
    model.unload()
    assert weights_fingerprint(base.model) == whole


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_adapting_tells_peft_how_weights_lie(kind: str, tmp_path: Path) -> None:
    """Else PEFT warns that it corrects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = Adapted(kind, "E²LoRA")
    assert adapted.model.peft_config["default"].fan_in_fan_out == (kind == "gpt2")


OTHER_KINDS = {
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4, vocab_size=64)
        ),
        ("q", "v", "wo"),
        {"input_ids": torch.arange(6)[None], "decoder_input_ids": torch.arange(5)[None]},
    ),
    "vit": (
        lambda: ViTModel(ViTConfig(**SMALL, num_hidden_layers=4, image_size=16, patch_size=8)),
        ("q_proj", "fc1", "fc2"),
        {"pixel_values": torch.ones(1, 3, 16, 16)},
    ),
    "clip": (
        lambda: CLIPModel(
            CLIPConfig(
                text_config={**SMALL, "num_hidden_layers": 4},
                vision_config={
                    **SMALL,
                    "hidden_size": 48,
                    "num_hidden_layers": 3,
                    "image_size": 16,
                    "patch_size": 8,
                },
            )
        ),
        ("q_proj", "out_proj"),
        {"input_ids": torch.arange(6)[None], "pixel_values": torch.ones(1, 3, 16, 16)},
    ),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
@every_system
def test_encoders_decoders_and_towers_are_each_shared_among_themselves(
    kind: str, system: str
) -> None:
    build, names, inputs = OTHER_KINDS[kind]
    torch.manual_seed(0)
    base = Base(build().requires_grad_(False).eval(), None, (), "")
    expected = base.model(**inputs)[0]
    config = AdapterConfig(target_modules=names, a_scope=SYSTEMS[system][2])
    plan = make_plan(base, config, system)
    adapted = adapt(base.model, plan, config).eval()
    assert count_parameters(adapted) == (count_adapter_parameters(plan, config), 0)
    require_tied(adapted, plan, config)
    assert torch.equal(adapted(**inputs)[0], expected)
    fill(adapted)
    assert not torch.allclose(adapted(**inputs)[0], expected)


# ---- the way to disk --------------------------------------------------------------------------


@every_kind
@every_system
def test_loaded_adapter_is_tied_again_and_goes_on_identically(
    kind: str, system: str, tmp_path: Path
) -> None:
    adapted = Adapted(kind, system)
    fill(adapted.model)
    loaded = load_adapter(make_base(kind, head_seed=5).model, adapted.save(tmp_path)).eval()
    require_tied(loaded, adapted.plan, adapted.config)
    assert count_parameters(loaded) == count_parameters(adapted.model)
    before = output_of(loaded)
    assert torch.equal(before, output_of(adapted.model))
    for model in (adapted.model, loaded):
        optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
        loss_of(model).backward()
        optimizer.step()
    after = output_of(loaded)
    assert torch.equal(after, output_of(adapted.model))
    assert not torch.allclose(after, before)
    require_tied(loaded, adapted.plan, adapted.config)


@every_kind
@every_system
def test_save_pretrained_gives_a_plain_peft_adapter_with_identical_outputs(
    kind: str, system: str, tmp_path: Path
) -> None:
    adapted = Adapted(kind, system)
    fill(adapted.model)
    plain = PeftModel.from_pretrained(
        make_base(kind, head_seed=5).model, adapted.save_plain(tmp_path)
    )
    assert torch.equal(output_of(plain.eval()), output_of(adapted.model))


def test_saving_again_replaces_what_was_there(tmp_path: Path) -> None:
    adapted = Adapted("bert", "E²LoRA")
    adapted.save(tmp_path)
    fill(adapted.model)
    adapted.save(tmp_path)
    loaded = load_adapter(make_base("bert").model, tmp_path).eval()
    assert torch.equal(output_of(loaded), output_of(adapted.model))


def test_other_base_weights_are_refused(tmp_path: Path) -> None:
    Adapted("bert", "E²LoRA").save(tmp_path)
    other = make_base("bert")
    next(other.model.parameters()).data[0, 0] += 1
    other = Base(other.model, None, other.head, weights_fingerprint(other.model, other.head))
    with pytest.raises(ValueError, match=rf"belongs to the base.*{other.fingerprint}.*Load that"):
        load_adapter(other.model, tmp_path)


@pytest.mark.parametrize("damage", ["lacks", "has"])
def test_damaged_folder_is_refused(tmp_path: Path, damage: str) -> None:
    Adapted("bert", "E²LoRA").save(tmp_path)
    file = tmp_path / "adapter.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    if damage == "lacks":
        del tensors[name]
    else:
        tensors[name.replace("layer.0", "layer.9")] = tensors[name].clone()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"fit the plan exactly.*layer.*damaged"):
        load_adapter(make_base("bert").model, tmp_path)


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("planned", "present", "message"),
    [
        (4, 3, r"only in the plan: \['bert\.encoder\.layer\.3.*only in the model: none"),
        (3, 4, r"only in the plan: none; only in the model: \['bert\.encoder\.layer\.3"),
    ],
)
def test_plan_of_another_model_is_refused_both_ways(
    planned: int, present: int, message: str
) -> None:
    config = adapter_config("bert")
    plan = make_plan(make_base("bert", planned), config, "LoRA")
    base = make_base("bert", present)
    with pytest.raises(ValueError, match=message):
        adapt(base.model, plan, config, base.head)
    assert weights_fingerprint(base.model, skip=base.head) == base.fingerprint


def test_plan_of_other_shapes_is_refused() -> None:
    config = adapter_config("llama")
    plan = make_plan(make_base("llama"), config, "LoRA")
    wide = LlamaConfig(**SMALL, num_hidden_layers=4, num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"only in the plan: \['model\.layers\.0\.self_attn\.k"):
        adapt(LlamaForCausalLM(wide), plan, config)


def test_plan_that_leaves_out_a_layer_is_refused() -> None:
    base, config = make_base("bert"), adapter_config("bert")
    plan = make_plan(base, config, "LoRA")
    short = plan.model_copy(update={"groups": plan.groups[1:]})
    with pytest.raises(ValueError, match=r"exactly once.*query', 0\)"):
        adapt(base.model, short, config, base.head)


def test_adapting_twice_is_refused() -> None:
    adapted = Adapted("bert", "LoRA")
    with pytest.raises(ValueError, match="'query' matches none"):
        adapt(adapted.base.model, adapted.plan, adapted.config, adapted.base.head)


# ---- the base afterwards ----------------------------------------------------------------------


def inventory(model: nn.Module) -> list[Any]:
    """All modules and parameters by name and kind, in order."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return [*modules, *((name, tuple(p.shape)) for name, p in model.named_parameters())]


@every_kind
def test_unload_gives_the_base_back_bit_for_bit_round_after_round(kind: str) -> None:
    base = make_base(kind)
    before = inventory(base.model)
    trunk = {
        name: p.clone()
        for name, p in base.model.named_parameters()
        if not name.startswith("classifier")
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for round_, system in enumerate(SYSTEMS):
            config = adapter_config(kind, SYSTEMS[system][2])
            plan = make_plan(base, config, system)
            adapted = adapt(base.model, plan, config, base.head)
            fill(adapted, seed=round_)
            loss_of(adapted).backward()
            adapted.unload()
            base.model.requires_grad_(False)
            assert inventory(base.model) == before
            assert weights_fingerprint(base.model, skip=base.head) == base.fingerprint
            after = dict(base.model.named_parameters())
            assert all(torch.equal(after[name], value) for name, value in trunk.items())
    assert not [str(w.message) for w in caught if "PEFT" in str(w.message)]


@every_kind
@every_system
def test_used_base_gives_the_numbers_of_a_fresh_one(kind: str, system: str) -> None:
    base = make_base(kind)
    other = adapter_config(kind)
    used = adapt(base.model, make_plan(base, other, "LoRA", r=2), other, base.head)
    fill(used)
    loss_of(used).backward()
    used.unload()
    base.model.requires_grad_(False)
    config = adapter_config(kind, SYSTEMS[system][2])
    outputs = []
    for candidate in (base, make_base(kind)):
        reset_head(candidate.model, candidate.head, seed=7)
        torch.manual_seed(7)
        plan = make_plan(candidate, config, system)
        model = adapt(candidate.model, plan, config, candidate.head).eval()
        optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
        for _ in range(2):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        outputs.append(output_of(model))
    assert torch.equal(*outputs)


# ---- a real model -----------------------------------------------------------------------------


def test_minilm_with_e2_goes_to_disk_and_back_and_into_plain_peft(tmp_path: Path) -> None:
    config = adapter_config("bert")
    base = load_base(
        ModelConfig(name="demo:minilm-l6"), AutoModelForSequenceClassification, 2, torch.float32
    )
    fresh, peft_base = copy.deepcopy(base), copy.deepcopy(base.model)
    expected = output_of(base.model)
    plan = make_plan(base, config, "E²LoRA", r=8)
    assert len({group.r for group in plan.groups}) > 1
    adapted = adapt(base.model, plan, config, base.head).eval()
    assert count_parameters(adapted) == (sum(g.r * 768 for g in plan.groups), 2 * 384 + 2)
    assert torch.equal(output_of(adapted), expected)
    require_tied(adapted, plan, config)
    fill(adapted)
    save_adapter(tmp_path, adapted, base, plan, config)
    reset_head(fresh.model, fresh.head, seed=5)
    loaded = load_adapter(fresh.model, tmp_path).eval()
    require_tied(loaded, plan, config)
    adapted.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    plain = PeftModel.from_pretrained(peft_base, tmp_path / "plain").eval()
    for model in (loaded, plain):
        assert torch.equal(output_of(model), output_of(adapted))
    adapted.unload()
    assert weights_fingerprint(base.model, skip=base.head) == base.fingerprint
