"""Ranks under a budget: what the allocation promises, for any weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e2lora.ranks import ALLOCATIONS, BUDGETS, allocate_ranks, entropy_power, literal, softmax

# A busy machine makes examples slow: that says nothing about the code.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

entropies = st.floats(-20.0, 5.0)


@st.composite
def problems(draw: Any, entropy: Any = entropies) -> tuple[list[float], list[int], int, int]:
    """Entropies and lengths of some intervals, a base rank, and the largest rank a weight has."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    values = draw(st.lists(entropy, min_size=len(lengths), max_size=len(lengths)))
    max_rank = draw(st.integers(1, 40))
    return values, lengths, draw(st.integers(1, max_rank)), max_rank


def solve(
    values: list[float],
    lengths: list[int],
    r: int,
    max_rank: int,
    allocation: str = "entropy_power",
    budget: str = "layer",
) -> list[int]:
    available, costs = BUDGETS[budget](lengths, r)
    weights = ALLOCATIONS[allocation](values, min(values), 0.5)
    return allocate_ranks(weights, costs, available, max_rank)


every_allocation = pytest.mark.parametrize("allocation", ALLOCATIONS)
every_budget = pytest.mark.parametrize("budget", BUDGETS)
NEGATIVE = st.floats(-20.0, -0.1)


@every_budget
@every_allocation
@given(problem=problems(NEGATIVE))
def test_more_entropy_never_gets_less_rank_except_as_printed(
    allocation: str, budget: str, problem: Any
) -> None:
    values, *_ = problem
    ranks = solve(*problem, allocation, budget)
    for high, rank_of_high in zip(values, ranks, strict=True):
        for low, rank_of_low in zip(values, ranks, strict=True):
            if high > low + 1e-9:
                if allocation == "literal":
                    assert rank_of_high <= rank_of_low
                else:
                    assert rank_of_high >= rank_of_low


@every_budget
@given(problem=problems())
def test_ranks_lie_between_one_and_the_weights_size(budget: str, problem: Any) -> None:
    *_, max_rank = problem
    ranks = solve(*problem, budget=budget)
    assert min(ranks) >= 1
    assert max(ranks) <= max_rank


@every_budget
@every_allocation
@given(problem=problems(NEGATIVE))
def test_budget_is_kept_and_missed_by_less_than_one_grant(
    allocation: str, budget: str, problem: Any
) -> None:
    _, lengths, r, max_rank = problem
    available, costs = BUDGETS[budget](lengths, r)
    ranks = solve(*problem, allocation, budget)
    shortfall = available - sum(c * k for c, k in zip(costs, ranks, strict=True))
    assert shortfall >= 0
    growing = [cost for cost, rank in zip(costs, ranks, strict=True) if rank < max_rank]
    assert not growing or shortfall < max(growing)


@every_budget
@given(problem=problems())
def test_ranks_never_fall_as_the_base_rank_rises(budget: str, problem: Any) -> None:
    values, lengths, _, max_rank = problem
    before = [1] * len(lengths)
    for r in range(1, max_rank + 1):
        ranks = solve(values, lengths, r, max_rank, budget=budget)
        assert all(new >= old for new, old in zip(ranks, before, strict=True))
        before = ranks
    assert before == [max_rank] * len(lengths)


@given(entropies, st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(1, 16))
def test_one_length_and_one_entropy_give_the_base_rank(
    entropy: float, lengths: list[int], r: int
) -> None:
    equal = [3] * len(lengths)
    for budget in ("layer", "interval"):
        assert solve([entropy] * len(equal), equal, r, 64, budget=budget) == [r] * len(equal)


def test_budgets_of_one_partition_as_by_hand() -> None:
    """Intervals of 3, 1 and 2 layers at r = 4, all of one entropy: 6·4 = 24 layer ranks, 3·4 = 12
    interval ranks, and 24 ranks as plain LoRA's six layers have."""
    equal = [-5.0, -5.0, -5.0]
    assert solve(equal, [3, 1, 2], 4, 64, budget="layer") == [4, 4, 4]
    assert solve(equal, [3, 1, 2], 4, 64, budget="interval") == [4, 4, 4]
    assert solve(equal, [3, 1, 2], 4, 64, budget="parameter") == [8, 8, 8]


def test_grants_of_a_small_problem_as_by_hand() -> None:
    """Weights ½, 1, ½, costs 2, 2, 1, budget 20; weight/(rank + ½) decides:

    ranks 1 1 1 spend 5. Interval 1 at .667 → 2 (7), at .400 → 3 (9); interval 0 at .333 → 2 (11),
    interval 2 at .333 → 2 (12); interval 1 at .286 → 4 (14), at .222 → 5 (16); interval 0 at .200
    → 3 (18), interval 2 at .200 → 3 (19); interval 1 at .182 would spend 21: stop.
    """
    assert allocate_ranks([0.5, 1.0, 0.5], [2, 2, 1], budget=20, max_rank=8) == [3, 5, 3]


def test_cheaper_grant_is_never_taken_in_place_of_one_too_dear() -> None:
    """One unit is left: interval 0 comes next and costs 2, so interval 1 doesn't get it."""
    assert allocate_ranks([1.0, 0.1], [2, 1], budget=4, max_rank=8) == [1, 1]


def test_first_grant_is_weighed_like_the_later_ones() -> None:
    """1/1.5 = .667, then 1/2.5 = .4 before .5/1.5 = .333: both grants go to interval 0."""
    assert allocate_ranks([1.0, 0.5], [1, 1], budget=4, max_rank=8) == [3, 1]


def test_ties_go_to_the_earliest_interval() -> None:
    assert allocate_ranks([1.0, 1.0, 1.0], [1, 1, 1], budget=5, max_rank=8) == [2, 2, 1]


def test_full_interval_leaves_the_rest_to_the_others() -> None:
    assert allocate_ranks([1000.0, 1.0], [1, 1], budget=8, max_rank=4) == [4, 4]


@every_allocation
def test_weights_are_positive_even_for_far_entropies(allocation: str) -> None:
    """The contract of every entry of the registry."""
    weights = ALLOCATIONS[allocation]([-90.0, -20.0, -10.0], -90.0, 0.5)
    assert min(weights) > 0
    assert max(weights) < math.inf


@pytest.mark.parametrize("name", BUDGETS)
def test_budget_pays_at_least_rank_one(name: str) -> None:
    """The contract of every entry of the registry."""
    available, costs = BUDGETS[name]([3, 1, 2], 1)
    assert available >= sum(costs)
    assert len(costs) == 3


@given(st.lists(st.floats(1e-6, 1e2), min_size=1, max_size=6), st.floats(0, 2))
def test_entropy_power_is_proportional_to_sigma_to_the_beta(stds: list[float], beta: float) -> None:
    weights = entropy_power([math.log(std) for std in stds], 0.0, beta)
    for std, weight in zip(stds, weights, strict=True):
        assert math.isclose(weight, (std / max(stds)) ** beta, rel_tol=1e-9)


def test_negative_beta_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 0.*got -1"):
        entropy_power([0.0], 0.0, beta=-1)


def test_softmax_spans_e_squared_whatever_the_spread_and_is_uniform_without_one() -> None:
    for values in ([-9.0, -5.0, -1.0], [-5.0002, -5.0001, -5.0]):
        weights = softmax(values, -9.0, 0.5)
        assert weights[-1] / weights[0] == pytest.approx(math.e**2)
        assert math.fsum(weights) == pytest.approx(1.0)
    assert softmax([-5.0, -5.0], -9.0, 0.5) == [0.5, 0.5]


@pytest.mark.parametrize("values", [[-1.0, 2.0], [0.0, 0.0], [-1.0, 0.0]])
def test_printed_allocation_refuses_entropies_of_both_signs(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"one sign.*'entropy_power'"):
        literal(values, min(values), 0.5)
