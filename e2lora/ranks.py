"""Integer ranks of the intervals of one module type under a budget (E² rank allocation, HRA)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence


def entropy_power(entropies: Sequence[float], beta: float) -> list[float]:
    """Weights e^(βH), relative to the largest: proportional to σ^β; β = 0 is uniform.

    >>> entropy_power([0.0, math.log(4.0)], beta=0.5)
    [0.5, 1.0]
    """
    if beta < 0:
        raise ValueError(
            f"`beta` must be at least 0, so that more information gets no less rank; got {beta}."
        )
    highest = max(entropies)
    return [math.exp(beta * (entropy - highest)) for entropy in entropies]


def layer_budget(lengths: Sequence[int], r: int) -> tuple[int, list[int]]:
    """Budget and price of one rank per interval: the rank a layer sees averages ``r``.

    >>> layer_budget([2, 1], r=4)
    (12, [2, 1])
    """
    return sum(lengths) * r, list(lengths)


ALLOCATIONS: dict[str, Callable[[Sequence[float], float], list[float]]] = {
    "entropy_power": entropy_power
}
BUDGETS: dict[str, Callable[[Sequence[int], int], tuple[int, list[int]]]] = {"layer": layer_budget}


def allocate_ranks(
    weights: Sequence[float], costs: Sequence[int], budget: int, max_rank: int
) -> list[int]:
    """Grant ranks one at a time where ``weight / (rank + ½)`` is largest.

    Everyone starts at 1. The grant that would exceed the budget ends it (a cheaper one is never
    taken instead), so more weight never gets less rank and ranks never fall as the budget rises.
    Ties go to the earliest interval.

    Args:
        weights: positive, one per interval.
        costs: what one rank of each interval takes of the budget.
        max_rank: min(in, out) of the module type.

    >>> allocate_ranks([1.0, 2.0], costs=[1, 1], budget=6, max_rank=8)
    [2, 4]
    """
    ranks = [1] * len(weights)
    spent = sum(costs)
    queue = [(-weight / 1.5, k) for k, weight in enumerate(weights) if max_rank > 1]
    heapq.heapify(queue)
    while queue:
        _, k = heapq.heappop(queue)
        if spent + costs[k] > budget:
            break
        ranks[k] += 1
        spent += costs[k]
        if ranks[k] < max_rank:
            heapq.heappush(queue, (-weights[k] / (ranks[k] + 0.5), k))
    return ranks
