"""Metrics of labels and of numbers that are no means over rows; never NaN, whatever is answered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def label_metrics(
    expected: Sequence[int], predicted: Sequence[int], num_labels: int
) -> dict[str, float]:
    """``macro_f1``, ``mcc``, of two labels ``f1`` too, and ``majority_baseline``.

    ``f1`` is that of label 1. ``macro_f1`` is the mean over the labels that occur, expected or
    predicted. ``mcc`` is Matthews' correlation, for any number of labels; it is 0 where either side
    is always the same label. ``majority_baseline`` is the accuracy of always answering the most
    frequent expected label.

    >>> label_metrics([0, 1, 1, 1], [0, 0, 1, 1], num_labels=2)["f1"]
    0.8
    >>> label_metrics([0, 1, 1, 1], [1, 1, 1, 1], num_labels=2)["mcc"]
    0.0
    """
    from sklearn.metrics import f1_score, matthews_corrcoef  # slow to import

    occurring = sorted({*expected, *predicted})
    of_labels = f1_score(
        expected, predicted, labels=range(num_labels), average=None, zero_division=0.0
    )
    metrics = {"f1": float(of_labels[1])} if num_labels == 2 else {}
    return {
        **metrics,
        "macro_f1": float(np.mean(of_labels[occurring])),
        # which warns of a single label, and then is 0 too
        "mcc": float(matthews_corrcoef(expected, predicted)) if len(occurring) > 1 else 0.0,
        "majority_baseline": float(np.bincount(expected).max() / len(expected)),
    }


def correlations(expected: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """``pearson`` and ``spearman``: 0 where either side is always the same number.

    NaN only of predictions that aren't finite, which are the model's fault and not the answers'.

    >>> correlations([1, 2, 3, 4], [1, 4, 9, 16])["spearman"]
    1.0
    >>> correlations([1, 2, 3, 4], [7, 7, 7, 7])
    {'pearson': 0.0, 'spearman': 0.0}
    """
    from scipy.stats import pearsonr, spearmanr

    if not np.isfinite(predicted).all():
        return {"pearson": float("nan"), "spearman": float("nan")}
    if np.ptp(expected) == 0 or np.ptp(predicted) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(expected, predicted).statistic),
        "spearman": float(spearmanr(expected, predicted).statistic),
    }
