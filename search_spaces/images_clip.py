"""CLIP's ViT-B/16 on seven image sets, at the sizes of ShareLoRA-A and LoRA at rank 8.

All linear layers of the vision tower are adapted. Each system is tried on each set, at each size,
at three learning rates. Results and verdicts are per set; the average over all seven is compared
with the publication's.
"""

from __future__ import annotations

from typing import Any

from e2lora.config import (
    AdapterConfig,
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

MODEL = ModelConfig(name="openai/clip-vit-base-patch16")
RESOURCES: dict[str, Any] = {}  # of a trial: {"gpus_per_worker": 1, "precision": "bf16"}, say
BUDGETS = (718_848, 1_327_104)
SYSTEMS = ("LoRA", "ShareLoRA-A", "E²LoRA", "E²ShareLoRA", "blocks", "random", "matched")
SETS = ("stanford_cars", "dtd", "eurosat", "gtsrb", "resisc45", "sun397", "svhn")
TASKS = {name: task_preset(name) for name in SETS}


def space(trial: Any) -> TrialConfig:
    """One trial: an image set, a sharing system, its size, and the learning rate."""
    task = trial.suggest_categorical("task", SETS)
    system = suggest_system(trial, SYSTEMS, block_sizes=(2, 3))
    budget = trial.suggest_categorical("budget", BUDGETS)
    learning_rate = trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
    return TrialConfig(
        model=MODEL,
        task=TASKS[task],
        plan=PlanConfig(**system.plan, r=8, lora_alpha=16, target_parameters=budget),
        adapter=AdapterConfig(
            target_modules=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
            **system.adapter,
        ),
        training=TrainConfig(
            num_epochs=10,
            global_batch_size=64,
            learning_rate=learning_rate,
            warmup_ratio=0.05,
            schedule="cosine",
            **RESOURCES,
        ),
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
    cells=tuple(
        {**cell, "block_size": 2} if cell["system"] == "blocks" else cell
        for cell in cells(SYSTEMS, BUDGETS, task=SETS)
    ),
    grid={"learning_rate": (3e-4, 1e-3, 3e-3)},
)
