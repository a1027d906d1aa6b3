"""GoRA: ranks by importance within a budget, where B starts, and what of it must survive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from e2lora.adapters import (
    adapt,
    count_adapter_parameters,
    count_parameters,
    require_possible_trial,
    trainable_parameters,
)
from e2lora.adapters.gora import allocate, first_paths
from e2lora.adapters.storage import load_adapter
from e2lora.config import AdapterConfig, GoraOptions, PlanConfig, TrialConfig
from e2lora.gradients.whole import sum_gradients
from e2lora.models import Base
from e2lora.plan import SharingPlan, build_plan
from e2lora.records import TrialFolder
from e2lora.targets import find_targets, is_transposed
from e2lora.training import Reports, TrialStopped, run_trial
from e2lora.training.engine import peak_learning_rate
from e2lora.weights import weights_fingerprint
from tests.cases import sharers
from tests.kinds import ALPHA, KINDS, SHARINGS, R, fill, loss_of, make_base, make_plan, output_of
from tests.small import small_trial
from tests.test_initialisation import product, weight_of
from tests.test_lora_ga import load_small, plan_of
from tests.two import in_two

every_kind = pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
every_sharing = pytest.mark.parametrize("sharing", ["own", "blocks(3)", "LSS only"])


def gradients_of(plan: SharingPlan) -> dict[str, Tensor]:
    """One tensor for each group, of very different sizes."""
    generator = torch.Generator().manual_seed(5)
    shapes = {t.module_type: (t.out_features, t.in_features) for t in plan.targets}
    of_group = {
        group: 4.0 ** (k * 3 % 5 - 2) * torch.randn(shapes[group.module_type], generator=generator)
        for k, group in enumerate(plan.groups)
    }
    return {path: of_group[group] for path, group in plan.group_of_target().items()}


class Started:
    """A tiny model with GoRA on it."""

    def __init__(
        self,
        kind: str = "llama",
        sharing: str = "LSS only",
        gradients: Any = gradients_of,
        family: str = "gora",
        base: Base | None = None,
        **options: Any,
    ) -> None:
        self.kind, self.base = kind, base or make_base(kind)
        own = {"gora": GoraOptions(**options)} if family == "gora" else {}
        self.config = AdapterConfig(family=family, target_modules=KINDS[kind].names, **own)  # type: ignore[arg-type]
        self.plan = make_plan(self.base, self.config, SHARINGS[sharing].plan)
        self.gradients = gradients(self.plan)
        torch.manual_seed(1)
        given = self.gradients if family != "lora" else None
        self.model = adapt(
            self.base.model,
            self.plan,
            self.config,
            self.base.head,
            gradients=given,
            in_loop=True,
        ).eval()

    def layer(self, path: str) -> Any:
        return self.model.get_base_model().get_submodule(path)

    @property
    def ranks(self) -> list[int]:
        """Of each group; of all of its layers the same."""
        of_group: dict[Any, set[int]] = {group: set() for group in self.plan.groups}
        for path, group in self.plan.group_of_target().items():
            of_group[group].add(len(self.layer(path).lora_A["default"].weight))
        assert all(len(ranks) == 1 for ranks in of_group.values())
        return [ranks.pop() for ranks in of_group.values()]


# ---- ranks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("importances", "costs", "least", "limits", "budget", "ranks"),
    [
        ([1, 1, 1], [10, 10, 10], 1, [9, 9, 9], 120, [4, 4, 4]),
        ([1, 2, 3], [10, 10, 10], 1, [9, 9, 9], 120, [2, 4, 6]),
        (
            [1, 1],
            [10, 30],
            1,
            [9, 9],
            120,
            [6, 2],
        ),  # a rank of the second takes three times as much
        ([1, 1, 98], [10, 10, 10], 2, [9, 9, 9], 120, [2, 2, 8]),  # two at the least
        ([1, 2, 97], [10, 10, 10], 1, [9, 9, 6], 120, [2, 4, 6]),  # the third at its limit
        ([5, 4, 3], [10, 10, 10], 1, [9, 9, 9], 109, [4, 3, 3]),  # 4.5, 3.6, 2.7 of 10.9: 10 fit
        ([1, 1], [10, 10], 1, [3, 3], 120, [3, 3]),
    ],
)
def test_ranks_are_in_proportion_to_importance_over_cost_between_limits(
    importances: list[int],
    costs: list[int],
    least: int,
    limits: list[int],
    budget: int,
    ranks: list[int],
) -> None:
    assert allocate(list(map(float, importances)), costs, least, limits, budget) == ranks


def test_ranks_never_take_more_than_the_budget_and_leave_less_than_one_rank() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        count, r = int(generator.integers(1, 12)), int(generator.integers(1, 9))
        costs = generator.integers(20, 200, count).tolist()
        importances = np.exp(3 * generator.standard_normal(count)).tolist()
        limits, least, budget = [4 * r] * count, max(1, r // 2), r * sum(costs)
        ranks = allocate(importances, costs, least, limits, budget)
        spent = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
        assert all(least <= rank <= 4 * r for rank in ranks)
        assert budget - max(costs) < spent <= budget or ranks == limits
        for one in range(count):
            for other in range(count):
                if importances[one] / costs[one] > importances[other] / costs[other]:
                    assert ranks[one] >= ranks[other] - 1, "but for rounding"


@every_kind
@every_sharing
def test_importance_of_a_group_is_the_mean_over_its_layers_of_weight_times_gradient(
    kind: str, sharing: str
) -> None:
    started, untouched = Started(kind, sharing), make_base(kind).model
    members: dict[Any, list[Any]] = {group: [] for group in started.plan.groups}
    for target in started.plan.targets:
        members[started.plan.group_of_target()[target.path]].append(target)
    importances, costs, limits = [], [], []
    for targets in members.values():
        each = [
            (weight_of(untouched, t.path) * started.gradients[t.path]).abs().mean() for t in targets
        ]
        importances.append(float(sum(each)) / len(each))
        costs.append(targets[0].in_features + targets[0].out_features)
        limits.append(min(4 * R, targets[0].in_features, targets[0].out_features))
    budget = R * sum(costs)
    assert started.ranks == allocate(importances, costs, R // 2, limits, budget)
    assert min(started.ranks) == R // 2
    assert max(started.ranks) > 2 * R
    counted = count_parameters(started.model)[0]
    limit = count_adapter_parameters(started.plan, started.config)
    assert limit == budget
    assert budget - max(costs) < counted <= budget


def test_limits_of_ranks_are_shares_of_the_base_rank() -> None:
    ranks = Started(min_ratio=0.75, max_ratio=1.5).ranks
    assert (min(ranks), max(ranks)) == (3, 6)
    assert set(Started(max_ratio=1.0).ranks) == {R}


# ---- the start --------------------------------------------------------------------------------


@every_kind
@every_sharing
def test_adapter_starts_with_a_step_against_the_gradient_as_far_as_a_can(
    kind: str, sharing: str
) -> None:
    """By an orthonormal basis of the rows of A: −γ √(in/r) G QQᵀ, at the scale α/√r."""
    started, untouched = Started(kind, sharing), make_base(kind).model
    for path, gradient in started.gradients.items():
        layer = started.layer(path)
        a = layer.lora_A["default"].weight.detach()
        assert layer.scaling["default"] == pytest.approx(ALPHA / len(a) ** 0.5)
        basis, _ = torch.linalg.qr(a.double().T)
        factor = 0.05 * (a.shape[1] / len(a)) ** 0.5
        expected = -factor * gradient.double() @ basis @ basis.T
        torch.testing.assert_close(product(layer).double(), expected, rtol=1e-3, atol=1e-4)
        base = layer.get_base_layer()
        assert torch.equal(base.weight, untouched.get_submodule(path).weight), "W is as it was"
        assert is_transposed(base) == (kind == "gpt2")


def of_the_batch(kind: str, base: Base, scale: float) -> Any:
    """The gradient of the loss that is trained on, of every group."""

    def gradients(plan: SharingPlan) -> dict[str, Tensor]:
        members: dict[Any, list[Any]] = {}
        for target in plan.targets:
            members.setdefault(plan.group_of_target()[target.path], []).append(target)
        return sum_gradients(
            base.model, list(members.values()), [None], lambda m, _: loss_of(m, kind), round(scale)
        )

    return gradients


@every_kind
@every_sharing
def test_start_lowers_the_loss_by_what_its_step_and_the_gradient_predict(
    kind: str, sharing: str
) -> None:
    base = make_base(kind)
    base.model.double()
    before = float(loss_of(base.model, kind)) / 1000
    started = Started(kind, sharing, of_the_batch(kind, base, 1000), base=base, gamma=1e-3)
    started.model.double()
    members = {path: len(g.layers) for path, g in started.plan.group_of_target().items()}
    predicted = sum(
        float((product(started.layer(path)).double() * gradient.double()).sum()) / members[path]
        for path, gradient in started.gradients.items()
    )
    change = loss_of(started.model, kind).item() / 1000 - before
    assert change < 0
    assert change == pytest.approx(predicted, rel=0.1)


@every_sharing
@pytest.mark.parametrize("family", ["gora", "lora_ga"])
def test_first_step_of_an_optimizer_lowers_the_loss(family: str, sharing: str) -> None:
    base = make_base("llama")
    started = Started("llama", sharing, of_the_batch("llama", base, 1000), family, base)
    losses = []
    for _ in range(2):
        loss = loss_of(started.model, "llama") / 1000
        losses.append(loss.item())
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": [parameter],
                    "lr": 5e-5 * (16 if family == "gora" and "lora_B" in name else 1),
                }
                for name, parameter in trainable_parameters(started.model).items()
            ]
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]


def test_b_learns_as_many_times_faster_as_it_is_told() -> None:
    training = small_trial(learning_rate=1e-3).training
    for ratio in (16.0, 4.0):
        config = AdapterConfig(
            family="gora", target_modules=("q",), gora=GoraOptions(lr_ratio=ratio)
        )
        a, b = (
            peak_learning_rate(f"q.lora_{slot}.default.weight", None, config, training)
            for slot in "AB"
        )
        assert (a, b) == (1e-3, pytest.approx(ratio * 1e-3))


# ---- what of it is left -----------------------------------------------------------------------


@every_kind
@every_sharing
def test_loaded_adapter_has_its_ranks_again_without_gradients(
    kind: str, sharing: str, tmp_path: Path
) -> None:
    from e2lora import save

    started = Started(kind, sharing)
    fill(started.model)
    save(started.model, tmp_path / "one")
    torch.manual_seed(99)
    loaded = load_adapter(make_base(kind).model, tmp_path / "one").eval()
    assert torch.equal(output_of(loaded, kind), output_of(started.model, kind))
    assert sharers(loaded, started.plan) == sharers(started.model, started.plan)
    assert count_parameters(loaded) == count_parameters(started.model)
    save(loaded, tmp_path / "two")
    one, two = (tmp_path / name / "adapter.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    ranks = {key: int(t) for key, t in load_file(one).items() if key.startswith("initial/")}
    first = first_paths(started.plan).values()
    expected = {f"initial/{p}.rank": r for p, r in zip(first, started.ranks, strict=True)}
    assert ranks == expected, "the only thing that is stored beside A and B"


def test_folder_that_lacks_a_rank_is_refused_and_the_base_is_as_it_was(tmp_path: Path) -> None:
    from e2lora import save

    started = Started()
    save(started.model, tmp_path)
    file = tmp_path / "adapter.safetensors"
    stored = load_file(file)
    path = next(key for key in stored if key.endswith(".rank")).removeprefix("initial/")
    save_file({key: t for key, t in stored.items() if not key.endswith(path)}, file)
    base = make_base("llama")
    with pytest.raises(ValueError, match=rf"there is none of \['{path.removesuffix('.rank')}'\]"):
        load_adapter(base.model, tmp_path)
    assert weights_fingerprint(base.model) == base.fingerprint


@every_kind
def test_peft_alone_reads_unequal_ranks_at_their_scales(kind: str, tmp_path: Path) -> None:
    started = Started(kind)
    fill(started.model)
    assert len(set(started.ranks)) > 2
    started.model.save_pretrained(tmp_path, save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_rslora"]
    assert {*config["rank_pattern"].values(), config["r"]} >= set(started.ranks)
    plain = PeftModel.from_pretrained(make_base(kind).model, tmp_path).eval()
    torch.testing.assert_close(output_of(plain, kind), output_of(started.model, kind))


# ---- refusals ---------------------------------------------------------------------------------


def test_groups_of_several_ranks_are_refused() -> None:
    base = make_base("llama")
    config = AdapterConfig(family="gora", target_modules=("k_proj",))
    groups = tuple(
        {"module": "k_proj", "layers": layers, "r": r} for layers, r in (((0, 1), 4), ((2, 3), 2))
    )
    options = PlanConfig(topology="explicit", groups=groups, r=4)  # type: ignore[arg-type]
    plan = build_plan(find_targets(base.model, ("k_proj",)), options)
    with pytest.raises(ValueError, match=r"must have the same rank.*ranks \[2, 4\].*the same r"):
        adapt(base.model, plan, config, gradients=gradients_of(plan), in_loop=True)


def test_ranks_allocated_by_gradients_of_a_profile_are_refused() -> None:
    config = small("e2", allocation=None)
    with pytest.raises(ValueError, match=r"GoRA can't follow.*that it starts from.*'uniform'"):
        require_possible_trial(config)
    require_possible_trial(small("e2", allocation="uniform"))


def test_gradients_are_asked_for_of_every_target() -> None:
    base = make_base("llama")
    config = AdapterConfig(family="gora", target_modules=KINDS["llama"].names)
    plan = build_plan(find_targets(base.model, config.target_modules), PlanConfig(r=R))
    with pytest.raises(ValueError, match="GoRA starts from gradients, and none were given"):
        adapt(base.model, plan, config, in_loop=True)
    gradients = gradients_of(plan)
    del gradients[plan.targets[3].path]
    with pytest.raises(ValueError, match=r"GoRA starts from a gradient of every.*lack 1 of 16"):
        adapt(base.model, plan, config, gradients=gradients, in_loop=True)


# ---- trials -----------------------------------------------------------------------------------


def small(topology: str = "none", allocation: str | None = None, **training: Any) -> TrialConfig:
    config = small_trial(topology, **{"learning_rate": 1e-3, **training})
    return config.model_copy(
        update={
            "adapter": config.adapter.model_copy(update={"family": "gora"}),
            "plan": config.plan.model_copy(update={"allocation": allocation}),
        }
    )


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_resumed_trial_measures_nothing_again_and_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    config = small()
    base, data = load_small()
    plan = plan_of(config, base, data)
    places = [TrialFolder(tmp_path / number) for number in ("00000", "00001")]
    whole = run_trial(base, data, plan, config, places[0], Reports())
    assert whole.adapter_parameters <= plan.parameters

    def stop(step: int, measured: dict[str, float]) -> None:
        if step == 5:
            raise TrialStopped

    with pytest.raises(TrialStopped):
        run_trial(base, data, plan, config, places[1], Reports(on_step=stop))
    with pytest.MonkeyPatch.context() as patch:
        measure = "e2lora.training.outset.measure_group_gradients"
        patch.setattr(measure, lambda *_: pytest.fail("measured again"))
        resumed = run_trial(base, data, plan, config, places[1], Reports())
    assert (resumed.losses, resumed.evaluations) == (whole.losses, whole.evaluations)
    assert resumed.adapter_parameters == whole.adapter_parameters
    files = [place.adapter / "adapter.safetensors" for place in places]
    assert files[0].read_bytes() == files[1].read_bytes()


def train_shared(folder: Path, group: Any, world: int) -> dict[str, Any]:
    if group and torch.distributed.get_rank(group):  # as where sums come out otherwise
        torch.linalg.pinv = None
    base, data = load_small()
    config = small(num_workers=world, zero_stage=2, learning_rate=1e-5, max_steps=3)
    plan = plan_of(config, base, data)
    place = TrialFolder(folder / f"{world:05d}")
    trained = run_trial(base, data, plan, config, place, Reports(), group)
    return {"losses": trained.losses, "parameters": trained.adapter_parameters}


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_two_workers_start_from_what_the_first_one_chooses_and_train_as_one_does(
    tmp_path: Path,
) -> None:
    first, second = in_two(__name__, tmp_path)
    assert first == second
    alone = train_shared(tmp_path, None, 1)
    assert first["parameters"] == alone["parameters"]
    assert first["losses"] == pytest.approx(alone["losses"], abs=1e-3)
