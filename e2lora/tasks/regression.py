"""Regression: one text, or a pair of texts, to a number.

Trained on the squared error, in float32 whatever the weights are in. Metrics: ``pearson`` and
``spearman`` (up), ``mse`` and ``loss``, which are the same (down), ``mean_baseline``, the mse of
always answering the mean of the split, and ``score``: the correlation that the task is judged by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from e2lora.config import RegressionConfig
from e2lora.tasks.metrics import correlations
from e2lora.tasks.rows import require_filled
from e2lora.tasks.scores import RowScore, mean_loss, mean_outcomes
from e2lora.tasks.task import Direction
from e2lora.tasks.texts import Texts


class Regression(Texts):
    """See :class:`e2lora.tasks.Task`."""

    config: RegressionConfig
    label_dtype = np.float32
    num_labels = 1
    directions: Mapping[str, Direction | None] = {
        "score": "maximize",
        "pearson": "maximize",
        "spearman": "maximize",
        "mse": "minimize",
        "loss": "minimize",
        "mean_baseline": None,
    }

    def _learn_labels(self, splits: Mapping[str, Any]) -> None:
        for split, rows in splits.items():
            if rows is not None:
                self._require_numbers(rows, split)

    def _require_numbers(self, rows: Any, split: str) -> None:
        column, data = self.config.label_column, self.config.data
        require_filled(rows, [column], (int, float), split, self.config)
        labels = np.array(rows[column][:], np.float64)
        for number in np.flatnonzero(~np.isfinite(labels))[:1].tolist():
            raise ValueError(
                f"every row needs a finite number in {column!r}; {split} row {number} of {data!r} "
                f"has {labels[number]}: {rows[number]}. Correct or drop the row."
            )
        if len(labels) > 1 and np.ptp(labels) == 0:
            raise ValueError(
                f"regression needs numbers that differ; column {column!r} of {data!r} holds only "
                f"{labels[0]:g} in its {len(labels):,} {split} rows. Name the right "
                "`label_column`, or a split whose labels are published."
            )

    def _numbers(self, values: Sequence[Any]) -> list[float]:
        return [float(value) for value in values]

    def loss_sum(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return (self._logits(model, batch).squeeze(-1) - batch["labels"]).square().sum()

    def score(self, model: Any, batch: dict[str, Tensor]) -> list[RowScore]:
        answers = self._logits(model, batch).squeeze(-1)
        errors = (answers - batch["labels"]).square()
        return [
            RowScore({"mse": error}, error, 1, prediction=answer, expected=label)
            for error, answer, label in zip(
                errors.tolist(), answers.tolist(), batch["labels"].tolist(), strict=True
            )
        ]

    def metrics(self, scores: Sequence[RowScore]) -> dict[str, float]:
        expected = [score.expected for score in scores]
        metrics = correlations(expected, [score.prediction for score in scores])
        return {
            "score": metrics[self.config.metric],
            **metrics,
            **mean_outcomes(scores),
            "loss": mean_loss(scores),
            "mean_baseline": float(np.var(expected)),
        }
