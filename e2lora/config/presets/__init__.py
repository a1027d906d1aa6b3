"""Tasks by name: what the field's benchmarks are trained on, and their official metrics."""

from __future__ import annotations

from typing import Any

from e2lora.config.presets.choices import PRESETS as CHOICES
from e2lora.config.presets.code import PRESETS as CODE
from e2lora.config.presets.glue import PRESETS as GLUE
from e2lora.config.presets.images import PRESETS as IMAGES
from e2lora.config.presets.maths import PRESETS as MATHS
from e2lora.config.presets.preset import Preset
from e2lora.config.tasks import AnyTaskConfig

TASK_PRESETS: dict[str, Preset] = {**GLUE, **IMAGES, **MATHS, **CHOICES, **CODE}
"""``glue/cola``, ``gsm8k``, …: see the files of this folder."""


def task_preset(name: str, **changes: Any) -> AnyTaskConfig:
    """A preset's task, with some of its options changed: ``data`` for a copy on disk, say.

    Raises:
        ValueError: an unknown name, or options that the task refuses.
    """
    preset = require_preset(name)
    config = preset.task
    unknown = sorted(set(changes) - set(type(config).model_fields))
    if unknown:
        raise ValueError(
            f"a task of preset {name!r} has no option {', '.join(map(repr, unknown))}; known: "
            f"{', '.join(type(config).model_fields)}. Correct its name."
        )
    values = {field: getattr(config, field) for field in type(config).model_fields}
    return type(config).model_validate({**values, **changes})


def require_preset(name: str) -> Preset:
    """
    Raises:
        ValueError: an unknown name.
    """
    if name not in TASK_PRESETS:
        raise ValueError(
            f"a task's preset must be one of {', '.join(sorted(TASK_PRESETS))}; got {name!r}. "
            "Correct the name, or write the task's configuration out."
        )
    return TASK_PRESETS[name]
