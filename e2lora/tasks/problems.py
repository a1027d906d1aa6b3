"""Programming problems with tests: what a model is asked, and the program that judges its answer.

Of HumanEval (Chen et al., 2021) the prompt is the beginning of a function, which the answer goes on
with. Of MBPP (Austin et al., 2021) it is a docstring of the task and its tests, and the answer is
all that it takes; its publication shows three solved problems first, as ``num_shots=3`` does.
"""

from __future__ import annotations

import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]
CODE = re.compile(r"\A(?:[ \t]*\n)*[ \t]+\S|^(?:def|class|import|from|@)\b", re.MULTILINE)
NEEDED = re.compile(r"(?:async |def |class |import |from |@|#|[)\]}])")  # begins a line of it
FENCE = re.compile(r"```[^\n]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


class Problems(ABC):
    """What rows of a benchmark look like.

    Attributes:
        columns: that a row must have.
        texts: those of them that are texts.
        stop: what ends a program that a model writes on without end: texts that no answer
            begins with, be it a function's body, a whole program, or words and a fenced one.
    """

    columns: tuple[str, ...]
    texts: tuple[str, ...]
    stop: tuple[str, ...]

    @abstractmethod
    def prompt(self, row: Row) -> str:
        """What the model is asked."""

    @abstractmethod
    def solution(self, row: Row) -> str:
        """The benchmark's own answer."""

    @abstractmethod
    def program(self, row: Row, answer: str) -> str:
        """What runs the tests on an answer; it ends without an error if they pass."""


class HumanEval(Problems):
    columns = ("prompt", "canonical_solution", "test", "entry_point")
    texts = columns
    stop = ("\nassert ", "\nprint(", "\nif __name__")

    def prompt(self, row: Row) -> str:
        return row["prompt"].rstrip("\n")  # a template puts its own

    def solution(self, row: Row) -> str:
        return row["canonical_solution"]

    def program(self, row: Row, answer: str) -> str:
        name = row["entry_point"]
        code = unfenced(answer).strip("\n")
        told_again = re.search(rf"^[ \t]*(?:async )?def {re.escape(name)}\b", code, re.MULTILINE)
        if code[:1].isspace() and not (told_again and told_again.start() == 0):
            code = row["prompt"] + body_alone(code, name)
        elif told_again:
            # Behind the imports and helpers that the prompt begins with; the prompt's own function
            # must have a body to be read.
            code = f"{row['prompt']}\n    pass\n\n{textwrap.dedent(code)}"
        else:
            code = row["prompt"] + as_body(code)
        return f"{code}\n\n{row['test']}\n\ncheck({name})\n"


class Mbpp(Problems):
    columns = ("text", "code", "test_list", "test_setup_code")
    texts = ("text", "code", "test_setup_code")
    stop = ('\n"""', "\nassert ", "\nprint(", "\nif __name__")

    def prompt(self, row: Row) -> str:
        tests = "\n".join(row["test_list"])
        return f'"""\n{row["text"].strip()}\n{tests}\n"""'

    def solution(self, row: Row) -> str:
        return row["code"].replace("\r\n", "\n")

    def program(self, row: Row, answer: str) -> str:
        tests = "\n".join(row["test_list"])
        return f"{unfenced(answer)}\n\n{row['test_setup_code']}\n{tests}\n"


PROBLEMS: dict[str, Problems] = {"humaneval": HumanEval(), "mbpp": Mbpp()}


def unfenced(answer: str) -> str:
    """The first fenced block of an answer with words around it; an answer without one, as it is.

    >>> unfenced("Here it is:\\n```python\\nx = 1\\n```\\nIt works.")
    'x = 1'
    >>> unfenced("    return 1\\n```\\nIt works.")
    '    return 1'
    """
    fenced = FENCE.search(answer)
    if fenced and not CODE.search(answer[: fenced.start()]):
        block = fenced.group(1)
        return textwrap.dedent(block) if block[:1].isspace() else block
    return answer.partition("\n```")[0]


def body_alone(code: str, name: str) -> str:
    """A function's body, and behind it what it may need; not how a model goes on without end.

    >>> body_alone("    return g(x)\\n\\ndef g(x):\\n    return 1\\n\\nf(1)\\n", "f")
    '    return g(x)\\n\\ndef g(x):\\n    return 1\\n'
    >>> body_alone("    return 1\\n\\ndef f(x):\\n    ret", "f")
    '    return 1\\n'
    """
    other = rf"^(?:(?:async )?def {re.escape(name)}\b|(?!{NEEDED.pattern})\S)"
    further = re.search(other, code, re.MULTILINE)
    return code[: further.start()].rstrip() + "\n" if further else code


def as_body(code: str) -> str:
    """A function's body, indented where the answer has left that out: of its first line, or of all.

    >>> as_body("x = 1\\n    return x"), as_body("x = 1\\nreturn x")
    ('    x = 1\\n    return x', '    x = 1\\n    return x')
    """
    _, *others = code.split("\n")
    whole = any(line and not line[0].isspace() for line in others)
    return textwrap.indent(code, "    ") if whole else f"    {code}"
