"""Tokenised rows as columns of numbers: compact, fast to batch, readable from files in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Features = dict[str, Any]
Numbers = Sequence[int] | NDArray[Any]


@dataclass(frozen=True)
class Column:
    """One feature of all rows: ``values[i]`` of row i, or ``values[offsets[i] : offsets[i + 1]]``.

    ``values`` are of one kind of number, as narrow as they can be.
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, name: str, entries: Sequence[Any]) -> Column:
        """
        Raises:
            TypeError: entries that aren't numbers of one type, or lists of such.
        """
        lists = [type(entry) is list for entry in entries]
        offsets, flat = None, entries
        if all(lists):
            offsets = np.cumsum([0, *map(len, entries)], dtype=np.int64)
            flat = list(chain.from_iterable(entries))
        kinds = {kind.__name__ for kind in set(map(type, flat))}
        if len(kinds) > 1 or not kinds <= {"int", "float", "bool"}:
            raise TypeError(
                "a feature must be a number in every row, or a list of numbers in every row, all of"
                f" one type; {name!r} holds {sorted(kinds)}. Correct the task's `features`."
            )
        return cls(_narrowed(np.array(flat)), offsets)

    def row(self, i: int) -> Any:
        """An array that isn't copied, or a number."""
        if self.offsets is None:
            return self.values[i]
        return self.values[self.offsets[i] : self.offsets[i + 1]]


def _narrowed(values: NDArray[Any]) -> NDArray[Any]:
    """Integers in the smallest type that holds them all."""
    if values.dtype.kind != "i" or not len(values):
        return values
    return values.astype(
        np.result_type(np.min_scalar_type(values.min()), np.min_scalar_type(values.max()))
    )


class TokenRows(Sequence[Features]):
    """The rows that ``Task.features`` gave: each reads as the same dict of lists and numbers."""

    def __init__(self, columns: Mapping[str, Column], num_supervised: NDArray[np.int64]) -> None:
        self.columns = dict(columns)
        self.num_supervised = num_supervised  # of each row

    @classmethod
    def of(
        cls, rows: Sequence[Features], num_supervised: Callable[[Sequence[Features]], int]
    ) -> TokenRows:
        """``num_supervised`` is the task's own.

        Raises:
            TypeError: features that aren't numbers or lists of them.

        >>> rows = TokenRows.of([{"input_ids": [5, 300], "labels": 1}], len)
        >>> rows[0], rows.lengths, rows.columns["input_ids"].values.dtype
        ({'input_ids': [5, 300], 'labels': 1}, array([2]), dtype('uint16'))
        """
        columns = {name: Column.of(name, [row[name] for row in rows]) for name in rows[0]}
        counts = [num_supervised([row]) for row in rows]
        return cls(columns, np.array(counts, dtype=np.int64))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row; rows without any, as images, are all of length 1."""
        if "input_ids" not in self.columns:
            return np.ones(len(self), dtype=np.int64)
        offsets = self.columns["input_ids"].offsets
        assert offsets is not None, "token ids come in lists"
        return np.diff(offsets)

    def arrays(self, numbers: Iterable[int]) -> list[Features]:
        """These rows with arrays in place of lists, which batches are made from without a copy."""
        columns = self.columns.items()
        return [{name: column.row(i) for name, column in columns} for i in numbers]

    def __len__(self) -> int:
        return len(self.num_supervised)

    @overload
    def __getitem__(self, place: int) -> Features: ...
    @overload
    def __getitem__(self, place: slice) -> list[Features]: ...
    def __getitem__(self, place: int | slice) -> Features | list[Features]:
        numbers = range(len(self))[place]  # as of a list: negative places, and IndexError
        if isinstance(numbers, range):
            return [self[i] for i in numbers]
        return {name: column.row(numbers).tolist() for name, column in self.columns.items()}


def lengths_of(rows: Sequence[Features]) -> NDArray[np.int64]:
    """Tokens of each row, without reading any where that is known."""
    if isinstance(rows, TokenRows):
        return rows.lengths
    return np.array([len(row.get("input_ids", (0,))) for row in rows], dtype=np.int64)


def picked(rows: Sequence[Features], numbers: Sequence[int]) -> list[Features]:
    """Some rows, as arrays where they lie as such: for collation, which takes both."""
    return rows.arrays(numbers) if isinstance(rows, TokenRows) else [rows[i] for i in numbers]


def padded(sequences: Sequence[Numbers], value: int, side: str = "right") -> Tensor:
    """int64, [number, length of the longest], filled up with ``value`` on one side.

    >>> padded([[1, 2], [3]], value=0, side="left").tolist()
    [[1, 2], [0, 3]]
    """
    width = max(map(len, sequences))
    filled = np.full((len(sequences), width), value, dtype=np.int64)
    for row, sequence in zip(filled, sequences, strict=True):
        first = 0 if side == "right" else width - len(sequence)
        row[first : first + len(sequence)] = sequence
    return torch.from_numpy(filled)
