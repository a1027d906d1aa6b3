"""Which suggestions decided the scores: functional analysis of variance of a regression forest.

After Hutter, Hoos & Leyton-Brown (2014): a forest is fitted to suggestions → score, and the
variance of its predictions over the whole space is split into what each suggestion explains alone
and what only several together do. Every suggestion is weighted evenly over its range, not by how
often a sampler chose it. A forest explains noise as readily as signal, so how well it predicts
trials that its trees have not seen (R², out of bag) decides whether its shares are worth a look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_TRIALS = 20
LEAST_R2 = 0.1
TREES = 64
LEAST_LEAF = 2
MOST_CHOICES = 8  # more different numbers than these are a range, not a choice

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Share:
    """Of the variance of the scores that a suggestion explains alone, from 0 to 1.

    Attributes:
        n: trials that have the suggestion: fewer than all where it is conditional.
        error: standard error of ``alone`` over the trees of the forest.
    """

    name: str
    alone: float
    error: float
    n: int
    is_conditional: bool


@dataclass(frozen=True)
class Importances:
    """Shares by size, or ``refusal``: why there are none."""

    shares: tuple[Share, ...] = ()
    together: float = 0.0
    n: int = 0
    r2: float = math.nan
    refusal: str = ""


def importances(
    params: Sequence[Mapping[str, Any]], values: Sequence[float], seed: int = 0
) -> Importances:
    """Of every suggestion that takes more than one value.

    A suggestion that only some trials have is conditional: its share is of the variance among those
    that have it, beside those that all of them have.

    Args:
        params: of each trial: suggestion → value.
        values: the trials' scores, in the same order.
    """
    if len(values) < LEAST_TRIALS:
        return Importances(
            n=len(values),
            refusal=f"too few trials: {len(values)} complete, and it takes {LEAST_TRIALS}",
        )
    if max(values) == min(values):
        return Importances(n=len(values), refusal="all trials have the same score")
    counts = {name: sum(name in p for p in params) for name in {n for p in params for n in p}}
    common = sorted(name for name, count in counts.items() if count == len(params))
    varying = [name for name in common if len({repr(p[name]) for p in params}) > 1]
    if not varying:
        return Importances(n=len(values), refusal="no suggestion takes more than one value")
    alone, r2 = _analyse([[p[name] for name in varying] for p in params], values, seed)
    if r2 < LEAST_R2:
        return Importances(
            n=len(values),
            r2=r2,
            refusal="the suggestions don't tell the score: a forest fitted to them explains "
            f"{max(r2, 0.0):.0%} of the variance of trials that it has not seen",
        )
    shares = [_share(name, alone[:, k], len(params), False) for k, name in enumerate(varying)]
    for name in sorted(counts.keys() - set(common)):
        having = [k for k, p in enumerate(params) if name in p]
        scores = [values[k] for k in having]
        several = len({repr(params[k][name]) for k in having}) > 1
        if len(having) < LEAST_TRIALS or not several or max(scores) == min(scores):
            continue
        rows = [[params[k][other] for other in (*varying, name)] for k in having]
        found, own_r2 = _analyse(rows, scores, seed)
        if own_r2 >= LEAST_R2:
            shares.append(_share(name, found[:, -1], len(having), True))
    shares.sort(key=lambda share: -share.alone)
    together = 1.0 - float(alone.mean(axis=0).sum())
    return Importances(tuple(shares), max(together, 0.0), len(values), r2)


def _share(name: str, of_trees: Floats, n: int, is_conditional: bool) -> Share:
    error = float(of_trees.std(ddof=1)) / math.sqrt(len(of_trees))
    return Share(name, float(of_trees.mean()), error, n, is_conditional)


def _analyse(
    rows: Sequence[Sequence[Any]], values: Sequence[float], seed: int
) -> tuple[Floats, float]:
    """Shares (trees x columns), and R² out of bag."""
    y = np.asarray(values, dtype=float)
    columns = [_Column.of([row[k] for row in rows]) for k in range(len(rows[0]))]
    codes = np.stack([column.codes for column in columns], axis=1)  # trials x columns
    random = np.random.default_rng(seed)
    shares, sums, votes = [], np.zeros(len(y)), np.zeros(len(y))
    for _ in range(TREES):
        drawn = random.integers(len(y), size=len(y))
        leaves = _grow(codes[drawn], y[drawn], columns)
        unseen = np.setdiff1d(np.arange(len(y)), drawn)
        sums[unseen] += _predict(leaves, codes[unseen])
        votes[unseen] += 1
        shares.append(first_order(leaves, [column.weights for column in columns]))
    told = votes > 0
    errors = (sums[told] / votes[told] - y[told]) ** 2
    r2 = 1.0 - float(errors.mean()) / float(((y[told] - y[told].mean()) ** 2).mean())
    known = [share for share in shares if share is not None] or [np.zeros(len(columns))]
    return np.asarray(known), r2


@dataclass(frozen=True)
class _Column:
    """A suggestion's values as levels 0, 1, …: in order, where it is a number.

    Attributes:
        weights: of each level, of the whole range (of numbers: their logarithm, if all are positive
            and span a factor of ten).
    """

    codes: NDArray[np.int64]
    weights: Floats
    is_ordered: bool

    @classmethod
    def of(cls, values: Sequence[Any]) -> _Column:
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        levels = sorted(set(values)) if numbers else list(dict.fromkeys(map(repr, values)))
        place = {level: k for k, level in enumerate(levels)}
        codes = np.asarray([place[v if numbers else repr(v)] for v in values], dtype=np.int64)
        weights = np.full(len(levels), 1.0 / len(levels))
        if numbers and len(levels) > MOST_CHOICES:
            x = np.asarray(levels, dtype=float)
            x = np.log(x) if x[0] > 0 and x[-1] / x[0] >= 10 else x
            edges = np.concatenate([x[:1], (x[1:] + x[:-1]) / 2, x[-1:]])
            weights = np.diff(edges) / (x[-1] - x[0])
        return cls(codes, weights, numbers)


@dataclass(frozen=True)
class Leaf:
    """A box of a tree: for each column a mask over its levels, and the mean score in it."""

    masks: tuple[NDArray[np.bool_], ...]
    value: float


def _grow(codes: NDArray[np.int64], y: Floats, columns: Sequence[_Column]) -> list[Leaf]:
    """A regression tree, split where the squared error falls most."""
    masks = tuple(np.ones(len(column.weights), dtype=bool) for column in columns)
    pending, leaves = [(masks, np.arange(len(y)))], []
    while pending:
        masks, members = pending.pop()
        split = _best_split(codes[members], y[members], columns)
        if split is None:
            leaves.append(Leaf(masks, float(y[members].mean())))
            continue
        column, left = split
        for side in (left, ~left):
            own = (*masks[:column], masks[column] & side, *masks[column + 1 :])
            pending.append((own, members[side[codes[members, column]]]))
    return leaves


def _best_split(
    codes: NDArray[np.int64], y: Floats, columns: Sequence[_Column]
) -> tuple[int, NDArray[np.bool_]] | None:
    """The column, and which of its levels go left; None where no split lowers the error."""
    best, found, total = 1e-12 * max(float((y**2).sum()), 1e-300), None, float(y.sum())
    for k, column in enumerate(columns):
        size = len(column.weights)
        counts = np.bincount(codes[:, k], minlength=size)
        sums = np.bincount(codes[:, k], weights=y, minlength=size)
        present = np.flatnonzero(counts)
        if len(present) < 2:
            continue
        # Levels without an order are put in that of their means, which holds the best split of all.
        order = (
            present if column.is_ordered else present[np.argsort(sums[present] / counts[present])]
        )
        n_left, sum_left = counts[order].cumsum()[:-1], sums[order].cumsum()[:-1]
        n_right = len(y) - n_left
        gains = sum_left**2 / n_left + (total - sum_left) ** 2 / n_right - total**2 / len(y)
        gains = np.where((n_left >= LEAST_LEAF) & (n_right >= LEAST_LEAF), gains, -np.inf)
        cut = int(np.argmax(gains))
        if gains[cut] > best:
            left = np.zeros(size, dtype=bool)
            left[: order[cut] + 1] = column.is_ordered
            left[order[: cut + 1]] = True
            best, found = float(gains[cut]), (k, left)
    return found


def _predict(leaves: Sequence[Leaf], codes: NDArray[np.int64]) -> Floats:
    predicted = np.zeros(len(codes))
    for leaf in leaves:
        inside = np.ones(len(codes), dtype=bool)
        for k, mask in enumerate(leaf.masks):
            inside &= mask[codes[:, k]]
        predicted[inside] = leaf.value
    return predicted


def first_order(leaves: Sequence[Leaf], weights: Sequence[Floats]) -> Floats | None:
    """Share of a tree's variance that each column explains alone; None for a tree of one leaf.

    Exact: the leaves' boxes part the product of all levels, which has the product of the weights.

    >>> halves = [Leaf((np.array([True, False]), np.ones(2, bool)), 0.0),
    ...           Leaf((np.array([False, True]), np.ones(2, bool)), 1.0)]
    >>> first_order(halves, [np.full(2, 0.5)] * 2)
    array([1., 0.])
    """
    values = np.asarray([leaf.value for leaf in leaves])
    within = np.asarray(
        [[w[mask].sum() for w, mask in zip(weights, leaf.masks, strict=True)] for leaf in leaves]
    )  # leaves x columns: the share of each column's range that the box holds
    volumes = within.prod(axis=1)
    mean = float(volumes @ values)
    variance = float(volumes @ (values - mean) ** 2)
    if variance <= 0:
        return None
    shares = []
    for k, w in enumerate(weights):
        others = np.delete(within, k, axis=1).prod(axis=1)
        masks = np.stack([leaf.masks[k] for leaf in leaves])  # leaves x levels
        marginal = (values * others) @ masks
        shares.append(float(w @ (marginal - mean) ** 2) / variance)
    return np.asarray(shares)
