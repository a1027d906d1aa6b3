"""VeRA (Kopiczko et al., 2024) and E²VeRA: one frozen random pair in the whole model, two trained
vectors per group.

``y = W x + λ_b ⊙ B (λ_d ⊙ A x)``. PEFT makes A (r_max × largest in) and B (largest out × r_max)
from ``projection_seed``; a layer of rank r uses the first r rows of A and columns of B, as many
as its λ_d has numbers. The entries of B have variance 2/r_max, so the largest rank scales all
layers. There is no α: λ_d and λ_b are the scale, and ``lora_alpha`` of a plan has no effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from e2lora.adapters.family import (
    Factors,
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


class Vera(Family):
    """VeRA, with (λ_d, λ_b) per layer or per group, and E²VeRA. λ_b starts at zero."""

    key = "vera"

    def require_suits(self, plan: PlanConfig, config: AdapterConfig) -> None:
        super().require_suits(plan, config)
        if plan.use_rslora:
            raise ValueError(
                "VeRA has no α that could be divided by √r: its trained vectors are the scale; got "
                "use_rslora=True. Set use_rslora=False."
            )

    def count(self, plan: SharingPlan, config: AdapterConfig) -> int:
        """Σ over groups: r + out."""
        out_features = {t.module_type: t.out_features for t in plan.targets}
        return sum(group.r + out_features[group.module_type] for group in plan.groups)

    def build(self, model: Any, request: Request) -> Any:
        plan, name = request.plan, request.name
        require_same_projections(self.name, model, _shapes(plan))
        adapted = inject(model, plan, self.peft_config(model, request), name)
        for projection in self.frozen(adapted, name).values():
            projection.copy_(projection.bfloat16())  # values that survive training in that type
        layers = layers_of(adapted, plan)
        for path, group in plan.group_of_target().items():
            layer = layers[path]
            if not isinstance(layer, RankedLayer):
                layer.__class__ = _ranked(layer.__class__)
            layer.r[name] = group.r
            whole = layer.vera_lambda_d[name]
            layer.vera_lambda_d[name] = nn.Parameter(whole.detach()[: group.r].clone())
        share_first(layers, plan, name)
        take_back_any_head(adapted)
        return adapted

    def peft_config(self, model: Any, request: Request) -> Any:
        from peft import VeraConfig

        config = request.config
        return VeraConfig(
            **common_options(model, request),
            r=_largest_rank(request.plan),
            projection_prng_key=config.projection_seed or 0,
            save_projection=True,  # once in all; so PEFT alone needn't make the same numbers again
            vera_dropout=config.lora_dropout,
            d_initial=config.vera.d_initial,
        )

    def frozen(self, adapted: Any, name: str) -> dict[str, Tensor]:
        return {"A": adapted.base_model.vera_A[name], "B": adapted.base_model.vera_B[name]}

    def factors(self, layer: Any, name: str) -> Factors:
        a = layer.vera_A[name][:, : layer.in_features]
        b = layer.vera_B[name][: layer.out_features]
        lambda_d, lambda_b = layer.vera_lambda_d[name], layer.vera_lambda_b[name]
        return Factors(lambda_d[:, None] * a, lambda_b[:, None] * b, 1.0)


class RankedLayer:
    """Of PEFT's layer of VeRA, one that uses ``r[name]`` dimensions of adapter ``name``'s pair.

    The pair stays what it is in PEFT, a module that all layers refer to, and is cut when it is
    read: so there is one copy of it wherever the model is moved, cast or copied to. In a state
    dict λ_d is filled up with zeros to r_max, from which PEFT's own layer computes the same.
    """

    r: dict[str, int]
    vera_lambda_d: nn.ParameterDict
    _modules: dict[str, Any]

    @property
    def vera_A(self) -> Cut:
        return Cut(self._modules["vera_A"], self.r, dim=0)

    @property
    def vera_B(self) -> Cut:
        return Cut(self._modules["vera_B"], self.r, dim=1)

    def _beyond(self, prefix: str) -> Iterator[tuple[str, int, int]]:
        """Of each adapter: λ_d's key in a state dict, its rank, and how much r_max exceeds it."""
        for name in self.vera_lambda_d:
            r = self.r[name]
            yield f"{prefix}vera_lambda_d.{name}", r, len(self._modules["vera_A"][name]) - r

    def state_dict(self, *arguments: Any, prefix: str = "", **options: Any) -> dict[str, Tensor]:
        saved = super().state_dict(*arguments, prefix=prefix, **options)  # type: ignore[misc]
        for key, _, beyond in self._beyond(prefix):
            if beyond:
                saved[key] = F.pad(saved[key], (0, beyond))
        return saved

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any
    ) -> None:
        """Cuts λ_d where only zeros are lost; else torch finds that the sizes differ."""
        for key, r, _ in self._beyond(prefix):
            if key in state_dict and not state_dict[key][r:].any():
                state_dict[key] = state_dict[key][:r]
        super()._load_from_state_dict(state_dict, prefix, *arguments)  # type: ignore[misc]


class Cut:
    """PEFT's dictionary of one projection per adapter, read at the layer's ranks.

    ``values`` are whole: a further adapter takes over the projection of those that are there.
    """

    def __init__(self, whole: Any, ranks: dict[str, int], dim: int) -> None:
        self.whole, self.ranks, self.dim = whole, ranks, dim

    def __getitem__(self, name: str) -> Tensor:
        part: Tensor = self.whole[name].narrow(self.dim, 0, self.ranks[name])
        return part

    def __setitem__(self, name: str, projection: Tensor) -> None:
        self.whole[name] = projection

    def __delitem__(self, name: str) -> None:
        del self.whole[name]

    def __contains__(self, name: str) -> bool:
        return name in self.whole

    def __len__(self) -> int:
        return len(self.whole)

    def values(self) -> Any:
        return self.whole.values()


@cache
def _ranked(layer_class: type) -> type:
    """PEFT's class of a layer, with ranks of its own; made late, since PEFT is imported late."""
    return type(f"Ranked{layer_class.__name__}", (RankedLayer, layer_class), {})


def _largest_rank(plan: SharingPlan) -> int:
    return max(group.r for group in plan.groups)


def _shapes(plan: SharingPlan) -> dict[str, tuple[int, int]]:
    r = _largest_rank(plan)
    return {
        "vera_A": (r, max(t.in_features for t in plan.targets)),
        "vera_B": (max(t.out_features for t in plan.targets), r),
    }
