"""Scores a model on a split, over all workers, each row exactly once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from e2lora.tasks import Features, Task
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

    Rows are batched by length, so little is padded.

    Args:
        group: process group of all workers, or None for one.
        on_batch: called after each batch, to show that the worker lives.
    """
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    by_length = sorted(range(len(features)), key=lambda i: (len(features[i]["input_ids"]), i))
    mine = by_length[rank::world]
    scores: dict[int, RowScore] = {}
    training = model.training
    model.eval()
    with torch.no_grad():
        for begin in range(0, len(mine), batch_size):
            rows = mine[begin : begin + batch_size]
            batch = task.collate([features[i] for i in rows], tokenizer)
            batch = {key: value.to(model.device) for key, value in batch.items()}
            scores |= dict(zip(rows, task.score(model, batch), strict=True))
            on_batch()
    model.train(training)
    if group:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, scores, group=group)
        scores = {row: score for part in parts for row, score in part.items()}
    ordered = [scores[row] for row in range(len(features))]
    return task.metrics(ordered), [score.outcome for score in ordered]
