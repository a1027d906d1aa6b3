"""Rows that stand in two splits: how many, by their inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

AT_ONCE = 1000  # rows


def duplicates_of(splits: Mapping[str, Any], columns: Sequence[str]) -> dict[str, int]:
    """``"train/test"`` → rows of the latter whose inputs are exactly those of a row of the former.

    Args:
        splits: in the order in which they are compared, as data sets or as lists by column; None
            where there is none.
        columns: the inputs: texts, bytes, images as they are stored, numbers, or lists of these.

    >>> splits = {"train": {"text": ["a", "b"]}, "test": {"text": ["b", "b", "B"]}}
    >>> duplicates_of(splits, ["text"])
    {'train/test': 2}
    """
    inputs = {
        name: list(_digests(rows, columns)) for name, rows in splits.items() if rows is not None
    }
    known = {name: set(digests) for name, digests in inputs.items()}
    return {
        f"{first}/{second}": sum(digest in known[first] for digest in inputs[second])
        for first, second in combinations(inputs, 2)
    }


def _digests(rows: Any, columns: Sequence[str]) -> Iterator[bytes]:
    """16 bytes for the inputs of every row: long ones of many rows needn't be held at once."""
    for values in _batches(rows, columns):
        for row in zip(*values, strict=True):
            digest = hashlib.blake2b(digest_size=16)
            for value in map(_bytes_of, row):
                digest.update(b"%d:" % len(value))  # so that "ab", "c" isn't "a", "bc"
                digest.update(value)
            yield digest.digest()


def _batches(rows: Any, columns: Sequence[str]) -> Iterator[list[list[Any]]]:
    """The columns' values, some rows at a time; images aren't decoded."""
    if isinstance(rows, Mapping):
        yield [list(rows[column]) for column in columns]
        return
    stored = rows.select_columns(list(columns)).with_format("arrow")
    for batch in stored.iter(AT_ONCE):
        yield [batch.column(column).to_pylist() for column in columns]


def _bytes_of(value: Any) -> bytes:
    """Differ where values differ.

    >>> _bytes_of("1"), _bytes_of(1), _bytes_of({"bytes": b"1", "path": "a.png"})
    (b's1', b'[1]', b'b1')
    """
    if isinstance(value, str):
        return b"s" + value.encode("utf-8", "surrogatepass")
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):  # as images are stored
        value = value["bytes"]
    if isinstance(value, bytes):
        return b"b" + value
    return json.dumps([value], sort_keys=True, default=bytes.hex).encode()
