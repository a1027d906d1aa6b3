"""GoRA (He et al., 2025): ranks and the start of B from the gradient.

A group's importance is the mean of |W ⊙ G| over its layers, with G the sum of their gradients: that
of an update which they all share. Ranks are in proportion to it over the parameters that one rank
takes, between `min_ratio` · r and `max_ratio` · r, and together they take what LoRA of rank r takes
and no more.

A is random. B₀ is the least squares fit of a step against the gradient,
``s · B₀ A = −γ √(in/r) G P`` with P the projection on the rows of A. As these span about r/in of
all directions, the step is about γ‖G‖ long, whatever the rank. W is left as it is, so that a fresh
adapter has made this step: it changes the base's outputs by design. The scale s is α/√r at a
group's own rank, with or without the plan's rsLoRA. B learns `lr_ratio` times as fast as A.

Where limits are met the authors let ranks together take more or less than the budget; here the
other groups share what is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from e2lora.adapters.family import Request, base_layer, layers_of, require_gradients
from e2lora.adapters.lora import Lora, shapes_and_groups
from e2lora.config import AdapterConfig
from e2lora.partitioned import gathered, told_by_first
from e2lora.plan import Group, SharingPlan
from e2lora.targets import is_transposed

RANK = "rank"
"""The end of the stored name of a group's rank, under the path of its first layer."""


class Gora(Lora):
    key = "gora"
    initialisations = ("default",)
    scopes = ("interval",)
    no_allocation = "it allocates its own, by the gradients that it starts from"
    one_rank = "it is the average of those that it allocates"
    needs_gradients = True
    count_is_limit = True
    starts_moved = True

    def left_to_the_loop(self, config: AdapterConfig) -> str:
        return f"B is to learn {config.gora.lr_ratio:g} times as fast as A"

    def learning_rate_ratio(self, parameter_name: str, config: AdapterConfig) -> float:
        return config.gora.lr_ratio if ".lora_B." in parameter_name else 1.0

    def build(self, model: Any, request: Request) -> Any:
        first = first_paths(request.plan)
        if request.initial is not None:
            ranks = _kept_ranks(first, request.initial)
        else:
            require_gradients(self.name, request)
            ranks = allocated_ranks(model, request)
        adapted = super().build(model, replace(request, plan=_at_ranks(request.plan, ranks)))
        if request.initial is None:
            layers = layers_of(adapted, request.plan)
            for path in first.values():
                assert request.gradients is not None
                _step(layers[path], request.name, request.gradients[path], request.config)
        return adapted

    def initial(self, adapted: Any, name: str) -> dict[str, Tensor]:
        """The rank of every group, under the path of its first layer."""
        found: dict[Any, tuple[str, int]] = {}
        for path, layer in adapted.get_base_model().named_modules():
            if name in getattr(layer, "lora_A", {}):
                found.setdefault(layer.lora_A[name], (path, layer.r[name]))
        return {f"{path}.{RANK}": torch.tensor(r) for path, r in found.values()}


def first_paths(plan: SharingPlan) -> dict[Group, str]:
    """The path of each group's first layer, in the order of the groups."""
    found = {group: path for path, group in reversed(plan.group_of_target().items())}
    return {group: found[group] for group in plan.groups}


def allocated_ranks(model: Any, request: Request) -> list[int]:
    """The rank of each group, by the importance of its layers."""
    plan, options = request.plan, request.config.gora
    r = plan.groups[0].r
    costs, limits = [0] * len(plan.groups), [0] * len(plan.groups)
    place = {group: number for number, group in enumerate(plan.groups)}
    for in_features, out_features, groups in shapes_and_groups(plan):
        for number in (place[group] for group in groups):
            costs[number] = in_features + out_features
            limits[number] = min(round(options.max_ratio * r), in_features, out_features)
    least = max(1, math.floor(options.min_ratio * r))
    return allocate(_importances(model, request), costs, least, limits, r * sum(costs))


def allocate(
    importances: Sequence[float],
    costs: Sequence[int],
    least: int,
    limits: Sequence[int],
    budget: int,
) -> list[int]:
    """Ranks in proportion to importance over cost, within limits, that cost at most ``budget``.

    Rounded by largest remainders: what is left over is less than one more rank would cost, unless
    all are at their limits.

    >>> allocate([1.0, 3.0, 12.0], [10, 10, 20], least=2, limits=[8, 8, 8], budget=160)
    [3, 3, 5]
    """
    weights = [importance / cost for importance, cost in zip(importances, costs, strict=True)]

    def shares(level: float) -> list[float]:
        return [
            min(max(level * weight, least), limit)
            for weight, limit in zip(weights, limits, strict=True)
        ]

    def cost(ranks: Sequence[float]) -> float:
        return math.fsum(rank * each for rank, each in zip(ranks, costs, strict=True))

    low, high = 0.0, max(limits) / min(weights)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(shares(middle)) <= budget else (low, middle)
    exact = shares(low)
    ranks = [math.floor(share) for share in exact]
    for number in sorted(range(len(ranks)), key=lambda k: ranks[k] - exact[k]):
        if ranks[number] < limits[number] and cost(ranks) + costs[number] <= budget:
            ranks[number] += 1
    return ranks


def _importances(model: Any, request: Request) -> list[float]:
    """Mean |W ⊙ G| of each group, a mean over its layers."""
    from peft.utils.integrations import dequantize_module_weight

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert request.gradients is not None
    sums: dict[Group, list[float]] = {group: [] for group in request.plan.groups}
    for path, group in request.plan.group_of_target().items():
        base = base_layer(inner, path)
        with gathered([base.weight]), torch.no_grad():
            lying = dequantize_module_weight(base)  # itself, unless it is of four bits
            weight = lying.T if is_transposed(base) else lying
            gradient = request.gradients[path].to(weight.device)
            mean = (weight.double() * gradient.double()).abs().mean()
        sums[group].append(float(told_by_first(mean, base.weight)))
    return [math.fsum(means) / len(means) for means in sums.values()]


def _at_ranks(plan: SharingPlan, ranks: Sequence[int]) -> SharingPlan:
    """As PEFT is to build it: each group at its rank, at the scale α/√r."""
    alpha = plan.options.lora_alpha
    groups = tuple(
        group.model_copy(update={"r": r, "lora_alpha": alpha})
        for group, r in zip(plan.groups, ranks, strict=True)
    )
    options = plan.options.model_copy(update={"use_rslora": True})
    return plan.model_copy(update={"options": options, "groups": groups})


@torch.no_grad()
def _step(layer: Any, name: str, gradient: Tensor, config: AdapterConfig) -> None:
    """Set B (out × r) so that s·BA is the step which GoRA starts with."""
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    factor = -config.gora.gamma * math.sqrt(layer.in_features / len(a)) / layer.scaling[name]
    start = factor * gradient.to(a.device).double() @ torch.linalg.pinv(a.double())
    b.copy_(told_by_first(start.to(b.dtype), layer.get_base_layer().weight))


def _kept_ranks(first: Mapping[Group, str], initial: Mapping[str, Tensor]) -> list[int]:
    """Of an earlier adapter of the same plan."""
    lacking = [path for path in first.values() if f"{path}.{RANK}" not in initial]
    if lacking:
        raise ValueError(
            "the ranks that GoRA chose must be there to be taken again; there is none of "
            f"{lacking[:3]}. The folder or checkpoint is damaged: take another copy."
        )
    return [int(initial[f"{path}.{RANK}"]) for path in first.values()]
