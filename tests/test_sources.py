"""Rows are the same wherever they come from; what is not whole, or can't be had, is refused."""

from __future__ import annotations

import gzip
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from e2lora.assets import cache_root
from e2lora.config import SftConfig, TextClassificationConfig
from e2lora.tasks import remote
from e2lora.tasks.rows import carve_validation, read_splits, require_filled
from tests.conftest import data_folder
from tests.files import WRITERS, Rows, as_jsonl, folder_of, in_own_cache, write

ROWS = [{"text": f"film {i}", "label": i % 2} for i in range(9)]
OTHER = [{"text": f"book {i}", "label": i % 2} for i in range(4)]
# as Ray Data calls what it writes
RAY = "0355ETbm7a2Sx5qzofyyj0_a3d937a2c89a41a8bf46a248c4647237_00000{}-0"


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("E2LORA_MIRROR", raising=False)
    in_own_cache(tmp_path / "datasets", monkeypatch)


def config_of(data: Path | str, **options: Any) -> TextClassificationConfig:
    return TextClassificationConfig(data=str(data), **{"validation_size": 2, **options})


def read(data: Path | str, columns: Sequence[str] = ("text", "label"), **options: Any) -> Any:
    """The rows of every split, as lists."""
    splits = read_splits(config_of(data, **options), columns)
    return {split: None if rows is None else rows.to_list() for split, rows in splits.items()}


def write_parts(folder: Path, names: Sequence[str], rows: Rows) -> Path:
    """The rows in as many files as there are names, in their order."""
    size = -(-len(rows) // len(names))
    for i, name in enumerate(names):
        write(folder / name, rows[i * size : (i + 1) * size])
    return folder


# ---- folders ----------------------------------------------------------------------------------

LAYOUTS = {
    "file": ("train{}", "dev{}"),
    "parts": ("train-0000{}-of-00003{}", "dev-00000-of-00001{}"),
    "parts with a hash": ("train-0000{}-of-00003-0123456789abcdef{}", "dev{}"),
    "parts in data": ("data/train-0000{}-of-00003{}", "data/dev-00000-of-00001{}"),
    "file in data": ("data/train{}", "data/dev{}"),
    "folder of parts": ("train/part-{}{}", "dev/part-0{}"),
    "folder of numbers": ("train/{}{}", "dev{}"),
    "as Ray Data writes": (f"train/{RAY}{{}}", f"dev/{RAY.format(0)}{{}}"),
    "as Ray Data wrote once": ("2d711642b726b04401627ca9fbac32f5_00000{}_000000{}", "dev{}"),
    "as Spark writes": ("train/part-0000{}-9c2f-c000{}", "dev/part-00000-1b-c000{}"),
    "folder of whatever": ("train/monday {}{}", "dev/sunday{}"),
    "only parts": (f"{RAY}{{}}", "dev{}"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("train", "dev"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_of_a_folder_gives_the_same_rows(
    tmp_path: Path, train: str, dev: str, suffix: str
) -> None:
    count = train.count("{}") * 3 - 3 or 1  # three parts, where the name has a number
    names = [train.format(*([i] if count > 1 else []), suffix) for i in range(count)]
    write_parts(tmp_path / "data set", names, ROWS)
    write(tmp_path / "data set" / dev.format(suffix), OTHER)
    write(tmp_path / "data set" / "notes.txt.jsonl", OTHER)  # another split, of no concern
    (tmp_path / "data set" / "train").mkdir(exist_ok=True)
    (tmp_path / "data set" / "train" / "_SUCCESS").touch()
    splits = read(tmp_path / "data set", validation_split="dev")
    assert splits == {"train": ROWS, "validation": OTHER, "test": None}


@pytest.mark.parametrize("suffix", WRITERS)
def test_parts_of_every_kind_are_read(tmp_path: Path, suffix: str) -> None:
    folder = write_parts(tmp_path / "rows", [f"train/{i}{suffix}" for i in range(3)], ROWS)
    assert read(folder)["train"] == ROWS


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_words_that_pandas_takes_for_nothing_are_texts(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": text, "label": 0} for text in ("NA", "null", "None", "nan", "n/a")]
    assert read(write(tmp_path / f"rows{suffix}", rows))["train"] == rows


def test_named_labels_of_a_hubs_files_stay_numbers(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    Dataset.from_list(ROWS, features=features).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    config = config_of(tmp_path)
    splits = read_splits(config, ["text", "label"])
    require_filled(splits["train"], ["label"], int, "train", config)
    assert splits["train"].to_list() == ROWS


def test_only_file_of_a_folder_is_its_training_split(tmp_path: Path) -> None:
    write(tmp_path / "rows" / "MetaMathQA-395K.json", ROWS)
    assert read(tmp_path / "rows")["train"] == ROWS
    assert read(tmp_path / "rows", train_split="MetaMathQA-395K")["train"] == ROWS


def test_folder_of_splits_is_not_taken_for_a_split(tmp_path: Path) -> None:
    for subset in ("main", "socratic"):
        write(tmp_path / "rows" / subset / "train-00000-of-00001.parquet", ROWS)
        write(tmp_path / "rows" / subset / "test-00000-of-00001.parquet", OTHER)
    with pytest.raises(FileNotFoundError, match=r"\['main', 'socratic'\] in it hold some"):
        read(tmp_path / "rows")
    splits = read(tmp_path / "rows" / "main", test_split="test")
    assert (splits["train"], splits["test"]) == (ROWS, OTHER)


def test_empty_parts_are_passed_over_and_empty_splits_are_not(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "rows", ["train/0.jsonl", "train/2.jsonl"], ROWS)
    (folder / "train" / "1.jsonl").touch()
    assert read(folder)["train"] == ROWS
    (folder / "test").mkdir()
    for i in range(2):
        (folder / "test" / f"{i}.jsonl").touch()
    with pytest.raises(ValueError, match=r"0\.jsonl, 1\.jsonl in .*test is empty\. Name another"):
        read(folder, test_split="test")


NOT_WHOLE = {
    "missing part": (
        ["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"],
        r"'train' in .* is to have 3, and has train-00000-of-00003\.jsonl, .*Copy it again",
    ),
    "two copies": (
        ["train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
        r"is to have 1 or 2, and has .*Copy it again",
    ),
    "kinds": (
        ["train/0.jsonl", "train/1.csv"],
        r"of one kind; .*\['csv', 'json'\]: 0\.jsonl, 1\.csv\. Remove",
    ),
    "file and parts": (
        ["train.jsonl", "train-00000-of-00001.jsonl"],
        r"once.*for 'train' .* train\.jsonl beside train-00000-of-00001\.jsonl\. Remove",
    ),
    "file and folder": (["train.jsonl", "train/0.jsonl"], r"train/0\.jsonl beside train\.jsonl"),
    "two files": (["train.jsonl", "train.csv"], r"train\.jsonl beside train\.csv"),
}


@pytest.mark.parametrize(("names", "message"), NOT_WHOLE.values(), ids=NOT_WHOLE)
def test_split_that_is_not_whole_or_there_twice_is_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    folder = write_parts(tmp_path / "rows", names, ROWS)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read(folder)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_broken_line_is_shown_with_its_file_and_row(tmp_path: Path, suffix: str) -> None:
    folder = write_parts(tmp_path / "rows", [f"train/{i}{suffix}" for i in range(3)], ROWS)
    broken = as_jsonl(OTHER) + '{"text": "half a li\n'
    packed = gzip.compress(broken.encode()) if suffix.endswith("gz") else broken.encode()
    (folder / "train" / f"1{suffix}").write_bytes(packed)
    with pytest.raises(ValueError, match=rf"JSON of 1{suffix}, row 4: .*half a li'\. Check"):
        read(folder)


# ---- test rows --------------------------------------------------------------------------------


def test_test_rows_are_another_split_or_another_data_set(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "rows", train=ROWS, heldout=OTHER)
    lone = write(tmp_path / "lone.csv", OTHER)
    assert read(folder)["test"] is None
    assert read(folder, test_split="heldout")["test"] == OTHER
    assert read(folder, test_data=str(lone), test_split="test")["test"] == OTHER
    with pytest.raises(ValueError, match=r"has \['heldout', 'train'\], not \['test'\]. Set .*test"):
        read(folder, test_split="test")
    with pytest.raises(ValueError, match=r"not \['dev'\]\. Set `test_split`"):
        read(lone, test_data=str(folder), test_split="dev")


def test_test_rows_are_read_by_the_names_of_the_training_rows(tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "response": f"r{i}"} for i in range(4)]
    theirs = [{"question": "how many?", "answer": "2", "response": "unasked", "id": 7}]
    folder = folder_of(tmp_path / "rows", train=rows, test=theirs)
    config = SftConfig(
        data=str(folder / "train.jsonl"),
        prompt_column="query",
        answer_column="response",
        test_data=str(folder),
        test_split="test",
        test_columns={"query": "question", "response": "answer"},
    )
    splits = read_splits(config, ["query", "response"])
    assert splits["train"].to_list() == rows
    assert splits["test"].to_list() == [{"query": "how many?", "response": "2", "id": 7}]


def test_test_columns_may_change_places(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "rows", train=ROWS, test=[{"text": 1, "label": "good"}])
    options = {"test_data": str(folder), "test_split": "test"}
    splits = read(folder, **options, test_columns={"text": "label", "label": "text"})
    assert splits["test"] == [{"text": "good", "label": 1}]


@pytest.mark.parametrize(
    "columns", [{"text": "absent"}, {"txet": "text"}, {"text": "text", "label": "text"}]
)
def test_test_columns_that_can_not_be_meant_are_refused(
    tmp_path: Path, columns: dict[str, str]
) -> None:
    folder = folder_of(tmp_path / "rows", train=ROWS, test=OTHER)
    options = {"test_data": str(folder), "test_split": "test"}
    with pytest.raises(ValueError, match=r"got \{.*\['text', 'label'\] are read.*'book 0'"):
        read(folder, **options, test_columns=columns)


def test_test_rows_may_need_other_columns(tmp_path: Path) -> None:
    problems = [{"text": "def f", "test": "assert f()"}]
    folder = folder_of(tmp_path / "rows", train=ROWS, test=problems)
    config = config_of(folder, test_split="test")
    splits = read_splits(config, ["text", "label"], test_columns=["text", "test"])
    assert splits["test"].to_list() == problems
    with pytest.raises(ValueError, match=r"split 'test' .*has \['text', 'test'\], not \['label'\]"):
        read_splits(config, ["text", "label"])


def test_wrong_test_row_is_shown_with_its_own_data_set(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "rows", train=ROWS)
    lone = write(tmp_path / "lone.jsonl", [*OTHER, {"text": None, "label": 1}])
    config = config_of(folder, test_data=str(lone), test_split="test")
    splits = read_splits(config, ["text", "label"])
    with pytest.raises(ValueError, match=r"test row 4 of '.*lone\.jsonl' has None: \{'text': None"):
        require_filled(splits["test"], ["text"], str, "test", config)


def test_row_far_down_is_found_and_long_values_are_cut(tmp_path: Path) -> None:
    rows = [{"text": "x", "more": "y" * 5000} for _ in range(2500)]
    rows[2345] = {"text": None, "more": "y" * 5000}  # type: ignore[dict-item]
    config = config_of(write(tmp_path / "rows.parquet", rows))
    splits = read_splits(config, ["text"])
    with pytest.raises(ValueError, match=r"train row 2345 of .*y…") as caught:
        require_filled(splits["train"], ["text"], str, "train", config)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("validation_split", [None, "dev"])
def test_carving_leaves_test_rows_as_they_are(tmp_path: Path, validation_split: str | None) -> None:
    folder = folder_of(tmp_path / "rows", train=ROWS, dev=OTHER, test=OTHER)
    config = config_of(folder, validation_split=validation_split, test_split="test")
    carved = carve_validation(read_splits(config, ["text"]), config)
    assert list(carved) == ["train", "validation", "test"]
    assert carved["test"].to_list() == OTHER
    without = config_of(folder, validation_split=validation_split)
    assert "test" not in carve_validation(read_splits(without, ["text"]), without)


# ---- URIs -------------------------------------------------------------------------------------


def copies() -> list[Path]:
    return sorted(path for path in (cache_root() / "remote").glob("*") if path.suffix == "")


@pytest.mark.parametrize("suffix", WRITERS)
def test_uri_of_a_file_is_read_as_the_file(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"some rows{suffix}", ROWS)
    assert read(file.as_uri())["train"] == ROWS


@pytest.mark.parametrize("end", ["", "/"])
def test_uri_of_a_folder_is_read_as_the_folder_and_only_data_is_copied(
    tmp_path: Path, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path / "rows", test=OTHER)
    write_parts(folder, [f"train/{RAY.format(i)}.parquet" for i in range(3)], ROWS)
    for other in ("README.md", "train/.hidden.jsonl", "train/a/b/0.jsonl", "model.bin"):
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_text("no rows")
    splits = read(folder.as_uri() + end, test_split="test")
    assert (splits["train"], splits["test"]) == (ROWS, OTHER)
    (copy,) = copies()
    assert len([path for path in copy.rglob("*") if path.is_file()]) == 4
    told = capsys.readouterr().err
    assert f"copying {folder.as_uri()}{end} (4 files" in told


def test_uri_is_copied_once_until_its_files_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "rows.jsonl", ROWS)
    for _ in range(2):
        assert read(file.as_uri())["train"] == ROWS
    assert len(copies()) == capsys.readouterr().err.count("copying") == 1
    later = time.time_ns() + 10**9
    write(file, [*ROWS[1:], {"text": "film X", "label": 0}])  # of the same size
    os.utime(file, ns=(later, later))
    assert read(file.as_uri())["train"][-1]["text"] == "film X"
    assert len(copies()) == 2


def test_concurrent_readers_of_a_uri_share_one_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = folder_of(tmp_path / "rows", train=ROWS, test=OTHER).as_uri()
    with ThreadPoolExecutor(8) as pool:
        places = set(pool.map(lambda _: remote.local_copy(uri, lambda name: True), range(8)))
    assert len(places) == len(copies()) == capsys.readouterr().err.count("copying") == 1


def test_interrupted_copy_leaves_nothing_that_is_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = folder_of(tmp_path / "rows", train=ROWS, test=OTHER).as_uri()
    copy = remote._copy

    def broken(listing: Any, name: str, folder: Path) -> None:
        copy(listing, name, folder)
        if name == "train.jsonl":
            raise OSError("connection reset")

    monkeypatch.setattr(remote, "_copy", broken)
    with pytest.raises(OSError, match=r"got 'file://.*connection reset\. Check .*credentials"):
        read(uri)
    assert not copies()
    monkeypatch.setattr(remote, "_copy", copy)
    assert read(uri)["train"] == ROWS


def test_test_data_may_be_a_uri_too(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "rows", train=ROWS)
    lone = write(tmp_path / "lone.csv", OTHER)
    assert read(folder, test_data=lone.as_uri(), test_split="test")["test"] == OTHER


UNREADABLE = {
    "file:///absent/rows": (FileNotFoundError, r"file:///absent/rows holds none\. Correct"),
    "https://host/rows.jsonl": (OSError, r"got 'https://.*Unrecognized filesystem type.*Check"),
    "s3://me:secret@bucket/rows": (ValueError, r"no password; got one for bucket\. Give"),
}
NO_STORE = "s3://bucket/rows?endpoint_override=127.0.0.1:9&scheme=http&region=x"


@pytest.mark.parametrize("uri", UNREADABLE)
def test_uri_that_can_not_be_read_is_refused_with_the_cause(uri: str) -> None:
    kind, message = UNREADABLE[uri]
    with pytest.raises(kind, match=f"(?s){message}") as caught:
        read(uri)
    assert "secret" not in str(caught.value)


@pytest.mark.slow  # six seconds of waiting: the store's client tries again
def test_store_that_does_not_answer_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    begin = time.monotonic()
    with pytest.raises(OSError, match=r"(?s)got 's3://.*NETWORK_CONNECTION.*Check .* the region"):
        read(NO_STORE)
    assert time.monotonic() - begin < 60


def test_uri_with_a_subset_or_without_data_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "rows", train=ROWS)
    with pytest.raises(ValueError, match=r"no effect; got 'main'"):
        read(folder.as_uri(), subset="main")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds none"):
        read((tmp_path / "empty").as_uri())


# ---- mirror -----------------------------------------------------------------------------------


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a set that has subsets, as a hub lays them out, and one that has none."""
    for subset, rows in (("mrpc", ROWS), ("cola", OTHER)):
        folder = tmp_path / "mirror" / "nyu-mll" / "glue" / subset
        write(folder / "train-00000-of-00001.parquet", rows)
        write(folder / "validation-00000-of-00001.parquet", OTHER)
    write(tmp_path / "mirror" / "meta-math" / "MetaMathQA" / "MetaMathQA-395K.json", ROWS)
    only = tmp_path / "mirror" / "openai" / "openai_humaneval" / "openai_humaneval"
    write(only / "test-00000-of-00001.parquet", OTHER)
    monkeypatch.setenv("E2LORA_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "mirror"


@pytest.mark.usefixtures("mirror")
def test_hub_names_are_read_from_the_mirror() -> None:
    splits = read("nyu-mll/glue", subset="mrpc", test_split="validation")
    assert (splits["train"], splits["test"]) == (ROWS, OTHER)
    assert read("nyu-mll/glue", subset="cola")["train"] == OTHER
    assert read("meta-math/MetaMathQA")["train"] == ROWS
    other = {"test_data": "nyu-mll/glue", "test_subset": "cola", "test_split": "train"}
    assert read("meta-math/MetaMathQA", **other)["test"] == OTHER


@pytest.mark.usefixtures("mirror")
def test_only_subset_of_a_mirrored_set_need_not_be_named() -> None:
    humaneval = {"test_data": "openai/openai_humaneval", "test_split": "test"}
    assert read("meta-math/MetaMathQA", **humaneval)["test"] == OTHER
    with pytest.raises(FileNotFoundError, match=r"\['cola', 'mrpc'\] in it hold some"):
        read("nyu-mll/glue")


def test_subset_that_the_mirror_lacks_is_refused(mirror: Path) -> None:
    with pytest.raises(ValueError, match=r"has \['cola', 'mrpc'\], not 'rte'\. Copy it there"):
        read("nyu-mll/glue", subset="rte")


@pytest.mark.usefixtures("mirror")
def test_what_the_mirror_lacks_is_looked_for_in_the_hub() -> None:
    with pytest.raises(ValueError, match=r"got 'absent/absent'.*access to the hub"):
        read("absent/absent")


def test_files_are_read_without_a_call_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.getaddrinfo", refused)
    monkeypatch.setattr("datasets.load.load_dataset", refused)
    for suffix in WRITERS:
        assert read(write(tmp_path / f"rows{suffix}", ROWS))["train"] == ROWS


def test_real_files_are_read_with_their_test_rows() -> None:
    folder = data_folder("svamp")
    rows = read(folder, columns=(), test_split="test")
    assert (len(rows["train"]), len(rows["test"])) == (700, 300)
