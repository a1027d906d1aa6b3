"""IncreLoRA: ranks that aren't there, when and where they grow, and what is left of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from e2lora import save
from e2lora.adapters import (
    FAMILIES,
    adapt,
    count_adapter_parameters,
    count_parameters,
    require_possible_trial,
    trainable_parameters,
)
from e2lora.adapters.adalora import TRIPLET
from e2lora.adapters.family import Handle
from e2lora.adapters.increlora import Growth, IncreLora, IncreLoraHooks, existing, triplets
from e2lora.adapters.storage import load_adapter
from e2lora.config import AdapterConfig, IncreLoraOptions, PlanConfig, TrialConfig
from e2lora.plan import build_plan
from e2lora.records import TrialFolder
from e2lora.targets import find_targets
from e2lora.training import Reports, run_trial
from tests.cases import require_tied
from tests.kinds import ALPHA, KINDS, Adapted, R, loss_of, make_base, output_of
from tests.small import small_trial
from tests.test_train import load_small, plan_of, train_until, with_training
from tests.two import in_two

MOST = 2 * R
every_kind = pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])


class PlainHandle(Handle):
    """Of a loop without an engine."""

    def __init__(self, model: Any) -> None:
        self.parameters = trainable_parameters(model)

    def gradient(self, name: str) -> Tensor:
        return self.parameters[name].grad

    def value(self, name: str) -> Tensor:
        return self.parameters[name].detach().clone()

    def assign(self, name: str, value: Tensor) -> None:
        self.parameters[name].data.copy_(value)


class Growing:
    """A tiny model in a plain loop of AdamW, with weight decay, and the family's hooks."""

    def __init__(
        self, kind: str = "llama", sharing: str = "LSS only", steps: int = 20, **options: Any
    ) -> None:
        self.kind, self.steps = kind, steps
        self.adapted = Adapted(kind, sharing, "increlora", increlora=IncreLoraOptions(**options))
        self.model, self.plan = self.adapted.model, self.adapted.plan
        training = small_trial(max_steps=steps).training
        handle = PlainHandle(self.model)
        self.hooks: Any = IncreLora().hooks(self.model, self.adapted.config, training, handle)
        self.optimizer = torch.optim.AdamW(handle.parameters.values(), lr=1e-2, weight_decay=0.5)
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            (loss_of(self.model, self.kind) / 1000 + self.hooks.penalty()).backward()
            self.hooks.after_backward(self.step)
            self.optimizer.step()
            self.hooks.after_step(self.step)
            self.optimizer.zero_grad()

    @property
    def groups(self) -> list[tuple[Any, Any, Any]]:
        """A, E and B of each group."""
        found = triplets(self.model, "default").values()
        return list({id(group[0]): group for group in found}.values())

    @property
    def ranks(self) -> list[int]:
        return [int(existing(*group).sum()) for group in self.groups]


# ---- what isn't there -------------------------------------------------------------------------


@every_kind
def test_count_is_that_of_the_ranks_there_may_be(kind: str) -> None:
    for ratio, most in ((2.0, 2 * R), (1.5, 6), (100.0, 32 if kind != "llama" else 16)):
        options = IncreLoraOptions(max_ratio=ratio)
        adapted = Adapted(kind, "all", "increlora", increlora=options)
        expected = sum(most * (n_in + n_out + 1) for _, n_in, n_out in KINDS[kind].types)
        assert count_parameters(adapted.model)[0] == expected
        assert count_adapter_parameters(adapted.plan, adapted.config) == expected


@every_kind
def test_every_group_starts_with_its_first_rank(kind: str) -> None:
    growing = Growing(kind)
    assert len(growing.groups) == len(growing.plan.groups)
    values = []
    for a, e, b in growing.groups:
        assert existing(a, e, b).tolist() == [True] + [False] * (MOST - 1)
        assert not e.any()
        assert not a[1:].any()
        assert not b[:, 1:].any()
        values += [a[0].flatten(), b[:, 0].flatten()]
    std = torch.cat(values).std().item()
    assert std == pytest.approx(0.02, rel=0.1)


def test_rank_that_is_not_there_gets_no_gradient_no_decay_and_no_moments() -> None:
    growing = Growing(tinit=15, tfinal=4, delta_t=1)
    growing.train(5)
    assert growing.ranks == [1] * len(growing.groups)
    (loss_of(growing.model, "llama") / 1000 + growing.hooks.penalty()).backward()
    for a, e, b in growing.groups:
        for parameter, part in ((a, slice(1, None)), (e, slice(1, None)), (b.T, slice(1, None))):
            assert not parameter[part].any()
            assert parameter[0].any(), "and the first one is trained"
        for whole, lies in ((a, 0), (e, 0), (b, 1)):
            state = growing.optimizer.state[whole]
            for tensor in (whole.grad, state["exp_avg"], state["exp_avg_sq"]):
                first, *others = tensor.unbind(lies)
                assert first.any()
                assert not any(other.any() for other in others)


@every_kind
@pytest.mark.parametrize("max_ratio", [1.0, 2.0])
def test_scale_is_that_of_lora_whatever_ranks_there_are(kind: str, max_ratio: float) -> None:
    """Added by hand to the base's weights, at α/r."""
    growing, base = grown(kind, max_ratio), make_base(kind)
    for path, (a, e, b) in triplets(growing.model, "default").items():
        delta = ALPHA / R * (b @ torch.diag(e.flatten()) @ a)
        weight = base.model.get_submodule(path).weight
        weight.data += delta.T if kind == "gpt2" else delta
    expected = output_of(base.model, kind)
    assert not torch.allclose(expected, output_of(make_base(kind).model, kind), atol=1e-3)
    torch.testing.assert_close(growing.adapted.output(), expected, rtol=1e-4, atol=1e-4)


def grown(kind: str, max_ratio: float = 2.0) -> Growing:
    """As after training: some groups have more ranks and some less, all of them values."""
    growing = Growing(kind, max_ratio=max_ratio, top_h=100, tinit=1, tfinal=1, delta_t=3)
    growing.train(8)
    generator = torch.Generator().manual_seed(7)
    for k, (a, e, b) in enumerate(growing.groups):
        r = 1 + k % round(max_ratio * R)
        a.data[:], e.data[:], b.data[:] = 0.0, 0.0, 0.0
        a.data[:r] = 0.3 * torch.randn(a[:r].shape, generator=generator)
        e.data[:r] = 0.3 * torch.randn(e[:r].shape, generator=generator)
        b.data[:, :r] = 0.3 * torch.randn(b[:, :r].shape, generator=generator)
    return growing


# ---- growth -----------------------------------------------------------------------------------


class Reference:
    """Scores and ranks by the method, from the gradients that a step had."""

    def __init__(self, growing: Growing, r: int, top_h: int, most: int) -> None:
        self.ranks = [1] * len(growing.groups)
        self.average, self.deviation = [0.0] * len(self.ranks), [0.0] * len(self.ranks)
        self.r, self.top_h, self.most = r, top_h, most

    def see(self, groups: list[Any]) -> None:
        for k, group in enumerate(groups):
            n = self.ranks[k]
            parts = [
                (p[:, :n], p.grad[:, :n]) if i == 2 else (p[:n], p.grad[:n])
                for i, p in enumerate(group)
            ]
            entries = torch.cat([(p * g).abs().flatten() for p, g in parts]).double()
            mean = entries.mean().item()
            self.average[k] = 0.85 * self.average[k] + 0.15 * mean
            self.deviation[k] = 0.85 * self.deviation[k] + 0.15 * abs(mean - self.average[k])

    def grow(self) -> None:
        left = self.r * len(self.ranks) - sum(self.ranks)
        scores = [a * d for a, d in zip(self.average, self.deviation, strict=True)]
        able = [k for k in range(len(scores)) if self.ranks[k] < self.most]
        for k in sorted(able, key=lambda k: -scores[k])[: min(self.top_h, left)]:
            self.ranks[k] += 1


@pytest.mark.parametrize("sharing", ["own", "LSS only"])
def test_most_important_groups_grow_by_one_until_there_are_r_on_average(sharing: str) -> None:
    growing = Growing(sharing=sharing, steps=60, top_h=3, tinit=4, tfinal=8, delta_t=2)
    reference = Reference(growing, R, 3, MOST)
    seen = growing.hooks.after_backward

    def watched(step: int) -> None:
        if sum(reference.ranks) < R * len(reference.ranks):
            reference.see(growing.groups)
        seen(step)

    growing.hooks.after_backward = watched
    history = []
    for step in range(1, 61):
        growing.train(1)
        if 4 < step <= 52 and step % 2 == 0:
            reference.grow()
        assert growing.ranks == growing.hooks.ranks == reference.ranks
        history.append(sum(growing.ranks))
    groups = len(growing.plan.groups)
    assert history[:5] == [groups] * 5
    assert history[5] == groups + 3
    assert history[-1] == R * groups
    assert max(growing.ranks) > R > min(growing.ranks), "some have more and some less"
    assert all(
        existing(*group)[:r].all() for group, r in zip(growing.groups, growing.ranks, strict=True)
    )
    require_tied(growing.model, growing.adapted)


@pytest.mark.parametrize(("max_ratio", "most"), [(1.0, R), (1.5, 6)])
@pytest.mark.parametrize("top_h", [1, 7, 100])
def test_no_group_grows_beyond_the_largest_rank_and_the_total_is_met(
    max_ratio: float, most: int, top_h: int
) -> None:
    growing = Growing(
        steps=80,
        max_ratio=max_ratio,
        top_h=top_h,
        tinit=1,
        tfinal=40 if top_h > 1 else 4,
        delta_t=2,
    )
    growing.train(80)
    assert sum(growing.ranks) == R * len(growing.ranks)
    assert max(growing.ranks) <= most


def test_new_rank_is_drawn_anew_and_changes_next_to_nothing() -> None:
    growing = Growing(top_h=100, tinit=2, tfinal=10, delta_t=4)
    growing.train(5)
    before = growing.adapted.output()
    groups = [tuple(p.clone() for p in group) for group in growing.groups]
    growing.optimizer.step = lambda: None  # type: ignore[method-assign]
    growing.train(1)
    drawn = []
    for (a, e, b), (a_before, e_before, b_before) in zip(growing.groups, groups, strict=True):
        torch.testing.assert_close(e[1:R], torch.full_like(e[1:R], 1e-5))
        assert torch.equal(a[:1], a_before[:1])
        assert torch.equal(e[:1], e_before[:1])
        assert torch.equal(b[:, :1], b_before[:, :1])
        drawn += [a[1:R].flatten(), b[:, 1:R].flatten()]
    assert float(torch.cat(drawn).std()) == pytest.approx(0.02, rel=0.1)
    assert len({float(part[0]) for part in drawn}) == len(drawn), "each group by itself"
    torch.testing.assert_close(growing.adapted.output(), before, rtol=0, atol=1e-4)
    assert not torch.equal(growing.adapted.output(), before)


def test_penalty_is_the_mean_distance_of_grown_factors_from_orthonormal_ones() -> None:
    growing = grown("llama")
    growing.hooks._look()
    distances = []
    for a, e, b in growing.groups:
        kept = (e != 0).flatten()
        for rows in (a[kept], b[:, kept].T):
            distances.append((rows @ rows.T - torch.eye(len(rows))).square().sum().sqrt())
    torch.testing.assert_close(growing.hooks.penalty(), 0.1 * torch.stack(distances).mean())
    assert Growing(orth_reg_weight=0.0).hooks.penalty() is None


@pytest.mark.parametrize(
    ("options", "max_steps", "lacking", "expected"),
    [
        ({}, 20_000, 504, (2_000, 100, 80, 7)),
        ({}, 100_000, 504, (10_000, 100, 400, 3)),
        ({}, 100, 36, (10, 4, 10, 4)),
        ({}, 6, 36, (1, 1, 2, 18)),
        ({"tinit": 0, "tfinal": 1, "delta_t": 5, "top_h": 2}, 16, 6, (0, 5, 3, 2)),
    ],
)
def test_schedule_follows_from_the_length_of_the_trial(
    options: dict[str, Any], max_steps: int, lacking: int, expected: tuple[int, ...]
) -> None:
    growth = Growth.of(IncreLoraOptions(**options), max_steps, lacking)
    assert tuple(growth) == expected
    tinit, delta_t, rounds, top_h = expected
    grown = [growth.grown(step) for step in range(1, max_steps + 1)]
    assert [g for g in grown if g is not None] == [top_h * n for n in range(1, rounds + 1)]
    assert grown[tinit + delta_t - 1] == top_h


# ---- what is left of it -----------------------------------------------------------------------


@every_kind
def test_of_ranks_that_are_not_there_nothing_is_stored_and_loading_restores_the_rest(
    kind: str, tmp_path: Path
) -> None:
    growing = grown(kind)
    save(growing.model, tmp_path / "one")
    stored = load_file(tmp_path / "one" / "adapter.safetensors")
    values = sum(
        r * (a.shape[1] + len(b) + 1)
        for (a, _, b), r in zip(growing.groups, growing.ranks, strict=True)
    )
    stored_bytes = sum(t.numel() * t.element_size() for t in stored.values())
    assert stored_bytes == 4 * values + len(growing.groups), "a byte for each group's eight ranks"
    loaded = load_adapter(make_base(kind).model, tmp_path / "one").eval()
    assert torch.equal(output_of(loaded, kind), growing.adapted.output())
    require_tied(loaded, growing.adapted)
    own = trainable_parameters(growing.model)
    for name, parameter in trainable_parameters(loaded).items():
        assert torch.equal(parameter, own[name])
    save(loaded, tmp_path / "two")
    one, two = (tmp_path / name / "adapter.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    card = (tmp_path / "one" / "README.md").read_text()
    assert f"{sum(growing.ranks)} of {MOST * len(growing.ranks)} ranks" in card


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
@every_kind
def test_peft_alone_loads_the_grown_ranks(kind: str, tmp_path: Path) -> None:
    growing = Growing(kind, top_h=3, tinit=2, tfinal=2, delta_t=1)
    growing.train(20)
    growing.adapted.save_plain(tmp_path)
    plain = PeftModel.from_pretrained(make_base(kind).model, tmp_path).eval()
    torch.testing.assert_close(
        output_of(plain, kind), growing.adapted.output(), rtol=1e-4, atol=1e-4
    )
    for path, group in triplets(growing.model, "default").items():
        layer = plain.get_base_model().get_submodule(path)
        assert len(layer.lora_E["default"]) == existing(*group).sum()


@every_kind
def test_factors_merging_and_disabling_are_those_of_the_grown_ranks(kind: str) -> None:
    growing, base = grown(kind), output_of(make_base(kind).model, kind)
    expected = growing.adapted.output()
    for path, (a, _, _) in triplets(growing.model, "default").items():
        layer = growing.model.get_base_model().get_submodule(path)
        factors = IncreLora().factors(layer, "default")
        assert 1 <= len(factors.a) < len(a) or growing.ranks.count(MOST)
        delta, product = layer.get_delta_weight("default"), factors.scale * factors.b @ factors.a
        torch.testing.assert_close(product, delta.T if layer.fan_in_fan_out else delta)
    with growing.model.disable_adapter():
        assert torch.equal(growing.adapted.output(), base)
    merged = copy.deepcopy(growing.model).merge_and_unload()
    torch.testing.assert_close(output_of(merged, kind), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(output_of(growing.model.unload(), kind), base)


# ---- trials -----------------------------------------------------------------------------------


def trial(increlora: dict[str, Any] | None = None, **training: Any) -> TrialConfig:
    config = small_trial(training.pop("topology", "none"), **training)
    adapter = AdapterConfig(
        family="increlora",
        target_modules=("query", "value"),
        increlora=increlora or {},  # type: ignore[arg-type]
    )
    return config.model_copy(update={"adapter": adapter})


SHORT = {"tinit": 1, "tfinal": 2, "delta_t": 1, "top_h": 8}
TRAINING = {"max_steps": 8, "weight_decay": 0.1, "eval_every": None, "checkpoint_every": 2}


def ranks_of(file: Path) -> list[int]:
    return [t.numel() for key, t in load_file(file).items() if key.endswith(".lora_E")]


@pytest.fixture(scope="module")
def small() -> Any:
    """Base and data of a small trial."""
    return load_small()


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("precision", "stops"), [("fp32", (3, 5, 8)), ("bf16", (3, 5, 8))])
def test_trial_resumed_amid_growth_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, small: Any, precision: str, stops: tuple[int, ...]
) -> None:
    """From the last even step before: 2, 4 or 6; it grows after steps 2 to 6."""
    base, data = small if precision == "fp32" else load_small(torch.bfloat16)
    config = with_training(trial(SHORT, **TRAINING), precision=precision)
    plan = plan_of(config, base, data)
    left = {}
    for stop in (None, *stops):
        place = TrialFolder(tmp_path / f"{stop or 0:05d}")
        if stop:
            train_until(stop, base, data, plan, config, place)
        trained = run_trial(base, data, plan, config, place, Reports())
        file = place.adapter / "adapter.safetensors"
        left[stop] = trained.losses, trained.evaluations, file.read_bytes()
        assert left[stop] == left[None]
    ranks = ranks_of(file)
    assert len(ranks) == 12
    assert sum(ranks) == 12 * 4, "exactly r on average"
    assert len(set(ranks)) > 1


def train_shared(folder: Path, group: Any, world: int, stage: int = 2) -> dict[str, Any]:
    base, data = load_small()
    config = trial(SHORT, topology="all", **TRAINING)
    config = with_training(config, num_workers=world, zero_stage=stage, learning_rate=1e-3)
    plan = plan_of(config, base, data)
    place = TrialFolder(folder / f"{world}{stage:04d}")
    losses = run_trial(base, data, plan, config, place, Reports(), group).losses
    return {"losses": losses, "ranks": ranks_of(place.adapter / "adapter.safetensors")}


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_two_workers_and_every_stage_grow_the_same_ranks(tmp_path: Path) -> None:
    first, second = in_two(__name__, tmp_path)
    assert first == second
    for stage in FAMILIES["increlora"].zero_stages:
        alone = train_shared(tmp_path, None, 1, stage)
        assert first["ranks"] == alone["ranks"]
        assert first["losses"] == pytest.approx(alone["losses"], abs=1e-3)
    assert sum(first["ranks"]) == 2 * 4


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "max_steps", "reason"),
    [
        ({}, 3, None),
        ({}, 2, "got tinit=1, delta_t=1, tfinal=1 and max_steps=2"),
        ({"tinit": 3, "tfinal": 3}, 6, "got tinit=3, delta_t=1, tfinal=3 and max_steps=6"),
        ({"delta_t": 40}, 80, "got tinit=8, delta_t=40, tfinal=40 and max_steps=80"),
        ({"delta_t": 32}, 80, None),
    ],
)
def test_schedule_must_leave_steps_for_growth(
    options: dict[str, Any], max_steps: int, reason: str | None
) -> None:
    config = trial(options, max_steps=max_steps, warmup_steps=0)
    if reason is None:
        require_possible_trial(config)
        return
    with pytest.raises(ValueError, match=reason):
        require_possible_trial(config)


def test_growth_that_cannot_reach_the_rank_is_refused_with_what_would() -> None:
    base = make_base("llama")
    plan = build_plan(find_targets(base.model, ("k_proj",)), PlanConfig(r=4))
    refused, enough = (
        trial({"top_h": h, "delta_t": 2, "tinit": 1, "tfinal": 1}, max_steps=10) for h in (2, 3)
    )
    IncreLora().require_reaches(plan, enough)
    message = (
        r"r=4 on average, 12 more ranks in 4 groups; got `top_h`=2, which in 4 growths \(every 2 "
        r"steps of max_steps=10\) makes 8\. Raise `increlora.top_h` to 3"
    )
    with pytest.raises(ValueError, match=message):
        IncreLora().require_reaches(plan, refused)


def test_growth_that_cannot_reach_the_rank_is_refused_before_anything_is_trained(
    tmp_path: Path, small: Any
) -> None:
    base, data = small
    config = trial({"top_h": 1}, max_steps=12)
    plan = plan_of(config, base, data)
    with pytest.raises(ValueError, match=r"12 groups; got `top_h`=1, which in 5 growths"):
        run_trial(base, data, plan, config, TrialFolder(tmp_path), Reports())


def test_stage_3_and_ranks_allocated_by_gradients_are_refused_with_the_reason() -> None:
    for stage in (0, 1, 2):
        require_possible_trial(with_training(trial(), zero_stage=stage))
    with pytest.raises(ValueError, match=r"IncreLoRA can't be.*stage 3 partitions them"):
        require_possible_trial(with_training(trial(), zero_stage=3))
    with pytest.raises(ValueError, match=r"IncreLoRA can't follow.*allocates its own"):
        require_possible_trial(trial(topology="e2"))


def test_groups_of_several_ranks_are_refused() -> None:
    base = make_base("llama")
    config = AdapterConfig(family="increlora", target_modules=("k_proj",))
    groups = tuple(
        {"module": "k_proj", "layers": layers, "r": r} for layers, r in (((0, 1), 4), ((2, 3), 2))
    )
    options = PlanConfig(topology="explicit", groups=groups, r=4)  # type: ignore[arg-type]
    plan = build_plan(find_targets(base.model, ("k_proj",)), options)
    with pytest.raises(ValueError, match=r"must have the same rank.*ranks \[2, 4\].*the same r"):
        adapt(base.model, plan, config, in_loop=True)


def test_hooks_take_the_averaged_rank_from_the_plan() -> None:
    assert isinstance(Growing().hooks, IncreLoraHooks)
    assert Growing().hooks.target == R * len(Growing().plan.groups)
    assert TRIPLET == ("lora_A", "lora_E", "lora_B")
