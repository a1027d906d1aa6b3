"""RaSA (He et al., 2025): every layer gives up k of its ranks to a pool that all layers use.

``y = W x + [B_l, B_S] diag(D_l) [A_l; A_S] x``: A_l and B_l have rank r − k and are shared by the
layers of a group; A_S (kN × in) and B_S (out × kN) are one pair for the N layers of a module type;
D_l (r − k + kN) is each layer's own. D starts at ``α/2/(r − k)`` on private ranks and at
``α/2/(kN)`` on pooled ones, and is trained: there is no further scale. Where ranks are allocated,
r is the plan's base rank in these, as ``α_k/r_k`` is ``α/r`` elsewhere.

It is linear in x, so each layer is LoRA of rank r − k + kN with B diag(D): PEFT's layer computes,
merges and describes it, with modules of ours in the place of A and B.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from e2lora.adapters.family import Factors, Family, Request, common_options, inject, layers_of
from e2lora.adapters.lora import RANK_DIM, shapes_and_groups
from e2lora.adapters.tensors import Composed
from e2lora.config import AdapterConfig, PlanConfig
from e2lora.plan import SharingPlan

OWN = ("private_weight", "pool_weight", "diagonal")
"""The parameters of :class:`Pooled`, as a state dict names them."""


class Pooled(Composed):
    """A or B: ranks of a group beside those of the pool, of B times the layer's D.

    Args:
        private: A_l (r − k × in) or B_l (out × r − k).
        pool: A_S (kN × in) or B_S (out × kN).
        dim: along which the rank lies, 0 for A and 1 for B.
        diagonal: D_l (1 × r − k + kN) for B: PEFT suspects tensors of one dimension.
    """

    diagonal: nn.Parameter | None

    def __init__(
        self,
        private: nn.Parameter,
        pool: nn.Parameter,
        dim: int,
        diagonal: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.private_weight, self.pool_weight, self.dim = private, pool, dim
        self.register_parameter("diagonal", diagonal)

    def whole(self) -> Tensor:
        joined = torch.cat([self.private_weight, self.pool_weight], self.dim)
        return joined if self.diagonal is None else joined * self.diagonal


class Rasa(Family):
    """RaSA, with a private part per layer or per group. The ranks of a plan are totals, r."""

    key = "rasa"
    shared_anyway = "all layers of a module type, RaSA's pool"
    unread_by_peft: ClassVar[tuple[str, ...]] = tuple(f".{name}" for name in OWN)

    def require_suits(self, plan: PlanConfig, config: AdapterConfig) -> None:
        super().require_suits(plan, config)
        if plan.use_rslora:
            raise ValueError(
                "RaSA divides α by the ranks of its private and pooled parts, and trains the "
                "quotients: √r has no meaning; got use_rslora=True. Set use_rslora=False."
            )
        if plan.r <= (k := pooled_ranks(plan, config)):
            raise ValueError(
                f"RaSA needs a private rank beside the pooled ones: r must exceed k; got r={plan.r}"
                f" and k={k}. Raise r, or lower `rasa.k`."
            )

    def require_fits(self, plan: SharingPlan, config: AdapterConfig) -> None:
        super().require_fits(plan, config)
        k = pooled_ranks(plan.options, config)
        for group in plan.groups:
            if group.r <= k:
                raise ValueError(
                    "RaSA needs a private rank beside the pooled ones: the rank of every group "
                    f"must exceed k; got k={k}, and {group.module_type} has r={group.r} in layers "
                    f"{list(group.layers)}. Raise the base rank, lower `rasa.k`, or set "
                    "allocation='uniform'."
                )

    def count(self, plan: SharingPlan, config: AdapterConfig) -> int:
        """Σ over module types: (in + out)(Σ_k (r_k − k) + kN) + Σ_layers (r_l − k + kN)."""
        k, total = pooled_ranks(plan.options, config), 0
        for in_features, out_features, groups in shapes_and_groups(plan):
            pool = k * sum(len(group.layers) for group in groups)
            private = sum(group.r - k for group in groups)
            diagonals = sum(len(group.layers) * (group.r - k + pool) for group in groups)
            total += (in_features + out_features) * (private + pool) + diagonals
        return total

    def build(self, model: Any, request: Request) -> Any:
        adapted = inject(model, request.plan, self.peft_config(model, request), request.name)
        _pool(adapted, request)
        return adapted

    def peft_config(self, model: Any, request: Request) -> Any:
        """PEFT's configuration of the same function: LoRA of rank r − k + kN and scale 1."""
        from peft import LoraConfig

        ranks = _expanded_ranks(request.plan, request.config)
        r = next(iter(ranks.values()))
        pattern = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != r}
        return LoraConfig(
            **common_options(model, request),
            r=r,
            lora_alpha=r,
            rank_pattern=pattern,
            alpha_pattern=dict(pattern),
            lora_dropout=request.config.lora_dropout,
        )

    def factors(self, layer: Any, name: str) -> Factors:
        return Factors(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


def pooled_ranks(plan: PlanConfig, config: AdapterConfig) -> int:
    """k: the ranks that each layer gives to the pool of its module type."""
    return max(1, round(plan.r / 8)) if config.rasa.k is None else config.rasa.k


def _num_layers(plan: SharingPlan) -> dict[str, int]:
    """Module type → N."""
    types = [target.module_type for target in plan.targets]
    return {module_type: types.count(module_type) for module_type in plan.module_types}


def _expanded_ranks(plan: SharingPlan, config: AdapterConfig) -> dict[str, int]:
    """Target path → r − k + kN."""
    k, num_layers = pooled_ranks(plan.options, config), _num_layers(plan)
    return {
        path: group.r - k + k * num_layers[group.module_type]
        for path, group in plan.group_of_target().items()
    }


def _pool(adapted: Any, request: Request) -> None:
    """Put what is shared in the place of PEFT's A and B, of which it takes the values."""
    plan, name, options = request.plan, request.name, request.plan.options
    k, layers = pooled_ranks(options, request.config), layers_of(adapted, plan)
    num_layers, half = _num_layers(plan), options.lora_alpha / 2
    shared: dict[tuple[str, Any], nn.Parameter] = {}
    for path, group in plan.group_of_target().items():
        sizes = [group.r - k, k * num_layers[group.module_type]]
        starts = [half / (options.r - k), half / sizes[1]]
        diagonal = torch.tensor(starts).repeat_interleave(torch.tensor(sizes))
        for slot, dim in RANK_DIM.items():
            modules = getattr(layers[path], f"lora_{slot}")
            weight = modules[name].weight.detach()
            owners = (slot, group), (slot, group.module_type)
            for owner, part in zip(owners, weight.split(sizes, dim), strict=True):
                if owner not in shared:
                    shared[owner] = nn.Parameter(part.clone(memory_format=torch.contiguous_format))
            private, pool = (shared[owner] for owner in owners)
            own = nn.Parameter(diagonal[None].to(weight)) if slot == "B" else None
            modules[name] = Pooled(private, pool, dim, own)
