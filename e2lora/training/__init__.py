"""One trial inside a worker group: adapt, train, evaluate, checkpoint, save the adapter.

Every random choice is a pure function of the trial's seed, the step and the worker's rank, so a
resumed trial, one on a used group and one in a fresh process give the same numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from e2lora.adapters import FAMILIES, count_parameters
from e2lora.adapters.family import DEFAULT_NAME
from e2lora.adapters.storage import save_adapter
from e2lora.config import TrialConfig, fingerprint_of
from e2lora.data import Batches, StepBatch
from e2lora.evaluate import judge_answers, score_rows
from e2lora.models import Base
from e2lora.plan import SharingPlan
from e2lora.records import Evaluation, TrialFolder, write_json, write_text
from e2lora.tasks import TrialData
from e2lora.tasks.packing import attends_flat
from e2lora.tasks.scores import Outcomes, RowScore, outcomes_of
from e2lora.training.activations import activation_checkpointed
from e2lora.training.checkpoint import TrainState, save_checkpoint
from e2lora.training.compiling import compiled
from e2lora.training.engine import Engine, learning_rate_factor
from e2lora.training.health import explained_memory, require_finite
from e2lora.training.meter import Meter
from e2lora.training.outset import (
    adapt_base,
    agreed_checkpoint,
    below,
    require_same_start,
    require_trainable,
    state_at,
    with_cut_batches,
)
from e2lora.training.stopping import best_of, is_over


class TrialStopped(Exception):
    """The attempt is no longer wanted: stop at once and report nothing."""


History = dict[str, list[float]]
"""What was measured, by name: one number for each step so far."""


@dataclass(frozen=True)
class Reports:
    """How a running trial speaks to the study; all are called on every worker.

    ``on_step`` is told what the step measured; it raises :class:`TrialStopped`, on all workers or
    none, so it is called by all at the same point, and says whether the state must be saved now:
    the machine will be taken away. ``alive`` may be called at any time, and never raises; its word
    says what is being done, where that is no step.
    """

    alive: Callable[..., None] = lambda doing=None: None
    on_step: Callable[[int, dict[str, float]], bool | None] = lambda step, measured: False
    on_evaluation: Callable[[Evaluation, Outcomes, History], None] = lambda *told: None


@dataclass(frozen=True)
class TrainedTrial:
    """What a finished trial leaves.

    Attributes:
        final: the evaluation of the weights that are kept.
        test_metrics: empty where the test rows were not asked for.
    """

    history: History
    evaluations: list[Evaluation]
    final: Evaluation
    test_metrics: dict[str, float]
    adapter_parameters: int
    head_parameters: int
    accumulation: int

    @property
    def losses(self) -> list[float]:
        """The mean training loss of every step."""
        return self.history["loss"]


def run_trial(
    base: Base,
    data: TrialData,
    plan: SharingPlan,
    config: TrialConfig,
    folder: TrialFolder,
    reports: Reports,
    group: Any = None,
    score_test: bool = False,
) -> TrainedTrial:
    """Train one trial, from its newest checkpoint if there is one; leaves ``base`` as it was.

    A family that touches the base leaves it changed, and says so: see ``Family.touches_base``.

    Args:
        group: process group of all workers, or None for one.
        score_test: score the kept weights on the test rows too: of a final run, never in a search.

    Raises:
        TrialStopped: from ``reports``.
        FloatingPointError: the loss is not finite.
        OutOfMemory: a step doesn't fit.
        ValueError: the plan doesn't fit, workers disagree, or a checkpoint is another trial's.
    """
    config = config.model_copy(
        update={
            "adapter": config.adapter.seeded(config.seed),
            "training": config.training.for_rows(len(data.train)),
        }
    )
    require_trainable(config, plan, data)
    run = _Run(base, data, plan, config, folder, reports, group)
    try:
        return run.to_the_end(score_test)
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
        rows = data.task.content("train")  # files may have changed under their names
        self.identity = fingerprint_of(
            [config.identity(), plan.fingerprint(), base.fingerprint, rows]
        )
        self.history: History = {}
        self.evaluations: list[Evaluation] = []
        self.scores: list[RowScore] = []  # of the last evaluation

    def to_the_end(self, score_test: bool) -> TrainedTrial:
        state = agreed_checkpoint(self.folder.checkpoints, self.identity, self.group)
        self.adapted = adapt_base(
            self.base, self.data, self.plan, self.config, state, self.group, self.reports.alive
        )
        counts = count_parameters(self.adapted)
        require_same_start(self.adapted, self.base, self.data, self.plan, self.config, self.group)
        with ExitStack() as stack:
            kind = self.config.training.activation_checkpointing
            stack.enter_context(activation_checkpointed(self.adapted, kind))
            training = with_cut_batches(
                self.adapted, self.base, self.data, self.config, self.group, self.reports.alive
            )
            self.config = self.config.model_copy(update={"training": training})
            stack.enter_context(compiled(self.adapted) if training.torch_compile else nullcontext())
            self._start_engine()
            stack.callback(self.engine.close)
            if state:
                self._go_to(state)
                self._tell_again()
            with explained_memory(training):
                self._train(range(state.step if state else 0, training.num_steps))
            self._return_to_best()
            self._have_answers_written()
            test_metrics = self._score_test() if score_test else {}
            with self.engine.gathered():
                self._save()
        return TrainedTrial(
            self.history,
            self.evaluations,
            self.final,
            test_metrics,
            *counts,
            training.accumulation,
        )

    def _start_engine(self) -> None:
        adapter, training = self.config.adapter, self.config.training
        self.engine = Engine(self.adapted, adapter, training)
        self.hooks = self.family.hooks(self.adapted, adapter, training, self.engine)
        self.meter = Meter(
            self.adapted, self.engine.device, training.precision, training.num_workers
        )

    # ---- state --------------------------------------------------------------------------------

    def _go_to(self, state: TrainState) -> None:
        self.engine.restore(state.tensors)
        self.hooks.restore(below("hooks/", state.tensors))
        self.history, self.evaluations = state.history, state.evaluations
        self.scores = state.scores

    def _tell_again(self) -> None:
        """The study may not have heard of the last evaluations before the checkpoint."""
        for evaluation in self.evaluations:
            self._report(evaluation)

    def _report(self, evaluation: Evaluation) -> None:
        self.reports.on_evaluation(evaluation, outcomes_of(self.scores), self.history)

    def _checkpoint(self, step: int) -> None:
        initial = self.family.initial(self.adapted, DEFAULT_NAME)
        tensors = self.engine.gather()
        tensors |= {f"initial/{name}": tensor.cpu() for name, tensor in initial.items()}
        tensors |= {f"hooks/{name}": tensor.cpu() for name, tensor in self.hooks.state().items()}
        self.reports.on_step(step, {})  # an attempt that lost its trial must not write
        if self.rank == 0:
            state = TrainState(
                step, self.identity, tensors, self.history, self.evaluations, self.scores
            )
            training = self.config.training
            best = None
            if self.evaluations:
                best = best_of(self.evaluations, training.early_stopping).step
            save_checkpoint(self.folder.checkpoints, state, training.save_total_limit, best)

    # ---- steps --------------------------------------------------------------------------------

    def _train(self, steps: range) -> None:
        """All of them, or as many as early stopping lets it."""
        config, pin = self.config, self.engine.device.type == "cuda"
        stopping = config.training.early_stopping
        batches = Batches(
            self.data,
            self.base.processor,
            config.training,
            config.seed,
            self.rank,
            one_sequence=attends_flat(self.adapted),
        )
        self.engine.module.train()
        with batches.prefetched(steps.start, steps.stop, pin_memory=pin) as prepared:
            self.meter.restart()
            for step, batch in zip(steps, prepared, strict=True):
                if is_over(self.evaluations, stopping):
                    break
                measured = self._train_step(step, batch)
                self._follow_up(step + 1, measured)

    def _train_step(self, step: int, batch: StepBatch) -> dict[str, float]:
        config, training, task = self.config, self.config.training, self.data.task
        _seed_dropout(_seed_of(config.seed, step, self.rank), self.engine.device)
        num_micro, device = len(batch.microbatches), self.engine.device
        # DeepSpeed averages over workers and microbatches; the loss is a mean over the batch.
        scale = training.num_workers * num_micro / batch.num_supervised
        total = torch.zeros((), dtype=torch.float64, device=device)
        for number, micro in enumerate(batch.microbatches, start=1):
            inputs = {key: value.to(device, non_blocking=True) for key, value in micro.items()}
            loss = task.loss_sum(self.engine.module, inputs)
            total += loss.detach().double()
            penalty = self.hooks.penalty()
            self.engine.backward(loss * scale if penalty is None else loss * scale + penalty)
            if number == num_micro:
                self.hooks.after_backward(step + 1)
            self.engine.micro_step(step)
        self.hooks.after_step(step + 1)
        total = total.cpu()
        if self.group:
            dist.all_reduce(total, group=self.group)
        mean = float(total) / batch.num_supervised
        require_finite(mean, step + 1, training)
        measured = {
            "loss": mean,
            "learning_rate": self._learning_rate(step),
            "grad_norm": math.nan if self.engine.skipped else self.engine.gradient_norm(),
            **self.meter.read(batch.num_tokens, training.global_batch_size),
        }
        for name in {**self.history, **measured}:  # on another device there may be others
            column = self.history.setdefault(name, [math.nan] * step)
            column.append(measured.get(name, math.nan))
        return measured

    def _learning_rate(self, step: int) -> float:
        """Of the adapter, where its family has one for all of its tensors."""
        training = self.config.training
        factor = learning_rate_factor(training, step) * self.engine.learning_rate_scale
        return training.learning_rate * factor

    def _follow_up(self, step: int, measured: dict[str, float]) -> None:
        """After ``step`` steps; a checkpoint comes before the study hears, so that stays done."""
        training = self.config.training
        save_now = self.reports.on_step(step, measured)
        evaluates = step == training.num_steps or _is_due(step, training.eval_every)
        if evaluates:
            self._evaluate(step)
        if save_now or evaluates or _is_due(step, training.checkpoint_every):
            self._checkpoint(step)
        if evaluates:
            self._report(self.evaluations[-1])
        self.meter.restart()

    # ---- scores -------------------------------------------------------------------------------

    def _evaluate(self, step: int) -> None:
        self.scores = self._scored("validation")
        generation = self.data.task.generation("validation")
        if generation and generation.every_evaluation:
            self.scores = self._judged("validation", self.scores)
        metrics = self._metrics(self.scores, step, "validation")
        since = self.evaluations[-1].step if self.evaluations else 0
        recent = self.history["loss"][since:]
        metrics["train_loss"] = math.fsum(recent) / len(recent)
        self.evaluations.append(Evaluation(step=step, metrics=metrics))

    def _scored(self, split: str) -> list[RowScore]:
        return score_rows(
            self.engine.module,
            self.data,
            split,
            self.base.processor,
            self.config.training.eval_batch_size,
            self.group,
            self._on_rows(f"scoring {split} rows"),
        )

    def _judged(self, split: str, scores: list[RowScore]) -> list[RowScore]:
        """With what the task finds of the answers that the model writes, where it has some."""
        return judge_answers(
            self.engine.module,
            self.data,
            split,
            self.base.processor,
            scores,
            self.group,
            self._on_rows(f"answering {split} rows"),
            on_token=self.reports.alive,
        )

    def _on_rows(self, doing: str) -> Callable[[int, int], None]:
        return lambda done, total: self.reports.alive(f"{doing} {done / total:.0%}")

    def _metrics(self, scores: list[RowScore], step: int, split: str) -> dict[str, float]:
        metrics = self.data.task.metrics(scores)
        for name, value in metrics.items():  # the last update may have broken the weights
            require_finite(value, step, self.config.training, f"{split} {name}")
        return metrics

    # ---- the end ------------------------------------------------------------------------------

    def _return_to_best(self) -> None:
        """The weights of the best evaluation, where early stopping asks for them."""
        self.final = best_of(self.evaluations, self.config.training.early_stopping)
        if self.final == self.evaluations[-1]:
            return
        state = state_at(
            self.final.step, self.folder.checkpoints, self.identity, self.reports.alive
        )
        history, evaluations = self.history, self.evaluations
        self._go_to(state)
        self.history, self.evaluations = history, evaluations
        self._report(self.final)

    def _have_answers_written(self) -> None:
        """By the weights that are kept, where that was left for the end."""
        generation = self.data.task.generation("validation")
        if generation is None or generation.every_evaluation:
            return
        self.scores = self._judged("validation", self.scores)
        metrics = self._metrics(self.scores, self.final.step, "validation")
        answered = Evaluation(step=self.final.step, metrics={**self.final.metrics, **metrics})
        self.evaluations = [answered if e == self.final else e for e in self.evaluations]
        self.final = answered
        self._report(answered)

    def _score_test(self) -> dict[str, float]:
        scores = self._judged("test", self._scored("test"))
        metrics = self._metrics(scores, self.final.step, "test")
        if self.rank == 0:
            write_json(self.folder.test_outcomes_file, outcomes_of(scores))
            write_text(self.folder.test_predictions_file, _lines(scores))
        return metrics

    def _save(self) -> None:
        if self.rank == 0:
            write_text(self.folder.predictions_file, _lines(self.scores))
            save_adapter(
                self.folder.adapter,
                self.adapted,
                self.base,
                self.plan,
                self.config.adapter,
                self.config,
                self.final,
            )


def _lines(scores: Sequence[RowScore]) -> str:
    """JSON lines: what was said and what is right, row after row."""
    rows = ({**s.outcomes, "prediction": s.prediction, "expected": s.expected} for s in scores)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _seed_dropout(seed: int, device: torch.device) -> None:
    """What ``torch.manual_seed`` does for the devices that are used here, in a hundredth of the
    time.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _seed_of(seed: int, step: int, rank: int) -> int:
    """A seed of its own for every step and worker (dropout), without any state to store."""
    return int(fingerprint_of([seed, step, rank]), 16) % 2**63
