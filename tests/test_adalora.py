"""AdaLoRA under sharing: scale, budget, regularisation, and what is stored. See test_hooks.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora.layer import RankAllocator
from safetensors.torch import load_file
from torch import Tensor

from e2lora.adapters import (
    FAMILIES,
    adapt,
    count_adapter_parameters,
    count_parameters,
    require_possible_trial,
    trainable_parameters,
)
from e2lora.adapters.adalora import AdaLora, kept_ranks, set_kept_ranks
from e2lora.adapters.storage import load_adapter
from e2lora.config import AdapterConfig, PlanConfig, TrialConfig
from e2lora.plan import build_plan
from e2lora.targets import find_targets
from tests.kinds import ALPHA, KINDS, Adapted, R, fill, make_base, output_of
from tests.small import small_trial
from tests.test_train import with_training

INIT_R = 6  # 1.5 R
TRIPLET = ("lora_A", "lora_E", "lora_B")
every_kind = pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
headless = pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])


def layers_of(adapted: Adapted) -> dict[str, Any]:
    inner = adapted.model.get_base_model()
    return {t.path: inner.get_submodule(t.path) for t in adapted.plan.targets}


def filled(kind: str, sharing: str = "LSS only", **options: Any) -> Adapted:
    adapted = Adapted(kind, sharing, "adalora", **options)
    fill(adapted.model)
    return adapted


def pruned(kind: str) -> Adapted:
    """As after training: about half of all ranks are zero, and all of the first group's."""
    adapted = filled(kind)
    generator, kept = torch.Generator().manual_seed(7), {}
    for name, e in adapted.model.base_model.model.named_parameters():
        if ".lora_E." in name:
            ranks = torch.rand(len(e), generator=generator) < (0.5 if kept else 0.0)
            e.data[~ranks] = 0.0
            kept[name.removesuffix(".lora_E.default")] = ranks
    set_kept_ranks(adapted.model, "default", kept)
    return adapted


@every_kind
def test_count_is_that_of_the_initial_ranks(kind: str) -> None:
    adapted = Adapted(kind, "all", "adalora")
    expected = sum(INIT_R * (n_in + n_out + 1) for _, n_in, n_out in KINDS[kind].types)
    assert count_parameters(adapted.model)[0] == expected
    assert count_adapter_parameters(adapted.plan, adapted.config) == expected


@every_kind
def test_untrained_it_is_the_base_exactly(kind: str) -> None:
    assert torch.equal(
        Adapted(kind, "LSS only", "adalora").output(), output_of(make_base(kind).model, kind)
    )


@headless
@pytest.mark.parametrize("init_ratio", [1.5, 2.0])
def test_scale_is_that_of_lora_whatever_the_initial_rank(kind: str, init_ratio: float) -> None:
    """Added by hand to the base's weights, at α/r."""
    adapted = filled(kind, adalora={"init_ratio": init_ratio})
    base = make_base(kind)
    for path, layer in layers_of(adapted).items():
        a, e, b = (getattr(layer, slot)["default"] for slot in TRIPLET)
        assert len(e) == round(init_ratio * R)
        delta = ALPHA / R * (b @ torch.diag(e.flatten()) @ a)
        weight = base.model.get_submodule(path).weight
        weight.data += delta.T if kind == "gpt2" else delta
    torch.testing.assert_close(adapted.output(), output_of(base.model, kind), rtol=1e-4, atol=1e-4)


def test_scale_under_rslora_divides_by_the_root_of_the_rank() -> None:
    base = make_base("llama")
    config = AdapterConfig(family="adalora", target_modules=("q_proj",))
    options = PlanConfig(topology="all", r=R, lora_alpha=ALPHA, use_rslora=True)
    plan = build_plan(find_targets(base.model, config.target_modules), options)
    layer = adapt(base.model, plan, config).get_base_model().get_submodule(plan.targets[0].path)
    assert AdaLora().factors(layer, "default").scale == pytest.approx(ALPHA / R**0.5, rel=1e-5)


@pytest.mark.parametrize(("sharing", "groups"), [("own", 16), ("all", 4), ("LSS only", 10)])
def test_budget_counts_each_shared_tensor_once(sharing: str, groups: int) -> None:
    adapted = Adapted("llama", sharing, "adalora")
    assert len(adapted.plan.groups) == groups
    allocator = adapted.model.base_model.rankallocator
    assert allocator.init_bgt == groups * INIT_R
    assert allocator.target_bgt == groups * R


@pytest.mark.parametrize("sharing", ["own", "all", "LSS only"])
def test_tensors_are_shared_by_the_layers_of_a_group_and_by_no_others(sharing: str) -> None:
    adapted = Adapted("llama", sharing, "adalora")
    for model in (adapted.model, copy.deepcopy(adapted.model)):
        inner, owners = model.get_base_model(), []
        groups: dict[Any, list[Any]] = {}
        for path, group in adapted.plan.group_of_target().items():
            groups.setdefault(group, []).append(inner.get_submodule(path))
        for layers in groups.values():
            for slot in TRIPLET:
                owner = getattr(layers[0], slot)["default"]
                assert all(getattr(layer, slot)["default"] is owner for layer in layers)
                owners.append(owner)
        assert len({id(owner) for owner in owners}) == 3 * len(adapted.plan.groups)


def test_rank_that_peft_notes_is_not_trained_on_a_bf16_base() -> None:
    """PEFT leaves it trainable there: see if that has changed when this fails."""
    base = make_base("llama")
    base.model.to(torch.bfloat16)
    config = AdapterConfig(family="adalora", target_modules=("q_proj",))
    plan = build_plan(find_targets(base.model, config.target_modules), PlanConfig(r=R))
    names = trainable_parameters(adapt(base.model, plan, config))
    assert not [name for name in names if "ranknum" in name]


def test_penalty_is_what_peft_adds_to_a_loss() -> None:
    adapted = filled("bert", "all")
    training = small_trial(max_steps=8).training
    hooks = AdaLora().hooks(adapted.model, adapted.config, training, None)  # type: ignore[arg-type]
    labels = torch.tensor([0, 1, 2])
    outputs = adapted.model(**KINDS["bert"].inputs, labels=labels)
    plain = torch.nn.functional.cross_entropy(outputs.logits, labels)
    penalty = hooks.penalty()
    assert penalty is not None
    torch.testing.assert_close(plain + penalty, outputs.loss)
    assert penalty > 0.1


def test_no_regularisation_no_penalty() -> None:
    adapted = filled("bert", adalora={"orth_reg_weight": 0.0})
    training = small_trial(max_steps=8).training
    assert (
        FAMILIES["adalora"].hooks(adapted.model, adapted.config, training, None).penalty() is None
    )  # type: ignore[arg-type]


# ---- in a loop of one's own ---------------------------------------------------------------------

SCHEDULE = {"tinit": 2, "tfinal": 3}
IDS = KINDS["llama"].inputs["input_ids"]


def trained_as_peft_documents(model: Any, steps: int) -> list[float]:
    optimizer, losses = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2), []
    for step in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def tied_by_hand(plan: Any) -> Any:
    """PEFT's own model of the same plan."""
    config = AdaLoraConfig(
        target_modules=list(KINDS["llama"].names),
        init_r=INIT_R,
        target_r=R,
        lora_alpha=ALPHA * INIT_R / R,  # type: ignore[arg-type]
        total_step=8,
        **SCHEDULE,  # type: ignore[arg-type]
    )
    base = make_base("llama").model
    torch.manual_seed(1)
    model: Any = get_peft_model(base, config).eval()
    owners: dict[Any, Any] = {}
    for path, group in plan.group_of_target().items():
        layer = model.get_base_model().get_submodule(path)
        for slot in TRIPLET:
            getattr(layer, slot)["default"] = getattr(owners.setdefault(group, layer), slot)[
                "default"
            ]
    model.base_model.rankallocator = RankAllocator(
        model.base_model.model, model.peft_config["default"], "default"
    )
    return model


@pytest.mark.parametrize("sharing", ["own", "LSS only"])
def test_loop_that_peft_documents_does_what_it_does_to_pefts_own_model(
    sharing: str, tmp_path: Path
) -> None:
    adapted = Adapted("llama", sharing, "adalora", adalora=SCHEDULE)
    adapted.model.peft_config["default"].total_step = 8
    plain = tied_by_hand(adapted.plan)
    losses = trained_as_peft_documents(adapted.model, 8)
    assert losses == pytest.approx(trained_as_peft_documents(plain, 8), rel=1e-6)
    torch.testing.assert_close(adapted.output(), output_of(plain, "llama"))
    pattern = adapted.model.peft_config["default"].rank_pattern
    assert pattern == plain.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == R * len(adapted.plan.groups)
    loaded = load_adapter(make_base("llama").model, adapted.save(tmp_path / "own")).eval()
    assert torch.equal(output_of(loaded, "llama"), adapted.output())
    again = PeftModel.from_pretrained(
        make_base("llama").model, adapted.save_plain(tmp_path / "plain")
    )
    torch.testing.assert_close(output_of(again.eval(), "llama"), adapted.output())


def test_until_the_number_of_steps_is_set_no_pruning_is_the_last() -> None:
    adapted = Adapted("llama", "own", "adalora")
    trained_as_peft_documents(adapted.model, 3)
    kept = sum(map(sum, adapted.model.peft_config["default"].rank_pattern.values()))
    assert kept >= (INIT_R * len(adapted.plan.groups)) - 3


# ---- what is left of it ------------------------------------------------------------------------


@every_kind
def test_of_pruned_ranks_nothing_is_stored_and_loading_restores_the_rest(
    kind: str, tmp_path: Path
) -> None:
    adapted = pruned(kind)
    stored = load_file(adapted.save(tmp_path) / "adapter.safetensors")
    kept = kept_ranks(adapted.model, "default")
    sizes = {t.path: t.in_features + t.out_features + 1 for t in adapted.plan.targets}
    first = {g: path for path, g in reversed(adapted.plan.group_of_target().items())}
    values = sum(int(kept[path].sum()) * sizes[path] for path in first.values())
    values += count_parameters(adapted.model)[1]
    stored_bytes = sum(t.numel() * t.element_size() for t in stored.values())
    assert stored_bytes == 4 * values + len(first), "a byte for the six ranks of each group"
    loaded = load_adapter(make_base(kind).model, tmp_path).eval()
    assert torch.equal(output_of(loaded, kind), adapted.output())
    again = kept_ranks(loaded, "default")
    assert again.keys() == kept.keys() == sizes.keys()
    assert all(torch.equal(again[path], ranks) for path, ranks in kept.items())
    tensors, own = trainable_parameters(loaded), trainable_parameters(adapted.model)
    assert tensors.keys() == own.keys(), "shared as before"
    for name, tensor in own.items():
        path = next((path for path in kept if f".{path}." in name), None)
        if path is None:  # the head
            assert torch.equal(tensors[name], tensor)
            continue
        dim = 1 if ".lora_B." in name else 0
        ranks = kept[path].nonzero().flatten()
        assert torch.equal(tensors[name].index_select(dim, ranks), tensor.index_select(dim, ranks))
    assert load_adapter_saves_the_same(loaded, adapted, tmp_path)


def load_adapter_saves_the_same(loaded: Any, adapted: Adapted, folder: Path) -> bool:
    before = (folder / "adapter.safetensors").read_bytes()
    adapted.model = loaded
    return (adapted.save(folder) / "adapter.safetensors").read_bytes() == before


@every_kind
def test_peft_alone_loads_what_save_pretrained_wrote_of_every_layer(
    kind: str, tmp_path: Path
) -> None:
    adapted = pruned(kind)
    expected = adapted.output()
    adapted.save_plain(tmp_path)
    assert torch.equal(adapted.output(), expected), "saving changes nothing"
    kept = kept_ranks(adapted.model, "default")
    assert kept.keys() == {t.path for t in adapted.plan.targets}, "nor what is known of its ranks"
    plain = PeftModel.from_pretrained(make_base(kind).model, tmp_path).eval()
    torch.testing.assert_close(output_of(plain, kind), expected, rtol=1e-4, atol=1e-4)
    for path, ranks in kept.items():
        assert len(plain.get_base_model().get_submodule(path).lora_E["default"]) == ranks.sum()


@every_kind
def test_factors_say_what_each_layer_adds_without_its_pruned_ranks(kind: str) -> None:
    adapted = pruned(kind)
    kept = kept_ranks(adapted.model, "default")
    for path, layer in layers_of(adapted).items():
        factors = AdaLora().factors(layer, "default")
        assert factors.a.shape[0] == factors.b.shape[1] == max(1, int(kept[path].sum()))
        delta = layer.get_delta_weight("default")
        product = factors.scale * factors.b @ factors.a
        torch.testing.assert_close(product, delta.T if layer.fan_in_fan_out else delta)


@headless
def test_disabled_merged_and_unloaded_it_is_what_it_should_be(kind: str) -> None:
    adapted, base = pruned(kind), output_of(make_base(kind).model, kind)
    expected = adapted.output()
    assert not torch.allclose(expected, base, atol=1e-3)
    with adapted.model.disable_adapter():
        assert torch.equal(adapted.output(), base)
    merged = copy.deepcopy(adapted.model).merge_and_unload()
    torch.testing.assert_close(output_of(merged, kind), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(output_of(adapted.model.unload(), kind), base)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_dropout_passes_through(dropout: float) -> None:
    adapted = filled("llama", lora_dropout=dropout)
    expected = adapted.output()
    for name, module in adapted.model.named_modules():
        module.training = "lora_dropout" in name
    assert torch.equal(adapted.output(), expected) == (dropout == 0.0)


# ---- what is refused ---------------------------------------------------------------------------


def trial(adalora: dict[str, Any] | None = None, **training: Any) -> TrialConfig:
    config = small_trial(**training)
    adapter = AdapterConfig(
        family="adalora",
        target_modules=("query",),
        adalora=adalora or {},  # type: ignore[arg-type]
    )
    return config.model_copy(update={"adapter": adapter})


@pytest.mark.parametrize(
    ("adalora", "max_steps", "reason"),
    [
        ({"tinit": 3, "tfinal": 3}, 6, "sum must be below max_steps; got tinit=3, tfinal=3"),
        ({"tinit": 6}, 10, "got tinit=6, tfinal=5 and max_steps=10"),
        ({"tfinal": 5}, 6, "must see a gradient before its last pruning"),
        ({}, 3, None),
        ({"tinit": 2, "tfinal": 3}, 6, None),
        ({"tinit": 0, "tfinal": 4}, 6, None),
    ],
)
def test_schedule_must_leave_steps_for_pruning(
    adalora: dict[str, Any], max_steps: int, reason: str | None
) -> None:
    config = trial(adalora, max_steps=max_steps)
    if reason is None:
        require_possible_trial(config)
        return
    with pytest.raises(ValueError, match=reason):
        require_possible_trial(config)


def test_stage_3_is_refused_with_the_reason() -> None:
    for stage in (0, 1, 2):
        require_possible_trial(with_training(trial(), zero_stage=stage))
    with pytest.raises(ValueError, match="stage 3 partitions them"):
        require_possible_trial(with_training(trial(), zero_stage=3))


def test_ranks_allocated_by_gradients_are_refused() -> None:
    config = trial()
    plan = config.plan.model_copy(update={"topology": "e2"})
    with pytest.raises(ValueError, match=r"it allocates its own.*layer sharing only"):
        require_possible_trial(config.model_copy(update={"plan": plan}))


@pytest.mark.parametrize(
    ("groups", "r", "init_ratio", "reason"),
    [
        ([{"layers": (0, 1), "r": 4}, {"layers": (2, 3), "r": 2}], 4, 1.5, r"ranks \[2, 4\]"),
        (None, 4, 1.0, "init_ratio=1 at r=4, which rounds to 4"),
        (None, 1, 1.4, "rounds to 1. Raise"),
        (None, 12, 1.5, r"got init_r=18 .*k_proj \(16 x 32\)"),
    ],
)
def test_ranks_that_leave_nothing_to_prune_or_do_not_fit_are_refused(
    groups: Any, r: int, init_ratio: float, reason: str
) -> None:
    base = make_base("llama")
    names = ("k_proj",)
    config = AdapterConfig(
        family="adalora",
        target_modules=names,
        adalora={"init_ratio": init_ratio},  # type: ignore[arg-type]
    )
    named = [{"module": "k_proj", **group} for group in groups or ()]
    options = PlanConfig(topology="explicit" if groups else "all", groups=tuple(named) or None, r=r)
    plan = build_plan(find_targets(base.model, names), options)
    with pytest.raises(ValueError, match=reason):
        adapt(base.model, plan, config)


def test_tensors_follow_the_groups() -> None:
    config = trial()
    adapter = config.adapter.model_copy(update={"a_scope": "type"})
    with pytest.raises(ValueError, match="shared as its groups are"):
        require_possible_trial(config.model_copy(update={"adapter": adapter}))


def test_masks_of_ranks_are_those_of_the_layer_itself() -> None:
    adapted = pruned("llama")
    kept: dict[str, Tensor] = kept_ranks(adapted.model, "default")
    for path, layer in layers_of(adapted).items():
        assert torch.equal(kept[path], layer.lora_E["default"].flatten() != 0)
