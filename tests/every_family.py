"""A study in which every family of adapters is one choice of the space, shared as it allows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from e2lora.adapters import FAMILIES
from e2lora.config import AdapterConfig, PlanConfig, TrialConfig
from tests import small


def space(trial: Any) -> TrialConfig:
    family = trial.suggest_categorical("family", tuple(FAMILIES))
    shared = trial.suggest_categorical("shared", (False, True))
    base = small.small_trial()
    adapter: dict[str, Any] = {"family": family, "target_modules": ("query", "value")}
    plan: dict[str, Any] = {"r": 4, "lora_alpha": 8, "calibration": base.plan.calibration}
    if family == "full":
        adapter["target_modules"] = ()
    elif shared:
        plan["topology"] = "e2"
        needs_rank = family == "rasa"  # of its own in every group, beside the pooled one
        uniform = FAMILIES[family].no_allocation or needs_rank
        plan["allocation"] = "uniform" if uniform else None
    return TrialConfig(
        **{**dict(base), "adapter": AdapterConfig(**adapter), "plan": PlanConfig(**plan)}
    )


study = replace(
    small.study,
    space=space,
    points=tuple({"family": family, "shared": family != "full"} for family in FAMILIES),
    num_trials=len(FAMILIES),
)
