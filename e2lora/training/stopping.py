"""Early stopping as pure functions of a trial's evaluations, so that a resumed trial agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

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


def require_metric(
    stopping: EarlyStopping | None, directions: Mapping[str, Literal["maximize", "minimize"] | None]
) -> None:
    """Refuse to watch what the task doesn't measure, or the wrong way.

    Args:
        directions: where better lies, of every metric of the task.

    Raises:
        ValueError: naming what it does.
    """
    if stopping is None:
        return
    if directions.get(stopping.metric) is None:
        known = [name for name, direction in directions.items() if direction]
        raise ValueError(
            "early stopping must watch a metric of the task; got metric="
            f"{stopping.metric!r}, it has {known}. Correct `early_stopping.metric`."
        )
    if stopping.direction != directions[stopping.metric]:
        raise ValueError(
            f"early stopping must know where better lies: the task's {stopping.metric!r} is one to "
            f"{directions[stopping.metric]}; got direction={stopping.direction!r}. Correct "
            "`early_stopping.direction`."
        )
