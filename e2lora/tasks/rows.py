"""Rows of a data set, from a hub name, a local file or a folder, through one code path.

A local folder holds ``train``, ``validation`` and ``test`` files (jsonl, json, csv or parquet; only
``train`` is needed); a single file is its training split.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from e2lora.assets import resolve
from e2lora.config import TaskConfig

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def read_splits(config: TaskConfig, columns: Sequence[str]) -> dict[str, Any]:
    """The training split, and the validation split if one is named, as ``datasets.Dataset``.

    Raises:
        FileNotFoundError, ValueError: no such data, no such split, a missing column.
    """
    import datasets

    location = resolve(config.data)
    names = [config.train_split] + ([config.validation_split] if config.validation_split else [])
    local = _local_files(Path(location)) if Path(location).exists() else None
    if local is not None:
        absent = [name for name in names if name not in local]
        if absent:
            raise ValueError(
                f"the data must hold the named splits; {location} has {sorted(local)}, not "
                f"{absent}. Set `train_split`/`validation_split` (None carves one)."
            )
    if local is not None and config.subset is not None:
        raise ValueError(
            f"`subset` chooses within a data set of a hub; {location} is local, so it would have "
            f"no effect; got {config.subset!r}. Remove it, or name another folder."
        )
    loaded = {}
    options: dict[str, Any]
    for name in names:
        if local is None:
            source, options = location, {"name": config.subset}
        else:
            source = READERS[local[name].suffix]
            # a path is not a pattern: brackets in it are meant
            options = {"data_files": {name: glob.escape(str(local[name]))}}
            if source == "csv":  # the text "NA" is a text
                options |= {"keep_default_na": False, "na_values": [""]}
            _require_content(local[name])
        try:
            loaded[name] = datasets.load_dataset(source, split=name, **options)
        except Exception as error:  # each reader and the hub raise their own kinds
            if "corresponds to no data" in str(error):
                raise ValueError(
                    f"split {name!r} of {config.data!r} holds no rows. Name another one."
                ) from error
            raise ValueError(
                "the data must be a readable local file or folder, demo:NAME, or a hub name that "
                f"can be reached; got {config.data!r}, split {name!r}: {_first_cause(error)} "
                "Check the name, the file's lines, or your access to the hub."
            ) from error
    for name, rows in loaded.items():
        if len(rows) == 0:
            raise ValueError(f"split {name!r} of {config.data!r} holds no rows. Name another one.")
        missing = [column for column in columns if column not in rows.column_names]
        if missing:
            fields = type(config).model_fields
            known = ", ".join(f"`{field}`" for field in fields if field.endswith("_column"))
            raise ValueError(
                f"every row needs the columns {list(columns)}; split {name!r} of {config.data!r} "
                f"has {rows.column_names}, not {missing}. Set the right one of {known}. First "
                f"row: {rows[0]}"
            )
    return {
        "train": loaded[config.train_split],
        "validation": loaded[config.validation_split] if config.validation_split else None,
    }


def _first_cause(error: BaseException) -> str:
    """What was wrong at the bottom: `datasets` only says that reading failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _require_content(file: Path) -> None:
    if file.stat().st_size == 0:
        raise ValueError(f"a data file must hold rows; {file} is empty. Name another one.")


def _local_files(path: Path) -> dict[str, Path]:
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(
                f"a data file must end in one of {sorted(READERS)}; got {path}. Convert it."
            )
        return {"train": path}
    files: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if file.suffix in READERS:
            if file.stem in files:
                raise ValueError(
                    f"a data folder must hold one file per split; {path} has {file.name} beside "
                    f"{files[file.stem].name}. Remove or rename one of them."
                )
            files[file.stem] = file
    if not files:
        raise FileNotFoundError(
            f"a data folder must hold files such as train.jsonl (or {sorted(READERS)}); "
            f"{path} holds none. Name another folder or a file."
        )
    return files


def carve_validation(splits: dict[str, Any], config: TaskConfig) -> dict[str, Any]:
    """``{"train", "validation"}``: validation cut to ``validation_size``, or carved by seed.

    Raises:
        ValueError: carving would take more than half of the training rows.
    """
    train, validation = splits["train"], splits["validation"]
    rng = np.random.default_rng(config.split_seed)
    if validation is not None:
        if len(validation) > config.validation_size:
            kept = np.sort(rng.permutation(len(validation))[: config.validation_size])
            validation = validation.select(kept)
        return {"train": train, "validation": validation}
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
    }


def content_of(config: TaskConfig, values: Iterable[Sequence[Any]]) -> str:
    """Names columns of values with a task's own options; where the rows lie doesn't enter."""
    options = config.model_dump(mode="json", exclude=set(TaskConfig.model_fields))
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for column in values:
        digest.update(b"\ncolumn\n")
        for begin in range(0, len(column), HASHED_AT_ONCE):
            digest.update(json.dumps(column[begin : begin + HASHED_AT_ONCE]).encode())
    return digest.hexdigest()


HASHED_AT_ONCE = 1000  # rows


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
        for number, value in enumerate(rows[column]):
            if not isinstance(value, kind):
                raise ValueError(
                    f"every row needs a {_named(kind)} in {column!r}; {split} row {number} of "
                    f"{config.data!r} has {value!r}: {rows[number]}. Correct or drop the row."
                )


def _named(kind: type | tuple[type, ...]) -> str:
    return kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
