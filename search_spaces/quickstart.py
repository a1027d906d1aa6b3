"""Small real weights, real labelled text, two CPU cores: is it worth sharing, and how?

MiniLM-L6 (6 layers) on sentiment of short texts. Six ways to share, two controls among them, meet
at two sizes. Each is tried at the same two learning rates, then the sampler goes on.
"""

from __future__ import annotations

from typing import Any

from e2lora.config import (
    AdapterConfig,
    ModelConfig,
    Objective,
    PlanConfig,
    Study,
    TextClassificationConfig,
    TrainConfig,
    TrialConfig,
    cells,
    suggest_system,
)

MODEL = ModelConfig(name="demo:minilm-l6")
TASK = TextClassificationConfig(data="demo:vader", validation_size=1000, max_length=64)
SYSTEMS = ("LoRA", "blocks", "random", "matched", "ShareLoRA-A", "E²LoRA")
BUDGETS = (18_432, 73_728)  # trainable parameters: LoRA's at r=2 and r=8


def space(trial: Any) -> TrialConfig:
    """One trial: a sharing system, its size, and the learning rate."""
    system = suggest_system(trial, SYSTEMS)
    budget = trial.suggest_categorical("budget", BUDGETS)
    learning_rate = trial.suggest_float("learning_rate", 1e-3, 1e-2, log=True)
    return TrialConfig(
        model=MODEL,
        task=TASK,
        plan=PlanConfig(**system.plan, r=8, lora_alpha=16, target_parameters=budget),
        adapter=AdapterConfig(target_modules=("query", "value"), **system.adapter),
        training=TrainConfig(max_steps=60, learning_rate=learning_rate, warmup_steps=10),
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
    cells=cells(SYSTEMS, BUDGETS),
    grid={"learning_rate": (3e-3, 1e-2)},
    num_trials=26,
)
