"""LoRA and what differs from it by a configuration: DoRA, LoRA+, LoRA-FA.

``y = W x + (α/r) B A x``. PEFT builds one A and one B per layer at the plan's ranks; then every
layer is given the module of its scope's owner, so that a shared tensor *is* one parameter. A tensor
shared by layers of different rank is made at the largest and sliced to each layer's. Tie before an
optimizer exists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from e2lora.adapters.family import (
    Ability,
    Factors,
    Family,
    Request,
    common_options,
    inject,
    layers_of,
)
from e2lora.adapters.starting import Started, initial_tensors, require_floats, start
from e2lora.adapters.tensors import (
    FrozenLinear,
    PreconditionedLinear,
    Sliced,
    random_projection,
)
from e2lora.config import AdapterConfig, PlanConfig, Scope, fingerprint_of
from e2lora.plan import Group, SharingPlan

RANK_DIM = {"A": 0, "B": 1}
"""LoRA's two tensors → the dimension along which the rank lies."""

IN_ONE_LAYER = ("pissa", "olora")
"""Initialisations by the singular vectors of a layer's weight: they mean nothing to another's."""


class Lora(Family):
    """LoRA, all-shared, blocks, ShareLoRA-A, B and AB, E²LoRA, E²ShareLoRA."""

    key = "lora"
    initialisations: ClassVar[Sequence[str]] = (
        "default",
        "gaussian",
        "orthogonal",
        "pissa",
        "olora",
    )
    scopes: ClassVar[Sequence[str]] = ("interval", "layer", "type")
    trains_a: ClassVar[bool] = True

    def touches_base(self, config: AdapterConfig) -> bool:
        return config.init_lora_weights.startswith(IN_ONE_LAYER)

    def require_suits(self, plan: PlanConfig, config: AdapterConfig) -> None:
        super().require_suits(plan, config)
        init = config.init_lora_weights
        if init in ("default", "gaussian"):
            return
        if (config.a_scope, config.b_scope) != ("interval", "interval"):
            raise ValueError(
                f"initialisation {init!r} makes A and B for one another, so both must serve the "
                f"same layers; got a_scope={config.a_scope!r}, b_scope={config.b_scope!r}. Use "
                "'interval' for both, or init_lora_weights='default'."
            )

    def require_fits(self, plan: SharingPlan, config: AdapterConfig) -> None:
        super().require_fits(plan, config)
        init = config.init_lora_weights
        shared = [group for group in plan.groups if len(group.layers) > 1]
        if init.startswith(IN_ONE_LAYER) and shared:
            raise ValueError(
                f"initialisation {init!r} takes singular vectors of a layer's own weight, which "
                f"mean nothing to another layer; {shared[0].module_type} shares one adapter among "
                f"layers {list(shared[0].layers)}. Use topology 'none', or "
                "init_lora_weights='default'."
            )
        odd = [group for group in plan.groups if group.r % 2]
        if init == "orthogonal" and odd:
            raise ValueError(
                "orthogonal initialisation needs even ranks; "
                f"{odd[0].module_type} has r={odd[0].r} in layers {list(odd[0].layers)}. Use an "
                "even base rank with allocation='uniform', or init_lora_weights='default'."
            )

    def count(self, plan: SharingPlan, config: AdapterConfig) -> int:
        """Σ over module types: in · (ranks of A's owners) + out · (ranks of B's)."""
        total = 0
        for in_features, out_features, groups in shapes_and_groups(plan):
            if self.trains_a:
                total += in_features * _rank_units(groups, config.a_scope)
            total += out_features * _rank_units(groups, config.b_scope)
        return total

    def build(self, model: Any, request: Request) -> Any:
        touches_base = self.touches_base(request.config)
        if touches_base:
            require_floats(model, request.plan)
        adapted = inject(model, request.plan, self.peft_config(model, request), request.name)
        if touches_base:
            start(adapted, request, partial(self.choose, request))
        else:
            tie(adapted, request, freeze_a=not self.trains_a)
        return adapted

    def choose(self, request: Request, layer: Any, path: str) -> None:
        """Set A and B of PEFT's layer from its weight; where that is to be changed by them."""
        init = request.config.init_lora_weights
        if init == "olora":
            layer.olora_init(request.name)
        else:
            layer.pissa_init(request.name, init)

    def peft_config(self, model: Any, request: Request) -> Any:
        """PEFT's configuration of the same function, without the tying."""
        from peft import LoraConfig

        return LoraConfig(**self.peft_options(model, request))

    def peft_options(self, model: Any, request: Request) -> dict[str, Any]:
        init: str | bool = request.config.init_lora_weights
        if init == "default":
            init = True
        return {
            **common_options(model, request),
            **rank_options(request.plan),
            "lora_dropout": request.config.lora_dropout,
            "init_lora_weights": False if self.touches_base(request.config) else init,
        }

    def initial(self, adapted: Any, name: str) -> dict[str, Tensor]:
        return initial_tensors(adapted, name)

    def frozen(self, adapted: Any, name: str) -> dict[str, Tensor]:
        if self.trains_a:
            return {}
        return {
            path.removesuffix(f".{name}"): module.weight
            for path, module in adapted.named_modules()
            if isinstance(module, FrozenLinear) and path.endswith(f".{name}")
        }

    def factors(self, layer: Any, name: str) -> Factors:
        """On the original base: of rank 2r where the adapter changed it."""
        a, b = (
            module.on_original if isinstance(module, Started) else module.weight
            for module in (layer.lora_A[name], layer.lora_B[name])
        )
        return Factors(a, b, layer.scaling[name])


class Dora(Lora):
    """DoRA (Liu et al., 2024): the magnitude of each row stays the layer's own in every scope."""

    key = "dora"
    initialisations = ("default", "gaussian")
    lacks: ClassVar[Mapping[Ability, str]] = {
        "portable": "it rescales whole rows of the weight, which no A and B can say; merge it",
    }

    def count(self, plan: SharingPlan, config: AdapterConfig) -> int:
        return super().count(plan, config) + sum(t.out_features for t in plan.targets)

    def peft_options(self, model: Any, request: Request) -> dict[str, Any]:
        return super().peft_options(model, request) | {"use_dora": True}


class LoraPlus(Lora):
    """LoRA+ (Hayou et al., 2024): as PEFT's ``create_loraplus_optimizer``, by name."""

    key = "lora_plus"

    def left_to_the_loop(self, config: AdapterConfig) -> str:
        return f"B is to learn {config.lora_plus.lr_ratio:g} times as fast as A"

    def learning_rate_ratio(self, parameter_name: str, config: AdapterConfig) -> float:
        return config.lora_plus.lr_ratio if ".lora_B." in parameter_name else 1.0


class FrozenALora(Lora):
    """A is a random projection, made from ``projection_seed``; B alone is trained."""

    initialisations = ("default",)
    trains_a = False


class LoraFa(FrozenALora):
    """LoRA-FA (Zhang et al., 2023): each B with its own A, as PEFT's ``LoraFAOptimizer`` pairs them
    under no sharing. The gradient is mapped before clipping and Adam see it.
    """

    key = "lora_fa"

    def require_suits(self, plan: PlanConfig, config: AdapterConfig) -> None:
        super().require_suits(plan, config)
        width: dict[Scope, int] = {"layer": 0, "interval": 1, "type": 2}
        if width[config.b_scope] > width[config.a_scope]:
            raise ValueError(
                "LoRA-FA maps the gradient of each B through the one A it is paired with; with "
                f"b_scope={config.b_scope!r} and a_scope={config.a_scope!r} a B meets several. "
                "Give A the same scope or a wider one, or use family 'lori', which maps nothing."
            )

    def require_fits(self, plan: SharingPlan, config: AdapterConfig) -> None:
        super().require_fits(plan, config)
        for _, _, groups in shapes_and_groups(plan):
            ranks = sorted({group.r for group in groups})
            if config.b_scope == "type" and len(ranks) > 1:
                raise ValueError(
                    "LoRA-FA maps the gradient of each B through the one A it is paired with; a B "
                    f"at type scope needs one rank, and {groups[0].module_type} has {ranks}. Use "
                    "b_scope='interval', or allocation='uniform'."
                )

    def build(self, model: Any, request: Request) -> Any:
        adapted = super().build(model, request)
        name = request.name
        made: dict[Any, PreconditionedLinear] = {}
        for layer in layers_of(adapted, request.plan).values():
            b, a = layer.lora_B[name], layer.lora_A[name].weight
            if b not in made:
                made[b] = PreconditionedLinear(b, a, layer.scaling[name])
            layer.lora_B[name] = made[b]
        return adapted


def shapes_and_groups(plan: SharingPlan) -> Iterator[tuple[int, int, list[Group]]]:
    """In, out and the groups of each module type."""
    shapes = {t.module_type: (t.in_features, t.out_features) for t in plan.targets}
    for module_type, (in_features, out_features) in shapes.items():
        yield in_features, out_features, plan.groups_of(module_type)


def _rank_units(groups: Sequence[Group], scope: Scope) -> int:
    """The ranks of all tensors of a module type that has this scope, summed."""
    if scope == "type":
        return max(group.r for group in groups)
    return sum(group.r * (len(group.layers) if scope == "layer" else 1) for group in groups)


def rank_options(plan: SharingPlan) -> dict[str, Any]:
    """Ranks and α as PEFT takes them. ``alpha_pattern`` goes with ``rank_pattern``: PEFT divides
    each α by the layer's own rank.
    """
    options = plan.options
    own = {path: g for path, g in plan.group_of_target().items() if g.r != options.r}
    return {
        "r": options.r,
        "lora_alpha": options.lora_alpha,
        "use_rslora": options.use_rslora,
        "rank_pattern": {f"^{re.escape(path)}": group.r for path, group in own.items()},
        "alpha_pattern": {f"^{re.escape(path)}": g.lora_alpha for path, g in own.items()},
    }


def tie(adapted: Any, request: Request, freeze_a: bool = False) -> None:
    """Give each layer the A and B of its scope's owner: a layer, a group or a module type.

    An owner's tensor is that of its first layer of the largest rank.
    """
    plan, config, name = request.plan, request.config, request.name
    layers, groups = layers_of(adapted, plan), plan.group_of_target()
    for slot, dim in RANK_DIM.items():
        scope: Scope = config.a_scope if slot == "A" else config.b_scope
        members: dict[Any, list[str]] = {}
        for path, group in groups.items():
            owner = {"layer": path, "interval": group, "type": group.module_type}[scope]
            members.setdefault(owner, []).append(path)
        for paths in members.values():
            first = max(paths, key=lambda path: groups[path].r)
            whole = getattr(layers[first], f"lora_{slot}")[name]
            if slot == "A" and freeze_a:
                whole = _frozen(whole, first, config.projection_seed or 0)
            for path in paths:
                r = groups[path].r
                shared = whole if r == groups[first].r else Sliced(whole, r, dim)
                getattr(layers[path], f"lora_{slot}")[name] = shared


def _frozen(a: Any, owner: str, seed: int) -> FrozenLinear:
    """A random A in the place of a trained one: the same for the same seed and owner."""
    own_seed = int(fingerprint_of([seed, owner]), 16) % 2**63
    return FrozenLinear(random_projection(a.out_features, a.in_features, own_seed).to(a.weight))
