"""Programs: trained on answers to instructions, or on problems; judged by tests.

Model-written programs are run only where a user says so: ``task_preset("mbpp",
execution="sandbox")``. Until then the likelihood of the reference solutions is what is measured,
and what the presets are judged by.
"""

from __future__ import annotations

from typing import Any

from e2lora.config.presets.preset import Preset
from e2lora.config.tasks import CodeConfig, GenerationConfig

_HUMANEVAL = {"test_data": "openai/openai_humaneval", "test_split": "test"}


def _preset(data: str, **options: Any) -> Preset:
    generation = GenerationConfig(max_new_tokens=512)
    return Preset(CodeConfig(data=data, generation=generation, **options), "nll")


PRESETS: dict[str, Preset] = {
    "codealpaca": _preset(
        "sahil2801/CodeAlpaca-20k",
        prompt_column="instruction",
        context_column="input",
        answer_column="output",
        max_length=1024,
        **_HUMANEVAL,
    ),
    "code_feedback": _preset(
        "m-a-p/Code-Feedback", messages_column="messages", chat=True, max_length=2048, **_HUMANEVAL
    ),
    "mbpp": _preset(
        "google-research-datasets/mbpp",
        subset="full",
        problems="mbpp",
        validation_split="validation",
        test_split="test",
        max_length=4608,  # one problem, test 493, has 4124 tokens, where each digit is one
    ),
}
