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
from typing import Annotated, Any, Literal

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
    """What every task says of its data; the tasks' own classes below add how columns are read.

    ``data`` is a hub name, a local file or folder, or ``demo:NAME``.
    """

    data: str
    subset: str | None = None
    train_split: str = "train"
    validation_split: str | None = Field(
        default=None, description="None: carved from the training split, by `split_seed`"
    )
    validation_size: int = Field(default=1000, gt=0, description="rows carved, or kept, at most")
    split_seed: int = 0

    @property
    def display_name(self) -> str:
        return f"{self.data}/{self.subset}" if self.subset else self.data


class TextClassificationConfig(TaskConfig):
    """One text, or a pair of texts, to one of several labels."""

    kind: Literal["text_classification"] = "text_classification"
    text_column: str = "text"
    text2_column: str | None = None
    label_column: str = "label"
    max_length: int = Field(default=128, gt=1, description="tokens; longer texts are cut")


class SftConfig(TaskConfig):
    """Supervised fine-tuning of a causal model: a prompt and the answer it is to give."""

    kind: Literal["sft"] = "sft"
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    template: str = Field(
        default="{prompt}\n", description="what stands before the answer; holds {prompt} once"
    )
    max_length: int = Field(default=512, gt=1, description="tokens; longer answers are cut")

    @model_validator(mode="after")
    def _template_holds_the_prompt(self) -> SftConfig:
        if self.template.count("{prompt}") != 1:
            raise ValueError(
                f"`template` must hold {{prompt}} exactly once; got {self.template!r}. Write the "
                "prompt's place as {prompt}."
            )
        return self


AnyTaskConfig = Annotated[TextClassificationConfig | SftConfig, Field(discriminator="kind")]


class CalibrationConfig(Frozen):
    """The rows that the gradient profile is measured on (training split only), and how."""

    num_samples: int = Field(default=256, gt=0)
    num_folds: int = Field(
        default=4, gt=0, description="disjoint parts, to tell how stable plans are; 1: untold"
    )
    microbatch_size: int = Field(
        default=16,
        gt=0,
        description="rows per forward and backward; at least a worker's share of `num_samples`: "
        "one pass that holds no gradient at all",
    )
    checkpointing: bool = Field(
        default=False, description="recompute activations layer by layer: more time, less memory"
    )
    max_held_gib: float = Field(
        default=8.0,
        gt=0,
        description="gradients held by a worker between microbatches; what exceeds it is measured "
        "in further passes over the same rows",
    )
    pairwise: bool = Field(
        default=False,
        description="measure inner products and distances between layers too (similarities "
        "cosine, l1, l2), through gradients on disk",
    )

    @model_validator(mode="after")
    def _every_fold_has_a_sample(self) -> CalibrationConfig:
        if self.num_folds > self.num_samples:
            raise ValueError(
                f"`num_folds` must not exceed `num_samples`; got {self.num_folds} folds of "
                f"{self.num_samples} samples. Lower it, or calibrate on more."
            )
        return self


class ExplicitGroup(Frozen):
    """Layers of one module type that shall share, as the user writes them (topology `explicit`)."""

    module: str = Field(description="ending of a module type, as in `target_modules`")
    layers: tuple[int, ...] = Field(min_length=1)
    r: int | None = Field(default=None, gt=0, description="None: by `allocation`")


Topology = Literal["none", "all", "blocks", "strided", "random", "matched", "explicit", "e2"]
Similarity = Literal["rmi", "rmi_literal", "cosine", "l1", "l2", "kl"]
Allocation = Literal["entropy_power", "softmax", "shifted", "literal", "uniform"]
RankBudget = Literal["layer", "interval", "parameter"]

CUT_BY_GRADIENTS = ("e2", "random", "matched")
"""Topologies that cut where, or as often as, gradients say: E² itself and its two controls."""
NEEDS_PAIRS = ("cosine", "l1", "l2")
"""Similarities of the gradients' directions: they need more than each layer's moments."""


class PlanConfig(Frozen):
    """Which layers share one adapter, and at what rank (method: E²LoRA, ICLR 2026).

    Layer sharing alone (LSS only) is ``topology="e2", allocation="uniform"``; rank allocation
    alone (HRA only) is ``topology="none", allocation="entropy_power"``.
    """

    topology: Topology = "none"
    block_size: int | None = Field(default=None, gt=0, description="for `blocks` only")
    stride: int | None = Field(default=None, gt=0, description="for `strided` only")
    num_intervals: int | None = Field(
        default=None, gt=0, description="for `random`; None: as many as E² finds"
    )
    partition_seed: int | None = Field(default=None, description="for `random` only")
    groups: tuple[ExplicitGroup, ...] | None = Field(
        default=None, min_length=1, description="for `explicit` only"
    )
    r: int = Field(default=8, gt=0)
    lora_alpha: float = Field(default=16.0, gt=0)
    use_rslora: bool = Field(default=False, description="scale by alpha/sqrt(r), not alpha/r")
    similarity: Similarity = "rmi"
    allocation: Allocation | None = Field(
        default=None,
        description="None: `entropy_power` for e2, random and matched; `uniform` (every rank is r) "
        "for the others",
    )
    beta: float = Field(default=0.5, ge=0, description="exponent of `entropy_power`")
    budget: RankBudget = Field(
        default="layer",
        description="of a module type of N layers in K intervals, summed over intervals: length x "
        "rank = N r (`layer`), rank = K r (`interval`), rank = N r (`parameter`)",
    )
    calibration: CalibrationConfig = CalibrationConfig()

    @property
    def rank_allocation(self) -> Allocation:
        """``allocation``, or the topology's own where it is None."""
        if self.allocation is not None:
            return self.allocation
        return "entropy_power" if self.topology in CUT_BY_GRADIENTS else "uniform"

    @property
    def needs_similarity(self) -> bool:
        """Whether the similarity of layers decides who shares, or into how many intervals."""
        return self.topology in CUT_BY_GRADIENTS and self.num_intervals is None

    @property
    def needs_profile(self) -> bool:
        return self.needs_similarity or self.rank_allocation != "uniform"

    @model_validator(mode="after")
    def _options_belong_to_the_topology(self) -> PlanConfig:
        for option, topology, required in (
            ("block_size", "blocks", True),
            ("stride", "strided", True),
            ("partition_seed", "random", True),
            ("num_intervals", "random", False),
            ("groups", "explicit", True),
        ):
            value, belongs = getattr(self, option), self.topology == topology
            if (value is not None and not belongs) or (required and belongs and value is None):
                raise ValueError(
                    f"`{option}` is given {'exactly' if required else 'only'} when `topology` is "
                    f"{topology!r}; got topology={self.topology!r}, {option}={value}. "
                    f"{'Set both or neither' if required else 'Remove it'}."
                )
        wants_pairs = self.needs_similarity and self.similarity in NEEDS_PAIRS
        if wants_pairs and not self.calibration.pairwise:
            raise ValueError(
                f"similarity {self.similarity!r} compares whole gradients and needs a profile with "
                "pairs of layers; got calibration.pairwise=False. Set "
                "calibration=CalibrationConfig(pairwise=True), or use a similarity of moments "
                "(rmi, rmi_literal, kl)."
            )
        own_ranks = any(group.r is not None for group in self.groups or ())
        if own_ranks and self.rank_allocation != "uniform":
            raise ValueError(
                "groups with ranks of their own leave nothing to allocate; got "
                f"allocation={self.allocation!r}. Remove it, or the ranks."
            )
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "e2": {"topology": "e2"},
    "e2_published": {
        "topology": "e2",
        "similarity": "rmi_literal",
        "allocation": "literal",
        "budget": "parameter",
    },
    "lss_only": {"topology": "e2", "allocation": "uniform"},
    "hra_only": {"topology": "none", "allocation": "entropy_power"},
    "lora": {"topology": "none"},
    "all": {"topology": "all"},
    "matched": {"topology": "matched"},
}
"""Options by name: ``PlanConfig(**PRESETS["e2_published"], r=16)``."""


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
    task: AnyTaskConfig
    adapter: AdapterConfig
    plan: PlanConfig
    training: TrainConfig
    seed: int = 0

    def identity(self) -> str:
        """Names what is trained, however many workers train it: a checkpoint's owner."""
        return fingerprint_of(self.model_dump(mode="json", exclude={"training": set(PARALLELISM)}))

    @property
    def system(self) -> str:
        """The sharing system by its name in reports."""
        return system_name(self.plan, self.adapter)


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
    """
    allocation, shares_a = plan.rank_allocation, adapter.a_scope == "type"
    allocated = allocation != "uniform"
    names = {
        "none": "HRA only" if allocated else "ShareLoRA-A" if shares_a else "LoRA",
        "all": "all-shared",
        "blocks": f"blocks({plan.block_size})",
        "strided": f"strided({plan.stride})",
        "random": f"random({plan.num_intervals or 'E²'}, seed {plan.partition_seed})",
        "matched": "matched blocks",
        "explicit": "explicit",
        "e2": "E²LoRA" if allocated else "LSS only",
    }
    name = names[plan.topology]
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
    name += f" ({', '.join(details)})" if details else ""
    return f"{name} + shared A" if shares_a and name != "ShareLoRA-A" else name


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
