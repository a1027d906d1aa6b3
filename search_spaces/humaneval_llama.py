"""Llama-3.1-8B on instructions for programs, at the sizes of LoRA's ranks 4 and 8; HumanEval.

Trained on CodeAlpaca; led by the likelihood of its validation rows' answers. HumanEval is the test:
the runs over seeds (`--seeds`) score it, by the likelihood of the canonical solutions. To have
programs written and run in the sandbox (pass@1), set EXECUTION to "sandbox": that is for you to
allow.

A trial takes four GPUs of 24 GiB and more, under ZeRO stage 2 in bf16.
"""

from __future__ import annotations

from typing import Any, Literal

from e2lora.config import (
    AdapterConfig,
    CalibrationConfig,
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

EXECUTION: Literal["off", "sandbox"] = "off"
MODEL = ModelConfig(name="meta-llama/Llama-3.1-8B")
TASK = task_preset("codealpaca", execution=EXECUTION)
RESOURCES: dict[str, Any] = {
    "num_workers": 4,
    "gpus_per_worker": 1,
    "precision": "bf16",
    "zero_stage": 2,
    "activation_checkpointing": "non_reentrant",
}
BUDGETS = (3_407_872, 6_815_744)
SYSTEMS = ("LoRA", "ShareLoRA-A", "E²LoRA", "E²ShareLoRA", "blocks", "random", "matched")


def space(trial: Any) -> TrialConfig:
    """One trial: a sharing system, its size, and the learning rate."""
    system = suggest_system(trial, SYSTEMS)
    budget = trial.suggest_categorical("budget", BUDGETS)
    learning_rate = trial.suggest_float("learning_rate", 5e-5, 2e-3, log=True)
    return TrialConfig(
        model=MODEL,
        task=TASK,
        plan=PlanConfig(
            **system.plan,
            r=8,
            lora_alpha=16,
            target_parameters=budget,
            calibration=CalibrationConfig(microbatch_size=8, checkpointing=True),
        ),
        adapter=AdapterConfig(
            target_modules=("q_proj", "k_proj", "v_proj", "o_proj"), **system.adapter
        ),
        training=TrainConfig(
            num_epochs=2,
            global_batch_size=32,
            learning_rate=learning_rate,
            warmup_ratio=0.03,
            schedule="cosine",
            eval_every=300,
            eval_batch_size=16,
            **RESOURCES,
        ),
    )


study = Study(
    space=space,
    models=(MODEL,),
    tasks=(TASK,),
    objectives=(
        Objective(name="nll", direction="minimize"),
        Objective(name="adapter_parameters", direction="minimize"),
    ),
    budgets=BUDGETS,
    cells=cells(SYSTEMS, BUDGETS),
    grid={"learning_rate": (1e-4, 3e-4, 9e-4)},
)
