"""Every family of adapters at one budget, and E²LoRA with its controls beside them.

MiniLM-L6 (6 layers) on sentiment of short texts. Each family has an adapter for every layer; all
meet at the size of LoRA at r=12, at three learning rates around the one that suits them, since
these lie a factor of a hundred apart. VeRA can't be that large: its vectors end at the size of a
weight; the report shows by how much it misses the budget.
"""

from __future__ import annotations

from typing import Any

from e2lora.config import (
    CONTROLS,
    FAMILY_NAMES,
    SYSTEMS,
    AdapterConfig,
    ModelConfig,
    Objective,
    PlanConfig,
    Study,
    System,
    TextClassificationConfig,
    TrainConfig,
    TrialConfig,
    cells,
)

MODEL = ModelConfig(name="demo:minilm-l6")
TASK = TextClassificationConfig(data="demo:vader", validation_size=1000, max_length=64)
FAMILIES = {
    name: System({"topology": "none"}, {"family": family})
    for family, name in FAMILY_NAMES.items()
    if family != "full"
}
CHOICES = {name: SYSTEMS[name] for name in ("E²LoRA", *CONTROLS)} | FAMILIES
RATES = {
    "LoRA+": 5e-4,
    "LoRA-FA": 1e-2,
    "LoRI": 1e-2,
    "VeRA": 1e-1,
    "RandLoRA": 1e-3,
    "AdaLoRA": 3e-2,
    "LoRA-GA": 1e-3,
    "GoRA": 3e-4,
    "IncreLoRA": 3e-2,
}
"""Learning rates of those that LoRA's, 3e-3, doesn't suit."""
BUDGETS = (110_592,)


def space(trial: Any) -> TrialConfig:
    """One trial: a system, and its learning rate over the one that suits it."""
    system = trial.suggest_categorical("system", tuple(CHOICES))
    budget = trial.suggest_categorical("budget", BUDGETS)
    factor = trial.suggest_float("rate_factor", 0.3, 3.0, log=True)
    plan, adapter = CHOICES[system]
    return TrialConfig(
        model=MODEL,
        task=TASK,
        plan=PlanConfig(**plan, r=8, lora_alpha=16, target_parameters=budget),
        adapter=AdapterConfig(target_modules=("query", "value"), **adapter),
        training=TrainConfig(
            max_steps=60,
            learning_rate=RATES.get(system, 3e-3) * factor,
            head_learning_rate=3e-3,
            warmup_steps=6,
        ),
    )


study = Study(
    space=space,
    models=(MODEL,),
    tasks=(TASK,),
    objectives=(
        Objective(name="accuracy", direction="maximize"),
        Objective(name="adapter_parameters", direction="minimize"),
    ),
    budgets=BUDGETS,
    cells=cells(CHOICES, BUDGETS),
    grid={"rate_factor": (0.3, 1.0, 3.0)},
)
