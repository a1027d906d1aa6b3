"""MiniLM-L6 on three sets of short texts: every way to share, at three sizes.

Sentiment of posts and reviews (VADER's), of film reviews (SST-2), and kinds of questions (TREC).
Eight systems meet at three budgets on each, at the same two learning rates; `--seeds 5` completes
the study, whose report is in docs/search.md. SST-2 and TREC come from the hub, or a mirror of it
(docs/tasks.md).
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
    task_preset,
)

MODEL = ModelConfig(name="demo:minilm-l6")
ROWS: dict[str, Any] = {"validation_size": 500, "max_length": 64}
TASKS = {
    "vader": TextClassificationConfig(data="demo:vader", **ROWS),
    "sst2": task_preset("glue/sst2", **ROWS),
    "trec": TextClassificationConfig(
        data="SetFit/TREC-QC", label_column="label_coarse", test_split="test", **ROWS
    ),
}
SYSTEMS = (
    "LoRA",
    "all-shared",
    "blocks",
    "strided",
    "random",
    "matched",
    "ShareLoRA-A",
    "E²LoRA",
)
BUDGETS = (36_864, 73_728, 147_456)  # LoRA's at r = 4, 8 and 16


def space(trial: Any) -> TrialConfig:
    """One trial: a task, a sharing system, its size, and the learning rate."""
    task = trial.suggest_categorical("task", tuple(TASKS))
    system = suggest_system(trial, SYSTEMS)
    budget = trial.suggest_categorical("budget", BUDGETS)
    learning_rate = trial.suggest_float("learning_rate", 1e-3, 3e-2, log=True)
    return TrialConfig(
        model=MODEL,
        task=TASKS[task],
        plan=PlanConfig(**system.plan, r=8, lora_alpha=16, target_parameters=budget),
        adapter=AdapterConfig(target_modules=("query", "value"), **system.adapter),
        training=TrainConfig(max_steps=50, learning_rate=learning_rate, warmup_steps=5),
    )


study = Study(
    space=space,
    models=(MODEL,),
    tasks=tuple(TASKS.values()),
    objectives=(
        Objective(name="accuracy", direction="maximize"),
        Objective(name="adapter_parameters", direction="minimize"),
    ),
    budgets=BUDGETS,
    cells=cells(SYSTEMS, BUDGETS, task=TASKS),
    grid={"learning_rate": (5e-3, 1.5e-2)},
)
