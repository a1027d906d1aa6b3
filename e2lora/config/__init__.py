"""The typed tree that fully describes one trial, and the value that describes a study.

Every class is frozen and refuses unknown keys, so a misspelt option is an error and never a
default that trains something else. A configuration is plain JSON:
``TrialConfig.model_validate_json`` reads what ``model_dump_json`` wrote; ``fingerprint`` names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from e2lora.config.adapter import (
    FAMILY_NAMES,
    AdaLoraOptions,
    AdapterConfig,
    LoraGaOptions,
    LoraPlusOptions,
    LoriOptions,
    RandLoraOptions,
    Scope,
    VeraOptions,
)
from e2lora.config.frozen import Frozen, fingerprint_of, in_one_paragraph
from e2lora.config.plan import (
    CUT_BY_GRADIENTS,
    NEEDS_PAIRS,
    PRESETS,
    CalibrationConfig,
    ExplicitGroup,
    PlanConfig,
)
from e2lora.config.tasks import (
    AnyTaskConfig,
    SftConfig,
    TaskConfig,
    TextClassificationConfig,
)

__all__ = [
    "CUT_BY_GRADIENTS",
    "FAMILY_NAMES",
    "NEEDS_PAIRS",
    "PARALLELISM",
    "PRESETS",
    "AdaLoraOptions",
    "AdapterConfig",
    "AnyTaskConfig",
    "CalibrationConfig",
    "ExplicitGroup",
    "Frozen",
    "GroupSpec",
    "LoraGaOptions",
    "LoraPlusOptions",
    "LoriOptions",
    "ModelConfig",
    "Objective",
    "PlanConfig",
    "RandLoraOptions",
    "Scope",
    "SftConfig",
    "Study",
    "TaskConfig",
    "TextClassificationConfig",
    "TrainConfig",
    "TrialConfig",
    "VeraOptions",
    "fingerprint_of",
    "in_one_paragraph",
    "system_name",
]


class ModelConfig(Frozen):
    """A pretrained transformer: hub name, local folder or ``demo:NAME``."""

    name: str
    revision: str | None = None
    config_overrides: dict[str, float | int | str | bool] = Field(
        default={}, description="set on the transformers configuration, e.g. a dropout of 0"
    )


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
    task: AnyTaskConfig
    adapter: AdapterConfig
    plan: PlanConfig
    training: TrainConfig
    seed: int = Field(default=0, ge=0)

    def identity(self) -> str:
        """Names what is trained, however many workers train it: a checkpoint's owner."""
        return fingerprint_of(self.model_dump(mode="json", exclude={"training": set(PARALLELISM)}))

    @property
    def system(self) -> str:
        """The sharing system by its name in reports."""
        return system_name(self.plan, self.adapter)

    @property
    def base_rank(self) -> int | None:
        """None for full fine-tuning, which has none."""
        return None if self.adapter.family == "full" else self.plan.r

    @property
    def label(self) -> str:
        """The system with its base rank."""
        return self.system if self.base_rank is None else f"{self.system} r={self.base_rank}"


def system_name(plan: PlanConfig, adapter: AdapterConfig) -> str:
    """The name of a sharing system, as the field and the reports use it.

    What differs from the system's defaults and matters is said in brackets; the rank is not.

    >>> lora = AdapterConfig(target_modules=("query",))
    >>> system_name(PlanConfig(topology="blocks", block_size=2), lora)
    'blocks(2)'
    >>> system_name(PlanConfig(**PRESETS["lss_only"]), lora)
    'LSS only'
    >>> system_name(PlanConfig(topology="e2", allocation="softmax", budget="interval"), lora)
    'E²LoRA (softmax, budget interval)'
    >>> system_name(PlanConfig(), lora.model_copy(update={"a_scope": "type"}))
    'ShareLoRA-A'
    >>> system_name(PlanConfig(topology="e2"), lora.model_copy(update={"family": "vera"}))
    'E²VeRA'
    """
    allocation = plan.rank_allocation
    allocated = allocation != "uniform"
    family, shared = adapter.display_name, _at_type_scope(adapter)
    if adapter.family == "full":
        return family
    if adapter.family == "lora" and shared:
        sharing = "ShareLoRA" if (plan.topology, shared) == ("e2", "A") else f"ShareLoRA-{shared}"
        family = sharing if plan.topology in ("none", "e2") else family
    names = {
        "none": "HRA only" if allocated else family,
        "all": "all-shared",
        "blocks": f"blocks({plan.block_size})",
        "strided": f"strided({plan.stride})",
        "random": f"random({plan.num_intervals or 'E²'}, seed {plan.partition_seed})",
        "matched": "matched blocks",
        "explicit": f"explicit {fingerprint_of([g.model_dump() for g in plan.groups or ()])[:4]}",
        "e2": f"E²{family}" if allocated else "LSS only",
    }
    name = names[plan.topology]
    if adapter.family != "lora" and family not in name:
        name += f" {family}"
    details: list[str] = []
    chosen = {key: getattr(plan, key) for key in PRESETS["e2_published"]}
    if chosen == PRESETS["e2_published"]:
        name += " as published"
    else:
        if plan.needs_similarity and plan.similarity != "rmi":
            details.append(plan.similarity)
        if allocation != "entropy_power" and (allocated or plan.topology in ("random", "matched")):
            details.append(allocation)
        if allocation == "entropy_power" and plan.topology not in (*CUT_BY_GRADIENTS, "none"):
            details.append(allocation)
        if allocation == "entropy_power" and plan.beta != 0.5:
            details.append(f"beta {plan.beta:g}")
        if allocated and plan.budget != "layer":
            details.append(f"budget {plan.budget}")
    details += ["rsLoRA"] if plan.use_rslora else []
    details += adapter.details
    own = [s for s in "AB" if getattr(adapter, f"{s.lower()}_scope") == "layer"]
    if own and plan.topology != "none":
        details.append(f"{' and '.join(own)} per layer")
    name += f" ({', '.join(details)})" if details else ""
    return name if not shared or "ShareLoRA" in name else f"{name} + shared {shared}"


def _at_type_scope(adapter: AdapterConfig) -> str:
    """Which of A and B serve a whole module type: "", "A", "B" or "AB"."""
    scopes = {"A": adapter.a_scope, "B": adapter.b_scope}
    return "".join(tensor for tensor, scope in scopes.items() if scope == "type")


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
    tasks: tuple[AnyTaskConfig, ...]
    objectives: tuple[Objective, ...]
    budgets: tuple[int, ...]
    points: tuple[Mapping[str, Any], ...] = ()
    seeds: tuple[int, ...] = (0,)
    num_trials: int = 10
