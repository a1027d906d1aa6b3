"""Choices by likelihood: as each is scored alone in a plain loop, and rows in every form."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from e2lora.config import (
    AdapterConfig,
    ModelConfig,
    MultipleChoiceConfig,
    PlanConfig,
    TrainConfig,
    TrialConfig,
)
from e2lora.config.presets.choices import PRESETS
from e2lora.evaluate import score_rows
from e2lora.models import Base, load_base
from e2lora.plan import build_plan
from e2lora.records import TrialFolder
from e2lora.targets import find_targets
from e2lora.tasks import TrialData
from e2lora.tasks.choices import Choices
from e2lora.tasks.columns import TokenRows
from e2lora.tasks.multiple_choice import MultipleChoice, continuation_losses
from e2lora.training import Reports, run_trial
from tests.conftest import data_folder
from tests.files import Rows, folder_of, in_own_cache, write
from tests.test_sft import BOS, EOS, byte_tokenizer, tiny_llama

WORDS = ("red", "deep blue", "green", "grey or white", "r", "blue")
ROWS = [
    {
        "prompt": f"{'very ' * (i % 4)}{WORDS[i % 6]}, and {i}?",
        "choices": [WORDS[(i + k) % 6] for k in range(2 + i % 4)],
        "answer": WORDS[(i + (i % 3 == 1)) % 6],
    }
    for i in range(12)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_own_cache(tmp_path / "cache", monkeypatch)


@pytest.fixture(scope="module")
def model_config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return tiny_llama(tmp_path_factory.mktemp("llama"), tied=True)


@pytest.fixture(scope="module")
def base(model_config: ModelConfig) -> Base:
    from transformers import AutoModelForCausalLM

    return load_base(model_config, AutoModelForCausalLM, None, torch.float32)


def task_of(folder: Path, rows: Rows = ROWS, **options: Any) -> MultipleChoice:
    """The task of these rows, which are its training split and its validation split."""
    ways = {"choices", "choices_pattern"} & options.keys()
    defaults: dict[str, Any] = {"validation_split": "test"}
    defaults |= {} if ways else {"choices_column": "choices"}
    data = str(folder_of(folder, train=rows, test=rows))
    return MultipleChoice(MultipleChoiceConfig(data=data, **{**defaults, **options}))


# ---- likelihoods ------------------------------------------------------------------------------


def log_likelihood(model: Any, prompt: Sequence[int], continuation: Sequence[int]) -> list[float]:
    """Of every token, read alone, one token after another."""
    ids, found = list(prompt), []
    for token in continuation:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        found.append(logits.double().log_softmax(-1)[token].item())
        ids.append(token)
    return found


def is_begun(choices: Sequence[str]) -> bool:
    """Whether a choice's bytes, so its tokens here, begin another's."""
    return any(a != b and b.startswith(a) for a in choices for b in choices)


def by_hand(model: Any, tokenizer: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """What is to be found of a row, by a plain loop over its choices."""
    prompt = tokenizer(f"{BOS}{row['prompt']}\n", add_special_tokens=False)["input_ids"]
    ids = [tokenizer(c, add_special_tokens=False)["input_ids"] for c in row["choices"]]
    whole = [log_likelihood(model, prompt, [*choice, 1]) for choice in ids]
    counted = whole if is_begun(row["choices"]) else [logs[:-1] for logs in whole]
    sums = [sum(logs) for logs in counted]
    means = [total / len(c) for total, c in zip(sums, row["choices"], strict=True)]
    right = row["choices"].index(row["answer"])
    return {
        "sums": sums,
        "accuracy": float(sums.index(max(sums)) == right),
        "accuracy_norm": float(means.index(max(means)) == right),
        "nll": -fmean(whole[right]),
        "loss": -sum(whole[right]),
        "supervised": len(whole[right]),
        "prediction": row["choices"][sums.index(max(sums))],
        "expected": row["answer"],
    }


def test_every_choice_has_the_likelihood_that_it_has_alone(tmp_path: Path, base: Base) -> None:
    task = task_of(tmp_path / "data")
    expected = [by_hand(base.model, base.processor, row) for row in ROWS]
    begun = [is_begun(row["choices"]) for row in ROWS]
    assert set(begun) == {True, False}, "both kinds of rows are to be seen"

    rows = task.features("validation", base.processor)
    with torch.no_grad():
        batch = task.collate(rows, base.processor)
        losses = [-part.sum().item() for part in continuation_losses(base.model, batch)]
        scores = task.score(base.model, batch)
    sums = [number for row in expected for number in (-row["loss"], *row["sums"])]
    assert losses == pytest.approx(sums, rel=1e-5)
    for score, hand in zip(scores, expected, strict=True):
        for name in ("accuracy", "accuracy_norm"):
            assert score.outcomes[name] == hand[name]
        assert score.outcomes["nll"] == pytest.approx(hand["nll"], rel=1e-5)
        assert score.loss == pytest.approx(hand["loss"], rel=1e-5)
        assert score[2:] == (hand["supervised"], hand["prediction"], hand["expected"])
    columns = [[hand[name] for hand in expected] for name in ("accuracy", "accuracy_norm")]
    assert columns[0] != columns[1], "equal outcomes would prove little"


def test_company_padding_and_form_of_the_rows_change_no_score(tmp_path: Path, base: Base) -> None:
    task = task_of(tmp_path / "data")
    rows = task.features("validation", base.processor)
    batch = task.collate(rows, base.processor)
    with torch.no_grad():
        together = task.score(base.model, batch)
        alone = [task.score(base.model, task.collate([r], base.processor))[0] for r in rows]
        batch["input_ids"][batch["attention_mask"] == 0] = 77
        other_padding = task.score(base.model, batch)
    kept = TokenRows.of(rows, task.num_supervised)
    assert kept[:] == rows
    data = TrialData(task, [], kept)
    shared_out = score_rows(base.model, data, "validation", base.processor, batch_size=5)
    for scores in (alone, other_padding, shared_out):
        for one, other in zip(scores, together, strict=True):
            assert one.outcomes == pytest.approx(other.outcomes, rel=1e-5)
            assert one[2:] == other[2:]


class Counting(nn.Module):
    """A model that counts its passes and sequences; it returns all logits unless asked for few."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.sequences: list[int] = []
        self.widths: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        self.sequences.append(len(input_ids))
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


class Sparing(Counting):
    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool, logits_to_keep: int
    ) -> Any:
        self.widths.append(logits_to_keep)
        outputs = super().forward(input_ids, attention_mask, use_cache)
        return SimpleNamespace(logits=outputs.logits[:, -logits_to_keep:])


def test_batch_is_one_pass_over_few_sequences_and_few_logits(tmp_path: Path, base: Base) -> None:
    """Choices that differ in their last token only are read together."""
    rows = [{"prompt": "a" * 40 + f"{i}", "answer": "y"} for i in range(3)]
    task = task_of(tmp_path / "data", rows, choices=("y", "n", "?"))
    batch = task.collate(task.features("validation", base.processor), base.processor)
    with torch.no_grad():
        expected = task.score(base.model, batch)
        for kind in (Counting, Sparing):
            model = kind(base.model)
            scores = task.score(model, batch)
            assert model.sequences == [len(rows)]
            assert [s.outcomes for s in scores] == [pytest.approx(s.outcomes) for s in expected]
    assert model.widths == [2], "the newline's logits predict the choices, the choice's its end"


class Level(nn.Module):
    """Every token is as likely as any other."""

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 258))


def test_first_of_equally_likely_choices_is_taken(tmp_path: Path, base: Base) -> None:
    rows = [{"prompt": "?", "answer": word} for word in ("one", "two", "six")]
    task = task_of(tmp_path / "data", rows, choices=("two", "one", "six"))
    batch = task.collate(task.features("validation", base.processor), base.processor)
    scores = task.score(Level(), batch)
    assert [score.prediction for score in scores] == ["two"] * 3
    assert [score.outcomes["accuracy"] for score in scores] == [0, 1, 0]
    assert [score.outcomes["accuracy_norm"] for score in scores] == [0, 1, 0]


class Uneven(Level):
    """A token of ``changes`` is likelier than the others by that, whatever stands before it."""

    def __init__(self, tokenizer: Any, **changes: float) -> None:
        super().__init__()
        self.changes = {tokenizer.convert_tokens_to_ids(t): by for t, by in changes.items()}

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        outputs = super().forward(input_ids)
        for token, by in self.changes.items():
            outputs.logits[..., token] = by
        return outputs


@pytest.mark.parametrize(("change", "norm"), [(-1.0, 0.0), (1.0, 1.0)])
def test_norm_is_per_character_of_the_choice_without_what_stands_before_all(
    tmp_path: Path, base: Base, change: float, norm: float
) -> None:
    """A dear prefix would always favour the longer choice, over which it is spread."""
    rows = [{"prompt": "?", "answer": "three"}]
    options: dict[str, Any] = {"choices": ("four", "three"), "answer_prefix": "zz"}
    task = task_of(tmp_path / "data", rows, **options)
    batch = task.collate(task.features("validation", base.processor), base.processor)
    model = Uneven(base.processor, z=-5.0, h=change)
    (score,) = task.score(model, batch)
    assert score.outcomes["accuracy_norm"] == norm
    assert score.prediction == "four"

    ids = base.processor(["zz", "four", "three"], add_special_tokens=False)["input_ids"]
    prefix, *choices = [sum(log_likelihood(model, [0], tokens)) for tokens in ids]
    assert (choices[1] / 5 > choices[0] / 4) == bool(norm)
    assert (prefix + choices[1]) / 5 > (prefix + choices[0]) / 4, "naively, longer is better"
    assert (prefix + choices[1]) / 7 > (prefix + choices[0]) / 6, "and so by the whole's length"


class Closing(nn.Module):
    """Says "b" behind "a" at odds of ``odds``, else ends; all else is as likely as anything."""

    def __init__(self, odds: float) -> None:
        super().__init__()
        self.odds = odds

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, 258)
        a, b = byte_tokenizer(bos_token=BOS, eos_token=EOS).convert_tokens_to_ids(["a", "b"])
        behind = input_ids == a
        logits[behind] = -30.0
        logits[..., b][behind], logits[..., 1][behind] = math.log(self.odds), 0.0
        logits[input_ids == b] = -30.0
        logits[..., 1][input_ids == b] = 0.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(("odds", "said"), [(3.0, "ab"), (1 / 3, "a")])
def test_choice_that_begins_another_wins_only_where_the_model_would_end_there(
    tmp_path: Path, base: Base, odds: float, said: str
) -> None:
    task = task_of(tmp_path / "data", [{"prompt": "?", "answer": "a"}], choices=("a", "ab"))
    batch = task.collate(task.features("validation", base.processor), base.processor)
    (score,) = task.score(Closing(odds), batch)
    assert score.prediction == said


# ---- tokens -----------------------------------------------------------------------------------


def test_training_rows_are_prompts_with_the_right_answer_alone(tmp_path: Path, base: Base) -> None:
    task = task_of(tmp_path / "data", template="Q: {prompt}\nA:", answer_prefix=" ")
    train = task.features("train", base.processor)
    for row, scored, given in zip(
        train, task.features("validation", base.processor), ROWS, strict=True
    ):
        assert set(row) == {"input_ids", "labels"}
        text = base.processor.decode(row["input_ids"])
        assert text == f"{BOS}Q: {given['prompt']}\nA: {given['answer']}{EOS}"
        learnt = [label for label in row["labels"] if label != -100]
        assert base.processor.decode(learnt) == f" {given['answer']}{EOS}"
        assert {name: scored[name] for name in row} == row
    batch = task.collate(train, base.processor)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def merging_tokenizer() -> Any:
    """Bytes, of which a space and a "r" behind it become one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġr"]
    model = models.BPE(vocab={token: i for i, token in enumerate(letters)}, merges=[("Ġ", "r")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


@pytest.mark.parametrize(
    ("template", "prefix", "as_one_text"),
    [
        ("{prompt} A:", " ", True),
        ("{prompt}\n", "", True),
        ("{prompt} A: ", "", False),  # the pitfall: a space that is cut off its word
    ],
)
def test_prefix_makes_the_tokens_of_prompt_and_choice_those_of_one_text(
    tmp_path: Path, template: str, prefix: str, as_one_text: bool
) -> None:
    tokenizer = merging_tokenizer()
    rows = [{"prompt": "?", "answer": "red"}]
    options: dict[str, Any] = {"template": template, "answer_prefix": prefix}
    task = task_of(tmp_path / "data", rows, choices=("red", "dark"), **options)
    (row,) = task.features("validation", tokenizer)
    prompt = row["input_ids"][: row["labels"].count(-100)]
    assert row["skipped"] == 0, "the prefix's space is part of a choice's first token"
    size = row["choice_sizes"][0]
    parts = row["choice_ids"][:size], row["choice_ids"][size:]
    for ids, choice in zip(parts, ("red", "dark"), strict=True):
        text = template.replace("{prompt}", "?") + prefix + choice
        assert tokenizer.decode([*prompt, *ids]) == text
        if choice == "red":
            assert ([*prompt, *ids] == tokenizer(text)["input_ids"]) == as_one_text


def test_worked_examples_are_answered_as_the_choices_are(tmp_path: Path, base: Base) -> None:
    task = task_of(tmp_path / "data", template="{prompt} A:", answer_prefix=" ", num_shots=2)
    answers = {row["prompt"]: row["answer"] for row in ROWS}
    for row in task.features("validation", base.processor):
        text = base.processor.decode(row["input_ids"])
        *shots, _ = text.removeprefix(BOS).split("\n\n")
        assert len(shots) == 2
        for shot in shots:
            prompt, answer = shot.split(" A: ")
            assert answers[prompt] == answer


CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_in_a_chat_choices_are_whole_turns_and_begin_without_the_space(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("", "", bos_token=BOS, eos_token=EOS)
    tokenizer.chat_template = CHAT
    rows = [{"prompt": "?", "answer": "no"}] * 2
    options: dict[str, Any] = {"chat": True, "answer_prefix": " it's "}
    for choices, end in ((("no", "yes"), ""), (("no", "none"), EOS)):
        task = task_of(tmp_path / "data", rows, choices=choices, **options)
        row = task.features("validation", tokenizer)[0]
        assert tokenizer.decode(row["input_ids"]) == f"[user]?{EOS}\n[assistant]it's no{EOS}"
        compared = "".join(f"it's {choice}{end}" for choice in choices)
        assert tokenizer.decode(row["choice_ids"]) == compared


def test_scored_rows_are_kept_apart_by_their_choices_and_training_rows_are_not(
    tmp_path: Path,
) -> None:
    """What names a split's features, for the cache of tokens."""
    fewer = [{**row, "choices": [row["answer"], "none"]} for row in ROWS]
    one, other = task_of(tmp_path / "one"), task_of(tmp_path / "other", fewer)
    assert one.content("train") == other.content("train")
    assert one.content("validation") != other.content("validation")
    assert one.duplicates == {"train/validation": len(ROWS)}


# ---- metrics ----------------------------------------------------------------------------------


def test_metrics_are_means_with_baselines_beside_them(tmp_path: Path, base: Base) -> None:
    task = task_of(tmp_path / "data")
    data = TrialData.of(task, base.processor)
    scores = score_rows(base.model, data, "validation", base.processor, batch_size=4)
    found = task.metrics(scores)
    assert tuple(found) == tuple(task.directions)
    expected = [by_hand(base.model, base.processor, row) for row in ROWS]
    for name in ("accuracy", "accuracy_norm", "nll"):
        assert found[name] == pytest.approx(fmean(row[name] for row in expected), rel=1e-5)
    loss = sum(row["loss"] for row in expected) / sum(row["supervised"] for row in expected)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["chance"] == pytest.approx(fmean(1 / len(row["choices"]) for row in ROWS))
    places = Counter(row["choices"].index(row["answer"]) for row in ROWS)
    assert found["majority_baseline"] == max(places.values()) / len(ROWS)
    assert {n for n, where in task.directions.items() if not where} == {
        "majority_baseline",
        "chance",
    }


@pytest.mark.usefixtures("one_process")
def test_training_makes_the_right_choice_the_likeliest(tmp_path: Path, base: Base) -> None:
    rows = [
        {"prompt": f"{word} {i}?", "answer": answer}
        for i in range(8)
        for word, answer in (("up", "warm"), ("ox", "cold"))
    ]
    task = task_of(tmp_path / "data", rows, choices=("warm", "cold", "none"))
    config = TrialConfig(
        model=ModelConfig(name="tiny"),
        task=task.config,
        adapter=AdapterConfig(target_modules=("q_proj", "v_proj", "up_proj", "down_proj")),
        plan=PlanConfig(topology="none", r=8),
        training=TrainConfig(max_steps=40, learning_rate=0.02, global_batch_size=16, eval_every=20),
    )
    plan = build_plan(find_targets(base.model, config.adapter.target_modules), config.plan, None)
    data = TrialData.of(task, base.processor)
    before = task.metrics(score_rows(base.model, data, "validation", base.processor, 8))
    folder = TrialFolder(tmp_path / "00000")
    trained = run_trial(base, data, plan, config, folder, Reports())
    assert before["accuracy"] <= 0.5 < trained.final.metrics["accuracy"] == 1
    lines = [json.loads(line) for line in folder.predictions_file.read_text().splitlines()]
    assert [line["prediction"] for line in lines] == [row["answer"] for row in rows]


# ---- rows -------------------------------------------------------------------------------------

COLOURS = ["red", "blue", "green"]
FORMS: dict[str, tuple[dict[str, Any], Any, dict[str, Any], int]] = {
    "fixed, by text": ({}, "blue", {"choices": tuple(COLOURS)}, 1),
    "fixed, by truth": ({}, True, {"choices": ("no", "yes")}, 1),
    "fixed, by place": ({}, 2, {"choices": tuple(COLOURS)}, 2),
    "a list, by text": ({"choices": COLOURS}, "green", {}, 2),
    "a list, by place": ({"choices": COLOURS}, 0, {}, 0),
    "letters": ({"choices": {"text": COLOURS, "label": ["A", "B", "C"]}}, "C", {}, 2),
    "digits": ({"choices": {"text": COLOURS, "label": ["1", "2", "3"]}}, "3", {}, 2),
    "numbers": ({"choices": {"text": COLOURS, "label": [1, 2, 3]}}, 1, {}, 0),
    "in the prompt": (
        {"prompt": "Which? Format: red/blue/ green"},
        "green",
        {"choices_pattern": r"Format: (.+)$"},
        2,
    ),
    "in the context": (
        {"context": "One of red/blue/green."},
        "blue",
        {"choices_pattern": r"One of (.+)\.", "context_column": "context"},
        1,
    ),
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_right_choice_is_found_in_every_form(tmp_path: Path, form: str, kind: str) -> None:
    columns, answer, options, place = FORMS[form]
    row = {"prompt": "?", "answer": answer, **columns}
    write(tmp_path / "data" / f"train.{kind}", [row] * 4)
    options = options or {"choices_column": "choices"}
    data = str(tmp_path / "data")
    task = MultipleChoice(MultipleChoiceConfig(data=data, validation_size=2, **options))
    right = options.get("choices", COLOURS)[place]
    assert task.answers("train") == task.answers("validation") == [right] * 2


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "answer": ({"answer": "pink"}, r"one of its row's choices; got 'pink' of \['red'"),
    "place": ({"answer": 3}, r"got 3 of \['red'"),
    "negative place": ({"answer": -1}, r"got -1 of \['red'"),
    "label": (
        {"choices": {"text": COLOURS, "label": ["A", "B", "C"]}, "answer": ""},
        r"got '' of \['A', 'B', 'C'\]",
    ),
    "one choice": ({"choices": ["red"]}, r"two texts at least.*got \['red'\]"),
    "empty choice": ({"choices": ["red", " "]}, r"none is empty; got \['red', ' '\]"),
    "too few labels": ({"choices": {"text": COLOURS, "label": ["A"]}}, "as many texts as labels"),
    "no texts": ({"choices": [1, 2]}, r"are a list of texts.*got \[1, 2\]"),
    "no choices": ({"choices": None}, r"are a list of texts.*got None"),
    "no answer": ({"answer": None}, r"needs a str or int in 'answer'; train row 2 .*has None"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_row_that_has_no_right_choice_is_shown(tmp_path: Path, fault: str) -> None:
    change, message = WRONG[fault]
    good: dict[str, Any] = {"prompt": "good", "choices": COLOURS, "answer": "red"}
    if isinstance(change.get("choices"), dict):
        good["choices"] = {"text": COLOURS, "label": ["A", "B", "C"]}
        good["answer"] = "A"
    elif isinstance(change.get("answer"), int):
        good["answer"] = 0  # a column has one type
    bad = {**good, **change, "prompt": "bad one"}
    if fault == "no texts":
        good = bad
    where = "row 0" if fault == "no texts" else "row 2"
    with pytest.raises(ValueError, match=message) as caught:
        task_of(tmp_path / "data", [good, good, bad, good])
    assert f"train {where} of" in str(caught.value)
    assert "'prompt': 'bad one'" in str(caught.value)
    assert "Correct or drop the row." in str(caught.value)


def test_prompt_without_its_choices_is_shown(tmp_path: Path) -> None:
    rows = [{"prompt": "Format: a/b", "answer": "a"}, {"prompt": "none", "answer": "a"}]
    with pytest.raises(ValueError, match=r"must match every prompt; 'Format: \(\.\+\)' doesn't\."):
        task_of(tmp_path / "data", rows, choices_pattern="Format: (.+)")


def test_choice_that_does_not_fit_is_refused(tmp_path: Path, base: Base) -> None:
    rows = [{"prompt": "?", "answer": "b"}] * 2
    task = task_of(tmp_path / "data", rows, choices=("a" * 20, "b"), max_length=23)
    with pytest.raises(ValueError, match=r"row 0 .*3 prompt tokens and a choice of 21, max_length"):
        task.features("validation", base.processor)
    assert len(task.features("train", base.processor)) == 2
    enough = task_of(tmp_path / "data", rows, choices=("a" * 20, "b"), max_length=24)
    assert len(enough.features("validation", base.processor)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of .*; got none"),
        ({"choices": ("a", "b"), "choices_column": "c"}, "got choices and choices_column"),
        ({"choices": ("a",)}, r"two texts at least.*got \('a',\)"),
        ({"choices": ("a", "a")}, "all different"),
        ({"choices": ("a", "")}, "none of them empty"),
        ({"choices_pattern": "(a"}, r"must be a regular expression; got '\(a'"),
        ({"choices_pattern": "a/b"}, "only group; got 'a/b' with 0"),
        ({"choices_pattern": "(a)(b)"}, "with 2"),
    ],
)
def test_configuration_that_names_no_choices_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        MultipleChoiceConfig(data="rows", **options)


def test_label_is_never_taken_for_a_place() -> None:
    choices = Choices(["red", "blue", "green"], [2, 1, 0])
    assert [choices.place_of(answer) for answer in (0, 1, 2)] == [2, 1, 0]
    with pytest.raises(ValueError, match="got True of"):
        choices.place_of(True)


# ---- presets ----------------------------------------------------------------------------------

STRUCT = {"text": ["a rock", "a tree", "wind"], "label": ["A", "B", "C"]}
DIGITS = {**STRUCT, "label": ["1", "2", "3"]}
ASKED = {"id": "MCAS_1", "question": "What grows?", "choices": STRUCT, "answerKey": "B"}
HUB: dict[str, tuple[str, str | None, list[dict[str, Any]], tuple[str, ...], str]] = {
    **{
        name: (
            "allenai/ai2_arc",
            subset,
            [ASKED, {**ASKED, "choices": DIGITS, "answerKey": "2"}],
            ("train", "validation", "test"),
            "Question: What grows?\nAnswer: a tree",
        )
        for name, subset in (("arc_easy", "ARC-Easy"), ("arc_challenge", "ARC-Challenge"))
    },
    "openbookqa": (
        "allenai/openbookqa",
        "main",
        [{"id": "7", "question_stem": "What grows is", "choices": STRUCT, "answerKey": "B"}],
        ("train", "validation", "test"),
        "What grows is a tree",
    ),
    "boolq": (
        "google/boolq",
        None,
        [{"question": "does a tree grow", "answer": True, "passage": "Tree -- A plant."}],
        ("train", "validation"),
        "Tree -- A plant.\n\ndoes a tree grow?\nAnswer: yes",
    ),
}


def test_presets_are_those_of_the_table() -> None:
    assert PRESETS.keys() == HUB.keys()


@pytest.mark.parametrize("name", HUB)
def test_preset_reads_rows_of_the_hubs_form(tmp_path: Path, name: str, base: Base) -> None:
    data, subset, rows, splits, text = HUB[name]
    preset = PRESETS[name]
    config: Any = preset.task
    assert (config.data, config.subset, preset.metric) == (data, subset, "accuracy")
    for split in splits:
        write(tmp_path / "data" / f"{split}.parquet", rows * 4)
    changes = {"data": str(tmp_path / "data"), "subset": None, "validation_size": 2}
    task = MultipleChoice(type(config).model_validate({**dict(config), **changes}))
    assert task.splits == ("train", "validation", "test")
    assert task.directions[preset.metric] == "maximize"
    for split in task.splits:
        for row in task.features(split, base.processor):
            assert base.processor.decode(row["input_ids"]) == f"{BOS}{text}{EOS}"
    named = (config.validation_split, config.test_split)
    assert named == (("validation", "test") if "test" in splits else (None, "validation"))


# ---- real rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "openbookqa", "boolq"])
def test_every_row_of_llm_adapters_is_read(name: str) -> None:
    folder = data_folder(f"llmadapters_{name}")
    config = MultipleChoiceConfig(
        data=folder,
        test_split="test",
        validation_size=200,
        prompt_column="instruction",
        answer_column="answer",
        choices_pattern=r"Answer format: (\S+)$",
        answer_prefix="the correct answer is ",
    )
    task = MultipleChoice(config)
    given = [json.loads(line) for line in (Path(folder) / "test.jsonl").read_text().splitlines()]
    assert task.answers("test") == [row["output"] for row in given]
    train = Counter(task.answers("train") + task.answers("validation"))
    lines = (Path(folder) / "train.jsonl").read_text().splitlines()
    assert train == Counter(json.loads(line)["output"] for line in lines)
