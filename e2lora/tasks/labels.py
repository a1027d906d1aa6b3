"""The labels of a classification task: read from its rows, and what is said of a model's logits.

Metrics: ``accuracy``, ``macro_f1``, ``mcc``, of two labels ``f1`` (all up), ``loss`` (down),
``majority_baseline`` for comparison, and ``score``: whichever of them the task is judged by, under
a name that tasks with different metrics share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from e2lora.config import TaskConfig
from e2lora.tasks.metrics import label_metrics
from e2lora.tasks.rows import require_filled
from e2lora.tasks.scores import RowScore, mean_outcomes
from e2lora.tasks.task import Direction


class Labels:
    """Of the training file, whatever is carved from it: the head's size depends on no seed.

    Args:
        splits: as they were read, not yet carved: messages number rows as the files do.
        column: of the labels: words, or integers.
        metric: what the task is judged by.

    Attributes:
        values: the labels in order; a head's logits are in the same one.

    Raises:
        ValueError: fewer than two labels, a row without one, one that no training row has, or a
            metric that so many labels don't have.
    """

    def __init__(
        self, splits: Mapping[str, Any], column: str, config: TaskConfig, metric: str
    ) -> None:
        for split, rows in splits.items():
            if rows is not None:
                kind = str if isinstance(rows[0][column], str) else int
                require_filled(rows, [column], kind, split, config)
        self.values: list[Any] = sorted(set(splits["train"][column][:]))
        if len(self.values) < 2:
            raise ValueError(
                f"classification needs at least two labels; column {column!r} of {config.data!r} "
                f"holds only {self.values}. Name the right `label_column`."
            )
        self._numbers = {value: number for number, value in enumerate(self.values)}
        for split, rows in splits.items():
            if rows is not None:
                self._require_known(rows, column, split)
        self.metric = metric
        self.directions: dict[str, Direction | None] = {
            "score": "maximize",
            "accuracy": "maximize",
            **({"f1": "maximize"} if len(self) == 2 else {}),
            "macro_f1": "maximize",
            "mcc": "maximize",
            "loss": "minimize",
            "majority_baseline": None,
        }
        if metric not in self.directions:
            raise ValueError(
                f"metric 'f1' is that of the second of two labels; {config.display_name!r} has "
                f"{len(self)}. Set metric='macro_f1', or another one."
            )

    def __len__(self) -> int:
        return len(self.values)

    def _require_known(self, rows: Any, column: str, split: str) -> None:
        values = rows[column][:]
        unknown = set(values) - self._numbers.keys()
        for number in [i for i, value in enumerate(values) if value in unknown][:1]:
            raise ValueError(
                f"every label of the {split} rows must occur in the training rows; row {number} "
                f"has {values[number]!r}: {rows[number]}. Known: {self.values[:10]}. Correct the "
                "row or the split."
            )

    def numbers(self, values: Sequence[Any]) -> list[int]:
        """The place of each label in the order."""
        return [self._numbers[value] for value in values]

    def score(self, logits: Tensor, labels: Tensor) -> list[RowScore]:
        """
        Args:
            logits: float32, [rows, labels].
            labels: their numbers, int64, [rows].
        """
        losses = label_losses(logits, labels).tolist()
        answers, right = logits.argmax(-1).tolist(), labels.tolist()
        return [
            # accuracy first: paired tests take it where a metric has no value per row
            RowScore(
                outcomes={"accuracy": float(answer == label), "loss": loss},
                loss=loss,
                supervised=1,
                prediction=self.values[answer],
                expected=self.values[label],
            )
            for answer, label, loss in zip(answers, right, losses, strict=True)
        ]

    def metrics(self, scores: Sequence[RowScore]) -> dict[str, float]:
        """All of ``directions``."""
        expected = self.numbers([score.expected for score in scores])
        predicted = self.numbers([score.prediction for score in scores])
        metrics = {**mean_outcomes(scores), **label_metrics(expected, predicted, len(self))}
        return {"score": metrics[self.metric], **metrics}


def label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each row, [rows]."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
