"""Rows that stand in two splits are counted, by all of their inputs and by nothing else."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import pytest

from e2lora.tasks.duplicates import duplicates_of


def counted(splits: dict[str, list[dict[str, Any]]], columns: list[str]) -> dict[str, int]:
    """Every row against every row."""
    return {
        f"{a}/{b}": sum(
            any(all(x[c] == y[c] for c in columns) for x in splits[a]) for y in splits[b]
        )
        for a, b in combinations(splits, 2)
    }


def as_data_sets(splits: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    from datasets import Dataset

    return {name: Dataset.from_list(rows) for name, rows in splits.items()}


VALUES: dict[str, list[Any]] = {
    "texts": ["a", "A", "a ", "", "é", "e\u0301", "b", "ab"],
    "bytes": [b"a", b"", b"\xff", b"\xff\x00"],
    "numbers": [0, 1, -1, 2**40],
    "lists": [["a", "b"], ["ab"], ["b", "a"], [], ["a"]],
    "nulls": ["None", None, "null"],
}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("columns", [["x"], ["x", "y"]])
def test_counts_are_those_of_comparing_every_pair_of_rows(kind: str, columns: list[str]) -> None:
    draw = random.Random(0)
    splits = {
        split: [
            {"x": draw.choice(VALUES[kind]), "y": draw.choice(VALUES[kind]), "label": i}
            for i in range(size)
        ]
        for split, size in (("train", 9), ("validation", 6), ("test", 7))
    }
    expected = counted(splits, columns)
    assert list(expected) == ["train/validation", "train/test", "validation/test"]
    assert any(expected.values())
    assert duplicates_of(as_data_sets(splits), columns) == expected
    by_column = {
        split: {column: [row[column] for row in rows] for column in columns}
        for split, rows in splits.items()
    }
    assert duplicates_of(by_column, columns) == expected


def test_texts_of_a_pair_are_not_run_together() -> None:
    for first, second in ((("ab", "c"), ("a", "bc")), (("asb", "c"), ("a", "bsc"))):
        splits = {
            name: [dict(zip("ab", pair, strict=True))]
            for name, pair in (("train", first), ("test", second))
        }
        assert duplicates_of(as_data_sets(splits), ["a", "b"]) == {"train/test": 0}


def test_selected_rows_alone_are_looked_at() -> None:
    rows = [{"text": str(i)} for i in range(3000)]
    (data,) = as_data_sets({"train": rows}).values()
    splits = {"train": data.select(range(2000)), "test": data.select(range(1500, 3000))}
    assert duplicates_of(splits, ["text"]) == {"train/test": 500}


def test_images_are_compared_by_their_bytes_and_not_decoded() -> None:
    from datasets import Dataset, Features, Image

    def images(*contents: tuple[bytes, str]) -> Dataset:
        stored = [{"bytes": data, "path": path} for data, path in contents]
        return Dataset.from_dict({"image": stored}, features=Features({"image": Image()}))

    splits = {
        "train": images((b"one, not a png", "a.png"), (b"two", "b.png")),
        "test": images((b"one, not a png", "c.png"), (b"three", "b.png")),
    }
    assert duplicates_of(splits, ["image"]) == {"train/test": 1}


def test_only_splits_that_are_there_are_compared() -> None:
    splits: dict[str, Any] = as_data_sets({"train": [{"text": "a"}], "test": [{"text": "a"}]})
    assert duplicates_of({**splits, "validation": None}, ["text"]) == {"train/test": 1}
    assert duplicates_of({"train": splits["train"]}, ["text"]) == {}
