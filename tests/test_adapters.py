"""What is LoRA's own, beside the contract of every family: scales, refusals, and real models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from e2lora.adapters import adapt, count_parameters
from e2lora.adapters.storage import load_adapter, save_adapter
from e2lora.config import AdapterConfig, ModelConfig
from e2lora.models import Base, load_base, reset_head
from e2lora.plan import SharingPlan
from e2lora.weights import weights_fingerprint
from tests.cases import SLICING, require_near, sharers
from tests.conftest import model_folder
from tests.kinds import (
    ALPHA,
    BERT,
    KINDS,
    LLAMA,
    SMALL,
    Adapted,
    R,
    fill,
    make_base,
    make_plan,
    output_of,
)


def adapter_config(kind: str, **options: Any) -> AdapterConfig:
    return AdapterConfig(target_modules=KINDS[kind].names, **options)


def plain_plan(base: Base, config: AdapterConfig) -> SharingPlan:
    return make_plan(base, config, {"topology": "none"})


# ---- what is made -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("sharing", ["own", "E²", "E²ShareLoRA"])
def test_scaling_is_alpha_over_r_whatever_the_rank(kind: str, sharing: str, tmp_path: Path) -> None:
    adapted = Adapted(kind, sharing)
    plain = PeftModel.from_pretrained(make_base(kind).model, adapted.save_plain(tmp_path))
    groups = adapted.plan.group_of_target()
    for model in (adapted.model, plain):
        for path, group in groups.items():
            layer = model.get_base_model().get_submodule(path)
            assert layer.r["default"] == group.r == layer.lora_A["default"].weight.shape[0]
            assert layer.scaling["default"] == pytest.approx(ALPHA / R, rel=1e-12)


def test_classifier_that_the_checkpoint_brought_is_not_trained_and_not_changed() -> None:
    """No fresh head: PEFT's own way with classifiers would train it all the same."""
    base, config = make_base("bert"), adapter_config("bert")
    whole = weights_fingerprint(base.model)
    model = adapt(base.model, plain_plan(base, config), config, head=())
    assert count_parameters(model)[1] == 0
    fill(model)
    model.unload()
    assert weights_fingerprint(base.model) == whole


def test_fresh_modules_inside_the_trunk_are_trained_in_full_too() -> None:
    """PEFT by itself thinks of the classifier alone."""
    base, config = make_base("bert"), adapter_config("bert")
    head = ("bert.pooler.dense", "classifier")
    model = adapt(base.model, plain_plan(base, config), config, head)
    assert count_parameters(model)[1] == (32 * 32 + 32) + (3 * 32 + 3)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_adapting_tells_peft_how_weights_lie(kind: str, tmp_path: Path) -> None:
    """Else PEFT warns that it corrects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = Adapted(kind)
    assert adapted.model.peft_config["default"].fan_in_fan_out == (kind == "gpt2")


# ---- the way to disk --------------------------------------------------------------------------


def test_saving_again_replaces_what_was_there(tmp_path: Path) -> None:
    adapted = Adapted("bert")
    adapted.save(tmp_path)
    fill(adapted.model)
    adapted.save(tmp_path)
    loaded = load_adapter(make_base("bert").model, tmp_path).eval()
    assert torch.equal(output_of(loaded, "bert"), adapted.output())


def test_other_base_weights_are_refused(tmp_path: Path) -> None:
    Adapted("bert").save(tmp_path)
    other = make_base("bert")
    next(other.model.parameters()).data[0, 0] += 1
    other = Base(other.model, None, other.head, weights_fingerprint(other.model, other.head))
    with pytest.raises(ValueError, match=rf"belongs to the base.*{other.fingerprint}.*Load that"):
        load_adapter(other.model, tmp_path)


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
    plan = plain_plan(make_base("bert", planned), config)
    base = make_base("bert", present)
    with pytest.raises(ValueError, match=message):
        adapt(base.model, plan, config, base.head)
    assert weights_fingerprint(base.model, skip=base.head) == base.fingerprint


def test_plan_of_other_shapes_is_refused() -> None:
    config = adapter_config("llama")
    plan = plain_plan(make_base("llama"), config)
    wide = LlamaConfig(**SMALL, num_hidden_layers=4, num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"only in the plan: \['model\.layers\.0\.self_attn\.k"):
        adapt(LlamaForCausalLM(wide), plan, config)


def test_plan_that_leaves_out_a_layer_is_refused() -> None:
    base, config = make_base("bert"), adapter_config("bert")
    plan = plain_plan(base, config)
    short = plan.model_copy(update={"groups": plan.groups[1:]})
    with pytest.raises(ValueError, match=r"exactly once.*query', 0\)"):
        adapt(base.model, short, config, base.head)


def test_adapting_twice_is_refused() -> None:
    adapted = Adapted("bert", "own")
    with pytest.raises(ValueError, match="'query' matches none"):
        adapt(adapted.base.model, adapted.plan, adapted.config, adapted.base.head)


# ---- real models ------------------------------------------------------------------------------

REAL = {
    "minilm-l6": (AutoModelForSequenceClassification, BERT),
    "mpnet-base": (AutoModelForSequenceClassification, ("q", "v")),
    "smollm2-135m": (AutoModelForCausalLM, LLAMA),
}


@pytest.mark.parametrize(
    "name",
    ["minilm-l6", *(pytest.param(name, marks=pytest.mark.long) for name in list(REAL)[1:])],
)
@pytest.mark.parametrize("a_scope", ["interval", "type"])
def test_real_model_is_adapted_saved_loaded_and_handed_to_plain_peft(
    name: str, a_scope: Any, tmp_path: Path
) -> None:
    auto_class, modules = REAL[name]
    folder = "demo:minilm-l6" if name == "minilm-l6" else model_folder(name)
    labels = 2 if auto_class is AutoModelForSequenceClassification else None
    base = load_base(ModelConfig(name=folder), auto_class, labels, torch.float32)
    expected = output_of(base.model, "llama")
    config = AdapterConfig(target_modules=modules, a_scope=a_scope)
    plan = make_plan(base, config, {"topology": "e2"}, r=8)
    assert len({group.r for group in plan.groups}) > 1
    adapted = adapt(base.model, plan, config, base.head).eval()
    assert torch.equal(output_of(adapted, "llama"), expected)
    tied = sharers(adapted, plan)
    num_a = len(plan.module_types if a_scope == "type" else plan.groups)
    assert len(tied) == num_a + len(plan.groups)
    fill(adapted)
    output = output_of(adapted, "llama")
    save_adapter(tmp_path / "compact", adapted, base, plan, config)
    adapted.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    assert give_back(adapted, base) == base.fingerprint
    loaded = load_adapter(base.model, tmp_path / "compact").eval()
    assert sharers(loaded, plan) == tied
    assert torch.equal(output_of(loaded, "llama"), output)
    assert give_back(loaded, base) == base.fingerprint
    plain = PeftModel.from_pretrained(base.model, tmp_path / "plain").eval()
    require_near(output_of(plain, "llama"), output, SLICING if a_scope == "type" else 0.0)


def give_back(adapted: Any, base: Base) -> str:
    """Take the adapter out, and start the head anew; what the base's weights are then."""
    adapted.unload()
    base.model.requires_grad_(False)
    reset_head(base.model, base.head, seed=5)
    return weights_fingerprint(base.model, skip=base.head)
