"""Three trials: one that needs a profile, plain LoRA, and one that two workers share by ZeRO-3."""

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
KINDS: dict[str, dict[str, Any]] = {
    "E²LoRA": {},
    "LoRA": {},
    "spread": {"num_workers": 2, "zero_stage": 3},
}


def space(trial: Any) -> TrialConfig:
    kind = trial.suggest_categorical("kind", tuple(KINDS))
    return TrialConfig(
        model=MODEL,
        task=TASK,
        adapter=AdapterConfig(target_modules=("query", "value")),
        plan=PlanConfig(
            topology="none" if kind == "LoRA" else "e2",
            r=8 if kind == "spread" else 4,  # else it would be the first one over again
            calibration=CalibrationConfig(num_samples=32, microbatch_size=32),
        ),
        training=TrainConfig(
            max_steps=8,
            learning_rate=2e-2,
            global_batch_size=8,
            warmup_steps=2,
            eval_every=4,
            checkpoint_every=2,
            **KINDS[kind],
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
    points=tuple({"kind": kind} for kind in KINDS),
)
