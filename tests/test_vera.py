"""VeRA and E²VeRA: what is special to them. The common contract is in ``test_families``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from e2lora.adapters import FAMILIES, adapt, trainable_parameters
from e2lora.adapters.family import layers_of
from e2lora.adapters.storage import load_adapter
from e2lora.config import AdapterConfig, ExplicitGroup, PlanConfig
from e2lora.models import Base
from e2lora.records import TrialFolder
from e2lora.tasks import TrialData
from e2lora.training import Reports, run_trial
from tests.kinds import KINDS, Adapted, R, fill, loss_of, make_base, make_plan, output_of
from tests.small import small_trial
from tests.test_train import load_small, plain_losses, plan_of, with_training

over_kinds = pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])


def e2_vera(kind: str, **options: Any) -> Adapted:
    adapted = Adapted(kind, "E²", "vera", **options)
    assert len({group.r for group in adapted.plan.groups}) > 2, "ranks must differ"
    return adapted


def pair_of(model: Any, name: str = "default") -> tuple[torch.Tensor, torch.Tensor]:
    return model.base_model.vera_A[name], model.base_model.vera_B[name]


def largest_rank(adapted: Adapted) -> int:
    return max(group.r for group in adapted.plan.groups)


# ---- what a layer computes --------------------------------------------------------------------


@over_kinds
def test_layer_uses_the_corner_of_the_pair_that_its_rank_and_sizes_leave(kind: str) -> None:
    adapted = e2_vera(kind)
    fill(adapted.model)
    a, b = pair_of(adapted.model)
    sizes = [(t.in_features, t.out_features) for t in adapted.plan.targets]
    assert a.shape == (largest_rank(adapted), max(n for n, _ in sizes))
    assert b.shape == (max(n for _, n in sizes), largest_rank(adapted))
    groups = adapted.plan.group_of_target()
    for path, layer in layers_of(adapted.model, adapted.plan).items():
        r = groups[path].r
        lambda_d, lambda_b = layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]
        assert lambda_d.shape == (r,)
        x = torch.randn(5, layer.in_features)
        hidden = x @ a[:r, : layer.in_features].T * lambda_d
        update = hidden @ b[: layer.out_features, :r].T * lambda_b
        torch.testing.assert_close(layer(x), layer.base_layer(x) + update, rtol=1e-5, atol=1e-5)


@over_kinds
def test_without_sharing_it_is_pefts_own_vera_trained_step_by_step(kind: str) -> None:
    adapted = Adapted(kind, "own", "vera", projection_seed=11)
    peft_config = VeraConfig(
        r=R,
        target_modules=list(KINDS[kind].names),
        projection_prng_key=11,
        task_type="SEQ_CLS" if kind == "bert" else None,
        fan_in_fan_out=kind == "gpt2",
    )
    torch.manual_seed(1)
    plain = get_peft_model(make_base(kind).model, peft_config).eval()
    for projection in pair_of(plain):  # ours holds what bfloat16 can
        projection.copy_(projection.bfloat16())
    for model in (adapted.model, plain):
        optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
        for _ in range(3):
            loss_of(model, kind).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not torch.allclose(adapted.output(), output_of(make_base(kind).model, kind))
    torch.testing.assert_close(adapted.output(), output_of(plain, kind), rtol=1e-5, atol=1e-5)


def test_alpha_has_no_effect() -> None:
    outputs = []
    for alpha in (1.0, 100.0):
        base = make_base("llama")
        config = AdapterConfig(family="vera", target_modules=KINDS["llama"].names)
        model = adapt(base.model, make_plan(base, config, {"topology": "e2"}, alpha=alpha), config)
        fill(model)
        outputs.append(output_of(model.eval(), "llama"))
    assert torch.equal(*outputs)


def test_options_reach_peft() -> None:
    adapted = e2_vera("llama", vera={"d_initial": 0.7}, lora_dropout=0.25, projection_seed=5)
    other = e2_vera("llama")
    for layer in layers_of(adapted.model, adapted.plan).values():
        assert layer.vera_dropout["default"].p == 0.25
        assert (layer.vera_lambda_d["default"] == 0.7).all()
        assert (layer.vera_lambda_b["default"] == 0).all()
    assert not torch.equal(pair_of(adapted.model)[0], pair_of(other.model)[0])
    assert torch.equal(pair_of(e2_vera("llama").model)[0], pair_of(other.model)[0])


@over_kinds
def test_factors_give_what_merging_adds_to_the_weight(kind: str) -> None:
    adapted = e2_vera(kind)
    fill(adapted.model)
    for layer in layers_of(adapted.model, adapted.plan).values():
        factors = FAMILIES["vera"].factors(layer, "default")
        update = factors.scale * factors.b @ factors.a
        assert update.shape == (layer.out_features, layer.in_features)
        before = layer.base_layer.weight.clone()
        layer.merge()
        added = layer.base_layer.weight - before
        added = added.T if kind == "gpt2" else added
        torch.testing.assert_close(update, added, rtol=1e-4, atol=1e-6)


# ---- one pair ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [lambda m: m, copy.deepcopy, lambda m: m.bfloat16(), lambda m: copy.deepcopy(m).double()],
    ids=["as made", "copied", "cast", "copied and cast"],
)
def test_there_is_one_copy_of_the_pair_whatever_is_done_to_the_model(change: Any) -> None:
    model = change(e2_vera("llama").model)
    held = [b for n, b in model.named_buffers(remove_duplicate=False) if ".vera_" in n]
    assert len(held) == 2 * (1 + 16), "the tuner's, and that of each layer"
    assert {b.data_ptr() for b in held} == {b.data_ptr() for b in pair_of(model)}
    for layer in model.modules():
        if hasattr(layer, "vera_lambda_d"):
            assert layer.vera_A["default"].data_ptr() == pair_of(model)[0].data_ptr()
            assert layer.vera_B["default"].data_ptr() == pair_of(model)[1].data_ptr()


def test_two_adapters_of_other_ranks_live_beside_each_other(tmp_path: Path) -> None:
    adapted = e2_vera("llama")
    fill(adapted.model)
    expected, untrained = adapted.output(), output_of(make_base("llama").model, "llama")
    groups = [
        ExplicitGroup(module=module, layers=layers, r=r)
        for module in KINDS["llama"].names
        for layers, r in [((0,), 8), ((1, 2, 3), 3)]
    ]
    second = make_plan(
        make_base("llama"), adapted.config, {"topology": "explicit", "groups": tuple(groups)}
    )
    model = adapt(adapted.model, second, adapted.config, adapter_name="other").eval()
    assert torch.equal(output_of(model, "llama"), untrained)
    fill(model, seed=9)
    other = output_of(model, "llama")
    model.set_adapter("default")
    assert torch.equal(output_of(model, "llama"), expected)
    with model.disable_adapter():
        assert torch.equal(output_of(model, "llama"), untrained)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    plain = PeftModel.from_pretrained(make_base("llama").model, tmp_path / "other").eval()
    torch.testing.assert_close(output_of(plain, "llama"), other, rtol=1e-5, atol=1e-5)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(output_of(model, "llama"), other)


def test_loaded_beside_another_it_is_what_it_was(tmp_path: Path) -> None:
    adapted, other = e2_vera("llama"), e2_vera("llama")
    fill(adapted.model)
    fill(other.model, seed=9)
    model = load_adapter(other.model, adapted.save(tmp_path), adapter_name="second").eval()
    assert torch.equal(output_of(model, "llama"), adapted.output())


# ---- plain PEFT -------------------------------------------------------------------------------


@over_kinds
def test_saved_for_peft_every_rank_is_the_largest_by_zeros(kind: str, tmp_path: Path) -> None:
    adapted = e2_vera(kind)
    fill(adapted.model)
    tensors = load_file(adapted.save_plain(tmp_path) / "adapter_model.safetensors")
    lambdas = {name: t for name, t in tensors.items() if name.endswith("vera_lambda_d")}
    groups = adapted.plan.group_of_target()
    assert len(lambdas) == len(groups)
    for name, lambda_d in lambdas.items():
        r = next(group.r for path, group in groups.items() if f".{path}." in name)
        assert lambda_d.shape == (largest_rank(adapted),)
        assert (lambda_d[:r] != 0).all()
        assert (lambda_d[r:] == 0).all()
    pairs = [name for name in tensors if "vera_A" in name or "vera_B" in name]
    assert sorted(pairs) == ["base_model.vera_A", "base_model.vera_B"], "once for all layers"
    plain = PeftModel.from_pretrained(make_base(kind, head_seed=5).model, tmp_path).eval()
    torch.testing.assert_close(output_of(plain, kind), adapted.output(), rtol=1e-5, atol=1e-5)


def test_state_dict_goes_back_into_the_ranks_it_came_from() -> None:
    adapted, again = e2_vera("llama"), e2_vera("llama")
    fill(adapted.model)
    result = set_peft_model_state_dict(again.model, get_peft_model_state_dict(adapted.model))
    assert not result.unexpected_keys
    assert torch.equal(again.output(), adapted.output())
    again.model.load_state_dict(e2_vera("llama").model.state_dict())
    assert torch.equal(again.output(), output_of(make_base("llama").model, "llama"))


def test_state_dict_of_a_larger_rank_is_not_cut_where_something_is_lost() -> None:
    adapted = e2_vera("llama")
    state = adapted.model.state_dict()
    name = next(n for n in state if n.endswith("layers.0.self_attn.q_proj.vera_lambda_d.default"))
    state[name] = torch.ones_like(state[name])
    with pytest.raises(RuntimeError, match=r"size mismatch for .*layers\.0.*q_proj.*lambda_d"):
        adapted.model.load_state_dict(state)


@pytest.mark.parametrize("merge", [False, True])
def test_head_of_several_layers_comes_back_from_unloading(merge: bool) -> None:
    """PEFT by itself fails here: only LoRA's tuner takes a head back that has no one weight."""
    adapted = e2_vera("roberta")
    fill(adapted.model)
    expected = adapted.output()
    trained = adapted.model.get_base_model().classifier.modules_to_save["default"]
    model = adapted.model.merge_and_unload() if merge else adapted.model.unload()
    assert not any("vera" in name or "modules_to_save" in name for name, _ in model.named_modules())
    if merge:
        assert model.classifier is trained
        torch.testing.assert_close(output_of(model, "roberta"), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(model.classifier.out_proj, nn.Linear)


# ---- refusals ---------------------------------------------------------------------------------


def test_rslora_is_refused() -> None:
    plan = PlanConfig(use_rslora=True)
    config = AdapterConfig(family="vera", target_modules=("query",))
    with pytest.raises(ValueError, match=r"VeRA has no α.*use_rslora=True\. Set use_rslora=False"):
        FAMILIES["vera"].require_suits(plan, config)


@pytest.mark.parametrize(
    ("options", "names", "message"),
    [
        ({"r": R + 1}, ("q_proj", "k_proj"), r"vera_A of \(4, 32\), this adapter needs \(5, 32\)"),
        ({}, ("k_proj",), r"vera_B of \(32, 4\), this adapter needs \(16, 4\)"),
    ],
    ids=["rank", "sizes"],
)
def test_second_adapter_that_would_need_another_pair_is_refused(
    options: dict[str, Any], names: tuple[str, ...], message: str
) -> None:
    base = make_base("llama")
    config = AdapterConfig(family="vera", target_modules=("q_proj", "k_proj"))
    model = adapt(base.model, make_plan(base, config, {"topology": "none"}), config)
    other = config.model_copy(update={"target_modules": names})
    plan = make_plan(make_base("llama"), other, {"topology": "none"}, **options)
    with pytest.raises(ValueError, match=rf"of VeRA .*one set.*{message}.*model of its own"):
        adapt(model, plan, other, adapter_name="other")
    assert list(model.peft_config) == ["default"]


# ---- training ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resident() -> tuple[Base, TrialData]:
    return load_small()


def vera_trial() -> Any:
    """On a real model: three ranks, groups of one, two and three layers."""
    groups = tuple(
        ExplicitGroup(module=module, layers=layers, r=r)
        for module in ("query", "value")
        for layers, r in [((0, 1, 2), 16), ((3, 4), 8), ((5,), 32)]
    )
    config = small_trial(learning_rate=5e-2)
    return config.model_copy(
        update={
            "adapter": AdapterConfig(family="vera", target_modules=("query", "value")),
            "plan": PlanConfig(topology="explicit", groups=groups),
        }
    )


@pytest.fixture(scope="module")
def plain(resident: tuple[Base, TrialData]) -> list[float]:
    losses = plain_losses(vera_trial(), *resident)
    idle = plain_losses(with_training(vera_trial(), learning_rate=1e-12), *resident)
    assert max(abs(a - b) for a, b in zip(losses, idle, strict=True)) > 1e-2
    return losses


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_loss_curve_equals_a_plain_loop(
    resident: tuple[Base, TrialData], plain: list[float], tmp_path: Path, stage: int
) -> None:
    base, data = resident
    trial = with_training(vera_trial(), zero_stage=stage)
    plan = plan_of(trial, base, data)
    folder = TrialFolder(tmp_path / "0001")
    trained = run_trial(base, data, plan, trial, folder, Reports())
    assert trained.losses == pytest.approx(plain, abs=2e-5)
    assert trained.adapter_parameters == 2 * (16 + 8 + 32 + 3 * 384)
    stored = load_file(folder.adapter / "adapter.safetensors")
    of_adapter = [t.numel() for name, t in stored.items() if "vera_lambda" in name]
    assert sum(of_adapter) == trained.adapter_parameters, "each shared tensor once, none padded"
