"""From what a configuration names to rows: a hub, a file, a folder, the same under a URI.

A folder holds, of every split, one file (``train.jsonl``), parts as a hub stores them
(``train-00000-of-00003.parquet``, in ``data/`` too), or a folder of parts as Ray Data writes them
(``train/….parquet``). Files are jsonl, json, csv or parquet; jsonl, json and csv may be gzipped.
"""

from __future__ import annotations

import glob
import gzip
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from e2lora.assets import mirrored, resolve
from e2lora.hub import AWAY_REMEDY, absence, first_line, remedy
from e2lora.tasks.remote import is_uri, local_copy

READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".jsonl.gz": "json",
    ".json.gz": "json",
    ".csv.gz": "csv",
}
HUB_FOLDER = "data"  # where a hub keeps parts
WELL_KNOWN = {"train", "validation", "val", "dev", "test"}
NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})(-[0-9a-f]{16})?$")
UNNAMED = re.compile(  # as parts are called that name no split
    r"(part|data|shard|block)?[-_]?[\d_-]*"  # by hand
    r"|part-\d.*"  # by Spark
    r"|(\w+_)?[0-9a-f]{32}_\d{6}.*"  # by Ray Data: data set, UUID, task, block
)


RULE = (
    "the data must be a readable local file or folder, a URI, demo:NAME, or a hub name that can be "
    "reached"
)


class HubAway(ValueError):
    """No hub, and not these rows in this node's cache."""


@dataclass(frozen=True)
class Source:
    """Where the splits of one data set are: in files here, or under its name in a hub."""

    name: str  # as it was configured
    subset: str | None
    files: dict[str, tuple[Path, ...]] | None  # by split; None: in a hub

    @classmethod
    def of(cls, name: str, subset: str | None = None, lone: str = "train") -> Source:
        """
        Args:
            lone: which split a file is that is named by itself.

        Raises:
            FileNotFoundError, ValueError, OSError: no such data, or none that could be read.
        """
        folder = None if is_uri(name) else mirrored(name)
        if folder is not None and subset is not None:
            folder = _subfolder(folder, name, subset)
        if folder is None:
            path = local_copy(name, is_data_file) if is_uri(name) else Path(resolve(name))
            if not path.exists():
                return cls(name, subset, None)
            if subset is not None:
                raise ValueError(
                    f"`subset` chooses within a data set of a hub; {name} is no hub's, so it "
                    f"would have no effect; got {subset!r}. Remove it, or name another folder."
                )
            folder = path
        if folder.is_dir():
            return cls(name, subset, files_of_folder(folder))
        return cls(name, subset, {lone: (_require_kind(folder),)})

    def require(self, splits: Sequence[str], options: str) -> None:
        """Refuse splits that aren't there; what a hub has is known when it is asked.

        Args:
            options: of the configuration, that name the splits.

        Raises:
            ValueError: with those that there are.
        """
        absent = [split for split in splits if self.files is not None and split not in self.files]
        if absent:
            raise ValueError(
                f"the data must hold the named splits; {self.name} has {sorted(self.files or ())}, "
                f"not {absent}. Set {options}."
            )

    def read(self, split: str) -> Any:
        """The rows of a split, as ``datasets.Dataset``.

        Raises:
            ValueError: it can't be read, or holds no rows.
        """
        try:
            rows = self._of_hub(split) if self.files is None else _rows_of(self.files[split])
        except HubAway:
            raise
        except Exception as error:  # each reader and the hub raise their own kinds
            if "corresponds to no data" in str(error):
                raise self._no_rows(split) from error
            what = self._broken_line(split) or first_line(_first_cause(error))
            to_do = "Check the name, or the file's lines."
            if self.files is None:
                to_do = remedy("dataset", self.name, error)
            raise ValueError(
                f"{RULE}; got {self.name!r}, split {split!r}: {what} {to_do}"
            ) from error
        if len(rows) == 0:
            raise self._no_rows(split)
        return rows

    def _of_hub(self, split: str) -> Any:
        """Rows of the hub, or those that this node's cache kept of it while the hub is away."""
        import datasets
        from datasets.packaged_modules.cache.cache import Cache

        away = absence()
        if away is None:
            return datasets.load_dataset(self.name, self.subset, split=split)
        try:
            return Cache(
                dataset_name=self.name.rpartition("/")[2],
                repo_id=self.name,
                config_name=self.subset,
                version="auto",
                hash="auto",
            ).as_dataset(split)
        except ValueError as error:  # nothing is kept, or no such subset or split
            raise HubAway(
                f"{RULE}; got {self.name!r}, split {split!r}, which this node's cache can't give "
                f"({first_line(error)}), and {away}. {AWAY_REMEDY}, or name a local file or folder."
            ) from error

    def _no_rows(self, split: str) -> ValueError:
        return ValueError(f"split {split!r} of {self.name!r} holds no rows. Name another one.")

    def _broken_line(self, split: str) -> str:
        """The first line that isn't JSON: of several files the reader names neither."""
        for file in (self.files or {}).get(split, ()):
            if _kind(file).startswith(".jsonl"):
                with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
                    for number, line in enumerate(lines):
                        try:
                            json.loads(line)
                        except ValueError as error:
                            start = line[:120].decode("utf-8", "replace").rstrip("\n")
                            return f"JSON of {file.name}, row {number}: {error}: {start!r}."
        return ""


def _rows_of(files: Sequence[Path]) -> Any:
    """Of files of one kind; `load_dataset` would call the hub too, in vain on many clusters."""
    from datasets import Dataset

    paths: Any = [glob.escape(str(file)) for file in files]  # brackets in a path are meant
    reader = READERS[_kind(files[0])]
    if reader == "csv":  # the text "NA" is a text
        return Dataset.from_csv(paths, keep_default_na=False, na_values=[""])
    return Dataset.from_json(paths) if reader == "json" else Dataset.from_parquet(paths)


def _first_cause(error: BaseException) -> BaseException:
    """What was wrong at the bottom: `datasets` only says that reading failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _subfolder(folder: Path, name: str, subset: str) -> Path:
    """Of a mirrored data set: subsets are folders."""
    if not (folder / subset).is_dir():
        there = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise ValueError(
            f"a subset of a mirrored data set is a folder in it; {folder}, the mirror of {name}, "
            f"has {there}, not {subset!r}. Copy it there, or correct `subset`."
        )
    return folder / subset


# ---- files ------------------------------------------------------------------------------------


def is_data_file(name: str) -> bool:
    """Whether a file holds rows, by how its name ends. Hidden ones, and Spark's marks, don't.

    >>> [is_data_file(name) for name in ("train.jsonl.gz", "README.md", "_SUCCESS", ".t.csv")]
    [True, False, False, False]
    """
    return not name.startswith((".", "_")) and _kind(Path(name)) in READERS


def _kind(file: Path) -> str:
    last = file.suffix.lower()
    return Path(file.stem).suffix.lower() + last if last == ".gz" else last


def _require_kind(file: Path) -> Path:
    if _kind(file) not in READERS:
        raise ValueError(
            f"a data file must end in one of {sorted(READERS)}; got {file}. Convert it."
        )
    if file.stat().st_size == 0:
        raise ValueError(f"a data file must hold rows; {file} is empty. Name another one.")
    return file


class Part(NamedTuple):
    """Of whole files, number and total are None."""

    split: str
    number: int | None = None
    total: int | None = None


def part_of(file: str) -> Part:
    """What a file's name says of its place in a data set.

    >>> part_of("train.jsonl"), part_of("dev-00001-of-00004.parquet")
    (Part(split='train', number=None, total=None), Part(split='dev', number=1, total=4))
    >>> part_of("part-0003.csv").split, part_of("3_000001_000000-0.parquet").split
    ('train', 'train')
    """
    numbers = NUMBERED.search(_stem(file))
    split = "train" if _is_unnamed(file) else NUMBERED.sub("", _stem(file))
    return Part(split, int(numbers[1]), int(numbers[2])) if numbers else Part(split)


def _stem(file: str) -> str:
    return file[: len(file) - len(_kind(Path(file)))]


def _is_unnamed(file: str) -> bool:
    return UNNAMED.fullmatch(NUMBERED.sub("", _stem(file))) is not None


def _is_part(file: str) -> bool:
    return _is_unnamed(file) or NUMBERED.search(_stem(file)) is not None


def files_of_folder(folder: Path) -> dict[str, tuple[Path, ...]]:
    """The files of every split that a folder holds.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a split in two places, or of two kinds; missing parts; empty files.
    """
    places: dict[str, dict[Path, list[Path]]] = {}  # split → whole file, or folder of parts → files
    for file in _data_files(folder):
        place = folder if _is_part(file.name) else file
        places.setdefault(part_of(file.name).split, {}).setdefault(place, []).append(file)
    subsets = []
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = _data_files(inner)
        named = {part_of(file.name).split for file in files if not _is_unnamed(file.name)}
        if inner.name != HUB_FOLDER and (named - {inner.name}) & WELL_KNOWN:
            subsets.append(inner)  # its files are splits themselves
            continue
        for file in files:
            split = part_of(file.name).split if inner.name == HUB_FOLDER else inner.name
            place = inner if _is_part(file.name) or inner.name != HUB_FOLDER else file
            places.setdefault(split, {}).setdefault(place, []).append(file)
    if not places and len(subsets) == 1:
        return files_of_folder(subsets[0])
    if not places:
        raise FileNotFoundError(
            f"a data folder must hold files such as train.jsonl (or {sorted(READERS)}), or a "
            f"folder of them for every split; {folder} holds none. Name another folder or a file"
            + (f": {[path.name for path in subsets]} in it hold some." if subsets else ".")
        )
    found = {split: _only_place(split, where, folder) for split, where in sorted(places.items())}
    if len(found) == 1 and not WELL_KNOWN & set(found):
        # a hub too calls the only file of a data set its training split
        found["train"] = next(iter(found.values()))
    return found


def _only_place(split: str, where: dict[Path, list[Path]], folder: Path) -> tuple[Path, ...]:
    if len(where) > 1:
        first, second, *_ = (files[0].relative_to(folder) for files in where.values())
        raise ValueError(
            f"a data folder must hold every split once, in one file or in parts; for {split!r} "
            f"{folder} has {second} beside {first}. Remove or rename one of them."
        )
    (files,) = where.values()
    return _require_whole(split, files)


def _data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and is_data_file(path.name))


def _require_whole(split: str, files: Sequence[Path]) -> tuple[Path, ...]:
    """The files of a split that hold anything, after checking that they belong together."""
    kinds = sorted({READERS[_kind(file)] for file in files})
    if len(kinds) > 1:
        raise ValueError(
            f"the parts of a split must be of one kind; those of {split!r} in {files[0].parent} "
            f"are of {kinds}: {_names(files)}. Remove some of them."
        )
    parts = [part_of(file.name) for file in files]
    totals = {part.total for part in parts if part.total is not None}
    numbers = [part.number for part in parts if part.number is not None]
    if totals and (len(totals) > 1 or sorted(numbers) != list(range(max(totals)))):
        raise ValueError(
            f"a split must be whole, one file for each of its parts; {split!r} in "
            f"{files[0].parent} is to have {' or '.join(map(str, sorted(totals)))}, and has "
            f"{_names(files)}. Copy it again."
        )
    filled = tuple(file for file in files if file.stat().st_size)
    if not filled:
        raise ValueError(
            f"a data file must hold rows; {_names(files)} in {files[0].parent} is empty. Name "
            "another one."
        )
    return filled


def _names(files: Iterable[Path]) -> str:
    first, rest = [file.name for file in files][:4], len(list(files)) - 4
    return ", ".join(first) + (f" and {rest} more" if rest > 0 else "")
