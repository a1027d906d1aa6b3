"""Three equal trials, long enough that one can be killed half-way and compared with the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from e2lora.config import TrialConfig
from tests import small


def space(trial: Any) -> TrialConfig:
    trial.suggest_int("copy", 0, 2)
    return small.small_trial("blocks", block_size=3, max_steps=60, eval_every=10)


study = replace(
    small.study, space=space, points=tuple({"copy": copy} for copy in range(3)), num_trials=3
)
