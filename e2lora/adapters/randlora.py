"""RandLoRA (Albert et al., 2025): updates of full rank from frozen random bases.

``y = W x + (α/r) Σ_j B_j Λ_j A Γ_j x`` over n = ⌈min(in, out)/r⌉ bases of rank r, where in ≤ out;
transposed otherwise. Trained are the diagonals λ (r × n) and γ (n × min(in, out)). A and all B_j
are one set for the whole model, which PEFT makes from ``projection_seed``.

PEFT's defaults are r = 32 and α = 640, and α = 20 r is what its authors recommend; with a scale so
large training may need a lower learning rate.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from e2lora.adapters.family import (
    Ability,
    Family,
    Request,
    common_options,
    inject,
    layers_of,
    require_same_projections,
    share_first,
    take_back_any_head,
)
from e2lora.config import AdapterConfig, PlanConfig
from e2lora.plan import SharingPlan


class RandLora(Family):
    """RandLoRA, with (λ, γ) per layer or per group. λ starts at zero."""

    key = "randlora"
    no_allocation = (
        "its updates are of full rank whatever r is, and a larger r gives them fewer parameters"
    )
    one_rank = "one set of bases serves the whole model"
    lacks: ClassVar[Mapping[Ability, str]] = {
        "portable": "its update is of full rank, which no small A and B can say; merge it",
    }

    def require_suits(self, plan: PlanConfig, config: AdapterConfig) -> None:
        super().require_suits(plan, config)
        if plan.use_rslora:
            raise ValueError(
                "RandLoRA divides α by r, the size of a basis: its update has the full rank "
                "whatever r is, so √r has no meaning; got use_rslora=True. Set use_rslora=False."
            )

    def count(self, plan: SharingPlan, config: AdapterConfig) -> int:
        """Σ over groups: n (r + min(in, out)) with n = ⌈min(in, out)/r⌉."""
        limits = {t.module_type: min(t.in_features, t.out_features) for t in plan.targets}
        return sum(
            math.ceil(limits[group.module_type] / group.r) * (group.r + limits[group.module_type])
            for group in plan.groups
        )

    def build(self, model: Any, request: Request) -> Any:
        plan, name = request.plan, request.name
        require_same_projections(self.name, model, {"randlora_B": _shape(plan)})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Specified to not save basis_A", UserWarning)
            peft_config = self.peft_config(model, request)
        adapted = inject(model, plan, peft_config, name)
        share_first(layers_of(adapted, plan), plan, name)
        take_back_any_head(adapted)
        return adapted

    def peft_config(self, model: Any, request: Request) -> Any:
        from peft import RandLoraConfig

        config, (group, *_) = request.config, request.plan.groups
        options: dict[str, Any] = {
            "r": group.r,
            "randlora_alpha": group.lora_alpha,
            "sparse": config.randlora.sparse,
            "projection_prng_key": config.projection_seed or 0,
            "save_projection": False,  # PEFT would save the model's bases with every layer
            "randlora_dropout": config.lora_dropout,
        }
        return RandLoraConfig(**common_options(model, request), **options)

    def frozen(self, adapted: Any, name: str) -> dict[str, Tensor]:
        tuner = adapted.base_model
        return {"A": tuner.randlora_A[name], "B": tuner.randlora_B[name]}


def _shape(plan: SharingPlan) -> tuple[int, int, int]:
    """Of all bases B."""
    sizes = [max(t.in_features for t in plan.targets), max(t.out_features for t in plan.targets)]
    r = plan.groups[0].r
    return max(sizes), math.ceil(min(sizes) / r), r
