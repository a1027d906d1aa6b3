"""Small trials on the demo's model and data, without dropout so that workers can be compared."""

from __future__ import annotations

from typing import Any

from e2lora.config import (
    AdapterConfig,
    CalibrationConfig,
    ModelConfig,
    Objective,
    PlanConfig,
    Study,
    TextClassificationConfig,
    TrainConfig,
    TrialConfig,
)

MODEL = ModelConfig(
    name="demo:minilm-l6",
    config_overrides={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
)
TASK = TextClassificationConfig(data="demo:vader", validation_size=64, max_length=24)


def small_trial(
    topology: str = "none",
    r: int = 4,
    block_size: int | None = None,
    a_scope: str = "interval",
    seed: int = 0,
    **training: Any,
) -> TrialConfig:
    """A trial of six steps; ``training`` overrides its options."""
    options = {
        "max_steps": 6,
        "learning_rate": 2e-2,
        "global_batch_size": 8,
        "warmup_steps": 2,
        "eval_every": 3,
        **training,
    }
    return TrialConfig(
        model=MODEL,
        task=TASK,
        adapter=AdapterConfig(target_modules=("query", "value"), a_scope=a_scope),
        plan=PlanConfig(
            topology=topology,
            r=r,
            lora_alpha=2.0 * r,
            block_size=block_size,
            calibration=CalibrationConfig(num_samples=32, microbatch_size=32),
        ),
        training=TrainConfig(**options),
        seed=seed,
    )


def space(trial: Any) -> TrialConfig:
    topology = trial.suggest_categorical("topology", ("none", "all", "e2"))
    r = trial.suggest_int("r", 1, 8)
    return small_trial(topology, r)


study = Study(
    space=space,
    models=(MODEL,),
    tasks=(TASK,),
    objectives=(
        Objective(name="accuracy", direction="maximize"),
        Objective(name="adapter_parameters", direction="minimize"),
    ),
    points=({"topology": "none", "r": 4}, {"topology": "e2", "r": 4}, {"topology": "all", "r": 2}),
    num_trials=4,
)
