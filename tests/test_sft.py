"""Only answers are learnt: labels, losses and metrics of sft against transformers' own."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from e2lora.config import (
    AdapterConfig,
    ModelConfig,
    PlanConfig,
    SftConfig,
    TrainConfig,
    TrialConfig,
)
from e2lora.evaluate import score_rows
from e2lora.models import Base, load_base, load_structure
from e2lora.moments import Target
from e2lora.plan import build_plan
from e2lora.records import TrialFolder
from e2lora.tasks import TrialData, load_task
from e2lora.tasks.scores import RowScore, outcomes_of
from e2lora.training import Reports, run_trial
from e2lora.weights import weights_fingerprint
from tests.conftest import data_folder, model_folder

COLOURS = ("red", "blue", "green", "grey")
ROWS = [
    {"prompt": f"{COLOURS[i % 4]} is {'warm' if i % 3 else 'dark'}?", "answer": f"{i} times " * i}
    for i in range(1, 13)
]
BOS, EOS = "<s>", "</s>"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of these tests shall stay in the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def byte_tokenizer(begin: str = f"{BOS} ", end: str = f" {EOS}", **special: str) -> Any:
    """One token per byte; it puts ``begin`` before and ``end`` after a text of its own accord."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([BOS, EOS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin}$A{end}", special_tokens=[(BOS, 0), (EOS, 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_llama(folder: Path, tied: bool) -> ModelConfig:
    """A random Llama of two layers, with a tokenizer, on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,  # so that its answers depend on what it reads
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(bos_token=BOS, eos_token=EOS).save_pretrained(folder)
    return ModelConfig(name=str(folder))


@pytest.fixture(scope="module")
def model_config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return tiny_llama(tmp_path_factory.mktemp("llama"), tied=True)


@pytest.fixture(scope="module")
def base(model_config: ModelConfig) -> Base:
    from transformers import AutoModelForCausalLM

    return load_base(model_config, AutoModelForCausalLM, None, torch.float32)


def task_of(folder: Path, rows: Sequence[dict[str, Any]] = ROWS, **options: Any) -> Any:
    """The task of these rows, which are its training split and its validation split."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_task(SftConfig(data=str(folder), **{"validation_split": "test", **options}))


def learnt(row: dict[str, Any]) -> list[int]:
    """The tokens with a label, after checking that they are the last of the row."""
    kept = [label for label in row["labels"] if label != -100]
    assert row["labels"] == [-100] * (len(row["labels"]) - len(kept)) + kept
    assert row["input_ids"][-len(kept) :] == kept
    assert len(row["input_ids"]) == len(row["labels"])
    return kept


# ---- features ---------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", ["", f"{BOS} "])
@pytest.mark.parametrize("end", ["", f" {EOS}"])
def test_labels_stand_on_the_answer_and_its_eos_only(tmp_path: Path, begin: str, end: str) -> None:
    tokenizer = byte_tokenizer(begin, end, bos_token=BOS, eos_token=EOS)
    task = task_of(tmp_path / "data", template="Q: {prompt}\nA: ")
    for row, given in zip(task.features("train", tokenizer), ROWS, strict=True):
        text = f"{begin.strip()}Q: {given['prompt']}\nA: {given['answer']}{EOS}"
        assert tokenizer.decode(row["input_ids"]) == text
        assert tokenizer.decode(learnt(row)) == f"{given['answer']}{EOS}"


def test_template_prompt_and_answer_may_hold_braces(tmp_path: Path, base: Base) -> None:
    rows = [{"prompt": "{x} {prompt} {{}} {0}", "answer": "{answer}{"}] * 4
    task = task_of(tmp_path / "data", rows, template="{0} {prompt}\n{{")
    (row, *_) = task.features("train", base.processor)
    text = base.processor.decode(row["input_ids"])
    assert text == BOS + "{0} {x} {prompt} {{}} {0}\n{{" + "{answer}{" + EOS


def test_columns_are_taken_by_their_names(tmp_path: Path, base: Base) -> None:
    renamed = [{"q": row["prompt"], "a": row["answer"], "answer": 5} for row in ROWS]
    task = task_of(tmp_path / "renamed", renamed, prompt_column="q", answer_column="a")
    usual = task_of(tmp_path / "usual")
    assert task.features("train", base.processor) == usual.features("train", base.processor)


def test_long_answer_is_cut_and_only_an_uncut_one_ends_with_eos(tmp_path: Path, base: Base) -> None:
    rows = [{"prompt": "p", "answer": "a" * n} for n in (1, 4, 5, 6, 30)]
    task = task_of(tmp_path / "data", rows, max_length=9)  # bos, p and newline leave 6
    answers = [base.processor.decode(learnt(row)) for row in task.features("train", base.processor)]
    assert answers == [f"a{EOS}", f"aaaa{EOS}", f"aaaaa{EOS}", "aaaaaa", "aaaaaa"]


@pytest.mark.parametrize("pad", [{}, {"pad_token": EOS}, {"padding_side": "left"}])
def test_batch_is_padded_on_the_right_and_hides_it(tmp_path: Path, pad: dict[str, str]) -> None:
    tokenizer = byte_tokenizer(bos_token=BOS, eos_token=EOS, **pad)
    task = task_of(tmp_path / "data")
    rows = task.features("train", tokenizer)
    batch = task.collate(rows, tokenizer)
    longest = max(len(row["input_ids"]) for row in rows)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        assert batch["input_ids"][i].tolist() == row["input_ids"] + [1] * (longest - n)
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (longest - n)
        assert batch["labels"][i].tolist() == row["labels"] + [-100] * (longest - n)


# ---- losses and metrics -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_those_of_transformers(
    tmp_path: Path, model_config: ModelConfig, dtype: torch.dtype
) -> None:
    task = task_of(tmp_path / "data")
    base = load_base(model_config, task.auto_class, task.num_labels, dtype)
    rows = task.features("train", base.processor)
    batch, count = task.collate(rows, base.processor), task.num_supervised(rows)
    weight = base.model.get_input_embeddings().weight.requires_grad_()
    assert count == sum(len(row["answer"]) + 1 for row in ROWS)

    total = task.loss_sum(base.model, batch)
    (gradient,) = torch.autograd.grad(total, weight)
    expected = base.model(**batch).loss * count
    (expected_gradient,) = torch.autograd.grad(expected, weight)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected.to(total.dtype))
    torch.testing.assert_close(gradient, expected_gradient)


def test_scores_and_metrics_are_means_over_rows_and_over_tokens(tmp_path: Path, base: Base) -> None:
    task = task_of(tmp_path / "data")
    rows = task.features("validation", base.processor)
    means = []  # of each row, alone in its batch, by transformers
    for row in rows:
        batch = {key: torch.tensor([value]) for key, value in row.items()}
        means.append(base.model(**batch).loss.item())
    lengths = [len(learnt(row)) for row in rows]
    data = TrialData.of(task, base.processor)
    scores = score_rows(base.model, data, "validation", base.processor, batch_size=5)
    assert outcomes_of(scores)["nll"] == pytest.approx(means, rel=1e-5)
    metrics = task.metrics(scores)
    loss = sum(m * n for m, n in zip(means, lengths, strict=True)) / sum(lengths)
    expected = {"nll": fmean(means), "loss": loss, "perplexity": math.exp(loss)}
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert tuple(metrics) == tuple(task.directions)
    assert metrics["nll"] != pytest.approx(metrics["loss"], rel=1e-3), "rows differ in length"
    assert metrics["nll"] == pytest.approx(fmean(outcomes_of(scores)["nll"]), rel=1e-12)


def test_padding_and_company_change_no_row(tmp_path: Path, base: Base) -> None:
    task = task_of(tmp_path / "data")
    rows = task.features("train", base.processor)
    whole = task.collate(rows, base.processor)
    with torch.no_grad():
        together = task.score(base.model, whole)
        alone = [task.score(base.model, task.collate([r], base.processor))[0] for r in rows]
        loss = task.loss_sum(base.model, whole).item()
        whole["input_ids"][whole["attention_mask"] == 0] = 77
        other_padding = task.score(base.model, whole)
    assert [s.supervised for s in together] == [task.num_supervised([row]) for row in rows]
    for scores in (alone, other_padding):
        assert [s.loss for s in scores] == pytest.approx([s.loss for s in together], rel=1e-5)
    assert loss == pytest.approx(sum(score.loss for score in alone), rel=1e-5)


def test_perplexity_of_a_model_gone_astray_is_still_a_number(tmp_path: Path) -> None:
    metrics = task_of(tmp_path / "data").metrics([RowScore({"nll": 5000.0}, 10000.0, 2)])
    assert metrics["loss"] == 5000.0
    assert math.isfinite(metrics["perplexity"])


# ---- what is refused --------------------------------------------------------------------------

WRONG_ROWS = {
    "missing column": (
        [{"question": "a", "answer": "b"}] * 4,
        r"has \['question', 'answer'\], not \['prompt'\]\. Set .*`prompt_column`, `answer_column`",
    ),
    "null answer": (
        [*ROWS, {"prompt": "a", "answer": None}],
        r"needs a str in 'answer'; train row 12 .*None: \{'prompt': 'a'.*Correct or drop",
    ),
    "no answer at all": (
        [{"prompt": "a", "answer": " "}] * 4,
        r"every train row of .* has an empty 'answer'\. Name the right `answer_column`",
    ),
    "number for an answer": (
        [{"prompt": "a", "answer": i} for i in range(4)],
        r"needs a str in 'answer'; train row 0 .*has 0: \{.*Correct or drop",
    ),
}


@pytest.mark.parametrize(("rows", "message"), WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_wrong_rows_are_refused_with_the_value_and_a_remedy(
    tmp_path: Path, rows: Sequence[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        task_of(tmp_path / "data", rows)


@pytest.mark.parametrize("validation_split", ["test", None])
def test_prompt_that_leaves_no_room_is_refused_with_its_row_in_the_file(
    tmp_path: Path, base: Base, validation_split: str | None
) -> None:
    rows = [{"prompt": "p" * (16 if i == 9 else 5), "answer": "a"} for i in range(12)]
    options = {"validation_split": validation_split, "validation_size": 2, "split_seed": 1}
    fits = task_of(tmp_path / "data", rows, max_length=19, **options)
    assert len(learnt(fits.features("train", base.processor)[0])) == 2
    task = task_of(tmp_path / "data", rows, max_length=18, **options)
    message = (
        r"train row 9 of .*has 18 prompt tokens, max_length is 18: 'p{16}'\. Raise `max_length` or"
    )
    with pytest.raises(ValueError, match=message):
        task.features("train", base.processor)


def test_prompt_without_tokens_is_refused(tmp_path: Path, base: Base) -> None:
    rows = [*ROWS, {"prompt": "", "answer": "a"}]
    task_of(tmp_path / "data", rows).features("train", base.processor)  # the template has one
    task = task_of(tmp_path / "data", rows, template="{prompt}")
    with pytest.raises(ValueError, match=r"train row 12 of .*has none: ''.*Correct or drop"):
        task.features("train", base.processor)


def test_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has none\. Name a causal model, or set `eos_token`"):
        task_of(tmp_path / "data").features("train", byte_tokenizer(bos_token=BOS))


@pytest.mark.parametrize("template", ["Answer:", "{prompt} {prompt}"])
def test_template_without_one_place_for_the_prompt_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"exactly once; got .*Write the prompt's place as"):
        SftConfig(data="any", template=template)


# ---- models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_causal_model_has_no_fresh_head_and_its_structure_is_its_own(
    tmp_path: Path, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_llama(tmp_path / "model", tied)
    base = load_base(config, AutoModelForCausalLM, None, torch.float32)
    assert base.head == ()
    output, embedding = (
        base.model.get_output_embeddings().weight,
        base.model.get_input_embeddings().weight,
    )
    assert (output is embedding) == tied
    structure = load_structure(config, AutoModelForCausalLM, None)
    assert {name: p.shape for name, p in structure.named_parameters()} == {
        name: p.shape for name, p in base.model.named_parameters()
    }


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("topology", ["none", "all"])
def test_training_teaches_the_answers_and_leaves_the_base(
    tmp_path: Path, model_config: ModelConfig, base: Base, topology: str
) -> None:
    task = task_of(tmp_path / "data", [{**row, "answer": "warm and dark"} for row in ROWS])
    config = TrialConfig(
        model=model_config,
        task=task.config,
        adapter=AdapterConfig(target_modules=("q_proj", "o_proj")),
        plan=PlanConfig(topology=topology, r=4),
        training=TrainConfig(max_steps=30, learning_rate=0.03, global_batch_size=8, eval_every=10),
    )
    plan = build_plan(attention_targets(), config.plan, None)
    data = TrialData.of(task, base.processor)
    before = task.metrics(score_rows(base.model, data, "validation", base.processor, 8))
    heard: list[list[float]] = []
    trained = run_trial(
        base,
        data,
        plan,
        config,
        TrialFolder(tmp_path / "00000"),
        Reports(on_evaluation=lambda evaluation, outcomes, history: heard.append(outcomes["nll"])),
    )
    assert trained.losses[0] == pytest.approx(before["loss"], rel=0.05)
    nlls = [before["nll"], *(evaluation.metrics["nll"] for evaluation in trained.evaluations)]
    assert all(later < earlier for earlier, later in pairwise(nlls))
    assert trained.losses[-1] < 0.7 * trained.losses[0]
    assert nlls[1:] == pytest.approx([fmean(outcomes) for outcomes in heard])
    assert trained.head_parameters == 0
    assert trained.adapter_parameters == 2 * 4 * (32 + 32) * (1 if topology == "all" else 2)
    assert weights_fingerprint(base.model) == base.fingerprint


def attention_targets() -> list[Target]:
    return [
        Target(
            path=f"model.layers.{layer}.self_attn.{name}",
            module_type=f"model.layers.*.self_attn.{name}",
            layer=layer,
            in_features=32,
            out_features=32,
        )
        for layer in range(2)
        for name in ("q_proj", "o_proj")
    ]


# ---- real data and a real model ---------------------------------------------------------------


@pytest.mark.long
def test_gsm8k_is_read_whole_and_scored_by_a_real_model() -> None:
    config = SftConfig(
        data=data_folder("gsm8k"),
        prompt_column="question",
        template="{prompt}\nAnswer: ",
        validation_split="test",
        validation_size=50,
        max_length=1024,
    )
    task: Any = load_task(config)
    model = ModelConfig(name=model_folder("smollm2-135m"))
    base = load_base(model, task.auto_class, task.num_labels, torch.float32)
    assert base.head == ()
    train, validation = (task.features(s, base.processor) for s in ("train", "validation"))
    assert (len(train), len(validation)) == (task.num_rows("train"), 50)
    with open(Path(data_folder("gsm8k")) / "train.jsonl", encoding="utf-8") as lines:
        for line, row in zip(lines, train, strict=True):
            given, (*answer, end) = json.loads(line), learnt(row)
            assert end == base.processor.eos_token_id
            assert base.processor.decode(answer) == given["answer"]
            text = base.processor.decode(row["input_ids"][:-1])
            assert text == f"{given['question']}\nAnswer: {given['answer']}"
    batch = task.collate(validation[:3], base.processor)
    with torch.no_grad():
        total = task.loss_sum(base.model, batch).item()
        expected = base.model(**batch).loss.item() * task.num_supervised(validation[:3])
    assert total == pytest.approx(expected, rel=1e-5)
    assert total / task.num_supervised(validation[:3]) < 2.0, "it was trained on such text"
