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

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from e2lora.gathering import gathered_as_needed
from e2lora.gradients.idle import Idle
from e2lora.gradients.probe import checkpointed, device_of, probed, undisturbed
from e2lora.gradients.recorder import BLOCK_ROWS, Microbatch, Recorder, Round, of_all_workers
from e2lora.gradients.sums import GradientSums, spill_folders
from e2lora.moments import Fold, LayerGradient, PairStatistics, Target

__all__ = [
    "BLOCK_ROWS",
    "Measurement",
    "Microbatch",
    "Probing",
    "Round",
    "held_bytes",
    "measure_gradients",
    "split_by_size",
]

LossSum = Callable[[Any, Any], Tensor]
OnProgress = Callable[[int, int], None]


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
    on_progress: OnProgress = lambda done, total: None,
    again: Any = None,
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
        on_progress: called after each microbatch, and often in between, with how many are done
            and of how many.
        again: inputs for a worker that has fewer microbatches than others, where the model's
            weights are partitioned: all must make equally many passes. They are not measured.

    Raises:
        ValueError: a gradient that is not finite; inputs that can't be told apart by fold.
    """
    total = sum(num_supervised)
    several = len(num_supervised) > 1  # one fold is all rows, which are measured anyway
    scales = [total / supervised for supervised in num_supervised] if several else []
    microbatches = of_all_workers([len(r.microbatches) for r in rounds], group)
    idle = Idle(again, microbatches, [len(r.microbatches) for r in rounds], model)
    passes = split_by_size(targets, held_bytes(targets, microbatches), probing.max_held_bytes)
    progress = _Progress(on_progress, len(passes) * sum(len(r.microbatches) for r in rounds))

    def mean_loss(inputs: Any) -> Tensor:
        return loss_sum(model, inputs) / total

    with ExitStack() as stack:
        first = group is None or dist.get_rank(group) == 0
        spills = stack.enter_context(spill_folders(probing.pairwise and first, 1 + len(scales)))
        whole = GradientSums(spills[0], 1.0)
        folds = [GradientSums(f, s) for f, s in zip(spills[1:], scales, strict=True)]
        stack.enter_context(undisturbed(model))
        stack.enter_context(gathered_as_needed(model))
        if probing.checkpointing:
            stack.enter_context(checkpointed(model, targets))
        devices = {t.path: device_of(model.get_submodule(t.path)) for t in targets}
        losses, held = [], False
        for members in passes:
            recorder = Recorder(
                members, whole, folds, devices, probing.max_held_bytes, group, progress.alive
            )
            losses.append(_one_pass(model, recorder, rounds, mean_loss, progress, idle))
            held = held or recorder.held_some
        loss = losses[0]
        if group is not None:
            dist.all_reduce(loss, group=group)
        whole.require_finite(targets)
        per_fold = tuple(
            Fold(
                num_samples=num_samples[k],
                num_supervised=num_supervised[k],
                moments=tuple(fold.moments(target) for target in targets),
                pairs=_told_to_all(fold.pairs(targets, progress.alive), group),
            )
            for k, fold in enumerate(folds)
        )
        return Measurement(
            layers=tuple(whole.layer(t, (probing.parts or {}).get(t.path, {})) for t in targets),
            pairs=_told_to_all(whole.pairs(targets, progress.alive), group),
            folds=per_fold,
            mean_loss=float(loss),
            method="accumulators" if any(of_all_workers(held, group)) else "blocks",
            num_passes=len(passes),
        )


def _one_pass(
    model: nn.Module,
    recorder: Recorder,
    rounds: Sequence[Round],
    mean_loss: Callable[[Any], Tensor],
    progress: _Progress,
    idle: Idle,
) -> Tensor:
    """Forward and backward of all rounds for the recorder's targets; this worker's loss."""
    total = torch.zeros((), dtype=torch.float64)
    with probed(model, list(recorder.targets), recorder.fired, recorder.record) as backward:
        for number, r in enumerate(rounds):
            recorder.begin_round(r)
            for microbatch in r.microbatches:
                recorder.before_forward(microbatch)
                loss = mean_loss(microbatch.inputs)
                recorder.after_forward()
                backward(loss)
                total += loss.detach().double().cpu()
                progress.one_more()
            with recorder.deaf():
                for inputs in idle.inputs_of(number):
                    backward(mean_loss(inputs))
            recorder.end_round()
    recorder.finish()
    return total


class _Progress:
    """Microbatches done, told after each, and in between too: large ones take long."""

    def __init__(self, tell: OnProgress, num_batches: int) -> None:
        self._tell, self._done, self._num_batches = tell, 0, num_batches

    def alive(self) -> None:
        self._tell(self._done, self._num_batches)

    def one_more(self) -> None:
        self._done += 1
        self.alive()


def _told_to_all(value: Any, group: Any) -> Any:
    """The first worker's value, on every worker."""
    box = [value]
    if group is not None:
        dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    return box[0]


def held_bytes(targets: Sequence[Target], microbatches: Sequence[Sequence[int]]) -> dict[str, int]:
    """Bytes of accumulators that each target takes, where it fires once per forward.

    None where one microbatch of each worker holds all folds; one gradient for the sum over rounds,
    and one more for that of a round that isn't one microbatch on every worker.

    Args:
        microbatches: how many each worker has in each round.
    """
    several_rounds = len(microbatches[0]) > 1
    cut = any(num != 1 for of_worker in microbatches for num in of_worker)
    copies = int(several_rounds) + int(cut)
    return {t.path: 4 * copies * t.in_features * t.out_features for t in targets}


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
