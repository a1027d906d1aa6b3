"""What a worker does while others still measure a model whose weights are partitioned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from e2lora.partitioned import is_partitioned


class Idle:
    """Passes that a worker makes for others' sake: each gathers weights, so all must make it.

    Args:
        inputs: of such a pass.
        of_workers: how many microbatches each worker has, in each round.
        own: how many this one has.

    Raises:
        ValueError: passes are needed, and there are no inputs.
    """

    def __init__(
        self,
        inputs: Any,
        of_workers: Sequence[Sequence[int]],
        own: Sequence[int],
        model: nn.Module,
    ) -> None:
        self._inputs = inputs
        most = [max(numbers) for numbers in zip(*of_workers, strict=True)]
        self._lacking = [a - b for a, b in zip(most, own, strict=True)]
        if not is_partitioned(model):
            self._lacking = [0] * len(own)
        if inputs is None and any(self._lacking):
            raise ValueError(
                "workers with unequal numbers of microbatches can share a partitioned model only "
                f"if those with fewer have some to repeat; this one lacks {self._lacking} by "
                "round. Pass `again`."
            )

    def inputs_of(self, number: int) -> list[Any]:
        """Those of one round."""
        return [self._inputs] * self._lacking[number]
