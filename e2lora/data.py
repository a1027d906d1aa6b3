"""From tokenised rows to batches: pure functions of (seed, step), so any step can be resumed.

The rows of step t are places t·B … (t+1)·B − 1 of an endless stream of epochs; an epoch visits
every row once, in random order, rows of like length side by side so that little is padded. Every
worker knows the whole global batch and takes its share of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Row = TypeVar("Row")

BUCKET_BATCHES = 16  # rows are sorted by length within this many batches


def step_rows(lengths: Sequence[int], step: int, batch_size: int, seed: int) -> list[int]:
    """Row numbers of the global batch of ``step``; ``lengths`` are those of all training rows.

    >>> lengths = [3, 1, 2, 3, 1, 2]
    >>> sorted(step_rows(lengths, 0, 3, seed=0) + step_rows(lengths, 1, 3, seed=0))
    [0, 1, 2, 3, 4, 5]
    """
    lengths = tuple(lengths)
    num_rows, first, last = len(lengths), step * batch_size, (step + 1) * batch_size
    rows: list[int] = []
    for epoch in range(first // num_rows, (last - 1) // num_rows + 1):
        order = _epoch_order(lengths, batch_size, seed, epoch)
        begin, end = epoch * num_rows, (epoch + 1) * num_rows
        rows += order[max(first, begin) - begin : min(last, end) - begin].tolist()
    return rows


@lru_cache(maxsize=4)
def _epoch_order(
    lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int
) -> NDArray[np.intp]:
    """A permutation of all rows: random, then by length within buckets, then batches shuffled."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    measured = np.asarray(lengths)
    size = BUCKET_BATCHES * batch_size
    batches = []
    for begin in range(0, len(order), size):
        bucket = order[begin : begin + size]
        bucket = bucket[np.argsort(measured[bucket], kind="stable")]
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return np.concatenate([batches[i] for i in rng.permutation(len(batches))])


def microbatches_of(rows: Sequence[Row], rank: int, world: int, num: int) -> list[list[Row]]:
    """This worker's share of a global batch, in ``num`` microbatches of equal size.

    >>> microbatches_of([0, 1, 2, 3, 4, 5, 6, 7], rank=1, world=2, num=2)
    [[1, 3], [5, 7]]
    """
    mine = list(rows[rank::world])
    size = len(mine) // num
    return [mine[i * size : (i + 1) * size] for i in range(num)]


def calibration_folds(
    lengths: Sequence[int], num_samples: int, num_folds: int, seed: int
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
