"""pass@k: the chance that one of k programs passes, estimated from n (Chen et al., 2021)."""

from __future__ import annotations

import math


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 − C(n − c, k) / C(n, k): unbiased, where c of n programs passed.

    As the product of 1 − k/i over i = n − c + 1 … n, so that no large numbers arise.

    >>> pass_at_k(n=4, c=2, k=1), pass_at_k(n=4, c=2, k=3), pass_at_k(n=4, c=0, k=3)
    (0.5, 1.0, 0.0)

    Raises:
        ValueError: not 0 ≤ c ≤ n and 1 ≤ k ≤ n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(
            f"pass@k is of k out of n programs, of which c passed; got n={n}, c={c}, k={k}. Let "
            "`generation.num_samples` be at least the largest k."
        )
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))
