"""Programs pass where their tests do, and are run where the user says so."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from e2lora.config import CodeConfig, GenerationConfig, task_preset
from e2lora.evaluate import judge_answers, score_rows
from e2lora.generation import cut_at
from e2lora.tasks import TrialData, load_task
from e2lora.tasks.pass_at_k import pass_at_k
from e2lora.tasks.problems import PROBLEMS
from e2lora.tasks.sandbox import Limits, run_all
from tests.conftest import data_folder
from tests.files import folder_of
from tests.test_generation import tiny_tokenizer

BROKEN = (
    "    return None\n",
    "    raise ValueError\n",
    "    import os; os._exit(0)\n",
    "    raise SystemExit(0)\n",
    "    def",
)
SLOW = pytest.mark.slow
ROWS = [
    {
        "text": f"Write a function to add {n}.",
        "code": f"def add{n}(x):\n    return x + {n}",
        "test_list": [f"assert add{n}(1) == {n + 1}", f"assert add{n}(-1) == {n - 1}"],
        "test_setup_code": "",
    }
    for n in range(8)
]


def rows_of(name: str, *splits: str) -> list[dict[str, Any]]:
    files = [Path(data_folder(name)) / f"{split}.jsonl" for split in splits]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def passed(name: str, rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> int:
    programs = [PROBLEMS[name].program(*pair) for pair in zip(rows, answers, strict=True)]
    return sum(ran.passed for ran in run_all(programs, Limits(seconds=20)))


def task_of(data: Path | str, **options: Any) -> Any:
    defaults: dict[str, Any] = {"problems": "mbpp", "validation_size": 2, "max_length": 400}
    return load_task(CodeConfig(data=str(data), **{**defaults, **options}))


# ---- pass@k -----------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_choices_that_hold_a_program_that_passes() -> None:
    for n in range(1, 13):
        for c, k in product(range(n + 1), range(1, n + 1)):
            exact = 1 - Fraction(comb(n - c, k), comb(n, k))
            assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-12)
    assert 0 < pass_at_k(10_000, 1, 100) < 0.0101, "no large numbers arise"


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)])
def test_impossible_counts_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=rf"n={n}, c={c}, k={k}\. Let"):
        pass_at_k(n, c, k)


# ---- benchmarks -------------------------------------------------------------------------------


def test_all_canonical_solutions_of_humaneval_pass() -> None:
    rows, problems = rows_of("humaneval", "test"), PROBLEMS["humaneval"]
    assert len(rows) == 164
    assert passed("humaneval", rows, [problems.solution(row) for row in rows]) == 164


@pytest.mark.parametrize("broken", [BROKEN[0], *(pytest.param(b, marks=SLOW) for b in BROKEN[1:])])
def test_all_broken_solutions_of_humaneval_fail(broken: str) -> None:
    assert passed("humaneval", rows_of("humaneval", "test"), [broken] * 164) == 0


@pytest.mark.slow
def test_solutions_of_mbpp_pass_and_broken_ones_fail() -> None:
    rows = rows_of("mbpp", "test")[::10]
    assert passed("mbpp", rows, [PROBLEMS["mbpp"].solution(row) for row in rows]) == 50
    assert passed("mbpp", rows, ["def nothing():\n    return None"] * 50) == 0


@pytest.mark.slow
def test_all_solutions_of_mbpp_pass() -> None:
    rows = rows_of("mbpp", "train", "validation", "test", "prompt")
    assert len(rows) == 974
    assert passed("mbpp", rows, [PROBLEMS["mbpp"].solution(row) for row in rows]) == 974


PROMPT = 'from numbers import Number\n\n\ndef double(x: int) -> int:\n    """Twice x."""\n'
WHOLE = f"{PROMPT}    return 2 * x\n"
TOLD = {
    "prompt": PROMPT,
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(4) == 8",
}
ANSWERS = {
    "body": "    return 2 * x\n",
    "body, then more": "    return 2 * x\n```\nIt doubles x.",
    "body without its indent": "return 2 * x\n",
    "fenced whole": f"Here it is:\n\n```python\n{WHOLE}```\nIt doubles x.",
    "fenced body": "```\n    return 2 * x\n```",
    "unclosed fence": f"```python\n{WHOLE}",
    "told again": WHOLE,
    "words before it": f"It doubles x.\n```\n{WHOLE}\n```\n```\nassert double(2) == 5\n```",
    "fenced in a list": "1. So:\n   ```python\n"
    + textwrap.indent(WHOLE, "   ")
    + "   ```\n2. Done.",
    "told again without its imports": "def double(x: Number) -> Number:\n    return 2 * x",
    "goes on with its tests": "    return 2 * x\n\n\nassert double(2) == 5\n",
    "goes on with itself": "    return 2 * x\n\n\ndef double(x):\n    return 3 * x if x el",
    "goes on with words": "    return 2 * x\n\nThis doubles x. Isn't it so?",
    "begins with a blank line": "\n    y = 2 * x\n\n    return y",
    "recurses": "    if x > 9:\n        return double(x)\n    return 2 * x",
    "of a closing bracket": "    return (\n        2 * x\n)\n",
    "with a helper": "    return twice(x)\n\ndef twice(x):\n    return 2 * x\n",
    "of Windows": "    y = 2 * x\r\n    return y\r\n",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_program_is_found_in_an_answer(answer: str) -> None:
    wrong = answer.replace("2 * x", "3 * x")
    assert (passed("humaneval", [TOLD], [answer]), passed("humaneval", [TOLD], [wrong])) == (1, 0)


MBPP_ANSWERS = {
    "alone": "def add1(x):\n    return x + 1",
    "of Windows": "def add1(x):\r\n    return x + 1\r\n",
    "fenced": "Use this:\n```python\ndef add1(x):\n    return x + 1\n```\nNow add1(1) is 2.",
    "closed by a fence": "def add1(x):\n    return x + 1\n```\nNow add1(1) is 2.",
    "with imports": "import operator\n\ndef add1(x):\n    return x + operator.index(1)",
}


@pytest.mark.parametrize("answer", MBPP_ANSWERS.values(), ids=MBPP_ANSWERS)
def test_whole_program_is_found_in_an_answer(answer: str) -> None:
    wrong = answer.replace("return x +", "return x -")
    assert (passed("mbpp", ROWS[1:2], [answer]), passed("mbpp", ROWS[1:2], [wrong])) == (1, 0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_answer_begins_with_what_ends_one(name: str) -> None:
    beginnings = [
        "    return 1",
        "def f():\n    return 1",
        "import re\nfrom math import pi\n\n\ndef f():\n    return 1",
        "# Counts.\n@cached\ndef f():\n    return 1",
        "class A:\n    pass\n\ndef f():\n    return 1",
        "Here it is:\n\n```python\ndef f():\n    return 1",
    ]
    for beginning in beginnings:
        assert cut_at(f"\n{beginning}", PROBLEMS[name].stop) == f"\n{beginning}"


# ---- the task ---------------------------------------------------------------------------------


def test_programs_are_not_run_unless_the_user_says_so(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", train=ROWS, test=ROWS[:2])
    task = task_of(folder, test_split="test")
    assert [task.generation(split) for split in task.splits] == [None] * 3
    assert set(task.directions) == {"nll", "loss", "perplexity"}
    task = task_of(folder, test_split="test", execution="sandbox")
    assert task.directions["pass_at_1"] == "maximize"
    assert task.generation("test").stop == PROBLEMS["mbpp"].stop


def test_judgement_counts_the_programs_that_pass(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", train=ROWS, test=ROWS[:2])
    sampling = GenerationConfig(num_samples=3, temperature=1.0)
    task = task_of(folder, test_split="test", execution="sandbox", k=(1, 2), generation=sampling)
    right, wrong = ROWS[1]["code"], "def add1(x):\n    return 1"
    (judgement,) = task.judge("test", [1], [[wrong, right, wrong]])
    assert judgement.outcomes == {
        "pass_at_1": pytest.approx(1 / 3),
        "pass_at_2": pytest.approx(2 / 3),
    }
    assert judgement.prediction == [[wrong, "failed"], [right, "passed"], [wrong, "failed"]]
    assert judgement.expected == right


def test_problems_of_another_benchmark_are_test_rows_beside_instructions(tmp_path: Path) -> None:
    asked = [
        {"instruction": f"Say {i}", "input": "twice" * (i % 2), "output": f"{i}{i}"}
        for i in range(8)
    ]
    folder = folder_of(tmp_path / "data", train=asked)
    columns = {"prompt_column": "instruction", "context_column": "input", "answer_column": "output"}
    held = {"test_data": data_folder("humaneval"), "test_split": "test"}
    task = task_of(folder, problems="humaneval", execution="sandbox", **columns, **held)
    assert task.num_rows("test") == 164
    assert {"Say 1\n\ntwice", "Say 2"} <= set(
        task.questions("train") + task.questions("validation")
    )
    assert task.questions("test")[0].endswith('True\n    """')
    assert task.generation("validation") is None, "instructions have no tests"
    assert "pass_at_1" not in task.directions, "a search sees the validation rows only"
    assert task.generation("test") is not None


def test_conversations_are_learnt_from_their_first_exchange(tmp_path: Path) -> None:
    def said(*roles: str) -> dict[str, Any]:
        return {
            "messages": [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
        }

    rows = [said("user", "assistant", "user", "assistant")] * 4
    held = {"test_data": data_folder("humaneval"), "test_split": "test", "problems": "humaneval"}
    folder = folder_of(tmp_path / "data", train=rows)
    task = task_of(folder, messages_column="messages", **held)
    assert set(task.questions("train")) == {"user 0"}
    assert set(task.answers("train")) == {"assistant 1"}
    wrong = folder_of(tmp_path / "wrong", train=[*rows, said("assistant", "user")])
    with pytest.raises(ValueError, match=r"train row 4 of .*begins with \['assistant', 'user'\]"):
        task_of(wrong, messages_column="messages", **held)


def test_more_programs_are_counted_than_are_written_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k=\(1, 10\) and num_samples=1\. Raise"):
        CodeConfig(data="any", k=(1, 10))


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, intermediate_size=64, vocab_size=len(tokenizer))
    return LlamaForCausalLM(config).eval()


def test_programs_are_scored_written_run_and_counted(tmp_path: Path, model: Any) -> None:
    folder = folder_of(tmp_path / "data", train=ROWS, test=ROWS[:3])
    sampling = GenerationConfig(max_new_tokens=8, num_samples=2, temperature=1.0)
    task = task_of(folder, test_split="test", execution="sandbox", generation=sampling)
    tokenizer = tiny_tokenizer()
    data = TrialData.of(task, tokenizer)
    scores = score_rows(model, data, "test", tokenizer, batch_size=2)
    metrics = task.metrics(judge_answers(model, data, "test", tokenizer, scores))
    assert metrics["pass_at_1"] == 0.0, "such a model writes no program"
    assert metrics.keys() == {"nll", "loss", "perplexity", "pass_at_1"}


def test_every_problem_of_mbpp_fits_its_preset() -> None:
    """Where each digit, and each word, sign run and space run else, is a token."""
    task: Any = load_task(task_preset("mbpp", data=data_folder("mbpp"), subset=None))
    lengths = [
        len(re.findall(r"\d|[^\W\d]+|[^\w\s]+|\s+", "\n".join(texts)))
        for split in task.splits
        for texts in zip(task.questions(split), task.answers(split), strict=True)
    ]
    assert 2048 < max(lengths) < task.config.max_length
