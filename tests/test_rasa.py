"""RaSA against its formula written out; where D starts; what PEFT's files of it hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

import e2lora
from e2lora.adapters import adapt, count_adapter_parameters, require_possible_trial
from e2lora.adapters.export import export_adapter
from e2lora.adapters.family import layers_of
from e2lora.adapters.rasa import pooled_ranks
from e2lora.config import AdapterConfig, PlanConfig, RasaOptions, TrainConfig
from e2lora.plan import build_plan
from e2lora.targets import find_targets, is_transposed
from e2lora.training.activations import require_checkpointable
from tests.kinds import ALPHA, KINDS, Adapted, R, fill, make_base, output_of
from tests.small import small_trial

systems = pytest.mark.parametrize(
    ("sharing", "k"), [("own", None), ("own", 2), ("blocks(3)", 3), ("E²", None)]
)


def rasa(sharing: str, k: int | None = None, kind: str = "llama", **options: Any) -> Adapted:
    return Adapted(kind, sharing, "rasa", rasa=RasaOptions(k=k), **options)


def added(tensors: dict[str, Tensor], x: Tensor, groups: dict[str, int]) -> Tensor:
    """Σ over private and pooled ranks D_j B_j A_jᵀ x, one rank after another."""
    total: Any = 0.0
    for part, first in groups.items():
        a, b = tensors[f"A {part}"], tensors[f"B {part}"]
        for rank in range(len(a)):
            total = total + tensors["D"][first + rank] * (x @ a[rank])[..., None] * b[:, rank]
    return total


@systems
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_layers_and_gradients_are_those_of_the_formula(
    kind: str, sharing: str, k: int | None
) -> None:
    """Each shared tensor is one leaf of the formula, whatever the ranks of those who share it."""
    adapted = rasa(sharing, k, kind)
    fill(adapted.model)
    adapted.model.double()
    leaves: dict[Any, Tensor] = {}
    held: dict[Any, nn.Parameter] = {}
    generator = torch.Generator().manual_seed(1)
    for path, layer in layers_of(adapted.model, adapted.plan).items():
        group = adapted.plan.group_of_target()[path]
        owners = {"private": group, "pool": group.module_type}
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        held |= {
            **{("A", part, owners[part]): getattr(a, f"{part}_weight") for part in owners},
            **{("B", part, owners[part]): getattr(b, f"{part}_weight") for part in owners},
            ("D", path): b.diagonal,
        }
        for key, parameter in held.items():
            if key not in leaves:
                leaves[key] = parameter.detach().clone().requires_grad_()
        tensors = {
            f"{slot} {part}": leaves[slot, part, owners[part]] for slot in "AB" for part in owners
        }
        tensors["D"] = leaves["D", path][0]
        private = group.r - (k or 1)
        num_layers = sum(t.module_type == group.module_type for t in adapted.plan.targets)
        assert tensors["A private"].shape == (private, layer.in_features)
        assert tensors["B pool"].shape == (layer.out_features, (k or 1) * num_layers)
        assert tensors["D"].shape == (private + (k or 1) * num_layers,)

        x, y = (
            torch.randn(2, 3, size, generator=generator).double()
            for size in (layer.in_features, layer.out_features)
        )
        base = layer.get_base_layer()
        expected = x @ (base.weight if is_transposed(base) else base.weight.T)
        expected = expected + (0 if base.bias is None else base.bias)
        expected = expected + added(tensors, x, {"private": 0, "pool": private})
        found = layer(x)
        torch.testing.assert_close(found, expected)
        (found * y).sum().backward()
        (expected * y).sum().backward()
    assert len({id(parameter) for parameter in held.values()}) == len(leaves)
    for key, parameter in held.items():
        torch.testing.assert_close(parameter.grad, leaves[key].grad)


@systems
def test_diagonal_starts_at_half_of_alpha_over_each_part_whatever_the_group_was_allocated(
    sharing: str, k: int | None
) -> None:
    adapted = rasa(sharing, k)
    k = k or 1
    for path, layer in layers_of(adapted.model, adapted.plan).items():
        private = adapted.plan.group_of_target()[path].r - k
        expected = [ALPHA / 2 / (R - k)] * private + [ALPHA / 2 / (4 * k)] * (4 * k)
        assert layer.lora_B["default"].diagonal.tolist()[0] == pytest.approx(expected)
        assert layer.scaling["default"] == 1.0
        assert not layer.lora_B["default"].weight.any()
        a = layer.lora_A["default"].weight
        assert a.abs().max() <= layer.in_features**-0.5
        assert a.unique().numel() == a.numel()


@pytest.mark.parametrize(("r", "k"), [(2, 1), (4, 1), (8, 1), (16, 2), (32, 4), (64, 8)])
def test_an_eighth_of_the_ranks_is_pooled_unless_another_number_is_given(r: int, k: int) -> None:
    config = AdapterConfig(family="rasa", target_modules=("query",))
    assert pooled_ranks(PlanConfig(r=r), config) == k
    given = config.model_copy(update={"rasa": RasaOptions(k=3)})
    assert pooled_ranks(PlanConfig(r=r), given) == 3


def test_layers_of_their_own_have_loras_parameters_and_d() -> None:
    """However many of the ranks are pooled."""
    targets = find_targets(make_base("t5").model, KINDS["t5"].names)
    plan = build_plan(targets, PlanConfig(r=R))
    lora = count_adapter_parameters(plan, AdapterConfig(target_modules=KINDS["t5"].names))
    assert lora is not None
    for k in (1, 2, 3):
        config = AdapterConfig(
            family="rasa", target_modules=KINDS["t5"].names, rasa=RasaOptions(k=k)
        )
        diagonals = sum(n * (R - k + k * n) for n, _, _ in KINDS["t5"].types)
        assert count_adapter_parameters(plan, config) == lora + diagonals


# ---- what is left on disk ---------------------------------------------------------------------


def test_every_form_computes_the_same_and_that_of_peft_holds_plain_lora_alone(
    tmp_path: Path,
) -> None:
    base = make_base("llama")
    base.model.save_pretrained(tmp_path / "base")
    base.model.name_or_path = str(tmp_path / "base")
    adapted = rasa("E²", base=base)
    fill(adapted.model)
    e2lora.save(adapted.model, tmp_path / "adapter")
    for form in ("peft", "portable", "merged"):
        done = export_adapter(tmp_path / "adapter", form, tmp_path / form)
        assert done.comparison is not None
        assert done.comparison.lost < 1e-4
    done = export_adapter(tmp_path / "adapter", "peft", tmp_path / "out", verify=False)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = {path: g.r - 1 + 4 for path, g in adapted.plan.group_of_target().items()}
    shapes = {}
    for target in adapted.plan.targets:
        name, r = f"base_model.model.{target.path}", ranks[target.path]
        shapes[f"{name}.lora_A.weight"] = (r, target.in_features)
        shapes[f"{name}.lora_B.weight"] = (target.out_features, r)
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == shapes
    assert done.parameters == sum(a * b for a, b in shapes.values())


def test_what_save_pretrained_writes_goes_back_into_the_same_plan_exactly(tmp_path: Path) -> None:
    trained, fresh = rasa("E²"), rasa("E²", torch_seed=7)
    fill(trained.model)
    written = load_file(trained.save_plain(tmp_path) / "adapter_model.safetensors")
    left = set_peft_model_state_dict(fresh.model, dict(written))
    assert not left.unexpected_keys
    assert torch.equal(fresh.output(), trained.output())


def test_product_alone_is_not_taken_for_the_parameters() -> None:
    trained, fresh = rasa("E²"), rasa("E²")
    fill(trained.model)
    state = {k: t for k, t in trained.model.state_dict().items() if not k.endswith("diagonal")}
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_B\.default\.diagonal"):
        fresh.model.load_state_dict(state)


def test_second_adapter_has_a_pool_of_its_own_and_goes_without_the_first() -> None:
    first = rasa("E²")
    fill(first.model)
    expected = first.output()
    model = adapt(first.model, first.plan, first.config, adapter_name="other").eval()
    untrained = output_of(model, "llama")
    assert not torch.allclose(untrained, expected)
    model.set_adapter("default")
    assert torch.equal(output_of(model, "llama"), expected)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(output_of(model, "llama"), untrained)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert all(".other." in name for name in names)


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "k", "message"),
    [
        ({"r": 1}, None, r"r must exceed k; got r=1 and k=1\. Raise r, or lower `rasa\.k`"),
        ({"r": 4}, 4, r"r must exceed k; got r=4 and k=4"),
        ({"r": 4, "use_rslora": True}, None, r"√r has no meaning; got use_rslora=True"),
    ],
)
def test_plan_without_private_ranks_is_refused(
    plan: dict[str, Any], k: int | None, message: str
) -> None:
    trial = small_trial()
    adapter = AdapterConfig(family="rasa", target_modules=("query",), rasa=RasaOptions(k=k))
    trial = trial.model_copy(update={"adapter": adapter, "plan": PlanConfig(**plan)})
    with pytest.raises(ValueError, match=message):
        require_possible_trial(trial)


def test_group_whose_allocated_rank_is_pooled_whole_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"got k=2, and .*q_proj has r=2 in layers \[0, 1\].*'uniform'"
    ):
        rasa("E²", k=2)


def test_reentrant_checkpointing_is_refused_for_the_pool_even_if_no_layers_form_a_group() -> None:
    adapted = rasa("own")
    training = TrainConfig(
        max_steps=1, learning_rate=1e-3, activation_checkpointing="reentrant", global_batch_size=1
    )
    with pytest.raises(ValueError, match=r"share: .*RaSA's pool\. Set .*'non_reentrant'"):
        require_checkpointable(adapted.plan, adapted.config, training)
