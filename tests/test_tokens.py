"""Rows are tokenised once, whoever asks and however often; what can't be trusted is made again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e2lora import tokens
from e2lora.assets import resolve
from e2lora.config import SftConfig, TextClassificationConfig
from e2lora.tasks import TokenRows, TrialData, load_task
from e2lora.tokens import TokenCache, tokenised
from tests.test_sft import BOS, EOS, byte_tokenizer

SPLITS = ("train", "validation")
TEXTS = [{"text": f"{'very ' * (i % 5)}good {i}", "label": i % 3} for i in range(12)]
ANSWERS = [{"prompt": f"what is {i}?", "answer": "one " * i} for i in range(1, 12)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of these tests shall stay in the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def load_minilm() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve("demo:minilm-l6"))


def load_bytes(**options: Any) -> Any:
    return byte_tokenizer(bos_token=BOS, eos_token=EOS, **options)


def task_of(folder: Path, rows: Sequence[dict[str, Any]] = ANSWERS, **options: Any) -> Any:
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind: Any = SftConfig if "prompt" in rows[0] else TextClassificationConfig
    return load_task(kind(data=str(folder), **{"validation_size": 3, **options}))


class Counted:
    """A task of which the number of rows it was asked to tokenise is known."""

    def __init__(self, task: Any) -> None:
        self.task, self.asked = task, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def features(self, split: str, tokenizer: Any) -> Any:
        self.asked += 1
        return self.task.features(split, tokenizer)


def read(task: Any, tokenizer: Any, folder: Path) -> tuple[list[Any], int]:
    """All rows through a new cache object, and how many splits had to be tokenised for it."""
    counted = Counted(task)
    data = tokenised(counted, tokenizer, TokenCache(folder))
    return [list(data.train), list(data.validation)], counted.asked


def fresh(task: Any, tokenizer: Any) -> list[Any]:
    return [task.features(split, tokenizer) for split in SPLITS]


# ---- rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "tokenizer"), [(TEXTS, load_minilm), (ANSWERS, load_bytes)], ids=["texts", "answers"]
)
def test_cached_row_is_the_row_of_the_task(
    tmp_path: Path, rows: Sequence[dict[str, Any]], tokenizer: Callable[[], Any]
) -> None:
    """Character for character in JSON, of which keys of gradient profiles are made."""
    task, loaded = task_of(tmp_path / "data", rows), tokenizer()
    expected = fresh(task, loaded)
    for asked in (2, 0):
        assert read(task, loaded, tmp_path / "cache") == (expected, asked)
    data = tokenised(task, loaded, TokenCache(tmp_path / "cache"))
    assert json.dumps(list(data.train)) == json.dumps(expected[0])
    assert data.train[-1] == expected[0][-1]
    assert data.train[1:3] == expected[0][1:3]
    with pytest.raises(IndexError):
        data.train[len(expected[0])]
    in_lists = TrialData(task, *expected)
    assert data.lengths.tolist() == in_lists.lengths.tolist()
    assert data.lengths.tolist() == [len(row["input_ids"]) for row in expected[0]]
    assert data.num_supervised.tolist() == in_lists.num_supervised.tolist()
    assert data.num_supervised.sum() == task.num_supervised(expected[0])


def test_rows_are_read_in_place_and_as_narrow_as_their_numbers(tmp_path: Path) -> None:
    task = task_of(tmp_path / "data", TEXTS)
    data = tokenised(task, load_minilm(), TokenCache(tmp_path / "cache"))
    assert isinstance(data.train, TokenRows)
    columns = data.train.columns
    assert columns["input_ids"].values.dtype == np.uint16, "30,522 word pieces"
    assert columns["attention_mask"].values.dtype == np.uint8
    for column in columns.values():
        assert isinstance(column.values.base, np.memmap)


@pytest.mark.parametrize(
    "row", [{"input_ids": [1.5, 2]}, {"input_ids": [1], "text": "a"}, {"input_ids": [[1]]}]
)
def test_feature_that_is_no_number_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"must be a number.*holds \[.*Correct the task's"):
        TokenRows.of([row], len)


# ---- what decides the rows --------------------------------------------------------------------


def test_rows_are_named_by_content_wherever_they_lie(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    read(task_of(tmp_path / "one"), load_bytes(), cache)
    moved = task_of(tmp_path / "other", [{**row, "unread": 5} for row in ANSWERS])
    assert read(moved, load_bytes(), cache)[1] == 0
    load_bytes().save_pretrained(tmp_path / "tokenizer")
    from transformers import AutoTokenizer

    assert read(moved, AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), cache)[1] == 0


def test_used_tokenizer_is_the_tokenizer_it_was(tmp_path: Path) -> None:
    """A call leaves its truncation behind, which the next call replaces."""
    task, tokenizer = task_of(tmp_path / "data", TEXTS), load_minilm()
    read(task, tokenizer, tmp_path / "cache")
    tokenizer("some text", truncation=True, max_length=7, padding=True)
    assert read(task, tokenizer, tmp_path / "cache")[1] == 0


CHANGES: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "rows": lambda p: (task_of(p, [{**row, "prompt": "why?"} for row in ANSWERS]), load_bytes()),
    "order": lambda p: (task_of(p, ANSWERS[::-1]), load_bytes()),
    "split": lambda p: (task_of(p, split_seed=1), load_bytes()),
    "template": lambda p: (task_of(p, template="{prompt}"), load_bytes()),
    "length": lambda p: (task_of(p, max_length=40), load_bytes()),
    "eos": lambda p: (task_of(p), byte_tokenizer(bos_token=BOS, eos_token=BOS)),
    "post-processor": lambda p: (task_of(p), byte_tokenizer("", bos_token=BOS, eos_token=EOS)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_rows_options_or_tokenizer_are_tokenised_anew(
    tmp_path: Path, change: Callable[[Path], tuple[Any, Any]]
) -> None:
    cache = tmp_path / "cache"
    read(task_of(tmp_path / "data"), load_bytes(), cache)
    task, tokenizer = change(tmp_path / "changed")
    assert read(task, tokenizer, cache) == (fresh(task, tokenizer), 2)


@pytest.mark.parametrize("changed", ["code", "library"])
def test_other_code_or_versions_tokenise_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    task = task_of(tmp_path / "data")
    read(task, load_bytes(), tmp_path / "cache")
    if changed == "code":
        monkeypatch.setattr(tokens, "code_version", lambda: "another")
    else:
        monkeypatch.setattr(tokens, "version", lambda name: "0.0")
    assert read(task, load_bytes(), tmp_path / "cache")[1] == 2


def test_version_of_the_code_is_that_of_every_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import e2lora

    shutil.copytree(Path(e2lora.__path__[0]) / "tasks", tmp_path / "tasks")
    versions = [tokens.code_version()]
    monkeypatch.setattr(e2lora, "__path__", [str(tmp_path)])
    versions.append(tokens.code_version())
    for name in ("sft.py", "text_classification.py", "rows.py", "columns.py"):
        with (tmp_path / "tasks" / name).open("a") as file:
            file.write("# changed\n")
        versions.append(tokens.code_version())
    assert versions[0] == versions[1]
    assert len(set(versions[1:])) == 5


# ---- damage -----------------------------------------------------------------------------------


def shorten(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 3)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # of an array, what its header doesn't tell
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [shorten, flip, Path.unlink])
@pytest.mark.parametrize("name", ["input_ids.values.npy", "labels.offsets.npy", "rows.json"])
def test_damaged_rows_are_made_again_and_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], None]
) -> None:
    task, tokenizer, cache = task_of(tmp_path / "data"), load_bytes(), tmp_path / "cache"
    expected, _ = read(task, tokenizer, cache)
    (file, *_) = sorted(cache.glob(f"*/{name}"))
    damage(file)
    capsys.readouterr()
    assert read(task, tokenizer, cache) == (expected, 1)
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "damaged and made again" in line] == said != []
    assert str(file.parent) in said[0]
    assert read(task, tokenizer, cache) == (expected, 0)


@pytest.mark.parametrize("at", ["folder", "lock", "file"])
def test_folder_that_cannot_be_used_costs_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    task, tokenizer, cache = task_of(tmp_path / "data"), load_bytes(), tmp_path / "cache"

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    if at == "folder":
        cache.write_text("")
    elif at == "lock":
        monkeypatch.setattr("filelock.FileLock._acquire", full)
    else:
        monkeypatch.setattr(np, "save", full)
    assert read(task, tokenizer, cache) == (fresh(task, tokenizer), 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: tokenised rows can't be cached in {cache}")
    if at == "file":
        assert not [path for path in cache.iterdir() if path.suffix != ".lock"], "no debris"


def test_tokenizer_that_cannot_be_saved_costs_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, tokenizer = task_of(tmp_path / "data"), load_bytes()

    def refuse(folder: str) -> None:
        raise ValueError("has no vocabulary file")

    monkeypatch.setattr(tokenizer, "save_pretrained", refuse)
    assert read(task, tokenizer, tmp_path / "cache") == (fresh(task, tokenizer), 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: tokenised rows can't be cached")
    assert line.endswith("has no vocabulary file")


# ---- several processes ------------------------------------------------------------------------

WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from e2lora.tasks.columns import TokenRows
from e2lora.tokens import TokenCache

save = np.save
def save_one(file, array):
    save(file, array)
    print("writing", flush=True)
    time.sleep(600)
np.save = save_one
rows = TokenRows.of([{"input_ids": [9, 9]}], len)
TokenCache(Path(sys.argv[1])).rows("some-key", lambda: rows)
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Any]:
    """A process in the middle of writing rows under ``some-key``."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "cache")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_writer_that_is_killed_leaves_nothing_that_counts(
    tmp_path: Path, writer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = TokenRows.of([{"input_ids": [5]}, {"input_ids": [6, 7]}], len)
    results: list[Any] = []

    def ask() -> None:
        results.append(TokenCache(tmp_path / "cache").rows("some-key", lambda: made))

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join(0.3)
    assert asking.is_alive(), "waits for the one who writes"
    assert list((tmp_path / "cache").glob("*/*.npy")), "in the middle"
    assert not (tmp_path / "cache" / "some-key").exists()
    os.kill(writer.pid, signal.SIGKILL)
    asking.join(20)
    assert [list(rows) for rows in results] == [list(made)]
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"some-key", "some-key.lock"}
    assert capsys.readouterr().err == "", "nothing was damaged"

    def unneeded() -> TokenRows:
        raise AssertionError("made again")

    assert list(TokenCache(tmp_path / "cache").rows("some-key", unneeded)) == list(made)


def test_of_many_that_ask_at_once_one_tokenises(tmp_path: Path) -> None:
    made: list[int] = []
    results: list[Any] = []
    together = threading.Barrier(8)

    def make() -> TokenRows:
        made.append(1)
        time.sleep(0.2)
        return TokenRows.of([{"input_ids": [5, 6]}], len)

    def ask() -> None:
        cache = TokenCache(tmp_path / "cache")
        together.wait()
        results.append(list(cache.rows("key", make)))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert results == [[{"input_ids": [5, 6]}]] * 8


def test_what_making_rows_raises_is_raised_and_frees_the_others(tmp_path: Path) -> None:
    task = task_of(tmp_path / "data", max_length=5)
    with pytest.raises(ValueError, match="must leave room for its answer"):
        tokenised(task, load_bytes(), TokenCache(tmp_path / "cache"))
    longer = task_of(tmp_path / "longer")
    assert read(longer, load_bytes(), tmp_path / "cache")[1] == 2
