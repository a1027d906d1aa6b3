"""Tokenised rows kept on disk: made once, and read in place by all workers of a node.

FOLDER/KEY/
  rows.json              RowsRecord, written last; the folder gets its name when it is complete
  NAME.values.npy        numbers of all rows, one after another
  NAME.offsets.npy       where each row begins, of features that are lists
  num_supervised.npy     supervised samples or tokens of each row
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from pydantic import ValidationError

import e2lora
from e2lora.assets import cache_root
from e2lora.config import Frozen, fingerprint_of
from e2lora.tasks import Task, TrialData
from e2lora.tasks.columns import Column, TokenRows

RECORD = "rows.json"
COUNTS = "num_supervised"


class RowsRecord(Frozen):
    """What a folder holds: features in order, and a checksum of every file."""

    key: str
    features: tuple[str, ...]
    checksums: dict[str, int]


def tokenised(task: Task, processor: Any, cache: TokenCache | None = None) -> TrialData:
    """The task with its rows, from the cache (by default this user's) where they are there."""
    cache = cache or TokenCache()

    def made(split: str) -> TokenRows:
        return TokenRows.of(task.features(split, processor), task.num_supervised)

    try:
        content = tokenizer_content(processor)
    except (OSError, ValueError, NotImplementedError) as error:
        cache.give_up(error)
        return TrialData(task, *map(made, task.splits))

    def rows(split: str) -> TokenRows:
        return cache.rows(rows_key(task, split, content), lambda: made(split))

    return TrialData(task, *map(rows, task.splits))


class TokenCache:
    """A folder of tokenised rows; where it can't be used, rows are made in memory."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_root() / "tokens"
        self._given_up = False

    def rows(self, key: str, make: Callable[[], TokenRows]) -> TokenRows:
        """The rows stored under ``key``; made where there are none, while other processes wait."""
        place = self.folder / key
        rows = _read(place, key)
        if rows is None:
            with self._turn(place):
                rows = _read(place, key, tell=True) or self._stored(make(), place, key)
        return rows

    @contextmanager
    def _turn(self, place: Path) -> Iterator[None]:
        """Alone among the processes of this node, if the folder can be used."""
        lock = FileLock(f"{place}.lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            self.give_up(error)
        try:
            yield
        finally:
            lock.release()

    def _stored(self, rows: TokenRows, place: Path, key: str) -> TokenRows:
        if self._given_up:
            return rows
        partial = Path(f"{place}.partial")
        try:
            for leftover in (partial, place):
                if leftover.exists():
                    shutil.rmtree(leftover)
            _write(rows, partial, key)
            os.replace(partial, place)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            self.give_up(error)
            return rows
        return _read(place, key, tell=True) or rows

    def give_up(self, error: Exception) -> None:
        """Say once why rows are made in memory."""
        if not self._given_up:
            self._given_up = True
            print(
                f"warning: tokenised rows can't be cached in {self.folder}, and every process "
                f"makes its own: {error}",
                file=sys.stderr,
            )


def rows_key(task: Task, split: str, tokenizer: str) -> str:
    """Names all that decides tokenised rows: the rows, options, tokenizer, code and versions."""
    libraries = {name: version(name) for name in ("transformers", "tokenizers")}
    kind = type(task.config).__name__
    return fingerprint_of([kind, split, task.content(split), tokenizer, code_version(), libraries])


def tokenizer_content(tokenizer: Any) -> str:
    """Names a tokenizer by the files that it would be saved as, wherever it was loaded from."""
    digest = hashlib.sha256(repr(tokenizer.model_input_names).encode())
    with tempfile.TemporaryDirectory(prefix="e2lora-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            content = file.read_bytes()
            if file.suffix == ".json":
                passing = PASSING.get(file.name, ())
                kept = {k: v for k, v in json.loads(content).items() if k not in passing}
                content = json.dumps(kept, sort_keys=True).encode()
            digest.update(f"{file.name} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


PASSING = {
    "tokenizer.json": ("truncation", "padding"),  # of the last call
    "tokenizer_config.json": ("name_or_path", "is_local", "local_files_only"),
}
"""What a saved tokenizer holds that doesn't decide tokens."""


def code_version() -> str:
    """Changes with any change to the code that makes or keeps rows."""
    (folder,) = e2lora.__path__
    files = [*sorted(Path(folder).glob("tasks/*.py")), Path(__file__)]
    return fingerprint_of([[file.name, file.read_text(encoding="utf-8")] for file in files])


def _write(rows: TokenRows, folder: Path, key: str) -> None:
    folder.mkdir()
    arrays: dict[str, NDArray[Any]] = {COUNTS: rows.num_supervised}
    for name, column in rows.columns.items():
        arrays[f"{name}.values"] = column.values
        if column.offsets is not None:
            arrays[f"{name}.offsets"] = column.offsets
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    checksums = {f"{name}.npy": _checksum(folder / f"{name}.npy") for name in arrays}
    record = RowsRecord(key=key, features=tuple(rows.columns), checksums=checksums)
    (folder / RECORD).write_text(record.model_dump_json(), encoding="utf-8")


def _read(folder: Path, key: str, tell: bool = False) -> TokenRows | None:
    """The rows of a complete folder, in place; None if there is none, or none to be trusted."""
    try:
        record = RowsRecord.model_validate_json((folder / RECORD).read_text(encoding="utf-8"))
        if record.key != key:
            raise ValueError(f"it was stored under {record.key}")
        for name, checksum in record.checksums.items():
            if _checksum(folder / name) != checksum:
                raise ValueError(f"{name} is not what was stored")
        arrays = {name: _in_place(folder / name) for name in record.checksums}
        columns = {
            name: Column(arrays[f"{name}.values.npy"], arrays.get(f"{name}.offsets.npy"))
            for name in record.features
        }
        return TokenRows(columns, arrays[f"{COUNTS}.npy"])
    except (FileNotFoundError, NotADirectoryError) as error:
        if not folder.is_dir():
            return None
        why = str(error)
    except (ValidationError, ValueError, KeyError, OSError) as error:
        why = str(error).splitlines()[0]
    if tell:
        print(f"the tokenised rows in {folder} are damaged and made again: {why}", file=sys.stderr)
    return None


def _in_place(file: Path) -> NDArray[Any]:
    """An array of which only what is looked at is read; an empty one can't be mapped."""
    try:
        return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
    except ValueError:
        return np.load(file, allow_pickle=False)


def _checksum(file: Path) -> int:
    """CRC-32 of a file's bytes: what is sought is damage, not malice."""
    checksum = 0
    with file.open("rb") as opened:
        while chunk := opened.read(2**20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
