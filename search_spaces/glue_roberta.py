"""RoBERTa-base on five tasks of GLUE, as one study: which sharing, at which size?

LoRA, E²LoRA, ShareLoRA-A and E²ShareLoRA, with controls that share without looking at gradients:
equal blocks, and E²'s number of intervals cut evenly or at random. The two sizes are those of
ShareLoRA-A and of LoRA at rank 8. Each system is tried on each task, at each size, at the same
three learning rates around LoRA's, so that none has more tries than another. Epochs, warm-up,
weight decay, α/r and the batch (there per GPU) follow the scripts released with LoRA (Hu et al.,
2022). Unlike there, no task starts from an adapter trained on MNLI, texts are cut sooner, and a run
ends when its validation score rises no more for a while.

The study maximises `score`: on each task its official metric (CoLA: Matthews' correlation, STS-B:
Pearson's, the others: accuracy). Results and verdicts are per task. Beyond the quota the sampler
prefers tasks with high scores, so to try more, add learning rates to the grid.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from e2lora.config import (
    AdapterConfig,
    EarlyStopping,
    ModelConfig,
    Objective,
    PlanConfig,
    Study,
    TrainConfig,
    TrialConfig,
    cells,
    suggest_system,
    task_preset,
)

MODEL = ModelConfig(name="FacebookAI/roberta-base")
RESOURCES: dict[str, Any] = {}  # of a trial: {"gpus_per_worker": 1, "precision": "bf16"}, say
BUDGETS = (159_744, 294_912)
LEARNING_RATES = (2e-4, 5e-4, 1.25e-3)
SYSTEMS = ("LoRA", "E²LoRA", "ShareLoRA-A", "E²ShareLoRA", "blocks", "random", "matched")


class Recipe(NamedTuple):
    """How a task is trained; it is evaluated about once per epoch."""

    num_epochs: int
    global_batch_size: int
    eval_every: int


RECIPES = {
    "cola": Recipe(80, 32, 240),
    "sst2": Recipe(60, 16, 4000),
    "mrpc": Recipe(30, 16, 200),
    "rte": Recipe(80, 32, 70),
    "stsb": Recipe(40, 16, 320),
}
TASKS = {name: task_preset(f"glue/{name}") for name in RECIPES}


def space(trial: Any) -> TrialConfig:
    """One trial: a task, a sharing system, its size, and the learning rate."""
    task = trial.suggest_categorical("task", tuple(TASKS))
    system = suggest_system(trial, SYSTEMS)
    budget = trial.suggest_categorical("budget", BUDGETS)
    learning_rate = trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True)
    return TrialConfig(
        model=MODEL,
        task=TASKS[task],
        plan=PlanConfig(**system.plan, r=8, lora_alpha=16, target_parameters=budget),
        adapter=AdapterConfig(target_modules=("query", "value"), **system.adapter),
        training=TrainConfig(
            **RECIPES[task]._asdict(),
            learning_rate=learning_rate,
            warmup_ratio=0.06,
            weight_decay=0.1,
            early_stopping=EarlyStopping(metric="score", direction="maximize", patience=8),
            **RESOURCES,
        ),
    )


study = Study(
    space=space,
    models=(MODEL,),
    tasks=tuple(TASKS.values()),
    objectives=(
        Objective(name="score", direction="maximize"),
        Objective(name="adapter_parameters", direction="minimize"),
    ),
    budgets=BUDGETS,
    cells=cells(SYSTEMS, BUDGETS, task=TASKS),
    grid={"learning_rate": LEARNING_RATES},
)
