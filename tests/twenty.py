"""Twenty short trials, each with checkpoints on its way: a quota, a point, and a sampler's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from e2lora.config import TrialConfig
from tests import small


def space(trial: Any) -> TrialConfig:
    topology = trial.suggest_categorical("topology", ("none", "all", "e2"))
    rate = trial.suggest_float("learning_rate", 1e-3, 3e-2, log=True)
    config = small.small_trial(topology, max_steps=24, eval_every=6, learning_rate=rate)
    plan = config.plan.model_copy(update={"target_parameters": 18_432})
    return config.model_copy(update={"plan": plan})


study = replace(
    small.study,
    space=space,
    budgets=(18_432,),
    cells=tuple({"topology": topology} for topology in ("none", "all", "e2")),
    grid={"learning_rate": (3e-3, 6e-3, 1.2e-2)},
    points=({"topology": "e2", "learning_rate": 2e-2},),
    num_trials=20,
)
