"""Early stopping as pure functions of a trial's evaluations, so that a resumed trial agrees."""

from __future__ import annotations

from collections.abc import Sequence

from e2lora.config import EarlyStopping
from e2lora.records import Evaluation


def best_of(evaluations: Sequence[Evaluation], stopping: EarlyStopping | None) -> Evaluation:
    """The one whose weights are kept: the first of the best, or the last one without stopping."""
    if stopping is None:
        return evaluations[-1]
    best = evaluations[0]
    for evaluation in evaluations[1:]:
        if stopping.is_better(evaluation.metrics[stopping.metric], best.metrics[stopping.metric]):
            best = evaluation
    return best


def is_over(evaluations: Sequence[Evaluation], stopping: EarlyStopping | None) -> bool:
    """Whether as many evaluations as ``patience`` have followed the best one."""
    if stopping is None or not evaluations:
        return False
    since = len(evaluations) - 1 - list(evaluations).index(best_of(evaluations, stopping))
    return since >= stopping.patience


def require_metric(stopping: EarlyStopping | None, known: Sequence[str]) -> None:
    """Refuse to watch what the task doesn't measure.

    Raises:
        ValueError: naming what it does.
    """
    if stopping and stopping.metric not in known:
        raise ValueError(
            "early stopping must watch a metric of the task; got metric="
            f"{stopping.metric!r}, it has {list(known)}. Correct `early_stopping.metric`."
        )
