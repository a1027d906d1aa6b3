"""Fronts, intervals and tests against independent references."""

from __future__ import annotations

import math
from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e2lora.statistics import holm, paired_test, pareto_front, proportion_interval

# A busy machine makes examples slow: that says nothing about the code.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=15)
binary = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30)
p_values = st.lists(st.floats(0, 1), max_size=8)


@given(points)
def test_front_holds_exactly_the_points_that_none_dominates(values: list[tuple[int, int]]) -> None:
    def dominates(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a[0] >= b[0] and a[1] <= b[1] and a != b

    expected = [i for i, b in enumerate(values) if not any(dominates(a, b) for a in values)]
    assert pareto_front(values, ["maximize", "minimize"]) == expected


def test_equal_points_all_stay_on_the_front() -> None:
    assert pareto_front([(1, 2), (1, 2), (0, 3)], ["maximize", "minimize"]) == [0, 1]


def test_direction_decides_which_end_is_the_front() -> None:
    values = [(0, 0), (1, 1)]
    assert pareto_front(values, ["minimize", "minimize"]) == [0]
    assert pareto_front(values, ["maximize", "maximize"]) == [1]
    assert pareto_front(values, ["maximize", "minimize"]) == [0, 1]


def test_points_that_cannot_be_ordered_are_refused() -> None:
    with pytest.raises(ValueError, match="'max'"):
        pareto_front([(1,)], ["max"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="none of them NaN"):
        pareto_front([(1.0, math.nan)], ["maximize", "minimize"])
    with pytest.raises(ValueError, match="needs 2 numbers"):
        pareto_front([(1.0,)], ["maximize", "minimize"])


@given(st.integers(1, 2000), st.data())
def test_interval_is_wilsons(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    z, p = 1.959963984540054, k / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = proportion_interval(k, n)
    assert math.isclose(low, max(centre - half, 0), abs_tol=1e-9)
    assert math.isclose(high, min(centre + half, 1), abs_tol=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_impossible_counts_are_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} of {n}"):
        proportion_interval(successes, n)


@given(binary)
def test_mcnemar_is_the_sign_test_of_discordant_items(items: list[tuple[int, int]]) -> None:
    a, b = zip(*items, strict=True)
    won, lost = sum(x > y for x, y in items), sum(x < y for x, y in items)
    m = won + lost
    tail = sum(comb(m, k) for k in range(min(won, lost) + 1)) / 2**m
    test = paired_test(a, b)
    assert math.isclose(test.p_value, min(2 * tail, 1.0), rel_tol=1e-9)
    assert math.isclose(test.difference, (won - lost) / len(items), abs_tol=1e-12)
    assert test.n == len(items)


def test_interval_of_paired_proportions_is_bonett_and_prices() -> None:
    """n = 100, 15 won, 5 lost: (16 − 6)/102 ± 1.96 √((22/102 − (10/102)²)/102) = 0.098 ± 0.088."""
    a = [1] * 15 + [0] * 5 + [1] * 80
    b = [0] * 15 + [1] * 5 + [1] * 80
    low, high = paired_test(a, b).interval
    assert math.isclose(low, 0.0099423, abs_tol=1e-6)
    assert math.isclose(high, 0.1861361, abs_tol=1e-6)


def test_systems_that_agree_on_all_items_still_have_an_interval() -> None:
    test = paired_test([1, 0, 1, 1] * 25, [1, 0, 1, 1] * 25)
    assert (test.difference, test.p_value) == (0.0, 1.0)
    assert test.interval.low < 0 < test.interval.high


@given(binary)
def test_exchanging_the_systems_mirrors_the_result(items: list[tuple[int, int]]) -> None:
    a, b = zip(*items, strict=True)
    forward, backward = paired_test(a, b), paired_test(b, a)
    assert forward.difference == -backward.difference
    assert forward.p_value == backward.p_value
    assert math.isclose(forward.interval.low, -backward.interval.high, abs_tol=1e-12)


def test_permutation_test_of_few_items_counts_all_sign_flips() -> None:
    a, b = np.array([1.5, 2.5, 0.5, 3.0, 2.0, 1.0]), np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.5])
    d = a - b
    sums = [abs(np.dot(signs, d)) for signs in product((1, -1), repeat=len(d))]
    expected = np.mean([total >= abs(d.sum()) - 1e-12 for total in sums])
    test = paired_test(a, b)
    assert test.method == "paired permutation test"
    assert math.isclose(test.p_value, expected, rel_tol=1e-9)
    assert math.isclose(test.difference, d.mean())


def test_bootstrap_interval_of_many_items_is_near_the_normal_one() -> None:
    d = np.random.default_rng(1).normal(0.1, 1.0, 2000)
    half = 1.96 * d.std() / math.sqrt(len(d))
    low, high = paired_test(d, np.zeros_like(d)).interval
    assert math.isclose(low, d.mean() - half, abs_tol=0.005)
    assert math.isclose(high, d.mean() + half, abs_tol=0.005)


def test_paired_test_is_the_same_each_time() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=50), rng.normal(size=50)
    assert paired_test(a, b) == paired_test(a, b)


def test_exact_test_keeps_its_level() -> None:
    """With no difference, at most 5 % of tests find one (200 simulated pairs: 10, allow 18)."""
    rng = np.random.default_rng(0)
    found = sum(
        paired_test(rng.random(300) < 0.8, rng.random(300) < 0.8).p_value < 0.05 for _ in range(200)
    )
    assert found <= 18


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 0], [1], r"\(2,\) and \(1,\)"),
        ([1, math.nan], [1, 0], "finite"),
        ([], [], "at least 1"),
        ([0.5], [0.1], "at least 2"),
    ],
)
def test_outcomes_that_cannot_be_paired_are_refused(
    a: list[float], b: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        paired_test(a, b)


def test_holm_of_a_table_as_by_hand() -> None:
    """Sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, and the last may not fall below."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(p_values, st.floats(0.001, 0.2))
def test_holm_rejects_what_the_step_down_procedure_rejects(
    values: list[float], level: float
) -> None:
    """The procedure as published: go up from the smallest p while p ≤ level/(m − i)."""
    rejected: set[int] = set()
    order = sorted(range(len(values)), key=lambda k: values[k])
    for i, k in enumerate(order):
        if values[k] * (len(values) - i) > level:
            break
        rejected.add(k)
    assert {k for k, p in enumerate(holm(values)) if p <= level} == rejected


@given(p_values)
def test_adjusting_never_lowers_a_p_value(values: list[float]) -> None:
    assert all(p <= q <= 1 for p, q in zip(values, holm(values), strict=True))


def test_p_value_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]; got 1.5"):
        holm([0.5, 1.5])
