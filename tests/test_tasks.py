"""Rows from every kind of file are one task; what is wrong with them is shown, with a remedy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from e2lora.assets import resolve
from e2lora.config import TextClassificationConfig
from e2lora.tasks import TASKS, Task, load_task
from e2lora.tasks.scores import RowScore
from tests.conftest import data_folder
from tests.files import WRITERS, Rows, as_jsonl, folder_of, in_own_cache, write

WORDS = ("dull", "a gentle film", "see it twice", "not for me", "wonderful", "strange and long")
ROWS = [{"text": f"{WORDS[i % 6]} {i}", "label": i % 2} for i in range(12)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_own_cache(tmp_path / "cache", monkeypatch)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve("demo:minilm-l6"))


def task_of(data: Path | str, **options: Any) -> Any:
    return load_task(TextClassificationConfig(data=str(data), **{"validation_size": 2, **options}))


# ---- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("single", [True, False])
def test_every_kind_of_file_gives_the_same_features(
    tmp_path: Path, tokenizer: Any, suffix: str, single: bool
) -> None:
    folder_of(tmp_path / "reference", train=ROWS)
    file = write(tmp_path / "data" / f"train{suffix}", ROWS)
    reference, task = task_of(tmp_path / "reference"), task_of(file if single else file.parent)
    assert task.labels == reference.labels == [0, 1]
    for split, size in (("train", 10), ("validation", 2)):
        features = task.features(split, tokenizer)
        assert features == reference.features(split, tokenizer)
        assert len(features) == size


def test_columns_are_taken_by_their_names(tmp_path: Path, tokenizer: Any) -> None:
    renamed = [{"sentence": row["text"], "verdict": row["label"], "text": 5} for row in ROWS]
    folder_of(tmp_path / "renamed", train=renamed)
    folder_of(tmp_path / "usual", train=ROWS)
    task = task_of(tmp_path / "renamed", text_column="sentence", label_column="verdict")
    usual = task_of(tmp_path / "usual")
    assert task.features("train", tokenizer) == usual.features("train", tokenizer)


def test_labels_may_be_words_and_are_numbered_in_order(tmp_path: Path, tokenizer: Any) -> None:
    names = ("neutral", "bad", "good")
    rows = [{"text": WORDS[i % 6], "label": names[i % 3]} for i in range(12)]
    task = task_of(folder_of(tmp_path / "data", train=rows, test=rows), validation_split="test")
    assert task.labels == ["bad", "good", "neutral"]
    assert task.num_labels == 3
    assert [row["labels"] for row in task.features("train", tokenizer)[:3]] == [2, 0, 1]


def test_named_splits_are_used_and_validation_is_cut_to_its_size(
    tmp_path: Path, tokenizer: Any
) -> None:
    held = [{"text": f"held {i}", "label": i % 2} for i in range(8)]
    folder = folder_of(tmp_path / "data", train=ROWS, dev=held)
    task = task_of(folder, validation_split="dev", validation_size=5)
    assert len(task.features("train", tokenizer)) == len(ROWS)
    validation = texts(task, "validation", tokenizer)
    assert len(validation) == 5
    assert validation == [text for text in (row["text"] for row in held) if text in validation]
    whole = task_of(folder, validation_split="dev", validation_size=100)
    assert texts(whole, "validation", tokenizer) == [row["text"] for row in held]


@pytest.mark.parametrize("seed", range(4))
def test_labels_are_those_of_the_training_file_whatever_is_carved(
    tmp_path: Path, seed: int
) -> None:
    rows = [{"text": f"text {i}", "label": f"only of {i}"} for i in range(10)]
    task = task_of(folder_of(tmp_path / "data", train=rows), validation_size=5, split_seed=seed)
    assert task.num_labels == 10


def texts(task: Any, split: str, tokenizer: Any) -> list[str]:
    rows = task.features(split, tokenizer)
    return [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]


@pytest.mark.parametrize("size", [1, 3, 6])
def test_carving_is_deterministic_disjoint_and_complete(
    tmp_path: Path, tokenizer: Any, size: int
) -> None:
    folder = folder_of(tmp_path / "data", train=ROWS)
    carved = {}
    for seed in (0, 0, 1, 2, 3):
        task = task_of(folder, validation_size=size, split_seed=seed)
        train, validation = (texts(task, split, tokenizer) for split in ("train", "validation"))
        assert len(validation) == size
        assert sorted(train + validation) == sorted(row["text"] for row in ROWS)
        assert carved.setdefault(seed, validation) == validation
    assert len({tuple(rows) for rows in carved.values()}) > 1, "the seed must matter"


# ---- features and losses ----------------------------------------------------------------------


def test_pair_of_texts_is_encoded_as_a_pair(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"a": row["text"], "b": f"because {i}", "label": i % 2} for i, row in enumerate(ROWS)]
    folder = folder_of(tmp_path / "data", train=rows, test=rows)
    task = task_of(folder, validation_split="test", text_column="a", text2_column="b")
    for row, features in zip(rows, task.features("train", tokenizer), strict=True):
        expected = tokenizer(row["a"], row["b"])
        assert features["input_ids"] == expected["input_ids"]
        assert features["token_type_ids"] == expected["token_type_ids"]
        assert set(features["token_type_ids"]) == {0, 1}


def test_long_text_is_cut_at_max_length_and_batch_is_padded_to_its_longest_row(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [*ROWS, {"text": "word " * 50, "label": 1}]
    folder = folder_of(tmp_path / "data", train=rows, test=rows)
    task = task_of(folder, max_length=9, validation_split="test")
    features = task.features("train", tokenizer)
    lengths = [len(row["input_ids"]) for row in features]
    assert max(lengths) == lengths[-1] == 9
    batch = task.collate(features[:2], tokenizer)
    assert batch["input_ids"].shape == (2, max(lengths[:2]))
    assert batch["attention_mask"].sum(1).tolist() == lengths[:2]
    assert batch["labels"].tolist() == [0, 1]


class FixedLogits(nn.Module):
    """Answers every batch with its rows of a table; refuses to be shown the labels."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, **inputs: Tensor) -> Any:
        assert "labels" not in inputs
        return SimpleNamespace(logits=self.table[: len(input_ids)])


@pytest.mark.parametrize("num_labels", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_those_of_torch(
    tmp_path: Path, tokenizer: Any, num_labels: int, dtype: torch.dtype
) -> None:
    rows = [{"text": WORDS[i % 6], "label": i % num_labels} for i in range(12)]
    folder = folder_of(tmp_path / "data", train=rows, test=rows)
    task = task_of(folder, validation_split="test", validation_size=12)
    batch = task.collate(task.features("validation", tokenizer), tokenizer)
    torch.manual_seed(0)
    model = FixedLogits(torch.randn(12, num_labels, dtype=dtype))
    labels = torch.tensor([row["label"] for row in rows])
    expected = nn.functional.cross_entropy(model.table.float(), labels, reduction="none")
    total = task.loss_sum(model, batch)
    torch.testing.assert_close(total, expected.sum())
    total.backward()
    assert model.table.grad is not None
    scores = task.score(model, batch)
    assert [score.loss for score in scores] == pytest.approx(expected.tolist())
    assert {score.supervised for score in scores} == {1}
    right = [float(row.argmax() == label) for row, label in zip(model.table, labels, strict=True)]
    assert [score.outcomes["accuracy"] for score in scores] == right
    assert task.num_supervised(rows) == 12
    metrics = task.metrics(scores)
    assert metrics["accuracy"] == pytest.approx(sum(right) / 12)
    assert metrics["loss"] == pytest.approx(expected.mean().item())


def test_majority_baseline_is_the_share_of_the_most_frequent_label(tmp_path: Path) -> None:
    held = [{"text": "x", "label": label} for label in (1, 0, 1, 1, 0)]
    folder = folder_of(tmp_path / "data", train=ROWS, test=held)
    task = task_of(folder, validation_split="test", validation_size=9)
    assert task.num_rows("validation") == 5
    scores = [RowScore({"accuracy": 1.0}, 0.5, 1, row["label"], row["label"]) for row in held]
    assert task.metrics(scores)["majority_baseline"] == 3 / 5


@pytest.mark.parametrize("kind", TASKS)
def test_registered_task_has_what_the_protocol_names(kind: str) -> None:
    wanted = {n for n, value in vars(Task).items() if callable(value) and n[0] != "_"}
    assert wanted >= {"features", "collate", "loss_sum", "score", "metrics", "num_supervised"}
    assert all(hasattr(TASKS[kind], name) for name in wanted)


def test_tasks_of_real_files_are_read(tokenizer: Any) -> None:
    pair = task_of(data_folder("glue_rte"), text2_column="text2", validation_split="validation")
    assert pair.labels == [0, 1]
    (row,) = pair.features("validation", tokenizer)[:1]
    assert 1 in row["token_type_ids"]
    intents = task_of(data_folder("banking77"), label_column="label_name", validation_size=100)
    assert intents.num_labels == 77


# ---- what is refused --------------------------------------------------------------------------

WRONG_FILES = {
    "missing column": (
        [{"txt": "a", "label": 0}] * 4,
        r"needs the columns \['text', 'label'\].*has \['txt', 'label'\], not \['text'\]\. Set"
        r".*First row: \{'txt': 'a'",
    ),
    "missing label": (
        [{"text": "a", "lable": 0}] * 4,
        r"has \['text', 'lable'\], not \['label'\].*Set .*`label_column`",
    ),
    "null text": (
        [*ROWS, {"text": None, "label": 1}],
        r"needs a str in 'text'; train row \d+ .*None: \{'text': None.*Correct or drop",
    ),
    "absent text": (
        [*ROWS, {"label": 1}],
        r"needs a str in 'text'; train row \d+ .*None: \{.*Correct or drop",
    ),
    "null label": (
        [*ROWS, {"text": "x", "label": None}],
        r"in 'label'; train row \d+ .*None: \{'text': 'x'.*Correct or drop",
    ),
    "numbers for texts": (
        [{"text": i, "label": i % 2} for i in range(8)],
        r"needs a str in 'text'; train row 0 .*has 0: \{.*Correct",
    ),
    "fractions for labels": (
        [{"text": "a", "label": 0.5 * i} for i in range(8)],
        r"needs a .*int.* in 'label'; train row 0 .*has 0\.0.*Correct",
    ),
    "one label only": (
        [{"text": "a", "label": 3}] * 8,
        r"at least two labels; column 'label' .*holds only \[3\]\. Name the right",
    ),
    "no rows": ("", r"(?i)(no rows|is empty)[^:]*\. Name another"),
    "broken line": (as_jsonl(ROWS) + '{"text": "x", "lab\n', r"JSON.*row 12.*Check"),
    "numbers and words for labels": (
        [*ROWS, {"text": "x", "label": "good"}],
        r"in 'label'; train row \d+ .*has 'good': \{'text': 'x'.*Correct or drop",
    ),
}


def test_subset_of_local_data_is_refused_since_it_would_have_no_effect(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", train=ROWS)
    with pytest.raises(ValueError, match=r"no effect; got 'main'\. Remove it"):
        task_of(data, subset="main")


@pytest.mark.parametrize(("content", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_wrong_file_is_refused_with_the_value_and_a_remedy(
    tmp_path: Path, content: str | Rows, message: str
) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        task_of(folder_of(tmp_path / "data", train=content))


def test_row_number_in_an_error_is_that_of_the_file(tmp_path: Path) -> None:
    rows = [*ROWS, {"text": None, "label": 1}]
    with pytest.raises(ValueError, match="row 12 of"):
        task_of(folder_of(tmp_path / "data", train=rows))


def test_validation_label_that_training_never_has_is_refused(tmp_path: Path) -> None:
    held = [{"text": "x", "label": 0}, {"text": "y", "label": 9}]
    folder = folder_of(tmp_path / "data", train=ROWS, test=held)
    with pytest.raises(ValueError, match=r"row 1 has 9: \{'text': 'y'.*Known: \[0, 1\].*Correct"):
        task_of(folder, validation_split="test")


def test_unknown_split_lists_the_known(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", train=ROWS, test=ROWS)
    for option in ("train_split", "validation_split"):
        with pytest.raises(ValueError, match=r"has \['test', 'train'\], not \['dev'\]\. Set"):
            task_of(folder, **{option: "dev"})


def test_carving_more_than_half_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", train=ROWS)
    with pytest.raises(ValueError, match=r"at most half.*validation_size=7 of 12.*Lower it, or"):
        task_of(folder, validation_size=7)


def test_folder_without_data_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} holds none\. Name another"):
        task_of(tmp_path)


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.xlsx"
    file.write_text("")
    with pytest.raises(ValueError, match=r"\['\.csv', .*got .*rows\.xlsx\. Convert"):
        task_of(file)


def test_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"got '.*absent\.jsonl'.*Correct the path"):
        task_of(tmp_path / "absent.jsonl")


def test_unreachable_hub_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read at import
    with pytest.raises(ValueError, match=r"got 'absent-organisation/absent'.*access to the hub"):
        task_of("absent-organisation/absent")


def test_splits_may_be_files_of_different_kinds(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", test=ROWS)
    write(folder / "train.csv", ROWS)
    assert task_of(folder, validation_split="test").labels == [0, 1]


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", train=ROWS)
    write(folder / "train.csv", ROWS)
    with pytest.raises(ValueError, match=r"train\.jsonl.*train\.csv"):
        task_of(folder)


def test_path_is_not_taken_for_a_pattern(tmp_path: Path) -> None:
    assert task_of(folder_of(tmp_path / "data [1]*", train=ROWS)).labels == [0, 1]
