"""Which layers share and at what rank, and the rows that gradients are measured on."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from e2lora.config.frozen import Frozen


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
    target_parameters: int | None = Field(
        default=None,
        gt=0,
        description="in a study: trainable adapter parameters to meet. `r` becomes the base rank "
        "whose count comes nearest, and `lora_alpha` goes with it, so that the scale stays",
    )
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
    def scale(self) -> float:
        """Of the adapter's output at the base rank: α/r, or α/√r under rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def at_rank(self, r: int) -> PlanConfig:
        """With this base rank, and the α that keeps the adapter's scale: α/r, or α/√r (rsLoRA).

        >>> PlanConfig(r=8, lora_alpha=16).at_rank(2).lora_alpha
        4.0
        """
        ratio = r / self.r
        alpha = self.lora_alpha * (math.sqrt(ratio) if self.use_rslora else ratio)
        return self.model_copy(update={"r": r, "lora_alpha": alpha})

    @property
    def needs_similarity(self) -> bool:
        """Whether the similarity of layers decides who shares, or into how many intervals."""
        return self.topology in CUT_BY_GRADIENTS and self.num_intervals is None

    @property
    def needs_profile(self) -> bool:
        return self.needs_similarity or self.rank_allocation != "uniform"

    @property
    def idle_options(self) -> list[str]:
        """Options that are set and decide nothing: those of a similarity or allocation unused."""
        used = {
            "similarity": self.needs_similarity,
            "beta": self.rank_allocation == "entropy_power",
            "budget": self.rank_allocation != "uniform",
        }
        defaults = type(self).model_fields
        return [
            name
            for name, use in used.items()
            if not use and getattr(self, name) != defaults[name].default
        ]

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
                    f"{f'Set `{option}`, or take another topology' if belongs else 'Remove it'}."
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
