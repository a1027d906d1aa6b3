"""Tasks: one file each, one protocol, one registry.

Adding a task is one file here with a class that extends :class:`Task`, its configuration in
``e2lora/config/tasks.py``, and one line in ``TASKS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from e2lora.config import AnyTaskConfig
from e2lora.tasks.code import Code
from e2lora.tasks.columns import Features, TokenRows, lengths_of
from e2lora.tasks.image_classification import ImageClassification
from e2lora.tasks.multiple_choice import MultipleChoice
from e2lora.tasks.packing import cannot_pack
from e2lora.tasks.regression import Regression
from e2lora.tasks.sft import Sft
from e2lora.tasks.task import Task
from e2lora.tasks.text_classification import TextClassification

__all__ = ["TASKS", "Features", "Task", "TokenRows", "TrialData", "load_task", "require_can_pack"]


@dataclass(frozen=True)
class TrialData:
    """A task with the features of its rows, as a group keeps them."""

    task: Task
    train: Sequence[Features]
    validation: Sequence[Features]
    test: Sequence[Features] | None = None

    @classmethod
    def of(cls, task: Task, processor: Any) -> TrialData:
        """All splits, made in memory."""
        return cls(task, *(task.features(split, processor) for split in task.splits))

    def rows(self, split: str) -> Sequence[Features]:
        """
        Raises:
            ValueError: the task has no such split.
        """
        if split not in self.task.splits:
            raise ValueError(
                f"task {self.task.config.display_name!r} has the splits {self.task.splits}, not "
                f"{split!r}. Name it in the task's configuration."
            )
        return getattr(self, split)

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


TASKS: dict[str, type[Task]] = {
    "code": Code,
    "image_classification": ImageClassification,
    "multiple_choice": MultipleChoice,
    "regression": Regression,
    "sft": Sft,
    "text_classification": TextClassification,
}


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
