"""Llama-3.1-8B on GSM8K: verified answers to problems, at the sizes of LoRA's ranks 4 and 8.

The quota compares LoRA, ShareLoRA-A, E²LoRA and E²ShareLoRA with controls and with E²'s two halves
alone. The points add the settings of the publication that have another size (E²LoRA at base ranks 8
and 16), and its ablations at base rank 8. Trials are trained on GSM8K's own rows. The search is led
by the likelihood of the validation rows' answers, the less noisy measure; exact match is reported
beside it, and of the test rows by the runs over seeds (`--seeds`).

A trial takes four GPUs of 24 GiB and more, under ZeRO stage 2 in bf16.
"""

from __future__ import annotations

from typing import Any

from e2lora.config import (
    AdapterConfig,
    CalibrationConfig,
    ModelConfig,
    Objective,
    PlanConfig,
    Pruner,
    Study,
    TrainConfig,
    TrialConfig,
    cells,
    suggest_system,
    task_preset,
)

MODEL = ModelConfig(name="meta-llama/Llama-3.1-8B")
TASK = task_preset("gsm8k")
RESOURCES: dict[str, Any] = {
    "num_workers": 4,
    "gpus_per_worker": 1,
    "precision": "bf16",
    "zero_stage": 2,
    "activation_checkpointing": "non_reentrant",
}
BUDGETS = (3_407_872, 6_815_744)
LEARNING_RATES = (1e-4, 3e-4, 9e-4)
SYSTEMS = (
    "LoRA",
    "ShareLoRA-A",
    "E²LoRA",
    "E²ShareLoRA",
    "LSS only",
    "HRA only",
    "E²LoRA by kl",
    "blocks",
    "random",
    "matched",
)
PUBLISHED_LEARNING_RATE = 3e-4  # the publication's own is not told: the middle of the grid


def space(trial: Any) -> TrialConfig:
    """One trial: a sharing system, its size by a budget or by a base rank, the learning rate."""
    system = suggest_system(
        trial, SYSTEMS, block_sizes=(2, 4), allocations=("entropy_power", "softmax")
    )
    by_rank = trial.suggest_categorical("size_by", ("budget", "rank")) == "rank"
    size: dict[str, Any] = {"r": 8, "lora_alpha": 16.0}
    if by_rank:
        r = trial.suggest_categorical("r", (4, 8, 16))
        size = {"r": r, "lora_alpha": 2.0 * r}
    else:
        size["target_parameters"] = trial.suggest_categorical("budget", BUDGETS)
    learning_rate = trial.suggest_float("learning_rate", 5e-5, 2e-3, log=True)
    return TrialConfig(
        model=MODEL,
        task=TASK,
        plan=PlanConfig(
            **system.plan,
            **size,
            calibration=CalibrationConfig(microbatch_size=8, checkpointing=True),
        ),
        adapter=AdapterConfig(
            target_modules=("q_proj", "k_proj", "v_proj", "o_proj"), **system.adapter
        ),
        training=TrainConfig(
            num_epochs=3,
            global_batch_size=32,
            learning_rate=learning_rate,
            warmup_ratio=0.03,
            schedule="cosine",
            eval_every=150,
            eval_batch_size=16,
            **RESOURCES,
        ),
    )


_OPTIONS: dict[str, dict[str, Any]] = {
    "blocks": {"block_size": 2},
    "E²LoRA": {"allocation": "entropy_power"},
}


def _cell(system: str, budget: int) -> dict[str, Any]:
    return {"system": system, **_OPTIONS.get(system, {}), "size_by": "budget", "budget": budget}


def _published(system: str, r: int) -> dict[str, Any]:
    chosen = {"system": system, **_OPTIONS.get(system, {}), "size_by": "rank", "r": r}
    return {**chosen, "learning_rate": PUBLISHED_LEARNING_RATE}


study = Study(
    space=space,
    models=(MODEL,),
    tasks=(TASK,),
    objectives=(
        Objective(name="nll", direction="minimize"),
        Objective(name="exact_match", direction="maximize"),
        Objective(name="adapter_parameters", direction="minimize"),
    ),
    budgets=BUDGETS,
    cells=tuple(_cell(c["system"], c["budget"]) for c in cells(SYSTEMS, BUDGETS)),
    grid={"learning_rate": LEARNING_RATES},
    points=tuple(
        _published(system, r)
        for system, r in (
            ("LoRA", 8),
            ("LoRA", 4),
            ("ShareLoRA-A", 8),
            ("E²LoRA", 8),
            ("E²LoRA", 16),
            ("E²ShareLoRA", 8),
            ("LSS only", 8),
            ("HRA only", 8),
            ("E²LoRA by kl", 8),
        )
    ),
    num_trials=80,
    pruner=Pruner(name="asha", min_steps=150),
)
