"""What a preset is."""

from __future__ import annotations

from dataclasses import dataclass

from e2lora.config.tasks import AnyTaskConfig


@dataclass(frozen=True)
class Preset:
    """A task as its publication states it, by hub name, and the metric it is judged by."""

    task: AnyTaskConfig
    metric: str
