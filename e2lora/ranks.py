"""Integer ranks of the intervals of one module type under a budget (E² rank allocation, HRA).

Entropies → positive weights (``ALLOCATIONS``) → ranks whose price keeps a budget (``BUDGETS``).
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Callable, Sequence

from e2lora.moments import HALF_LOG_2PI_E

TEMPERATURE = 0.5
NEGLIGIBLE_SPREAD = 0.01
"""Nats: entropies closer than this differ by less than 1 % in σ."""


def entropy_power(entropies: Sequence[float], lowest: float, beta: float) -> list[float]:
    """Weights e^(βH), relative to the largest: proportional to σ^β; β = 0 is uniform.

    >>> entropy_power([0.0, math.log(4.0)], lowest=0.0, beta=0.5)
    [0.5, 1.0]
    """
    if beta < 0:
        raise ValueError(
            f"`beta` must be at least 0, so that more information gets no less rank; got {beta}."
        )
    highest = max(entropies)
    return [math.exp(beta * (entropy - highest)) for entropy in entropies]


def softmax(entropies: Sequence[float], lowest: float, beta: float) -> list[float]:
    """Softmax at temperature 0.5 of entropies normalised to [0, 1] over the intervals (GoRA's).

    However close the entropies are, the weights span a ratio of e²; equal ones are uniform.

    >>> [round(weight, 3) for weight in softmax([-8.0, -7.0], lowest=-9.0, beta=0.5)]
    [0.119, 0.881]
    """
    low, spread = min(entropies), max(entropies) - min(entropies)
    if spread == 0.0:
        return [1.0 / len(entropies)] * len(entropies)
    powers = [math.exp((entropy - low) / spread / TEMPERATURE) for entropy in entropies]
    return [power / math.fsum(powers) for power in powers]


def shifted(entropies: Sequence[float], lowest: float, beta: float) -> list[float]:
    """H − H_min + ½ log 2π + ½, with H_min (``lowest``) over the type's layers.

    >>> [round(weight, 3) for weight in shifted([-8.0, -7.0], lowest=-8.0, beta=0.5)]
    [1.419, 2.419]
    """
    return [entropy - lowest + HALF_LOG_2PI_E for entropy in entropies]


def literal(entropies: Sequence[float], lowest: float, beta: float) -> list[float]:
    """H over the sum of all H, as printed. With negative H, more information gets *less* weight.

    Raises:
        ValueError: entropies of both signs, or of 0, which give no positive weights.

    >>> literal([-6.0, -2.0], lowest=-6.0, beta=0.5)
    [0.75, 0.25]
    """
    if not (max(entropies) < 0 or min(entropies) > 0):
        raise ValueError(
            "allocation 'literal' divides entropies by their sum and needs them all of one sign; "
            f"got some between {min(entropies):+.3f} and {max(entropies):+.3f}. Use "
            "allocation='entropy_power'."
        )
    total = math.fsum(entropies)
    return [entropy / total for entropy in entropies]


ALLOCATIONS: dict[str, Callable[[Sequence[float], float, float], list[float]]] = {
    "entropy_power": entropy_power,
    "softmax": softmax,
    "shifted": shifted,
    "literal": literal,
}
"""Name → (entropies of the intervals, lowest entropy of the type's layers, beta) → weights."""


def layer_budget(lengths: Sequence[int], r: int) -> tuple[int, list[int]]:
    """Budget and price of one rank per interval: the rank a layer sees averages ``r``.

    >>> layer_budget([2, 1], r=4)
    (12, [2, 1])
    """
    return sum(lengths) * r, list(lengths)


def interval_budget(lengths: Sequence[int], r: int) -> tuple[int, list[int]]:
    """The ranks of the intervals average ``r``.

    >>> interval_budget([2, 1], r=4)
    (8, [1, 1])
    """
    return len(lengths) * r, [1] * len(lengths)


def parameter_budget(lengths: Sequence[int], r: int) -> tuple[int, list[int]]:
    """As many parameters as LoRA has at ``r`` in every layer: the printed formula, read literally.

    >>> parameter_budget([2, 1], r=4)
    (12, [1, 1])
    """
    return sum(lengths) * r, [1] * len(lengths)


BUDGETS: dict[str, Callable[[Sequence[int], int], tuple[int, list[int]]]] = {
    "layer": layer_budget,
    "interval": interval_budget,
    "parameter": parameter_budget,
}
"""Name → (lengths of the intervals, base rank) → what may be spent, and what a rank costs each."""


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


def rank_for_count(target: int, count: Callable[[int], int], most: int) -> int:
    """The base rank in 1 … ``most`` whose count of parameters comes nearest to the target.

    Of two that are equally near it is the smaller one.

    Args:
        count: parameters at a base rank; never falls as the rank rises. Where the largest rank has
            fewer than the smallest (RandLoRA: larger bases, and fewer of them), all are tried.

    >>> rank_for_count(1000, lambda r: 96 * r, most=64)
    10
    >>> rank_for_count(700, lambda r: -(-64 // r) * (r + 64), most=64)  # ten bases, almost
    7
    """
    if count(1) > count(most):
        return min(range(1, most + 1), key=lambda r: (abs(count(r) - target), count(r), r))
    first_above = bisect.bisect_left(range(1, most + 1), target, key=count) + 1
    near = [r for r in (first_above - 1, first_above) if 1 <= r <= most]
    return min(near, key=lambda r: (abs(count(r) - target), count(r), r))
