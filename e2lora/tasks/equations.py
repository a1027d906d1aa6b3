"""Equations that a model writes, and what they come to: + - * / over numbers, infix or prefix.

They are read by a parser of their own, of limited length and depth: nothing that a model writes
is ever run.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise

MAX_TOKENS, MAX_DEPTH = 200, 50
Operand = float | str  # a number, or an operator or bracket

_SYMBOLS = str.maketrans({"−": "-", "×": "*", "·": "*", "÷": "/", "[": "(", "]": ")"})
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)(?![\w.])"
    r"|(?P<name>number|N_)(?P<place>\d{1,3})(?!\w)|(?P<symbol>[-+*/()]))",
    re.ASCII,
)
_LEFT_SIDE = re.compile(r"\s*[A-Za-z]\w*\s*=")
_END = re.compile(r"[\s.;]+\Z")


def evaluate(equation: str, numbers: str | None = None) -> float | None:
    """What the first line that isn't blank comes to; None: it is no equation, or divides by 0.

    ``x = 6 - 2`` and ``6 - 2 = 4`` come to what is to be computed: 6 - 2. Infix, with brackets and
    the usual precedence, or prefix, where each operator stands before its two operands.

    Args:
        numbers: values of ``number0`` (or ``N_00``), ``number1`` …, with spaces between them.

    Raises:
        ValueError: ``numbers`` are none.

    >>> evaluate("( 6.0 - 2.0 ) / 4"), evaluate("- - number0 number1 number2", "76 6 14")
    (1.0, 56.0)
    >>> evaluate("6 - "), evaluate("6 / (2 - 2)"), evaluate("open('file')"), evaluate("number0")
    (None, None, None, None)
    """
    values = values_of(numbers) if numbers is not None else []
    line = next((line for line in equation.splitlines() if line.strip()), "")
    line = _LEFT_SIDE.sub("", line.translate(_SYMBOLS), count=1)
    tokens = _tokens(line.partition("=")[0], values)
    if tokens is None or not tokens:
        return None
    try:
        value, rest = _prefix(tokens) if _is_prefix(tokens) else _sum(tokens, 0, MAX_DEPTH)
    except (_Malformed, ZeroDivisionError):
        return None
    return value if rest == len(tokens) and math.isfinite(value) else None


def values_of(numbers: str) -> list[float]:
    """
    Raises:
        ValueError: not all of them are numbers.

    >>> values_of("76 6.5 -14")
    [76.0, 6.5, -14.0]
    """
    try:
        return [float(number) for number in numbers.split()]
    except ValueError as error:
        raise ValueError(
            "the values of number0, number1, … must be numbers with spaces between them; got "
            f"{numbers!r}. Correct the row, or name the right `numbers_column`."
        ) from error


class _Malformed(Exception):
    """It is no equation."""


def _tokens(line: str, values: list[float]) -> list[Operand] | None:
    """None: there is something else in it, or too much."""
    tokens: list[Operand] = []
    place, end = 0, len(_END.sub("", line))
    while place < end:
        found = _TOKEN.match(line, place)
        if found is None or len(tokens) == MAX_TOKENS:
            return None
        if found["number"]:
            tokens.append(float(found["number"].replace(",", "")))
        elif found["symbol"]:
            tokens.append(found["symbol"])
        elif int(found["place"]) < len(values):
            tokens.append(values[int(found["place"])])
        else:
            return None
        place = found.end()
    return tokens


def _is_prefix(tokens: list[Operand]) -> bool:
    """Its last operator stands before two numbers, which never follow each other in infix."""
    return any(isinstance(a, float) and isinstance(b, float) for a, b in pairwise(tokens))


def _prefix(tokens: list[Operand]) -> tuple[float, int]:
    """Read from its end, so that an operator finds its operands computed."""
    stack: list[float] = []
    for token in reversed(tokens):
        if isinstance(token, float):
            stack.append(token)
        elif token in "()" or len(stack) < 2:
            raise _Malformed
        else:
            stack.append(_computed(stack.pop(), token, stack.pop()))
    if len(stack) != 1:
        raise _Malformed
    return stack[0], len(tokens)


def _sum(tokens: list[Operand], place: int, depth: int) -> tuple[float, int]:
    """Value of the sum that begins at a place, and the place behind it."""
    value, place = _product(tokens, place, depth)
    while place < len(tokens) and tokens[place] in ("+", "-"):
        operator = str(tokens[place])
        term, place = _product(tokens, place + 1, depth)
        value = _computed(value, operator, term)
    return value, place


def _product(tokens: list[Operand], place: int, depth: int) -> tuple[float, int]:
    value, place = _factor(tokens, place, depth)
    while place < len(tokens) and tokens[place] in ("*", "/"):
        operator = str(tokens[place])
        factor, place = _factor(tokens, place + 1, depth)
        value = _computed(value, operator, factor)
    return value, place


def _factor(tokens: list[Operand], place: int, depth: int) -> tuple[float, int]:
    """A number, a negated factor, or a sum in brackets."""
    if depth == 0 or place >= len(tokens):
        raise _Malformed
    token = tokens[place]
    if isinstance(token, float):
        return token, place + 1
    if token == "-":
        value, place = _factor(tokens, place + 1, depth - 1)
        return -value, place
    if token != "(":
        raise _Malformed
    value, place = _sum(tokens, place + 1, depth - 1)
    if place >= len(tokens) or tokens[place] != ")":
        raise _Malformed
    return value, place + 1


def _computed(a: float, operator: str, b: float) -> float:
    """
    >>> _computed(6.0, "-", 2.0)
    4.0
    """
    if operator == "+":
        return a + b
    if operator == "-":
        return a - b
    return a * b if operator == "*" else a / b
