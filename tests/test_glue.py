"""GLUE by its presets: rows as the hub has them, official metrics, and the study of five tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import pearsonr
from torch import Tensor, nn

from e2lora.config import ModelConfig, RegressionConfig, TextClassificationConfig
from e2lora.config.presets.glue import PRESETS
from e2lora.models import Base, load_base
from e2lora.preflight import Plans
from e2lora.search.plans import checked_configurations
from e2lora.tasks import TokenRows, load_task
from search_spaces import glue_roberta

Rows = Sequence[dict[str, Any]]

# Columns of texts, number of labels, training rows and test split: the hub's own (nyu-mll/glue).
HUB = {
    "glue/cola": (("sentence",), 2, 8_551, "validation", "mcc"),
    "glue/sst2": (("sentence",), 2, 67_349, "validation", "accuracy"),
    "glue/mrpc": (("sentence1", "sentence2"), 2, 3_668, "validation", "accuracy"),
    "glue/qqp": (("question1", "question2"), 2, 363_846, "validation", "accuracy"),
    "glue/stsb": (("sentence1", "sentence2"), 1, 5_749, "validation", "pearson"),
    "glue/mnli": (("premise", "hypothesis"), 3, 392_702, "validation_matched", "accuracy"),
    "glue/mnli_mismatched": (
        ("premise", "hypothesis"), 3, 392_702, "validation_mismatched", "accuracy"
    ),
    "glue/qnli": (("question", "sentence"), 2, 104_743, "validation", "accuracy"),
    "glue/rte": (("sentence1", "sentence2"), 2, 2_490, "validation", "accuracy"),
    "glue/wnli": (("sentence1", "sentence2"), 2, 635, "validation", "accuracy"),
}  # fmt: skip
OFFICIAL = {  # by the benchmark's own table; the first is what a study maximises
    "glue/mrpc": {"accuracy", "f1"},
    "glue/qqp": {"accuracy", "f1"},
    "glue/stsb": {"pearson", "spearman"},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of these tests shall stay in the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def hub_rows(name: str, count: int, words: str) -> list[dict[str, Any]]:
    """Rows with the columns that the hub's have."""
    columns, num_labels, *_ = HUB[name]
    return [
        {
            **{column: f"{words} {i} of {column}" for column in columns},
            "label": i % 26 / 5 if num_labels == 1 else i % num_labels,
            "idx": i,
        }
        for i in range(count)
    ]


def write_rows(folder: Path, **splits: Rows) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    return folder


def write_hub(folder: Path, name: str, num_train: int) -> Path:
    """A copy as the hub has it: its own test rows, whose labels aren't published, are there too."""
    hidden = [{**row, "label": -1} for row in hub_rows(name, 5, "hidden")]
    held = {HUB[name][3]: hub_rows(name, 7, "held")}
    return write_rows(folder, train=hub_rows(name, num_train, "row"), test=hidden, **held)


def changed(config: Any, **options: Any) -> Any:
    return type(config).model_validate({**dict(config), **options})


# ---- presets ----------------------------------------------------------------------------------


def test_presets_are_those_of_the_table() -> None:
    assert set(PRESETS) == set(HUB)


@pytest.mark.parametrize("name", HUB)
def test_preset_names_what_the_hub_has_and_the_official_metric(name: str) -> None:
    columns, num_labels, num_train, test_split, metric = HUB[name]
    preset = PRESETS[name]
    config: Any = preset.task
    assert config.data == "nyu-mll/glue"
    assert config.subset == name.removeprefix("glue/").removesuffix("_mismatched")
    texts = (config.text_column, config.text2_column)
    assert tuple(filter(None, texts)) == columns
    assert (config.test_split, config.validation_split) == (test_split, None)
    assert config.validation_size <= min(1000, num_train / 10)
    assert preset.metric == config.metric == metric
    assert isinstance(config, RegressionConfig if num_labels == 1 else TextClassificationConfig)


@pytest.mark.parametrize("name", HUB)
def test_preset_reads_rows_of_the_hubs_form(tmp_path: Path, name: str) -> None:
    num_labels, metric = HUB[name][1], HUB[name][4]
    folder = write_hub(tmp_path / "data", name, num_train=40)
    config = changed(PRESETS[name].task, data=str(folder), subset=None, validation_size=4)
    task: Any = load_task(config)
    assert task.splits == ("train", "validation", "test")
    assert [task.num_rows(split) for split in task.splits] == [36, 4, 7]
    assert task.num_labels == num_labels
    assert set(task.duplicates.values()) == {0}
    scores = scores_of(task, "test")
    found = task.metrics(scores)
    assert found.keys() == task.directions.keys()
    assert {"loss", metric} | OFFICIAL.get(name, set()) <= found.keys()
    assert found["score"] == found[metric]
    assert task.directions["score"] == task.directions[metric] == "maximize"


def scores_of(task: Any, split: str) -> Any:
    """Of a model whose answers are drawn."""
    labels = [row["label"] for row in task._rows[split]]
    logits = torch.randn(len(labels), task.num_labels, generator=torch.Generator().manual_seed(1))
    dtype = torch.float32 if task.num_labels == 1 else torch.int64
    return task.score(
        FixedLogits(logits), {"input_ids": logits, "labels": torch.tensor(labels, dtype=dtype)}
    )


class FixedLogits(nn.Module):
    """Answers a batch with its rows of a table; refuses to be shown the labels."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, **inputs: Tensor) -> Any:
        assert "labels" not in inputs
        return SimpleNamespace(logits=self.table[: len(input_ids)])


def test_rows_whose_labels_are_not_published_are_refused(tmp_path: Path) -> None:
    for name, message in (
        ("glue/rte", r"label of the test rows must occur.*row 0 has -1: \{'sentence1': 'hidden 0"),
        ("glue/stsb", r"holds only -1 in its 5 test rows.*whose labels are published"),
    ):
        folder = write_hub(tmp_path / name, name, num_train=40)
        task = PRESETS[name].task
        config = changed(task, data=str(folder), subset=None, validation_size=4, test_split="test")
        with pytest.raises(ValueError, match=message):
            load_task(config)


# ---- the metric a task is judged by -----------------------------------------------------------


@pytest.mark.parametrize("metric", ["accuracy", "f1", "macro_f1", "mcc"])
def test_score_is_the_metric_that_the_task_is_judged_by(tmp_path: Path, metric: str) -> None:
    folder = write_hub(tmp_path / "data", "glue/cola", num_train=40)
    config = changed(
        PRESETS["glue/cola"].task,
        data=str(folder),
        subset=None,
        validation_size=4,
        metric=metric,
    )
    task: Any = load_task(config)
    found = task.metrics(scores_of(task, "test"))
    assert found["score"] == found[metric]
    values = [found[name] for name in ("accuracy", "f1", "macro_f1", "mcc")]
    assert len(set(values)) == 4, "equal metrics would prove nothing"


def test_unknown_metric_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValidationError, match="'accuracy', 'f1', 'macro_f1' or 'mcc'"):
        TextClassificationConfig.model_validate({"data": "rows", "metric": "recall"})
    with pytest.raises(ValidationError, match="'pearson' or 'spearman'"):
        RegressionConfig.model_validate({"data": "rows", "metric": "accuracy"})


def test_f1_of_more_than_two_labels_is_refused(tmp_path: Path) -> None:
    folder = write_hub(tmp_path / "data", "glue/mnli", num_train=40)
    task = changed(PRESETS["glue/mnli"].task, data=str(folder), subset=None, metric="f1")
    with pytest.raises(ValueError, match=r"'f1' is that of the second.*has 3\. Set metric='macro"):
        load_task(task)


# ---- regression -------------------------------------------------------------------------------


def regression_of(folder: Path, **options: Any) -> Any:
    return load_task(RegressionConfig(data=str(folder), **{"validation_size": 4, **options}))


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    rows = [{"text": f"text {i}", "label": i % 26 / 5} for i in range(40)]
    return write_rows(tmp_path / "numbers", train=rows, held=rows[:12])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regression_is_trained_on_the_squared_error_in_float32(
    numbers: Path, dtype: torch.dtype
) -> None:
    task = regression_of(numbers, validation_split="held", validation_size=12)
    labels = [i % 26 / 5 for i in range(12)]
    rows = [{"input_ids": [1, 2], "labels": label} for label in labels]
    tokenizer: Any = SimpleNamespace(
        pad_token_id=0, pad_token_type_id=0, padding_side="right", name_or_path="made up"
    )
    batch = task.collate(rows, tokenizer)
    assert batch["labels"].dtype == torch.float32
    model = FixedLogits(torch.randn(12, 1, generator=torch.Generator().manual_seed(0)).to(dtype))
    answers = model.table.detach().float()[:, 0].tolist()
    expected = [(a - b) ** 2 for a, b in zip(answers, labels, strict=True)]
    total = task.loss_sum(model, batch)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(sum(expected))
    total.backward()
    assert model.table.grad is not None

    scores = task.score(model, batch)
    assert [score.outcomes["mse"] for score in scores] == pytest.approx(expected, rel=1e-5)
    assert [score.prediction for score in scores] == pytest.approx(answers)
    found = task.metrics(scores)
    assert found["mse"] == found["loss"] == pytest.approx(sum(expected) / 12)
    assert found["score"] == found["pearson"] == pytest.approx(pearsonr(labels, answers)[0])
    mean = sum(labels) / 12
    assert found["mean_baseline"] == pytest.approx(sum((b - mean) ** 2 for b in labels) / 12)
    judged = regression_of(numbers, metric="spearman").metrics(scores)
    assert judged["score"] == judged["spearman"] != judged["pearson"]


def test_numbers_stay_exact_as_features_and_in_the_cache(numbers: Path) -> None:
    from transformers import AutoTokenizer

    from e2lora.assets import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve("demo:minilm-l6"))
    task = regression_of(numbers, validation_split="held", validation_size=12)
    features = task.features("validation", tokenizer)
    assert [row["labels"] for row in features] == [i % 26 / 5 for i in range(12)]
    kept = TokenRows.of(features, task.num_supervised)
    for rows in (features, kept.arrays(range(12))):
        labels = task.collate(rows, tokenizer)["labels"]
        np.testing.assert_array_equal(labels, np.array([i % 26 / 5 for i in range(12)], np.float32))


def test_whole_numbers_are_numbers_too(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": i % 3} for i in range(20)]
    task = regression_of(write_rows(tmp_path / "data", train=rows))
    assert {type(label) for label in task._targets["train"]} == {float}


def with_parquet(folder: Path, labels: Sequence[Any]) -> Path:
    """JSON has no NaN; parquet does."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    table = {"text": [f"text {i}" for i in range(len(labels))], "label": labels}
    parquet.write_table(pyarrow.table(table), folder / "train.parquet")
    return folder


WRONG_NUMBERS: dict[str, tuple[Sequence[Any], str]] = {
    "a word": (
        ["3.5", "4", "high", "1"],
        r"needs a .*float.* in 'label'; train row 0 .*'3\.5': \{",
    ),
    "nothing": ([0.5, 1.0, None, 2.0], r"in 'label'; train row 2 .*None: \{'text': 'text 2'"),
    "NaN": (
        [0.5, float("nan"), 1.0, 2.0],
        r"a finite number in 'label'; train row 1 .*has nan: \{",
    ),
    "inf": (
        [0.5, 1.0, 2.0, float("inf")],
        r"a finite number in 'label'; train row 3 .*has inf: \{",
    ),
    "always the same": ([2.5] * 8, r"numbers that differ; .* only 2\.5 in its 8 train rows\. Name"),
}


@pytest.mark.parametrize("fault", WRONG_NUMBERS)
def test_label_that_is_no_number_is_refused_with_its_row(tmp_path: Path, fault: str) -> None:
    labels, message = WRONG_NUMBERS[fault]
    with pytest.raises(ValueError, match=message):
        regression_of(with_parquet(tmp_path / "data", labels), validation_size=1)


# ---- decoders ---------------------------------------------------------------------------------


def tiny_decoder(folder: Path, **special: str) -> Base:
    """A random Llama with a tokenizer of its own, loaded as a trial loads one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoModelForSequenceClassification,
        LlamaConfig,
        LlamaModel,
        PreTrainedTokenizerFast,
    )

    words = ["<unk>", "<eos>", *(f"w{i}" for i in range(62))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", **special
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=64,
        initializer_range=0.3,
    )
    LlamaModel(config).save_pretrained(folder)
    model_config = ModelConfig(name=str(folder))
    return load_base(model_config, AutoModelForSequenceClassification, 2, torch.float32)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pad", [{}, {"pad_token": "w7"}], ids=["pads with eos", "own pad token"])
def test_decoder_answers_a_padded_batch_as_it_answers_each_row(
    tmp_path: Path, side: str, pad: dict[str, str]
) -> None:
    base = tiny_decoder(tmp_path / "model", padding_side=side, **pad)
    tokenizer, model = base.processor, base.model.eval()
    assert base.head == ("score",)
    assert tokenizer.padding_side == side
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    lengths = (3, 11, 1, 6, 8, 2, 5, 4)
    rows = [
        {"text": " ".join(f"w{8 + (7 * i + j) % 50}" for j in range(length)), "label": i % 2}
        for i, length in enumerate(lengths)
    ]
    folder = write_rows(tmp_path / "data", train=rows, held=rows)
    task: Any = load_task(TextClassificationConfig(data=str(folder), validation_split="held"))
    features = task.features("validation", tokenizer)
    assert [len(row["input_ids"]) for row in features] == list(lengths)
    with torch.no_grad():
        together = task.score(model, task.collate(features, tokenizer))
        alone = [task.score(model, task.collate([row], tokenizer))[0] for row in features]
    losses = [score.loss for score in together]
    assert losses == pytest.approx([score.loss for score in alone], rel=1e-5, abs=1e-6)
    assert len({round(loss, 4) for loss in losses}) == len(rows), "equal losses prove nothing"


# ---- the study of five tasks ------------------------------------------------------------------


def write_mirror(folder: Path) -> Path:
    """The study's model, small and random, and its tasks' rows, all under their hub names."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    from e2lora.assets import resolve

    model = folder / "FacebookAI" / "roberta-base"
    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    RobertaModel(RobertaConfig(**small, num_hidden_layers=4, vocab_size=30522)).save_pretrained(
        model
    )
    AutoTokenizer.from_pretrained(resolve("demo:minilm-l6")).save_pretrained(model)
    for name in glue_roberta.TASKS:
        data = folder / "nyu-mll" / "glue" / name
        write_hub(
            data, f"glue/{name}", num_train=300 + 2 * PRESETS[f"glue/{name}"].task.validation_size
        )
    return folder


def test_study_of_five_tasks_can_be_trained_from_a_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E2LORA_MIRROR", str(write_mirror(tmp_path / "mirror")))
    monkeypatch.setattr("e2lora.preflight.require_fits", lambda spec: None)  # asks a cluster
    study = replace(glue_roberta.study, grid={"learning_rate": (5e-4,)})
    configurations = checked_configurations(study, Plans(tmp_path / "profiles"))
    found = {(config.task.display_name, config.system) for config in configurations}
    assert len(found) == 5 * len(glue_roberta.SYSTEMS)
    systems = {config.system for config in configurations}
    assert {"LoRA", "E²LoRA", "ShareLoRA-A", "E²ShareLoRA", "blocks(2)"} < systems
