"""A model adapted by us is a PEFT model: what its users call works, and shared stays shared."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

import e2lora
from e2lora.adapters import count_adapter_parameters, trainable_parameters
from e2lora.config import LoriOptions
from e2lora.targets import find_targets
from e2lora.weights import weights_fingerprint
from tests.kinds import KINDS, Adapted, make_base, output_of

LORA_KIN = ("lora", "dora", "lora_fa", "lori")
IDS = KINDS["llama"].inputs["input_ids"]


def fill(model: Any, seed: int = 2, scale: float = 0.1) -> None:
    """Give what is trained values of its own, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def trained(kind: str = "llama", sharing: str = "E²", family: str = "lora", **options: Any) -> Any:
    adapted = Adapted(kind, sharing, family, **options)
    fill(adapted.model)
    return adapted


def with_second(adapted: Any, family: str = "lora", seed: int = 7) -> Any:
    """Another adapter, by another plan, on the PEFT model; it is the active one then."""
    other = Adapted(adapted.kind, "all", family)
    torch.manual_seed(1)
    model = e2lora.adapt(
        adapted.model, other.plan, other.config, adapted.base.head, adapter_name="b"
    )
    assert model is adapted.model
    fill(model, seed)
    return other


def weights_of(model: Any, path: str, slot: str, name: str = "default") -> Tensor:
    return getattr(model.get_base_model().get_submodule(path), f"lora_{slot}")[name].weight


# ---- one adapter ------------------------------------------------------------------------------


def test_parameters_are_counted_once_by_peft_too(capsys: pytest.CaptureFixture[str]) -> None:
    adapted = trained("bert")
    head = sum(p.numel() for p in make_base("bert").model.classifier.parameters())
    expected = count_adapter_parameters(adapted.plan, adapted.config)
    assert expected is not None
    assert adapted.model.get_nb_trainable_parameters()[0] == expected + head
    adapted.model.print_trainable_parameters()
    assert f"trainable params: {expected + head:,} " in capsys.readouterr().out
    assert isinstance(adapted.model, PeftModel)
    assert adapted.model.base_model.model is adapted.base.model


@pytest.mark.parametrize("family", LORA_KIN)
def test_base_shows_while_the_adapter_is_disabled(family: str) -> None:
    adapted = trained(family=family)
    expected, own = output_of(make_base("llama").model, "llama"), adapted.output()
    with adapted.model.disable_adapter():
        assert torch.equal(adapted.output(), expected)
    assert torch.equal(adapted.output(), own)
    assert not torch.allclose(own, expected, atol=1e-3)


@pytest.mark.parametrize("family", LORA_KIN)
def test_merging_and_unmerging_keeps_the_function(family: str) -> None:
    adapted = trained(family=family)
    own = adapted.output()
    adapted.model.merge_adapter()
    torch.testing.assert_close(adapted.output(), own, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"\['default'\] are merged .* `unmerge_adapter` first"):
        e2lora.save(adapted.model, Path("nowhere"))
    adapted.model.unmerge_adapter()
    torch.testing.assert_close(adapted.output(), own, rtol=1e-4, atol=1e-4)
    merged = adapted.model.merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "lora_" in name]
    torch.testing.assert_close(output_of(merged, "llama"), own, rtol=1e-4, atol=1e-4)


def test_generates_what_plain_peft_does(tmp_path: Path) -> None:
    adapted = trained()
    adapted.model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(make_base("llama").model, tmp_path).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens, expected = (
        model.generate(input_ids=IDS, **options) for model in (adapted.model, plain)
    )
    assert torch.equal(tokens, expected)
    assert tokens.shape[1] > IDS.shape[1]
    base = make_base("llama").model.generate(input_ids=IDS, **options)
    assert not torch.equal(base, tokens), "the adapter shows"


def test_shared_tensors_stay_shared_in_bf16() -> None:
    adapted = trained()
    names = list(trainable_parameters(adapted.model))
    adapted.model.to(torch.bfloat16)
    assert list(trainable_parameters(adapted.model)) == names
    assert {p.dtype for p in adapted.model.parameters()} == {torch.bfloat16}
    assert adapted.output().isfinite().all()


def test_checkpointed_activations_give_the_same_gradients() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = trained().model.train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in trainable_parameters(model).items()})
    torch.testing.assert_close(*gradients)
    assert all(grad.abs().sum() > 0 for grad in gradients[0].values())


def test_hugging_face_trainer_steps_each_shared_tensor_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against AdamW on the same two batches by hand."""
    from transformers import Trainer, TrainingArguments

    monkeypatch.delenv("LOCAL_RANK", raising=False)  # which asks for a group of processes
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS[:2]]
    adapted, reference = trained(), trained()
    before = {name: p.detach().clone() for name, p in trainable_parameters(adapted.model).items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=2,
    )
    trainer = Trainer(model=adapted.model, args=arguments, train_dataset=rows)
    trainer.train()
    optimised = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in optimised}) == len(optimised) == len(before)
    optimizer = torch.optim.AdamW(
        trainable_parameters(reference.model).values(), lr=1e-2, weight_decay=0.0
    )
    reference.model.train()
    for _ in range(2):
        reference.model(input_ids=IDS[:2], labels=IDS[:2]).loss.backward()
        parameters = trainable_parameters(reference.model).values()
        torch.nn.utils.clip_grad_norm_(list(parameters), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = trainable_parameters(adapted.model)
    assert after.keys() == before.keys(), "still shared"
    assert not any(torch.equal(after[name], value) for name, value in before.items())
    expected = trainable_parameters(reference.model)
    torch.testing.assert_close(dict(after), dict(expected), rtol=1e-4, atol=1e-5)
    saved = PeftModel.from_pretrained(make_base("llama").model, tmp_path / "checkpoint-2").eval()
    assert torch.equal(output_of(saved, "llama"), output_of(adapted.model.eval(), "llama"))


# ---- several adapters -------------------------------------------------------------------------


def test_targets_are_found_below_the_layers_of_peft() -> None:
    adapted = trained("gpt2")
    bare = make_base("gpt2").model
    for names in (("c_attn", "attn.c_proj"), ("c_fc",)):
        assert find_targets(adapted.model, names) == find_targets(bare, names)


def test_fingerprint_is_of_the_weights_below_the_layers_of_peft() -> None:
    for kind in ("bert", "gpt2", "t5"):
        adapted = trained(kind)
        with_second(adapted)
        head = adapted.base.head
        assert weights_fingerprint(adapted.model, skip=head) == adapted.base.fingerprint
        path = adapted.plan.targets[0].path
        layer = adapted.model.get_base_model().get_submodule(path)
        layer.get_base_layer().weight.data[0, 0] += 1
        assert weights_fingerprint(adapted.model, skip=head) != adapted.base.fingerprint


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize(
    "families", [("lora", "lora"), ("lora_fa", "lora"), ("dora", "lori"), ("bslora", "bslora")]
)
def test_each_of_two_adapters_is_what_it_is_alone(kind: str, families: tuple[str, str]) -> None:
    first, second = families
    adapted = trained(kind, "E²ShareLoRA" if first == "lora" else "E²", first)
    alone = adapted.output()
    other = with_second(adapted, second)
    fill(other.model, 7)
    for name, expected in (("b", other.output()), ("default", alone), ("b", other.output())):
        adapted.model.set_adapter(name)
        torch.testing.assert_close(adapted.output(), expected, rtol=1e-5, atol=1e-5)
        active = trainable_parameters(adapted.model)
        assert active
        assert all(f".{name}." in key for key in active), "only the active one is trained"
        plan, config = (other.plan, other.config) if name == "b" else (adapted.plan, adapted.config)
        head = [p.numel() for key, p in active.items() if ".modules_to_save." in key]
        total = adapted.model.get_nb_trainable_parameters()[0]
        assert total - sum(head) == count_adapter_parameters(plan, config)


def test_a_second_adapter_is_loaded_beside_the_first(tmp_path: Path) -> None:
    other = trained("bert", "blocks(3)")
    e2lora.save(other.model, tmp_path)
    adapted = trained("bert")
    alone = adapted.output()
    model = e2lora.load(adapted.model, tmp_path, adapter_name="b").eval()
    assert model is adapted.model
    assert model.active_adapter == "b"
    assert torch.equal(adapted.output(), other.output())
    for group in other.plan.groups:
        paths = [
            t.path
            for t in other.plan.targets
            if t.module_type == group.module_type and t.layer in group.layers
        ]
        shared = {id(weights_of(model, path, slot, "b")) for path in paths for slot in "AB"}
        assert len(shared) == 2
    model.set_adapter("default")
    assert torch.equal(adapted.output(), alone)


@pytest.mark.parametrize("active", ["default", "b"])
def test_each_is_saved_by_its_name_whichever_is_active(tmp_path: Path, active: str) -> None:
    adapted = trained("bert")
    e2lora.save(adapted.model, tmp_path / "alone")
    other = with_second(adapted)
    fill(other.model, 7)
    e2lora.save(other.model, tmp_path / "other alone")
    adapted.model.set_adapter(active)
    adapted.model.requires_grad_(False)  # as for inference
    for name, alone in (("default", "alone"), ("b", "other alone")):
        e2lora.save(adapted.model, tmp_path / name, name)
        for file in ("adapter.safetensors", "plan.json", "e2lora.json"):
            same = (tmp_path / name / file).read_bytes() == (tmp_path / alone / file).read_bytes()
            assert same, (name, file)


def test_name_that_occurs_in_the_models_own_names_does_no_harm(tmp_path: Path) -> None:
    adapted = trained("bert")
    e2lora.save(adapted.model, tmp_path)
    model = e2lora.load(make_base("bert").model, tmp_path, adapter_name="attention").eval()
    assert torch.equal(output_of(model, "bert"), adapted.output())
    e2lora.save(model, tmp_path / "again", "attention")
    again = e2lora.load(make_base("bert").model, tmp_path / "again").eval()
    assert torch.equal(output_of(again, "bert"), adapted.output())


def test_deleted_adapter_leaves_the_other_and_its_name_behind() -> None:
    adapted = trained()
    alone = adapted.output()
    with_second(adapted)
    adapted.model.delete_adapter("b")
    adapted.model.set_adapter("default")
    assert torch.equal(adapted.output(), alone)
    with pytest.raises(ValueError, match=r"'b' is none"):
        e2lora.save(adapted.model, Path("nowhere"), "b")
    with_second(adapted)


def test_plain_peft_loads_both_that_we_saved_together(tmp_path: Path) -> None:
    adapted = trained()
    alone = adapted.output()
    with_second(adapted)
    second = adapted.output()
    adapted.model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(make_base("llama").model, tmp_path).eval()
    plain.load_adapter(tmp_path / "b", "b")
    assert torch.equal(output_of(plain, "llama"), alone)
    plain.set_adapter("b")
    assert torch.equal(output_of(plain, "llama"), second)


def test_copies_hold_both_adapters_and_what_made_them(tmp_path: Path) -> None:
    adapted = trained()
    with_second(adapted)
    twin = copy.deepcopy(adapted.model)
    assert trainable_parameters(twin).keys() == trainable_parameters(adapted.model).keys()
    assert torch.equal(output_of(twin, "llama"), adapted.output())
    e2lora.save(twin, tmp_path, "default")


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_adapters_are_combined_by_peft_whatever_their_ranks(combination: str) -> None:
    """The other ways of PEFT want equal ranks, and say so."""
    adapted = trained()
    with_second(adapted)
    model = adapted.model
    options = {"svd_rank": 16} if combination == "svd" else {}  # above the sum of two ranks: exact
    model.add_weighted_adapter(
        ["default", "b"], [1.0, 0.5], "both", combination_type=combination, **options
    )
    for target in adapted.plan.targets:
        layer = model.get_base_model().get_submodule(target.path)
        expected = layer.get_delta_weight("default") + 0.5 * layer.get_delta_weight("b")
        torch.testing.assert_close(layer.get_delta_weight("both"), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"'both' is none.*`save_pretrained`"):
        e2lora.save(model, Path("nowhere"), "both")


# ---- refusals ---------------------------------------------------------------------------------


def test_name_that_is_taken_is_refused() -> None:
    adapted = trained()
    with pytest.raises(ValueError, match=r"'default' is taken\. Give another `adapter_name`"):
        e2lora.adapt(adapted.model, adapted.plan, adapted.config)


def test_model_inside_a_peft_model_is_refused() -> None:
    adapted = trained()
    with pytest.raises(ValueError, match="'q_proj' matches none"):
        e2lora.adapt(adapted.base.model, adapted.plan, adapted.config, adapter_name="b")


def test_another_method_of_peft_beside_is_refused_and_nothing_changes() -> None:
    adapted = trained()
    alone = adapted.output()
    other = Adapted("llama", "E²", "vera")
    with pytest.raises(ValueError, match=r"different peft types.*LORA.*VERA"):
        e2lora.adapt(adapted.model, other.plan, other.config, adapter_name="b")
    assert list(adapted.model.peft_config) == ["default"]
    assert torch.equal(adapted.output(), alone)


@pytest.mark.parametrize("first", ["lora", "pissa"])
def test_adapter_that_changes_the_base_stays_alone(first: str) -> None:
    options = [{}, {"init_lora_weights": "pissa"}]
    if first == "pissa":
        options.reverse()
    adapted, other = (Adapted("llama", "own", **option) for option in options)
    with pytest.raises(ValueError, match=r"LoRA \(pissa\) does\. Give it a model of its own"):
        e2lora.adapt(adapted.model, other.plan, other.config, adapter_name="b")


def test_folder_that_does_not_fit_leaves_the_other_adapter(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    e2lora.save(trained().model, tmp_path)
    file = tmp_path / "adapter.safetensors"
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file)
    adapted = trained()
    alone = adapted.output()
    with pytest.raises(ValueError, match="damaged"):
        e2lora.load(adapted.model, tmp_path, adapter_name="b")
    assert list(adapted.model.peft_config) == ["default"]
    adapted.model.set_adapter("default")
    assert torch.equal(adapted.output(), alone)


def test_adapter_that_peft_made_itself_is_left_to_peft() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_base("llama").model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"put in; 'default' is none"):
        e2lora.save(model, Path("nowhere"))


# ---- what would be something else, said -------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "what"),
    [
        ("lora_plus", {}, r"than LoRA\+: B is to learn 16 times as fast"),
        ("lori", {"lori": LoriOptions(mask_after=2)}, r"LoRI-S: B is to be masked after 2 steps"),
        ("adalora", {}, r"AdaLoRA: ranks are to be pruned"),
    ],
)
def test_family_that_lies_partly_in_our_loop_warns_in_another(
    family: str, options: dict[str, Any], what: str, tmp_path: Path
) -> None:
    made = Adapted("llama", "own", family, **options)
    base = make_base("llama")
    with pytest.warns(UserWarning, match=what):
        model = e2lora.adapt(base.model, made.plan, made.config)
    e2lora.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "another training loop")
        e2lora.load(make_base("llama").model, tmp_path)  # trained already, for all that is known


@pytest.mark.parametrize("family", ["lora", "lora_fa", "lori", "vera", "randlora", "dora"])
def test_family_that_is_whole_in_any_loop_does_not_warn(family: str) -> None:
    made = Adapted("llama", "own", family)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "another training loop")
        e2lora.adapt(make_base("llama").model, made.plan, made.config)


@pytest.mark.parametrize("head", [("classifierr",), "classifier"])
def test_head_that_is_no_module_is_refused(head: Any) -> None:
    made = Adapted("bert", "own", "lora")
    with pytest.raises(ValueError, match=r"module names of the model.*'bert', 'classifier'"):
        e2lora.adapt(make_base("bert").model, made.plan, made.config, head)


@pytest.mark.parametrize("name", ["", "a.b"])
def test_adapter_name_that_would_break_module_names_is_refused(name: str) -> None:
    made = Adapted("llama", "own", "lora")
    with pytest.raises(ValueError, match=rf"without a dot; got '{name}'"):
        e2lora.adapt(make_base("llama").model, made.plan, made.config, adapter_name=name)


def test_configuration_of_another_kind_is_refused() -> None:
    made = Adapted("llama", "own", "lora")
    peft_config: Any = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"a SharingPlan.*got a LoraConfig"):
        e2lora.adapt(make_base("llama").model, peft_config)
    with pytest.raises(ValueError, match=r"and an AdapterConfig; got a SharingPlan and a LoraC"):
        e2lora.adapt(make_base("llama").model, made.plan, peft_config)


def test_one_target_may_be_named_without_a_list_and_lists_are_taken() -> None:
    model = make_base("llama").model
    assert e2lora.find_targets(model, "q_proj") == e2lora.find_targets(model, ("q_proj",))
    assert e2lora.AdapterConfig(target_modules=["q_proj"]).target_modules == ("q_proj",)


def test_failing_adaptation_leaves_the_model_bare_and_its_weights_alone() -> None:
    base = make_base("llama")
    made = Adapted("llama", "own", "lora", init_lora_weights="pissa")
    with pytest.raises(ValueError, match=r"must be there to be taken again"):
        e2lora.adapt(base.model, made.plan, made.config, initial={})
    assert weights_fingerprint(base.model) == weights_fingerprint(make_base("llama").model)
    assert [name for name, _ in base.model.named_modules()] == [
        name for name, _ in make_base("llama").model.named_modules()
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Already found a `peft_config`")
        e2lora.adapt(base.model, made.plan, made.config)


def test_head_of_which_the_classifier_is_no_part_leaves_that_alone() -> None:
    """PEFT would train it."""
    made = Adapted("bert", "own", "lora")
    model = e2lora.adapt(make_base("bert").model, made.plan, made.config, ("bert.pooler.dense",))
    head = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert head
    assert all(".pooler.dense.modules_to_save." in name for name in head)


def test_module_that_is_adapted_cannot_be_trained_in_full_too() -> None:
    made = Adapted("llama", "own", "lora")
    path = made.plan.targets[0].path
    with pytest.raises(ValueError, match=rf"not both; \['{path}'\]"):
        e2lora.adapt(make_base("llama").model, made.plan, made.config, (path,))


def test_gradients_that_nothing_starts_from_are_refused() -> None:
    made = Adapted("llama", "own", "lora")
    with pytest.raises(ValueError, match="LoRA starts from no gradients"):
        e2lora.adapt(make_base("llama").model, made.plan, made.config, gradients={})
