"""Tasks: one file each, one protocol, one registry.

Adding a task is one file here with a class that follows :class:`Task`, and one line in ``TASKS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from e2lora.config import AnyTaskConfig, TaskConfig
from e2lora.tasks.columns import Features, TokenRows, lengths_of
from e2lora.tasks.packing import cannot_pack
from e2lora.tasks.scores import RowScore
from e2lora.tasks.sft import Sft
from e2lora.tasks.text_classification import TextClassification

__all__ = ["TASKS", "Features", "Task", "TokenRows", "TrialData", "load_task", "require_can_pack"]


class Task(Protocol):
    """Rows of a data set and what a model does with them."""

    auto_class: Any
    num_labels: int | None  # None where the model has no label head
    metric_names: tuple[str, ...]
    can_pack: bool  # whether several rows may lie in one sequence

    @property
    def config(self) -> TaskConfig:
        """What the task was made from: a plain attribute of the task's own class."""
        ...

    def num_rows(self, split: str) -> int:
        """Rows of ``train`` or ``validation``."""
        ...

    def content(self, split: str) -> str:
        """Names all that ``features`` reads of a split: its rows, in order, and the options."""
        ...

    def features(self, split: str, tokenizer: Any) -> list[Features]:
        """Tokenised rows of ``train`` or ``validation``, in row order, not padded.

        A feature is a number or a list of numbers.
        """
        ...

    def collate(self, rows: Sequence[Features], tokenizer: Any) -> dict[str, Tensor]:
        """One batch, padded to its longest row; rows may hold arrays for lists."""
        ...

    def pack(
        self, rows: Sequence[Features], tokenizer: Any, one_sequence: bool = False
    ) -> dict[str, Tensor]:
        """The batch of ``collate`` for ``loss_sum``, its rows in few sequences, or in one.

        Raises:
            ValueError: a task that can't.
        """
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
    train: Sequence[Features]
    validation: Sequence[Features]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each training row."""
        return lengths_of(self.train)

    @cached_property
    def num_supervised(self) -> NDArray[np.int64]:
        """Supervised samples or tokens of each training row."""
        if isinstance(self.train, TokenRows):
            return self.train.num_supervised
        return np.array([self.task.num_supervised([row]) for row in self.train], dtype=np.int64)


TASKS: dict[str, type[Task]] = {"sft": Sft, "text_classification": TextClassification}


def load_task(config: AnyTaskConfig) -> Task:
    """Read and check the data of a task; see the class in ``TASKS`` for the errors."""
    return TASKS[config.kind](config)  # type: ignore[call-arg]


def require_can_pack(config: AnyTaskConfig) -> None:
    """Refuse a task whose rows can't be packed, from its configuration alone.

    Raises:
        ValueError: it can't.
    """
    if not TASKS[config.kind].can_pack:
        raise cannot_pack(config.kind)
