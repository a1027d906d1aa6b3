"""From tokenised rows to batches: pure functions of (seed, step), so any step can be resumed.

The rows of step t are places t·B … (t+1)·B − 1 of an endless stream of epochs; an epoch visits
every row once, in random order, rows of like length side by side so that little is padded. Every
worker knows the whole global batch and takes its share of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from e2lora.config import TrainConfig
from e2lora.prefetch import made_ahead
from e2lora.tasks import TrialData, require_can_pack
from e2lora.tasks.columns import Numbers, picked
from e2lora.tasks.packing import attends_flat, require_apart

Row = TypeVar("Row")
Lengths = Sequence[int] | NDArray[np.int64]

PROBE_ROWS = 8
BUCKET_BATCHES = 16  # rows are sorted by length within this many batches: more learn worse


@dataclass(frozen=True)
class StepBatch:
    """This worker's microbatches of one step, on the CPU, and counts of the whole global batch."""

    microbatches: list[dict[str, Tensor]]
    num_supervised: int  # samples or tokens that the mean loss is a mean over
    num_tokens: int  # without padding


class Batches:
    """The batches of a trial's steps, each made from nothing but seed and step.

    Args:
        rank: the worker's, of ``training.num_workers``.
        one_sequence: with ``packing``, a microbatch is one sequence: of a model that
            :func:`e2lora.tasks.packing.attends_flat`.

    Raises:
        ValueError: ``packing`` of a task that can't.
    """

    def __init__(
        self,
        data: TrialData,
        tokenizer: Any,
        training: TrainConfig,
        seed: int,
        rank: int = 0,
        one_sequence: bool = False,
    ) -> None:
        if training.packing:
            require_can_pack(data.task.config)  # type: ignore[arg-type]
        self._data, self._tokenizer, self._training = data, tokenizer, training
        self._rank, self._one_sequence = rank, one_sequence
        self._stream = RowStream(data.lengths, training.global_batch_size, seed)

    def at(self, step: int) -> StepBatch:
        """The batch of any step: how a trial goes on in mid-epoch."""
        data, training = self._data, self._training
        numbers = self._stream.rows(step)
        shares = microbatches_of(numbers, self._rank, training.num_workers, training.accumulation)
        return StepBatch(
            [self.of_rows(share) for share in shares],
            int(data.num_supervised[numbers].sum()),
            int(data.lengths[numbers].sum()),
        )

    def of_rows(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Training rows by their numbers, as one microbatch."""
        rows = picked(self._data.train, numbers)
        if self._training.packing:
            return self._data.task.pack(rows, self._tokenizer, self._one_sequence)
        return self._data.task.collate(rows, self._tokenizer)

    def prefetched(
        self, start: int, stop: int, pin_memory: bool = False
    ) -> AbstractContextManager[Iterator[StepBatch]]:
        """The batches of steps ``start`` … ``stop`` − 1, made ahead by a thread.

        Args:
            pin_memory: in memory from which a GPU can copy while it computes.
        """

        def make(step: int) -> StepBatch:
            batch = self.at(step)
            return _pinned(batch) if pin_memory else batch

        return made_ahead(make, range(start, stop))


def _pinned(batch: StepBatch) -> StepBatch:
    microbatches = [
        {key: value.pin_memory() for key, value in micro.items()} for micro in batch.microbatches
    ]
    return StepBatch(microbatches, batch.num_supervised, batch.num_tokens)


def require_packs(model: Any, data: TrialData, tokenizer: Any) -> None:
    """Try on some training rows that the model keeps packed rows apart, before the first step.

    Collective where weights are partitioned.

    Raises:
        ValueError: it doesn't, or the task can't be packed.
    """
    task = data.task
    require_can_pack(task.config)  # type: ignore[arg-type]
    numbers = np.linspace(0, len(data.train) - 1, PROBE_ROWS).astype(int).tolist()
    rows = [row["input_ids"] for row in picked(data.train, numbers)]
    flat = attends_flat(model)

    def pack(some: Sequence[Numbers]) -> dict[str, Tensor]:
        return task.pack([{"input_ids": row, "labels": row} for row in some], tokenizer, flat)

    require_apart(model, rows, pack)


class RowStream:
    """The rows of every step; remembers the orders of the epochs at hand."""

    def __init__(self, lengths: Lengths, batch_size: int, seed: int) -> None:
        measured = np.asarray(lengths)
        self._num_rows, self._batch_size = len(measured), batch_size

        @lru_cache(maxsize=2)  # a step may lie in two
        def order(epoch: int) -> NDArray[np.intp]:
            return _epoch_order(measured, batch_size, seed, epoch)

        self._order = order

    def rows(self, step: int) -> list[int]:
        """Row numbers of the global batch of ``step``."""
        num_rows, first = self._num_rows, step * self._batch_size
        last, rows = first + self._batch_size, []
        for epoch in range(first // num_rows, (last - 1) // num_rows + 1):
            begin, end = epoch * num_rows, (epoch + 1) * num_rows
            rows += self._order(epoch)[max(first, begin) - begin : min(last, end) - begin].tolist()
        return rows


def step_rows(lengths: Lengths, step: int, batch_size: int, seed: int) -> list[int]:
    """Row numbers of the global batch of ``step``; ``lengths`` are those of all training rows.

    >>> lengths = [3, 1, 2, 3, 1, 2]
    >>> sorted(step_rows(lengths, 0, 3, seed=0) + step_rows(lengths, 1, 3, seed=0))
    [0, 1, 2, 3, 4, 5]
    """
    return RowStream(lengths, batch_size, seed).rows(step)


def _epoch_order(
    measured: NDArray[np.int64], batch_size: int, seed: int, epoch: int
) -> NDArray[np.intp]:
    """A permutation of all rows: random, then by length within buckets, then steps shuffled.

    Rows that share a step with the epoch before or after stay as drawn: only whole steps are of
    like length.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(measured))
    first = min(len(order), -epoch * len(order) % batch_size)  # the rest of the step before
    last = first + (len(order) - first) // batch_size * batch_size
    steps: list[NDArray[np.intp]] = []
    for begin in range(first, last, BUCKET_BATCHES * batch_size):
        bucket = order[begin : min(begin + BUCKET_BATCHES * batch_size, last)]
        bucket = bucket[np.argsort(measured[bucket], kind="stable")]
        steps += np.split(bucket, len(bucket) // batch_size)
    shuffled = [steps[i] for i in rng.permutation(len(steps))]
    return np.concatenate([order[:first], *shuffled, order[last:]])


def microbatches_of(rows: Sequence[Row], rank: int, world: int, num: int) -> list[list[Row]]:
    """This worker's share of a global batch, in ``num`` microbatches of equal size.

    >>> microbatches_of([0, 1, 2, 3, 4, 5, 6, 7], rank=1, world=2, num=2)
    [[1, 3], [5, 7]]
    """
    mine = list(rows[rank::world])
    size = len(mine) // num
    return [mine[i * size : (i + 1) * size] for i in range(num)]


def calibration_folds(
    lengths: Lengths, num_samples: int, num_folds: int, seed: int
) -> list[list[int]]:
    """Row numbers of the calibration folds: one sample, dealt out; each fold in order of length.

    >>> calibration_folds([5, 1, 4, 2], num_samples=4, num_folds=2, seed=0)
    [[1, 2], [3, 0]]
    """
    rows = calibration_rows(len(lengths), num_samples, seed)
    return [sorted(rows[k::num_folds], key=lambda i: lengths[i]) for k in range(num_folds)]


def calibration_rows(num_rows: int, num_samples: int, seed: int) -> list[int]:
    """Rows of the calibration batch: a sample without replacement.

    Raises:
        ValueError: more samples asked for than there are rows.
    """
    if num_samples > num_rows:
        raise ValueError(
            f"calibration can't use more samples than training rows; got num_samples="
            f"{num_samples} of {num_rows} rows. Lower `calibration.num_samples`."
        )
    return np.random.default_rng(seed).permutation(num_rows)[:num_samples].tolist()
