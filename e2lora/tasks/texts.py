"""One text, or a pair of texts, with a label, for a model with a label head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from e2lora.config import TextsConfig
from e2lora.tasks.columns import padded
from e2lora.tasks.duplicates import duplicates_of
from e2lora.tasks.rows import carve_validation, content_of, read_splits, require_filled
from e2lora.tasks.task import Task


class Texts(Task):
    """See :class:`e2lora.tasks.Task`. Rows are checked as soon as they are read."""

    label_dtype: Any
    config: TextsConfig

    def __init__(self, config: TextsConfig) -> None:
        from transformers import AutoModelForSequenceClassification

        self.auto_class = AutoModelForSequenceClassification
        self.config = config
        self._text_columns = [config.text_column]
        self._text_columns += [config.text2_column] if config.text2_column else []
        splits = read_splits(config, [*self._text_columns, config.label_column])
        for split, rows in splits.items():  # before carving: row numbers are those of the file
            if rows is not None:
                require_filled(rows, self._text_columns, str, split, config)
        self._learn_labels(splits)
        self._rows = carve_validation(splits, config)
        self.duplicates = duplicates_of(self._rows, self._text_columns)
        self.splits = tuple(self._rows)
        self._targets = {
            split: self._numbers(rows[config.label_column][:]) for split, rows in self._rows.items()
        }

    @abstractmethod
    def _learn_labels(self, splits: Mapping[str, Any]) -> None:
        """Check the labels of the splits, not yet carved, and keep what is to be known of them.

        Raises:
            ValueError: a label that can't be used, with its row.
        """

    @abstractmethod
    def _numbers(self, values: Sequence[Any]) -> list[Any]:
        """Labels as the numbers that a model learns, all of one type."""

    def num_rows(self, split: str) -> int:
        return len(self._targets[split])

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
        labels = np.array([row["labels"] for row in rows], self.label_dtype)
        batch["labels"] = torch.from_numpy(labels)
        return batch

    @staticmethod
    def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
        """float32, [rows, labels]. The model is not shown the labels."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return model(**inputs).logits.float()
