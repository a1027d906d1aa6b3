"""Metrics that are no mean over rows, as a mean over rows: what each row adds to them.

A metric θ of n rows gets one *pseudo-outcome* per row, θ plus the row's influence: n times what θ
gains by weight on that row (the infinitesimal jackknife: Jaeckel 1972; Efron 1982, The Jackknife,
the Bootstrap and Other Resampling Plans, chapter 6). Their mean is θ, and their variance over n
estimates θ's; so tests and bootstraps of a mean speak of the metric. The pseudo-values of the
ordinary jackknife, nθ − (n − 1)θ₍₋ᵢ₎, differ from them by terms that vanish with n, and jump where
a label has a single row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def pseudo_outcomes(
    metric_name: str, predictions: Sequence[Any], expected: Sequence[Any]
) -> Floats | None:
    """One number per row, in row order, whose mean is the metric; [n].

    ``f1`` is that of the second of two labels in order, ``macro_f1`` over the labels that occur.
    All as :mod:`e2lora.tasks.metrics` has them: where a metric is undefined it is 0, and all
    pseudo-outcomes are.

    Args:
        metric_name: one of ``PSEUDO_METRICS``.
        predictions, expected: labels, or numbers for a correlation; as ``predictions.jsonl`` has
            them.

    Returns:
        None for any other metric (a mean over rows has outcomes of its own), and where the rows
        don't show what the metric is of: ``f1`` without exactly two labels.

    Raises:
        ValueError: no rows, or not as many predictions as right answers; numbers not finite.

    >>> [round(value, 2) for value in pseudo_outcomes("f1", [0, 0, 1, 1], [0, 1, 1, 1]).tolist()]
    [0.8, 0.16, 1.12, 1.12]
    >>> pseudo_outcomes("accuracy", [0, 1], [1, 1]) is None
    True
    """
    if metric_name not in PSEUDO_METRICS:
        return None
    if not len(predictions) == len(expected) > 0:
        raise ValueError(
            f"{metric_name} needs a prediction for each right answer, and at least one; got "
            f"{len(predictions)} and {len(expected)}. Read both from the same file."
        )
    return PSEUDO_METRICS[metric_name](predictions, expected)


def _numbered(*columns: Sequence[Any]) -> tuple[int, list[NDArray[np.intp]]]:
    """How many labels occur, and each column as their places in order."""
    labels = sorted({label for column in columns for label in column})
    places = {label: place for place, label in enumerate(labels)}
    return len(labels), [np.array([places[v] for v in column]) for column in columns]


def _f1(predictions: Sequence[Any], expected: Sequence[Any]) -> Floats | None:
    num_labels, (said, right) = _numbered(predictions, expected)
    if num_labels != 2:
        return None
    return _ratio(2.0 * (said & right), said + right)


def _ratio(above: NDArray[Any], below: NDArray[Any]) -> Floats:
    """Of mean(above) / mean(below)."""
    ratio = above.mean() / below.mean()
    return np.asarray(ratio + (above - ratio * below) / below.mean())


def _macro_f1(predictions: Sequence[Any], expected: Sequence[Any]) -> Floats:
    # The mean over labels of _ratio: a row enters that of its label and of the one it is given.
    num_labels, (said, right) = _numbered(predictions, expected)
    n, hit = len(said), said == right
    below = np.bincount(said, minlength=num_labels) + np.bincount(right, minlength=num_labels)
    f1 = 2.0 * np.bincount(right[hit], minlength=num_labels) / below
    weight = n / (below * num_labels)
    gains = 2.0 * hit * weight[right] - (f1 * weight)[right] - (f1 * weight)[said]
    return np.asarray(f1.mean() + gains)


def _mcc(predictions: Sequence[Any], expected: Sequence[Any]) -> Floats:
    # Matthews' correlation of any number of labels (Gorodkin 2004): a covariance over the root of
    # two variances, of shares; each share moves by (row's indicator − share).
    num_labels, (said, right) = _numbered(predictions, expected)
    n, hit = len(said), said == right
    p, t = (np.bincount(column, minlength=num_labels) / n for column in (said, right))
    together, spread_p, spread_t = float(p @ t), 1 - float(p @ p), 1 - float(t @ t)
    if num_labels < 2 or min(len(set(said)), len(set(right))) < 2:
        return np.zeros(n)
    scale = np.sqrt(spread_p * spread_t)
    mcc = (hit.mean() - together) / scale
    covariance = hit - hit.mean() - (t[said] + p[right] - 2 * together)
    variances = (1 - spread_p - p[said]) / spread_p + (1 - spread_t - t[right]) / spread_t
    return np.asarray(mcc + covariance / scale - mcc * variances)


def _pearson(predictions: Sequence[Any], expected: Sequence[Any]) -> Floats:
    said, right = _finite(predictions), _finite(expected)
    if np.ptp(said) == 0 or np.ptp(right) == 0:
        return np.zeros(len(said))
    x, y = _standardised(said), _standardised(right)
    r = (x * y).mean()
    return np.asarray(r + x * y - r * (x**2 + y**2) / 2)


def _spearman(predictions: Sequence[Any], expected: Sequence[Any]) -> Floats:
    # Pearson's of the ranks; and a row lifts the ranks of all above it, by half those it ties with.
    said, right = _finite(predictions), _finite(expected)
    if np.ptp(said) == 0 or np.ptp(right) == 0:
        return np.zeros(len(said))
    ranks = [_ranks(said), _ranks(right)]
    x, y = (_standardised(rank) for rank in ranks)
    r = (x * y).mean()
    lifted_x = _lifted(said, (y - r * x) / ranks[0].std())
    lifted_y = _lifted(right, (x - r * y) / ranks[1].std())
    own = x * y - r * (x**2 + y**2) / 2
    return np.asarray(r + own + lifted_x + lifted_y)


def _finite(values: Sequence[Any]) -> Floats:
    numbers = np.asarray(values, dtype=float)
    if not np.isfinite(numbers).all():
        raise ValueError(
            "a correlation is one of finite numbers; got NaN or infinity. Leave out the trial that "
            "they are of: its weights are broken."
        )
    return numbers


def _standardised(values: Floats) -> Floats:
    return np.asarray((values - values.mean()) / values.std())


def _ranks(values: Floats) -> Floats:
    """Rows below, and half of those that tie."""
    ordered = np.sort(values)
    return np.asarray(
        (np.searchsorted(ordered, values) + np.searchsorted(ordered, values, "right")) / 2
    )


def _lifted(values: Floats, slopes: Floats) -> Floats:
    """Of each row: the sum of the slopes of the rows above it, and half of those that tie."""
    order = np.argsort(values, kind="stable")
    sums = np.concatenate([[0.0], np.cumsum(slopes[order])])
    ordered = values[order]
    below = sums[np.searchsorted(ordered, values)]
    up_to = sums[np.searchsorted(ordered, values, "right")]
    return np.asarray(sums[-1] - (below + up_to) / 2)


PSEUDO_METRICS: dict[str, Callable[[Sequence[Any], Sequence[Any]], Floats | None]] = {
    "f1": _f1,
    "macro_f1": _macro_f1,
    "mcc": _mcc,
    "pearson": _pearson,
    "spearman": _spearman,
}
"""Metric → its pseudo-outcomes."""
