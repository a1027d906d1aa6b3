"""How far a plan would change with the calibration sample: plans of disjoint folds, compared.

A *cut* lies between two adjacent layers of a module type that don't share. Folds agree by the mean
Jaccard index over all pairs of them of their sets of cuts, and by how far the ranks of a layer lie
apart. What agreement chance alone gives stands beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from e2lora.config import Frozen


@dataclass(frozen=True)
class TypeSharing:
    """Who shares and at what rank in one module type: entries are per layer, in order of depth."""

    layers: tuple[int, ...]
    group_of: tuple[int, ...]
    rank_of: tuple[int, ...]

    @property
    def cuts(self) -> frozenset[int]:
        """The layers that don't share with the layer before them, the first layer aside.

        >>> sorted(TypeSharing((0, 1, 2), (0, 0, 1), (8, 8, 4)).cuts)
        [2]
        """
        before = zip(itertools.pairwise(self.group_of), self.layers[1:], strict=True)
        return frozenset(layer for (one, other), layer in before if one != other)


Sharing = Mapping[str, TypeSharing]


class TypeStability(Frozen):
    """One module type over the folds."""

    module_type: str
    cuts: dict[int, int] = Field(
        description="layer that some plan cuts before → how many folds do, 0 where only the plan "
        "of all samples does"
    )
    plan_cuts: tuple[int, ...] = Field(description="of the plan of all samples")
    lowest_ranks: tuple[int, ...] = Field(description="over the folds, per layer")
    highest_ranks: tuple[int, ...]


class Stability(Frozen):
    """How much the plans of the folds agree, over all module types."""

    num_folds: int
    samples_per_fold: int = Field(description="of the smallest fold")
    jaccard: float = Field(description="mean over pairs of folds; 1 where neither cuts")
    chance: float = Field(description="what as many cuts, placed at random, would agree by")
    rank_difference: float = Field(description="mean |Δr| of a layer, over pairs of folds")
    types: tuple[TypeStability, ...]
    verdict: str


def compare_folds(
    plan: Sharing, folds: Sequence[Sharing], samples_per_fold: int, r: int, cuts_vary: bool
) -> Stability:
    """Hold the plans of at least two folds against each other.

    Args:
        plan: of all samples.
        r: the base rank, for the verdict.
        cuts_vary: whether gradients decide the cuts; otherwise the verdict speaks of ranks alone.
    """
    pairs = list(itertools.combinations(folds, 2))
    jaccard = math.fsum(_jaccard(_cuts(a), _cuts(b)) for a, b in pairs) / len(pairs)
    chance = math.fsum(_chance(a, b) for a, b in pairs) / len(pairs)
    differences = [
        abs(one - other)
        for a, b in pairs
        for name in plan
        for one, other in zip(a[name].rank_of, b[name].rank_of, strict=True)
    ]
    difference = math.fsum(differences) / len(differences)
    return Stability(
        num_folds=len(folds),
        samples_per_fold=samples_per_fold,
        jaccard=jaccard,
        chance=chance,
        rank_difference=difference,
        types=tuple(_type_stability(name, plan, folds) for name in plan),
        verdict=_verdict(len(folds), samples_per_fold, jaccard, chance, difference, r, cuts_vary),
    )


def _type_stability(name: str, plan: Sharing, folds: Sequence[Sharing]) -> TypeStability:
    def over_folds(choose: Callable[..., int]) -> tuple[int, ...]:
        return tuple(choose(ranks) for ranks in zip(*(f[name].rank_of for f in folds), strict=True))

    seen = sorted(plan[name].cuts.union(*(fold[name].cuts for fold in folds)))
    return TypeStability(
        module_type=name,
        cuts={layer: sum(layer in fold[name].cuts for fold in folds) for layer in seen},
        plan_cuts=tuple(sorted(plan[name].cuts)),
        lowest_ranks=over_folds(min),
        highest_ranks=over_folds(max),
    )


def _cuts(sharing: Sharing) -> frozenset[tuple[str, int]]:
    return frozenset((name, cut) for name, of_type in sharing.items() for cut in of_type.cuts)


def _jaccard(a: frozenset[tuple[str, int]], b: frozenset[tuple[str, int]]) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0


def _chance(a: Sharing, b: Sharing) -> float:
    """Expected Jaccard index if each type's cuts, as many as there are, lay anywhere.

    >>> one, other = TypeSharing((0, 1, 2), (0, 0, 1), (1, 1, 1)), TypeSharing((0, 1, 2),
    ...     (0, 1, 1), (1, 1, 1))
    >>> _chance({"q": one}, {"q": other})  # the same place out of two, or not
    0.5
    """
    in_common = np.ones(1)  # probability of 0, 1, 2 … common cuts over the types so far
    for name, of_type in a.items():
        places, m, n = len(of_type.layers) - 1, len(of_type.cuts), len(b[name].cuts)
        ways = [math.comb(m, k) * math.comb(places - m, n - k) for k in range(min(m, n) + 1)]
        in_common = np.convolve(in_common, np.array(ways) / math.comb(places, n))
    total = len(_cuts(a)) + len(_cuts(b))
    if total == 0:
        return 1.0
    return math.fsum(p * k / (total - k) for k, p in enumerate(in_common))


def _verdict(
    num: int, samples: int, jaccard: float, chance: float, difference: float, r: int, cuts: bool
) -> str:
    folds = f"{num} folds of {samples} samples"
    ranks = f"a layer's rank differs by {difference:.1f} on average (base rank {r})"
    if not cuts:
        return f"Cuts don't depend on gradients; between {folds} {ranks}."
    if jaccard >= 1.0:
        finding = "every cut recurs"
    elif jaccard <= chance + 0.05:
        finding = "cuts recur no more than by chance"
    elif jaccard >= 0.8:
        finding = "most cuts recur"
    else:
        finding = "some cuts recur, others come and go"
    return (
        f"{finding[0].upper()}{finding[1:]} between {folds}: Jaccard index {jaccard:.2f} "
        f"({chance:.2f} by chance); {ranks}."
    )
