"""Classification of images into any number of labels.

The head is the one that transformers puts on the model's vision tower, on what it pools: the class
token after the last layer norm (ViT), or the mean of the patches before it (CLIP, whose own image
features are of the class token instead). The metrics are those of :mod:`e2lora.tasks.labels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from e2lora.config import ImageClassificationConfig
from e2lora.tasks.columns import Features
from e2lora.tasks.duplicates import duplicates_of
from e2lora.tasks.images import Images
from e2lora.tasks.labels import Labels, label_losses
from e2lora.tasks.rows import carve_validation, content_of, read_splits
from e2lora.tasks.scores import RowScore
from e2lora.tasks.task import Task

NUMBER = "__image__"  # of a row's image, kept through carving


class ImageClassification(Task):
    """See :class:`e2lora.tasks.Task`, :class:`e2lora.tasks.labels.Labels` and
    :class:`e2lora.tasks.images.Images`.

    A row's features are its image's number and its label: ``collate`` fetches, decodes and
    processes the images of a batch.
    """

    config: ImageClassificationConfig
    processor: Literal["text", "image"] = "image"

    def __init__(self, config: ImageClassificationConfig) -> None:
        from transformers import AutoModelForImageClassification

        self.auto_class = AutoModelForImageClassification
        self.config = config
        column = config.label_column
        read = {
            split: rows
            for split, rows in read_splits(config, [config.image_column, column]).items()
            if rows is not None
        }
        labelled: dict[str, Any] = {  # messages show rows, and images are long
            split: rows.select_columns([column]) for split, rows in read.items()
        }
        self._labels = Labels(labelled, column, config, config.metric)
        self.labels, self.num_labels = self._labels.values, len(self._labels)
        self.directions = self._labels.directions
        self._images = Images(read, config)
        for split, numbers in self._images.numbers.items():
            labelled[split] = labelled[split].add_column(NUMBER, list(numbers))
        carved = carve_validation({"validation": None, **labelled}, config)
        self.splits = tuple(carved)
        self._numbers = {split: rows[NUMBER][:] for split, rows in carved.items()}
        self._targets = {
            split: self._labels.numbers(rows[column][:]) for split, rows in carved.items()
        }
        every = self._images.digests()
        self._digests = {
            split: [every[i] for i in numbers] for split, numbers in self._numbers.items()
        }
        images = {split: {config.image_column: digests} for split, digests in self._digests.items()}
        self.duplicates = duplicates_of(images, [config.image_column])

    def num_rows(self, split: str) -> int:
        return len(self._targets[split])

    def content(self, split: str) -> str:
        """Of the images by their bytes, and of their numbers, which are what features hold."""
        return content_of(
            self.config, [self._numbers[split], self._digests[split], self._targets[split]]
        )

    def features(self, split: str, processor: Any) -> list[Features]:
        rows = zip(self._numbers[split], self._targets[split], strict=True)
        return [{"image": number, "labels": label} for number, label in rows]

    def collate(self, rows: Sequence[Features], processor: Any) -> dict[str, Tensor]:
        """``pixel_values``, float32 [rows, channels, height, width], and ``labels``.

        Raises:
            ValueError: an image that can't be decoded.
        """
        return {
            "pixel_values": self._images.pixels([int(row["image"]) for row in rows], processor),
            "labels": torch.tensor([int(row["labels"]) for row in rows]),
        }

    def loss_sum(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return label_losses(self._logits(model, batch), batch["labels"]).sum()

    def score(self, model: Any, batch: dict[str, Tensor]) -> list[RowScore]:
        return self._labels.score(self._logits(model, batch), batch["labels"])

    def metrics(self, scores: Sequence[RowScore]) -> dict[str, float]:
        return self._labels.metrics(scores)

    @staticmethod
    def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
        """float32, [rows, labels]. Pixels in the type that the model computes in."""
        return model(pixel_values=batch["pixel_values"].to(model.dtype)).logits.float()
