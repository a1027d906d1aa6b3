"""Batches are pure functions of seed and step; workers share them, each row exactly once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from e2lora import data, evaluate
from e2lora.data import calibration_folds, calibration_rows, microbatches_of, step_rows
from e2lora.tasks.scores import RowScore

lengths_of_rows = st.lists(st.integers(1, 200), min_size=1, max_size=70)
batch_sizes = st.integers(1, 40)
seeds = st.integers(0, 2**31)


def stream(lengths: Sequence[int], batch_size: int, seed: int, num_steps: int) -> list[int]:
    return [row for t in range(num_steps) for row in step_rows(lengths, t, batch_size, seed)]


# ---- the rows of a step -----------------------------------------------------------------------


@settings(deadline=None)
@given(lengths=lengths_of_rows, batch_size=batch_sizes, seed=seeds)
def test_every_epoch_is_a_permutation_of_all_rows(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    """Across the boundaries of epochs, which need not be those of steps."""
    num_rows = len(lengths)
    rows = stream(lengths, batch_size, seed, num_steps=3 * num_rows // batch_size + 1)
    for epoch in range(len(rows) // num_rows):
        part = rows[epoch * num_rows : (epoch + 1) * num_rows]
        assert sorted(part) == list(range(num_rows))


@settings(deadline=None)
@given(lengths=lengths_of_rows, batch_size=batch_sizes, seed=seeds, step=st.integers(0, 10**6))
def test_any_step_has_a_full_batch_and_is_the_same_when_asked_again(
    lengths: list[int], batch_size: int, seed: int, step: int
) -> None:
    """So a resumed trial, in another process, sees what it would have seen."""
    rows = step_rows(lengths, step, batch_size, seed)
    assert len(rows) == batch_size
    assert all(type(row) is int for row in rows)
    data._epoch_order.cache_clear()
    assert step_rows(tuple(lengths), step, batch_size, seed) == rows


def test_other_seeds_and_epochs_have_other_orders() -> None:
    lengths = [5] * 40
    orders = {tuple(stream(lengths, 8, seed, num_steps=5)) for seed in range(5)}
    assert len(orders) == 5
    two_epochs = stream(lengths, 8, 0, num_steps=10)
    assert two_epochs[:40] != two_epochs[40:]


def test_rows_of_like_length_lie_side_by_side_in_batches_of_random_order() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 320).tolist()
    batches = [[lengths[i] for i in step_rows(lengths, t, 8, seed=0)] for t in range(40)]
    padding = sum(8 * max(batch) - sum(batch) for batch in batches)
    at_random = rng.permutation(lengths).reshape(40, 8)
    assert padding < 0.3 * (8 * at_random.max(1).sum() - at_random.sum())
    bucket = lengths[:128]  # rows enough for one bucket of batches only
    longest = [max(bucket[i] for i in step_rows(bucket, t, 8, seed=0)) for t in range(16)]
    assert longest != sorted(longest), "no curriculum of lengths"


# ---- shares of workers ------------------------------------------------------------------------


@given(
    world=st.integers(1, 5),
    num=st.integers(1, 4),
    size=st.integers(1, 5),
)
def test_shares_of_all_workers_are_the_batch_each_row_once(world: int, num: int, size: int) -> None:
    rows = [f"row {i}" for i in range(world * num * size)]
    shares = [microbatches_of(rows, rank, world, num) for rank in range(world)]
    assert all(len(share) == num for share in shares)
    assert all(len(micro) == size for share in shares for micro in share)
    assert Counter(row for share in shares for micro in share for row in micro) == Counter(rows)


@given(num_rows=st.integers(0, 20), world=st.integers(1, 5))
def test_calibration_share_loses_no_row_of_an_uneven_number(num_rows: int, world: int) -> None:
    """One microbatch per worker takes whatever is its: `e2lora.profile` relies on it."""
    shares = [microbatches_of(range(num_rows), rank, world, num=1) for rank in range(world)]
    assert sorted(row for (share,) in shares for row in share) == list(range(num_rows))


@given(num_rows=st.integers(1, 60), share=st.floats(0, 1), seed=seeds)
def test_calibration_rows_are_a_sample_without_replacement(
    num_rows: int, share: float, seed: int
) -> None:
    num_samples = int(share * num_rows)
    rows = calibration_rows(num_rows, num_samples, seed)
    assert len(set(rows)) == len(rows) == num_samples
    assert set(rows) <= set(range(num_rows))
    assert rows == calibration_rows(num_rows, num_samples, seed)


def test_calibration_on_more_rows_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_samples=11 of 10 rows\. Lower"):
        calibration_rows(10, 11, seed=0)


# ---- evaluation -------------------------------------------------------------------------------


class Parity(nn.Module):
    """Answers whether a row's number is even; remembers in which mode it was asked."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, numbers: Tensor) -> Tensor:
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.weight * (numbers % 2 == 0)


class FakeTask:
    """Rows carry their own number; their outcome is known, and every row seen is counted."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def collate(self, rows: Sequence[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        assert tokenizer == "tokenizer"
        return {"numbers": torch.tensor([row["number"] for row in rows])}

    def score(self, model: Any, batch: dict[str, Tensor]) -> list[RowScore]:
        numbers = batch["numbers"].tolist()
        self.batches.append(numbers)
        outcomes = model(batch["numbers"]).tolist()
        return [RowScore(outcome, 0.5 * n, 1) for outcome, n in zip(outcomes, numbers, strict=True)]

    def metrics(self, scores: Sequence[RowScore]) -> dict[str, float]:
        weighted = sum(place * row.loss for place, row in enumerate(scores))
        return {"accuracy": sum(row.outcome for row in scores) / len(scores), "in order": weighted}


class FakeGroup:
    """Threads in place of processes."""

    def __init__(self, world: int) -> None:
        self.world, self.here = world, threading.local()
        self.parts: list[Any] = [None] * world
        self.barrier = threading.Barrier(world, timeout=30)

    def get_rank(self, group: Any) -> int:
        return self.here.rank

    def get_world_size(self, group: Any) -> int:
        return self.world

    def all_gather_object(self, parts: list[Any], value: Any, group: Any) -> None:
        self.parts[self.here.rank] = value
        self.barrier.wait()
        parts[:] = self.parts


def features(num_rows: int) -> list[dict[str, Any]]:
    lengths = np.random.default_rng(num_rows).integers(1, 9, num_rows)
    return [{"input_ids": [7] * length, "number": i} for i, length in enumerate(lengths)]


def evaluate_once(num_rows: int, group: Any = None, batch_size: int = 3) -> Any:
    task, model = FakeTask(), Parity().train()
    beats: list[int] = []
    metrics, outcomes = evaluate.evaluate(
        model,
        task,  # type: ignore[arg-type]
        "tokenizer",
        features(num_rows),
        batch_size,
        group,
        on_batch=lambda: beats.append(1),
    )
    assert model.training
    assert set(model.modes) <= {(False, False)}
    assert len(beats) == len(task.batches), "a sign of life for each batch"
    return metrics, outcomes, task.batches


@pytest.mark.parametrize("num_rows", [1, 2, 7, 12])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_sharded_evaluation_is_that_of_one_worker_each_row_once(
    num_rows: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate_once(num_rows)
    assert expected[1] == [float(i % 2 == 0) for i in range(num_rows)], "in row order"
    group = FakeGroup(world)
    monkeypatch.setattr(evaluate, "dist", group)
    results: dict[int, Any] = {}

    def work(rank: int) -> None:
        group.here.rank = rank
        results[rank] = evaluate_once(num_rows, group)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == world
    for metrics, outcomes, _ in results.values():
        assert (metrics, outcomes) == expected[:2]
    seen = [row for _, _, batches in results.values() for batch in batches for row in batch]
    assert sorted(seen) == list(range(num_rows))


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_evaluation_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    metrics, outcomes, batches = evaluate_once(11, batch_size=batch_size)
    assert (metrics, outcomes) == evaluate_once(11)[:2]
    assert max(len(batch) for batch in batches) == min(batch_size, 11)


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 9))
@settings(deadline=None)
def test_calibration_folds_share_out_one_sample_each_in_order_of_length(
    num_samples: int, num_folds: int, seed: int
) -> None:
    lengths = np.random.default_rng(seed).integers(1, 9, 30).tolist()
    folds = calibration_folds(lengths, num_samples, num_folds, seed)
    rows = [row for fold in folds for row in fold]
    assert sorted(rows) == sorted(calibration_rows(30, num_samples, seed))
    sizes = [len(fold) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    for fold in folds:
        assert [lengths[row] for row in fold] == sorted(lengths[row] for row in fold)
