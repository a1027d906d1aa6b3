"""What a task says of one row that a model was scored on, and means over rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class RowScore(NamedTuple):
    """One row.

    Attributes:
        outcomes: numbers by the metric that is their mean over rows, as 1 right and 0 wrong under
            ``accuracy``. Paired tests compare them row by row.
        loss: summed over ``supervised`` samples (1) or tokens.
        prediction, expected: what the model said and what was right, as JSON.
    """

    outcomes: Mapping[str, float]
    loss: float
    supervised: int
    prediction: Any = None
    expected: Any = None

    def judged(self, judgement: Judgement) -> RowScore:
        """With what was found of the answer that the model wrote."""
        return self._replace(
            outcomes={**self.outcomes, **judgement.outcomes},
            prediction=judgement.prediction,
            expected=judgement.expected,
        )


class Judgement(NamedTuple):
    """Of what a model wrote for one row; the fields are those of :class:`RowScore`."""

    outcomes: Mapping[str, float]
    prediction: Any
    expected: Any


Outcomes = dict[str, list[float]]
"""By metric, a number for each row that has one, in row order."""


def outcomes_of(scores: Sequence[RowScore]) -> Outcomes:
    """
    >>> outcomes_of([RowScore({"nll": 1.5, "right": 1.0}, 3.0, 2), RowScore({"nll": 2.0}, 2.0, 1)])
    {'nll': [1.5, 2.0], 'right': [1.0]}
    """
    columns: Outcomes = {}
    for score in scores:
        for name, value in score.outcomes.items():
            columns.setdefault(name, []).append(value)
    return columns


def mean_outcomes(scores: Sequence[RowScore]) -> dict[str, float]:
    """Of each metric, over the rows that have it."""
    return {name: math.fsum(column) / len(column) for name, column in outcomes_of(scores).items()}


def mean_loss(scores: Sequence[RowScore]) -> float:
    """The mean over all supervised samples or tokens, as in training: long rows weigh more.

    >>> mean_loss([RowScore({"nll": 2.0}, loss=2.0, supervised=1), RowScore({"nll": 0.5}, 1.5, 3)])
    0.875
    """
    total = math.fsum(score.loss for score in scores)
    return total / sum(score.supervised for score in scores)
