"""From profile to plan, by hand and for any profile; and what a plan must refuse."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from e2lora.adapters import count_adapter_parameters
from e2lora.config import PRESETS, AdapterConfig, ExplicitGroup, PlanConfig
from e2lora.moments import GradientProfile
from e2lora.plan import (
    Group,
    SharingPlan,
    build_plan,
    require_plan_fits,
    require_possible,
)
from tests.made_up import make_profile, make_targets

# A busy machine makes examples slow: that says nothing about the code.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

Q, V = "h.*.q", "h.*.v"
LORA, SHARED_A = (
    AdapterConfig(target_modules=("q", "v"), a_scope=scope) for scope in ("interval", "type")
)
stds = st.lists(st.floats(1e-8, 1e3), min_size=1, max_size=12)


def shape_of(plan: SharingPlan) -> list[tuple[tuple[int, ...], int]]:
    return [(group.layers, group.r) for group in plan.groups]


def test_e2_plan_of_five_layers_is_the_one_worked_out_by_hand() -> None:
    """σ = 1, 1, 4, 4, 1, base rank 4, weights 8 x 8. The numbers of each step:

    cuts: similarity 1 or log2(17/16) = 0.087; thresholds 0.544 at layer 0, 0.316 at layer 2;
    intervals (0, 1), (2, 3), (4). Weights √σ = 1, 2, 1, relative ½, 1, ½. Budget 5·4 = 20, one
    rank costs 2, 2, 1. Granted where weight/(rank + ½) is largest: ranks 3, 5, 3, which spend
    6 + 10 + 3 = 19; the next grant (interval 1, cost 2) would exceed 20. α = 16·rank/4.
    Parameters: (3 + 5 + 3)·(8 + 8) = 176, of LoRA's 5·4·16 = 320.
    """
    targets = make_targets(5)
    plan = build_plan(
        targets, PlanConfig(topology="e2", r=4), make_profile(targets, [1, 1, 4, 4, 1])
    )
    assert shape_of(plan) == [((0, 1), 3), ((2, 3), 5), ((4,), 3)]
    assert [group.lora_alpha for group in plan.groups] == [12.0, 20.0, 12.0]
    assert [(b.module_type, b.available, b.spent) for b in plan.budgets] == [(Q, 20, 19)]
    assert [b.shortfall for b in plan.budgets] == [1]
    assert (plan.parameters, plan.lora_parameters) == (176, 320)
    assert count_adapter_parameters(plan, LORA) == 176
    # A at type scope: one of the largest rank, 5·8, and B of each group, (3 + 5 + 3)·8.
    assert count_adapter_parameters(plan, SHARED_A) == 40 + 88


def test_interval_is_weighed_by_its_highest_entropy() -> None:
    """σ = 1, 1.3 and 4, 4: the weights' ratio is √(4/1.3) = 1.75, and not 2 as by the lowest.

    Both cost 2 of 32, so the ranks' sum is 16 and (r + ½) is shared as 1 : 1.75, 17/2.75 = 6.2:
    6 and 10. By the lowest entropy, or the first of the first order, 17/3 = 5.7: 5 and 11.
    """
    targets = make_targets(4, q=(16, 16))
    options = PlanConfig(topology="e2", r=8)
    for values in ([1.0, 1.3, 4.0, 4.0], [1.3, 1.0, 4.0, 4.0]):
        plan = build_plan(targets, options, make_profile(targets, values))
        assert shape_of(plan) == [((0, 1), 6), ((2, 3), 10)]


def test_each_module_type_is_partitioned_and_budgeted_alone() -> None:
    targets = make_targets(3, q=(8, 8), v=(16, 4))
    flat, steep = [1.0, 1.0, 1.0], [1.0, 1.0, 100.0]
    by_layer = [std for pair in zip(flat, steep, strict=True) for std in pair]
    plan = build_plan(targets, PlanConfig(topology="e2", r=2), make_profile(targets, by_layer))
    assert [group.layers for group in plan.groups_of(Q)] == [(0, 1, 2)]
    assert [group.layers for group in plan.groups_of(V)] == [(0, 1), (2,)]
    assert {b.module_type: b.available for b in plan.budgets} == {Q: 6, V: 6}


@given(stds, st.integers(1, 8))
def test_plan_covers_every_layer_once_and_keeps_its_budget(values: list[float], r: int) -> None:
    targets = make_targets(len(values))
    plan = build_plan(targets, PlanConfig(topology="e2", r=r), make_profile(targets, values))
    require_plan_fits(plan, targets)
    (budget,) = plan.budgets
    spent = sum(len(group.layers) * group.r for group in plan.groups)
    longest = max(len(group.layers) for group in plan.groups)
    assert (budget.spent, budget.shortfall) == (spent, len(values) * r - spent)
    assert plan.parameters == count_adapter_parameters(plan, LORA)
    assert 0 <= len(values) * r - spent < longest
    assert all(group.lora_alpha / group.r == pytest.approx(16.0 / r) for group in plan.groups)


@given(stds, st.integers(1, 8))
def test_plan_is_a_function_of_profile_and_options(values: list[float], r: int) -> None:
    """Bit for bit, through JSON, and whatever the order in which the profile lists its layers."""
    targets = make_targets(len(values))
    profile, options = make_profile(targets, values), PlanConfig(topology="e2", r=r)
    plan = build_plan(targets, options, profile)
    read = SharingPlan.model_validate_json(plan.model_dump_json(indent=1))
    assert read == plan
    assert read.fingerprint() == plan.fingerprint()
    reread = GradientProfile.model_validate_json(profile.model_dump_json())
    assert build_plan(targets, options, reread).fingerprint() == plan.fingerprint()
    shuffled = profile.model_copy(update={"layers": profile.layers[::-1]})
    assert build_plan(targets, options, shuffled).groups == plan.groups


@given(stds)
def test_no_e2_group_loses_rank_as_the_base_rank_rises(values: list[float]) -> None:
    targets = make_targets(len(values))
    profile = make_profile(targets, values)
    plans = [build_plan(targets, PlanConfig(topology="e2", r=r), profile) for r in range(1, 9)]
    for low, high in pairwise(plans):
        assert [g.layers for g in low.groups] == [g.layers for g in high.groups]
        assert all(a.r <= b.r for a, b in zip(low.groups, high.groups, strict=True))


def test_plan_says_which_profile_it_is_from_and_only_then() -> None:
    targets = make_targets(3)
    profile = make_profile(targets, [1, 2, 3])
    plan = build_plan(targets, PlanConfig(topology="e2"), profile)
    assert plan.profile_fingerprint == profile.fingerprint()
    assert build_plan(targets, PlanConfig(topology="none"), profile).profile_fingerprint is None


# ---- what E² is made of, and its controls -----------------------------------------------------

STDS = [1.0, 1, 4, 4, 1]
"""Of five layers: E² shares (0, 1), (2, 3) and (4,), see the first test."""


def plan_of(**options: object) -> SharingPlan:
    targets = make_targets(5, q=(64, 64))
    chosen = PlanConfig(**{"r": 4, **options})  # type: ignore[arg-type]
    return build_plan(targets, chosen, make_profile(targets, [1e-3 * std for std in STDS]))


def test_layer_sharing_alone_gives_every_interval_the_base_rank() -> None:
    for budget in ("layer", "interval", "parameter"):
        plan = plan_of(**PRESETS["lss_only"], budget=budget)
        assert shape_of(plan) == [((0, 1), 4), ((2, 3), 4), ((4,), 4)]
        assert plan.budgets == ()


def test_rank_allocation_alone_gives_every_layer_its_own_interval() -> None:
    """Weights ½, ½, 1, 1, ½ of 20 ranks: (r + ½) as 1 : 1 : 2 : 2 : 1 of 22.5, 3.2 and 6.4."""
    plan = plan_of(**PRESETS["hra_only"])
    assert shape_of(plan) == [((0,), 3), ((1,), 3), ((2,), 6), ((3,), 5), ((4,), 3)]
    assert plan.parameters == plan.lora_parameters


def test_allocation_and_beta_of_the_options_are_what_is_used() -> None:
    """`shifted`: H − H_min + 1.419 over the type's layers, so 1.419 and 1.419 + ln 4 = 2.805 of 20
    layer ranks; β = 1: weights 1 and 4 (r + ½ as 1 : 4 over lengths 2, 2, 1)."""
    shifted = plan_of(topology="e2", allocation="shifted")
    assert shape_of(shifted) == [((0, 1), 3), ((2, 3), 5), ((4,), 3)]
    steep = plan_of(topology="e2", beta=1.0)
    assert shape_of(steep) == [((0, 1), 2), ((2, 3), 7), ((4,), 2)]


def test_lowest_entropy_of_shifted_is_over_layers_not_intervals() -> None:
    """σ 1, e, e², e², so H 0, 1, 2, 2 above the lowest: intervals (0, 1) and (2, 3) have 1 and 2,
    weights 2.419 and 3.419 of 16 ranks: (r + ½) as those of 17, 7.0 and 10.0. Over intervals it
    would be 1.419 and 2.419: 6.3 and 10.7."""
    targets = make_targets(4, q=(64, 64))
    groups = tuple(ExplicitGroup(module="q", layers=part) for part in ((0, 1), (2, 3)))
    options = PlanConfig(
        topology="explicit", groups=groups, allocation="shifted", budget="interval", r=8
    )
    stds = [1e-4 * math.e**k for k in (0, 1, 2, 2)]
    plan = build_plan(targets, options, make_profile(targets, stds))
    assert [r for _, r in shape_of(plan)] == [7, 9]


def test_budgets_of_one_partition() -> None:
    """Weights ½, 1, ½. `interval`: 12 ranks, `parameter`: 20; (r + ½) as 1 : 2 : 1."""
    assert shape_of(plan_of(topology="e2", budget="interval")) == [
        ((0, 1), 3),
        ((2, 3), 6),
        ((4,), 3),
    ]
    parameter = plan_of(topology="e2", budget="parameter")
    assert shape_of(parameter) == [((0, 1), 5), ((2, 3), 10), ((4,), 5)]
    assert parameter.parameters == parameter.lora_parameters


def test_published_preset_gives_less_rank_to_more_entropy() -> None:
    plan = plan_of(**PRESETS["e2_published"])
    (low, _, _), (r_low, r_high, _) = zip(*shape_of(plan), strict=True)
    assert low == (0, 1)
    assert r_high < r_low


def test_random_and_matched_controls_differ_from_e2_only_in_where_they_cut() -> None:
    e2, matched = plan_of(topology="e2"), plan_of(topology="matched")
    drawn = plan_of(topology="random", partition_seed=3)
    for plan in (matched, drawn):
        assert len(plan.groups) == len(e2.groups)
        assert [b.available for b in plan.budgets] == [b.available for b in e2.budgets]
    assert [group.layers for group in matched.groups] == [(0, 1), (2, 3), (4,)]


def test_explicit_groups_may_bring_their_own_ranks() -> None:
    groups = (
        ExplicitGroup(module="q", layers=(0, 4), r=2),
        ExplicitGroup(module="q", layers=(1, 2, 3)),
    )
    plan = build_plan(make_targets(5), PlanConfig(topology="explicit", groups=groups, r=4))
    assert shape_of(plan) == [((0, 4), 2), ((1, 2, 3), 4)]
    assert [g.lora_alpha / g.r for g in plan.groups] == [4.0, 4.0]
    with pytest.raises(ValueError, match="nothing to allocate"):
        PlanConfig(topology="explicit", groups=groups, allocation="softmax")
    high = (ExplicitGroup(module="q", layers=(0, 1, 2, 3, 4), r=9),)
    with pytest.raises(ValueError, match="r=9 for h"):
        build_plan(make_targets(5), PlanConfig(topology="explicit", groups=high))


def test_explicit_groups_give_one_plan_however_they_are_written() -> None:
    """Also where grants tie: five equal layers, 5 ranks for two groups of one weight."""
    targets = make_targets(5)
    profile = make_profile(targets, [1.0] * 5)
    parts = [(0, 1, 2), (3, 4)]
    written = [parts, parts[::-1], [(2, 0, 1), (4, 3)]]
    plans = [
        build_plan(
            targets,
            PlanConfig(
                topology="explicit",
                groups=tuple(ExplicitGroup(module="q", layers=part) for part in layers),
                allocation="entropy_power",
                budget="parameter",
                r=1,
            ),
            profile,
        )
        for layers in written
    ]
    assert shape_of(plans[0]) == [((0, 1, 2), 3), ((3, 4), 2)]
    assert plans[0].groups == plans[1].groups == plans[2].groups


def test_explicit_group_of_a_module_that_is_not_adapted_is_refused() -> None:
    groups = tuple(ExplicitGroup(module=name, layers=(0, 1)) for name in ("q", "v"))
    with pytest.raises(ValueError, match=r"\['v'\] name none of \['h\.\*\.q'\]"):
        build_plan(make_targets(2), PlanConfig(topology="explicit", groups=groups))


def test_alpha_keeps_the_scale_of_the_base_rank_also_under_rslora() -> None:
    plain, rs = (plan_of(topology="e2", use_rslora=value) for value in (False, True))
    assert [g.lora_alpha / g.r for g in plain.groups] == pytest.approx([16 / 4] * 3)
    assert [g.lora_alpha / g.r**0.5 for g in rs.groups] == pytest.approx([16 / 4**0.5] * 3)


def test_what_can_be_known_without_gradients_is_refused_without_them() -> None:
    require_possible(make_targets(5), PlanConfig(topology="e2"))
    with pytest.raises(ValueError, match="r=9 for h"):
        require_possible(make_targets(5), PlanConfig(topology="e2", r=9))
    with pytest.raises(ValueError, match="num_intervals=6"):
        require_possible(
            make_targets(5), PlanConfig(topology="random", partition_seed=0, num_intervals=6)
        )


def test_softmax_of_nearly_equal_entropies_is_noted() -> None:
    targets = make_targets(4)
    profile = make_profile(targets, [1.0, 1.0, 1.001, 1.001])
    plan = build_plan(targets, PlanConfig(topology="none", allocation="softmax"), profile)
    assert "spreads their weights by e²" in plan.notes[0]
    assert build_plan(targets, PlanConfig(**PRESETS["hra_only"]), profile).notes == ()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"r":2,"lora_alpha":16.0}', '"r":3,"lora_alpha":24.0}', r"`parameters`.* 80; got 64"),
        ('"r":2,"lora_alpha":16.0}', '"r":9,"lora_alpha":72.0}', "r=9"),
        ('"r":2,"lora_alpha":16.0}', '"r":2,"lora_alpha":3.0}', "scale of the base rank, 16"),
        ('"lora_parameters":64', '"lora_parameters":1', "`lora_parameters`.* 64; got 1"),
    ],
)
def test_plan_whose_numbers_were_edited_is_refused(old: str, new: str, message: str) -> None:
    text = build_plan(make_targets(2), PlanConfig(r=2)).model_dump_json()
    edited = text.replace(old, new, 1)
    assert edited != text
    with pytest.raises(ValidationError, match=message):
        SharingPlan.model_validate_json(edited)


# ---- how stable a plan is ---------------------------------------------------------------------


def test_plan_says_how_much_it_would_change_between_folds() -> None:
    """Two folds cut before 2 and 4, the third only before 3: Jaccard 1, 0 and 0, so ⅓."""
    targets = make_targets(5, q=(64, 64))
    same, other = [1.0, 1, 4, 4, 1], [1.0, 1, 1, 4, 4]
    profile = make_profile(targets, same, folds=[same, same, other])
    found = build_plan(targets, PlanConfig(topology="e2", r=4), profile).stability
    assert found is not None
    assert found.jaccard == pytest.approx(1 / 3)
    (of_q,) = found.types
    assert of_q.cuts == {2: 2, 3: 1, 4: 2}
    assert of_q.plan_cuts == (2, 4)
    assert "Jaccard index 0.33" in found.verdict


def test_stability_is_told_only_where_there_are_folds_and_gradients_decide() -> None:
    targets = make_targets(3)
    alone = make_profile(targets, [1, 2, 3])
    assert build_plan(targets, PlanConfig(topology="e2"), alone).stability is None
    folded = make_profile(targets, [1, 2, 3], folds=[[1, 2, 3], [1, 2, 3]])
    assert build_plan(targets, PlanConfig(topology="none"), folded).stability is None
    ranks_only = build_plan(targets, PlanConfig(**PRESETS["hra_only"]), folded).stability
    assert ranks_only is not None
    assert "Cuts don't depend on gradients" in ranks_only.verdict


def test_fold_that_gives_no_plan_is_said_and_not_hidden() -> None:
    targets = make_targets(3)
    profile = make_profile(targets, [1, 2, 3], folds=[[1, 2, 3], [1, 0, 3]])
    plan = build_plan(targets, PlanConfig(topology="e2"), profile)
    assert plan.stability is None
    assert "stability is not known" in plan.notes[0]
    assert "h.1.q" in plan.notes[0]


def test_group_of_target_finds_the_group_that_holds_it() -> None:
    targets = make_targets(4, v=(8, 8))
    plan = build_plan(targets, PlanConfig(topology="blocks", block_size=2, r=2))
    owner = plan.group_of_target()
    assert (owner["h.2.v"].module_type, owner["h.2.v"].layers) == (V, (2, 3))
    assert owner["h.2.v"] is owner["h.3.v"]
    assert len(owner) == 8


# 12 layers of hidden size 768, query and value: the published counts of RoBERTa-base. The others
# by the formulas of each system, with in and out unequal so that they can't be confused.
COUNTS = [
    ("none", None, LORA, (768, 768), (768, 768), 8, 294_912),
    ("none", None, SHARED_A, (768, 768), (768, 768), 8, 159_744),
    ("none", None, LORA, (32, 24), (32, 8), 4, 4 * 12 * (32 + 24 + 32 + 8)),
    ("none", None, SHARED_A, (32, 24), (32, 8), 4, 4 * (32 + 32) + 4 * 12 * (24 + 8)),
    ("all", None, LORA, (32, 24), (32, 8), 4, 4 * (32 + 24 + 32 + 8)),
    ("all", None, SHARED_A, (32, 24), (32, 8), 4, 4 * (32 + 24 + 32 + 8)),
    ("blocks", 5, LORA, (32, 24), (32, 8), 4, 4 * 3 * (32 + 24 + 32 + 8)),
    ("blocks", 5, SHARED_A, (32, 24), (32, 8), 4, 4 * (32 + 32) + 4 * 3 * (24 + 8)),
]


@pytest.mark.parametrize(("topology", "size", "adapter", "q", "v", "r", "expected"), COUNTS)
def test_parameters_are_counted_as_the_formulas_say(
    topology: str,
    size: int | None,
    adapter: AdapterConfig,
    q: tuple[int, int],
    v: tuple[int, int],
    r: int,
    expected: int,
) -> None:
    options = PlanConfig(topology=topology, block_size=size, r=r)  # type: ignore[arg-type]
    plan = build_plan(make_targets(12, q, v), options)
    assert count_adapter_parameters(plan, adapter) == expected


def test_rank_above_the_weights_size_is_refused_with_the_largest_possible() -> None:
    targets = make_targets(2, q=(64, 64), v=(64, 4))
    for topology in ("none", "all"):
        with pytest.raises(ValueError, match=r"r=5 for h\.\*\.v \(4 x 64\).*Use r <= 4"):
            build_plan(targets, PlanConfig(topology=topology, r=5))
    build_plan(targets, PlanConfig(r=4))


@pytest.mark.parametrize(
    "options",
    [
        PlanConfig(topology="e2"),
        PlanConfig(**PRESETS["lss_only"]),
        PlanConfig(**PRESETS["hra_only"]),
        PlanConfig(topology="matched"),
        PlanConfig(topology="random", partition_seed=0),
        PlanConfig(topology="blocks", block_size=2, allocation="softmax"),
    ],
)
def test_plan_by_gradients_without_a_profile_is_refused(options: PlanConfig) -> None:
    with pytest.raises(ValueError, match=rf"'{options.topology}'.*needs a gradient profile"):
        build_plan(make_targets(2), options)


def test_profile_that_lacks_a_target_is_refused_by_name() -> None:
    targets = make_targets(3)
    profile = make_profile(targets[:2], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"lacks 1: h\.2\.q"):
        build_plan(targets, PlanConfig(topology="e2"), profile)


def test_profile_of_another_shape_is_refused() -> None:
    profile = make_profile(make_targets(2, q=(8, 16)), [1.0, 2.0])
    with pytest.raises(ValueError, match=r"same shape; it lacks 2: h\.0\.q, h\.1\.q"):
        build_plan(make_targets(2), PlanConfig(topology="e2"), profile)


def test_dead_gradient_is_refused_where_it_is_used() -> None:
    targets = make_targets(3)
    profile = make_profile(targets, [1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"h\.1\.q"):
        build_plan(targets, PlanConfig(topology="e2"), profile)
    build_plan(targets, PlanConfig(topology="none"), profile)


def test_unknown_key_in_a_plan_is_refused() -> None:
    text = build_plan(make_targets(2), PlanConfig()).model_dump_json()
    with pytest.raises(ValidationError, match="lora_alhpa"):
        SharingPlan.model_validate_json(text.replace('"lora_alpha"', '"lora_alhpa"'))


def test_plan_of_another_version_is_refused() -> None:
    text = build_plan(make_targets(2), PlanConfig()).model_dump_json()
    newer = text.replace('"version":2', '"version":3')
    assert newer != text
    with pytest.raises(ValidationError, match="version"):
        SharingPlan.model_validate_json(newer)


def test_plan_is_checked_against_the_model_both_ways() -> None:
    plan = build_plan(make_targets(3), PlanConfig(r=2))
    require_plan_fits(plan, make_targets(3))
    with pytest.raises(ValueError, match=r"only in the plan: \['h\.2\.q'\].*model: none \(1 and 0"):
        require_plan_fits(plan, make_targets(2))
    with pytest.raises(ValueError, match=r"only in the plan: none.*model: \['h\.3\.q'\]"):
        require_plan_fits(plan, make_targets(4))
    with pytest.raises(ValueError, match=re.escape("(3 and 3 in all)")):
        require_plan_fits(plan, make_targets(3, q=(8, 16)))


@pytest.mark.parametrize(
    ("layers", "culprit"),
    [
        pytest.param([(0, 1), (1, 2)], 1, id="layer 1 twice"),
        pytest.param([(0, 1, 1), (2,)], 1, id="layer 1 twice in one group"),
        pytest.param([(0,), (2,)], 1, id="layer 1 missing"),
        pytest.param([(0, 1), (2, 3)], 3, id="layer 3 unknown"),
    ],
)
def test_groups_that_do_not_cover_each_layer_once_are_refused(
    layers: list[tuple[int, ...]], culprit: int
) -> None:
    targets = make_targets(3)
    groups = tuple(Group(module_type=Q, layers=part, r=2, lora_alpha=4.0) for part in layers)
    plan = build_plan(targets, PlanConfig(r=2)).model_copy(update={"groups": groups})
    with pytest.raises(ValueError, match=rf"exactly once.*: \[\('h\.\*\.q', {culprit}\)\]"):
        require_plan_fits(plan, targets)
