"""Does sharing fare alike in encoders of several sizes? Four models on paraphrases (MRPC).

Sizes differ from model to model, so a budget is stated as LoRA's rank, and stands for what LoRA of
that rank takes in that model. Trials of one model follow one another on the groups that hold it.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

from e2lora.config import (
    AdapterConfig,
    ModelConfig,
    Objective,
    PlanConfig,
    Study,
    TrainConfig,
    TrialConfig,
    suggest_system,
    task_preset,
)


class Encoder(NamedTuple):
    """A model, and what its adapters are put on: two square matrices in each layer."""

    name: str
    num_layers: int
    width: int
    target_modules: tuple[str, str] = ("query", "value")

    def parameters(self, r: int) -> int:
        """Of LoRA at rank r."""
        return r * self.num_layers * 2 * 2 * self.width


ENCODERS = {
    encoder.name: encoder
    for encoder in (
        Encoder("distilbert/distilroberta-base", 6, 768),
        Encoder("FacebookAI/roberta-base", 12, 768),
        Encoder("microsoft/mpnet-base", 12, 768, ("q", "v")),
        Encoder("FacebookAI/roberta-large", 24, 1024),
    )
}
MODELS = {name: ModelConfig(name=name) for name in ENCODERS}
TASK = task_preset("glue/mrpc")
RESOURCES: dict[str, Any] = {}  # of a trial: {"gpus_per_worker": 1, "precision": "bf16"}, say
LORA_RANKS = (2, 8)
SYSTEMS = ("LoRA", "ShareLoRA-A", "E²LoRA", "E²ShareLoRA", "blocks", "random", "matched")


def space(trial: Any) -> TrialConfig:
    """One trial: a model, a sharing system, its size as LoRA's rank, and the learning rate."""
    model = trial.suggest_categorical("model", tuple(MODELS))
    system = suggest_system(trial, SYSTEMS)
    size = trial.suggest_categorical("lora_rank", LORA_RANKS)
    learning_rate = trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True)
    encoder = ENCODERS[model]
    return TrialConfig(
        model=MODELS[model],
        task=TASK,
        plan=PlanConfig(
            **system.plan, r=8, lora_alpha=16, target_parameters=encoder.parameters(size)
        ),
        adapter=AdapterConfig(target_modules=encoder.target_modules, **system.adapter),
        training=TrainConfig(
            num_epochs=15,
            global_batch_size=16,
            learning_rate=learning_rate,
            warmup_ratio=0.06,
            weight_decay=0.1,
            eval_every=200,
            **RESOURCES,
        ),
    )


study = Study(
    space=space,
    models=tuple(MODELS.values()),
    tasks=(TASK,),
    objectives=(
        Objective(name="accuracy", direction="maximize"),
        Objective(name="adapter_parameters", direction="minimize"),
    ),
    budgets=tuple(
        sorted({encoder.parameters(r) for encoder in ENCODERS.values() for r in LORA_RANKS})
    ),
    cells=tuple(
        {"model": model, "system": system, "lora_rank": r}
        for model, r, system in product(MODELS, LORA_RANKS, SYSTEMS)
    ),
    grid={"learning_rate": (2e-4, 5e-4, 1.25e-3)},
)
