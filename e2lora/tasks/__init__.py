"""Tasks: one file each, one protocol, one registry.

Adding a task is one file here with a class that follows :class:`Task`, and one line in ``TASKS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from e2lora.config import AnyTaskConfig, TaskConfig
from e2lora.tasks.scores import RowScore
from e2lora.tasks.sft import Sft
from e2lora.tasks.text_classification import TextClassification

Features = dict[str, Any]


class Task(Protocol):
    """Rows of a data set and what a model does with them."""

    auto_class: Any
    num_labels: int | None  # None where the model has no label head
    metric_names: tuple[str, ...]

    @property
    def config(self) -> TaskConfig:
        """What the task was made from: a plain attribute of the task's own class."""
        ...

    def num_rows(self, split: str) -> int:
        """Rows of ``train`` or ``validation``."""
        ...

    def features(self, split: str, tokenizer: Any) -> list[Features]:
        """Tokenised rows of ``train`` or ``validation``, in row order, not padded."""
        ...

    def collate(self, rows: Sequence[Features], tokenizer: Any) -> dict[str, Tensor]:
        """One batch, padded to its longest row."""
        ...

    def num_supervised(self, rows: Sequence[Features]) -> int:
        """What the mean loss is a mean over: samples, or supervised tokens."""
        ...

    def loss_sum(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Sum of the losses of a batch, a scalar."""
        ...

    def score(self, model: Any, batch: dict[str, Tensor]) -> list[RowScore]:
        """Per row of the batch: its outcome, its loss, and how much is supervised in it."""
        ...

    def metrics(self, scores: Sequence[RowScore]) -> dict[str, float]:
        """Metrics of a split from the scores of all of its rows."""
        ...


@dataclass(frozen=True)
class TrialData:
    """A task with its tokenised rows, as a group keeps them."""

    task: Task
    train: list[Features]
    validation: list[Features]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each training row."""
        return tuple(len(row["input_ids"]) for row in self.train)


TASKS: dict[str, type[Task]] = {"sft": Sft, "text_classification": TextClassification}


def load_task(config: AnyTaskConfig) -> Task:
    """Read and check the data of a task; see the class in ``TASKS`` for the errors."""
    return TASKS[config.kind](config)  # type: ignore[call-arg]
