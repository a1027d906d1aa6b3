"""Mathematics: problems in words whose answers are verified, by the share that comes out right.

GSM8K's test rows are the official ones, of which all are answered; so are those of models trained
on MetaMathQA. Of MetaMathQA's own rows, part of which come to no plain number, a search looks at
the likelihood only. SVAMP has the 300 test rows of its copy on the hub. Of MAWPS there are no
official test rows. SVAMP's and MAWPS's models write equations, which are right if they come to what
the row's own equation comes to; a number in MAWPS's problems is written N_00, N_01, ….
"""

from __future__ import annotations

from typing import Any

from e2lora.config.presets.preset import Preset
from e2lora.config.tasks import GenerationConfig, SftConfig

_REASONED = "Question: {prompt}\nAnswer:\n"
_EQUATION = "Question: {prompt}\nEquation:\n"


def _preset(data: str, max_new_tokens: int, **options: Any) -> Preset:
    """Its lengths leave room for all rows but a few in a thousand, by a tokenizer of digits."""
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens, max_validation_rows=options.pop("max_validation_rows", None)
    )
    return Preset(SftConfig(data=data, generation=generation, **options), "exact_match")


PRESETS: dict[str, Preset] = {
    "gsm8k": _preset(
        "openai/gsm8k",
        subset="main",
        prompt_column="question",
        template=_REASONED,
        verify="number",
        test_split="test",
        validation_size=500,
        max_length=640,
        max_new_tokens=320,
    ),
    "metamathqa": _preset(
        "meta-math/MetaMathQA",
        prompt_column="query",
        answer_column="response",
        template=_REASONED,
        verify="number",
        test_data="openai/gsm8k",
        test_subset="main",
        test_split="test",
        test_columns={"query": "question", "response": "answer"},
        max_length=640,
        max_new_tokens=512,
        max_validation_rows=0,
    ),
    "svamp": _preset(
        "ChilleD/SVAMP",
        prompt_column="question_concat",
        answer_column="Equation",
        template=_EQUATION,
        verify="equation",
        test_split="test",
        validation_size=70,
        max_length=192,
        max_new_tokens=48,
    ),
    "mawps": _preset(
        "mwpt5/MAWPS",
        prompt_column="Question",
        answer_column="Equation",
        numbers_column="Numbers",
        template=_EQUATION,
        verify="equation",
        validation_size=170,
        max_length=192,
        max_new_tokens=48,
    ),
}
