"""The typed tree that fully describes one trial, and the value that describes a study.

Every class is frozen and refuses unknown keys, so a misspelt option is an error and never a
default that trains something else. A configuration is plain JSON:
``TrialConfig.model_validate_json`` reads what ``model_dump_json`` wrote; ``fingerprint`` names it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from e2lora.config.adapter import (
    FAMILY_NAMES,
    AdaLoraOptions,
    AdapterConfig,
    BsLoraOptions,
    GoraOptions,
    HydraLoraOptions,
    IncreLoraOptions,
    LoraGaOptions,
    LoraPlusOptions,
    LoriOptions,
    RaLoraOptions,
    RandLoraOptions,
    RasaOptions,
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
from e2lora.config.presets import TASK_PRESETS, require_preset, task_preset
from e2lora.config.systems import CONTROLS, SYSTEMS, System, cells, suggest_system
from e2lora.config.tasks import (
    TASK_CONFIGS,
    AnyTaskConfig,
    CodeConfig,
    GenerationConfig,
    ImageClassificationConfig,
    MultipleChoiceConfig,
    PromptsConfig,
    RegressionConfig,
    SftConfig,
    TaskConfig,
    TextClassificationConfig,
    TextsConfig,
)
from e2lora.config.training import PARALLELISM, EarlyStopping, TrainConfig

__all__ = [
    "CONTROLS",
    "CUT_BY_GRADIENTS",
    "FAMILY_NAMES",
    "NEEDS_PAIRS",
    "PARALLELISM",
    "PRESETS",
    "SAMPLERS",
    "SYSTEMS",
    "TASK_CONFIGS",
    "TASK_PRESETS",
    "AdaLoraOptions",
    "AdapterConfig",
    "AnyTaskConfig",
    "BsLoraOptions",
    "CalibrationConfig",
    "CodeConfig",
    "EarlyStopping",
    "ExplicitGroup",
    "Frozen",
    "GenerationConfig",
    "GoraOptions",
    "GroupSpec",
    "HydraLoraOptions",
    "ImageClassificationConfig",
    "IncreLoraOptions",
    "LoraGaOptions",
    "LoraPlusOptions",
    "LoriOptions",
    "ModelConfig",
    "MultipleChoiceConfig",
    "Objective",
    "PlanConfig",
    "PromptsConfig",
    "Pruner",
    "RaLoraOptions",
    "RandLoraOptions",
    "RasaOptions",
    "RegressionConfig",
    "Scope",
    "SftConfig",
    "Study",
    "System",
    "TaskConfig",
    "TextClassificationConfig",
    "TextsConfig",
    "TrainConfig",
    "TrialConfig",
    "VeraOptions",
    "cells",
    "fingerprint_of",
    "in_one_paragraph",
    "require_preset",
    "suggest_system",
    "system_name",
    "task_preset",
]


class ModelConfig(Frozen):
    """A pretrained transformer: hub name, local folder or ``demo:NAME``."""

    name: str
    revision: str | None = None
    config_overrides: dict[str, float | int | str | bool] = Field(
        default={}, description="set on the transformers configuration, e.g. a dropout of 0"
    )
    attn_implementation: str | None = Field(
        default=None, description="None: the fastest that model, device and packages offer"
    )
    quantization: Literal["nf4"] | None = Field(
        default=None, description="of the frozen weights: QLoRA's NF4, by bitsandbytes"
    )


class TrialConfig(Frozen):
    """Everything that decides a trial's numbers."""

    model: ModelConfig
    task: AnyTaskConfig
    adapter: AdapterConfig
    plan: PlanConfig
    training: TrainConfig
    seed: int = Field(default=0, ge=0)

    def identity(self) -> str:
        """Names what is trained, however many workers train it: a checkpoint's owner.

        A rank that follows from a target of parameters is not part of it.
        """
        tree = self.model_dump(mode="json", exclude={"training": set(PARALLELISM)})
        plan = tree["plan"]
        if plan["target_parameters"] is None:
            del plan["target_parameters"]
        else:
            plan["scale"] = float(f"{self.plan.scale:.9g}")
            del plan["r"], plan["lora_alpha"]
        return fingerprint_of(tree)

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

    What differs from the system's defaults and matters is said in brackets; the rank is not, nor
    which partition a random one is: its draws are one system.

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
        "random": f"random({plan.num_intervals or 'E²'})",
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
    """What a worker group must be: trials with equal specs can follow one another on it.

    An elastic group has at least ``min_workers`` and at most ``num_workers``.
    """

    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    zero_stage: int
    precision: str
    offload_parameters: bool = False
    torch_compile: bool = False
    min_workers: int | None = None

    @classmethod
    def of(cls, training: TrainConfig, min_workers: int | None = None) -> GroupSpec:
        """Of the workers that a trial asks for; ``min_workers``: with how few it may do, too."""
        names = cls.model_fields.keys() & TrainConfig.model_fields.keys()
        given = {name: getattr(training, name) for name in names}
        return cls(**given, min_workers=min_workers)


class Objective(Frozen):
    """A column of a trial's result, and where better lies."""

    name: str
    direction: Literal["maximize", "minimize"]


class Pruner(Frozen):
    """Ends trials early that do badly beside others of the same model and task.

    It looks at evaluations on the way (`training.eval_every`), of the study's first objective that
    is a metric. Trials of the quota are never stopped: systems are compared by whole ones.
    """

    name: Literal["asha", "median"]
    min_steps: int = Field(gt=0, description="no trial is stopped before so many steps")
    reduction_factor: int = Field(
        default=3, gt=1, description="of asha: one in so many goes on from a rung to the next"
    )


SAMPLERS = ("tpe", "nsga2", "gp", "random", "grid")


@dataclass(frozen=True)
class Study:
    """A search as a value: one file in ``search_spaces/`` defines one as ``study``.

    ``space(trial)`` is define-by-run: it calls ``trial.suggest_*`` and returns the
    :class:`TrialConfig` to run.

    Args:
        cells: what is compared: sets of suggestions, as a system at a budget. Each is run at every
            combination of ``grid``, its quota, before anything else; so all have equal effort.
        grid: suggestion → the values that each cell is tried at, as its learning rates.
        points: further sets of suggestions that are run, after the quota: published settings.
        budgets: the counts of adapter parameters that systems are compared at, each a
            ``PlanConfig.target_parameters``.
        max_parameters: a limit that no trial may exceed: what does is answered without training.
        num_trials: in all, quota and points included; None: those alone.
        sampler: one of ``SAMPLERS``, of what comes after quota and points.
    """

    space: Callable[[Any], TrialConfig]
    models: tuple[ModelConfig, ...]
    tasks: tuple[AnyTaskConfig, ...]
    objectives: tuple[Objective, ...]
    budgets: tuple[int, ...] = ()
    cells: tuple[Mapping[str, Any], ...] = ()
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    points: tuple[Mapping[str, Any], ...] = ()
    seeds: tuple[int, ...] = (0,)
    num_trials: int | None = None
    sampler: str = "tpe"
    pruner: Pruner | None = None
    max_parameters: int | None = None

    @property
    def quota(self) -> tuple[Mapping[str, Any], ...]:
        """Every cell at every combination of the grid; all cells at the first one come first."""
        combinations = itertools.product(*self.grid.values())
        values = [dict(zip(self.grid, combination, strict=True)) for combination in combinations]
        return tuple({**cell, **chosen} for chosen in values for cell in self.cells)

    @property
    def given(self) -> tuple[Mapping[str, Any], ...]:
        """What is run before the sampler chooses: the quota, then the points."""
        return (*self.quota, *self.points)
