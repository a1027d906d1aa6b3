"""Gathers what backward sees of the targets until a gradient is whole, over rows and workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from e2lora.gradients.sums import GradientSums
from e2lora.moments import Target

BLOCK_ROWS = 256


@dataclass(frozen=True)
class Microbatch:
    """What ``loss_sum`` takes, and how many of its rows belong to each fold of its round, in order.

    Where there are several folds, the first dimension of a target's input must be the batch's, and
    it must have one more besides its features.
    """

    inputs: Any
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Round:
    """Whole folds, by their numbers, and this worker's share of their rows."""

    folds: tuple[int, ...]
    microbatches: tuple[Microbatch, ...]


def of_all_workers(value: Any, group: Any) -> list[Any]:
    """The values of all workers, in order of their ranks. Collective."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


class Recorder:
    """Gradients of some targets, in the way the package's docstring says.

    Args:
        whole: gets the gradient over all rows.
        folds: get those over each fold; empty where all rows are one fold.
        devices: of each target's weight.
        max_held_bytes: of accumulators, if there are several targets.
        group: process group of all workers, or None for one.
        alive: called often, to show that the worker lives.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        whole: GradientSums,
        folds: Sequence[GradientSums],
        devices: Mapping[str, torch.device],
        max_held_bytes: float,
        group: Any,
        alive: Callable[[], None],
    ) -> None:
        self.targets = {target.path: target for target in targets}
        self.whole, self.folds, self.group, self._alive = whole, folds, group, alive
        self.num_folds = max(1, len(folds))
        self.held_some = False
        self._devices, self._max_held_bytes = devices, max_held_bytes
        self._forwards: Counter[str] = Counter()
        self._alone = self._deaf = False
        self._rows: tuple[int, ...] = ()
        self._round: tuple[int, ...] = ()
        self._once: frozenset[str] = frozenset()
        self._done: set[str] = set()
        self._of_round: dict[tuple[int, str], Tensor] = {}
        self._of_all: dict[str, Tensor] = {}

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Nothing is recorded within."""
        self._deaf = True
        try:
            yield
        finally:
            self._deaf = False

    def begin_round(self, r: Round) -> None:
        self._alone = all(n == 1 for n in of_all_workers(len(r.microbatches), self.group))
        self._round, self._done, self._once = r.folds, set(), frozenset()

    def before_forward(self, microbatch: Microbatch) -> None:
        self._rows = microbatch.rows
        self._forwards.clear()

    def fired(self, path: str) -> None:
        self._alive()
        if not self._deaf:
            self._forwards[path] += 1

    def after_forward(self) -> None:
        """Which gradients will be whole at once: those of targets that fired once, on all workers.

        Blocks are reduced in backward, so workers must meet these targets in one order.
        """
        if not self._alone:
            return
        of_workers = of_all_workers(list(self._forwards.items()), self.group)
        once = [[path for path, n in fired if n == 1] for fired in of_workers]
        common = set(once[0]).intersection(*once[1:])
        orders = {tuple(path for path in paths if path in common) for paths in once}
        self._once = frozenset(common) if len(orders) == 1 else frozenset()

    def record(self, path: str, x: Tensor, delta: Tensor) -> None:
        """What backward saw: input (rows, …, in) and gradient of the output (rows, …, out)."""
        self._alive()
        if self._deaf:
            return
        target = self.targets[path]
        shares = self._shares(path, x, delta)
        if path not in self._once:
            for fold, xs, deltas in shares:
                if (fold, path) not in self._of_round:
                    self._of_round[fold, path] = self._hold(target)
                self._of_round[fold, path].addmm_(deltas.T, xs)
            return
        self._require_same_turn(path)
        self._done.add(path)
        for first in range(0, target.out_features, BLOCK_ROWS):
            rows = slice(first, first + BLOCK_ROWS)
            blocks = [(fold, self._reduced(d[:, rows].T @ xs)) for fold, xs, d in shares]
            self._add(target, first, blocks, ends=len(shares) == self.num_folds)

    def _shares(self, path: str, x: Tensor, delta: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """Fold, x (tokens x in) and δ (tokens x out) of each fold of the round."""
        if delta.dtype == torch.float16:
            raise ValueError(
                f"gradients must not pass through float16, where they vanish; {path} computes in "
                "it. Load the model in bfloat16 or float32 (a quantised one: its compute dtype)."
            )
        xs, deltas = (t.detach().reshape(-1, t.shape[-1]).float() for t in (x, delta))
        if len(self._round) == 1:
            return [(self._round[0], xs, deltas)]
        num_rows = sum(self._rows)
        if x.dim() < 3 or x.shape[0] != num_rows:  # time first, or tokens of all rows, or some
            raise ValueError(
                "to tell folds apart, the first dimension of a target's input must be the batch; "
                f"{path} sees {tuple(x.shape)} for {num_rows} rows. Set calibration.num_folds=1, "
                "or a microbatch_size below num_samples, so that each microbatch holds one fold."
            )
        sizes = [rows * (len(xs) // num_rows) for rows in self._rows]
        return list(zip(self._round, xs.split(sizes), deltas.split(sizes), strict=True))

    def _add(
        self, target: Target, first: int, blocks: Sequence[tuple[int, Tensor]], ends: bool
    ) -> None:
        """Whole blocks of some folds; ``ends``: these are all folds there are."""
        if self.folds:
            for fold, block in blocks:
                self.folds[fold].add(target, first, block)
        total = blocks[0][1]
        for _, block in blocks[1:]:
            total = total + block
        if ends:
            self.whole.add(target, first, total)
            return
        if target.path not in self._of_all:
            self._of_all[target.path] = self._hold(target)
        held = self._of_all[target.path]
        held[first : first + len(total)] += total.to(held.device)

    def _hold(self, target: Target) -> Tensor:
        """A new accumulator.

        Raises:
            ValueError: the limit is exceeded, though what was foreseen kept it.
        """
        held = [*self._of_round.values(), *self._of_all.values()]
        size = 4 * target.in_features * target.out_features
        together = size + sum(4 * tensor.numel() for tensor in held)
        if held and len(self.targets) > 1 and together > self._max_held_bytes:
            raise ValueError(
                "held gradients must keep calibration.max_held_gib; modules such as "
                f"{target.path} are used several times in one forward, or by some workers only, "
                f"and would take {together / 2**30:.2g} GiB of {self._max_held_bytes / 2**30:.2g} "
                f"GiB. Set it to {2 * len(self.targets) * size / 2**30:.2g} or more."
            )
        self.held_some = True
        shape = (target.out_features, target.in_features)
        return torch.zeros(shape, device=self._devices[target.path])

    def end_round(self) -> None:
        """Whatever the round's targets didn't finish in backward, in the order of the targets."""
        for path, target in self.targets.items():
            if path in self._done:
                continue
            self._require_same_turn(path)
            shares = [(fold, self._held_or_zeros(fold, target)) for fold in self._round]
            for first in range(0, target.out_features, BLOCK_ROWS):
                rows = slice(first, first + BLOCK_ROWS)
                blocks = [(fold, self._reduced(held[rows])) for fold, held in shares]
                self._add(target, first, blocks, ends=len(shares) == self.num_folds)

    def _held_or_zeros(self, fold: int, target: Target) -> Tensor:
        held = self._of_round.pop((fold, target.path), None)
        if held is None:  # not reached by this worker's batches: others may have a share
            shape = (target.out_features, target.in_features)
            held = torch.zeros(shape, device=self._devices[target.path])
        return held

    def finish(self) -> None:
        """The sums over rounds are whole."""
        for path, target in self.targets.items():
            held = self._of_all.pop(path, None)
            if held is not None:
                self.whole.add(target, 0, held)

    # ---- workers ------------------------------------------------------------------------------

    def _reduced(self, block: Tensor) -> Tensor:
        """Summed over all workers: they visit targets and blocks in one order."""
        if self.group is None:
            return block
        block = block.cpu().contiguous()
        dist.all_reduce(block, group=self.group)
        return block

    def _require_same_turn(self, path: str) -> None:
        """Blocks of different targets must never be summed.

        Raises:
            RuntimeError: on every worker.
        """
        others = set(of_all_workers(path, self.group))
        if len(others) > 1:
            raise RuntimeError(
                "all workers must reach the same targets, in one order, to sum their gradients; "
                f"here some are at {' and some at '.join(sorted(others))}. Measure with one "
                "worker, or with a microbatch_size that gives each worker several microbatches."
            )
