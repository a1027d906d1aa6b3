"""How sure a mean over seeds and items is, where the same items recur under every seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special


@dataclass(frozen=True)
class CrossedVariance:
    """The variance of the mean of a table of S seeds x n items, by where it comes from.

    With row effects r, column effects c and what is left, e (each centred), the two-level bootstrap
    has variance Σr²/S² + Σc²/n² + Σe²/(Sn)² if it never ends. Each is biased by the number of its
    degrees of freedom, and e enters r and c as well, so that its share counts three times (Owen
    2007, theorem 3). Here each is without bias, which makes them the mean squares of a two-way
    analysis of variance, over S·n:

    Attributes:
        seeds: Σr²/(S(S−1)), what seeds add, chance of single items included.
        items: Σc²/(n(n−1)), what items add, the same included.
        both: Σe²/(S(S−1)n(n−1)), of single items under single seeds.
    """

    seeds: float
    items: float
    both: float
    num_seeds: int
    n: int

    @classmethod
    def of(cls, table: NDArray[np.float64]) -> CrossedVariance:
        num_seeds, n = table.shape
        centred = table - table.mean()
        rows, columns = centred.mean(axis=1), centred.mean(axis=0)
        left = centred - rows[:, None] - columns
        free_seeds, free_items = num_seeds * (num_seeds - 1), n * (n - 1)
        return cls(
            seeds=float(rows @ rows) / free_seeds,
            items=float(columns @ columns) / free_items,
            both=float(np.vdot(left, left)) / (free_seeds * free_items),
            num_seeds=num_seeds,
            n=n,
        )

    @property
    def parts(self) -> tuple[float, float]:
        """Of seeds (``both`` included), and of items alone: neither is let go below what is sure.

        A component that chance makes negative counts as 0, which errs on the safe side.
        """
        return max(self.seeds, self.both), max(self.items - self.both, 0.0)

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return float(np.sqrt(sum(self.parts)))

    def critical_value(self, level: float) -> float:
        """Of |mean|/error, two-sided, after Cochran & Cox (1950)."""
        of_seeds, of_items = self.parts
        share = of_seeds / (of_seeds + of_items) if of_seeds + of_items else 1.0
        t_seeds, t_items = -special.stdtrit([self.num_seeds - 1, self.n - 1], level / 2)
        return float(share * t_seeds + (1 - share) * t_items)

    def p_value(self, mean: float) -> float:
        """The level at which a mean is just significant: where an interval would begin at 0."""
        if mean == 0 or self.error == 0:
            return float(mean == 0)
        size = abs(mean) / self.error
        lowest = np.log(SMALLEST_P)
        if self.critical_value(SMALLEST_P) <= size:
            return SMALLEST_P

        def excess(log_level: float) -> float:
            return self.critical_value(float(np.exp(log_level))) - size

        return float(np.exp(optimize.brentq(excess, lowest, 0.0)))


SMALLEST_P = 1e-12  # beyond it a p-value says nothing but "very small"
