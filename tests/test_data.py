"""Batches are pure functions of seed and step; workers share them, each row exactly once."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from e2lora import evaluate, prefetch
from e2lora.assets import resolve
from e2lora.config import GenerationConfig, SftConfig, TextClassificationConfig, TrainConfig
from e2lora.data import (
    Batches,
    RowStream,
    StepBatch,
    calibration_folds,
    calibration_rows,
    microbatches_of,
    step_rows,
)
from e2lora.prefetch import made_ahead
from e2lora.tasks import TokenRows, TrialData, load_task
from e2lora.tasks.scores import Judgement, RowScore

lengths_of_rows = st.lists(st.integers(1, 200), min_size=1, max_size=70)
batch_sizes = st.integers(1, 40)
seeds = st.integers(0, 2**31)


STEP_0 = [41, 10, 81, 28]
STEP_24 = [24, 95, 2, 64, 33, 73]


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
    stream = RowStream(np.array(lengths), batch_size, seed)
    stream.rows(max(step - 3, 0))
    assert stream.rows(step) == stream.rows(step) == rows


def test_order_is_the_one_that_checkpoints_and_results_of_the_past_rely_on() -> None:
    lengths = [7 * i % 31 + 1 for i in range(100)]
    assert step_rows(lengths, 0, 4, seed=3) == STEP_0
    assert step_rows(lengths, 24, 6, seed=5) == STEP_24


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
    longest = [max(batch) for batch in batches]  # of one bucket
    assert longest != sorted(longest), "no curriculum of lengths"


def test_steps_are_of_like_length_in_every_epoch_though_rows_are_left_over() -> None:
    """Of 323 rows in batches of 8 some steps lie in two epochs: these may be of any length."""
    lengths = np.random.default_rng(0).integers(1, 100, 323).tolist()
    for epoch in range(3):
        first, last = -(-epoch * 323 // 8), (epoch + 1) * 323 // 8
        batches = [[lengths[i] for i in step_rows(lengths, t, 8, 0)] for t in range(first, last)]
        padding = sum(8 * max(batch) - sum(batch) for batch in batches)
        assert padding < 0.15 * sum(map(sum, batches)), epoch


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


# ---- batches of tensors -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve("demo:minilm-l6"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, minilm: Any) -> TrialData:
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"text": "so good " * (i * 7 % 5), "label": i % 3} for i in range(43)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(TextClassificationConfig(data=str(folder), validation_size=5))
    return TrialData(task, *(task.features(s, minilm) for s in ("train", "validation")))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("drop", [None, "token_type_ids", "attention_mask"])
def test_texts_are_padded_as_the_tokenizer_pads(
    texts: TrialData, minilm: Any, monkeypatch: pytest.MonkeyPatch, side: str, drop: str | None
) -> None:
    monkeypatch.setattr(minilm, "padding_side", side)
    rows = [{k: v for k, v in row.items() if k != drop} for row in texts.train[:9]]
    inputs = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    expected = minilm.pad(
        inputs, return_tensors="pt", return_attention_mask=drop != "attention_mask"
    )
    in_arrays = TokenRows.of(rows, len).arrays(range(9))
    for some in (rows, in_arrays):
        batch = texts.task.collate(some, minilm)
        labels = batch.pop("labels")
        assert labels.tolist() == [row["labels"] for row in rows]
        assert batch.keys() == expected.keys()
        for name, tensor in batch.items():
            assert tensor.dtype == labels.dtype == torch.int64
            assert torch.equal(tensor, expected[name]), name


def test_tokenizer_without_a_token_to_pad_with_is_refused(
    texts: TrialData, minilm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minilm, "_special_tokens_map", {})
    with pytest.raises(ValueError, match=r"gives none for \['input_ids'\]\. Set `pad_token`"):
        texts.task.collate(texts.train[:3], minilm)


def same(one: StepBatch, other: StepBatch) -> bool:
    return (one.num_supervised, one.num_tokens, len(one.microbatches)) == (
        other.num_supervised,
        other.num_tokens,
        len(other.microbatches),
    ) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one.microbatches, other.microbatches, strict=True)
    )


@pytest.mark.parametrize("in_columns", [False, True])
@pytest.mark.parametrize(("world", "num_micro"), [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_batches_are_the_rows_of_the_step_each_worker_its_share(
    texts: TrialData, minilm: Any, in_columns: bool, world: int, num_micro: int
) -> None:
    data = texts
    if in_columns:
        rows = TokenRows.of(texts.train, texts.task.num_supervised)
        data = TrialData(texts.task, rows, texts.validation)
    training = TrainConfig(
        max_steps=9,
        learning_rate=0.1,
        global_batch_size=8,
        num_workers=world,
        gradient_accumulation_steps=num_micro,
    )
    for step in (0, 4, 5, 8):  # 38 rows: step 4 lies in two epochs
        numbers = step_rows(texts.lengths, step, 8, seed=3)
        for rank in range(world):
            expected = [
                texts.task.collate([texts.train[i] for i in micro], minilm)
                for micro in microbatches_of(numbers, rank, world, num_micro)
            ]
            tokens = sum(len(texts.train[i]["input_ids"]) for i in numbers)
            batch = Batches(data, minilm, training, seed=3, rank=rank).at(step)
            assert same(batch, StepBatch(expected, 8, tokens))


def test_counts_are_of_the_tokens_that_are_learnt_and_of_all_workers(tmp_path: Path) -> None:
    rows = [{"prompt": "why", "answer": "so " * i} for i in range(1, 13)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task: Any = load_task(SftConfig(data=str(tmp_path), validation_size=4))
    from tests.test_sft import BOS, EOS, byte_tokenizer

    tokenizer = byte_tokenizer(bos_token=BOS, eos_token=EOS)
    data = TrialData(task, *(task.features(s, tokenizer) for s in ("train", "validation")))
    training = TrainConfig(max_steps=9, learning_rate=0.1, global_batch_size=4, num_workers=2)
    batches = [Batches(data, tokenizer, training, seed=1, rank=rank).at(1) for rank in (0, 1)]
    learnt = sum(int((b.microbatches[0]["labels"] != -100).sum()) for b in batches)
    tokens = sum(int(b.microbatches[0]["attention_mask"].sum()) for b in batches)
    for batch in batches:
        assert (batch.num_supervised, batch.num_tokens) == (learnt, tokens)


# ---- made ahead -------------------------------------------------------------------------------


def makers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "made ahead"]


def test_prefetched_batches_are_those_of_the_steps_and_leave_random_state_alone(
    texts: TrialData, minilm: Any
) -> None:
    training = TrainConfig(max_steps=9, learning_rate=0.1, global_batch_size=8)
    torch.manual_seed(7)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]
    with Batches(texts, minilm, training, seed=3).prefetched(2, 14) as prepared:
        found = list(prepared)
    direct = Batches(texts, minilm, training, seed=3)
    assert len(found) == 12
    assert all(same(batch, direct.at(step)) for step, batch in enumerate(found, start=2))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert not makers()


def test_few_values_are_made_ahead_and_by_another_thread() -> None:
    made: list[int] = []
    threads: set[Any] = set()

    def make(number: int) -> int:
        made.append(number)
        threads.add(threading.current_thread())
        return number

    with made_ahead(make, range(100)) as values:
        assert next(values) == 0
        until = time.monotonic() + 5
        while len(made) < 1 + prefetch.AHEAD and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05)
        assert 1 + prefetch.AHEAD <= len(made) <= 2 + prefetch.AHEAD
    assert threading.current_thread() not in threads
    assert made == list(range(len(made)))


def test_what_making_raises_is_raised_where_its_value_would_have_been() -> None:
    def make(number: int) -> int:
        if number == 3:
            raise FileNotFoundError("row 3")
        return number

    found: list[int] = []
    with pytest.raises(FileNotFoundError, match="row 3"), made_ahead(make, range(9)) as values:
        found.extend(values)  # extends as it goes
    assert not makers()
    with made_ahead(make, range(9)) as values:
        assert [next(values) for _ in range(3)] == [0, 1, 2]
    assert not makers()


@pytest.mark.parametrize("taken", [0, 1, 7])
@pytest.mark.parametrize("how", ["leaves", "raises"])
def test_thread_ends_at_once_when_the_consumer_stops(taken: int, how: str) -> None:
    class Unrelated(Exception):
        pass

    began = time.monotonic()
    try:
        with made_ahead(lambda n: n, range(10**9)) as values:
            assert [next(values) for _ in range(taken)] == list(range(taken))
            time.sleep(0.02)  # its places are full: it waits
            if how == "raises":
                raise Unrelated
    except Unrelated:
        pass
    assert not makers()
    assert time.monotonic() - began < 2.0
    assert list(values) == [], "nothing more comes, and nobody waits for it"


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

    splits = ("train", "validation")

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def collate(self, rows: Sequence[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        assert tokenizer == "tokenizer"
        return {"numbers": torch.tensor([row["number"] for row in rows])}

    def score(self, model: Any, batch: dict[str, Tensor]) -> list[RowScore]:
        numbers = batch["numbers"].tolist()
        self.batches.append(numbers)
        outcomes = model(batch["numbers"]).tolist()
        return [
            RowScore({"even": even}, 0.5 * n, 1) for even, n in zip(outcomes, numbers, strict=True)
        ]


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


def score_once(num_rows: int, group: Any = None, batch_size: int = 3) -> Any:
    """The scores of all rows, and what this worker computed together."""
    task, model = FakeTask(), Parity().train()
    data = TrialData(task, [], features(num_rows))  # type: ignore[arg-type]
    told: list[tuple[int, int]] = []
    scores = evaluate.score_rows(
        model,
        data,
        "validation",
        "tokenizer",
        batch_size,
        group,
        on_rows=lambda done, total: told.append((done, total)),
    )
    assert model.training
    assert set(model.modes) <= {(False, False)}
    mine = list(itertools.accumulate(map(len, task.batches)))
    assert told == [(done, mine[-1]) for done in mine], "after each batch"
    return scores, task.batches


def on_workers(
    world: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[Any], Any]
) -> list[Any]:
    """What each of the workers comes to; they are threads."""
    group = FakeGroup(world)
    monkeypatch.setattr(evaluate, "dist", group)
    results: dict[int, Any] = {}

    def run(rank: int) -> None:
        group.here.rank = rank
        results[rank] = work(group)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(world)]


@pytest.mark.parametrize("num_rows", [1, 2, 7, 12])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_workers_score_each_row_once_and_in_the_batches_that_one_worker_has(
    num_rows: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, whole = score_once(num_rows)
    assert [score.outcomes["even"] for score in expected] == [i % 2 == 0 for i in range(num_rows)]
    results = on_workers(world, monkeypatch, lambda group: score_once(num_rows, group))
    assert all(scores == expected for scores, _ in results), "in row order, on every worker"
    computed = [batch for _, batches in results for batch in batches]
    assert sorted(computed) == sorted(whole), "two workers score exactly as one"


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_scores_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    scores, batches = score_once(11, batch_size=batch_size)
    assert scores == score_once(11)[0]
    assert max(len(batch) for batch in batches) == min(batch_size, 11)


class FakeWriter(FakeTask):
    """Prompts are a row's number, so often as says another; the text repeats it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = GenerationConfig(batch_size=2, **options)
        self.judged: list[int] = []

    def generation(self, split: str) -> GenerationConfig:
        return self.options

    def prompts(self, split: str, tokenizer: Any) -> list[list[int]]:
        return [[i] * (1 + i * 5 % 7) for i in range(9)]

    def judge(self, split: str, numbers: Any, texts: Any) -> list[Judgement]:
        self.judged += numbers
        assert texts == [[f"text {i}"] for i in numbers]
        return [Judgement({"right": i % 3 == 0}, texts[0], "") for i in numbers]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("limit", "split"), [(None, "validation"), (5, "validation"), (5, "test")])
def test_answers_are_written_and_judged_once_each(
    world: int, limit: int | None, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(
        model: Any, tokenizer: Any, prompts: Any, config: Any, numbers: Any, *others: Any
    ) -> Any:
        assert len(prompts) <= config.batch_size
        assert [prompt[0] for prompt in prompts] == numbers
        return [[f"text {i}"] for i in numbers]

    monkeypatch.setattr(evaluate, "write", write)
    monkeypatch.setattr(evaluate, "require_room", lambda *given: None)
    before = [RowScore({"nll": float(i)}, 1.0, 1) for i in range(9)]

    def work(group: Any) -> Any:
        task = FakeWriter(max_validation_rows=limit)
        data = TrialData(task, [], [])  # type: ignore[arg-type]
        model = Parity()
        return evaluate.judge_answers(model, data, split, "tokenizer", before, group), task.judged

    results = on_workers(world, monkeypatch, work)
    num_judged = 5 if limit and split == "validation" else 9
    assert sorted(i for _, judged in results for i in judged) == list(range(num_judged))
    for scores, _ in results:
        outcomes = [score.outcomes for score in scores]
        assert outcomes == [
            {"nll": float(i), **({"right": i % 3 == 0} if i < num_judged else {})} for i in range(9)
        ]


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
