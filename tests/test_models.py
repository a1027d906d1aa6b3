"""Counts are the published ones, loading fails clearly, and a head is known and reset."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    CLIPVisionConfig,
    LlamaConfig,
    RobertaConfig,
)

from e2lora.adapters import adapt, count_adapter_parameters, count_parameters
from e2lora.assets import resolve
from e2lora.attention import choose_attention, class_to_build
from e2lora.config import AdapterConfig, ModelConfig, PlanConfig
from e2lora.models import (
    in_float32,
    load_base,
    load_structure,
    load_tokenizer,
    require_weights,
    reset_head,
)
from e2lora.plan import build_plan
from e2lora.targets import find_targets
from e2lora.weights import weights_fingerprint
from tests.conftest import model_folder

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TINY_BERT = BertConfig(**SMALL, vocab_size=64)
TINY_LLAMA = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=64)
LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14336,
    vocab_size=128256,
)
CLIP_B16 = CLIPVisionConfig(patch_size=16)
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_OF_CLIP = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def on_meta(auto_class: Any, config: Any) -> Any:
    with torch.device("meta"):
        return auto_class.from_config(config)


# ---- exact counts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auto_class", "config", "names", "r", "a_scope", "published"),
    [
        (AutoModel, RobertaConfig(), ("query", "value"), 8, "interval", 294_912),
        (AutoModel, RobertaConfig(), ("query", "value"), 8, "type", 159_744),
        (AutoModelForCausalLM, LLAMA_8B, QKVO, 8, "interval", 6_815_744),
        (AutoModelForCausalLM, LLAMA_8B, QKVO, 8, "type", 2_752_512),
        (AutoModelForCausalLM, LLAMA_8B, QKVO, 4, "interval", 3_407_872),
        (AutoModel, CLIP_B16, ALL_OF_CLIP, 8, "interval", 1_327_104),
        (AutoModel, CLIP_B16, ALL_OF_CLIP, 8, "type", 718_848),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_published_count_is_met_by_formula_and_by_adapted_model(
    auto_class: Any, config: Any, names: tuple[str, ...], r: int, a_scope: Any, published: int
) -> None:
    model = on_meta(auto_class, config)
    plan = build_plan(find_targets(model, names), PlanConfig(r=r))
    adapter = AdapterConfig(target_modules=names, a_scope=a_scope)
    assert count_adapter_parameters(plan, adapter) == published
    assert count_parameters(adapt(model, plan, adapter)) == (published, 0)


def test_mpnet_base_has_the_targets_of_roberta_base() -> None:
    config = ModelConfig(name=model_folder("mpnet-base"))
    model = load_structure(config, AutoModelForSequenceClassification, 2)
    plan = build_plan(find_targets(model, ("q", "v")), PlanConfig(r=8))
    assert count_adapter_parameters(plan, AdapterConfig(target_modules=("q", "v"))) == 294_912


# ---- loading ----------------------------------------------------------------------------------


def save_tiny(folder: Path, build: Callable[..., Any] = AutoModel.from_config) -> Path:
    """A tiny BERT checkpoint that holds a trunk and no classifier."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("demo:minilm-l6"))
    torch.manual_seed(0)
    build(BertConfig(**SMALL, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def load_tiny(folder: Path, **overrides: Any) -> Any:
    config = ModelConfig(name=str(folder), config_overrides=overrides)
    return load_base(config, AutoModelForSequenceClassification, 5, torch.float32)


def test_loaded_base_is_frozen_and_in_evaluation_mode(tiny: Path) -> None:
    base = load_tiny(tiny)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert base.model.classifier.out_features == 5


def test_head_is_what_the_checkpoint_did_not_hold(tiny: Path, tmp_path: Path) -> None:
    assert load_tiny(tiny).head == ("classifier",)
    from_masked = save_tiny(tmp_path, lambda c: AutoModel.from_config(c, add_pooling_layer=False))
    assert load_tiny(from_masked).head == ("bert.pooler.dense", "classifier")


def test_structure_has_the_targets_of_the_loaded_model(tiny: Path) -> None:
    config = ModelConfig(name=str(tiny))
    structure = load_structure(config, AutoModelForSequenceClassification, 5)
    assert {p.device.type for p in structure.parameters()} == {"meta"}
    names = ("query", "dense")
    assert find_targets(structure, names) == find_targets(load_tiny(tiny).model, names)


@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("load", [load_base, load_structure])
def test_folder_that_lacks_a_file_is_refused(
    tmp_path: Path, lacking: str, load: Callable[..., Any]
) -> None:
    for name in {"config.json", "model.safetensors"} - {lacking}:
        (tmp_path / name).write_text("{}")
    named = "config.json" if lacking == "config.json" else "weights"
    options = (torch.float32,) if load is load_base else ()
    with pytest.raises(FileNotFoundError, match=f"lacks {named}.*save_pretrained"):
        load(ModelConfig(name=str(tmp_path)), AutoModel, 2, *options)


def test_empty_folder_is_told_both_things_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lacks config\.json and weights"):
        require_weights(ModelConfig(name=str(tmp_path)))


def test_config_override_is_applied(tiny: Path) -> None:
    assert load_tiny(tiny, hidden_dropout_prob=0.0).model.config.hidden_dropout_prob == 0.0


def test_unknown_config_override_is_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match="BertConfig has; it has no 'hidden_droput_prob'"):
        load_tiny(tiny, hidden_droput_prob=0.0)


@pytest.mark.parametrize("name", ["absent-model-name", "absent-organisation/absent", "a/b/c"])
def test_hub_name_that_cannot_be_reached_is_a_clear_error_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read at import
    started = time.monotonic()
    with pytest.raises(OSError, match=f"got '{name}'.*name a local folder"):
        load_base(ModelConfig(name=name), AutoModel, 2, torch.float32)
    assert time.monotonic() - started < 30, "a hub that is not there must not be waited for"


@pytest.mark.parametrize("name", ["./absent", "../absent/model", "~/absent-model"])
def test_relative_path_that_is_not_there_is_not_taken_for_a_hub_name(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"got '{name}'.*Correct the path"):
        load_structure(ModelConfig(name=name), AutoModel, 2)


# ---- attention --------------------------------------------------------------------------------

GPU = torch.device("cuda")
CLASSES = {
    "bert": (AutoModelForSequenceClassification, TINY_BERT),
    "llama": (AutoModelForCausalLM, TINY_LLAMA),
    "clip": (AutoModel, CLIPVisionConfig()),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_class_is_known_before_it_is_built(kind: str) -> None:
    auto_class, config = CLASSES[kind]
    assert class_to_build(auto_class, config) is type(on_meta(auto_class, config))
    assert class_to_build(AutoModelForCausalLM, CLIPVisionConfig()) is None


class Supporting:
    _supports_sdpa = _supports_flash_attn = True


class Old:
    _supports_sdpa = _supports_flash_attn = False


@pytest.mark.parametrize(
    ("model_class", "device", "dtype", "installed", "fastest"),
    [
        (Supporting, GPU, torch.bfloat16, True, "flash_attention_2"),
        (Supporting, GPU, torch.float16, True, "flash_attention_2"),
        (Supporting, GPU, torch.float32, True, "sdpa"),
        (Supporting, GPU, torch.bfloat16, False, "sdpa"),
        (Supporting, torch.device("cpu"), torch.bfloat16, True, "sdpa"),
        (Old, GPU, torch.bfloat16, True, "eager"),
    ],
)
def test_fastest_attention_is_chosen_that_all_allow(
    model_class: Any,
    device: torch.device,
    dtype: torch.dtype,
    installed: bool,
    fastest: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: installed)
    assert choose_attention(None, model_class, device, dtype) == fastest
    assert choose_attention("eager", model_class, device, dtype) == "eager"


@pytest.mark.parametrize("wanted", [None, "sdpa", "eager"])
def test_loaded_model_says_which_attention_it_has(tiny: Path, wanted: str | None) -> None:
    config = ModelConfig(name=str(tiny), attn_implementation=wanted)
    base = load_base(config, AutoModelForSequenceClassification, 5, torch.float32)
    assert base.model.config._attn_implementation == (wanted or "sdpa")


@pytest.mark.parametrize("wanted", ["flash_attention_2", "flash_attention_9", "sdpa_fast"])
def test_attention_that_is_not_to_be_had_is_refused_before_weights_are_read(
    tiny: Path, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", read)
    config = ModelConfig(name=str(tiny), attn_implementation=wanted)
    with pytest.raises(
        ValueError,
        match=f"got '{wanted}', and for Bert.* on cpu in float32 there is sdpa, eager",
    ):
        load_base(config, AutoModelForSequenceClassification, 5, torch.float32)


def test_float32_is_not_computed_by_flash_attention(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profile is measured in float32, whatever a model trains in."""
    config = ModelConfig(name=str(tiny))
    model = load_base(config, AutoModelForSequenceClassification, 5, torch.bfloat16).model
    set_to: list[str] = []

    def remember(name: str) -> None:
        set_to.append(name)
        model.config._attn_implementation = name

    monkeypatch.setattr(model, "set_attn_implementation", remember)
    model.config._attn_implementation = "flash_attention_2"
    with in_float32(model):
        assert model.config._attn_implementation == "sdpa"
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert set_to == ["sdpa", "flash_attention_2"]


# ---- the head and the fingerprint -------------------------------------------------------------

HEADS = {
    "bert": (TINY_BERT, ("bert.pooler.dense", "classifier")),
    "roberta": (RobertaConfig(**SMALL, vocab_size=64), ("classifier",)),
    "llama": (TINY_LLAMA, ("score",)),
}


def classifier_of(kind: str) -> tuple[Any, Sequence[str]]:
    config, head = HEADS[kind]
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config), head


def head_of(model: nn.Module, head: Sequence[str]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name in head
        for key, value in model.get_submodule(name).state_dict().items()
    }


@pytest.mark.parametrize("kind", HEADS)
def test_reset_head_depends_on_the_seed_and_on_nothing_that_was_there(kind: str) -> None:
    model, head = classifier_of(kind)
    trunk = weights_fingerprint(model, skip=head)
    reset_head(model, head, seed=3)
    first = head_of(model, head)
    with torch.no_grad():
        for name in head:
            for parameter in model.get_submodule(name).parameters():
                parameter.fill_(7.0)
    torch.manual_seed(99)
    torch.rand(5)
    reset_head(model, head, seed=3)
    again = head_of(model, head)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any((value == 7.0).any() for value in again.values())
    reset_head(model, head, seed=4)
    other = head_of(model, head)
    assert not any(
        torch.equal(first[name], other[name]) for name in first if name.endswith("weight")
    )
    assert weights_fingerprint(model, skip=head) == trunk


def test_reset_head_has_the_distribution_of_transformers() -> None:
    config = BertConfig(**SMALL, vocab_size=64, initializer_range=0.5)
    model = AutoModelForSequenceClassification.from_config(config)
    reset_head(model, ["bert.pooler.dense", "classifier"], seed=0)
    assert model.bert.pooler.dense.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert model.classifier.bias.abs().sum() == 0


def test_fingerprint_is_the_same_for_equal_weights_whatever_the_head() -> None:
    model, head = classifier_of("bert")
    twin, _ = classifier_of("bert")
    reset_head(twin, head, seed=9)
    assert weights_fingerprint(model, skip=head) == weights_fingerprint(twin, skip=head)
    assert weights_fingerprint(model) != weights_fingerprint(twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_shows_the_smallest_change_of_any_weight(dtype: torch.dtype) -> None:
    model, head = classifier_of("bert")
    model.to(dtype)
    before = weights_fingerprint(model, skip=head)
    for name, parameter in model.named_parameters():
        if name.startswith(head):
            continue
        flat = parameter.data.view(-1)
        kept = flat[-1].clone()
        flat[-1] = torch.nextafter(kept, torch.full_like(kept, float("inf")))
        assert weights_fingerprint(model, skip=head) != before, name
        flat[-1] = kept
    assert weights_fingerprint(model, skip=head) == before


def test_folder_without_a_tokenizers_files_is_refused(tmp_path: Path) -> None:
    """transformers makes one of five tokens, to which every word is unknown."""
    source = Path(resolve("demo:minilm-l6"))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(source / name)
    config = ModelConfig(name=str(tmp_path))
    with pytest.raises(ValueError, match=r"has 5, the model 30522\. Put the tokenizer's files"):
        load_tokenizer(config)
    with pytest.raises(ValueError, match="tokenizer"):
        load_base(config, AutoModelForSequenceClassification, 2, torch.float32)


def test_model_of_another_kind_is_refused_in_one_paragraph() -> None:
    from transformers import AutoModelForImageClassification

    config = ModelConfig(name="demo:minilm-l6")
    for load in (load_structure, lambda *given: load_base(*given, torch.float32)):
        with pytest.raises(ValueError, match="needs a model of its kind") as refused:
            load(config, AutoModelForImageClassification, 2)
        assert len(str(refused.value)) < 250


def test_fingerprint_shows_weights_that_changed_places() -> None:
    linear = torch.nn.Linear(6, 6, bias=False)
    before = weights_fingerprint(linear)
    kept = linear.weight.data.clone()
    for moved in (kept.T, kept.flip(0), kept.roll(1, 0), -kept.T):
        linear.weight.data = moved.contiguous()
        assert weights_fingerprint(linear) != before
    linear.weight.data = kept
    assert weights_fingerprint(linear) == before


def test_fingerprint_shows_quantised_weights_which_lie_in_buffers() -> None:
    module = torch.nn.Module()
    module.register_buffer("packed", torch.arange(8, dtype=torch.int32))
    module.register_buffer("scratch", torch.zeros(2), persistent=False)
    before = weights_fingerprint(module)
    module.scratch += 1
    assert weights_fingerprint(module) == before
    module.packed[3] += 1
    assert weights_fingerprint(module) != before


def test_fingerprint_skips_whole_modules_only() -> None:
    model, _ = classifier_of("bert")
    assert weights_fingerprint(model, skip=["classif"]) == weights_fingerprint(model)


def test_fingerprint_shows_a_changed_dtype() -> None:
    model, _ = classifier_of("bert")
    assert weights_fingerprint(model) != weights_fingerprint(model.to(torch.bfloat16))
