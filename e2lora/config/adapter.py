"""Which kind of adapter is put into the model, and which layers each of its tensors serves."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from e2lora.config.frozen import Frozen

Scope = Literal["layer", "interval", "type"]

FAMILY_NAMES: dict[str, str] = {
    "lora": "LoRA",
    "dora": "DoRA",
    "lora_plus": "LoRA+",
    "lora_fa": "LoRA-FA",
    "lori": "LoRI",
    "vera": "VeRA",
    "randlora": "RandLoRA",
    "adalora": "AdaLoRA",
    "lora_ga": "LoRA-GA",
    "rasa": "RaSA",
    "hydralora": "HydraLoRA",
    "gora": "GoRA",
    "increlora": "IncreLoRA",
    "bslora": "BSLoRA",
    "ralora": "RaLoRA",
    "full": "FFT",
}
"""Kinds of adapters: the word in a configuration → the name in the field and in reports."""

Family = Literal[
    "lora",
    "dora",
    "lora_plus",
    "lora_fa",
    "lori",
    "vera",
    "randlora",
    "adalora",
    "lora_ga",
    "rasa",
    "hydralora",
    "gora",
    "increlora",
    "bslora",
    "ralora",
    "full",
]

assert list(FAMILY_NAMES) == list(get_args(Family)), "every family has a name"

PROJECTED = ("lora_fa", "lori", "vera", "randlora")
"""Families with frozen random projections."""

TIMES = ("mask_after", "tinit", "tfinal", "delta_t")
"""Options of families that say when, in steps."""

INITIALISATION = re.compile(r"default|gaussian|orthogonal|olora|pissa(_niter_[1-9]\d*)?")


class LoraPlusOptions(Frozen):
    """LoRA+ (Hayou et al., 2024): B learns faster than A."""

    lr_ratio: float = Field(default=16.0, ge=1, description="learning rate of B over that of A")


class LoriOptions(Frozen):
    """LoRI (Zhang et al., 2025): A frozen and random, B trained, in LoRI-S masked.

    With ``mask_after`` it is LoRI-S: after so many steps the share ``keep`` of all entries of B
    that are largest in magnitude is chosen over the whole model; B starts again from zero and only
    these entries are trained.
    """

    mask_after: int | None = Field(default=None, gt=0, description="steps; None: LoRI-D, no mask")
    keep: float = Field(default=0.1, gt=0, le=1)
    masked_lr_ratio: float = Field(
        default=10.0, gt=0, description="learning rate of B with the mask, over that before it"
    )


class VeraOptions(Frozen):
    """VeRA (Kopiczko et al., 2024)."""

    d_initial: float = Field(default=0.1, gt=0, description="initial value of λ_d")


class RandLoraOptions(Frozen):
    """RandLoRA (Albert et al., 2025)."""

    sparse: bool = Field(default=False, description="bases of −1, 0 and 1, a third of them not 0")


class AdaLoraOptions(Frozen):
    """AdaLoRA (Zhang et al., 2023): starts above the base rank, prunes to it on the way.

    Steps not given follow from the trial's length: warm-up a tenth, the last half at final ranks.
    """

    init_ratio: float = Field(default=1.5, ge=1, description="initial over final rank")
    tinit: int | None = Field(default=None, ge=0, description="steps before pruning begins")
    tfinal: int | None = Field(default=None, gt=0, description="steps after it ended")
    delta_t: int = Field(default=1, gt=0, description="steps between two prunings")
    beta1: float = Field(default=0.85, gt=0, lt=1)
    beta2: float = Field(default=0.85, gt=0, lt=1)
    orth_reg_weight: float = Field(default=0.5, ge=0)


class LoraGaOptions(Frozen):
    """LoRA-GA (Wang et al., 2024): starts along the gradient's leading directions."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: float = Field(default=16.0, gt=0)


class RasaOptions(Frozen):
    """RaSA (He et al., 2025): k ranks of every layer lie in a pool of its module type."""

    k: int | None = Field(
        default=None, gt=0, description="None: an eighth of the base rank, and at least 1"
    )


class HydraLoraOptions(Frozen):
    """HydraLoRA (Tian et al., 2024): several heads B on one A."""

    heads: int = Field(default=3, ge=2)


class GoraOptions(Frozen):
    """GoRA (He et al., 2025): ranks and the start of B from the gradient, before training.

    The smallest and the largest rank are these shares of the base rank: 4 and 32 where it is 8.
    """

    min_ratio: float = Field(default=0.5, gt=0, le=1, description="smallest over base rank")
    max_ratio: float = Field(default=4.0, ge=1, description="largest over base rank")
    gamma: float = Field(
        default=5e-2, gt=0, description="size of the step that B starts with, over the gradient's"
    )
    lr_ratio: float = Field(default=16.0, ge=1, description="learning rate of B over that of A")


class IncreLoraOptions(Frozen):
    """IncreLoRA (Zhang et al., 2023): starts at rank 1, grows to the base rank on average.

    What is not given follows from the trial's length: warm-up a tenth, the last half at final
    ranks; between them the paper's 100 steps and 3 groups, or as few and as many as it needs.
    """

    max_ratio: float = Field(default=2.0, ge=1, description="largest over base rank")
    top_h: int | None = Field(default=None, gt=0, description="groups that grow at a time")
    tinit: int | None = Field(default=None, ge=0, description="steps before growth begins")
    tfinal: int | None = Field(default=None, gt=0, description="steps after it ended")
    delta_t: int | None = Field(default=None, gt=0, description="steps between two growths")
    beta1: float = Field(default=0.85, gt=0, lt=1)
    beta2: float = Field(default=0.85, gt=0, lt=1)
    orth_reg_weight: float = Field(default=0.1, ge=0)


class BsLoraOptions(Frozen):
    """BSLoRA (Zhou et al., 2025): local ranks (the plan's), those of a layer, those of the model.

    ``shapes`` says how one pair serves targets of different shapes: as the middle of tensors of the
    largest, between gates of rank 1, or extended by Kronecker products.
    """

    intra_r: int = Field(default=4, gt=0, description="ranks that the targets of a layer share")
    inter_r: int = Field(default=16, gt=0, description="ranks that all targets share")
    shapes: Literal["slice", "gate", "kronecker"] = "slice"
    share_size: int | None = Field(
        default=None,
        gt=0,
        description="in and out of what is shared, but of slices; None: 1024 (gate), 256",
    )


class RaLoraOptions(Frozen):
    """RaLoRA (Ye et al., 2026): as many blocks as the gradient's effective rank asks for."""

    max_blocks: int = Field(default=32, gt=0, description="of one adapter")


class AdapterConfig(Frozen):
    """The adapter's family, the modules it adapts, and which layers each tensor serves.

    Scopes: a tensor of ``layer`` scope serves one layer, of ``interval`` scope a group of the plan,
    of ``type`` scope all layers of a module type; there it has the largest of their ranks, and each
    layer uses as much as its rank. ShareLoRA-A, B and AB are LoRA with A, B or both at type scope;
    E²ShareLoRA is an E² plan with A at type scope.
    """

    family: Family = "lora"
    target_modules: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="names of linear modules inside a layer, e.g. 'query'; none for `full`",
    )
    a_scope: Scope = "interval"
    b_scope: Scope = "interval"
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    init_lora_weights: str = Field(
        default="default",
        description="default, gaussian, orthogonal, olora, pissa or pissa_niter_N, as in PEFT",
    )
    projection_seed: int | None = Field(
        default=None,
        ge=0,
        description="of frozen random projections; None: the trial's seed, outside of a trial 0",
    )
    lora_plus: LoraPlusOptions = LoraPlusOptions()
    lori: LoriOptions = LoriOptions()
    vera: VeraOptions = VeraOptions()
    randlora: RandLoraOptions = RandLoraOptions()
    adalora: AdaLoraOptions = AdaLoraOptions()
    lora_ga: LoraGaOptions = LoraGaOptions()
    gora: GoraOptions = GoraOptions()
    increlora: IncreLoraOptions = IncreLoraOptions()
    rasa: RasaOptions = RasaOptions()
    hydralora: HydraLoraOptions = HydraLoraOptions()
    bslora: BsLoraOptions = BsLoraOptions()
    ralora: RaLoraOptions = RaLoraOptions()

    @model_validator(mode="after")
    def _options_belong_to_the_family(self) -> AdapterConfig:
        for family in FAMILY_NAMES.keys() & type(self).model_fields.keys():
            default = type(self).model_fields[family].default
            if family != self.family and getattr(self, family) != default:
                raise ValueError(
                    f"options `{family}` may be set for family {family!r} only; got family="
                    f"{self.family!r}. Remove them, or take that family."
                )
        idle = {
            "projection_seed": self.projection_seed is not None and self.family not in PROJECTED,
            "lori.keep and lori.masked_lr_ratio": self.lori.mask_after is None
            and self.lori != LoriOptions(),
            "lora_ga.stable_gamma": self.lora_ga.scale != "stable"
            and self.lora_ga.stable_gamma != LoraGaOptions().stable_gamma,
            "bslora.share_size": self.bslora.shapes == "slice"
            and self.bslora.share_size is not None,
        }
        for option, is_idle in idle.items():
            if is_idle:
                raise ValueError(
                    f"an option that has no effect must not be set; {option} has none with family="
                    f"{self.family!r} as it is configured. Remove it (a projection seed belongs to "
                    f"{list(PROJECTED)}, lori's options to `mask_after`, gamma to scale 'stable')."
                )
        if INITIALISATION.fullmatch(self.init_lora_weights) is None:
            raise ValueError(
                "`init_lora_weights` must be default, gaussian, orthogonal, olora, pissa or "
                f"pissa_niter_N; got {self.init_lora_weights!r}."
            )
        if (self.family == "full") == bool(self.target_modules):
            raise ValueError(
                "`target_modules` name what an adapter is put on, and full fine-tuning has none; "
                f"got family={self.family!r} and {list(self.target_modules)}. "
                + ("Remove them." if self.target_modules else "Name some, e.g. 'q_proj'.")
            )
        return self

    def seeded(self, seed: int) -> AdapterConfig:
        """With ``projection_seed`` settled, as a trial of that seed uses it."""
        if self.projection_seed is not None or self.family not in PROJECTED:
            return self
        return self.model_copy(update={"projection_seed": seed})

    @property
    def display_name(self) -> str:
        """The family's name in reports, with what makes it another method."""
        name = FAMILY_NAMES[self.family]
        if self.family == "lori":
            name += "-D" if self.lori.mask_after is None else "-S"
        return name

    @property
    def special_options(self) -> dict[str, Any]:
        """What differs from the defaults, by name; options of a family as ``lori.keep``."""
        told = self.model_dump(mode="json", exclude_defaults=True, exclude={"target_modules"})
        told.pop("family", None)
        own = told.pop(self.family, {})
        return told | {f"{self.family}.{name}": value for name, value in own.items()}

    @property
    def details(self) -> list[str]:
        """What of it makes another system, in words, for a system's name.

        When a family does something in the course of training is, like a learning rate, tuning.
        """
        told = self.special_options
        details = [told["init_lora_weights"]] if "init_lora_weights" in told else []
        own = {name.rpartition(".")[2]: value for name, value in told.items() if "." in name}
        return details + [f"{k} {v}" for k, v in own.items() if k not in TIMES]
