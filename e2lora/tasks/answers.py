"""What a written text comes to, and whether that is what was expected.

``verify`` says how: ``number``, where texts reason in words and come to a number; ``exact``, where
the whole text is the answer; ``equation``, where the text is an equation that comes to a number.
Models are judged by finals that are plain numbers or texts, whatever else stands in their answers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal

from e2lora.tasks.equations import evaluate

Verify = Literal["number", "exact", "equation"]
RELATIVE_TOLERANCE = 1e-4  # of equations: finals are rounded
MAX_SENTENCE = 300  # characters behind "the answer is" that are looked at
MAX_DIGITS = 60  # longer numbers, and exponents of more than two digits, equal nothing

_CALCULATION = re.compile(r"<<[^<>\n]*>>")  # GSM8K: 48/2 = <<48/2=24>>24
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", re.ASCII)
_BETWEEN_DIGITS = re.compile(r"(?<=\d)(?:\{,\}|\\[,!]|\u202f)(?=\d{3})", re.ASCII)
_MARKUP = re.compile(r"\*\*|\\[()]|\\(?=[$%])|(?<=[$€£¥])\s+(?=[-\d.])", re.ASCII)
_MINUS = str.maketrans({"−": "-", "–": "-", "\u2011": "-", "\u00a0": " "})

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_TIMES_TEN = r" ?(?:x|×|\*|\\times) ?10 ?\^ ?"
_POWER = rf"[eE][-+]?\d+(?![a-zA-Z])|{_TIMES_TEN}\{{?-?\d+\}}?"
_SIGN = r"(?<![\w.,)%$€£¥-])-"  # the minus of 5-3 and of 10-15 days is none
_NUMBER = re.compile(
    rf"(?:[$€£¥]-|(?:{_SIGN})?[$€£¥]?)(?<![A-Za-z_\d])(?:\d+ \d+/\d+(?!\d)|"
    rf"(?:{_UNSIGNED})(?:{_POWER}| ?/ ?[$€£¥]?(?:{_UNSIGNED}))?)",
    re.ASCII,
)
_HASHES = re.compile(rf"####[^\S\n]*(?={_NUMBER.pattern})", re.ASCII)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_ANSWER = re.compile(r"\banswer(?:\s+is\b|\s*[:=])[\s:]*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|[.!?;](?=\s|\Z)")


def final_answer(text: str, verify: Verify, numbers: str | None = None) -> str | None:
    """What a text comes to; None: there is nothing of the kind.

    Of a ``number``: behind the first ``####``; else in the first box; else in the sentence of the
    first "answer is" or "answer:"; else the last one of the text. The first, since models tend to
    go on with other questions once they have answered. Where ``=`` stands there too, the number
    behind the last one. Thousands' commas, currencies and units are left out, percent too: 50% is
    50. A number is given as it was written otherwise.

    Args:
        numbers: of an ``equation`` over number0, number1, …: their values.

    >>> final_answer("48 + 24 = <<48+24=72>>72 clips\\n#### 72\\n#### 5", "number")
    '72'
    >>> final_answer("So he pays 2 times: the answer is $1,234.50.", "number")
    '1234.50'
    >>> final_answer(" Paris. ", "exact"), final_answer("( 6.0 - 2.0 )", "equation")
    ('paris', '4')
    """
    if verify == "exact":
        return _plain(text) or None
    if verify == "number":
        return _final_number(text)
    value = evaluate(text, numbers)
    return None if value is None else f"{value:.15g}"


def same_answer(answer: str, expected: str, verify: Verify) -> bool:
    """Whether two texts are, or come to, the same: equations by 1 in 10,000, else exactly.

    Args:
        answer: as :func:`final_answer` gives it, as may be ``expected``.

    >>> same_answer("18.0", "18", "number"), same_answer("0.75", "3/4", "number")
    (True, True)
    >>> same_answer("33.3333", "33.33", "equation"), same_answer("33.3", "33.33", "equation")
    (True, False)
    """
    if verify == "exact":
        return _plain(answer) == _plain(expected)
    ours, theirs = _value(answer), _value(expected)
    if ours is None or theirs is None:
        return False
    if verify == "number":
        return ours == theirs
    return math.isclose(ours, theirs, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-9)


def judge(
    text: str, expected: str, verify: Verify, numbers: str | None = None
) -> tuple[str | None, bool]:
    """What a model's text comes to, and whether that is what was expected.

    >>> judge("+ number0 number1", "7.0", "equation", "3 4")
    ('7', True)
    """
    answer = final_answer(text, verify, numbers)
    return answer, answer is not None and same_answer(answer, expected, verify)


def _plain(text: str) -> str:
    """Without case, white space beyond single spaces, and final punctuation.

    >>> _plain("  The\\n Answer. ")
    'the answer'
    """
    return " ".join(text.casefold().split()).rstrip(".,;:!? ")


def _final_number(text: str) -> str | None:
    text = _CALCULATION.sub("", text.translate(_MINUS))
    text = _LATEX_FRACTION.sub(r"\1/\2", _BETWEEN_DIGITS.sub("", text))
    text = _MARKUP.sub("", text)
    for place in _stated(text):
        behind_equal_sign = place.rpartition("=")[2]
        found = _NUMBER.search(behind_equal_sign) or _NUMBER.search(place)
        if found:
            return _cleaned(found[0])
    every = _NUMBER.findall(text)
    return _cleaned(every[-1]) if every else None


def _stated(text: str) -> Iterator[str]:
    """Where a text says what its answer is, the likeliest place first."""
    for found in _HASHES.finditer(text):
        yield text[found.end() : found.end() + MAX_SENTENCE].partition("\n")[0]
    for found in _BOXED.finditer(text):
        yield found[1]
    for found in _ANSWER.finditer(text):
        said = text[found.end() : found.end() + MAX_SENTENCE]
        yield _SENTENCE_END.split(said, maxsplit=1)[0]


def _cleaned(number: str) -> str:
    """
    >>> _cleaned("-$1,234.50"), _cleaned("2 \\\\times 10^{3}"), _cleaned("3 / 4")
    ('-1234.50', '2e3', '3/4')
    """
    number = re.sub(_TIMES_TEN, "e", re.sub(r"[$€£¥,]", "", number))
    return re.sub(" ?/ ?", "/", re.sub(r"[{}]", "", number))


def _value(text: str) -> Fraction | None:
    """Of the number that a text comes to; None: there is none, or it is too long, or divides by 0.

    >>> _value("2 1/2"), _value("-3/4"), _value("1/0"), _value("1e999")
    (Fraction(5, 2), Fraction(-3, 4), None, None)
    """
    number = _final_number(text)
    if number is None or len(number) > MAX_DIGITS or re.search(r"[eE][-+]?0*[1-9]\d\d", number):
        return None
    whole, _, part = number.rpartition(" ")
    above, _, below = part.partition("/")
    try:
        value = Fraction(above) / Fraction(below or 1)
    except ZeroDivisionError:
        return None
    if not whole:
        return value
    return Fraction(whole) + (-value if whole.startswith("-") else value)
