"""A made-up device memory: for the search of microbatches, and for workers that search together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from e2lora.training.microbatch import find_accumulation


class MadeUp:
    """Takes ``fixed + slope · rows``; fails, as a GPU would, above ``breaks``."""

    def __init__(
        self,
        limit: int,
        slope: int = 10,
        fixed: int = 5,
        tries: bool = True,
        breaks: int | None = None,
        size_of: Callable[[int], int] | None = None,
    ) -> None:
        self.limit, self.tries, self.breaks = limit, tries, breaks
        self.size_of = size_of or (lambda n: fixed + slope * n)
        self.tried: list[int] = []

    def used(self, run: Callable[[int], None], num_rows: int) -> int:
        self.tried.append(num_rows)
        run(num_rows)
        used = self.size_of(num_rows)
        if self.breaks is not None and used > self.breaks:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return used


def nothing(num_rows: int) -> None: ...


def find_on_worker(rank: int, rendezvous: str, limits: list[int], results: Any) -> None:
    """One of as many processes as there are limits."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=len(limits)
    )
    memory = MadeUp(limits[rank])
    found = find_accumulation(nothing, 16, memory, torch.distributed.group.WORLD)
    results[rank] = (found, memory.tried)
    torch.distributed.destroy_process_group()
