"""What texts come to: written-out tables, and every answer and equation of the real data sets."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e2lora.config.presets.maths import PRESETS
from e2lora.tasks import load_task
from e2lora.tasks.answers import final_answer, judge, same_answer
from e2lora.tasks.equations import MAX_DEPTH, MAX_TOKENS, evaluate, values_of
from tests.conftest import data_folder

# ---- numbers ----------------------------------------------------------------------------------

NUMBERS: list[tuple[str, str | None]] = [
    # GSM8K's own way
    ("He has 48/2 = <<48/2=24>>24 left.\n#### 24", "24"),
    ("#### 18", "18"),
    ("####18", "18"),
    ("#### 109,200,000", "109200000"),
    ("#### $1,080.", "1080"),
    ("#### -3", "-3"),
    ("#### \u22123", "-3"),
    ("#### **18** dollars", "18"),
    ("#### 10/2 = 5", "5"),
    ("2 + 2 = 4\n####\n4 it is, not 5", "5"),
    # the first counts: models go on with another question
    ("#### 18\n\nQuestion: Tom has 5 apples and buys 2.\n#### 7", "18"),
    ("The answer is 18.\n\nQ: Tom has 5. The answer is 7.", "18"),
    (r"\boxed{18} and then \boxed{7}", "18"),
    # hashes before boxes before words, wherever they stand
    ("The answer is 3 a day, so for 7 days:\n#### 21", "21"),
    (r"The answer is 3 a day, \boxed{21} in all.", "21"),
    ("#### Step two\nShe has 3 and gets 4.\n#### 7", "7"),
    ("#### Step one\nThe answer is 7, not 8.", "7"),
    # MetaMathQA's, and other words
    ("So x = 4.\n#### 5\nThe answer is: 5", "5"),
    ("The answer is: 5", "5"),
    ("The answer is: $-5", "-5"),
    ("the answer is $1,234.50.", "1234.50"),
    ("Therefore the final answer is 24 clips, out of 72.", "24"),
    ("The answer is 48 + 24 = 72 clips. All 100 of them.", "72"),
    ("The answer is 48/2 = <<48/2=24>>24 clips.", "24"),
    ("The answer is 24 clips <<48/2=25>>.", "24"),
    ("He has 24 <<48/2=25>>.", "24"),
    ("**Answer:** 42\nI have used 2 steps.", "42"),
    ("Answer:\n\n42\n\n3 steps", "42"),
    ("The answer is clear. There are 12 in 3 boxes: 36", "36"),
    ("The answer isn't 5. It has to be 6", "6"),
    ("She can answer 5 questions in 1 hour", "1"),
    # boxes
    (r"so $\boxed{\frac{3}{4}}$ of 8", "3/4"),
    (r"\boxed{\$1{,}234}", "1234"),
    (r"\boxed{x = 7}", "7"),
    (r"\boxed{12\text{ cm}} of 15", "12"),
    (r"\fbox{12} of 15", "12"),
    (r"\boxed{\text{none}}, but 3", "3"),
    (r"we get \(x = -2\)", "-2"),
    # free text: the last number
    ("First 3, then 4, in the end 7 apples.", "7"),
    ("It takes 10-15 days", "15"),
    ("It takes 10\u201315 days", "15"),
    ("5-3", "3"),
    ("5 - 3", "3"),
    ("from 5 to -3 degrees", "-3"),
    ("That is $5.", "5"),
    ("That is -$5", "-5"),
    ("That is 20 %", "20"),
    ("It costs \u20ac 1,234.00 in all", "1234.00"),
    ("half of it: .5", ".5"),
    ("3/4", "3/4"),
    ("3 / 4 of them", "3/4"),
    ("2 1/2 cups", "2 1/2"),
    ("1.5e3 kg", "1.5e3"),
    (r"2 \times 10^{3}", "2e3"),
    ("2 x 10^-3", "2e-3"),
    ("5eggs", "5"),
    ("number0 and x2 of H2O are 7 in A4", "7"),
    ("1,2,3,4", "4"),
    ("1,234,5678", "5678"),
    ("Rs.500", "500"),
    # nothing
    ("no number", None),
    ("####", None),
    ("The answer is x.", None),
    (r"\boxed{}", None),
    ("", None),
    ("- , . / $ %", None),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_number_that_a_text_comes_to(text: str, number: str | None) -> None:
    assert final_answer(text, "number") == number


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("18.0", "18", True),
        ("18.", "18", True),
        ("18.01", "18", False),
        ("1,080", "1080", True),
        ("$1,080.00", "1080", True),
        ("0.75", "3/4", True),
        ("6/8", "3/4", True),
        ("0.3333", "1/3", False),
        ("2 1/2", "2.5", True),
        ("-2 1/2", "-2.5", True),
        ("-5", "5", False),
        ("-0", "0", True),
        ("50%", "50", True),
        ("1.5e3", "1500", True),
        ("1E3", "1000", True),
        ("1e2", "100", True),
        ("12345678901234567890", "12345678901234567891", False),
        ("5/0", "5", False),
        ("5/0", "5/0", False),
        ("1e999999999", "1e999999999", False),
        ("9" * 5000, "9" * 5000, False),
        ("five", "5", False),
        ("5", "five", False),
    ],
)
def test_numbers_are_the_same_by_value_and_exactly(answer: str, expected: str, same: bool) -> None:
    assert same_answer(answer, expected, "number") is same
    assert same_answer(expected, answer, "number") is same


def test_judge_gives_what_the_model_came_to_and_whether_it_is_right() -> None:
    babble = "He makes 9 * 2 = $<<9*2=18>>18.\n#### 18.00\n\nQuestion: 5?\n#### 5"
    assert judge(babble, "18", "number") == ("18.00", True)
    assert judge("#### 17", "18", "number") == ("17", False)
    assert judge("I don't know", "18", "number") == (None, False)
    assert judge("", "", "exact") == (None, False)
    assert judge("( 6.0 - 2.0 )", "4.0", "equation") == ("4", True)
    assert judge("( 6.0 + 2.0 )", "4.0", "equation") == ("8", False)
    assert judge("6.0 - ", "6.0", "equation") == (None, False)


@pytest.mark.parametrize(
    "text",
    ["#" * 50000, "1" * 50000, "1," * 25000, "1 " * 25000, "\\boxed{" * 7000, "answer: " * 6000],
)
def test_long_and_odd_texts_take_no_longer_than_a_moment(text: str) -> None:
    start = time.monotonic()
    for verify in ("number", "exact", "equation"):
        judge(text, "5", verify)
    assert time.monotonic() - start < 5


# ---- the very text ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("Paris", "Paris", True),
        (" paris.\n", "Paris", True),
        ("PARIS!", "paris?", True),
        ("New\n  York", "new york", True),
        ("Straße", "STRASSE", True),
        ("New York", "NewYork", False),
        ("Paris, France", "Paris", False),
        ("18.0", "18", False),
        ("don't", "dont", False),
        ("(A)", "A", False),
    ],
)
def test_exact_answers_are_equal_but_for_case_space_and_final_punctuation(
    text: str, expected: str, right: bool
) -> None:
    assert judge(text, expected, "exact")[1] is right


# ---- equations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("equation", "numbers", "value"),
    [
        ("( 6.0 - 2.0 )", None, 4.0),
        ("6-2", None, 4.0),
        ("2 + 3 * 4", None, 14.0),
        ("( 2 + 3 ) * 4", None, 20.0),
        ("20 - 5 - 3", None, 12.0),
        ("24 / 4 / 2", None, 3.0),
        ("24 / 4 * 2", None, 12.0),
        ("-5 + 3", None, -2.0),
        ("3 * -2", None, -6.0),
        ("-(2 + 3)", None, -5.0),
        ("2 - -3", None, 5.0),
        ("6 \u00d7 2 \u00f7 3 \u2212 1", None, 3.0),
        ("1,200 + .5", None, 1200.5),
        ("X=(70.0-27.0)", None, 43.0),
        ("x = 6 - 2", None, 4.0),
        ("6 - 2 = 4", None, 4.0),
        ("[ 6 - 2 ].", None, 4.0),
        ("\n\n ( 6.0 - 2.0 )\nQuestion: 5 + 5", None, 4.0),
        ("7.0", None, 7.0),
        ("- - number0 number1 number2", "76 6 14", 56.0),
        ("- number0 - number1 number2", "76 6 14", 84.0),
        ("* number0 + number1 number1", "6.0 5.0 5.0", 60.0),
        ("/ number0 3.0", "12", 4.0),
        ("- 5 3", None, 2.0),
        ("+ number0 number1", "-2.0 -15.0", -17.0),
        ("number1 - number0", "5 15", 10.0),
        ("( N_00 + N_01 ) / N_02", "4 8 3", 4.0),
        ("+ number9 number10", "0 1 2 3 4 5 6 7 8 9 10", 19.0),
        # malformed, or of no value
        ("", None, None),
        ("6.0 -", None, None),
        ("( 6.0 - 2.0", None, None),
        ("6.0 - 2.0 )", None, None),
        ("()", None, None),
        ("6 2", None, None),
        ("+ 6", None, None),
        ("- - 5 3", None, None),
        ("- 5 3 2", None, None),
        ("- ( 5 3 )", None, None),
        ("6 ** 2", None, None),
        ("6 // 2", None, None),
        ("6 ^ 2", None, None),
        ("6..2 + 1", None, None),
        ("6 - 2 apples", None, None),
        ("6 / 0", None, None),
        ("/ 6 - 2 2", None, None),
        ("number0 + 1", None, None),
        ("number2 + 1", "1 2", None),
        ("1e5 + 1", None, None),
        ("__import__('os').getcwd()", None, None),
        ("9" * 400 + " + 1", None, None),
        ("The answer is 5", None, None),
    ],
)
def test_equations_come_to_what_arithmetic_says(
    equation: str, numbers: str | None, value: float | None
) -> None:
    assert evaluate(equation, numbers) == value


def made_up(rng: np.random.Generator, depth: int) -> tuple[str, str]:
    """An equation, infix with all its brackets, and prefix."""
    if depth == 0 or rng.random() < 0.2:
        number = str(rng.integers(1, 100) / 4)
        return number, number
    operator = str(rng.choice(list("+-*/")))
    (left, first), (right, second) = made_up(rng, depth - 1), made_up(rng, depth - 1)
    return f"( {left} {operator} {right} )", f"{operator} {first} {second}"


def test_infix_and_prefix_agree_with_python_on_made_up_equations() -> None:
    rng = np.random.default_rng(0)
    counted = 0
    for _ in range(500):
        infix, prefix = made_up(rng, 4)
        bare = re.sub(r"[()]", "", infix)
        for equation, python in ((infix, infix), (prefix, infix), (bare, bare)):
            try:
                value = eval(python)  # of numbers and operators from above only
            except ZeroDivisionError:
                value = None
            assert evaluate(equation) == value, equation
            counted += value is not None
    assert counted > 1000


def test_too_long_and_too_deep_equations_are_malformed() -> None:
    assert evaluate("(" * (MAX_DEPTH - 1) + "5" + ")" * (MAX_DEPTH - 1)) == 5
    assert evaluate("(" * MAX_DEPTH + "5" + ")" * MAX_DEPTH) is None
    assert evaluate("-" * 100 + "5") is None
    long = "+".join(["1"] * (MAX_TOKENS // 2))
    assert evaluate(long) == MAX_TOKENS // 2
    assert evaluate(f"{long}+1") is None
    assert evaluate("(" * 100_000) is None


def test_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got '3 four'\. Correct the row"):
        values_of("3 four")


@pytest.mark.parametrize(
    ("equation", "expected", "right"),
    [
        ("100 / 3", "33.3333", True),
        ("100 / 3", "33.33", True),
        ("100 / 3", "33.3", False),
        ("5 - 5", "0.0", True),
        ("0.3 - 0.2 - 0.1", "0", True),
        ("0.001", "0", False),
        ("3 - 5", "2", False),
        ("10000", "10001", True),
        ("1000", "1001", False),
    ],
)
def test_equations_are_right_within_one_in_ten_thousand(
    equation: str, expected: str, right: bool
) -> None:
    assert judge(equation, expected, "equation")[1] is right


# ---- the real ones ----------------------------------------------------------------------------


def rows_of(folder: str, *names: str) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        with open(Path(data_folder(folder)) / f"{name}.jsonl", encoding="utf-8") as lines:
            rows += [json.loads(line) for line in lines]
    return rows


def test_every_answer_of_gsm8k_comes_to_its_final_number() -> None:
    rows = rows_of("gsm8k", "train", "test")
    assert len(rows) == 7473 + 1319
    for row in rows:
        final = row["final"]
        assert final_answer(row["answer"], "number") == final.replace(",", ""), row
        assert judge(f"So the answer is {final}.", final, "number")[1], row
        assert not judge(f"{row['answer']}1", final, "number")[1], row


# Rows whose equation isn't what their own final says, by file and number: upstream's mistakes.
MISTAKEN = {
    ("svamp", "train"): [679],
    ("svamp", "test"): [],
    ("mawps_asdiv_svamp", "train_dedup"): [313, 380, 417, 572, 604, 692, 1141, 1424, 1764, 1978],
    ("mawps_asdiv_svamp", "heldout_dedup"): [8, 294],
    ("mawps_asdiv_svamp", "validation"): [],
}


@pytest.mark.parametrize(("folder", "name"), MISTAKEN)
def test_every_equation_but_13_comes_to_its_final_number(folder: str, name: str) -> None:
    rows = rows_of(folder, name)
    verdicts = [
        judge(row["equation"], row["final"], "equation", row.get("numbers"))[1] for row in rows
    ]
    mistaken = MISTAKEN[folder, name]
    assert [number for number, right in enumerate(verdicts) if not right] == mistaken
    for number in mistaken:  # and they do come to something
        assert evaluate(rows[number]["equation"], rows[number].get("numbers")) is not None


# ---- presets ----------------------------------------------------------------------------------

GSM8K_ROW = {"question": "1 + 1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}
PUBLISHED: dict[str, dict[str, Any]] = {  # a row with the columns of the hub's data
    "gsm8k": GSM8K_ROW,
    "metamathqa": {
        "type": "GSM_Rephrased",
        "query": "1 + 1?",
        "original_question": "1 plus 1?",
        "response": "1 + 1 = 2\n#### 2\nThe answer is: 2",
    },
    "svamp": {
        "ID": "chal-1",
        "Body": "He has 1 and gets 1",
        "Question": "How many?",
        "Equation": "( 1.0 + 1.0 )",
        "Answer": "2",
        "Type": "Addition",
        "question_concat": "He has 1 and gets 1 How many?",
    },
    "mawps": {
        "Question": "He has N_00 and gets N_01 . How many ?",
        "Numbers": "1.0 1.0",
        "Equation": "N_00 + N_01",
        "Answer": 2.0,
    },
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_reads_the_published_columns_and_verifies_its_own_answers(
    name: str, tmp_path: Path
) -> None:
    preset = PRESETS[name]
    changes: dict[str, Any] = {"data": str(tmp_path / "own"), "validation_size": 2}
    write_rows(tmp_path / "own" / "train.jsonl", [PUBLISHED[name]] * 5)
    if preset.task.test_split:
        other = preset.task.test_data is not None
        write_rows(tmp_path / "own" / "test.jsonl", [PUBLISHED[name]])
        write_rows(tmp_path / "other" / "test.jsonl", [GSM8K_ROW])
        changes |= {"test_data": str(tmp_path / "other")} if other else {}
    changes |= {"subset": None, "test_subset": None}
    task: Any = load_task(preset.task.model_copy(update=changes))
    split = "test" if preset.task.test_split else "validation"
    (judgement,) = task.judge(split, [0], [[task.answers(split)[0]]])
    assert judgement.outcomes == {"exact_match": 1.0}
    assert same_answer(judgement.expected, "2", "number")
    assert preset.metric == "exact_match"
    wrong = task.judge(split, [0], [["3"]])
    assert wrong[0].outcomes == {"exact_match": 0.0}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
