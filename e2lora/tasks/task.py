"""What a task is: rows of a data set, what a model does with them, and how that is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from e2lora.config import GenerationConfig, TaskConfig
from e2lora.tasks.columns import Features
from e2lora.tasks.packing import cannot_pack
from e2lora.tasks.scores import Judgement, RowScore

Direction = Literal["maximize", "minimize"]


class Task(ABC):
    """Rows are read and checked when it is made. A split is ``train``, ``validation`` or ``test``.

    Attributes:
        auto_class: of transformers: what kind of model is loaded.
        num_labels: of the label head; None where the model has none.
        directions: every metric that it may give, and where better lies; None of a metric that is
            there for comparison, as a baseline's.
        splits: those that there are, with ``test`` as the last where there are test rows.
        duplicates: ``"train/test"`` → how many test rows have the very inputs of a training row.
        processor: what makes features of rows: the model's tokenizer, or its image processor.
        can_pack: whether several rows may lie in one sequence.
    """

    config: TaskConfig
    auto_class: Any
    num_labels: int | None
    directions: Mapping[str, Direction | None]
    splits: tuple[str, ...]
    duplicates: Mapping[str, int]
    processor: Literal["text", "image"] = "text"
    can_pack: bool = False

    # ---- rows ---------------------------------------------------------------------------------

    @abstractmethod
    def num_rows(self, split: str) -> int:
        """Rows of a split."""

    @abstractmethod
    def content(self, split: str) -> str:
        """Names all that ``features`` reads of a split: its rows, in order, and the options."""

    @abstractmethod
    def features(self, split: str, processor: Any) -> list[Features]:
        """The rows of a split as numbers and lists of numbers, in row order, not padded.

        Raises:
            ValueError: a row that can't be used.
        """

    # ---- batches ------------------------------------------------------------------------------

    @abstractmethod
    def collate(self, rows: Sequence[Features], processor: Any) -> dict[str, Tensor]:
        """One batch, padded to its longest row; rows may hold arrays for lists."""

    def pack(
        self, rows: Sequence[Features], processor: Any, one_sequence: bool = False
    ) -> dict[str, Tensor]:
        """The batch of ``collate`` for ``loss_sum``, its rows in few sequences, or in one.

        Raises:
            ValueError: a task that can't.
        """
        raise cannot_pack(type(self.config).model_fields["kind"].default)

    def num_supervised(self, rows: Sequence[Features]) -> int:
        """What the mean loss is a mean over: samples, or supervised tokens."""
        return len(rows)

    @abstractmethod
    def loss_sum(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Sum of the losses of a batch, a scalar."""

    # ---- scores -------------------------------------------------------------------------------

    @abstractmethod
    def score(self, model: Any, batch: dict[str, Tensor]) -> list[RowScore]:
        """What the model makes of each row of the batch."""

    @abstractmethod
    def metrics(self, scores: Sequence[RowScore]) -> dict[str, float]:
        """Metrics of a split from the scores of all of its rows."""

    # ---- answers that the model writes --------------------------------------------------------

    def generation(self, split: str) -> GenerationConfig | None:
        """How answers are written to the rows of a split; None: there is nothing to write."""
        return None

    def prompts(self, split: str, tokenizer: Any) -> list[list[int]]:
        """Token ids of what stands before the answer, of every row of a split."""
        raise ValueError(f"task {type(self).__name__} has no prompts: its answers aren't written.")

    def judge(
        self, split: str, numbers: Sequence[int], texts: Sequence[Sequence[str]]
    ) -> list[Judgement]:
        """What is to be said of the texts that a model wrote for rows, by their numbers.

        Args:
            texts: of each row as many as :meth:`generation` asks for.
        """
        raise ValueError(f"task {type(self).__name__} judges no texts.")
