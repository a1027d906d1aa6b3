"""Similarities between layers, and every topology: which layers of a module type share.

A partition is a tuple of intervals, each a tuple of *positions* in the module type's own list of
layers (0 … N-1), in order. A topology is one function and one line of ``TOPOLOGIES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from e2lora.config import PlanConfig
from e2lora.moments import Moments

Partition = tuple[tuple[int, ...], ...]


def rmi(a: Moments, b: Moments) -> float:
    """Relative mutual information of two gradients, free of their common scale.

    ``log2(1 + exp(-2Δ))`` with Δ = |log σ_a − log σ_b|: in (0, 1], and 1 exactly for equal σ.

    >>> one = Moments(count=4, mean=0.0, std=1.0, mean_abs=0.8)
    >>> rmi(one, one)
    1.0
    """
    gap = abs(math.log(a.std) - math.log(b.std))
    return math.log1p(math.exp(-2.0 * gap)) / math.log(2.0)


SIMILARITIES: dict[str, Callable[[Moments, Moments], float]] = {"rmi": rmi}


def similarity_matrix(name: str, layers: Sequence[Moments]) -> NDArray[np.float64]:
    """Symmetric (N, N) matrix of similarities between the layers of one module type."""
    similarity = SIMILARITIES[name]
    matrix = np.empty((len(layers), len(layers)))
    for i, a in enumerate(layers):
        for j in range(i, len(layers)):
            matrix[i, j] = matrix[j, i] = similarity(a, layers[j])
    return matrix


def cut_by_similarity(similarity: NDArray[np.float64]) -> Partition:
    """E² layer sharing (LSS): an interval grows while its first layer likes the next one.

    With s the first layer of an interval, the next layer joins while sim(s, next) is at least
    the mean similarity of s to all other layers (less 1e-9, so that rounding of that mean never
    splits equal layers).

    >>> cut_by_similarity(np.array([[1, 0.9, 0.1], [0.9, 1, 0.1], [0.1, 0.1, 1]]))
    ((0, 1), (2,))
    """
    num_layers = len(similarity)
    intervals: list[tuple[int, ...]] = []
    start = 0
    while start < num_layers:
        others = [similarity[start, k] for k in range(num_layers) if k != start]
        threshold = math.fsum(others) / len(others) - 1e-9 if others else 0.0
        end = start + 1
        while end < num_layers and similarity[start, end] >= threshold:
            end += 1
        intervals.append(tuple(range(start, end)))
        start = end
    return tuple(intervals)


def _none(num_layers: int, options: PlanConfig, moments: Sequence[Moments] | None) -> Partition:
    return tuple((i,) for i in range(num_layers))


def _all(num_layers: int, options: PlanConfig, moments: Sequence[Moments] | None) -> Partition:
    return (tuple(range(num_layers)),)


def _blocks(num_layers: int, options: PlanConfig, moments: Sequence[Moments] | None) -> Partition:
    size = options.block_size
    assert size is not None  # PlanConfig requires it for `blocks`
    if size > num_layers:
        raise ValueError(
            f"a block can't be longer than its module type; got block_size={size} for "
            f"{num_layers} layers. Use at most {num_layers}, or topology='all'."
        )
    return tuple(tuple(range(i, min(i + size, num_layers))) for i in range(0, num_layers, size))


def _e2(num_layers: int, options: PlanConfig, moments: Sequence[Moments] | None) -> Partition:
    assert moments is not None  # build_plan asks for a profile first
    return cut_by_similarity(similarity_matrix(options.similarity, moments))


TOPOLOGIES: dict[str, Callable[[int, PlanConfig, Sequence[Moments] | None], Partition]] = {
    "none": _none,
    "all": _all,
    "blocks": _blocks,
    "e2": _e2,
}
NEEDS_PROFILE = frozenset({"e2"})
