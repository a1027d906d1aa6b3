"""A trial up to its first step: its newest state, its adapter, how its batches are cut."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from e2lora.adapters import FAMILIES, adapt, require_possible_trial, trainable_parameters
from e2lora.adapters.family import DEFAULT_NAME
from e2lora.config import TrainConfig, TrialConfig
from e2lora.data import Batches, require_packs
from e2lora.gathering import gathered_as_needed
from e2lora.models import Base, reset_head
from e2lora.partitioned import is_partitioned, numel_of
from e2lora.plan import SharingPlan
from e2lora.profile import measure_group_gradients
from e2lora.tasks import TrialData
from e2lora.tasks.packing import attends_flat
from e2lora.training.activations import require_checkpointable
from e2lora.training.checkpoint import TrainState, load_checkpoint
from e2lora.training.health import digest_of, require_agreement, require_rows
from e2lora.training.microbatch import (
    CpuMemory,
    GpuMemory,
    Memory,
    find_accumulation,
    forward_and_backward,
)
from e2lora.training.stopping import require_metric

CHECKPOINT_TRIES = 30  # one a second
BYTES_PER_TRAINED = 16  # float32 master, gradient, and two moments


def require_trainable(config: TrialConfig, plan: SharingPlan, data: TrialData) -> None:
    """Refuse what can't be trained, from what is at hand without the model.

    Raises:
        ValueError: with the rule, the value and the remedy.
    """
    require_possible_trial(config)
    FAMILIES[config.adapter.family].require_reaches(plan, config)
    require_checkpointable(plan, config.adapter, config.training)
    require_metric(config.training.early_stopping, data.task.directions)
    for split, rows in (("train", data.train), ("validation", data.validation)):
        require_rows(len(rows), split, config.task.display_name)


def agreed_checkpoint(folder: Path, identity: str, group: Any) -> TrainState | None:
    """The newest state, the same one on every worker: a shared disk may lag on some nodes."""
    for _ in range(CHECKPOINT_TRIES):
        state = load_checkpoint(folder, identity)
        if group is None:
            return state
        steps: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(steps, state and state.step, group=group)
        if len(set(steps)) == 1:
            return state
        time.sleep(1.0)
    raise RuntimeError(
        f"all workers must see the same newest checkpoint; they see steps {steps} in {folder}. Is "
        "the storage path one that all nodes share?"
    )


def state_at(step: int, folder: Path, identity: str, alive: Callable[[], None]) -> TrainState:
    """The state after ``step``, which the first worker wrote; a shared disk may lag elsewhere.

    Raises:
        FileNotFoundError: it doesn't come to light.
    """
    for _ in range(CHECKPOINT_TRIES):
        state = load_checkpoint(folder, identity, step)
        if state is not None:
            return state
        alive()
        time.sleep(1.0)
    raise FileNotFoundError(
        f"the checkpoint of the best evaluation, step {step}, must still lie in {folder}; it is "
        "gone. Train anew, or without early stopping."
    )


def adapt_base(
    base: Base,
    data: TrialData,
    plan: SharingPlan,
    config: TrialConfig,
    state: TrainState | None,
    group: Any,
    alive: Callable[[], None],
) -> Any:
    """As at the trial's beginning, also where it goes on: its start is not drawn again.

    Args:
        state: where the trial goes on.
        alive: called often, to show that the worker lives.
    """
    family = FAMILIES[config.adapter.family]
    initial = below("initial/", state.tensors) if state else None
    gradients = None
    if state is None and family.needs_gradients:
        gradients = measure_group_gradients(base, data, config, plan, group, alive)
    reset_head(base.model, base.head, config.seed)
    torch.manual_seed(config.seed)
    starts = family.touches_base(config.adapter) or family.needs_gradients
    one_start = group and state is None and starts
    one_start = one_start and not is_partitioned(base.model)  # whose start is one anyway
    first = bool(one_start) and dist.get_rank(group) == 0
    told = {} if first or not one_start else _told_by_first(None, group)
    initial = told.get("initial", initial)
    adapted = adapt(
        base.model,
        plan,
        config.adapter,
        base.head,
        gradients=gradients,
        initial=initial,
        in_loop=True,
    )
    trained = trainable_parameters(adapted) if family.needs_gradients else {}
    if first:  # singular vectors and sums may differ between machines
        parts = {"initial": family.initial(adapted, DEFAULT_NAME), "trained": trained}
        _told_by_first(
            {part: {n: t.detach().cpu() for n, t in of.items()} for part, of in parts.items()},
            group,
        )
    for name, tensor in told.get("trained", {}).items():
        trained[name].data.copy_(tensor)
    return adapted


def require_same_start(
    adapted: Any, base: Base, data: TrialData, plan: SharingPlan, config: TrialConfig, group: Any
) -> None:
    """All workers are about to train the same. Collective.

    Raises:
        ValueError: with what differs.
    """
    facts = {
        "configuration": config.fingerprint(),
        "sharing plan": plan.fingerprint(),
        "trainable tensors and their values": digest_of(trainable_parameters(adapted)),
        "training rows": (len(data.lengths), int(data.lengths.sum())),
        "weights of the base model": base.fingerprint,
    }
    require_agreement(facts if group else {}, group)


def with_cut_batches(
    adapted: Any,
    base: Base,
    data: TrialData,
    config: TrialConfig,
    group: Any,
    alive: Callable[[], None],
) -> TrainConfig:
    """The training with the number of microbatches known, after a try of packed rows. Collective.

    Args:
        alive: called often, to show that the worker lives.

    Raises:
        ValueError: the model doesn't keep packed rows apart.
        OutOfMemory: not even one row fits.
    """
    training, task, device = config.training, data.task, base.model.device
    if training.packing:
        with gathered_as_needed(adapted):
            require_packs(adapted, data, base.processor)
    if training.gradient_accumulation_steps != "auto":
        return training
    with gathered_as_needed(adapted):
        batches = Batches(
            data, base.processor, training, config.seed, one_sequence=attends_flat(adapted)
        )
        longest = np.argsort(data.lengths, kind="stable")[::-1]

        def batch_of(num_rows: int) -> dict[str, Tensor]:
            alive()
            return batches.of_rows([int(longest[i % len(longest)]) for i in range(num_rows)])

        share = training.global_batch_size // training.num_workers
        run = forward_and_backward(adapted, batch_of, task.loss_sum, device)
        found = find_accumulation(run, share, _memory(adapted, training, device), group)
    return training.model_copy(update={"gradient_accumulation_steps": found})


def _memory(adapted: Any, training: TrainConfig, device: torch.device) -> Memory:
    reserved = BYTES_PER_TRAINED * sum(map(numel_of, trainable_parameters(adapted).values()))
    if device.type == "cuda":
        return GpuMemory(device, min(1.0, training.gpus_per_worker), reserved)
    return CpuMemory(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), reserved)


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _told_by_first(value: Any, group: Any) -> Any:
    """The first worker's value, on every worker. Collective."""
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    return box[0]
