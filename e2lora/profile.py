"""Base model + task → gradient profile: what E² plans are made from, measured once."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch.distributed as dist

from e2lora.config import TrialConfig
from e2lora.data import calibration_rows, microbatches_of
from e2lora.gradients import measure_moments
from e2lora.models import Base, find_targets, in_float32, reset_head
from e2lora.moments import GradientProfile, Provenance
from e2lora.tasks import TrialData


def measure_profile(
    base: Base,
    data: TrialData,
    config: TrialConfig,
    group: Any = None,
    on_batch: Callable[[], None] = lambda: None,
) -> GradientProfile:
    """The gradient profile of a model on a task, for the trial's seed and target modules.

    Forward and backward run in float32 whatever the weights are stored in.
    """
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    calibration, task = config.plan.calibration, data.task
    reset_head(base.model, base.head, config.seed)
    targets = find_targets(base.model, config.adapter.target_modules)
    numbers = calibration_rows(len(data.train), calibration.num_samples, config.seed)
    rows = [data.train[i] for i in numbers]
    rows.sort(key=lambda row: len(row["input_ids"]))
    (mine,) = microbatches_of(rows, rank, world, num=1)
    size = calibration.microbatch_size
    batches = [
        {
            key: value.to(base.model.device)
            for key, value in task.collate(mine[i : i + size], base.tokenizer).items()
        }
        for i in range(0, len(mine), size)
    ]
    with in_float32(base.model):
        layers, mean_loss, method = measure_moments(
            base.model, targets, batches, task.loss_sum, task.num_supervised(rows), group, on_batch
        )
    return GradientProfile(
        layers=tuple(layers),
        provenance=Provenance(
            model=config.model.name,
            model_fingerprint=base.fingerprint,
            task=config.task.display_name,
            num_samples=len(rows),
            num_supervised=task.num_supervised(rows),
            seed=config.seed,
            dtype=str(base.model.dtype).removeprefix("torch."),
            mean_loss=mean_loss,
            method=method,
            num_workers=world,
            versions={name: version(name) for name in ("torch", "transformers", "datasets")},
        ),
    )
