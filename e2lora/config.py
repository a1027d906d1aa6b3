"""The typed tree that fully describes one trial, and the value that describes a study.

Every class is frozen and refuses unknown keys, so a misspelt option is an error and never a
default that trains something else. A configuration is plain JSON:
``TrialConfig.model_validate_json`` reads what ``model_dump_json`` wrote; ``fingerprint`` names it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class Frozen(BaseModel):
    """Base of every artefact and configuration: immutable, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def fingerprint(self) -> str:
        """Sixteen hex digits that depend on every field, independent of field order."""
        return fingerprint_of(self.model_dump(mode="json"))


def fingerprint_of(value: Any) -> str:
    """Sixteen hex digits of a JSON value.

    >>> fingerprint_of({"a": 1, "b": 2}) == fingerprint_of({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def in_one_paragraph(error: Exception) -> str:
    """What an error says; of a refused configuration each field, its rule and the value."""
    if not isinstance(error, ValidationError):
        return str(error)
    parts = []
    for fault in error.errors(include_url=False):
        place = ".".join(str(key) for key in fault["loc"])
        given = "" if fault["type"] == "value_error" else f"; got {fault['input']!r}"
        parts.append(f"{place + ': ' if place else ''}{fault['msg']}{given}")
    return f"{error.title} refuses {'; '.join(parts)}. Correct it where the space builds it."


class ModelConfig(Frozen):
    """A pretrained transformer: hub name, local folder or ``demo:NAME``."""

    name: str
    revision: str | None = None
    config_overrides: dict[str, float | int | str | bool] = Field(
        default={}, description="set on the transformers configuration, e.g. a dropout of 0"
    )


class TaskConfig(Frozen):
    """A data set and how its columns are read: hub name, local file or folder, or ``demo:NAME``."""

    data: str
    kind: Literal["text_classification"] = "text_classification"
    subset: str | None = None
    text_column: str = "text"
    text2_column: str | None = None
    label_column: str = "label"
    train_split: str = "train"
    validation_split: str | None = Field(
        default=None, description="None: carved from the training split, by `split_seed`"
    )
    validation_size: int = Field(default=1000, gt=0, description="rows carved, or kept, at most")
    split_seed: int = 0
    max_length: int = Field(default=128, gt=1, description="tokens; longer texts are cut")

    @property
    def display_name(self) -> str:
        return f"{self.data}/{self.subset}" if self.subset else self.data


class CalibrationConfig(Frozen):
    """The batch that the gradient profile is measured on (training split only)."""

    num_samples: int = Field(default=256, gt=0)
    microbatch_size: int = Field(default=64, gt=0)


class PlanConfig(Frozen):
    """Which layers share one adapter, and at what rank (method: E²LoRA, ICLR 2026)."""

    topology: Literal["none", "all", "blocks", "e2"] = "none"
    block_size: int | None = Field(default=None, gt=0, description="for `blocks` only")
    r: int = Field(default=8, gt=0)
    lora_alpha: float = Field(default=16.0, gt=0)
    similarity: Literal["rmi"] = "rmi"
    allocation: Literal["entropy_power"] = "entropy_power"
    beta: float = Field(default=0.5, ge=0, description="exponent of `entropy_power`")
    budget: Literal["layer"] = "layer"
    calibration: CalibrationConfig = CalibrationConfig()

    @model_validator(mode="after")
    def _block_size_belongs_to_blocks(self) -> PlanConfig:
        if (self.topology == "blocks") != (self.block_size is not None):
            raise ValueError(
                "`block_size` is given exactly when `topology` is 'blocks'; got "
                f"topology={self.topology!r}, block_size={self.block_size}. Set both or neither."
            )
        return self


class AdapterConfig(Frozen):
    """The adapter family, the modules it adapts, and the scope of its tensors.

    ``interval`` scope: one tensor per group of the plan. ``type`` scope: one per module type.
    LoRA with ``a_scope="type"`` is ShareLoRA-A.
    """

    family: Literal["lora"] = "lora"
    target_modules: tuple[str, ...] = Field(
        min_length=1, description="names of linear modules inside a layer, e.g. 'query'"
    )
    a_scope: Literal["interval", "type"] = "interval"
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)


class TrainConfig(Frozen):
    """Optimisation and parallelism. One step is one optimiser step on one global batch."""

    max_steps: int = Field(gt=0)
    global_batch_size: int = Field(default=16, gt=0, description="samples of all workers, per step")
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    learning_rate: float = Field(gt=0)
    head_learning_rate: float | None = Field(
        default=None, gt=0, description="of a freshly initialised head; None: as the adapter's"
    )
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    eval_every: int | None = Field(default=None, gt=0, description="steps; None: at the end only")
    checkpoint_every: int | None = Field(
        default=None, gt=0, description="steps; None: at every evaluation"
    )
    eval_batch_size: int = Field(default=64, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2] = 1
    num_workers: int = Field(default=1, gt=0)
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _options_agree(self) -> TrainConfig:
        parts = self.num_workers * self.gradient_accumulation_steps
        if self.global_batch_size % parts:
            raise ValueError(
                "`global_batch_size` must be a multiple of num_workers x "
                f"gradient_accumulation_steps; got {self.global_batch_size} and "
                f"{self.num_workers} x {self.gradient_accumulation_steps}. Change one of them."
            )
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "bf16 needs float32 master weights, which DeepSpeed keeps where they can be "
                "checkpointed at ZeRO stages 1 and 2 only; got zero_stage=0. Use stage 1, which "
                "costs nothing with one worker."
            )
        if self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"`warmup_steps` ({self.warmup_steps}) must be below `max_steps` "
                f"({self.max_steps})."
            )
        return self


PARALLELISM = frozenset(
    {
        "num_workers",
        "cpus_per_worker",
        "gpus_per_worker",
        "zero_stage",
        "gradient_accumulation_steps",
    }
)
"""Options of training that spread the work and don't decide what is computed."""


class TrialConfig(Frozen):
    """Everything that decides a trial's numbers."""

    model: ModelConfig
    task: TaskConfig
    adapter: AdapterConfig
    plan: PlanConfig
    training: TrainConfig
    seed: int = 0

    def identity(self) -> str:
        """Names what is trained, however many workers train it: a checkpoint's owner."""
        return fingerprint_of(self.model_dump(mode="json", exclude={"training": set(PARALLELISM)}))

    @property
    def system(self) -> str:
        """The sharing system by its name in reports.

        >>> from e2lora.config import *
        >>> system_name("blocks", 2, "interval"), system_name("none", None, "type")
        ('blocks(2)', 'ShareLoRA-A')
        """
        return system_name(self.plan.topology, self.plan.block_size, self.adapter.a_scope)


def system_name(topology: str, block_size: int | None, a_scope: str) -> str:
    """The name of a sharing system, as the field and the reports use it."""
    names = {"none": "LoRA", "all": "all-shared", "blocks": f"blocks({block_size})", "e2": "E²LoRA"}
    if a_scope == "interval":
        return names[topology]
    return "ShareLoRA-A" if topology == "none" else f"{names[topology]} + shared A"


class GroupSpec(Frozen):
    """What a worker group must be: trials with equal specs can follow one another on it."""

    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    zero_stage: int
    precision: str

    @classmethod
    def of(cls, training: TrainConfig) -> GroupSpec:
        return cls(**{name: getattr(training, name) for name in cls.model_fields})


class Objective(Frozen):
    """A column of a trial's result, and where better lies."""

    name: str
    direction: Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Study:
    """A search as a value: one file in ``search_spaces/`` defines one as ``study``.

    ``space(trial)`` is define-by-run: it calls ``trial.suggest_*`` and returns the
    :class:`TrialConfig` to run. ``points`` are sets of suggestions that are run first.
    ``num_trials`` counts the points too. ``budgets`` are the base ranks the study compares.
    """

    space: Callable[[Any], TrialConfig]
    models: tuple[ModelConfig, ...]
    tasks: tuple[TaskConfig, ...]
    objectives: tuple[Objective, ...]
    budgets: tuple[int, ...]
    points: tuple[Mapping[str, Any], ...] = ()
    seeds: tuple[int, ...] = (0,)
    num_trials: int = 10
