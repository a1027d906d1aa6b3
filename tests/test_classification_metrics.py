"""Metrics of labels and of numbers, against tables written out by hand and plain loops."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from e2lora.tasks.metrics import correlations, label_metrics

# ---- labels -----------------------------------------------------------------------------------

# How many rows of label i (line) were answered with label j (column), and what comes of it.
TABLES = {
    "two labels": (
        [[50, 10], [5, 35]],
        {
            "f1": 70 / 85,  # 2·35 of 2·35 + 10 + 5
            "macro_f1": (100 / 115 + 70 / 85) / 2,
            "mcc": (50 * 35 - 10 * 5) / math.sqrt(60 * 40 * 55 * 45),
            "majority_baseline": 0.6,
        },
    ),
    "all right": (
        [[3, 0], [0, 1]],
        {"f1": 1.0, "macro_f1": 1.0, "mcc": 1.0, "majority_baseline": 0.75},
    ),
    "all wrong": (
        [[0, 2], [2, 0]],
        {"f1": 0.0, "macro_f1": 0.0, "mcc": -1.0, "majority_baseline": 0.5},
    ),
    "always the first label": (
        [[6, 0], [4, 0]],
        {"f1": 0.0, "macro_f1": 12 / 16 / 2, "mcc": 0.0, "majority_baseline": 0.6},
    ),
    "always the second label": (
        [[0, 6], [0, 4]],
        {"f1": 8 / 14, "macro_f1": 8 / 14 / 2, "mcc": 0.0, "majority_baseline": 0.6},
    ),
    "one label only, and it was answered": (
        [[5, 0], [0, 0]],
        {"f1": 0.0, "macro_f1": 1.0, "mcc": 0.0, "majority_baseline": 1.0},
    ),
    "three labels": (
        [[4, 1, 0], [2, 2, 1], [0, 0, 2]],
        {
            "macro_f1": (8 / 11 + 4 / 8 + 4 / 5) / 3,
            # (c·s − Σ pₖtₖ) / √((s² − Σ pₖ²)(s² − Σ tₖ²)), with 8 of 12 right
            "mcc": (8 * 12 - (6 * 5 + 3 * 5 + 3 * 2))
            / math.sqrt((144 - (36 + 9 + 9)) * (144 - (25 + 25 + 4))),
            "majority_baseline": 5 / 12,
        },
    ),
    "a third label that doesn't occur": (
        [[1, 1, 0], [0, 2, 0], [0, 0, 0]],
        {
            "macro_f1": (2 / 3 + 4 / 5) / 2,
            "mcc": (3 * 4 - (1 * 2 + 3 * 2)) / math.sqrt((16 - 10) * (16 - 8)),
            "majority_baseline": 0.5,
        },
    ),
}


def rows_of(table: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """What is expected and what was answered, row by row."""
    pairs = [
        (i, j) for i, line in enumerate(table) for j, count in enumerate(line) for _ in range(count)
    ]
    random.Random(0).shuffle(pairs)
    return [i for i, _ in pairs], [j for _, j in pairs]


@pytest.mark.parametrize("case", TABLES)
def test_label_metrics_are_those_of_the_written_table(case: str) -> None:
    table, expected = TABLES[case]
    assert label_metrics(*rows_of(table), len(table)) == pytest.approx(expected)


@pytest.mark.parametrize("num_labels", [2, 3, 7])
@pytest.mark.parametrize("answers", ["any", "constant", "mostly right"])
def test_label_metrics_are_those_of_sklearn_and_of_the_formulas(
    num_labels: int, answers: str
) -> None:
    rng = np.random.default_rng(num_labels)
    expected = rng.integers(0, num_labels, 200)
    predicted = {
        "any": rng.integers(0, num_labels, 200),
        "constant": np.full(200, num_labels - 1),
        "mostly right": np.where(rng.random(200) < 0.8, expected, 0),
    }[answers]
    found = label_metrics(expected.tolist(), predicted.tolist(), num_labels)
    assert ("f1" in found) == (num_labels == 2)
    if num_labels == 2:
        assert found["f1"] == pytest.approx(sklearn_metrics.f1_score(expected, predicted))
    macro = sklearn_metrics.f1_score(expected, predicted, average="macro", zero_division=0.0)
    assert found["macro_f1"] == pytest.approx(macro)
    assert found["mcc"] == pytest.approx(sklearn_metrics.matthews_corrcoef(expected, predicted))
    assert found["mcc"] == pytest.approx(_covariance_of_labels(expected, predicted))


def _covariance_of_labels(expected: np.ndarray, predicted: np.ndarray) -> float:
    """Matthews' correlation for any number of labels, as of indicator columns (Gorodkin, 2004)."""
    labels = np.union1d(expected, predicted)
    x, y = ((side[:, None] == labels).astype(float) for side in (expected, predicted))
    x, y = x - x.mean(0), y - y.mean(0)
    scale = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum()) / scale if scale else 0.0


# ---- numbers ----------------------------------------------------------------------------------


def pearson_by_loop(x: Sequence[float], y: Sequence[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    pairs = [(a - mean_x, b - mean_y) for a, b in zip(x, y, strict=True)]
    scale = math.sqrt(sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs))
    return sum(a * b for a, b in pairs) / scale


def ranks_by_loop(x: Sequence[float]) -> list[float]:
    """Equal numbers share the mean of their ranks."""
    return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]


@pytest.mark.parametrize("relation", ["none", "near", "against", "ties", "curved"])
def test_correlations_are_those_of_plain_loops_and_of_scipy(relation: str) -> None:
    rng = np.random.default_rng(3)
    expected = rng.choice(np.arange(26) / 5, 120)  # as of STS-B: 0 to 5 with many ties
    predicted = {
        "none": rng.normal(size=120),
        "near": expected + rng.normal(size=120),
        "against": 2 - 3 * expected,
        "ties": np.round(expected + rng.normal(size=120)),
        "curved": np.exp(expected),
    }[relation]
    found = correlations(expected.tolist(), predicted.tolist())
    x, y = expected.tolist(), predicted.tolist()
    assert found == pytest.approx(
        {
            "pearson": pearson_by_loop(x, y),
            "spearman": pearson_by_loop(ranks_by_loop(x), ranks_by_loop(y)),
        }
    )
    assert found["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)


@pytest.mark.parametrize(
    ("expected", "predicted"),
    [([1.0, 2.0], [3.5, 3.5]), ([2.0, 2.0], [1.0, 3.0]), ([1.0], [2.0])],
    ids=["constant answers", "constant labels", "one row"],
)
def test_correlation_without_variance_is_zero(
    expected: list[float], predicted: list[float], recwarn: pytest.WarningsRecorder
) -> None:
    assert correlations(expected, predicted) == {"pearson": 0.0, "spearman": 0.0}
    assert not recwarn.list


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_predictions_are_not_taken_for_a_correlation_of_zero(broken: float) -> None:
    assert all(map(math.isnan, correlations([1, 2, 3], [1, broken, 3]).values()))
