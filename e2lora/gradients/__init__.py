"""Model + calibration batches → gradient statistics of every target, with frozen weights.

The gradient of a linear weight is G = Σ_t δ_t x_tᵀ over tokens t, with x the input and δ the
gradient of the output; the probe sees both in backward, so no weight needs ``requires_grad``.

Statistics of a sum do not follow from those of its parts, so a gradient must be whole before it is
squared. Rows come in *rounds*: a round holds all rows of one fold, or of several.

* blocks: a round that is one microbatch on every worker, and a target that fires once in it. The
  gradient is made by blocks of output rows in backward, reduced over the workers, and never held.
* accumulators: otherwise. A float32 sum per target is kept until its round ends.

The gradient over all folds is the sum of theirs. Where one round holds them all, so does one block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from e2lora.gradients.probe import checkpointed, probed, undisturbed
from e2lora.gradients.sums import GradientSums, spill_folders
from e2lora.moments import Fold, LayerGradient, PairStatistics, Target

BLOCK_ROWS = 256

LossSum = Callable[[Any, Any], Tensor]
OnBatch = Callable[[int, int], None]


@dataclass(frozen=True)
class Microbatch:
    """What ``loss_sum`` takes, and how many of its rows belong to each fold of its round, in order.

    Where there are several folds, the first dimension of a target's input must be the batch's.
    """

    inputs: Any
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Round:
    """Whole folds, by their numbers, and this worker's share of their rows."""

    folds: tuple[int, ...]
    microbatches: tuple[Microbatch, ...]


@dataclass(frozen=True)
class Probing:
    """What is measured besides moments, and at what price.

    ``parts`` names rows of fused projections: target path → name → rows. ``max_held_bytes`` limits
    the accumulators; targets beyond it are measured in further passes over the same rounds.
    """

    parts: Mapping[str, Mapping[str, Sequence[int]]] | None = None
    pairwise: bool = False
    checkpointing: bool = False
    max_held_bytes: float = float("inf")


@dataclass(frozen=True)
class Measurement:
    """Statistics over all rows, and over each fold if there are several; see GradientProfile."""

    layers: tuple[LayerGradient, ...]
    pairs: dict[str, PairStatistics]
    folds: tuple[Fold, ...]
    mean_loss: float
    method: Literal["blocks", "accumulators"]
    num_passes: int


def measure_gradients(
    model: nn.Module,
    targets: Sequence[Target],
    rounds: Sequence[Round],
    loss_sum: LossSum,
    num_samples: Sequence[int],
    num_supervised: Sequence[int],
    probing: Probing = Probing(),
    group: Any = None,
    on_batch: OnBatch = lambda done, total: None,
) -> Measurement:
    """Statistics of ∂(mean loss)/∂W for every target, exact for the sum over all microbatches.

    Args:
        rounds: of this worker; the same folds in the same order on every worker.
        loss_sum: (model, inputs) → the *sum* of its sample (token) losses, a scalar.
        num_samples: rows of each fold, of all workers.
        num_supervised: samples (tokens) of each fold, of all workers; the loss is divided once by
            their sum (a fold's by its own), so the result depends on neither microbatch size nor
            number of workers.
        group: process group of all workers, or None for one.
        on_batch: called after each microbatch with how many are done, and of how many.

    Raises:
        ValueError: a gradient that is not finite; inputs that can't be told apart by fold.
    """
    total = sum(num_supervised)
    several = len(num_supervised) > 1  # one fold is all rows, which are measured anyway
    scales = [total / supervised for supervised in num_supervised] if several else []
    passes = _passes(targets, rounds, probing.max_held_bytes, group)
    loss, held = torch.zeros((), dtype=torch.float64), False
    done, num_batches = 0, len(passes) * sum(len(r.microbatches) for r in rounds)

    def mean_loss(model: Any, inputs: Any) -> Tensor:
        return loss_sum(model, inputs) / total

    def tell_one_more() -> None:
        nonlocal done
        done += 1
        on_batch(done, num_batches)

    with ExitStack() as stack:
        first = group is None or dist.get_rank(group) == 0
        spills = stack.enter_context(spill_folders(probing.pairwise and first, 1 + len(scales)))
        whole = GradientSums(spills[0], 1.0)
        folds = [GradientSums(f, s) for f, s in zip(spills[1:], scales, strict=True)]
        stack.enter_context(undisturbed(model))
        if probing.checkpointing:
            stack.enter_context(checkpointed(model, targets))
        for number, members in enumerate(passes):
            recorder = _Recorder(members, whole, folds, group)
            paths = [target.path for target in members]
            with probed(model, paths, recorder.fired, recorder.record), torch.enable_grad():
                for r in rounds:
                    part = recorder.run(model, r, mean_loss, tell_one_more)
                    loss += part if number == 0 else 0.0
            recorder.finish()
            held = held or recorder.held_some
        if group is not None:
            dist.all_reduce(loss, group=group)
        whole.require_finite(targets)
        per_fold = tuple(
            Fold(
                num_samples=num_samples[k],
                num_supervised=num_supervised[k],
                moments=tuple(fold.moments(target) for target in targets),
                pairs=_told_to_all(fold.pairs(targets), group),
            )
            for k, fold in enumerate(folds)
        )
        return Measurement(
            layers=tuple(whole.layer(t, (probing.parts or {}).get(t.path, {})) for t in targets),
            pairs=_told_to_all(whole.pairs(targets), group),
            folds=per_fold,
            mean_loss=float(loss),
            method="accumulators" if held else "blocks",
            num_passes=len(passes),
        )


def _told_to_all(value: Any, group: Any) -> Any:
    """The first worker's value, on every worker."""
    box = [value]
    if group is not None:
        dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    return box[0]


def held_bytes(targets: Sequence[Target], rounds: Sequence[Round]) -> dict[str, int]:
    """Bytes of accumulators that each target takes, where it fires once per forward.

    None where one microbatch holds all folds; one gradient for the sum over rounds, and one more
    for that of a round of several microbatches.
    """
    several_rounds = len(rounds) > 1
    several_microbatches = any(len(r.microbatches) > 1 for r in rounds)
    copies = int(several_rounds) + int(several_microbatches)
    return {t.path: 4 * copies * t.in_features * t.out_features for t in targets}


def _passes(
    targets: Sequence[Target], rounds: Sequence[Round], limit: float, group: Any
) -> list[list[Target]]:
    """Targets in groups whose accumulators keep the limit; the same on every worker."""
    sizes = held_bytes(targets, rounds)
    if group is not None:  # every worker must make the same passes
        of_all: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(of_all, sizes, group=group)
        sizes = {path: max(one[path] for one in of_all) for path in sizes}
    return split_by_size(targets, sizes, limit)


def split_by_size(
    targets: Sequence[Target], sizes: Mapping[str, int], limit: float
) -> list[list[Target]]:
    """Targets in order, in groups that keep the limit; a target that exceeds it stands alone."""
    passes: list[list[Target]] = []
    room = 0.0
    for target in targets:
        if not passes or sizes[target.path] > room:
            passes.append([])
            room = limit
        passes[-1].append(target)
        room -= sizes[target.path]
    return passes


class _Recorder:
    """Gathers what backward sees of some targets, in the way the module docstring says."""

    def __init__(
        self,
        targets: Sequence[Target],
        whole: GradientSums,
        folds: Sequence[GradientSums],
        group: Any,
    ) -> None:
        self.targets = {target.path: target for target in targets}
        self.whole, self.folds, self.group = whole, folds, group
        self.num_folds = max(1, len(folds))
        self._forwards: Counter[str] = Counter()
        self._counting = False
        self.held_some = False
        self._device = torch.device("cpu")
        self._rows: tuple[int, ...] = ()
        self._round: tuple[int, ...] = ()
        self._whole_at_once: frozenset[str] = frozenset()
        self._done: set[str] = set()
        self._of_round: dict[tuple[int, str], Tensor] = {}
        self._of_all: dict[str, Tensor] = {}

    def run(
        self, model: nn.Module, r: Round, loss_of: LossSum, on_batch: Callable[[], None]
    ) -> Tensor:
        """Forward and backward of a round on this worker, and its gradients finished on all."""
        total = torch.zeros((), dtype=torch.float64)
        once_everywhere = self._agree(len(r.microbatches)) == 1
        self._round, self._done, self._whole_at_once = r.folds, set(), frozenset()
        for microbatch in r.microbatches:
            self._rows = microbatch.rows
            self._forwards.clear()
            self._counting = True  # activation checkpointing runs forwards again in backward
            loss = loss_of(model, microbatch.inputs)
            self._counting = False
            if once_everywhere and self._agree(dict(self._forwards)) is not None:
                self._whole_at_once = frozenset(p for p, n in self._forwards.items() if n == 1)
            if loss.requires_grad:  # else it reaches no target: σ = 0, see require_usable
                loss.backward()
            total += loss.detach().double().cpu()
            on_batch()
        self._end_round()
        return total

    def fired(self, path: str) -> None:
        if self._counting:
            self._forwards[path] += 1

    def _agree(self, value: Any) -> Any:
        """The value, if all workers have the same one; else None. Collective."""
        if self.group is None:
            return value
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return value if all(other == value for other in values) else None

    def record(self, path: str, x: Tensor, delta: Tensor) -> None:
        target, self._device = self.targets[path], delta.device
        shares = self._shares(path, x, delta)
        if path not in self._whole_at_once:
            for fold, xs, deltas in shares:
                held = self._of_round.get((fold, path))
                if held is None:
                    self._of_round[fold, path] = deltas.T @ xs
                else:
                    held.addmm_(deltas.T, xs)
            return
        self._done.add(path)
        for first in range(0, target.out_features, BLOCK_ROWS):
            rows = slice(first, first + BLOCK_ROWS)
            blocks = [(fold, self._reduced(d[:, rows].T @ xs)) for fold, xs, d in shares]
            self._add(target, first, blocks, ends=len(shares) == self.num_folds)

    def _shares(self, path: str, x: Tensor, delta: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """Fold, x (tokens x in) and δ (tokens x out) of each fold of the round."""
        xs, deltas = (t.detach().reshape(-1, t.shape[-1]).float() for t in (x, delta))
        if len(self._round) == 1:
            return [(self._round[0], xs, deltas)]
        num_rows = sum(self._rows)
        if x.shape[0] != num_rows:  # time first, tokens of all rows, or those routed to an expert
            raise ValueError(
                "to tell folds apart, the first dimension of a target's input must be the batch; "
                f"{path} sees {tuple(x.shape)} for {num_rows} rows. Set calibration.num_folds=1, "
                "or a microbatch_size below num_samples, so that each microbatch holds one fold."
            )
        sizes = [rows * (len(xs) // num_rows) for rows in self._rows]
        return list(zip(self._round, xs.split(sizes), deltas.split(sizes), strict=True))

    def _reduced(self, block: Tensor) -> Tensor:
        """Summed over all workers: they visit targets and blocks in one order."""
        if self.group is None:
            return block
        block = block.cpu().contiguous()
        dist.all_reduce(block, group=self.group)
        return block

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
        self.held_some = True
        held = self._of_all.get(target.path)
        if held is None:
            shape = (target.out_features, target.in_features)
            held = self._of_all[target.path] = torch.zeros(shape, device=total.device)
        held[first : first + len(total)] += total

    def _end_round(self) -> None:
        """Whatever the round's targets didn't finish in backward, in the order of the targets."""
        for path, target in self.targets.items():
            if path in self._done:
                continue
            self.held_some = True
            shares = [(fold, self._held(fold, target)) for fold in self._round]
            for first in range(0, target.out_features, BLOCK_ROWS):
                rows = slice(first, first + BLOCK_ROWS)
                blocks = [(fold, self._reduced(held[rows])) for fold, held in shares]
                self._add(target, first, blocks, ends=len(shares) == self.num_folds)

    def _held(self, fold: int, target: Target) -> Tensor:
        held = self._of_round.pop((fold, target.path), None)
        if held is None:  # not reached by this worker's batches: others may have a share
            held = torch.zeros(target.out_features, target.in_features, device=self._device)
        return held

    def finish(self) -> None:
        for path, target in self.targets.items():
            held = self._of_all.pop(path, None)
            if held is not None:
                self.whole.add(target, 0, held)
