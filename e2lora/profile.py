"""Base model + task → gradient profile: what E² plans are made from, measured once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

import e2lora
from e2lora.config import CalibrationConfig, TrialConfig, fingerprint_of
from e2lora.data import calibration_folds
from e2lora.gradients import Microbatch, OnProgress, Probing, Round, measure_gradients
from e2lora.gradients.whole import sum_gradients
from e2lora.models import Base, in_float32, reset_head
from e2lora.moments import GradientProfile, Provenance, Target
from e2lora.plan import Group, SharingPlan
from e2lora.profile_cache import ProfileCache
from e2lora.targets import find_targets, fused_parts, layers_without
from e2lora.tasks import Features, Task, TrialData
from e2lora.tasks.images import sees_images

MATHS = (
    "data.py",
    "gradients/*.py",
    "models.py",
    "moments.py",
    "profile.py",
    "targets.py",
    "tasks/*.py",
)
"""The code that decides a profile's numbers: rows, losses, heads and sums."""


def measure_profile(
    base: Base,
    data: TrialData,
    config: TrialConfig,
    group: Any = None,
    on_progress: OnProgress = lambda done, total: None,
    cache: ProfileCache | None = None,
) -> GradientProfile:
    """The gradient profile of a model on a task, for the trial's seed and target modules.

    Forward and backward run in float32 whatever the weights are stored in (quantised weights
    compute as they do). A profile that ``cache`` holds is not measured again.

    Args:
        group: process group of all workers, or None for one. Each takes its share of every fold.
        on_progress: called after each microbatch with how many are done, and of how many.
    """
    rank = dist.get_rank(group) if group else 0
    targets = find_targets(base.model, config.adapter.target_modules)
    calibration = config.plan.calibration
    numbers = calibration_folds(
        data.lengths, calibration.num_samples, calibration.num_folds, config.seed
    )
    folds = [[data.train[i] for i in fold] for fold in numbers]
    key = _cache_key(base, config, targets, folds, data.task.content("train"))
    box = [cache.load(key) if cache and rank == 0 else None]
    if cache and group:
        dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    if box[0] is not None:
        return box[0]
    profile = _measure(base, data, config, targets, folds, group, on_progress)
    if cache and rank == 0:
        cache.store(key, profile)
    return profile


def _measure(
    base: Base,
    data: TrialData,
    config: TrialConfig,
    targets: Sequence[Target],
    folds: Sequence[Sequence[Features]],
    group: Any,
    on_progress: OnProgress,
) -> GradientProfile:
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    calibration, task = config.plan.calibration, data.task
    reset_head(base.model, base.head, config.seed)
    rounds = [
        Round(
            numbers,
            tuple(Microbatch(_collated(base, task, rows), counts) for rows, counts in microbatches),
        )
        for numbers, microbatches in calibration_rounds(folds, calibration, rank, world)
    ]
    supervised = [task.num_supervised(rows) for rows in folds]
    with in_float32(base.model):
        measured = measure_gradients(
            base.model,
            targets,
            rounds,
            task.loss_sum,
            [len(rows) for rows in folds],
            supervised,
            Probing(
                parts=fused_parts(base.model, targets),
                pairwise=calibration.pairwise,
                checkpointing=calibration.checkpointing,
                max_held_bytes=calibration.max_held_gib * 2**30,
            ),
            group,
            on_progress,
            again=_collated(base, task, folds[0][:1]),
        )
        dtype = str(base.model.dtype).removeprefix("torch.")
    return GradientProfile(
        layers=measured.layers,
        pairs=measured.pairs,
        folds=measured.folds,
        layers_without=layers_without(base.model, targets),
        provenance=Provenance(
            model=config.model.name,
            model_fingerprint=base.fingerprint,
            task=config.task.display_name,
            num_samples=sum(map(len, folds)),
            num_supervised=sum(supervised),
            seed=config.seed,
            dtype=dtype,
            mean_loss=measured.mean_loss,
            method=measured.method,
            num_passes=measured.num_passes,
            num_workers=world,
            versions=_versions(),
        ),
    )


def measure_group_gradients(
    base: Base,
    data: TrialData,
    config: TrialConfig,
    plan: SharingPlan,
    group: Any = None,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Each target's path → ∂(mean loss)/∂W (out × in), summed over the targets of its group.

    On the rows that a profile of this trial is measured on, and in float32 as it is.

    Args:
        group: process group of all workers, or None for one. Each takes its share of the rows.
        alive: called often, to show that the worker lives.
    """
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    calibration, task = config.plan.calibration, data.task
    folds = calibration_folds(
        data.lengths, calibration.num_samples, calibration.num_folds, config.seed
    )
    rows = [data.train[i] for fold in folds for i in fold]
    ((_, shares),) = calibration_rounds([rows], calibration, rank, world)
    sharers: dict[Group, list[Target]] = {}
    of_target = plan.group_of_target()
    for target in plan.targets:
        sharers.setdefault(of_target[target.path], []).append(target)
    reset_head(base.model, base.head, config.seed)
    with in_float32(base.model):
        return sum_gradients(
            base.model,
            list(sharers.values()),
            [_collated(base, task, share) for share, _ in shares],
            task.loss_sum,
            task.num_supervised(rows),
            calibration.checkpointing,
            group,
            alive,
            again=_collated(base, task, rows[:1]),
        )


def _collated(base: Base, task: Task, rows: Sequence[Features]) -> dict[str, Any]:
    batch = task.collate(rows, base.processor)
    return {key: value.to(base.model.device) for key, value in batch.items()}


Share = tuple[list[Features], tuple[int, ...]]


def calibration_rounds(
    folds: Sequence[Sequence[Features]], calibration: CalibrationConfig, rank: int, world: int
) -> list[tuple[tuple[int, ...], list[Share]]]:
    """Folds in rounds, and this worker's microbatches: rows, and how many are of each fold.

    One microbatch with all folds where it holds every worker's share, so that no gradient need be
    held; else a round per fold, cut into microbatches. A batch as long as it is high could hide
    that a model puts time first, and mix its folds up: it is cut, too.
    """
    size = calibration.microbatch_size
    mine = [list(fold[rank::world]) for fold in folds]
    of_workers = [[row for fold in folds for row in fold[k::world]] for k in range(world)]
    square = len(folds) > 1 and any(len(rows) == _longest(rows) for rows in of_workers)
    if max(map(len, of_workers)) <= size and not square:
        rows = [row for share in mine for row in share]
        shares = [(rows, tuple(map(len, mine)))] if rows else []
        return [(tuple(range(len(folds))), shares)]
    return [
        (
            (number,),
            [(part, (len(part),)) for i in range(0, len(s), size) if (part := s[i : i + size])],
        )
        for number, s in enumerate(mine)
    ]


def _longest(rows: Sequence[Features]) -> int:
    return max((len(row.get("input_ids", ())) for row in rows), default=0)


def _cache_key(
    base: Base,
    config: TrialConfig,
    targets: Sequence[Target],
    folds: Sequence[Sequence[Features]],
    content: str,
) -> str:
    """Names all that decides a profile: weights, head, rows, targets, options, code, versions."""
    rows = hashlib.sha256(json.dumps(folds, sort_keys=True).encode()).hexdigest()
    return fingerprint_of(
        [
            [config.model.model_dump(mode="json"), base.fingerprint, list(base.head), config.seed],
            [config.task.model_dump(mode="json"), content, rows],
            [target.model_dump(mode="json") for target in targets],
            config.plan.calibration.model_dump(mode="json"),
            # whose work is no part of rows that only name images
            base.processor.to_dict() if sees_images(base.model) else None,
            maths_version(),
            _versions(),
        ]
    )


def maths_version() -> str:
    """Changes with any change to the code that decides a profile's numbers."""
    (folder,) = e2lora.__path__
    files = [file for pattern in MATHS for file in sorted(Path(folder).glob(pattern))]
    return fingerprint_of([[file.name, file.read_text(encoding="utf-8")] for file in files])


def _versions() -> dict[str, str]:
    return {
        name: version(name) for name in ("torch", "transformers", "datasets", "numpy", "pillow")
    }
