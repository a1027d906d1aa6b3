"""Rows of a task's splits, with the columns that it reads: checked, and carved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from e2lora.config import TaskConfig
from e2lora.tasks.sources import Source

AT_ONCE = 1000  # rows
SHOWN = 200  # characters of a value in a message


def read_splits(
    config: TaskConfig, columns: Sequence[str], test_columns: Sequence[str] | None = None
) -> dict[str, Any]:
    """``{"train", "validation", "test"}``: ``datasets.Dataset``, or None where no split is named.

    Columns have the names that they have in ``config.data``, in test rows of another data set too;
    further columns stay.

    Args:
        columns: that every row must have.
        test_columns: that test rows must have, where those are others.

    Raises:
        FileNotFoundError, ValueError, OSError: no such data, no such split, a missing column.
    """
    named = {"train": config.train_split, "validation": config.validation_split}
    elsewhere = config.test_data is not None
    if not elsewhere:
        named["test"] = config.test_split
    source = Source.of(config.data, config.subset)
    source.require(
        [name for name in named.values() if name],
        "`train_split`/`validation_split`/`test_split` (no `validation_split`: one is carved)",
    )
    splits = {split: source.read(name) if name else None for split, name in named.items()}
    needed = columns if test_columns is None else test_columns
    if config.test_data is not None and config.test_split is not None:
        test = Source.of(config.test_data, config.test_subset, lone=config.test_split)
        test.require([config.test_split], "`test_split`")
        splits["test"] = _renamed(test.read(config.test_split), config, needed)
    for split, rows in splits.items():
        if rows is not None:
            _require_columns(rows, needed if split == "test" else columns, split, config)
    return splits


def _renamed(rows: Any, config: TaskConfig, needed: Sequence[str]) -> Any:
    """Test rows with our names; a column that bears one of them and isn't meant is left out.

    Raises:
        ValueError: ``test_columns`` names what isn't there, or isn't read.
    """
    theirs = list(config.test_columns.values())
    unread = sorted(set(config.test_columns) - set(needed))
    absent = [name for name in theirs if name not in rows.column_names]
    if unread or absent or len(set(theirs)) < len(theirs):
        raise ValueError(
            "`test_columns` gives for columns of the training rows what the test rows call them, "
            f"each another; got {config.test_columns}, where {list(needed)} are read and the test "
            f"rows of {config.test_data!r} have {rows.column_names}. Correct it. First row: "
            f"{shown(rows[0])}"
        )
    replaced = [name for name in config.test_columns if name in rows.column_names]
    rows = rows.remove_columns([name for name in replaced if name not in theirs])
    return rows.rename_columns({name: ours for ours, name in config.test_columns.items()})


def _require_columns(rows: Any, columns: Sequence[str], split: str, config: TaskConfig) -> None:
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        fields = [field for field in type(config).model_fields if field.endswith("_column")]
        if split == "test" and config.test_data:
            fields = ["test_columns"]
        known = ", ".join(f"`{field}`" for field in fields)
        raise ValueError(
            f"every row needs the columns {list(columns)}; split {split!r} of "
            f"{source_name(config, split)!r} has {rows.column_names}, not {missing}. Set the right "
            f"one of {known}. First row: {shown(rows[0])}"
        )


def source_name(config: TaskConfig, split: str) -> str:
    """What the rows of a split are read from, as it was configured."""
    return config.test_data if split == "test" and config.test_data else config.data


def shown(row: Mapping[str, Any]) -> str:
    """A row in a message: long values are cut.

    >>> shown({"text": "a" * 500, "label": 1})[-20:]
    "aaaaaa…, 'label': 1}"
    """
    values = {name: repr(value) for name, value in row.items()}
    cut = {name: v if len(v) <= SHOWN else f"{v[:SHOWN]}…" for name, v in values.items()}
    return "{" + ", ".join(f"{name!r}: {value}" for name, value in cut.items()) + "}"


def carve_validation(splits: dict[str, Any], config: TaskConfig) -> dict[str, Any]:
    """``{"train", "validation"}``: validation cut to ``validation_size``, or carved by seed; and
    ``"test"``, as it was, where there are test rows.

    Raises:
        ValueError: carving would take more than half of the training rows.
    """
    train, validation, test = splits["train"], splits["validation"], splits.get("test")
    passed = {} if test is None else {"test": test}
    rng = np.random.default_rng(config.split_seed)
    if validation is not None:
        if len(validation) > config.validation_size:
            kept = np.sort(rng.permutation(len(validation))[: config.validation_size])
            validation = validation.select(kept)
        return {"train": train, "validation": validation, **passed}
    if 2 * config.validation_size > len(train):
        raise ValueError(
            "a carved validation split may take at most half of the training rows; got "
            f"validation_size={config.validation_size} of {len(train)} rows in {config.data!r}. "
            "Lower it, or name a `validation_split`."
        )
    order = rng.permutation(len(train))
    return {
        "train": train.select(np.sort(order[config.validation_size :])),
        "validation": train.select(np.sort(order[: config.validation_size])),
        **passed,
    }


def content_of(config: TaskConfig, values: Iterable[Sequence[Any]]) -> str:
    """Names columns of values with a task's own options; where the rows lie doesn't enter."""
    options = config.model_dump(mode="json", exclude=set(TaskConfig.model_fields))
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for column in values:
        digest.update(b"\ncolumn\n")
        for begin in range(0, len(column), AT_ONCE):
            digest.update(json.dumps(column[begin : begin + AT_ONCE]).encode())
    return digest.hexdigest()


def require_filled(
    rows: Any,
    columns: Sequence[str],
    kind: type | tuple[type, ...],
    split: str,
    config: TaskConfig,
) -> None:
    """Refuse a row whose field is missing, null or of another kind, and show it.

    Raises:
        ValueError: with the row's number and content.
    """
    for column in columns:
        # some at a time: one by one, 400 000 rows would take ten seconds
        batches = rows.select_columns([column]).iter(AT_ONCE)
        values = chain.from_iterable(batch[column] for batch in batches)
        for number, value in enumerate(values):
            if not isinstance(value, kind):
                raise ValueError(
                    f"every row needs a {_named(kind)} in {column!r}; {split} row {number} of "
                    f"{source_name(config, split)!r} has {value!r}: {shown(rows[number])}. "
                    "Correct or drop the row."
                )


def _named(kind: type | tuple[type, ...]) -> str:
    return kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
