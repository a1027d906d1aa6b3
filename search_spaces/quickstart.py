"""Small real weights, real labelled text, two CPU cores: is it worth sharing, and how?

MiniLM-L6 (6 layers) on sentiment of short texts. Five sharing systems at two base ranks each are
run first, all at one learning rate that was chosen for plain LoRA; then the sampler goes on.
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
)

MODEL = ModelConfig(name="demo:minilm-l6")
TASK = TextClassificationConfig(data="demo:vader", validation_size=1000, max_length=64)
RANKS = (2, 8)
TOPOLOGIES: dict[str, tuple[Any, int | None]] = {  # system → topology and block size
    "LoRA": ("none", None),
    "all-shared": ("all", None),
    "blocks(2)": ("blocks", 2),
    "ShareLoRA-A": ("none", None),
    "E²LoRA": ("e2", None),
}
SYSTEMS = tuple(TOPOLOGIES)


def space(trial: Any) -> TrialConfig:
    """One trial: a sharing system, its base rank, and the learning rate."""
    system = trial.suggest_categorical("system", SYSTEMS)
    r = trial.suggest_categorical("r", RANKS)
    learning_rate = trial.suggest_float("learning_rate", 2e-3, 1e-2, log=True)
    topology, block_size = TOPOLOGIES[system]
    return TrialConfig(
        model=MODEL,
        task=TASK,
        plan=PlanConfig(topology=topology, block_size=block_size, r=r, lora_alpha=2 * r),
        adapter=AdapterConfig(
            target_modules=("query", "value"),
            a_scope="type" if system == "ShareLoRA-A" else "interval",
        ),
        training=TrainConfig(
            max_steps=100, learning_rate=learning_rate, warmup_steps=10, eval_every=50
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
    budgets=RANKS,
    points=tuple(
        {"system": system, "r": r, "learning_rate": 3e-3} for system in SYSTEMS for r in RANKS
    ),
    num_trials=13,
)
