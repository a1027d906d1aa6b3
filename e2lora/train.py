"""One trial inside a worker group: adapt, train, evaluate, checkpoint, save the adapter.

Every random choice is a pure function of the trial's seed, the step and the worker's rank, so a
resumed trial, one on a used group and one in a fresh process give the same numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from e2lora.adapters import FAMILIES, adapt, count_parameters, require_possible_trial
from e2lora.adapters.family import DEFAULT_NAME
from e2lora.adapters.storage import save_adapter
from e2lora.checkpoint import TrainState, load_checkpoint, save_checkpoint
from e2lora.config import TrialConfig, fingerprint_of
from e2lora.data import microbatches_of, step_rows
from e2lora.engine import Engine
from e2lora.evaluate import evaluate
from e2lora.models import Base, reset_head
from e2lora.plan import SharingPlan
from e2lora.profile import measure_group_gradients
from e2lora.records import Evaluation, TrialFolder
from e2lora.tasks import TrialData

CHECKPOINT_TRIES = 30  # one a second


class TrialStopped(Exception):
    """The attempt is no longer wanted: stop at once and report nothing."""


@dataclass(frozen=True)
class Reports:
    """How a running trial speaks to the study; all are called on every worker.

    ``on_step`` raises :class:`TrialStopped`, on all workers or none; so it is called by all at
    the same point. ``alive`` may be called at any time, and never raises.
    """

    alive: Callable[[], None] = lambda: None
    on_step: Callable[[int], None] = lambda step: None
    on_evaluation: Callable[[Evaluation, list[float]], None] = lambda evaluation, outcomes: None


@dataclass(frozen=True)
class TrainedTrial:
    """What a finished trial leaves: loss of every step, evaluations, and counts."""

    losses: list[float]
    evaluations: list[Evaluation]
    adapter_parameters: int
    head_parameters: int


def run_trial(
    base: Base,
    data: TrialData,
    plan: SharingPlan,
    config: TrialConfig,
    folder: TrialFolder,
    reports: Reports,
    group: Any = None,
) -> TrainedTrial:
    """Train one trial, from its newest checkpoint if there is one; leaves ``base`` as it was.

    A family that touches the base leaves it changed, and says so: see ``Family.touches_base``.

    Args:
        group: process group of all workers, or None for one.

    Raises:
        TrialStopped: from ``reports``.
        FloatingPointError: the loss is not finite.
        ValueError: the plan doesn't fit, or a checkpoint is another trial's.
    """
    require_possible_trial(config)
    config = config.model_copy(update={"adapter": config.adapter.seeded(config.seed)})
    run = _Run(base, data, plan, config, folder, reports, group)
    try:
        return run.to_the_end()
    finally:
        if run.adapted is not None:
            run.adapted.unload()
        base.model.requires_grad_(False)
        base.model.eval()


class _Run:
    def __init__(
        self,
        base: Base,
        data: TrialData,
        plan: SharingPlan,
        config: TrialConfig,
        folder: TrialFolder,
        reports: Reports,
        group: Any,
    ) -> None:
        self.base, self.data, self.plan, self.config = base, data, plan, config
        self.folder, self.reports, self.group = folder, reports, group
        self.family = FAMILIES[config.adapter.family]
        self.adapted: Any = None
        self.rank = dist.get_rank(group) if group else 0
        self.identity = fingerprint_of([config.identity(), plan.fingerprint()])
        self.losses: list[float] = []
        self.evaluations: list[Evaluation] = []
        self.outcomes: list[float] = []

    def to_the_end(self) -> TrainedTrial:
        adapter, training = self.config.adapter, self.config.training
        state = self._agreed_checkpoint()
        self._adapt(state)
        adapter_parameters, head_parameters = count_parameters(self.adapted)
        self.engine = Engine(self.adapted, adapter, training)
        self.hooks = self.family.hooks(self.adapted, adapter, training, self.engine)
        try:
            start = self._resume(state) if state else 0
            for step in range(start, training.max_steps):
                self._train_step(step)
                self._follow_up(step + 1)
        finally:
            self.engine.close()
        if self.rank == 0:
            save_adapter(
                self.folder.adapter,
                self.adapted,
                self.base,
                self.plan,
                adapter,
                self.config,
                self.evaluations[-1],
            )
        return TrainedTrial(self.losses, self.evaluations, adapter_parameters, head_parameters)

    def _adapt(self, state: TrainState | None) -> None:
        """As at the trial's beginning, also where it goes on: its start is not drawn again."""
        config, group = self.config, self.group
        initial = _below("initial/", state.tensors) if state else None
        gradients = None
        if state is None and self.family.needs_gradients:
            gradients = measure_group_gradients(
                self.base, self.data, config, self.plan, group, self.reports.alive
            )
        reset_head(self.base.model, self.base.head, config.seed)
        torch.manual_seed(config.seed)
        one_start = group and state is None and self.family.touches_base(config.adapter)
        if one_start and self.rank > 0:
            initial = _told_by_first(None, group)
        self.adapted = adapt(
            self.base.model,
            self.plan,
            config.adapter,
            self.base.head,
            gradients=gradients,
            initial=initial,
            in_loop=True,
        )
        if one_start and self.rank == 0:  # singular vectors may differ between machines
            first = self.family.initial(self.adapted, DEFAULT_NAME)
            _told_by_first({name: tensor.cpu() for name, tensor in first.items()}, group)

    def _resume(self, state: TrainState) -> int:
        self.engine.restore(state.tensors)
        self.hooks.restore(_below("hooks/", state.tensors))
        self.losses, self.evaluations = state.losses, state.evaluations
        self.outcomes = state.outcomes
        for evaluation in self.evaluations:  # the study may not have heard of the last ones
            self.reports.on_evaluation(evaluation, self.outcomes)
        return state.step

    def _agreed_checkpoint(self) -> TrainState | None:
        """The newest state, the same one on every worker: a shared disk may lag on some nodes."""
        for _ in range(CHECKPOINT_TRIES):
            state = load_checkpoint(self.folder.checkpoints, self.identity)
            if self.group is None:
                return state
            steps: list[Any] = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(steps, state and state.step, group=self.group)
            if len(set(steps)) == 1:
                return state
            time.sleep(1.0)
        raise RuntimeError(
            f"all workers must see the same newest checkpoint; they see steps {steps} in "
            f"{self.folder.checkpoints}. Is the storage path one that all nodes share?"
        )

    def _train_step(self, step: int) -> None:
        config, training = self.config, self.config.training
        task, tokenizer = self.data.task, self.base.tokenizer
        torch.manual_seed(_seed_of(config.seed, step, self.rank))
        numbers = step_rows(self.data.lengths, step, training.global_batch_size, config.seed)
        rows = [self.data.train[i] for i in numbers]
        num_micro = training.gradient_accumulation_steps
        # DeepSpeed averages over workers and microbatches; the loss is a mean over the batch.
        scale = training.num_workers * num_micro / task.num_supervised(rows)
        total = torch.zeros((), dtype=torch.float64)
        self.adapted.train()
        shares = microbatches_of(rows, self.rank, training.num_workers, num_micro)
        for number, micro in enumerate(shares, start=1):
            batch = task.collate(micro, tokenizer)
            batch = {key: value.to(self.engine.device) for key, value in batch.items()}
            loss = task.loss_sum(self.engine.module, batch)
            total += loss.detach().double().cpu()
            penalty = self.hooks.penalty()
            self.engine.backward(loss * scale if penalty is None else loss * scale + penalty)
            if number == num_micro:
                self.hooks.after_backward(step + 1)
            self.engine.micro_step(step)
        self.hooks.after_step(step + 1)
        if self.group:
            dist.all_reduce(total, group=self.group)
        mean = float(total) / task.num_supervised(rows)
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the training loss must stay finite; it was {mean} at step {step + 1} with "
                f"learning_rate={training.learning_rate:g}. Lower the learning rate."
            )
        self.losses.append(mean)

    def _follow_up(self, step: int) -> None:
        """After ``step`` steps; a checkpoint comes before the study hears, so that stays done."""
        training = self.config.training
        self.reports.on_step(step)
        evaluates = step == training.max_steps or _is_due(step, training.eval_every)
        if evaluates:
            self._evaluate(step)
        if evaluates or _is_due(step, training.checkpoint_every):
            self._checkpoint(step)
        if evaluates:
            self.reports.on_evaluation(self.evaluations[-1], self.outcomes)

    def _evaluate(self, step: int) -> None:
        metrics, self.outcomes = evaluate(
            self.adapted,
            self.data.task,
            self.base.tokenizer,
            self.data.validation,
            self.config.training.eval_batch_size,
            self.group,
            on_batch=self.reports.alive,
        )
        since = self.evaluations[-1].step if self.evaluations else 0
        recent = self.losses[since:]
        metrics["train_loss"] = math.fsum(recent) / len(recent)
        self.evaluations.append(Evaluation(step=step, metrics=metrics))

    def _checkpoint(self, step: int) -> None:
        initial = self.family.initial(self.adapted, DEFAULT_NAME)
        tensors = self.engine.gather()
        tensors |= {f"initial/{name}": tensor.cpu() for name, tensor in initial.items()}
        tensors |= {f"hooks/{name}": tensor.cpu() for name, tensor in self.hooks.state().items()}
        self.reports.on_step(step)  # an attempt that lost its trial must not write
        if self.rank == 0:
            state = TrainState(
                step, self.identity, tensors, self.losses, self.evaluations, self.outcomes
            )
            save_checkpoint(self.folder.checkpoints, state)


def _told_by_first(value: Any, group: Any) -> Any:
    """The first worker's value, on every worker. Collective."""
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    return box[0]


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _seed_of(seed: int, step: int, rank: int) -> int:
    """A seed of its own for every step and worker (dropout), without any state to store."""
    return int(fingerprint_of([seed, step, rank]), 16) % 2**63
