"""Rows written as files of every kind that is read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]


def as_jsonl(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_csv(rows: Rows) -> str:
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    return "".join(f"{line}\n" for line in lines)


def write_parquet(file: Path, rows: Rows) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)


WRITERS: dict[str, Callable[[Path, Rows], Any]] = {
    ".jsonl": lambda file, rows: file.write_text(as_jsonl(rows)),
    ".json": lambda file, rows: file.write_text(json.dumps(list(rows))),
    ".csv": lambda file, rows: file.write_text(as_csv(rows)),
    ".parquet": write_parquet,
    ".jsonl.gz": lambda file, rows: file.write_bytes(gzip.compress(as_jsonl(rows).encode())),
    ".csv.gz": lambda file, rows: file.write_bytes(gzip.compress(as_csv(rows).encode())),
}


def write(file: Path, rows: Rows) -> Path:
    """By the end of its name; makes the folders."""
    file.parent.mkdir(parents=True, exist_ok=True)
    (kind,) = (kind for kind in WRITERS if file.name.endswith(kind))
    WRITERS[kind](file, rows)
    return file


def folder_of(folder: Path, **splits: str | Rows) -> Path:
    """A folder with one jsonl file per split, from rows or as literal text."""
    folder.mkdir(exist_ok=True)
    for name, content in splits.items():
        text = content if isinstance(content, str) else as_jsonl(content)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def in_own_cache(folder: Path, monkeypatch: Any) -> None:
    """What `datasets` makes of these files shall not stay in the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", folder / "downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", folder / "downloads/extracted")
