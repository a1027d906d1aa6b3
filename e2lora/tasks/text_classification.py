"""Classification of one text, or a pair of texts, into any number of labels.

Metrics: ``accuracy`` (up), ``loss`` (down), and ``majority_baseline``, the accuracy of always
answering the validation split's most frequent label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from e2lora.config import TextClassificationConfig
from e2lora.tasks.columns import padded
from e2lora.tasks.packing import cannot_pack
from e2lora.tasks.rows import carve_validation, content_of, read_splits, require_filled
from e2lora.tasks.scores import RowScore, mean_loss, mean_outcome


class TextClassification:
    """See :class:`e2lora.tasks.Task`. Rows are checked as soon as they are read."""

    metric_names: tuple[str, ...] = ("accuracy", "loss", "majority_baseline")
    can_pack = False

    def __init__(self, config: TextClassificationConfig) -> None:
        from transformers import AutoModelForSequenceClassification

        self.auto_class = AutoModelForSequenceClassification
        self.config = config
        self._text_columns = [config.text_column]
        self._text_columns += [config.text2_column] if config.text2_column else []
        splits = read_splits(config, [*self._text_columns, config.label_column])
        for split, rows in splits.items():  # before carving: row numbers are those of the file
            if rows is not None:
                require_filled(rows, self._text_columns, str, split, config)
                kind = str if isinstance(rows[0][config.label_column], str) else int
                require_filled(rows, [config.label_column], kind, split, config)
        self._rows = carve_validation(splits, config)
        self.labels = sorted(set(self._rows["train"][config.label_column]))
        if len(self.labels) < 2:
            raise ValueError(
                f"classification needs at least two labels; column {config.label_column!r} of "
                f"{config.data!r} holds only {self.labels}. Name the right `label_column`."
            )
        self._index = {label: i for i, label in enumerate(self.labels)}
        self.num_labels: int | None = len(self.labels)
        self._targets = {split: self._label_indices(split) for split in self._rows}

    def num_rows(self, split: str) -> int:
        return len(self._targets[split])

    def _label_indices(self, split: str) -> list[int]:
        values = self._rows[split][self.config.label_column]
        for number, value in enumerate(values):
            if value not in self._index:
                raise ValueError(
                    f"every label of the {split} rows must occur in the training rows; row "
                    f"{number} has {value!r}: {self._rows[split][number]}. Known: "
                    f"{self.labels[:10]}. Correct the row or the split."
                )
        return [self._index[value] for value in values]

    def content(self, split: str) -> str:
        return content_of(self.config, [*self._texts(split), self._targets[split]])

    def _texts(self, split: str) -> list[list[str]]:
        return [self._rows[split][column][:] for column in self._text_columns]

    def features(self, split: str, tokenizer: Any) -> list[dict[str, Any]]:
        texts = self._texts(split)
        encoded = tokenizer(*texts, truncation=True, max_length=self.config.max_length)
        keys = [key for key in encoded if key in tokenizer.model_input_names]
        return [
            {**{key: encoded[key][i] for key in keys}, "labels": label}
            for i, label in enumerate(self._targets[split])
        ]

    def collate(self, rows: Sequence[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        """Padded on the side that the tokenizer prefers, with the values that it pads with."""
        fill = {
            "input_ids": tokenizer.pad_token_id,
            "token_type_ids": tokenizer.pad_token_type_id,
            "attention_mask": 0,
        }
        names = [name for name in rows[0] if name != "labels"]
        if unknown := [name for name in names if fill.get(name) is None]:
            raise ValueError(
                "rows are padded with values that are known; the tokenizer "
                f"{tokenizer.name_or_path!r} gives none for {unknown}. Set `pad_token` in its "
                "tokenizer_config.json, or name another model."
            )
        side = tokenizer.padding_side
        batch = {name: padded([row[name] for row in rows], fill[name], side) for name in names}
        batch["labels"] = torch.from_numpy(np.array([row["labels"] for row in rows], np.int64))
        return batch

    def pack(
        self, rows: Sequence[dict[str, Any]], tokenizer: Any, one_sequence: bool = False
    ) -> dict[str, Tensor]:
        raise cannot_pack(self.config.kind)

    def num_supervised(self, rows: Sequence[dict[str, Any]]) -> int:
        return len(rows)

    def loss_sum(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return self._losses(self._logits(model, batch), batch).sum()

    def score(self, model: Any, batch: dict[str, Tensor]) -> list[RowScore]:
        logits = self._logits(model, batch)
        right = (logits.argmax(-1) == batch["labels"]).float().tolist()
        losses = self._losses(logits, batch).tolist()
        return [RowScore(*score, supervised=1) for score in zip(right, losses, strict=True)]

    def metrics(self, scores: Sequence[RowScore]) -> dict[str, float]:
        (_, most), *_ = Counter(self._targets["validation"]).most_common(1)
        return {
            "accuracy": mean_outcome(scores),
            "loss": mean_loss(scores),
            "majority_baseline": most / len(self._targets["validation"]),
        }

    @staticmethod
    def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return model(**inputs).logits.float()

    @staticmethod
    def _losses(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
