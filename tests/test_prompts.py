"""What stands before an answer, and how an answer ends: written out, and by a real template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from e2lora.config import PromptsConfig, SftConfig
from e2lora.tasks import load_task
from e2lora.tasks.prompts import Prompter, end_of_turn
from tests.conftest import model_folder
from tests.test_generation import tiny_tokenizer

PROMPTS = ["1 + 1?", "2 + 2?", "3 + 3?", "4 + 4?"]
ANSWERS = ["2", "4", "6", "8"]
QUESTION = "Question: {prompt}\nAnswer:\n"
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def prompter(prompts: list[str] = PROMPTS, answers: list[str] = ANSWERS, **o: Any) -> Prompter:
    return Prompter.of(PromptsConfig(data="any", **o), prompts, answers)


@pytest.fixture(scope="module")
def smollm() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder("smollm2-135m"))


def tiny_chat(template: str | None = CHATML) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# ---- plain text -------------------------------------------------------------------------------


def test_plain_prompt_is_the_template_with_the_prompt_in_its_place() -> None:
    assert prompter(template="{x} {prompt}}\n{0}").text("{a} {prompt}") == "{x} {a} {prompt}}\n{0}"


def test_examples_stand_above_with_a_blank_line_between() -> None:
    made = prompter(num_shots=2, template=QUESTION)
    (first, second), prompt = made.shots("5 + 5?"), "5 + 5?"
    assert made.text(prompt) == (
        f"Question: {first[0]}\nAnswer:\n{first[1]}\n\n"
        f"Question: {second[0]}\nAnswer:\n{second[1]}\n\n"
        "Question: 5 + 5?\nAnswer:\n"
    )


def test_examples_are_different_rows_with_an_answer_and_chosen_by_the_seed() -> None:
    prompts = [f"{i} + {i}?" for i in range(30)] * 2
    answers = [str(2 * i) if i % 3 else " " for i in range(30)] * 2
    pairs = dict(zip(prompts, answers, strict=True))
    chosen = {}
    for seed in range(20):
        made = prompter(prompts, answers, num_shots=5, split_seed=seed)
        assert made == prompter(prompts, answers, num_shots=5, split_seed=seed)
        assert len(dict(made.examples)) == 6
        assert all(pairs[prompt] == answer and answer.strip() for prompt, answer in made.examples)
        chosen[seed] = made.examples
    assert len(set(chosen.values())) == 20


def test_no_row_is_shown_its_own_answer_and_each_has_as_many_examples() -> None:
    made = prompter(num_shots=3)
    for prompt in PROMPTS:
        shots = made.shots(prompt)
        assert len(shots) == 3
        assert prompt not in dict(shots)


def test_too_few_rows_for_the_examples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_shots=4 and 4 such rows in 'any'\. Lower"):
        prompter(num_shots=4)
    with pytest.raises(ValueError, match="num_shots=1 and 1 such rows"):
        prompter(["a", "a", "b"], ["1", "2", ""], num_shots=1)


@pytest.mark.parametrize(
    ("options", "answers", "stop"),
    [
        ({}, ANSWERS, ()),
        ({"num_shots": 1, "template": QUESTION}, ANSWERS, ("\n\nQuestion:",)),
        ({"num_shots": 1}, ANSWERS, ("\n\n",)),
        ({"num_shots": 1}, ["a\n\nb"] * 4, ()),
        ({"num_shots": 1, "template": QUESTION}, ["a\n\nb"] * 4, ("\n\nQuestion:",)),
        ({"num_shots": 1, "template": QUESTION, "chat": True}, ANSWERS, ()),
    ],
)
def test_another_block_like_the_examples_stops_an_answer(
    options: dict[str, Any], answers: list[str], stop: tuple[str, ...]
) -> None:
    assert prompter(answers=answers, **options).stop() == stop


# ---- token ids --------------------------------------------------------------------------------


WAYS: list[dict[str, Any]] = [
    {},
    {"num_shots": 2},
    {"chat": True},
    {"chat": True, "num_shots": 2, "system": "Add."},
]


@pytest.mark.parametrize("options", WAYS)
def test_answer_stands_behind_its_prompt_as_it_was_given(
    smollm: Any, options: dict[str, Any]
) -> None:
    made = prompter(template=QUESTION, **options)
    answers = ["10", " 10", "\n10", "1\n\n2", ""]
    prompts = ["5 + 5?"] * len(answers)
    asked = made.prompt_ids(smollm, prompts)
    closed = made.answer_ids(smollm, prompts, answers)
    for before, after, answer in zip(asked, closed, answers, strict=True):
        assert after[-1] == smollm.eos_token_id
        assert smollm.decode([*before, *after[:-1]]) == smollm.decode(before) + answer
        # a model that writes these tokens has written this answer
        assert smollm.decode(after, skip_special_tokens=True) == answer
        if not made.config.chat:
            assert smollm.decode(before) == made.text("5 + 5?")


@pytest.mark.parametrize("options", WAYS)
def test_prompt_ids_begin_the_ids_of_the_whole_row(
    smollm: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"prompt": p, "answer": a} for p, a in zip(PROMPTS * 3, ANSWERS * 3, strict=True)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SftConfig(data=str(tmp_path), template=QUESTION, validation_size=4, **options)
    task = load_task(config)
    prompts = task.prompts("validation", smollm)
    for ids, row in zip(prompts, task.features("validation", smollm), strict=True):
        assert row["input_ids"][: len(ids)] == ids
        assert row["labels"] == [-100] * len(ids) + row["input_ids"][len(ids) :]
        assert len(row["input_ids"]) > len(ids)


def test_what_a_tokenizer_puts_around_a_text_stands_at_its_begin_only() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<end> $A </s>", special_tokens=[("<end>", 2), ("</s>", 1)]
    )
    made = prompter(template="{prompt}")
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert tokenizer("a")["input_ids"] == [2, a, 1], "else nothing is tested"
    assert made.prompt_ids(tokenizer, ["a"]) == [[2, a]]
    assert made.answer_ids(tokenizer, ["a"], ["b"]) == [[b, 1]]


# ---- chats ------------------------------------------------------------------------------------

SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.mark.parametrize("system", [None, "Add."])
def test_chat_is_the_templates_own_text(smollm: Any, system: str | None) -> None:
    made = prompter(num_shots=1, template="Say: {prompt}\n", chat=True, system=system)
    ((shot, answer),) = made.shots("5 + 5?")
    (ids,) = made.prompt_ids(smollm, ["5 + 5?"])
    assert smollm.decode(ids) == (
        f"<|im_start|>system\n{system or SMOLLM_SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\nSay: {shot}<|im_end|>\n"
        f"<|im_start|>assistant\n{answer}<|im_end|>\n"
        "<|im_start|>user\nSay: 5 + 5?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    (closed,) = made.answer_ids(smollm, ["5 + 5?"], ["10"])
    assert smollm.convert_ids_to_tokens(closed) == ["1", "0", "<|im_end|>"]


def test_whole_chat_has_the_ids_that_transformers_gives_it(smollm: Any) -> None:
    made = prompter(chat=True, template="{prompt}")
    (asked,), (closed,) = (
        made.prompt_ids(smollm, ["5 + 5?"]),
        made.answer_ids(smollm, ["5 + 5?"], ["It is 10."]),
    )
    turns = [
        {"role": "user", "content": "5 + 5?"},
        {"role": "assistant", "content": "It is 10."},
    ]
    text = smollm.apply_chat_template(turns, tokenize=False)
    assert smollm.decode([*asked, *closed]) == text.rstrip("\n")
    assert [*asked, *closed] == smollm(text.rstrip("\n"), add_special_tokens=False)["input_ids"]


def test_answer_ends_with_the_token_that_ends_a_turn_else_with_eos(smollm: Any) -> None:
    assert smollm.convert_ids_to_tokens(end_of_turn(smollm)) == ["<|im_end|>"]
    assert end_of_turn(tiny_chat()) == [1]
    without = CHATML.replace("</s>\n", "")
    assert end_of_turn(tiny_chat(without)) == [1]


def test_tokenizer_without_chat_template_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        prompter(chat=True).prompt_ids(tiny_chat(None), ["a"])


def test_what_a_template_refuses_is_said_with_its_reason() -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + CHATML
    )
    prompter(chat=True).prompt_ids(tiny_chat(template), ["a"])
    with pytest.raises(ValueError, match=r"no system\. Leave out `system`"):
        prompter(chat=True, system="Add.").prompt_ids(tiny_chat(template), ["a"])


def test_template_that_puts_an_answer_elsewhere_than_it_asks_for_it_is_refused() -> None:
    template = CHATML.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
    with pytest.raises(ValueError, match="must put an answer right behind what it asks for"):
        prompter(chat=True).answer_ids(tiny_chat(template), ["a"], ["b"])
