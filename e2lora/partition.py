"""Similarities between layers, and every topology: which layers of a module type share.

A partition is a tuple of groups, each a tuple of *positions* in the module type's own list of
layers (0 … N-1). A similarity and a topology are one function each, and one line of
``SIMILARITIES`` or ``TOPOLOGIES``. Sources: E²LoRA, ICLR 2026, and for its two controls none.
"""

from __future__ import annotations

import itertools
import math
import random
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from e2lora.config import ExplicitGroup, PlanConfig
from e2lora.moments import Moments, TypeGradients, merge

Matrix = NDArray[np.float64]
Partition = tuple[tuple[int, ...], ...]


# ---- similarities -----------------------------------------------------------------------------


def rmi(a: Moments, b: Moments) -> float:
    """Relative mutual information of two gradients, free of their common scale.

    ``log2(1 + exp(-2Δ))`` with Δ = |log σ_a − log σ_b|: in (0, 1], and 1 exactly for equal σ.

    >>> one = Moments(count=4, mean=0.0, std=1.0, mean_abs=0.8)
    >>> rmi(one, one)
    1.0
    """
    gap = abs(math.log(a.std) - math.log(b.std))
    return math.log1p(math.exp(-2.0 * gap)) / math.log(2.0)


def rmi_literal(a: Moments, b: Moments) -> float:
    """The published RMI as printed: (H_a + H_b − H_ab) / min(H_a, H_b), H_ab of both together.

    >>> narrow = Moments(count=4, mean=0.0, std=0.01, mean_abs=0.008)
    >>> rmi_literal(narrow, narrow)
    1.0
    """
    return (a.entropy + b.entropy - merge((a, b)).entropy) / min(a.entropy, b.entropy)


def kl(a: Moments, b: Moments) -> float:
    """exp(−[KL(a‖b) + KL(b‖a)]) of the Gaussians of equal mean and σ; free of a common scale.

    >>> one = Moments(count=4, mean=0.0, std=1.0, mean_abs=0.8)
    >>> kl(one, one)
    1.0
    """
    apart = a.mean - b.mean
    ratio, shift = (a.std / b.std) ** 2, apart / b.std
    both_ways = 0.5 * (ratio + shift**2 + 1 / ratio + (apart / a.std) ** 2) - 1.0
    return math.exp(-both_ways)


def _of_moments(similarity: Callable[[Moments, Moments], float], layers: TypeGradients) -> Matrix:
    num = len(layers.moments)
    matrix = np.empty((num, num))
    for i, a in enumerate(layers.moments):
        for j in range(i, num):
            matrix[i, j] = matrix[j, i] = similarity(a, layers.moments[j])
    return matrix


def _rmi_literal_matrix(layers: TypeGradients) -> Matrix:
    highest = max(layers.entropies)
    if highest >= 0:
        raise ValueError(
            "similarity 'rmi_literal' needs entropies that are all negative: it divides by them, "
            "so with positive ones the most alike layers come out least similar, and near 0 it "
            f"diverges; got one of {highest:+.3f}. Use similarity='rmi', which the printed one "
            "tends to as the loss is scaled down."
        )
    return _of_moments(rmi_literal, layers)


def _pairs(layers: TypeGradients, statistic: str) -> Matrix:
    if layers.pairs is None:
        raise ValueError(
            "similarities cosine, l1 and l2 compare whole gradients; this profile holds no pairs "
            "of layers. Measure one with calibration.pairwise=True (`jobs/plan.py` does, where it "
            "measures itself)."
        )
    return np.asarray(getattr(layers.pairs, statistic))[np.ix_(layers.rows, layers.rows)]


def _cosine_matrix(layers: TypeGradients) -> Matrix:
    inner = _pairs(layers, "inner")
    lengths = np.sqrt(np.diag(inner))
    cosines = inner / np.outer(lengths, lengths)
    np.fill_diagonal(cosines, 1.0)
    return cosines


SIMILARITIES: dict[str, Callable[[TypeGradients], Matrix]] = {
    "rmi": lambda layers: _of_moments(rmi, layers),
    "rmi_literal": _rmi_literal_matrix,
    "kl": lambda layers: _of_moments(kl, layers),
    "cosine": _cosine_matrix,
    "l1": lambda layers: -_pairs(layers, "l1"),
    "l2": lambda layers: -_pairs(layers, "l2"),
}


def similarity_matrix(name: str, layers: TypeGradients) -> Matrix:
    """Symmetric (N, N) matrix of similarities between layers of one module type.

    Raises:
        ValueError: the similarity isn't defined for these gradients.
    """
    return SIMILARITIES[name](layers)


# ---- where E² cuts ----------------------------------------------------------------------------


def cut_by_similarity(similarity: Matrix) -> Partition:
    """E² layer sharing (LSS): an interval grows while its first layer likes the next one.

    With s the first layer of an interval, the next layer joins while sim(s, next) is at least
    the mean similarity of s to all other layers. That mean is taken less 1e-9 (of the largest
    similarity, which is 1 unless it is minus a distance), so that its rounding never splits equal
    layers.

    >>> cut_by_similarity(np.array([[1, 0.9, 0.1], [0.9, 1, 0.1], [0.1, 0.1, 1]]))
    ((0, 1), (2,))
    """
    num_layers = len(similarity)
    slack = 1e-9 * float(np.abs(similarity).max())
    intervals: list[tuple[int, ...]] = []
    start = 0
    while start < num_layers:
        others = [similarity[start, k] for k in range(num_layers) if k != start]
        threshold = math.fsum(others) / len(others) - slack if others else 0.0
        end = start + 1
        while end < num_layers and similarity[start, end] >= threshold:
            end += 1
        intervals.append(tuple(range(start, end)))
        start = end
    return tuple(intervals)


# ---- topologies -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """The layers of one module type, as a topology sees them; gradients where it needs them."""

    module_type: str
    layers: tuple[int, ...]
    gradients: TypeGradients | None = None

    def __len__(self) -> int:
        return len(self.layers)


def _none(stack: Stack, options: PlanConfig) -> Partition:
    return tuple((i,) for i in range(len(stack)))


def _all(stack: Stack, options: PlanConfig) -> Partition:
    return (tuple(range(len(stack))),)


def _blocks(stack: Stack, options: PlanConfig) -> Partition:
    size = options.block_size
    assert size is not None  # PlanConfig requires it for `blocks`
    _require_at_most(len(stack), size, "block_size", stack)
    return tuple(tuple(range(len(stack))[i : i + size]) for i in range(0, len(stack), size))


def _strided(stack: Stack, options: PlanConfig) -> Partition:
    stride = options.stride
    assert stride is not None
    _require_at_most(len(stack), stride, "stride", stack)
    return tuple(tuple(range(first, len(stack), stride)) for first in range(stride))


def _e2(stack: Stack, options: PlanConfig) -> Partition:
    assert stack.gradients is not None  # build_plan asks for a profile first
    return cut_by_similarity(similarity_matrix(options.similarity, stack.gradients))


def _matched(stack: Stack, options: PlanConfig) -> Partition:
    """Control: blocks of equal length (to one layer), as many as E² finds."""
    num = len(_e2(stack, options))
    return tuple(tuple(map(int, part)) for part in np.array_split(range(len(stack)), num))


def _random(stack: Stack, options: PlanConfig) -> Partition:
    """Control: a partition drawn evenly from those with so many contiguous intervals."""
    num = options.num_intervals or len(_e2(stack, options))
    _require_at_most(len(stack), num, "num_intervals", stack)
    name = zlib.crc32(stack.module_type.encode())  # types are cut independently
    rng = random.Random(f"{options.partition_seed} {name}")
    cuts = [0, *sorted(rng.sample(range(1, len(stack)), num - 1)), len(stack)]
    return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(cuts))


def _explicit(stack: Stack, options: PlanConfig) -> Partition:
    position = {layer: i for i, layer in enumerate(stack.layers)}
    groups = explicit_groups(stack, options)
    given = Counter(layer for group in groups for layer in group.layers)
    wrong = sorted(given - Counter(stack.layers)), sorted(Counter(stack.layers) - given)
    if any(wrong):
        raise ValueError(
            "explicit `groups` must hold each layer of a module type exactly once; for "
            f"{stack.module_type} these are unknown or too many: {wrong[0] or 'none'}, and these "
            f"are missing: {wrong[1] or 'none'}. Correct the groups of that module; each module "
            "type that is adapted needs some."
        )
    return tuple(tuple(position[layer] for layer in group.layers) for group in groups)


def explicit_groups(stack: Stack, options: PlanConfig) -> list[ExplicitGroup]:
    """The groups that the user wrote for this module type, by depth, however they were written."""
    mine = [g for g in options.groups or () if names_type(g.module, stack.module_type)]
    in_order = [g.model_copy(update={"layers": tuple(sorted(g.layers))}) for g in mine]
    return sorted(in_order, key=lambda group: group.layers)


def names_type(module: str, module_type: str) -> bool:
    """Whether a name, as in ``target_modules``, ends the path of a module type.

    >>> names_type("q_proj", "model.layers.*.self_attn.q_proj")
    True
    """
    path = module_type.partition(" ")[0]  # a type of several shapes has its shape behind it
    return module in (module_type, path) or path.endswith(f".{module}")


def _require_at_most(num_layers: int, value: int, option: str, stack: Stack) -> None:
    if value > num_layers:
        raise ValueError(
            f"`{option}` can't exceed the layers of a module type; got {option}={value} for "
            f"{num_layers} layers of {stack.module_type}. Use at most {num_layers}."
        )


TOPOLOGIES: dict[str, Callable[[Stack, PlanConfig], Partition]] = {
    "none": _none,
    "all": _all,
    "blocks": _blocks,
    "strided": _strided,
    "random": _random,
    "matched": _matched,
    "explicit": _explicit,
    "e2": _e2,
}
