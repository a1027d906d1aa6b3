"""Classification of one text, or a pair of texts, into any number of labels.

The metrics are those of :mod:`e2lora.tasks.labels`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from e2lora.config import TextClassificationConfig
from e2lora.tasks.labels import Labels, label_losses
from e2lora.tasks.scores import RowScore
from e2lora.tasks.texts import Texts


class TextClassification(Texts):
    """See :class:`e2lora.tasks.Task` and :class:`e2lora.tasks.labels.Labels`."""

    config: TextClassificationConfig
    label_dtype = np.int64

    def _learn_labels(self, splits: Mapping[str, Any]) -> None:
        config = self.config
        self._labels = Labels(splits, config.label_column, config, config.metric)
        self.labels, self.num_labels = self._labels.values, len(self._labels)
        self.directions = self._labels.directions

    def _numbers(self, values: Sequence[Any]) -> list[int]:
        return self._labels.numbers(values)

    def loss_sum(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return label_losses(self._logits(model, batch), batch["labels"]).sum()

    def score(self, model: Any, batch: dict[str, Tensor]) -> list[RowScore]:
        return self._labels.score(self._logits(model, batch), batch["labels"])

    def metrics(self, scores: Sequence[RowScore]) -> dict[str, float]:
        return self._labels.metrics(scores)
