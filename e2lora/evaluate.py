"""Scores a model on a split, over all workers, each row exactly once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from e2lora.partitioned import is_partitioned
from e2lora.tasks import Features, Task
from e2lora.tasks.columns import lengths_of, picked
from e2lora.tasks.scores import RowScore


def evaluate(
    model: Any,
    task: Task,
    tokenizer: Any,
    features: Sequence[Features],
    batch_size: int,
    group: Any = None,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], list[float]]:
    """Metrics of the split and the outcome of every row, in row order; the same on each worker.

    Rows are batched by length, so little is padded. A model whose weights are partitioned gathers
    them in every forward, so there all workers make equally many: one with fewer rows runs the
    shortest again, and drops what it scored.

    Args:
        group: process group of all workers, or None for one.
        on_batch: called after each batch, to show that the worker lives.
    """
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    by_length = np.argsort(lengths_of(features), kind="stable").tolist()
    mine = by_length[rank::world]
    batches = [mine[begin : begin + batch_size] for begin in range(0, len(mine), batch_size)]
    most = -(-len(by_length[::world]) // batch_size) if is_partitioned(model) else len(batches)
    again = [by_length[:1]] * (most - len(batches))
    scores: dict[int, RowScore] = {}
    training = model.training
    model.eval()
    with torch.no_grad():
        for number, rows in enumerate([*batches, *again]):
            batch = task.collate(picked(features, rows), tokenizer)
            batch = {key: value.to(model.device) for key, value in batch.items()}
            scored = dict(zip(rows, task.score(model, batch), strict=True))
            if number < len(batches):
                scores |= scored
            on_batch()
    model.train(training)
    if group:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, scores, group=group)
        scores = {row: score for part in parts for row, score in part.items()}
    ordered = [scores[row] for row in range(len(features))]
    return task.metrics(ordered), [score.outcome for score in ordered]
