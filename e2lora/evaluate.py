"""Scores a model on a split, over all workers, each row exactly once.

Rows are put into batches before these are dealt out, so every row is computed in the same company
however many workers there are: two score exactly as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from e2lora.generation import require_room, write
from e2lora.partitioned import is_partitioned
from e2lora.tasks import TrialData
from e2lora.tasks.columns import lengths_of, picked
from e2lora.tasks.scores import RowScore

OnRows = Callable[[int, int], None]
"""Told of this worker how many rows are done, and of how many."""


def score_rows(
    model: Any,
    data: TrialData,
    split: str,
    processor: Any,
    batch_size: int,
    group: Any = None,
    on_rows: OnRows = lambda done, total: None,
) -> list[RowScore]:
    """What the model makes of every row of a split, in row order; the same on each worker.

    Args:
        group: process group of all workers, or None for one.
        on_rows: called after each batch.
    """
    rows, task = data.rows(split), data.task
    scores: dict[int, RowScore] = {}
    shares = _Shares(lengths_of(rows), batch_size, group, is_partitioned(model))
    with _evaluating(model):
        for numbers in shares.batches(on_rows):
            batch = task.collate(picked(rows, numbers), processor)
            batch = {key: value.to(model.device) for key, value in batch.items()}
            scores |= zip(numbers, task.score(model, batch), strict=True)
    return shares.gathered(scores)


def judge_answers(
    model: Any,
    data: TrialData,
    split: str,
    processor: Any,
    scores: Sequence[RowScore],
    group: Any = None,
    on_rows: OnRows = lambda done, total: None,
    on_token: Callable[[], None] = lambda: None,
) -> list[RowScore]:
    """The scores with what the task finds of the answers that the model writes.

    Where the task has none written, the scores as they are.

    Args:
        scores: of :func:`score_rows`.
        on_token: called often while answers are written, to show that the worker lives.
    """
    task, generation = data.task, data.task.generation(split)
    if generation is None:
        return list(scores)
    prompts = task.prompts(split, processor)
    if split == "validation":
        prompts = prompts[: generation.max_validation_rows]
    if prompts:
        require_room(model, prompts, generation)  # the longest come last: not after hours
    judged: dict[int, RowScore] = {}
    synced = is_partitioned(model)
    shares = _Shares([len(p) for p in prompts], generation.batch_size, group, synced)
    with _evaluating(model):
        for numbers in shares.batches(on_rows):
            chosen = [prompts[i] for i in numbers]
            texts = write(model, processor, chosen, generation, numbers, synced, on_token)
            verdicts = task.judge(split, numbers, texts)
            judged |= {
                i: scores[i].judged(verdict) for i, verdict in zip(numbers, verdicts, strict=True)
            }
    return shares.gathered(judged) + list(scores[len(prompts) :])


class _Shares:
    """Which rows this worker computes together.

    Args:
        even: all workers must make equally many batches, since each gathers partitioned weights:
            one with fewer computes the shortest row again, and drops what came of it.
    """

    def __init__(self, lengths: Sequence[int] | Any, size: int, group: Any, even: bool) -> None:
        rank, self._world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        self._group, self._num_rows = group, len(lengths)
        by_length = np.argsort(lengths, kind="stable").tolist()
        batches = [by_length[begin : begin + size] for begin in range(0, len(by_length), size)]
        self._mine = batches[rank :: self._world]
        most = len(batches[:: self._world])
        self._again = [by_length[:1]] * (most - len(self._mine)) if even else []

    def batches(self, on_rows: OnRows) -> Iterator[list[int]]:
        batches = [*self._mine, *self._again]
        done, total = 0, sum(map(len, batches))
        for numbers in batches:
            yield numbers
            done += len(numbers)
            on_rows(done, total)

    def gathered(self, scores: Mapping[int, RowScore]) -> list[RowScore]:
        """Those of all workers, in row order. Collective."""
        mine = {row: scores[row] for numbers in self._mine for row in numbers}
        parts: list[Any] = [mine]
        if self._group:
            parts *= self._world
            dist.all_gather_object(parts, mine, group=self._group)
        every = {row: score for part in parts for row, score in part.items()}
        return [every[row] for row in range(self._num_rows)]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without gradients and dropout; afterwards the model is in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
