"""Which trials are not beaten, how sure a proportion is, and whether two systems really differ.

Pure functions of numbers. Outcomes are one number per item, in item order; two systems scored on
the same items are compared item by item, and seed by seed where each was trained with several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from e2lora.crossed import CrossedVariance

Direction = Literal["maximize", "minimize"]

RESAMPLES = 9999  # of a permutation test or bootstrap; the smallest p-value is then 0.0002
BATCH = 256  # resamples held at once: bounds memory to BATCH x n numbers


class Interval(NamedTuple):
    """A confidence interval; both ends belong to it."""

    low: float
    high: float


ANYWHERE, SHARES = Interval(-np.inf, np.inf), Interval(0.0, 1.0)
"""Ranges of a metric: of any, and of a share of items."""


@dataclass(frozen=True)
class PairedTest:
    """Whether two systems differ on the same n items: ``difference`` is mean(a) − mean(b).

    Attributes:
        num_seeds: that each was trained with. With 1 the test speaks of two trained models.
    """

    difference: float
    interval: Interval
    p_value: float
    n: int
    method: str
    num_seeds: int = 1


def pareto_front(values: Sequence[Sequence[float]], directions: Sequence[Direction]) -> list[int]:
    """Indices of the rows of ``values`` (points x objectives) that no other row dominates.

    A row dominates another if it is nowhere worse and somewhere better; so equal rows never
    dominate each other, and all of them are kept.

    Raises:
        ValueError: a direction that is neither word, a row of another length, a NaN.

    >>> pareto_front([(0.8, 100), (0.7, 50), (0.7, 60), (0.7, 50)], ["maximize", "minimize"])
    [0, 1, 3]
    """
    unknown = [word for word in directions if word not in ("maximize", "minimize")]
    if unknown:
        raise ValueError(
            f"a direction is 'maximize' or 'minimize'; got {unknown[0]!r}. Correct it."
        )
    wrong = [row for row in values if len(row) != len(directions) or np.isnan(row).any()]
    if wrong:
        raise ValueError(
            f"every point needs {len(directions)} numbers, one per direction, none of them NaN; "
            f"got {tuple(wrong[0])}. Leave out trials that were not scored."
        )
    signs = np.where(np.asarray(directions) == "maximize", 1.0, -1.0)
    scores = np.asarray(values, dtype=float).reshape(len(values), len(directions)) * signs
    front = []
    for i, row in enumerate(scores):
        dominating = (scores >= row).all(axis=1) & (scores > row).any(axis=1)
        if not dominating.any():
            front.append(i)
    return front


def proportion_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927): sensible even at 0 and at n.

    Raises:
        ValueError: successes outside 0 … n, or no items.

    >>> low, high = proportion_interval(50, 100)
    >>> round(low, 3), round(high, 3)
    (0.404, 0.596)
    """
    if not (0 <= successes <= n and n > 0):
        raise ValueError(
            "a proportion needs at least one item, and successes between 0 and their number; got "
            f"{successes} of {n}. Count the outcomes again."
        )
    result = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Interval(float(result.low), float(result.high))


def is_binary(outcomes: ArrayLike) -> bool:
    """Whether all outcomes are 0 or 1.

    >>> is_binary([0, 1.0]), is_binary([0.5, 1])
    (True, False)
    """
    return bool(np.isin(np.asarray(outcomes, dtype=float), (0.0, 1.0)).all())


def paired_test(a: ArrayLike, b: ArrayLike, confidence: float = 0.95, seed: int = 0) -> PairedTest:
    """Test, two-sided, that two systems have equal mean outcome on the same items.

    Where all outcomes are 0 or 1: McNemar's test in its exact form, a sign test on the discordant
    items (McNemar 1947), with the adjusted Wald interval of Bonett & Price (2012), which adds one
    to both discordant counts and so keeps a width when all items agree. Otherwise: a permutation
    test that exchanges a and b within items, and the percentile bootstrap over items. Test and
    interval are different methods and can disagree where the evidence is on the edge.

    Args:
        a, b: outcomes of shape (n,), item i of both being the same item.
        seed: of permutations and bootstrap; unused for 0/1 outcomes.

    Raises:
        ValueError: different numbers of items, too few of them, or outcomes that are not finite.

    >>> test = paired_test([1, 1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 1, 1])
    >>> test.difference, test.p_value  # 6 items won, 1 lost: 2 (1 + 7) / 2^7
    (0.625, 0.125)
    """
    left, right = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if left.ndim != 1 or left.shape != right.shape:
        raise ValueError(
            "a paired test needs one outcome per item and the same items in both; got shapes "
            f"{left.shape} and {right.shape}. Compare systems scored on the same rows."
        )
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise ValueError(
            "outcomes must be finite to be compared; got NaN or infinity. Find the items whose "
            "score is undefined and give them one (0 for a failure)."
        )
    binary = is_binary(left) and is_binary(right)
    needed = 1 if binary else 2
    if len(left) < needed:
        raise ValueError(
            f"a paired test needs at least {needed} item(s); got {len(left)}. Score more rows."
        )
    test = _mcnemar if binary else _permutation
    return test(left - right, confidence, seed)


def _mcnemar(differences: NDArray[np.float64], confidence: float, seed: int) -> PairedTest:
    n = len(differences)
    won, lost = int((differences > 0).sum()), int((differences < 0).sum())
    p_value = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    # Bonett & Price (2012): Wald with one imaginary item more in each discordant cell.
    share_won, share_lost = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    centre = share_won - share_lost
    error = np.sqrt((share_won + share_lost - centre**2) / (n + 2))
    half = float(stats.norm.ppf(0.5 + confidence / 2) * error)
    interval = Interval(max(centre - half, -1.0), min(centre + half, 1.0))
    return PairedTest((won - lost) / n, interval, float(p_value), n, "exact McNemar")


def _permutation(differences: NDArray[np.float64], confidence: float, seed: int) -> PairedTest:
    # Exchanging a and b within an item flips the sign of its difference: SciPy's "samples"
    # permutations of a single sample do exactly that.
    result = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        vectorized=True,
        batch=BATCH,
        rng=np.random.default_rng(seed),
    )
    # Percentile rather than BCa, which is undefined where all differences are equal.
    bounds = stats.bootstrap(
        (differences,),
        np.mean,
        confidence_level=confidence,
        n_resamples=RESAMPLES,
        method="percentile",
        vectorized=True,
        batch=BATCH,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return PairedTest(
        difference=float(differences.mean()),
        interval=Interval(float(bounds.low), float(bounds.high)),
        p_value=float(result.pvalue),
        n=len(differences),
        method="paired permutation test",
    )


def paired_over_seeds(
    a: Sequence[ArrayLike] | ArrayLike, b: Sequence[ArrayLike] | ArrayLike, confidence: float = 0.95
) -> PairedTest:
    """Test, two-sided, that two systems have equal mean outcome over seeds and items.

    Seeds and items are crossed: the same items recur under every seed. The standard error is that
    of the two-level paired bootstrap, which resamples seeds, and items once for all seeds (the
    pigeonhole bootstrap: Owen 2007, Annals of Applied Statistics 1(2)). For a mean it is known
    without resampling, and so are its biases, which are taken out: see :class:`CrossedVariance`.

    A percentile interval of few seeds is much too narrow, and so is one by the normal distribution:
    the critical value is the mean of Student's t of S − 1 and of n − 1 degrees of freedom, each
    weighted by its share of the variance (Cochran & Cox 1950, Experimental Designs, §4.14). In
    simulations its level stays at or below the nominal one from 3 seeds on (2 seeds: 5.5 % for
    5 %), while Satterthwaite's degrees of freedom gave up to 5.8 % for 5 % and twice the level at
    0.5 % (5 seeds), where a correction for many comparisons looks.

    0/1 outcomes get one imaginary item won and one lost under every seed, as in Bonett & Price
    (2012), so that an interval keeps its width where all items agree.

    Args:
        a, b: outcomes of shape (seeds, n): row s of both is of the same seed, item i the same item.

    Raises:
        ValueError: unequal shapes, fewer than 2 seeds or items, outcomes that are not finite.

    >>> won = [[1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 1]]
    >>> lost = [[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
    >>> test = paired_over_seeds(won, lost)
    >>> round(test.difference, 3), round(test.p_value, 3), test.num_seeds
    (0.667, 0.091, 3)
    """
    left, right = _table(a), _table(b)
    if left.shape != right.shape:
        raise ValueError(
            "a paired test over seeds needs the same seeds and items in both; got shapes "
            f"{left.shape} and {right.shape}. Compare systems run with the same seeds on the same "
            "rows."
        )
    num_seeds, n = left.shape
    if num_seeds < 2 or n < 2:
        raise ValueError(
            "a test over seeds needs at least 2 seeds, to see how much they differ, and 2 items; "
            f"got {num_seeds} seed(s) and {n} item(s). Run more seeds, or compare the two trained "
            "models alone, by paired_test."
        )
    binary, differences = is_binary(left) and is_binary(right), left - right
    mean = float(differences.mean())
    if binary:
        imaginary = np.broadcast_to([1.0, -1.0], (num_seeds, 2))
        differences = np.concatenate([differences, imaginary], axis=1)
    centre = float(differences.mean())
    variance = CrossedVariance.of(differences)
    half = variance.critical_value(1 - confidence) * variance.error
    interval = Interval(centre - half, centre + half)
    if binary:
        interval = Interval(max(interval.low, -1.0), min(interval.high, 1.0))
    p_value = variance.p_value(centre)
    return PairedTest(mean, interval, p_value, n, "two-level paired bootstrap", num_seeds)


def _table(outcomes: Sequence[ArrayLike] | ArrayLike) -> NDArray[np.float64]:
    """(seeds, items), all finite."""
    rows = [np.asarray(row, dtype=float) for row in outcomes]  # type: ignore[union-attr]
    shapes = sorted({row.shape for row in rows})
    if len(shapes) != 1 or len(shapes[0]) != 1:
        raise ValueError(
            "a test over seeds needs one row of outcomes per seed, each of the same items; got "
            f"rows of shapes {shapes}. Score every seed on the same rows."
        )
    table = np.stack(rows)
    if not np.isfinite(table).all():
        raise ValueError(
            "outcomes must be finite to be compared; got NaN or infinity. Find the items whose "
            "score is undefined and give them one (0 for a failure)."
        )
    return table


def seed_interval(
    values: Sequence[float], confidence: float = 0.95, within: Interval = ANYWHERE
) -> Interval:
    """Student's interval of the mean of one number per seed: how far other seeds might move it.

    It covers the variance between training runs, on the items that there are.

    Args:
        within: what the mean can be, as ``SHARES``: the interval goes no further.

    Raises:
        ValueError: fewer than two seeds.

    >>> low, high = seed_interval([0.80, 0.82, 0.84])
    >>> round(low, 3), round(high, 3)
    (0.77, 0.87)
    """
    mean, sd = mean_and_sd(values)
    half = -special.stdtrit(len(values) - 1, (1 - confidence) / 2) * sd / np.sqrt(len(values))
    return Interval(max(float(mean - half), within.low), min(float(mean + half), within.high))


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (ddof 1) of one number per seed.

    Raises:
        ValueError: fewer than two seeds.

    >>> mean_and_sd([1.0, 2.0, 3.0])
    (2.0, 1.0)
    """
    if len(values) < 2:
        raise ValueError(
            f"a spread over seeds needs at least 2 of them; got {len(values)}. Run more seeds."
        )
    return float(np.mean(values)), float(np.std(values, ddof=1))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for all of them being looked at (Holm 1979): family-wise error control.

    The i-th smallest of m is multiplied by m − i (from i = 0), made non-decreasing, capped at 1.

    Raises:
        ValueError: a p-value outside [0, 1].

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    wrong = [p for p in p_values if not 0 <= p <= 1]
    if wrong:
        raise ValueError(f"a p-value lies in [0, 1]; got {wrong[0]}. Correct the test it is from.")
    adjusted, floor = [0.0] * len(p_values), 0.0
    for i, k in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        floor = max(floor, min((len(p_values) - i) * p_values[k], 1.0))
        adjusted[k] = floor
    return adjusted
