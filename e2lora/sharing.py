"""One module type: gradients + options → who shares, and at what rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from e2lora.config import PlanConfig
from e2lora.partition import TOPOLOGIES, Partition, Stack, explicit_groups
from e2lora.ranks import ALLOCATIONS, BUDGETS, NEGLIGIBLE_SPREAD, allocate_ranks
from e2lora.stability import TypeSharing


class Spending(NamedTuple):
    """In the units of the budget option."""

    available: int
    spent: int


@dataclass(frozen=True)
class Shared:
    """Positions that share, their ranks, what was spent if ranks were allocated, what to note."""

    stack: Stack
    partition: Partition
    ranks: tuple[int, ...]
    spending: Spending | None = None
    note: str = ""

    def per_layer(self) -> TypeSharing:
        group_of = {k: number for number, group in enumerate(self.partition) for k in group}
        order = tuple(group_of[k] for k in range(len(self.stack)))
        return TypeSharing(self.stack.layers, order, tuple(self.ranks[k] for k in order))


def share(stack: Stack, options: PlanConfig, max_rank: int) -> Shared:
    """Partition, then ranks: each group's own, the base rank, or by allocation under the budget.

    Args:
        stack: with gradients where ``options.needs_profile``.
        max_rank: min(in, out) of the module type.

    Raises:
        ValueError: similarity or allocation isn't defined for these gradients.
    """
    partition = TOPOLOGIES[options.topology](stack, options)
    if options.rank_allocation == "uniform":
        own = [group.r for group in explicit_groups(stack, options)] or [None] * len(partition)
        return Shared(stack, partition, tuple(r or options.r for r in own))
    assert stack.gradients is not None  # build_plan asks for a profile first
    entropies = stack.gradients.entropies
    highest = [max(entropies[k] for k in group) for group in partition]
    weights = ALLOCATIONS[options.rank_allocation](highest, min(entropies), options.beta)
    available, costs = BUDGETS[options.budget]([len(group) for group in partition], options.r)
    ranks = allocate_ranks(weights, costs, available, max_rank)
    spent = sum(cost * r for cost, r in zip(costs, ranks, strict=True))
    note, spread = "", max(highest) - min(highest)
    if options.rank_allocation == "softmax" and 0 < spread < NEGLIGIBLE_SPREAD:
        note = (
            f"the entropies of its intervals lie within {spread:.1g} nats, yet allocation "
            "'softmax' spreads their weights by e²; 'entropy_power' would not."
        )
    return Shared(stack, partition, tuple(ranks), Spending(available, spent), note)
