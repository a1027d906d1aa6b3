"""What a task says of one row that a model was scored on, and means over rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class RowScore(NamedTuple):
    """One row: ``loss`` is summed over its ``supervised`` samples (1) or tokens.

    ``outcome`` is what paired tests compare, row by row: 1 right and 0 wrong, or a number of which
    a metric is the mean.
    """

    outcome: float
    loss: float
    supervised: int


def mean_outcome(scores: Sequence[RowScore]) -> float:
    return math.fsum(score.outcome for score in scores) / len(scores)


def mean_loss(scores: Sequence[RowScore]) -> float:
    """The mean over all supervised samples or tokens, as in training: long rows weigh more.

    >>> mean_loss([RowScore(outcome=2.0, loss=2.0, supervised=1), RowScore(0.5, 1.5, 3)])
    0.875
    """
    total = math.fsum(score.loss for score in scores)
    return total / sum(score.supervised for score in scores)
