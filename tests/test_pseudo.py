"""Pseudo-outcomes of metrics against the metrics themselves, with weights on single rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import f1_score, matthews_corrcoef

from e2lora.pseudo import PSEUDO_METRICS, pseudo_outcomes
from e2lora.tasks.metrics import correlations, label_metrics

Floats = NDArray[np.float64]


def labels_of(n: int, num_labels: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """What was said and what is right, of a model that is right six times in ten."""
    rng = np.random.default_rng(seed)
    right = rng.integers(0, num_labels, n) * (rng.random(n) < 0.8)
    said = np.where(rng.random(n) < 0.6, right, rng.integers(0, num_labels, n))
    return said.tolist(), right.tolist()


def numbers_of(n: int, seed: int = 0) -> tuple[list[float], list[float]]:
    """With many ties."""
    rng = np.random.default_rng(seed)
    right = np.round(rng.normal(size=n), 1)
    return np.round(right + rng.normal(size=n), 1).tolist(), right.tolist()


def weighted_pearson(x: Floats, y: Floats, w: Floats) -> float:
    x, y, w = x - w @ x / w.sum(), y - w @ y / w.sum(), w / w.sum()
    return float(w @ (x * y) / math.sqrt((w @ x**2) * (w @ y**2)))


def weighted_spearman(x: Floats, y: Floats, w: Floats) -> float:
    def ranks(v: Floats) -> Floats:
        return ((v[:, None] > v) + (v[:, None] == v) / 2) @ w

    return weighted_pearson(ranks(x), ranks(y), w)


WEIGHTED: dict[str, Callable[[Any, Any, Floats], float]] = {
    "f1": lambda said, right, w: f1_score(right, said, sample_weight=w),
    "macro_f1": lambda said, right, w: f1_score(right, said, sample_weight=w, average="macro"),
    "mcc": lambda said, right, w: matthews_corrcoef(right, said, sample_weight=w),
    "pearson": lambda said, right, w: weighted_pearson(np.array(said), np.array(right), w),
    "spearman": lambda said, right, w: weighted_spearman(np.array(said), np.array(right), w),
}


def rows_of(metric: str, n: int, num_labels: int = 2, seed: int = 0) -> tuple[list[Any], list[Any]]:
    if metric in ("pearson", "spearman"):
        return numbers_of(n, seed)
    return labels_of(n, num_labels, seed)


def metric_of(metric: str, said: list[Any], right: list[Any]) -> float:
    """As tasks report it."""
    if metric in ("pearson", "spearman"):
        return correlations(right, said)[metric]
    return label_metrics(right, said, len({*said, *right}))[metric]


@pytest.mark.parametrize(
    ("metric", "num_labels"),
    [
        *(("f1", 2), ("mcc", 2), ("macro_f1", 2), ("mcc", 5), ("macro_f1", 5)),
        *(("pearson", 0), ("spearman", 0)),
    ],
)
def test_pseudo_outcome_is_the_metric_and_what_weight_on_the_row_adds(
    metric: str, num_labels: int
) -> None:
    n, step = 60, 1e-5
    said, right = rows_of(metric, n, num_labels)
    found, ones = pseudo_outcomes(metric, said, right), np.ones(n)
    value = WEIGHTED[metric](said, right, ones)
    for row in range(0, n, 4):
        moved = step * np.eye(n)[row]
        up, down = (WEIGHTED[metric](said, right, ones + sign * moved) for sign in (1, -1))
        assert math.isclose(found[row], value + n * (up - down) / (2 * step), abs_tol=1e-5)


@pytest.mark.parametrize("metric", PSEUDO_METRICS)
def test_mean_is_the_metric_that_tasks_report(metric: str) -> None:
    for num_labels in (2, 4):
        if num_labels == 4 and metric == "f1":
            continue
        said, right = rows_of(metric, 2000, num_labels)
        found = pseudo_outcomes(metric, said, right)
        assert math.isclose(found.mean(), metric_of(metric, said, right), abs_tol=1e-12)


@pytest.mark.parametrize("metric", PSEUDO_METRICS)
def test_pseudo_values_of_the_jackknife_are_near(metric: str) -> None:
    """nθ − (n − 1)θ₍₋ᵢ₎, each row left out in turn."""
    n = 60
    said, right = rows_of(metric, n)
    found, value = pseudo_outcomes(metric, said, right), metric_of(metric, said, right)
    without = [
        metric_of(metric, said[:row] + said[row + 1 :], right[:row] + right[row + 1 :])
        for row in range(n)
    ]
    jackknife = n * value - (n - 1) * np.array(without)
    assert np.corrcoef(found, jackknife)[0, 1] > 0.99
    assert math.isclose(found.std(), jackknife.std(), rel_tol=0.05)


@pytest.mark.parametrize("metric", PSEUDO_METRICS)
def test_their_variance_over_n_is_the_metrics(metric: str) -> None:
    """Over 400 samples of 300 rows: the standard deviation has an error of 3.5 %."""
    values, errors = [], []
    for seed in range(400):
        said, right = rows_of(metric, 300, seed=seed)
        outcomes = pseudo_outcomes(metric, said, right)
        values.append(outcomes.mean())
        errors.append(outcomes.std() / math.sqrt(300))
    assert math.isclose(np.std(values), np.mean(errors), rel_tol=0.12)


def test_labels_may_be_words_and_f1_is_that_of_the_second() -> None:
    said, right = labels_of(50, 2)
    words = [[("no", "yes")[label] for label in labels] for labels in (said, right)]
    for metric in ("f1", "macro_f1", "mcc"):
        expected = pseudo_outcomes(metric, said, right)
        assert np.array_equal(pseudo_outcomes(metric, *words), expected)


@pytest.mark.parametrize("metric", ["mcc", "pearson", "spearman"])
def test_where_the_metric_is_undefined_all_are_zero_as_it_is(metric: str) -> None:
    assert not pseudo_outcomes(metric, [1, 1, 1, 1], [0, 1, 0, 1]).any()
    assert not pseudo_outcomes(metric, [0, 1, 0, 1], [1, 1, 1, 1]).any()


def test_what_has_no_pseudo_outcomes_gets_none() -> None:
    assert pseudo_outcomes("accuracy", [0, 1], [0, 1]) is None
    assert pseudo_outcomes("f1", [0, 1, 2], [0, 1, 2]) is None
    assert pseudo_outcomes("f1", [1, 1], [1, 1]) is None


def test_rows_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 and 3"):
        pseudo_outcomes("mcc", [0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="at least one; got 0 and 0"):
        pseudo_outcomes("pearson", [], [])
    with pytest.raises(ValueError, match="finite numbers"):
        pseudo_outcomes("pearson", [0.0, math.nan], [0.0, 1.0])
