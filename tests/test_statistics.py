"""Fronts, intervals and tests against independent references."""

from __future__ import annotations

import math
from itertools import product
from math import comb
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from e2lora.crossed import CrossedVariance
from e2lora.statistics import (
    SHARES,
    holm,
    mean_and_sd,
    paired_over_seeds,
    paired_test,
    pareto_front,
    proportion_interval,
    seed_interval,
)

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


# ---- over seeds and items -----------------------------------------------------------------------


def draw_table(
    rng: np.random.Generator, seeds: float, items: float, both: float, shape: tuple[int, int]
) -> NDArray[np.float64]:
    """Differences with these standard deviations of seeds, of items and of each alone."""
    return (
        seeds * rng.standard_normal((shape[0], 1))
        + items * rng.standard_normal(shape[1])
        + both * rng.standard_normal(shape)
    )


def over_seeds(table: NDArray[np.float64]) -> Any:
    return paired_over_seeds(table, np.zeros_like(table))


def test_variance_is_that_of_endless_two_level_resampling_without_its_biases() -> None:
    """Resampled as described: seeds, and items once for all seeds."""
    rng = np.random.default_rng(0)
    table = draw_table(rng, 1.0, 3.0, 2.0, (5, 30))
    means = np.empty(20_000)
    for k in range(len(means)):
        seeds, items = rng.integers(0, 5, 5), rng.integers(0, 30, 30)
        means[k] = table[np.ix_(seeds, items)].mean()
    v = CrossedVariance.of(table)
    endless = v.seeds * 4 / 5 + v.items * 29 / 30 + v.both * 4 / 5 * 29 / 30
    assert math.isclose(means.var(), endless, rel_tol=0.05)


def test_variance_of_the_mean_has_no_bias() -> None:
    """True: 1/5 + 9/30 + 4/150 = 0.5267; the bootstrap's own would be 0.58 or so."""
    rng = np.random.default_rng(0)
    found = [CrossedVariance.of(draw_table(rng, 1.0, 3.0, 2.0, (5, 30))) for _ in range(4000)]
    mean = np.mean([v.seeds + v.items - v.both for v in found])
    assert math.isclose(mean, 0.5267, rel_tol=0.02)


def test_where_items_agree_it_is_the_t_test_of_seeds() -> None:
    table = np.repeat([[1.0], [0.2], [0.5], [0.9], [-0.1]], 40, axis=1)
    expected = stats.ttest_1samp(table[:, 0], 0)
    test = over_seeds(table)
    assert math.isclose(test.p_value, expected.pvalue, rel_tol=1e-6)
    assert np.allclose(test.interval, expected.confidence_interval())


def test_where_seeds_agree_it_is_the_t_test_of_items() -> None:
    row = np.random.default_rng(0).normal(0.2, 1, 50)
    expected = stats.ttest_1samp(row, 0)
    test = over_seeds(np.tile(row, (5, 1)))
    assert math.isclose(test.p_value, expected.pvalue, rel_tol=1e-6)
    assert np.allclose(test.interval, expected.confidence_interval())


@given(st.integers(2, 6), st.integers(2, 40), st.integers(0, 99), st.booleans())
def test_interval_leaves_out_zero_exactly_where_p_is_below_its_level(
    num_seeds: int, n: int, seed: int, binary: bool
) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.random((num_seeds, n)), rng.random((num_seeds, n)) * rng.random()
    if binary:
        a, b = a > 0.5, b > 0.5
    test = paired_over_seeds(a, b)
    assert (test.p_value < 0.05) == (not test.interval.low <= 0 <= test.interval.high)
    assert math.isclose(test.difference, np.mean(a) - np.mean(b), abs_tol=1e-12)
    assert (test.n, test.num_seeds) == (n, num_seeds)
    mirrored = paired_over_seeds(b, a)
    assert math.isclose(mirrored.p_value, test.p_value, rel_tol=1e-6)
    assert math.isclose(mirrored.interval.low, -test.interval.high, abs_tol=1e-9)


@pytest.mark.parametrize(
    ("seeds", "items", "both"), [(1, 1, 1), (1, 8, 1), (0.5, 6, 8), (0, 5, 5), (1, 3, 0)]
)
def test_level_is_kept_with_five_seeds(seeds: float, items: float, both: float) -> None:
    """1000 tables without a difference, 40 items: 5 % are 50, 68 and more have a chance of 1 %.

    A normal critical value finds one in 93 of the first kind.
    """
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(1000):
        v = CrossedVariance.of(table := draw_table(rng, seeds, items, both, (5, 40)))
        found += abs(table.mean()) > v.critical_value(0.05) * v.error
    assert found < 68


@pytest.mark.parametrize("num_seeds", [2, 5])
def test_equal_outcomes_under_all_seeds_keep_a_width(num_seeds: int) -> None:
    a = np.tile([1, 0, 1, 1], (num_seeds, 25))
    test = paired_over_seeds(a, a)
    assert (test.difference, test.p_value) == (0.0, 1.0)
    assert test.interval.low < 0 < test.interval.high
    numbers = a * 0.3
    assert paired_over_seeds(numbers, numbers).p_value == 1.0
    assert paired_over_seeds(numbers + 0.5, numbers).p_value < 1e-9


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([[1, 0, 1]], [[1, 1, 1]], "at least 2 seeds.*Run more seeds"),
        ([[1], [0]], [[1], [1]], "1 item"),
        ([[1, 0], [1, 1]], [[1, 0]], r"\(2, 2\) and \(1, 2\)"),
        ([[1, 0], [1]], [[1, 0], [1, 1]], "same rows"),
        ([[1, 0], [1, math.nan]], [[1, 0], [1, 1]], "finite"),
        ([1, 0], [1, 1], "one row of outcomes per seed"),
    ],
)
def test_tables_that_are_not_crossed_are_refused(a: Any, b: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_over_seeds(a, b)


def test_interval_over_seeds_is_students() -> None:
    values = [0.81, 0.84, 0.79, 0.85, 0.82]
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert np.allclose(seed_interval(values), expected)
    assert seed_interval([0.4, 0.9], within=SHARES) == (0.0, 1.0), "no share lies beyond"
    assert np.allclose(mean_and_sd(values), (np.mean(values), np.std(values, ddof=1)))
    with pytest.raises(ValueError, match="at least 2 of them; got 1"):
        seed_interval([0.8])
