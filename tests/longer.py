"""Equal trials, long enough that one can be killed half-way and compared with the others.

``E2LORA_TEST_WORKERS`` sets how many workers each has.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from e2lora.config import TrialConfig
from tests import small


def space(trial: Any) -> TrialConfig:
    # equal trials are one: what tells these apart clips no gradient, and so changes no number
    limit = 1e6 + trial.suggest_int("copy", 0, 2)
    workers = int(os.environ.get("E2LORA_TEST_WORKERS", "1"))
    return small.small_trial(
        "blocks",
        block_size=3,
        max_steps=60,
        eval_every=10,
        num_workers=workers,
        max_grad_norm=limit,
    )


study = replace(
    small.study, space=space, points=tuple({"copy": copy} for copy in range(3)), num_trials=3
)
