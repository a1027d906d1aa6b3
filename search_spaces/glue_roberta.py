"""RoBERTa-base on five tasks of GLUE, as one study: which sharing, at which size?

LoRA, E²LoRA, ShareLoRA-A and E²ShareLoRA, with two controls that share without looking at
gradients: equal blocks, and a random cut into as many intervals as E²'s. Each system is tried on
each task, at each base rank, at the same three learning rates around LoRA's, so that none has more
tries than another. Epochs, warm-up, weight decay, α/r and the batch (there per GPU) follow the
scripts released with LoRA (Hu et al., 2022). Unlike there, no task starts from an adapter trained
on MNLI, texts are cut sooner, and a run ends when its validation score rises no more for a while.

The study maximises `score`: on each task its official metric (CoLA: Matthews' correlation, STS-B:
Pearson's, the others: accuracy). Results and verdicts are per task. Beyond the points the sampler
prefers tasks with high scores, so to try more, add learning rates here.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

from e2lora.config import (
    AdapterConfig,
    EarlyStopping,
    ModelConfig,
    Objective,
    PlanConfig,
    Scope,
    Study,
    TrainConfig,
    TrialConfig,
    task_preset,
)

MODEL = ModelConfig(name="FacebookAI/roberta-base")
RESOURCES: dict[str, Any] = {}  # of a trial: {"gpus_per_worker": 1, "precision": "bf16"}, say
RANKS = (4, 8)
LEARNING_RATES = (2e-4, 5e-4, 1.25e-3)
SEEDS = (0,)


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
SYSTEMS: dict[str, tuple[dict[str, Any], Scope]] = {  # → options of the plan, scope of A
    "LoRA": ({"topology": "none"}, "interval"),
    "E²LoRA": ({"topology": "e2"}, "interval"),
    "ShareLoRA-A": ({"topology": "none"}, "type"),
    "E²ShareLoRA": ({"topology": "e2"}, "type"),
    "blocks(2)": ({"topology": "blocks", "block_size": 2}, "interval"),
    "random": ({"topology": "random", "partition_seed": 0}, "interval"),
}


def space(trial: Any) -> TrialConfig:
    """One trial: a task, a sharing system, its base rank, and the learning rate."""
    task = trial.suggest_categorical("task", tuple(TASKS))
    system = trial.suggest_categorical("system", tuple(SYSTEMS))
    r = trial.suggest_categorical("r", RANKS)
    learning_rate = trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True)
    seed = trial.suggest_categorical("seed", SEEDS)
    plan, a_scope = SYSTEMS[system]
    return TrialConfig(
        model=MODEL,
        task=TASKS[task],
        plan=PlanConfig(**plan, r=r, lora_alpha=2.0 * r),
        adapter=AdapterConfig(target_modules=("query", "value"), a_scope=a_scope),
        training=TrainConfig(
            **RECIPES[task]._asdict(),
            learning_rate=learning_rate,
            warmup_ratio=0.06,
            weight_decay=0.1,
            early_stopping=EarlyStopping(metric="score", direction="maximize", patience=8),
            **RESOURCES,
        ),
        seed=seed,
    )


POINTS = tuple(
    {"task": task, "system": system, "r": r, "learning_rate": rate, "seed": seed}
    for seed, rate, r, task, system in product(SEEDS, LEARNING_RATES, RANKS, TASKS, SYSTEMS)
)
study = Study(
    space=space,
    models=(MODEL,),
    tasks=tuple(TASKS.values()),
    objectives=(
        Objective(name="score", direction="maximize"),
        Objective(name="adapter_parameters", direction="minimize"),
    ),
    budgets=RANKS,
    seeds=SEEDS,
    points=POINTS,
    num_trials=len(POINTS),
)
