"""RandLoRA: what is special to it. The common contract is in ``test_families``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, RandLoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from e2lora.adapters import FAMILIES, adapt, trainable_parameters
from e2lora.adapters.family import layers_of
from e2lora.adapters.storage import load_adapter
from e2lora.config import AdapterConfig, ExplicitGroup, PlanConfig
from e2lora.models import Base
from e2lora.records import TrialFolder
from e2lora.tasks import TrialData
from e2lora.training import Reports, run_trial
from tests.kinds import (
    ALPHA,
    KINDS,
    Adapted,
    R,
    fill,
    loss_of,
    make_base,
    make_plan,
    output_of,
)
from tests.small import small_trial
from tests.test_train import load_small, plain_losses, plan_of, with_training

over_kinds = pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])


def rand_lora(kind: str, sharing: str = "LSS only", **options: Any) -> Adapted:
    return Adapted(kind, sharing, "randlora", **options)


def bases_of(model: Any, name: str = "default") -> tuple[Tensor, Tensor]:
    return model.base_model.randlora_A[name], model.base_model.randlora_B[name]


# ---- what a layer computes --------------------------------------------------------------------


def update_of(layer: Any, a: Tensor, b: Tensor, r: int) -> Tensor:
    """α/r times the sum of scaled products of random vectors, one by one: (out × in).

    The n vectors that go with the i-th row of A are, in PEFT, the columns i·n … i·n + n − 1 of all
    bases side by side.
    """
    lambda_, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    smaller = min(layer.in_features, layer.out_features)
    larger = max(layer.in_features, layer.out_features)
    n = -(-smaller // r)
    assert lambda_.shape == (r, n)
    assert gamma.shape == (n, smaller)
    columns = [b[:larger, j, i] for j in range(n) for i in range(r)]
    update = torch.zeros(larger, smaller)
    for i in range(r):
        for j in range(n):
            row = lambda_[i, j] * a[i, 0, :smaller] * gamma[j]
            update += columns[i * n + j][:, None] * row[None, :]
    update = update * ALPHA / r
    return update if smaller == layer.in_features else update.T


@over_kinds
@pytest.mark.parametrize("r", [4, 5], ids=["divides", "doesn't divide"])
def test_layer_computes_the_formula_and_its_update_has_full_rank(kind: str, r: int) -> None:
    base = make_base(kind)
    config = AdapterConfig(family="randlora", target_modules=KINDS[kind].names)
    plan = make_plan(base, config, {"topology": "blocks", "block_size": 2}, r=r)
    model = adapt(base.model, plan, config, base.head).eval()
    fill(model)
    for layer in layers_of(model, plan).values():
        update = update_of(layer, *bases_of(model), r)
        assert torch.linalg.matrix_rank(update) == min(update.shape)
        x = torch.randn(5, layer.in_features)
        torch.testing.assert_close(
            layer(x), layer.base_layer(x) + x @ update.T, rtol=1e-4, atol=1e-3
        )


@over_kinds
def test_without_sharing_it_is_pefts_own_trained_step_by_step(kind: str) -> None:
    adapted = rand_lora(kind, "own", projection_seed=11)
    peft_config = RandLoraConfig(
        r=R,
        randlora_alpha=int(ALPHA),
        target_modules=list(KINDS[kind].names),
        projection_prng_key=11,
        task_type="SEQ_CLS" if kind == "bert" else None,
        fan_in_fan_out=kind == "gpt2",
    )
    torch.manual_seed(1)
    plain = get_peft_model(make_base(kind).model, peft_config).eval()
    for model in (adapted.model, plain):
        optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-3)
        for _ in range(3):
            loss_of(model, kind).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not torch.allclose(adapted.output(), output_of(make_base(kind).model, kind))
    torch.testing.assert_close(adapted.output(), output_of(plain, kind), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sparse", [False, True])
def test_sparse_bases_are_of_three_values(sparse: bool) -> None:
    for bases in bases_of(rand_lora("llama", randlora={"sparse": sparse}).model):
        values = bases.unique()
        if sparse:
            assert len(values) == 3
            assert values[1] == 0
            assert values[0] == -values[2]
            assert (bases != 0).float().mean() == pytest.approx(1 / 3, abs=0.1)
        else:
            assert len(values) > 20


def test_dropout_reaches_peft() -> None:
    adapted = rand_lora("llama", lora_dropout=0.25)
    for layer in layers_of(adapted.model, adapted.plan).values():
        assert layer.randlora_dropout["default"].p == 0.25


# ---- one set of bases -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [lambda m: m, copy.deepcopy, lambda m: m.bfloat16()],
    ids=["as made", "copied", "cast"],
)
def test_there_is_one_copy_of_the_bases_whatever_is_done_to_the_model(change: Any) -> None:
    model = change(rand_lora("llama").model)
    held = [b for n, b in model.named_buffers(remove_duplicate=False) if ".randlora_" in n]
    assert len(held) == 2 * (1 + 16), "the tuner's, and that of each layer"
    assert {b.data_ptr() for b in held} == {b.data_ptr() for b in bases_of(model)}


def test_saved_for_peft_there_are_no_bases_and_peft_makes_the_same(tmp_path: Path) -> None:
    """PEFT would save them with every layer: for a large model gigabytes."""
    adapted = rand_lora("llama", projection_seed=11)
    fill(adapted.model)
    tensors = load_file(adapted.save_plain(tmp_path) / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"randlora_lambda", "randlora_gamma"}
    with pytest.warns(UserWarning, match="restored using the PRNG key"):
        plain = PeftModel.from_pretrained(make_base("llama").model, tmp_path).eval()
    assert torch.equal(output_of(plain, "llama"), adapted.output())


def test_several_adapters_live_beside_each_other(tmp_path: Path) -> None:
    adapted, other = rand_lora("llama", "all"), rand_lora("llama", "own")
    fill(adapted.model)
    fill(other.model, seed=9)
    expected = other.output()
    model = load_adapter(other.model, adapted.save(tmp_path), adapter_name="second").eval()
    assert torch.equal(output_of(model, "llama"), adapted.output())
    model.set_adapter("default")
    assert torch.equal(output_of(model, "llama"), expected)
    model.delete_adapter("second")
    assert torch.equal(output_of(model, "llama"), expected)


@pytest.mark.parametrize("merge", [False, True])
def test_head_of_several_layers_comes_back_from_unloading(merge: bool) -> None:
    """PEFT by itself fails here: only LoRA's tuner takes a head back that has no one weight."""
    adapted = rand_lora("roberta")
    fill(adapted.model)
    expected = adapted.output()
    model = adapted.model.merge_and_unload() if merge else adapted.model.unload()
    assert not any("randlora" in name for name, _ in model.named_modules())
    assert isinstance(model.classifier.out_proj, torch.nn.Linear)
    if merge:
        torch.testing.assert_close(output_of(model, "roberta"), expected, rtol=1e-4, atol=1e-3)


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"topology": "e2"},
            r"can't follow ranks allocated.*fewer parameters.*'entropy_power'.*uniform",
        ),
        ({"use_rslora": True}, r"update has the full rank.*√r has no meaning.*use_rslora=False"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], message: str) -> None:
    config = AdapterConfig(family="randlora", target_modules=("query",))
    with pytest.raises(ValueError, match=message):
        FAMILIES["randlora"].require_suits(PlanConfig(**options), config)
    FAMILIES["randlora"].require_suits(PlanConfig(topology="e2", allocation="uniform"), config)


@pytest.mark.parametrize("ranks", [(4, 8), (8, 8)])
def test_groups_of_several_ranks_are_refused_and_of_one_keep_alpha_over_r(
    ranks: tuple[int, int],
) -> None:
    base = make_base("bert")
    config = AdapterConfig(family="randlora", target_modules=("query",))
    groups = [
        ExplicitGroup(module="query", layers=layers, r=r)
        for layers, r in zip([(0, 1), (2, 3)], ranks, strict=True)
    ]
    plan = make_plan(base, config, {"topology": "explicit", "groups": tuple(groups)})
    if ranks == (4, 8):
        with pytest.raises(ValueError, match=r"one set of bases.*ranks \[4, 8\]"):
            adapt(base.model, plan, config, base.head)
        return
    model = adapt(base.model, plan, config, base.head)
    for layer in layers_of(model, plan).values():
        assert layer.r["default"] == 8
        assert layer.scaling["default"] == ALPHA / R


def test_adapting_twice_is_refused() -> None:
    """PEFT's layer is an nn.Linear, but no target."""
    adapted = rand_lora("bert")
    with pytest.raises(ValueError, match="matches none"):
        adapt(adapted.base.model, adapted.plan, adapted.config, adapted.base.head)


@pytest.mark.parametrize(
    ("options", "names", "shape"),
    [
        ({"r": R + 1}, ("q_proj", "k_proj"), r"\(32, 7, 5\)"),
        ({}, ("k_proj",), r"\(32, 4, 4\)"),
    ],
    ids=["rank", "sizes"],
)
def test_second_adapter_that_would_need_other_bases_is_refused(
    options: dict[str, Any], names: tuple[str, ...], shape: str
) -> None:
    base = make_base("llama")
    config = AdapterConfig(family="randlora", target_modules=("q_proj", "k_proj"))
    model = adapt(base.model, make_plan(base, config, {"topology": "none"}), config)
    other = config.model_copy(update={"target_modules": names})
    plan = make_plan(make_base("llama"), other, {"topology": "none"}, **options)
    with pytest.raises(ValueError, match=rf"of RandLoRA .*\(32, 8, 4\).*{shape}.*of its own"):
        adapt(model, plan, other, adapter_name="other")
    assert list(model.peft_config) == ["default"]


# ---- training ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resident() -> tuple[Base, TrialData]:
    return load_small()


def randlora_trial() -> Any:
    """On a real model, shared by two layers each."""
    config = small_trial("blocks", r=16, block_size=2, learning_rate=5e-3)
    adapter = AdapterConfig(family="randlora", target_modules=("query", "value"))
    return config.model_copy(update={"adapter": adapter})


@pytest.fixture(scope="module")
def plain(resident: tuple[Base, TrialData]) -> list[float]:
    losses = plain_losses(randlora_trial(), *resident)
    idle = plain_losses(with_training(randlora_trial(), learning_rate=1e-12), *resident)
    assert max(abs(a - b) for a, b in zip(losses, idle, strict=True)) > 1e-2
    return losses


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_loss_curve_equals_a_plain_loop(
    resident: tuple[Base, TrialData], plain: list[float], tmp_path: Path, stage: int
) -> None:
    base, data = resident
    trial = with_training(randlora_trial(), zero_stage=stage)
    plan = plan_of(trial, base, data)
    folder = TrialFolder(tmp_path / "0001")
    trained = run_trial(base, data, plan, trial, folder, Reports())
    assert trained.losses == pytest.approx(plain, abs=2e-5)
    assert trained.adapter_parameters == 2 * 3 * (384 // 16) * (16 + 384)
    stored = load_file(folder.adapter / "adapter.safetensors")
    of_adapter = [t.numel() for name, t in stored.items() if "randlora_" in name]
    assert sum(of_adapter) == trained.adapter_parameters, "each shared tensor once, and no bases"
