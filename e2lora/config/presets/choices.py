"""Questions with choices that causal models are compared on, each by accuracy.

Every choice's text is compared, as a continuation of the question, by its likelihood; so a preset
asks what the field's harnesses ask, with no choice shown in the prompt. BoolQ's test answers aren't
published: its validation rows are the test rows here, and what a search looks at is carved from the
training rows.

LLM-Adapters' files (Hu et al., 2023), in which the prompt shows the choices and ends with their
names, are no hub data set, so they have no preset. They are read from a folder of theirs with

>>> config = MultipleChoiceConfig(
...     data="LLM-Adapters/dataset/ARC-Easy",
...     test_split="test",
...     validation_size=200,
...     prompt_column="instruction",
...     answer_column="answer",
...     choices_pattern=r"Answer format: (\\S+)$",
...     answer_prefix="the correct answer is ",
... )

where prefix and choice together are the files' ``output``, which those models are trained on.
"""

from __future__ import annotations

from typing import Any

from e2lora.config.presets.preset import Preset
from e2lora.config.tasks import MultipleChoiceConfig

_SPLITS = {"validation_split": "validation", "test_split": "test"}
_LABELLED = {"choices_column": "choices", "answer_column": "answerKey", **_SPLITS}
_QUESTION = {"prompt_column": "question", "template": "Question: {prompt}\nAnswer:"}


def _preset(data: str, subset: str | None = None, **options: Any) -> Preset:
    task = {"answer_prefix": " ", **options, "data": data, "subset": subset}
    return Preset(MultipleChoiceConfig.model_validate(task), metric="accuracy")


PRESETS: dict[str, Preset] = {
    "arc_easy": _preset("allenai/ai2_arc", "ARC-Easy", **_QUESTION, **_LABELLED),
    "arc_challenge": _preset("allenai/ai2_arc", "ARC-Challenge", **_QUESTION, **_LABELLED),
    "openbookqa": _preset(
        "allenai/openbookqa",
        "main",
        prompt_column="question_stem",
        template="{prompt}",  # sentences to be finished, most of them
        **_LABELLED,
    ),
    "boolq": _preset(
        "google/boolq",
        prompt_column="passage",
        context_column="question",  # behind the passage, so that the answer follows it
        template="{prompt}?\nAnswer:",
        choices=("no", "yes"),  # false and true
        answer_column="answer",
        test_split="validation",
        max_length=2048,
    ),
}
